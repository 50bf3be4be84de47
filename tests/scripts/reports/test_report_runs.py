import dataclasses
import json
import os

import numpy as np
import pytest

from minrl.errors import ConfigError
from minrl.scripts.report import make_report, write_report
from minrl.scripts.reports.collect import find_runs, headline
from minrl.scripts.reports.markdown import make_markdown
from minrl.scripts.reports.methods import name_methods
from minrl.scripts.reports.summary import summarise
from minrl.scripts.train_config import paper


def read(*folders):
    runs, left_out = find_runs(folders)
    return {run.folder.split("/")[-1]: run for run in runs}, left_out


def score(run, checkpoint, refresh_every=None):
    found = headline(run, checkpoint, refresh_every)
    return found and pytest.approx(found["score"])


def test_last_and_best_are_told_apart(write_run, tmp_path):
    write_run("falls-s0", lambda step: 50.0 - step)
    write_run("rises-s0", lambda step: 10.0 * step)
    runs, _ = read(tmp_path)
    assert (score(runs["falls-s0"], "last"), score(runs["falls-s0"], "best")) == (46.0, 48.0)
    # Where the last checkpoint is the best, the evaluations do not repeat it.
    assert (score(runs["rises-s0"], "last"), score(runs["rises-s0"], "best")) == (40.0, 40.0)


def test_only_the_last_step_counts_and_the_largest_evaluation_of_it(write_run, tmp_path):
    also = [
        ("last", 4, 3600.0, 7.0, 0, 9),
        ("last", 4, 3600.0, 99.0, 0, 2),
        ("last", 2, 3600.0, 98.0, 0, 50),
        ("last", 4, 7200.0, 97.0, 0, 50),
        ("last", 4, 3600.0, 55.0, 1, 3),
    ]
    write_run(also=also)
    runs, _ = read(tmp_path)
    run = runs["mingru-s0"]
    assert score(run, "last") == 7.0
    assert headline(run, "last")["episodes"] == 9
    assert score(run, "last", refresh_every=1) == 55.0
    assert {evaluation["target"] for evaluation in run.evaluations} == {3600.0, 1800.0}


def write_metrics(path, *rows):
    (path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))


def test_an_interval_in_which_training_stood_still_is_not_training_time(write_run, tmp_path):
    speeds = {1: 2.0, 2: 0.001, 4: 4.0}  # by the step at the end of the interval
    write_metrics(write_run(), *({"step": s, "time/steps_per_s": x} for s, x in speeds.items()))
    run = read(tmp_path)[0]["mingru-s0"]
    assert run.step_seconds == pytest.approx(np.median([1 / 2, 1 / 0.001, 1 / 4, 1 / 4]))


def test_the_evaluation_on_the_start_states_of_the_protocol_counts(write_run, tmp_path):
    path = write_run(seed=3)
    rows = [json.loads(row) for row in (path / "evaluations.jsonl").read_text().splitlines()]
    other = rows[0] | {"seed": 20_000, "episodes": 50, "return_mean": 1.0}
    with (path / "evaluations.jsonl").open("a") as file:
        file.write(json.dumps(other) + "\n")
    found = headline(read(tmp_path)[0]["mingru-s0"], "last")
    assert (found["seed"], found["episodes"], found["return_mean"]) == (
        *(20_003, 3),
        rows[0]["return_mean"],
    )


def test_a_step_at_which_a_target_could_not_be_scored_is_not_the_best(write_run, tmp_path):
    path = write_run(also=[("best", 2, 3600.0, 90.0)])
    first, second = "eval/3600/return_mean", "eval/1800/return_mean"
    write_metrics(path, {"step": 2, first: 3000.0}, {"step": 4, first: 900.0, second: 800.0})
    run = read(tmp_path)[0]["mingru-s0"]
    assert run.curve["3600"]["steps"] == [2, 4]
    assert run.curve["1800"] == {"steps": [4], "return": [800.0], "score": [None]}
    assert headline(run, "best")["step"] == 4


def test_what_is_not_a_finished_run_is_left_out_and_named(write_run, tmp_path):
    write_run("sound-s0")
    stopped = write_run("stopped-s0")
    lines = (stopped / "metrics.jsonl").read_text().splitlines(keepends=True)
    kept = [line for line in lines if json.loads(line)["step"] < 4]
    (stopped / "metrics.jsonl").write_text("".join(kept))
    (write_run("damaged-s0") / "config.json").write_text("{")
    (write_run("unevaluated-s0") / "evaluations.jsonl").unlink()
    runs, left_out = read(tmp_path)
    reasons = {item["folder"].split("/")[-1]: item["reason"] for item in left_out}
    assert list(runs) == ["sound-s0"]
    assert "step 3 of 4" in reasons["stopped-s0"]
    assert "cannot be read" in reasons["damaged-s0"]
    assert "minrl evaluate" in reasons["unevaluated-s0"]


def test_a_run_is_found_once_however_it_is_named(write_run, tmp_path):
    path = write_run()
    runs, _ = find_runs([tmp_path, path, path.parent])
    assert len(runs) == 1


HUGE = "1" + "0" * 400
STRANGE = {
    "no speed": ("metrics.jsonl", '{"step": 5, "time/steps_per_s": 0}'),
    "endless steps": ("metrics.jsonl", '{"step": 3000000000, "time/steps_per_s": 1.0}'),
    "no way to act": ("evaluations.jsonl", '{"refresh_every": null}'),
    "text for a mean": ("evaluations.jsonl", '{"return_mean": "high"}'),
    "text for a score": ("evaluations.jsonl", '{"normalized": {"mean": "high"}}'),
    "endless number": ("evaluations.jsonl", '{"return_mean": HUGE}'.replace("HUGE", HUGE)),
}


@pytest.mark.parametrize("kind", STRANGE)
def test_a_strange_run_costs_at_most_itself(kind, write_run, tmp_path):
    write_run("sound-s0")
    name, strange = STRANGE[kind]
    path = write_run("strange-s1", seed=1) / name
    first, *others = path.read_text().splitlines()
    line = json.dumps(json.loads(first) | json.loads(strange))
    path.write_text("\n".join([*others, line]) + "\n")
    study = make_report((tmp_path,), latency=False)
    assert "sound-s0" in [run["folder"].split("/")[-1] for run in study["runs"]]
    write_report(study, tmp_path / "report")


@pytest.mark.parametrize("kind", ["pipe", "device", "no steps", "list"])
def test_a_strange_outside_agent_is_left_out(kind, write_run, write_peer, tmp_path):
    write_run("sound-s0")
    path = write_peer("iql-s0", 61.0) / "peer.json"
    peer = json.loads(path.read_text())
    path.unlink()
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "device":
        path.symlink_to("/dev/zero")
    else:
        path.write_text(json.dumps([1] if kind == "list" else peer | {"steps": 0}))
    runs, left_out = read(tmp_path)
    assert list(runs) == ["sound-s0"]
    assert "iql-s0" in left_out[0]["folder"]


def test_a_union_is_one_task_however_it_is_written(write_run, tmp_path):
    both = ("minrl/hopper/medium-v0", "minrl/hopper/medium-replay-v0")
    for name, dataset, seeds in (("a", both, (0, 1)), ("b", ("+".join(both),), (0, 2))):
        for seed in seeds:
            path = write_run(f"{name}-s{seed}", seed=seed)
            config = json.loads((path / "config.json").read_text()) | {"dataset": dataset}
            (path / "config.json").write_text(json.dumps(config))
    study = make_report((tmp_path,), latency=False)
    assert [task["id"] for task in study["tasks"]] == ["+".join(both)]
    assert study["cells"][0]["last"]["seeds"] == [0, 1, 2]
    assert [item["reason"][:10] for item in study["left_out"]] == ["the same m"]


def test_references_of_the_datasets_own_are_called_that(write_run, tmp_path):
    write_run("hopper-s0")
    runs, _ = find_runs([tmp_path])
    runs[0].references = (0.0, 1000.0)
    around = dict.fromkeys(("latency", "machine", "minrl", "made"), "")
    study = summarise(runs, name_methods(runs), []) | around
    assert study["tasks"][0]["references"] == [0.0, 1000.0]
    text = make_markdown(study, {}, {})
    assert "Scores are percent, on hopper medium of the dataset's own references." in text
    assert "D4RL's" not in text.partition("Protocol")[2].partition("|")[0]
    runs[0].references = None
    study = summarise(runs, name_methods(runs), []) | around
    assert "on hopper medium of references that are not recorded" in make_markdown(study, {}, {})


def test_an_evaluation_of_a_single_episode_counts(write_run, tmp_path):
    path = write_run("hopper-s0")
    lines = [json.loads(line) for line in (path / "evaluations.jsonl").read_text().splitlines()]
    single = [line | {"episodes": 1, "return_std": None} for line in lines]
    (path / "evaluations.jsonl").write_text("".join(json.dumps(x) + "\n" for x in single))
    run = read(tmp_path)[0]["hopper-s0"]
    assert {e["episodes"] for e in run.evaluations} == {1}


def test_a_name_with_dollars_is_no_formula(write_run, tmp_path):
    path = write_run()
    config = json.loads((path / "config.json").read_text()) | {"dataset": ["a/$\\foo$/b-v0"]}
    (path / "config.json").write_text(json.dumps(config))
    write_report(make_report((path,), latency=False), tmp_path / "report")
    assert "$\\foo$" in (tmp_path / "report" / "report-curves-steps.svg").read_text()


def test_nothing_to_report_says_why(write_run, tmp_path):
    (write_run() / "evaluations.jsonl").unlink()
    with pytest.raises(ConfigError, match="no final evaluation"):
        find_runs([tmp_path])
    with pytest.raises(ConfigError, match=r"no folder or report\.json at"):
        find_runs([tmp_path / "nowhere"])


def test_outside_agents_are_read_from_their_file(write_peer, tmp_path):
    write_peer("iql-s0", 61.0)
    run = read(tmp_path)[0]["iql-s0"]
    assert (run.agent, run.library, run.targets) == ("d3rlpy IQL", "d3rlpy 2.8.1", (None,))
    assert score(run, "last") == 61.0
    assert headline(run, "best") is None


def names(*folders):
    runs, _ = find_runs(folders)
    methods = name_methods(runs)
    return {run.folder.split("/")[-1]: run.method for run in runs}, [m.name for m in methods]


def test_methods_are_named_by_backbone_and_by_what_is_unusual(write_run, write_peer, tmp_path):
    write_run("mingru-s0")
    write_run("mingru-s1", seed=1)
    write_run("mingru-tokens-s0", model={"tokens": "interleaved"})
    write_run("minlstm-s0", backbone="minlstm")
    write_run("bc-s0", backbone="mlp")
    write_run("bc10-s0", backbone="mlp", best_fraction=0.1)
    write_peer("iql-s0", 61.0)
    by_run, order = names(tmp_path)
    assert by_run["mingru-s1"] == "mingru"
    assert by_run["mingru-tokens-s0"] == "mingru, tokens=interleaved"
    expected = ["mingru", "mingru, tokens=interleaved", "minlstm", "BC", "10 % BC", "d3rlpy IQL"]
    assert order == expected


def test_settings_that_belong_to_the_task_or_the_match_do_not_name_a_method(write_run, tmp_path):
    for dataset in ("minrl/hopper/medium-v0", "minrl/walker2d/medium-replay-v0"):
        config = paper((dataset,))
        for seed in (0, 1):
            write_run(
                f"mingru-s{seed}",
                dataset=dataset,
                seed=seed,
                preset="paper",
                optimization=config.optimization,
                model=dataclasses.asdict(config.model),
            )
    write_run("gru-s0", backbone="gru", match_parameters=1000, model={"width": 8})
    write_run("gru-s1", backbone="gru", match_parameters=1000, model={"width": 9}, seed=1)
    assert names(tmp_path)[1] == ["mingru", "gru"]


def test_one_variant_against_one_usual_run_is_decided_by_the_preset(write_run, tmp_path):
    write_run("a-s0", context=3)
    write_run("b-s0")
    assert names(tmp_path)[0] == {"a-s0": "mingru, context=3", "b-s0": "mingru"}


OTHER = "minrl/walker2d/medium-v0"


@pytest.mark.parametrize("usual", [20, 30], ids=["preset", "set"])
@pytest.mark.parametrize("usual_there", [1, 0], ids=["some failed", "all failed"])
def test_no_failed_run_makes_a_variant_the_usual(write_run, tmp_path, usual, usual_there):
    for dataset, seeds in (("minrl/hopper/medium-v0", (2, 2)), (OTHER, (usual_there, 3))):
        for name, context, count in zip(("", ",context=100"), (usual, 100), seeds, strict=True):
            for seed in range(count):  # in folders as of `minrl study --vary context=100`
                write_run(f"mingru{name}-s{seed}", dataset=dataset, context=context, seed=seed)
    runs, _ = find_runs([tmp_path])
    name_methods(runs)
    for run in runs:
        expected = "mingru, context=100" if run.settings["context"] == 100 else "mingru"
        assert run.method == expected, run.folder


def test_a_run_of_the_preset_takes_no_name_from_a_study_of_another_budget(write_run, tmp_path):
    for seed in range(3):
        for backbone in ("mingru", "gru"):
            for dataset in ("minrl/hopper/medium-v0", OTHER):
                name = f"{backbone}-s{seed}"
                write_run(name, dataset=dataset, backbone=backbone, seed=seed, context=15)
    write_run("mine-s0")
    write_run("mine-s1", seed=1)
    by_run, order = names(tmp_path)
    assert order == ["mingru", "mingru, context=20", "gru"]
    assert by_run["mingru-s0"] == "mingru"
    assert by_run["mine-s1"] == "mingru, context=20"


def test_a_variant_with_the_value_of_the_preset_is_still_the_variant(write_run, tmp_path):
    for name, context, tokens in (
        ("gru-s0", 50, "joint"),
        ("gru,context=20-s0", 20, "joint"),
        ("gru,tokens=interleaved-s0", 50, "interleaved"),
    ):
        write_run(name, backbone="gru", context=context, model={"tokens": tokens})
    assert names(tmp_path)[0] == {
        "gru-s0": "gru",
        "gru,context=20-s0": "gru, context=20",
        "gru,tokens=interleaved-s0": "gru, tokens=interleaved",
    }


def test_an_outside_agent_of_another_budget_is_another_method(write_peer, tmp_path):
    write_peer("iql-s0", 61.0)
    write_peer("short-s0", 20.0, steps=20)
    write_peer("bc-s0", 40.0, method="d3rlpy BC")
    assert names(tmp_path)[0] == {
        "bc-s0": "d3rlpy BC",
        "iql-s0": "d3rlpy IQL, 500 steps",
        "short-s0": "d3rlpy IQL, 20 steps",
    }


def test_runs_of_a_task_that_were_trained_on_other_data_are_no_secret(
    write_run, write_peer, tmp_path
):
    write_run("hopper-s0")
    write_peer("iql-s0", 61.0, data="b")
    runs, _ = find_runs([tmp_path])
    around = dict.fromkeys(("latency", "machine", "minrl", "made"), "")
    for digest in ("a", "b"):
        runs[0].data = digest
        study = summarise(runs, name_methods(runs), []) | around
        page = make_markdown(study, {}, {})
        assert ("Not all runs of hopper medium were" in page) == (digest == "a")


def test_what_all_runs_of_a_task_have_is_usual_there(write_run, tmp_path):
    write_run("mingru-s0", context=30)
    write_run("mingru-s0", dataset=OTHER, context=40)
    assert names(tmp_path)[1] == ["mingru"]


def test_other_targets_on_one_task_take_no_name_from_a_study(write_run, tmp_path):
    studied = {"minrl/hopper/medium-v0": (2900.0, 1110.0), OTHER: (4600.0, 900.0)}
    for seed in range(4):
        for dataset, targets in studied.items():
            if seed < 3 or dataset == OTHER:  # whose targets are then the commonest of all
                write_run(f"mingru-s{seed}", dataset=dataset, seed=seed, targets=targets)
    write_run("mine-s0", targets=(2890.0, 1110.0))
    observation = {"backbone": "mlp", "model": {"tokens": "observation"}}
    for seed in (0, 1):  # who is told no return has no other method by asking for another
        write_run(f"bc-s{seed}", seed=seed, targets=(2890.0 + seed, 1110.0), **observation)
    assert names(tmp_path)[1] == ["mingru", "mingru, targets=2890 1110", "BC"]


def test_other_targets_are_another_method(write_run, tmp_path):
    write_run("a-s0")
    write_run("b-s0", targets=(1800.0, 900.0))
    write_run("c-s0", model={"return_scale": 500.0})
    assert set(names(tmp_path)[1]) == {
        "mingru",
        "mingru, targets=1800 900",
        "mingru, return_scale=500",
    }
