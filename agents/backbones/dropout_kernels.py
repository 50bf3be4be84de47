"""Dropout for CPUs, in Numba's Python; compiled and called by ``dropout.py``."""

import numpy as np
from llvmlite import ir
from numba import types
from numba.extending import intrinsic

from minrl.agents.backbones.native_math import ZERO

# Numbers that scatter the bits of a counter: the golden ratio's, and MurmurHash3's.
STRIDE, MIX_1, MIX_2 = 0x9E3779B1, 0x85EBCA6B, 0xC2B2AE35


@intrinsic
def random_bits(_context, _index, _low, _high):
    """Return 32 random bits that follow from a position and the two halves of a key.

    In 32-bit instructions: Numba would widen them to 64, and a vector would hold half as many.
    """

    def generate(_target, builder, _signature, arguments):
        word = ir.IntType(32)

        def folded(bits, shift):
            return builder.xor(bits, builder.lshr(bits, ir.Constant(word, shift)))

        index, low, high = (builder.trunc(argument, word) for argument in arguments)
        bits = builder.add(builder.mul(index, ir.Constant(word, STRIDE)), low)
        bits = builder.mul(folded(bits, 16), ir.Constant(word, MIX_1))
        bits = builder.add(folded(bits, 13), high)
        bits = builder.mul(folded(bits, 16), ir.Constant(word, MIX_2))
        return folded(bits, 13)

    return types.uint32(types.int64, types.int64, types.int64), generate


def dropout(x, y, scale, low, high, lowest, first, stop):
    """Write scale[0] x where the random bits are not below ``lowest``, else 0."""
    least, factor = np.uint32(lowest), scale[0]
    for i in range(first, stop):
        kept = x[i] * factor
        y[i] = kept if random_bits(i, low, high) >= least else ZERO


def kernels():
    """Return the kernel and its arguments' types."""
    return {"dropout": (dropout, "fffiiiii")}
