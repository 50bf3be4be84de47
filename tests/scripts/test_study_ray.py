import dataclasses
import signal
import sys

import pytest
import torch
from small_runs import (
    assert_a_study_stops_and_saves,
    start_study,
    step_of,
    wait_until,
    weights_of,
)

ray = pytest.importorskip("ray")

from ray.cluster_utils import Cluster  # noqa: E402

from minrl.agents.checkpoint import CheckpointFolder  # noqa: E402
from minrl.agents.model_config import ModelConfig  # noqa: E402
from minrl.errors import AdapterError  # noqa: E402
from minrl.scripts.run_folder import RunFolder  # noqa: E402
from minrl.scripts.study_ray import RayWorkers  # noqa: E402
from minrl.scripts.study_run import is_done, log_of  # noqa: E402
from minrl.scripts.train import train  # noqa: E402
from minrl.scripts.train_config import TrainConfig  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # Ray's own
PATIENCE = 500  # seconds


@pytest.fixture(params=[[{"num_cpus": 1}] * 2], ids=["two nodes"])
def cluster(request, datasets_path):
    """A cluster of two nodes with one core each, or others; the driver's node has none."""
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 0})
    for node in request.param:
        cluster.add_node(**node)
    yield cluster
    ray.shutdown()
    cluster.shutdown()


def make_runs(hopper_id, folder, number, **options):
    base = TrainConfig(
        dataset=(hopper_id,),
        model=ModelConfig(width=16, num_layers=1),
        batch_size=8,
        eval_every=50,
        eval_episodes=0,
        final_episodes=0,
        log_every=10,
        device="cpu",
    )
    return [
        dataclasses.replace(base, seed=seed, run_dir=folder / f"run-s{seed}", **options)
        for seed in range(number)
    ]


def test_all_runs_finish_when_a_node_dies(hopper_id, tmp_path, cluster):
    runs = make_runs(hopper_id, tmp_path / "study", 3, steps=1000)
    workers = RayWorkers(runs, cluster.address, cpus=1, gpus=0)
    wait_until(lambda: sum(step_of(run.run_dir) > 100 for run in runs) == 2, PATIENCE)
    assert len(workers.running) == 2
    steps_before = [step_of(run.run_dir) for run in runs]
    cluster.remove_node(next(iter(cluster.worker_nodes)), allow_graceful=False)
    ended = []

    def all_ended():
        ended.extend(workers.poll())
        return not workers.is_busy

    wait_until(all_ended, PATIENCE)
    assert [problem for _, problem in ended] == [None] * 3
    assert all(is_done(run) for run in runs)
    # The run that lost its node went on from a checkpoint: its log begins twice.
    begun = [log_of(run).read_text().count("parameters, on cpu") for run in runs]
    assert sorted(begun) == [1, 1, 2]
    lost = begun.index(2)
    assert steps_before[lost] > 100
    train(dataclasses.replace(runs[lost], run_dir=tmp_path / "uninterrupted"))
    expected = weights_of(tmp_path / "uninterrupted")
    got = weights_of(runs[lost].run_dir)
    assert all(torch.equal(got[name], expected[name]) for name in expected)


def test_stopped_runs_save_and_failed_ones_say_why(hopper_id, tmp_path, cluster):
    good, bad, waiting = make_runs(hopper_id, tmp_path / "study", 3, steps=1_000_000)
    bad.run_dir.mkdir(parents=True)
    (bad.run_dir / "mine.txt").write_text("in the way")
    with pytest.warns(UserWarning, match="each run asks for 1 GPU, the cluster has 0"):
        RayWorkers([], cluster.address, cpus=1, gpus=1)
    workers = RayWorkers([good, bad, waiting], cluster.address, cpus=1, gpus=0)
    ended = []

    def bad_ended():
        ended.extend(workers.poll())
        return ended and step_of(good.run_dir)

    wait_until(bad_ended, PATIENCE)
    ((run, problem),) = ended
    assert run == bad
    assert "exists already" in problem
    workers.stop()

    def all_ended():
        ended.extend(workers.poll())
        return not workers.is_busy

    wait_until(all_ended, PATIENCE)
    wait_until(lambda: "and saved" in log_of(good).read_text(), PATIENCE)
    assert CheckpointFolder(good.run_dir / "checkpoints").last() >= step_of(good.run_dir)


def test_the_command_runs_a_study_on_the_cluster(hopper_id, tmp_path, cluster):
    on_ray = ("--ray", cluster.address)
    with start_study(tmp_path, hopper_id, *on_ray, seeds=3, steps=4) as process:
        output, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 0, errors
    assert "3 of 3 done" in output
    assert all(RunFolder(tmp_path / hopper_id / f"mingru-s{n}").is_finished() for n in range(3))


def test_runs_are_saved_before_an_interrupted_command_ends(hopper_id, tmp_path, cluster):
    """With the driver Ray ends its workers, saved or not."""
    on_ray = ("--ray", cluster.address)
    with start_study(tmp_path, hopper_id, *on_ray, seeds=3, steps=1_000_000) as process:
        assert_a_study_stops_and_saves(process, tmp_path / hopper_id, signal.SIGINT, PATIENCE)


@pytest.mark.parametrize(
    ("cpus", "gpus", "at_once"), [(1, 0.25, 4), (2, 0, 3)], ids=["quarters of a GPU", "two cores"]
)
@pytest.mark.parametrize(
    "cluster", [[{"num_cpus": 6, "num_gpus": 1}]], indirect=True, ids=["one node"]
)
def test_each_run_is_given_what_it_asks_for(hopper_id, tmp_path, cluster, cpus, gpus, at_once):
    """Ray counts what a node says it has: no run uses a GPU here."""
    runs = make_runs(hopper_id, tmp_path / "study", at_once + 1, steps=1_000_000)
    workers = RayWorkers(runs, cluster.address, cpus=cpus, gpus=gpus)
    wait_until(lambda: all(step_of(run.run_dir) for run in runs[:at_once]), PATIENCE)
    assert len(workers.running) == at_once
    left = ray.available_resources()
    assert left.get("CPU", 0) == 6 - at_once * cpus
    assert left.get("GPU", 0) == 1 - at_once * gpus
    workers.stop(at_once=True)


def test_the_address_of_a_dead_cluster_is_given_up(hopper_id, tmp_path, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", "127.0.0.1:9")
    with start_study(tmp_path, hopper_id, "--ray", "auto", seeds=1, steps=4) as process:
        _, errors = process.communicate(timeout=PATIENCE)
    assert process.returncode == 2
    assert "no Ray cluster at 'auto': Failed to connect" in errors


def test_without_ray_it_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "ray", None)
    with pytest.raises(AdapterError, match="pip install ray"):
        RayWorkers([], "auto", cpus=1, gpus=0)
