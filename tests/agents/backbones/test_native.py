import os
import subprocess
import sys

import pytest

SCAN_SOMETHING = """
import sys, warnings
{before}
import torch
from minrl.agents.backbones.scan import gated_scan, gated_scan_reference
projected = torch.randn(2, 30, 8, generator=torch.Generator().manual_seed(0))
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("default")
    for _ in range(3):
        states, _ = gated_scan(projected)
expected, _ = gated_scan_reference(projected)
assert (states - expected).abs().max() < 1e-6
print([str(warning.message) for warning in caught])
print("imported:", [name for name in ("numba", "llvmlite") if name in sys.modules])
"""


def scan_in_new_process(*, before="", **environment):
    done = subprocess.run(
        [sys.executable, "-c", SCAN_SOMETHING.format(before=before)],
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    notices, imported = done.stdout.strip().splitlines()
    return notices, imported


@pytest.mark.integration
def test_a_later_process_loads_the_kernels_without_numba(tmp_path):
    for _ in range(2):
        notices, imported = scan_in_new_process(MINRL_CACHE=str(tmp_path))
        assert notices == "[]"
        assert imported == "imported: ['llvmlite']"
        assert len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("missing", ["numba", "llvmlite"])
def test_without_the_compiler_results_are_right_with_one_notice(missing, tmp_path):
    # For this process and, through its environment, the one that it would compile in.
    (tmp_path / f"{missing}.py").write_text("raise ImportError('not installed here')")
    notices, _ = scan_in_new_process(
        MINRL_CACHE=str(tmp_path / "cache"), before=f"sys.path.insert(0, {str(tmp_path)!r})"
    )
    assert notices.count("without compiled kernels") == 1
    assert "not installed here" in notices


def test_compiled_kernels_can_be_turned_off():
    notices, imported = scan_in_new_process(MINRL_NATIVE="0")
    assert (notices, imported) == ("[]", "imported: []")


@pytest.mark.integration
def test_a_damaged_file_in_the_cache_is_replaced(tmp_path):
    scan_in_new_process(MINRL_CACHE=str(tmp_path))
    (file,) = tmp_path.iterdir()
    sound = file.read_bytes()
    for damaged in (b"", sound[:-1] + b"?"):
        file.write_bytes(damaged)
        notices, _ = scan_in_new_process(MINRL_CACHE=str(tmp_path))
        assert notices == "[]"
        assert file.read_bytes() == sound


@pytest.mark.integration
def test_what_others_print_does_not_end_up_in_the_code(tmp_path):
    (tmp_path / "sitecustomize.py").write_text("print('hello')")
    before = f"sys.path.insert(0, {str(tmp_path)!r})"
    for _ in range(2):
        result = scan_in_new_process(before=before, MINRL_CACHE=str(tmp_path / "cache"))
        assert result == ("[]", "imported: ['llvmlite']")


@pytest.mark.integration
def test_where_nothing_can_be_written_kernels_work_all_the_same(tmp_path):
    (tmp_path / "file").touch()  # a folder cannot be made below it, not even by root
    notices, imported = scan_in_new_process(MINRL_CACHE=str(tmp_path / "file" / "cache"))
    assert (notices, imported) == ("[]", "imported: ['llvmlite']")


def test_other_sources_than_those_that_run_are_not_compiled(tmp_path):
    before = "from minrl.agents.backbones import native; native.SOURCES = 'of an update meanwhile'"
    notices, _ = scan_in_new_process(MINRL_CACHE=str(tmp_path), before=before)
    assert "the sources of the kernels are not those that this process runs" in notices
    assert not list(tmp_path.iterdir())
