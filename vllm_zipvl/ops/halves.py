"""float16 in numba, which has no such type: conversions from and to its bits."""

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic


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
