"""float16 in numba, which has no such type: conversions from and to its bits."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

from vllm_zipvl.core.codes import SCALE_DROPPED_BITS


@intrinsic
def half_to_float(typing_context, bits):  # type: ignore[no-untyped-def]
    """The float32 value of a float16 given as uint16."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.fpext(builder.bitcast(args[0], ir.HalfType()), ir.FloatType())

    return types.float32(types.uint16), generate


@intrinsic
def float_to_half(typing_context, value):  # type: ignore[no-untyped-def]
    """The nearest float16 of a float32, ties to even, as uint16."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        return builder.bitcast(builder.fptrunc(args[0], ir.HalfType()), ir.IntType(16))

    return types.uint16(types.float32), generate


@intrinsic
def scales_to_floats(typing_context, word):  # type: ignore[no-untyped-def]
    """The float32 values of the two scales in a uint16 (`core.codes.byte_to_scale`)."""

    def generate(context: Any, builder: ir.IRBuilder, signature: Any, args: Any) -> ir.Value:
        # In 16 bits throughout, so that LLVM makes vectors of it.
        short = ir.IntType(16)
        dropped = short(SCALE_DROPPED_BITS)
        bytes_ = (builder.and_(args[0], short(255)), builder.lshr(args[0], short(8)))
        halves = [builder.bitcast(builder.shl(b, dropped), ir.HalfType()) for b in bytes_]
        floats = [builder.fpext(half, ir.FloatType()) for half in halves]
        return context.make_tuple(builder, signature.return_type, floats)

    return types.UniTuple(types.float32, 2)(types.uint16), generate
