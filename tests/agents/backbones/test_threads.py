import multiprocessing
import signal
import subprocess
import sys
import threading

import pytest
import torch

from minrl.agents.backbones import threads
from minrl.agents.backbones.scan import gated_scan


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
        for count in (1, 2, 3, 8):
            torch.set_num_threads(count)
            for units in (1, 2, 7, 100):
                ranges = []
                threads.run_parallel(lambda *bounds, r=ranges: r.append(bounds), (), units)
                done = sorted(unit for first, stop in ranges for unit in range(first, stop))
                assert done == list(range(units))
                assert len(ranges) == min(count, units)
    finally:
        torch.set_num_threads(before)


def test_an_error_on_another_thread_reaches_the_caller():
    other_has_begun = threading.Event()

    def kernel(first, stop):
        if first:
            other_has_begun.set()
            raise ArithmeticError(threading.current_thread().name)
        other_has_begun.wait(60)  # or else the caller might do both ranges

    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        with pytest.raises(ArithmeticError, match="minrl"):
            threads.run_parallel(kernel, (), 2)
    finally:
        torch.set_num_threads(before)


@pytest.mark.skipif(not hasattr(signal, "setitimer"), reason="needs POSIX timers")
@pytest.mark.interrupts
def test_ctrl_c_ends_a_kernel_on_several_threads_once_all_of_them_have_ended():
    program = """
import random, signal, threading, time, torch
from minrl.agents.backbones import threads

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

threads.run_parallel(kernel, (), 2)  # starts the threads
signal.signal(signal.SIGALRM, interrupt)
moments = random.Random(0)
for _ in range(2000):
    try:
        signal.setitimer(signal.ITIMER_REAL, moments.uniform(2e-5, 9e-4))
        threads.run_parallel(kernel, (), 2)
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
