import json
from pathlib import Path

import pytest

from minrl.errors import ConfigError
from minrl.scripts.report import make_report, report, write_report
from minrl.scripts.reports.markdown import make_markdown
from minrl.scripts.reports.stored import read_report

RESULTS = Path(__file__).parents[3] / "results"
WALKER = "minrl/walker2d/medium-v0"


@pytest.fixture
def write_seed(writers):
    """Write all runs of one seed of a study with variants and outside agents, below a folder."""

    def write(folder, seed):
        write_run, write_peer = writers(folder)
        learning_rate = 0.00123456789  # has more digits than scores are given
        for dataset in ("minrl/hopper/medium-v0", WALKER):
            for backbone in ("mingru", "transformer"):
                write_run(
                    f"{backbone}-s{seed}",
                    lambda step: 40.0 + 2.0 * seed + step,
                    dataset=dataset,
                    backbone=backbone,
                    seed=seed,
                    context=20 + 4 * (dataset == WALKER),
                )
        name = f"mingru,learning-rate={learning_rate}-s{seed}"
        path = write_run(name, lambda step: 30.0 - step, seed=seed)
        config = json.loads((path / "config.json").read_text())
        config["optimization"]["learning_rate"] = learning_rate
        (path / "config.json").write_text(json.dumps(config))
        for steps in (500, 1000):
            write_peer(f"iql-{steps}-s{seed}", 41.3 + seed, seed=seed, steps=steps, data="abc")

    return write


def stored(folders, path):
    """Report on these folders, and return the path of its report.json."""
    report(tuple(folders), output=path, latency=False)
    return path / "report.json"


def leaves(study):
    """Return a report's figures by place, and its words but when and in which order it was made."""
    runs = sorted(study["runs"], key=lambda run: run["folder"])
    found, todo = {}, [((), study | {"runs": runs, "made": None})]
    while todo:
        place, value = todo.pop()
        if isinstance(value, (dict, list)):
            items = value.items() if isinstance(value, dict) else enumerate(value)
            todo += [((*place, key), item) for key, item in items]
        else:
            found[place] = value
    numbers = {place: value for place, value in found.items() if isinstance(value, float)}
    return numbers, {place: value for place, value in found.items() if place not in numbers}


def test_runs_in_a_report_count_as_their_folders_do(write_seed, tmp_path):
    for seed, folder in ((0, "early"), (1, "early"), (2, "late")):
        write_seed(tmp_path / folder, seed)
    early, late = tmp_path / "early", tmp_path / "late"
    together = make_report((early, late), latency=False)
    assert len(together["runs"]) == 21
    assert {m["name"] for m in together["methods"]} == {
        *("mingru", "mingru, learning_rate=0.00123457", "transformer"),
        *("d3rlpy IQL, 500 steps", "d3rlpy IQL, 1,000 steps"),
    }
    first = stored([early], tmp_path / "first")
    second = stored([late], tmp_path / "second")
    for others in ((first, late), (first, second), (stored([first, late], tmp_path / "third"),)):
        numbers, words = leaves(make_report(others, latency=False))
        assert words == leaves(together)[1]
        assert numbers == pytest.approx(leaves(together)[0], rel=1e-4)  # stored with 6 digits


def test_a_report_names_no_path_of_the_machine(write_seed, tmp_path):
    write_seed(tmp_path / "runs", 0)
    assert str(tmp_path) not in stored([tmp_path / "runs"], tmp_path / "report").read_text()


def test_a_run_given_twice_counts_once(write_seed, tmp_path):
    write_seed(tmp_path / "runs", 0)
    (tmp_path / "runs" / WALKER / "mingru-s0" / "evaluations.jsonl").write_text("")
    path = stored([tmp_path / "runs"], tmp_path / "report")
    for paths in ((path, tmp_path / "runs"), (path, path)):
        study = make_report(paths, latency=False)
        assert len(study["runs"]) == 6
        assert study["unfinished"] == 1
        assert len(study["left_out"]) == 7
        assert study["left_out"][0]["folder"] == f"{WALKER}/mingru-s0"


def test_what_was_unfinished_in_a_report_may_be_finished_by_now(write_seed, tmp_path):
    write_seed(tmp_path / "runs", 0)
    run = tmp_path / "runs" / WALKER / "mingru-s0"
    evaluations = (run / "evaluations.jsonl").read_text()
    (run / "evaluations.jsonl").write_text("")
    path = stored([tmp_path / "runs"], tmp_path / "report")
    other = tmp_path / "other"
    write_seed(other, 1)
    study = make_report((path, other), latency=False)
    assert [item["folder"] for item in study["left_out"]] == [f"{WALKER}/mingru-s0"]
    assert study["unfinished"] == 1
    (run / "evaluations.jsonl").write_text(evaluations)
    finished = tmp_path / "finished" / WALKER / "mingru-s0"
    finished.parent.mkdir(parents=True)
    run.rename(finished)
    study = make_report((path, other, tmp_path / "finished"), latency=False)
    assert (study["left_out"], study["unfinished"], len(study["runs"])) == ([], 0, 14)


def test_other_data_than_the_report_was_made_on_is_said(writers, tmp_path):
    for folder, data in (("one", "abc"), ("other", "def")):
        writers(tmp_path / folder)[1](f"iql-{folder}", 1.0, seed=len(folder), data=data)
    path = stored([tmp_path / "one"], tmp_path / "report")
    text = make_markdown(make_report((path, tmp_path / "other"), latency=False), {}, {})
    assert "Not all runs of hopper medium were trained on the same files" in text


def bad_values(ours):
    """Return fields of a run as no report has them."""
    (evaluation, *_), (target, *_) = ours["evaluations"], ours["curve"]
    evaluations = (
        *({"score": "high"}, {"checkpoint": "first"}, {"target": "x"}, {"refresh_every": "x"}),
        {"return_mean": float("nan")},
    )
    curves = ({"score": 1}, {"score": ["x"]}, {"steps": [1]}, {"return": [float("inf")]})
    return (
        *({"evaluations": [evaluation | values]} for values in evaluations),
        {"evaluations": [{name: evaluation[name] for name in evaluation if name != "checkpoint"}]},
        *({"curve": {target: ours["curve"][target] | values}} for values in curves),
        *({"evaluations": None}, {"curve": 5}, {"versions": 5}, {"versions": {"torch": 2}}),
        *({"task": 9}, {"seed": "x"}, {"steps": None}, {"folder": 1}, {"references": 1}),
        *({"targets": 3}, {"targets": ["high"]}, {"targets": []}, {"step_seconds": "x"}),
        *({"settings": 1}, {"settings": {"backbone": [1]}}, {"settings": {"width": "wide"}}),
    )


def test_damaged_runs_in_a_report_are_refused(write_seed, tmp_path):
    write_seed(tmp_path / "runs", 0)
    path = stored([tmp_path / "runs"], tmp_path / "report")
    study = json.loads(path.read_text())
    ours = next(run for run in study["runs"] if run["library"] is None)
    for damage in (
        {"runs": [{}]},
        {"runs": 3},
        {"tasks": []},
        {"settings": []},
        {"unfinished": "3"},
        {"left_out": 5},
        {"left_out": ["x"], "unfinished": 1},
        {"settings": {}},
        *({"runs": [ours | values]} for values in bad_values(ours)),
    ):
        path.write_text(json.dumps(study | damage))
        with pytest.raises(ConfigError, match="cannot be read"):
            make_report((path, tmp_path / "runs"), latency=False)


def test_damaged_latencies_and_files_are_refused(write_seed, tmp_path):
    write_seed(tmp_path / "runs", 0)
    path = stored([tmp_path / "runs"], tmp_path / "report")
    study = json.loads(path.read_text())
    row = {"method": "mingru", "acting": "recurrent", "as_trained": True, "compiled": True}
    row |= {"median": 1e-4, "p95": 2e-4, "rounds": 9}
    whole = {"device": "cpu", "threads": 1, "rows": [row, row | {"missing": "no checkpoint"}]}
    path.write_text(json.dumps(study | {"latency": whole}))
    assert make_report((path,))["latency"] == whole
    for damage in (
        *(5, {}, whole | {"rows": 5}, whole | {"threads": None}),
        *(whole | {"rows": [row | values]} for values in ({"median": "x"}, {"method": "none"})),
    ):
        path.write_text(json.dumps(study | {"latency": damage}))
        with pytest.raises(ConfigError, match=r"latency in .* cannot be read"):
            make_report((path,))
    path.write_text("[" * 100_000)
    with pytest.raises(ConfigError, match=r"not the report\.json"):
        make_report((path,))


def test_only_methods_with_folders_are_timed(write_seed, tmp_path):
    write_seed(tmp_path / "runs", 0)
    path = stored([tmp_path / "runs"], tmp_path / "report")
    assert make_report((path, path))["latency"] is None
    other = tmp_path / "other" / "transformer-s1"
    other.parent.mkdir()
    (tmp_path / "runs" / WALKER / "transformer-s0").rename(other)
    timed = make_report((path, other))["latency"]["rows"]
    assert {row["method"] for row in timed} == {"transformer"}


@pytest.mark.parametrize("name", ["study", "choices"])
def test_our_own_reports_are_what_this_code_makes_of_their_runs(name, tmp_path):
    folder = RESULTS / name
    study = read_report(folder / "report.json")
    again = make_report((folder / "report.json",))
    again |= {key: study[key] for key in ("made", "machine", "minrl")}
    (numbers, words), (expected_numbers, expected_words) = leaves(again), leaves(study)
    assert len(numbers) > 5_000
    assert numbers == pytest.approx(expected_numbers, rel=1e-3)
    assert words == expected_words
    write_report(again, tmp_path)
    for file in ("report.md", "report.html"):
        assert len((tmp_path / file).read_text()) == len((folder / file).read_text())
    assert (tmp_path / "report.md").read_text() == (folder / "report.md").read_text()


def test_the_study_of_other_defaults_is_still_read():
    path = RESULTS / "study_return_to_go.json"
    runs = make_report((path,), latency=False)["runs"]
    assert len(runs) == len(json.loads(path.read_text())["runs"]) == 288
