"""Short lines of numbers worked on as one vector each, for the CPU: their length is part of the compiled type.

LLVM does not make vectors of these loops by itself: for all it knows the arrays may overlap.
"""

from __future__ import annotations

from typing import Any

from llvmlite import ir
from numba.core import cgutils, types
from numba.extending import intrinsic

FLAGS = ("contract",)


def _pointer(context: Any, builder: Any, kind: Any, array: Any, at: Any, vector: Any) -> Any:
    """Address of array[at], as that of a vector."""
    data = context.make_array(kind)(context, builder, array).data
    return builder.bitcast(builder.gep(data, [at]), vector.as_pointer())


def _spread(builder: Any, number: Any, vector: Any) -> Any:
    """A vector, all of the same number."""
    one = builder.insert_element(ir.Constant(vector, ir.Undefined), number, ir.Constant(ir.IntType(32), 0))
    zeros = ir.Constant(ir.VectorType(ir.IntType(32), vector.count), [0] * vector.count)
    return builder.shuffle_vector(one, ir.Constant(vector, ir.Undefined), zeros)


@intrinsic
def add_line(typing_context: Any, target: Any, at: Any, source: Any, start: Any, weight: Any, length: Any) -> Any:
    """target[at : at + L] += weight * source[start : start + L], L = len(length); flat arrays of one real type, no overlap."""
    signature = types.void(target, types.uintp, source, types.uintp, target.dtype, length)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector = ir.VectorType(context.get_value_type(target.dtype), len(length))
        place = _pointer(context, builder, target, arguments[0], arguments[1], vector)
        given = builder.load(_pointer(context, builder, source, arguments[2], arguments[3], vector), align=4)
        product = builder.fmul(_spread(builder, arguments[4], vector), given, flags=FLAGS)
        builder.store(builder.fadd(product, builder.load(place, align=4), flags=FLAGS), place, align=4)
        return context.get_dummy_value()

    return signature, generate


@intrinsic
def polynomial_line(typing_context: Any, target: Any, taps: Any, f: Any, length: Any) -> Any:
    """target[t] = sum_d taps[d, t] f^(D - d), t < L: taps is flat, [D + 1, L], highest power first. Horner's rule in registers:
    through memory each power would wait for the one before it to be stored."""
    signature = types.void(target, taps, target.dtype, length)

    def generate(context: Any, builder: Any, signature: Any, arguments: Any) -> Any:
        vector, word = ir.VectorType(context.get_value_type(target.dtype), len(length)), ir.IntType(64)
        first = ir.Constant(word, 0)
        many = _spread(builder, arguments[2], vector)
        terms = builder.udiv(context.make_array(taps)(context, builder, arguments[1]).nitems, ir.Constant(word, len(length)))
        sums = cgutils.alloca_once(builder, vector)
        builder.store(builder.load(_pointer(context, builder, taps, arguments[1], first, vector), align=4), sums)
        with cgutils.for_range_slice(builder, ir.Constant(word, 1), terms, ir.Constant(word, 1)) as (term, _):
            start = builder.mul(term, ir.Constant(word, len(length)))
            row = builder.load(_pointer(context, builder, taps, arguments[1], start, vector), align=4)
            product = builder.fmul(builder.load(sums), many, flags=FLAGS)
            builder.store(builder.fadd(product, row, flags=FLAGS), sums)
        builder.store(builder.load(sums), _pointer(context, builder, target, arguments[0], first, vector), align=4)
        return context.get_dummy_value()

    return signature, generate
