"""Micro-kernels of decode attention as LLVM vector code, for numba.

Left to itself LLVM vectorises the channel loops but adds up each score by itself, which costs
as much as the products. Here 16 scores (some queries times some tokens) are formed together
and their lanes are added by one shared tree. Vectors have 16 floats; LLVM cuts them to what
the machine has.

Stored elements are of a *kind*: 16-bit and 32-bit floats, or integer codes packed as
`core.codes.pack` does, of which one load of 16 bytes gives 16 channels of each of
8 / bits parts of the head.
"""

import math
from collections.abc import Callable
from itertools import product
from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.core.registry import cpu_target
from numba.extending import intrinsic

LANES = 16
LOWEST = -1e30
GROUPS = (1, 2, 4)
"""Queries that a micro-kernel takes together."""

KINDS = FLOAT32, BFLOAT16, FLOAT16, CODES8, CODES4, CODES2 = tuple(range(6))
_CODE_BITS = {CODES8: 8, CODES4: 4, CODES2: 2}
_ITEM_BYTES = {FLOAT32: 4, BFLOAT16: 2, FLOAT16: 2}

_FLOAT, _INT, _LONG = ir.FloatType(), ir.IntType(32), ir.IntType(64)
_FLOATS, _INTS = ir.VectorType(_FLOAT, LANES), ir.VectorType(_INT, LANES)
_SIZES = ("row", "stride", "num_tokens", "head_size")
_FAST = ("contract", "reassoc", "nsz")

HAS_LOOKUP = "+avx512f" in cpu_target.target_context.codegen().magic_tuple()[2].split(",")
"""Whether the machine that numba compiles for has AVX-512."""

Builder = ir.IRBuilder
Value = ir.Value


def _load(builder: Builder, pointer: Value, element: ir.Type) -> Value:
    """Load 16 elements from an address that need not be aligned."""
    vector = ir.VectorType(element, LANES)
    loaded = builder.load(builder.bitcast(pointer, vector.as_pointer()))
    loaded.align = 1
    return loaded


def _store(builder: Builder, value: Value, pointer: Value) -> None:
    builder.store(value, builder.bitcast(pointer, value.type.as_pointer())).align = 1


def _offset(builder: Builder, base: Value, stride: Value | int, index: Value | int) -> Value:
    """The pointer `base` + `stride` * `index`."""
    stride, index = (_LONG(x) if isinstance(x, int) else x for x in (stride, index))
    return builder.gep(base, [builder.mul(stride, index)])


def _splat(builder: Builder, scalar: Value) -> Value:
    undefined = ir.Constant(ir.VectorType(scalar.type, LANES), ir.Undefined)
    single = builder.insert_element(undefined, scalar, _INT(0))
    return builder.shuffle_vector(single, undefined, ir.Constant(_INTS, [0] * LANES))


def _constants(value: int) -> ir.Constant:
    return ir.Constant(_INTS, [value] * LANES)


def _multiply_add(builder: Builder, a: Value, b: Value, c: Value) -> Value:
    return builder.fadd(builder.fmul(a, b, flags=_FAST), c, flags=_FAST)


def _widen(builder: Builder, kind: int, pointer: Value) -> list[Value]:
    """Load 16 stored units; returns float vectors, one per code in a byte."""
    if kind == FLOAT32:
        return [_load(builder, pointer, _FLOAT)]
    if kind == FLOAT16:
        return [builder.fpext(_load(builder, pointer, ir.HalfType()), _FLOATS)]
    if kind == BFLOAT16:
        raw = builder.zext(_load(builder, pointer, ir.IntType(16)), _INTS)
        return [builder.bitcast(builder.shl(raw, _constants(16)), _FLOATS)]
    bits = _CODE_BITS[kind]
    raw = builder.zext(_load(builder, pointer, ir.IntType(8)), _INTS)
    if HAS_LOOKUP and bits < 8:
        return _look_up(builder, raw, bits)
    parts = [builder.lshr(raw, _constants(shift)) for shift in range(0, 8, bits)]
    return [builder.sitofp(builder.and_(p, _constants(2**bits - 1)), _FLOATS) for p in parts]


def _look_up(builder: Builder, raw: Value, bits: int) -> list[Value]:
    """Codes of up to 4 bits as floats, by one AVX-512 lookup each.

    A lookup takes the lowest 4 bits of a lane and ignores the others, so that codes need not be
    masked, and two codes of 2 bits share a shift.
    """
    permute = ir.FunctionType(_FLOATS, [_FLOATS, _INTS])
    name = "llvm.x86.avx512.permvar.sf.512"
    function = cgutils.get_or_insert_function(builder.module, permute, name)
    parts = []
    for shift in (0, 4):
        index = builder.lshr(raw, _constants(shift)) if shift else raw
        for low in range(0, 4, bits):
            codes = [float((i >> low) & (2**bits - 1)) for i in range(LANES)]
            parts.append(builder.call(function, [ir.Constant(_FLOATS, codes), index]))
    return parts


def _sum_lanes(builder: Builder, vectors: list[Value]) -> Value:
    """The vector whose lane i is the sum of the lanes of the i-th of 16 vectors."""
    while len(vectors) > 1:
        half = len(vectors) // 2
        low = [
            source + block + lane
            for block in range(0, LANES, 2 * half)
            for source in (0, LANES)
            for lane in range(half)
        ]
        high = [lane + half for lane in low]
        masks = [ir.Constant(_INTS, lanes) for lanes in (low, high)]
        vectors = [
            builder.fadd(*(builder.shuffle_vector(a, b, mask) for mask in masks), flags=_FAST)
            for a, b in zip(vectors[:half], vectors[half:], strict=True)
        ]
    return vectors[0]


class _Tile:
    """Stored vectors of one head: where they lie and how to load parts of them."""

    def __init__(self, builder: Builder, kind: int, base: Value, head_size: Value) -> None:
        self.builder, self.kind, self.base = builder, kind, base
        self.per_unit = 8 // _CODE_BITS[kind] if kind in _CODE_BITS else 1
        self.item_bytes = _ITEM_BYTES.get(kind, 1)
        self.width = builder.udiv(head_size, _LONG(self.per_unit))

    def channels(self, unit: Value) -> list[Value]:
        """First channel of each vector that the 16 units from `unit` on give."""
        return [
            self.builder.add(unit, self.builder.mul(self.width, _LONG(part)))
            for part in range(self.per_unit)
        ]

    def vectors(self, token: Value, unit: Value) -> list[Value]:
        """Float vectors of the 16 units from `unit` on, of the token at pointer `token`."""
        return _widen(self.builder, self.kind, _offset(self.builder, token, self.item_bytes, unit))


def _emit_scores(builder: Builder, kind: int, group: int, args: dict[str, Value]) -> None:
    """16 / `group` tokens times `group` queries at a time; see `score_tokens`."""
    tile = _Tile(builder, kind, args["stored"], args["head_size"])
    num_at_once = LANES // group
    sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(LANES)]
    step = _LONG(num_at_once)
    last = builder.sub(args["num_tokens"], _LONG(1))
    with cgutils.for_range_slice(builder, _LONG(0), args["num_tokens"], step, _LONG) as (first, _):
        # Past the end the last token is read again, so that nothing foreign is ever touched.
        tokens = []
        for i in range(num_at_once):
            index = builder.add(first, _LONG(i))
            index = builder.select(builder.icmp_signed("<", index, last), index, last)
            tokens.append(_offset(builder, tile.base, args["stride"], index))
        for total in sums:
            builder.store(ir.Constant(_FLOATS, [0.0] * LANES), total)
        _emit_products(builder, tile, tokens, group, args, sums)
        scores = _sum_lanes(builder, [builder.load(s) for s in sums])
        for q in range(group):
            lanes = [q * num_at_once + i for i in range(num_at_once)]
            mask = ir.Constant(ir.VectorType(_INT, num_at_once), lanes)
            row = builder.shuffle_vector(scores, scores, mask)
            at = builder.gep(_offset(builder, args["scores"], args["row"], q), [first])
            _store(builder, row, at)


def _emit_products(
    builder: Builder,
    tile: _Tile,
    tokens: list[Value],
    group: int,
    args: dict[str, Value],
    sums: list[Value],
) -> None:
    """Add to each of the 16 `sums` its query times its token, lane by lane."""
    step = _LONG(LANES)
    with cgutils.for_range_slice(builder, _LONG(0), tile.width, step, _LONG) as (unit, _):
        query = [
            [
                _load(
                    builder,
                    builder.gep(_offset(builder, args["query"], args["head_size"], q), [channel]),
                    _FLOAT,
                )
                for channel in tile.channels(unit)
            ]
            for q in range(group)
        ]
        for i, token in enumerate(tokens):
            parts = tile.vectors(token, unit)
            for q in range(group):
                total = builder.load(sums[q * len(tokens) + i])
                for part, channel in zip(parts, query[q], strict=True):
                    total = _multiply_add(builder, part, channel, total)
                builder.store(total, sums[q * len(tokens) + i])


def _emit_accumulate(builder: Builder, kind: int, group: int, args: dict[str, Value]) -> None:
    """64 channels at a time stay in registers over all tokens; see `accumulate_tokens`."""
    tile = _Tile(builder, kind, args["stored"], args["head_size"])
    units = range(0, 64 // tile.per_unit, LANES)
    step = _LONG(64 // tile.per_unit)
    with cgutils.for_range_slice(builder, _LONG(0), tile.width, step, _LONG) as (first, _):
        channels = [c for u in units for c in tile.channels(builder.add(first, _LONG(u)))]
        targets = [
            [
                builder.gep(_offset(builder, args["acc"], args["head_size"], q), [channel])
                for channel in channels
            ]
            for q in range(group)
        ]
        sums = [[cgutils.alloca_once(builder, _FLOATS) for _ in row] for row in targets]
        for row, pointers in zip(sums, targets, strict=True):
            for total, pointer in zip(row, pointers, strict=True):
                builder.store(_load(builder, pointer, _FLOAT), total)
        with cgutils.for_range(builder, args["num_tokens"], intp=_LONG) as loop:
            token = _offset(builder, tile.base, args["stride"], loop.index)
            parts = [
                vector
                for u in units
                for vector in tile.vectors(token, builder.add(first, _LONG(u)))
            ]
            for q, row in enumerate(sums):
                weights = _offset(builder, args["weights"], args["row"], q)
                weight = _splat(builder, builder.load(builder.gep(weights, [loop.index])))
                for total, part in zip(row, parts, strict=True):
                    builder.store(_multiply_add(builder, part, weight, builder.load(total)), total)
        for row, pointers in zip(sums, targets, strict=True):
            for total, pointer in zip(row, pointers, strict=True):
                _store(builder, builder.load(total), pointer)


def _pointer(context: Any, builder: Builder, array_type: Any, array: Value, index: Value) -> Value:
    return builder.gep(context.make_array(array_type)(context, builder, array).data, [index])


def _micro_kernel(
    emit: Callable[[Builder, int, int, dict[str, Value]], None], arrays: tuple[str, str, str]
) -> Any:
    """A numba intrinsic that runs `emit` for the kind and the group given at run time.

    Its arguments: kind, group, (array, start) * 3, row (distance between the scores of two
    queries), stride (bytes from token to token), num_tokens, head_size.
    """

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        args_of_arrays = zip(arrays, range(2, 8, 2), strict=True)
        named = {
            name: _pointer(context, builder, signature.args[i], args[i], args[i + 1])
            for name, i in args_of_arrays
        }
        named |= dict(zip(_SIZES, args[8:], strict=True))
        for kind, group in product(KINDS, GROUPS):
            this_kind = builder.icmp_signed("==", args[0], _LONG(kind))
            this_group = builder.icmp_signed("==", args[1], _LONG(group))
            with builder.if_then(builder.and_(this_kind, this_group)):
                emit(builder, kind, group, named)
        return context.get_dummy_value()

    @intrinsic
    def micro_kernel(  # type: ignore[no-untyped-def]
        typing, kind, group, a, start_a, b, start_b, c, start_c, row, stride, num_tokens, head_size
    ):
        long = types.int64
        arrays_and_starts = (a, long, b, long, c, long)
        return types.void(long, long, *arrays_and_starts, *[long] * len(_SIZES)), generate

    return micro_kernel


score_tokens = _micro_kernel(_emit_scores, ("query", "stored", "scores"))
"""Scores [group, num_tokens] = queries times stored keys.

Arrays: queries float32 [group, head_size], stored bytes, scores (float32). Up to 16 / `group` - 1
scores past `num_tokens` are written too and are meaningless. `head_size` is a multiple of 64.
"""

accumulate_tokens = _micro_kernel(_emit_accumulate, ("weights", "stored", "acc"))
"""Sums [group, head_size] += weights [group, num_tokens] times stored values.

Arrays: weights float32, stored bytes, sums (float32). `head_size` is a multiple of 64.
"""


def _constant(value: float) -> ir.Constant:
    return ir.Constant(_FLOATS, [value] * LANES)


def _larger(builder: Builder, a: Value, b: Value) -> Value:
    """The larger of two; `b` if either is NaN."""
    return builder.select(builder.fcmp_ordered(">", a, b), a, b)


def _plus(builder: Builder, a: Value, b: Value) -> Value:
    return builder.fadd(a, b, flags=_FAST)


def _fold(builder: Builder, combine: Callable[..., Value], vector: Value) -> Value:
    """Combine the lanes of a vector into one float."""
    for distance in (8, 4, 2, 1):
        lanes = [(lane + distance) % LANES for lane in range(LANES)]
        turned = builder.shuffle_vector(vector, vector, ir.Constant(_INTS, lanes))
        vector = combine(builder, vector, turned)
    return builder.extract_element(vector, _INT(0))


def _exp2(builder: Builder, x: Value) -> Value:
    """2^x for x at most 0, by a polynomial to 1.2e-7; 0 from x = -64 down, NaN where x is NaN."""
    smallest = _constant(-64.0)
    # What is not above -64 must not reach the conversion, but need not give a power either.
    whole = builder.fsub(_larger(builder, x, smallest), _constant(0.5))
    whole = builder.fptosi(whole, _INTS)
    rest = builder.fsub(x, builder.sitofp(whole, _FLOATS))
    power = _constant(math.log(2) ** 6 / math.factorial(6))
    for degree in range(5, -1, -1):
        coefficient = _constant(math.log(2) ** degree / math.factorial(degree))
        power = _multiply_add(builder, power, rest, coefficient)
    exponent = builder.shl(builder.add(whole, _constants(127)), _constants(23))
    power = builder.fmul(power, builder.bitcast(exponent, _FLOATS))
    return builder.select(builder.fcmp_ordered("<=", x, smallest), _constant(0.0), power)


@intrinsic
def affine_max(typing, work, scores, params, row, num_tokens, early_sum, late_sum):  # type: ignore[no-untyped-def]
    """Raw scores to scores; returns their maximum.

    A score is raw * scale + early_sum * first zero of the key + late_sum * second zero. The
    maximum passes over NaN, which `weigh` keeps. Scores are padded to a multiple of 16 with very
    low ones. Params lie `row` floats apart.
    """

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        array, scores, params, row, num_tokens, *query_sums = args
        base = _pointer(context, builder, signature.args[0], array, _LONG(0))
        starts = [scores, *(builder.add(params, builder.mul(row, _LONG(i))) for i in range(3))]
        top = cgutils.alloca_once(builder, _FLOATS)
        builder.store(_constant(LOWEST), top)
        early_sum, late_sum = (_splat(builder, total) for total in query_sums)
        limit = _splat(builder, builder.trunc(num_tokens, _INT))
        step = _LONG(LANES)
        with cgutils.for_range_slice(builder, _LONG(0), num_tokens, step, _LONG) as (first, _):
            raw, scale, early, late = (
                _load(builder, builder.gep(base, [builder.add(start, first)]), _FLOAT)
                for start in starts
            )
            value = _multiply_add(builder, late_sum, late, builder.fmul(early_sum, early))
            value = _multiply_add(builder, raw, scale, value)
            lanes = ir.Constant(_INTS, list(range(LANES)))
            index = builder.add(_splat(builder, builder.trunc(first, _INT)), lanes)
            inside = builder.icmp_signed("<", index, limit)
            value = builder.select(inside, value, _constant(LOWEST))
            builder.store(_larger(builder, value, builder.load(top)), top)
            _store(builder, value, builder.gep(base, [builder.add(scores, first)]))
        return _fold(builder, _larger, builder.load(top))

    long = types.int64
    sums = (types.float32, types.float32)
    return types.float32(work, long, long, long, long, *sums), generate


@intrinsic
def weigh(typing, work, scores, params, row, num_tokens, top):  # type: ignore[no-untyped-def]
    """Scores to weights of codes, exp2(score - top) * scale of the value.

    Returns the sum of exp2 and the sum of exp2 * zero of the value.
    """

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        array, scores, params, row, num_tokens, top = args
        base = _pointer(context, builder, signature.args[0], array, _LONG(0))
        scales, zeros = (builder.add(params, builder.mul(row, _LONG(i))) for i in (3, 4))
        sums = [cgutils.alloca_once(builder, _FLOATS) for _ in range(2)]
        for total in sums:
            builder.store(_constant(0.0), total)
        top = _splat(builder, top)
        step = _LONG(LANES)
        with cgutils.for_range_slice(builder, _LONG(0), num_tokens, step, _LONG) as (first, _):
            score, scale, zero = (
                _load(builder, builder.gep(base, [builder.add(start, first)]), _FLOAT)
                for start in (scores, scales, zeros)
            )
            power = _exp2(builder, builder.fsub(score, top))
            for total, term in zip(sums, (power, builder.fmul(power, zero)), strict=True):
                builder.store(_plus(builder, builder.load(total), term), total)
            target = builder.gep(base, [builder.add(scores, first)])
            _store(builder, builder.fmul(power, scale), target)
        results = [_fold(builder, _plus, builder.load(total)) for total in sums]
        return context.make_tuple(builder, signature.return_type, results)

    long = types.int64
    pair = types.UniTuple(types.float32, 2)
    return pair(work, long, long, long, long, types.float32), generate


@intrinsic
def prefetch(typing, stored, start, num_bytes):  # type: ignore[no-untyped-def]
    """Ask for bytes ahead of their use: pages are scattered, which hardware cannot foresee."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        base = _pointer(context, builder, signature.args[0], args[0], args[1])
        arguments = [base.type, _INT, _INT, _INT]
        function = cgutils.get_or_insert_function(
            builder.module, ir.FunctionType(ir.VoidType(), arguments), "llvm.prefetch.p0i8"
        )
        step = _LONG(64)
        with cgutils.for_range_slice(builder, _LONG(0), args[2], step, _LONG) as (at, _):
            read, second_level, data = _INT(0), _INT(2), _INT(1)
            builder.call(function, [builder.gep(base, [at]), read, second_level, data])
        return context.get_dummy_value()

    return types.void(stored, types.int64, types.int64), generate


@intrinsic
def float_from_bits(typing_context, bits):  # type: ignore[no-untyped-def]
    """Reinterpret int32 as float32."""

    def generate(context: Any, builder: Builder, signature: Any, args: Any) -> Value:
        return builder.bitcast(args[0], _FLOAT)

    return types.float32(types.int32), generate
