"""Elementary functions for kernel modules: branch-free, so that loops over channels vectorise."""

import numpy as np
from llvmlite import ir
from numba import njit, types
from numba.extending import intrinsic

ZERO, HALF, ONE, TWO = (np.float32(number) for number in (0, 0.5, 1, 2))

# Beyond +-87 exp leaves the range of float32; a gate is open or closed to 1e-38 by then.
TOP, BOTTOM = np.float32(87), np.float32(-87)
LOG2_E = np.float32(np.log2(np.e))
ROUNDING = np.float32(1.5 * 2**23)  # adding it leaves the nearest integer in the lowest bits
MANTISSA, BITS_OF_ONE = np.int32(23), np.int32(127 << 23)
# 2^x on [-0.5, 0.5], relative error 1e-7 (minimax, by mpmath.chebyfit).
P0, P1, P2, P3, P4, P5 = (
    np.float32(coefficient)
    for coefficient in (
        1.0000000754548972,
        0.6931471880262288,
        0.2402210748530834,
        0.05550357114219078,
        0.009676031918322054,
        0.0013390863364671234,
    )
)


@intrinsic
def bits_of(_context, _number):
    """Return the bits of a float32 as an int32."""

    def generate(_target, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), generate


@intrinsic
def float_of(_context, _bits):
    """Return the float32 that has these bits."""

    def generate(_target, builder, _signature, arguments):
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), generate


@intrinsic
def prefetch(_context, pointer, index):
    """Ask for the cache line of ``pointer[index]``; harmless whatever the index."""

    def generate(_target, builder, _signature, arguments):
        address = builder.gep(arguments[0], [arguments[1]])
        integer = ir.IntType(32)
        function = builder.module.declare_intrinsic(
            "llvm.prefetch",
            [address.type],
            ir.FunctionType(ir.VoidType(), [address.type, integer, integer, integer]),
        )
        read, keep, data = (ir.Constant(integer, number) for number in (0, 2, 1))
        builder.call(function, [address, read, keep, data])
        return ir.Constant(ir.IntType(8), 0)

    return types.int8(pointer, types.int64), generate


def fused(function):
    """Compile a helper into the loop that calls it."""
    return njit(fastmath={"contract"}, error_model="numpy")(function)


@fused
def exp_minus(x):
    """Return exp(-x) for x clamped to +-87, relative error 2e-7."""
    x = TOP if x > TOP else x  # in this order a NaN stays one
    x = BOTTOM if x < BOTTOM else x
    shifted = ROUNDING - x * LOG2_E
    rest = -x * LOG2_E - (shifted - ROUNDING)
    square = rest * rest
    power = (P0 + P1 * rest) + square * ((P2 + P3 * rest) + square * (P4 + P5 * rest))
    return power * float_of((bits_of(shifted) << MANTISSA) + BITS_OF_ONE)


@fused
def copy(source, at, target, to, count):
    """Copy some channels of a row."""
    for channel in range(count):
        target[to + channel] = source[at + channel]
