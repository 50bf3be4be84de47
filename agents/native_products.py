"""Products of a few rows with a matrix, for kernel modules: sums stay in registers.

At small batches a product waits for the weights to arrive from the cache, so they are read in the
order in which they lie; at larger ones it is bound by arithmetic. Every output is summed in one
order whatever the batch, so a row's results do not depend on the rows beside it.
"""

from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from minrl.agents.backbones.native_math import fused
from minrl.agents.native_layout import GROUP, LANES


@intrinsic
def shifted(_context, pointer, index):
    """Return ``pointer + index``."""

    def generate(_target, builder, _signature, arguments):
        return builder.gep(arguments[0], [arguments[1]])

    return pointer(pointer, index), generate


def _make_tile(rows: int, panels: int):
    """Return a product of ``rows`` rows with neighbouring panels, its sums kept in registers.

    Numba has no vectors to keep there, so this is LLVM's own language.
    """
    vector, integer = ir.VectorType(ir.FloatType(), LANES), ir.IntType(64)
    everywhere = ir.Constant(ir.VectorType(ir.IntType(32), LANES), [0] * LANES)
    empty = ir.Constant(vector, ir.Undefined)

    def generate(_context, builder, _signature, arguments):
        x, x_stride, matrix, bias, y, y_stride, count = arguments
        multiply_add = cgutils.get_or_insert_function(
            builder.module,
            ir.FunctionType(vector, [vector] * 3),
            f"llvm.fmuladd.v{LANES}f32",
        )

        def at(pointer, *factors):
            index = factors[0]
            for factor in factors[1:]:
                index = builder.mul(index, factor)
            return builder.gep(pointer, [index])

        def as_vector(address):
            return builder.bitcast(address, vector.as_pointer())

        number = [integer(n) for n in range(max(rows, panels * LANES) + 1)]
        inputs = [at(x, x_stride, number[row]) for row in range(rows)]
        columns = [at(matrix, count, number[LANES * panel]) for panel in range(panels)]
        biases = [
            builder.load(as_vector(at(bias, number[LANES * panel])), align=4)
            for panel in range(panels)
        ]
        before = builder.block
        loop, done = builder.append_basic_block("loop"), builder.append_basic_block("done")
        builder.branch(loop)
        builder.position_at_end(loop)
        k = builder.phi(integer)
        sums = [[builder.phi(vector) for _ in range(panels)] for _ in range(rows)]
        weights = [
            builder.load(as_vector(at(column, k, integer(LANES))), align=4) for column in columns
        ]
        following = builder.add(k, number[1])
        k.add_incoming(number[0], before)
        k.add_incoming(following, loop)
        for row in range(rows):
            one = builder.insert_element(empty, builder.load(at(inputs[row], k)), ir.IntType(32)(0))
            spread = builder.shuffle_vector(one, empty, everywhere)
            for panel in range(panels):
                total = builder.call(multiply_add, [spread, weights[panel], sums[row][panel]])
                sums[row][panel].add_incoming(biases[panel], before)
                sums[row][panel].add_incoming(total, loop)
                sums[row][panel] = total
        builder.cbranch(builder.icmp_signed("<", following, count), loop, done)
        builder.position_at_end(done)
        for row in range(rows):
            for panel in range(panels):
                output = at(at(y, y_stride, number[row]), number[LANES * panel])
                builder.store(sums[row][panel], as_vector(output), align=4)
        return ir.Constant(ir.IntType(8), 0)

    @intrinsic
    def tile(_context, x, x_stride, matrix, bias, y, y_stride, count):
        return types.int8(x, x_stride, matrix, bias, y, y_stride, count), generate

    return tile


six_rows, one_row = _make_tile(6, 1), _make_tile(1, 4)


@fused
def multiply(x, x_stride, rows, inputs, weights, y, outputs):
    """Write x W + b into y, (rows, padded outputs); return the weights after W.

    ``weights`` holds b, then W as panels; both padded.
    """
    padded = (outputs + GROUP - 1) // GROUP * GROUP
    matrix = shifted(weights, padded)
    whole = rows - rows % 6
    for column in range(0, padded, LANES):
        panel, bias = shifted(matrix, column * inputs), shifted(weights, column)
        for row in range(0, whole, 6):
            out = shifted(y, row * padded + column)
            six_rows(shifted(x, row * x_stride), x_stride, panel, bias, out, padded, inputs)
    for column in range(0, padded, GROUP):
        panel, bias = shifted(matrix, column * inputs), shifted(weights, column)
        for row in range(whole, rows):
            out = shifted(y, row * padded + column)
            one_row(shifted(x, row * x_stride), x_stride, panel, bias, out, padded, inputs)
    return shifted(matrix, padded * inputs)
