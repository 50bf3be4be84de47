import numpy as np
import pytest

from minrl.scripts.reports.collect import find_runs
from minrl.scripts.reports.methods import name_methods
from minrl.scripts.reports.score_tables import difference_table, overview
from minrl.scripts.reports.summary import summarise

HOPPER, WALKER = "minrl/hopper/medium-v0", "minrl/walker2d/medium-v0"


def study_of(folder):
    runs, left_out = find_runs([folder])
    return summarise(runs, name_methods(runs), left_out)


def constant(score):
    return lambda step: score


@pytest.fixture
def rivals(write_run):
    """Two seeds of minGRU and GRU on two tasks; the GRU lacks one run."""
    scores = {
        ("mingru", HOPPER): (50.0, 60.0),
        ("mingru", WALKER): (30.0, 40.0),
        ("gru", HOPPER): (55.0, 45.0),
        ("gru", WALKER): (20.0,),
    }
    for (backbone, dataset), by_seed in scores.items():
        for seed, score in enumerate(by_seed):
            name = f"{backbone}-s{seed}"
            write_run(name, constant(score), backbone=backbone, dataset=dataset, seed=seed)
    return scores


def test_cells_hold_mean_deviation_and_interval_over_seeds(rivals, tmp_path):
    study = study_of(tmp_path)
    cell = next(c for c in study["cells"] if (c["method"], c["task"]) == ("mingru", 0))
    assert cell["last"]["values"] == pytest.approx([50.0, 60.0])
    assert cell["last"]["mean"] == pytest.approx(55.0)
    assert cell["last"]["std"] == pytest.approx(np.std([50.0, 60.0], ddof=1), rel=1e-5)
    # Student's t of one degree of freedom leaves 2.5 % above 12.7062.
    half = 12.7062 * np.std([50.0, 60.0], ddof=1) / np.sqrt(2)
    assert cell["last"]["interval"] == pytest.approx([55.0 - half, 55.0 + half], rel=1e-4)


def test_aggregates_are_over_the_tasks_and_as_many_seeds_of_each(rivals, tmp_path):
    study = study_of(tmp_path)
    (comparison,) = study["comparisons"]
    assert comparison["tasks"] == [0, 1]
    assert comparison["last"]["mingru"]["mean"] == pytest.approx((55.0 + 35.0) / 2)
    # The GRU has one seed on one task: its second on the other does not count.
    assert comparison["last"]["gru"]["mean"] == pytest.approx((55.0 + 20.0) / 2)
    assert comparison["last"]["gru"]["iqm"] == pytest.approx((55.0 + 20.0) / 2)
    assert comparison["last"]["mingru"]["iqm"] == pytest.approx((40.0 + 50.0) / 2)
    assert comparison["last"]["mingru"]["iqm_interval"] is not None
    assert comparison["last"]["gru"]["iqm_interval"] is None
    (row,) = comparison["improvement"]
    pairs = [50 > 55, 60 > 55], [30 > 20, 40 > 20]
    assert row["probability"] == pytest.approx(np.mean([np.mean(pair) for pair in pairs]))
    # By task and seed: -5 and 15 on one task, 10 on the other, where a single pair has no spread.
    assert row["difference"] == pytest.approx((5.0 + 10.0) / 2)
    assert row["difference_interval"] is None
    notes = overview(study | {"latency": None}).notes
    assert [note for note in notes if "of gru only the first 1 seed of each task" in note]


def test_differences_have_an_interval_where_each_task_has_two_pairs(write_run, tmp_path):
    for backbone, scores in (("mingru", (50.0, 60.0)), ("gru", (55.0, 45.0))):
        for seed, score in enumerate(scores):
            write_run(f"{backbone}-s{seed}", constant(score), backbone=backbone, seed=seed)
    study = study_of(tmp_path)
    (row,) = study["comparisons"][0]["improvement"]
    # Student's t of one degree of freedom, of the differences -5 and 15.
    half = 12.7062 * np.std([-5.0, 15.0], ddof=1) / np.sqrt(2)
    assert row["difference_interval"] == pytest.approx([5.0 - half, 5.0 + half], rel=1e-4)
    (cell,) = difference_table(study).rows[0][1:]
    assert (cell.text, cell.below, cell.bold) == ("+5.0", "-122.1 to +132.1", False)


def test_tasks_without_a_common_seed_are_named_beside_differences(rivals, write_run, tmp_path):
    write_run("lstm-s0", constant(10.0), backbone="lstm", dataset=HOPPER)
    write_run("lstm-s7", constant(10.0), backbone="lstm", dataset=WALKER, seed=7)
    (note,) = difference_table(study_of(tmp_path)).notes
    assert note.endswith("mingru and lstm have seeds in common on 1 of these tasks.")


def test_methods_are_compared_over_the_tasks_that_all_have(rivals, write_run, tmp_path):
    for seed in (0, 1):
        write_run(f"lstm-s{seed}", constant(10.0), backbone="lstm", seed=seed)
    (comparison,) = study_of(tmp_path)["comparisons"]
    assert comparison["methods"] == ["mingru", "gru", "lstm"]
    assert (comparison["tasks"], comparison["left_out_tasks"]) == ([0], [1])


def test_who_lacks_most_tasks_does_not_take_them_from_the_others(write_run, tmp_path):
    for dataset in (HOPPER, WALKER, "minrl/hopper/medium-expert-v0"):
        write_run("mingru-s0", dataset=dataset)
        write_run("gru-s0", dataset=dataset, backbone="gru")
    write_run("lstm-s0", backbone="lstm")
    (comparison,) = study_of(tmp_path)["comparisons"]
    assert comparison["methods"] == ["mingru", "gru"]
    assert comparison["left_out_methods"] == ["lstm"]
    assert len(comparison["tasks"]) == 3


def test_outside_agents_that_lack_tasks_are_compared_apart(rivals, write_peer, tmp_path):
    for seed in (0, 1):
        write_peer(f"iql-s{seed}", 70.0, seed=seed)
    first, second = study_of(tmp_path)["comparisons"]
    assert (first["methods"], first["tasks"]) == (["mingru", "gru"], [0, 1])
    assert (second["methods"], second["tasks"]) == (["mingru", "gru", "d3rlpy IQL"], [0])


def test_the_worth_of_a_choice_is_the_mean_of_paired_differences(rivals, write_run, tmp_path):
    changed = {(HOPPER, 0): 48.0, (HOPPER, 1): 63.0, (WALKER, 1): 41.0, (WALKER, 2): 99.0}
    for (dataset, seed), score in changed.items():
        name = f"interleaved-s{seed}"
        write_run(
            name, constant(score), dataset=dataset, seed=seed, model={"tokens": "interleaved"}
        )
    (row,) = study_of(tmp_path)["ablations"]
    assert (row["change"], row["usual"], row["pairs"]) == ("tokens interleaved", "joint", 3)
    assert row["difference"] == pytest.approx(((48 - 50 + 63 - 60) / 2 + (41 - 40)) / 2)
    assert row["interval"] is None  # a single pair on one task


def test_a_window_other_than_the_one_filled_in_is_an_ablation(write_run, tmp_path):
    """``minrl train`` fills in a transformer's attention context, here by the 20 of the windows."""
    for name, score, steps in (("transformer-s0", 50.0, 20), ("transformer,narrow-s0", 40.0, 5)):
        model = {"attention_context": steps}
        write_run(name, constant(score), backbone="transformer", model=model)
    study = study_of(tmp_path)
    (row,) = study["ablations"]
    assert (row["change"], row["difference"]) == ("attention context 5", pytest.approx(-10.0))
    assert study["left_out"] == []


def test_other_ways_to_act_are_ablations_and_not_scores(write_run, tmp_path):
    for seed, (usual, windowed) in enumerate(((50.0, 53.0), (60.0, 61.0))):
        also = [("last", 4, 3600.0, windowed, 1)]
        write_run(f"mingru-s{seed}", constant(usual), seed=seed, also=also)
    study = study_of(tmp_path)
    assert study["cells"][0]["last"]["values"] == pytest.approx([50.0, 60.0])
    (row,) = study["ablations"]
    assert (row["change"], row["usual"]) == ("acting windowed", "recurrent")
    assert row["difference"] == pytest.approx(2.0)
    # Of the differences 3 and 1, by Student's t of one degree of freedom: 12.7062 * sqrt(2 / 2).
    assert row["interval"] == pytest.approx([2.0 - 12.7062, 2.0 + 12.7062], rel=1e-4)


def test_without_memory_there_are_no_ways_to_act(write_run, tmp_path):
    observation = {"backbone": "mlp", "model": {"tokens": "observation"}}
    for seed in (0, 1):
        also = [("last", 4, 3600.0, 50.0, 1)]
        write_run(f"bc-s{seed}", constant(50.0), seed=seed, also=also, **observation)
    assert study_of(tmp_path)["ablations"] == []


def test_a_best_checkpoint_that_was_not_evaluated_is_no_secret(write_run, tmp_path):
    for dataset in (HOPPER, WALKER):
        for seed in (0, 1):
            path = write_run(f"mingru-s{seed}", lambda step: -step, dataset=dataset, seed=seed)
    file = path / "evaluations.jsonl"
    lines = [line for line in file.read_text().splitlines() if '"best"' not in line]
    file.write_text("\n".join(lines) + "\n")
    notes = overview(study_of(tmp_path) | {"latency": None}).notes
    assert any("best checkpoints: of mingru only the first 1 seed of each task" in n for n in notes)
    assert not any("last checkpoints: of mingru only" in note for note in notes)


def test_the_same_seed_does_not_count_twice(write_run, tmp_path):
    write_run("a-s0", constant(50.0))
    write_run("b-s0", constant(70.0))
    study = study_of(tmp_path)
    assert study["cells"][0]["last"]["seeds"] == [0]
    assert "same method, task and seed" in study["left_out"][0]["reason"]


def test_other_targets_are_compared_and_not_averaged(write_run, tmp_path):
    for seed, score in enumerate((50.0, 60.0)):
        write_run(f"mingru-s{seed}", constant(score), seed=seed)
        less = (1800.0, 900.0)
        write_run(
            f"mingru,targets=1800%20900-s{seed}", constant(score + 4), seed=seed, targets=less
        )
    study = study_of(tmp_path)
    (row,) = study["ablations"]
    assert (row["change"], row["usual"]) == ("targets 1800 900", "3600 1800")
    assert row["difference"] == pytest.approx((54.0 / 2 - 50.0 + 64.0 / 2 - 60.0) / 2)
