import contextlib
import functools
import io
import json
import subprocess
import sys
import time
import warnings

import pytest
import torch

from minrl import cli
from minrl.agents.backbones.scan import gated_scan_reference
from minrl.agents.backbones.scan_torch import PARTS
from minrl.errors import ConfigError
from minrl.scripts.benchmark import benchmark
from minrl.scripts.benchmarks.cases import ScanCase, Shape, parse_shape, shapes_of
from minrl.scripts.benchmarks.measuring import (
    LEAST_ROUNDS,
    Clock,
    Contestant,
    Missing,
    Outcome,
    Prepared,
    compete,
    summarise,
)
from minrl.scripts.benchmarks.peers import SCANS, TEXTBOOK
from minrl.scripts.benchmarks.scan import scan_contestants
from minrl.scripts.machine import file_name

CPU = torch.device("cpu")


QUICK = {
    "scan": ("--shapes", "2x12x8", "2x30x8", "--gates", "minlstm", "--peers"),
    "layer": ("--shapes", "2x12x8", "--naive", "--directions", "both"),
    "act": (),
    "train": ("--profile",),
    "data": (),
    "libraries": (),
}


@pytest.fixture(scope="module")
def quick_run(tmp_path_factory):
    """Return the JSON and the output of a quick run of a benchmark, each run once."""

    @functools.cache
    def run(name):
        folder = tmp_path_factory.mktemp(name)
        with contextlib.redirect_stdout(io.StringIO()) as output:
            common = ("--grid", "quick", "--device", "cpu", "--output", str(folder))
            benchmark([name, *QUICK[name], *common])
        path = folder / f"{file_name(name, CPU)}.json"
        return json.loads(path.read_text()), output.getvalue()

    return run


@pytest.mark.integration
@pytest.mark.parametrize(
    ("name", "section", "contestants"),
    [
        ("scan", "cases", {"minrl", "minrl, plain torch", "log-space (paper)", "copy", "stream"}),
        ("layer", "cases", {"minrl MinGRU", "nn.GRU (CPU)", "GRUCell in a loop (the paper's)"}),
        ("act", "cases", {"minrl DecisionAgent.act", "minrl model.step (eager)"}),
        ("train", "presets", {"quick", "quick, one given batch"}),
        ("data", "loading", {"load_dataset, cached", "load_dataset, first time"}),
        ("libraries", "cases", {"minrl MinGRUModule", "GRUModule"}),
    ],
    ids=list(QUICK),
)
def test_a_quick_run_leaves_what_is_needed_to_judge_it(name, section, contestants, quick_run):
    result, output = quick_run(name)
    assert result["benchmark"] == result["settings"]["name"] == name
    assert result["machine"]["cpu"]
    assert result["threads"] == torch.get_num_threads()
    assert {"torch", "triton", "numba", "python", "cuda", "minrl"} <= set(result["versions"])
    assert {"commit", "measured", "device"} <= set(result)
    times = result[section][0]["times"]
    assert contestants <= set(times)
    for contestant in contestants:
        row = times[contestant]
        assert row["minimum"] <= row["quartile_low"] <= row["median"] <= row["quartile_high"]
        assert row["rounds"] >= LEAST_ROUNDS
        assert row["ratio"]["minimum"] <= row["ratio"]["median"]
        assert f"  {contestant} " in output


def test_scan_reports_accuracy_and_bandwidth(quick_run):
    result, output = quick_run("scan")
    (accuracy,) = result["accuracy"]
    for name in ("minrl", "minrl, plain torch", "log-space (paper)", "associative_scan"):
        errors = accuracy["errors"][name]
        assert set(errors["states"]) == set(errors["gradient"]) == {"N(0,1)", "N(-7,1)"}
        assert max(*errors["states"].values(), *errors["gradient"].values()) < 1e-4
    case = result["cases"][0]
    assert case["shape"] == {"batch": 2, "length": 12, "width": 8}
    assert case["minimum_bytes"] == 4 * 4 * 2 * 12 * 8  # three parts read, the states written
    ours = case["times"]["minrl"]
    rate = case["minimum_bytes"] / ours["median"]
    assert ours["useful_bytes_per_second"] == pytest.approx(rate, rel=1e-3)
    assert "% of a copy" in output


@pytest.mark.integration
def test_train_compares_contexts_at_equal_tokens(quick_run):
    result, _ = quick_run("train")
    rows = result["contexts"][0]["times"]
    assert list(rows) == ["context 20, batch 20", "context 100, batch 4"]
    assert all(row["tokens_per_second"] > 0 for row in rows.values())
    shares = result["profiles"][0]["shares"]
    assert sum(shares.values()) == pytest.approx(1, abs=1e-3)
    assert {"matrix products", "scan", "optimizer"} <= set(shares)


def test_a_missing_peer_has_a_row_that_says_why(quick_run):
    result, output = quick_run("scan")
    times = result["cases"][0]["times"]
    for peer in SCANS:
        assert "median" in times[peer.name] or times[peer.name]["missing"]
        assert f"  {peer.name} " in output
    assert "missing" in times["accelerated-scan warp"]  # it needs CUDA
    assert "missing (" in output


@pytest.mark.parametrize(
    ("gates", "direction", "times_of_the_states"),
    [
        ("mingru", "forward", 3),
        ("mingru", "backward", 5),
        ("mingru", "both", 8),
        ("minlstm", "forward", 4),
        ("minlstm", "backward", 7),
        ("minlstm_unnormalised", "both", 11),
    ],
)
def test_minimum_bytes_are_those_of_the_inputs_and_outputs(gates, direction, times_of_the_states):
    case = ScanCase(Shape(3, 5, 7), gates, "bfloat16", direction, CPU)
    assert case.minimum_bytes == times_of_the_states * 2 * 3 * 5 * 7
    assert case.projected.shape == (3, 5, PARTS[gates] * 7)


@pytest.mark.parametrize("gates", PARTS)
@pytest.mark.parametrize("peer", TEXTBOOK, ids=lambda peer: peer.name)
def test_textbook_scans_compute_the_same_function(peer, gates):
    case = ScanCase(Shape(2, 33, 5), gates, "float32", "both", CPU)
    got, expected = case.projected.clone(), case.projected.double()
    states = peer.build(case)(got.requires_grad_())
    exact, _ = gated_scan_reference(expected.requires_grad_(), gates=gates)
    assert torch.allclose(states.double(), exact, rtol=1e-4)
    states.backward(case.grad_states)
    exact.backward(case.grad_states.double())
    assert torch.allclose(got.grad.double(), expected.grad, rtol=1e-3, atol=1e-4)


def test_a_contestant_that_fails_is_shown_with_the_reason_and_without_paths():
    def fail(case):
        raise RuntimeError("no kernel in /home/someone/site/kernel.so\nfor this")

    def decline(case):
        raise Missing("it needs CUDA")

    contestants = [
        Contestant("ours", lambda case: Prepared(lambda: None)),
        Contestant("broken", fail),
        Contestant("absent", decline),
        Contestant("broken when called", lambda case: Prepared(lambda: 1 / 0)),
    ]
    summary = summarise(compete(contestants, None, Clock(CPU), seconds=0.0))
    assert summary["broken"] == {"missing": "RuntimeError: no kernel in kernel.so for this"}
    assert summary["absent"] == {"missing": "it needs CUDA"}
    assert summary["broken when called"]["missing"].startswith("ZeroDivisionError")
    assert summary["ours"]["rounds"] == LEAST_ROUNDS


def test_ratios_are_taken_within_a_round():
    ours, other = Outcome("ours", seconds=[1, 10, 2]), Outcome("other", seconds=[2, 10, 12])
    summary = summarise([ours, other])
    assert summary["other"]["ratio"]["median"] == 2  # of 2, 1 and 6, not 10 / 2
    assert summary["ours"]["ratio"]["median"] == 1


def test_every_contestant_runs_once_in_a_round_until_its_time_is_up():
    calls = []

    def timed(name, work):
        return Contestant(name, lambda case: Prepared(lambda: (work(), calls.append(name))))

    contestants = [timed("fast", lambda: None), timed("slow", lambda: time.sleep(0.12))]
    calls.clear()
    outcomes = compete(contestants, None, Clock(CPU, cold=True), seconds=0.5, most_rounds=20)
    counts = [len(outcome.seconds) for outcome in outcomes]
    assert counts == [20, LEAST_ROUNDS]
    in_rounds = calls[-sum(counts) :]
    together = in_rounds[: 2 * LEAST_ROUNDS]
    assert all(
        set(pair) == {"fast", "slow"} for pair in zip(together[::2], together[1::2], strict=True)
    )
    assert set(in_rounds[2 * LEAST_ROUNDS :]) == {"fast"}


def test_only_shapes_that_fit_into_memory_are_chosen(monkeypatch):
    monkeypatch.setattr("minrl.scripts.benchmarks.cases.free_bytes", lambda device: 40 * 4 * 2000)
    fitting, too_large = shapes_of("full", CPU, "float32")
    assert fitting[0] == Shape(1, 1, 64)
    assert max(shape.elements for shape in fitting) <= 2000 < too_large[0].elements
    assert len(fitting) + len(too_large) == 6 * 9 * 4


def test_ours_comes_first():
    assert scan_contestants(peers=True, compiled=True)[0].name == "minrl"
    assert parse_shape("64x60x128") == Shape(64, 60, 128)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("speed",), "invalid choice: 'speed'"),
        ((), "arguments are required"),
        (("scan", "--device", "abacus"), "device 'abacus' cannot be used"),
        (("scan", "--device", "meta"), "benchmarks run on cpu or cuda"),
        (("scan", "--device", "cpu", "--shapes", "64x60"), "a shape is batch x steps x channels"),
        (("scan", "--device", "cpu", "--caches", "cold"), "flushed on CUDA only"),
        (("act", "--threads", "0"), "threads must be at least 1"),
        (("act", "--naive"), "unrecognized arguments: --naive"),
        (("layer", "--grid", "huge"), "invalid choice: 'huge'"),
    ],
)
def test_mistakes_are_one_line(arguments, message, capsys, monkeypatch):
    monkeypatch.setattr("warnings.showwarning", warnings.showwarning)  # main replaces it
    assert cli.main(["benchmark", *arguments]) == 2
    error = capsys.readouterr().err
    assert error.startswith("minrl: error: ")
    assert error.count("\n") == 1
    assert message in error
    with pytest.raises(ConfigError):
        benchmark(arguments)


NOT_ON_GPU_MACHINES = "tyro gymnasium minari mujoco matplotlib tensorboard h5py onnxruntime"


@pytest.mark.integration
def test_scan_layer_and_train_need_torch_and_numpy_alone(tmp_path):
    program = f"""
import sys
for name in {NOT_ON_GPU_MACHINES.split()!r}:
    sys.modules[name] = None  # importing it fails
from minrl.cli import main
small = ["--grid", "quick", "--device", "cpu", "--threads", "1", "--output", {str(tmp_path)!r}]
for benchmark in (
    ["scan", "--shapes", "2x5x8", "2x8x8"], ["layer", "--shapes", "64x5x128", "64x8x128"], ["train"]
):
    assert main(["benchmark", *benchmark, *small]) == 0, benchmark
"""
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    assert "no picture: matplotlib is not installed" in done.stdout
    assert len(list(tmp_path.glob("*.json"))) == 3
