"""Short lines of numbers worked on as one vector each, for the CPU: their length is part of the compiled type.

LLVM does not make vectors of these loops by itself: for all it knows the arrays may overlap.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import types
from numba.extending import intrinsic

FLAGS = ("contract",)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Address of array[at], as that of a vector."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


@intrinsic
def add_line(typing_context: Any, target: Any, at: Any, source: Any, start: Any, weight: Any, length: Any) -> Any:
    """target[at : at + L] += weight * source[start : start + L], L = len(length); flat arrays of one real type, no overlap."""
    return _line_operation(target, at, source, start, weight, length, on_target=False)


@intrinsic
def horner_line(typing_context: Any, target: Any, at: Any, source: Any, start: Any, factor: Any, length: Any) -> Any:
    """target[at : at + L] = factor * target[at : at + L] + source[start : start + L]."""
    return _line_operation(target, at, source, start, factor, length, on_target=True)


def _line_operation(target: Any, at: Any, source: Any, start: Any, factor: Any, length: Any, on_target: bool) -> Any:
    signature = types.void(target, types.uintp, source, types.uintp, target.dtype, length)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        element = context.get_value_type(target.dtype)
        vector = ir.VectorType(element, len(length))
        place = _pointer(context, builder, target, arguments[0], arguments[1], vector)
        other = _pointer(context, builder, source, arguments[2], arguments[3], vector)
        many = builder.insert_element(ir.Constant(vector, ir.Undefined), arguments[4], ir.Constant(ir.IntType(32), 0))
        zeros = ir.Constant(ir.VectorType(ir.IntType(32), len(length)), [0] * len(length))
        many = builder.shuffle_vector(many, ir.Constant(vector, ir.Undefined), zeros)
        own, given = builder.load(place, align=4), builder.load(other, align=4)
        scaled, added = (own, given) if on_target else (given, own)
        product = builder.fmul(many, scaled, flags=FLAGS)
        builder.store(builder.fadd(product, added, flags=FLAGS), place, align=4)
        return context.get_dummy_value()

    return signature, generate
