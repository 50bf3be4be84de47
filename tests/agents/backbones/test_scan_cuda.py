import dataclasses
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from minrl.agents.backbones import scan_cuda
from minrl.agents.backbones.scan_cuda import affordable_stages, checkpoint_shape, make_plan
from minrl.agents.backbones.scan_torch import PARTS

CASES = Path(__file__).with_name("scan_cuda_cases.py")
SIZES = [
    (batch, length, width)
    for batch in (1, 16, 64, 1024, 4096)
    for length in (1, 2, 20, 60, 1000, 16_384, 1_000_000)
    for width in (1, 3, 64, 100, 512)
]

needs_triton = pytest.mark.skipif(
    importlib.util.find_spec("triton") is None, reason="Triton is not installed"
)


def run_cases(**variables):
    """Run the cases in a process of their own, and show what failed there."""
    done = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "--no-header", "-p", "no:cacheprovider", CASES],
        env={**os.environ, **variables},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout[-8000:] + done.stderr[-2000:]


@pytest.mark.integration
@needs_triton
def test_kernels_equal_the_float64_loop_in_the_interpreter():
    run_cases(TRITON_INTERPRET="1")


@needs_triton
@pytest.mark.gpu
def test_kernels_equal_the_float64_loop_on_the_gpu():
    run_cases(TRITON_INTERPRET="0")


def is_power_of_two(size):
    return size > 0 and size & (size - 1) == 0


@pytest.mark.parametrize("size", SIZES, ids=lambda size: "B{}-T{}-H{}".format(*size))
def test_plans_fit_together(size):
    _, length, width = size
    plan = make_plan(*size)
    for tiles in (plan.forward, plan.backward):
        assert all(is_power_of_two(value) for value in dataclasses.astuple(tiles)[:4])
        assert tiles.warps <= 16
        # No channel beyond the next power of two, no segment that starts after the end.
        assert tiles.channels < 2 * width
        assert tiles.segments == 1 or (tiles.segments // 2) * tiles.steps < length
        # Every program composes the maps of all splits in one chunk.
        assert plan.splits <= tiles.chunk
    # Checkpoints stand where a forward segment begins.
    many = checkpoint_shape(*size)[0]
    assert many == 0 or plan.backward.chunk % plan.forward.steps == 0
    assert many * plan.backward.chunk < length <= (many + 1) * plan.backward.chunk


def compile_kernel(kernel, tiles, dtype, gates, capability, **options):
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    own = {"projected", "states", "grad_states", "grad_projected"}
    state = "fp64" if dtype == "fp64" else "fp32"
    constants = {
        "GATES": gates,
        "ACTIVATION": "g",
        "BATCH_FIRST": True,
        "ALIGNED": 16,
        "EVEN": True,
        "PARTS": PARTS[gates],
        "STATE": getattr(triton.language, f"float{state[2:]}"),
        "CHANNELS": tiles.channels,
        "SEGMENTS": tiles.segments,
        "STEPS": tiles.steps,
        "STAGES": tiles.stages,
        **dict.fromkeys(["resets", "reset_state", "mask", "drops", "gains"]),
        **options,
    }
    signature, alignment = {}, {}
    for place, name in enumerate(kernel.arg_names):
        if name in constants:
            signature[name] = "constexpr"
        elif name in ("batch", "length", "groups", "splits", "split_chunks"):
            signature[name] = "i32"
        else:
            signature[name] = f"*{dtype if name in own else state}"
            alignment[(place,)] = [["tt.divisibility", 16]]
    constants = {name: constants[name] for name in kernel.arg_names if name in constants}
    source = ASTSource(kernel, signature, constants, alignment)
    target = GPUTarget("cuda", capability, 32)
    chosen = {"num_warps": tiles.warps, "enable_fp_fusion": True}
    return triton.compile(source, target=target, options=chosen)


def disassemble(compiled, folder):
    import triton

    tool = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
    binary = folder / "kernel.cubin"
    binary.write_bytes(compiled.asm["cubin"])
    done = subprocess.run([tool, "-sass", binary], capture_output=True, text=True, check=True)
    return done.stdout


def has_ptxas():
    found = importlib.util.find_spec("triton")
    folder = found and Path(found.origin).parent / "backends" / "nvidia" / "bin"
    return bool(folder) and all((folder / tool).exists() for tool in ("ptxas", "cuobjdump"))


needs_compiler = pytest.mark.skipif(
    os.environ.get("TRITON_INTERPRET") == "1" or not has_ptxas(),
    reason="Triton's compiler for CUDA is not there",
)


@pytest.mark.integration
@needs_compiler
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_many_channels_compile_for_hopper_without_spills(dtype, tmp_path, monkeypatch):
    from minrl.agents.backbones.scan_cuda_backward import backward_kernel
    from minrl.agents.backbones.scan_cuda_forward import forward_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    plan = scan_cuda.MANY
    width = {"fp32": r"\.64", "bf16": ""}[dtype]  # two channels at a time
    options = {"SPACING": plan.backward.chunk}
    for kernel, tiles, tensors in (
        (forward_kernel, plan.forward, 2),
        (backward_kernel, plan.backward, 3),
    ):
        compiled = compile_kernel(kernel, tiles, dtype, "mingru", 90, **options)
        code = disassemble(compiled, tmp_path)
        assert len(re.findall(rf"LDG(STS)?\.E{width} ", code)) >= tensors * tiles.steps
        assert code.count("STL") + code.count("LDL") <= 4  # none, but for an address or two


ROOM = {80: 166_912, 86: 101_376, 90: 232_448}
"""Bytes of shared memory for a program by compute capability: A100; RTX 30, L4 and A10; H100."""


@pytest.mark.integration
@needs_compiler
@pytest.mark.parametrize(
    ("capability", "dtype", "bytes_of", "stages"),
    [(90, "fp32", 4, (2, 2)), (86, "fp32", 4, (1, 2)), (80, "fp64", 8, (1, 2))],
)
def test_what_is_loaded_ahead_fits_into_shared_memory(
    capability, dtype, bytes_of, stages, tmp_path, monkeypatch
):
    from minrl.agents.backbones.scan_cuda_backward import backward_kernel
    from minrl.agents.backbones.scan_cuda_forward import forward_kernel

    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path / "cache"))
    plan, room, step_bytes = scan_cuda.FEW, ROOM[capability], 4 * bytes_of
    found = [affordable_stages(tiles, step_bytes, room) for tiles in (plan.forward, plan.backward)]
    assert tuple(found) == stages
    for kernel, tiles, affordable in zip(
        (forward_kernel, backward_kernel), (plan.forward, plan.backward), found, strict=True
    ):
        tiles = dataclasses.replace(tiles, stages=affordable)
        options = {"SPACING": plan.backward.chunk}
        compiled = compile_kernel(kernel, tiles, dtype, "minlstm", capability, **options)
        assert compiled.metadata.shared <= room
