import multiprocessing
import os
import signal
import subprocess
import sys
import threading
import time

import pytest
import torch

from minrl.agents.backbones import native
from minrl.agents.backbones.scan import gated_scan

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


def test_a_thread_that_outlives_the_main_one_still_scans():
    program = """
import threading, time, torch
from minrl.agents.backbones.scan import gated_scan

torch.set_num_threads(2)
projected = torch.randn(64, 50, 128)
gated_scan(projected)

def outlive():
    threading.main_thread().join()
    time.sleep(0.1)
    gated_scan(projected)
    print("scanned")

threading.Thread(target=outlive).start()
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert (done.stdout, done.stderr) == ("scanned\n", "")


def test_every_unit_is_worked_on_once_whatever_the_number_of_threads():
    before = torch.get_num_threads()
    try:
        for threads in (1, 2, 3, 8):
            torch.set_num_threads(threads)
            for units in (1, 2, 7, 100):
                ranges = []
                native.run_parallel(lambda *bounds, r=ranges: r.append(bounds), (), units)
                done = sorted(unit for first, stop in ranges for unit in range(first, stop))
                assert done == list(range(units))
                assert len(ranges) == min(threads, units)
    finally:
        torch.set_num_threads(before)


def test_an_error_on_another_thread_reaches_the_caller():
    def kernel(first, stop):
        time.sleep(0.05)  # time for the other thread to begin its range
        if first:
            raise ArithmeticError(threading.current_thread().name)

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ArithmeticError, match="minrl"):
            native.run_parallel(kernel, (), 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
def test_ctrl_c_ends_a_kernel_on_several_threads_once_all_of_them_have_ended():
    program = """
import random, signal, threading, time, torch
from minrl.agents.backbones import native

torch.set_num_threads(2)
working, abandoned, interrupts = [], 0, 0

def kernel(first, stop):
    if threading.current_thread() is threading.main_thread():
        time.sleep(0.0003)
    else:
        working.append(first)
        time.sleep(0.0003)
        working.pop()

def interrupt(number, frame):
    raise KeyboardInterrupt

native.run_parallel(kernel, (), 2)  # starts the threads
signal.signal(signal.SIGALRM, interrupt)
moments = random.Random(0)
for _ in range(2000):
    try:
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(2e-5, 9e-4))
        native.run_parallel(kernel, (), 2)
        signal.setitimer(signal.ITIMER_REAL, 0)
    except KeyboardInterrupt:
        interrupts += 1
        abandoned += bool(working)
print("abandoned", abandoned, "interrupted often", interrupts > 200)
"""
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, timeout=60
    )
    assert (done.stdout, done.stderr) == ("abandoned 0 interrupted often True\n", "")


def _scan_in_child(projected, queue):
    torch.set_num_threads(2)  # PyTorch's own threads hang in a forked child: leave it nothing large
    states, _ = gated_scan(projected)
    queue.put(states.numpy())


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_child_can_scan_on_several_threads():
    projected, before = torch.randn(64, 200, 64), torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        expected, _ = gated_scan(projected)  # these threads are not the child's
    finally:
        torch.set_num_threads(before)
    context = multiprocessing.get_context("fork")
    queue = context.Queue()
    child = context.Process(target=_scan_in_child, args=(projected, queue), daemon=True)
    child.start()
    assert (queue.get(timeout=60) == expected.numpy()).all()
    child.join()
