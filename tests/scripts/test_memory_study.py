import json
from dataclasses import replace

import pytest

from minrl.errors import ConfigError
from minrl.scripts import memory_report, memory_study, memory_tasks
from minrl.scripts.memory_study import Study, curve_of, main


@pytest.fixture
def study(monkeypatch, tmp_path):
    """Two cores on a task of two updates, and updates timed once."""
    config = replace(
        memory_tasks.RECALL,
        environment_options={"length": 2},
        num_envs=4,
        num_steps=16,
        hidden_size=8,
        total_steps=128,
    )
    tasks = {"recall-2": memory_tasks.Task("Recall, 2 blank steps", config, 0.25)}
    for module in (memory_study, memory_report):
        monkeypatch.setattr(module, "TASKS", tasks)
    monkeypatch.setattr(memory_report, "ROUNDS", 1)
    return Study(("recall-2",), ("lstm", "mingru"), 2, tmp_path / "runs", tmp_path / "results", 1)


@pytest.mark.integration
def test_a_study_trains_what_is_missing_and_reports_what_is_there(study, monkeypatch, capsys):
    main(study)
    curves = sorted(study.runs.glob("*.csv"))
    assert [path.stem for path in curves] == [
        f"recall-2-{core}-{seed}" for core in ("lstm", "mingru") for seed in (0, 1)
    ]
    result = json.loads((study.results / "memory.json").read_text())
    summary = result["tasks"]["recall-2"]["mingru"]
    returns = [row["episodic_return"] for row in curve_of(curves[2])]
    assert summary["final_returns"][0] == pytest.approx(returns[-1])
    assert summary["steps"] == 128
    assert summary["curve"]["steps"] == [64, 128]
    assert all(
        low <= mean <= high
        for low, mean, high in zip(
            *(summary["curve"][name] for name in ("lowest", "mean", "highest")), strict=True
        )
    )
    assert (study.results / "memory.png").stat().st_size > 10_000
    assert "| recall-2 | MinGRU |" in capsys.readouterr().out

    complete, cut_off = curves[0].read_text(), curves[2].read_text()
    curves[2].write_text(cut_off[: cut_off.rindex(",")])
    main(study)
    assert "recall-2-mingru-0" in (printed := capsys.readouterr().out)
    assert "recall-2-lstm-0:" not in printed
    assert curves[0].read_text() == complete
    assert len(curve_of(curves[2])) == 2

    # What was trained with other settings does not pass for what would be trained now.
    task = memory_study.TASKS["recall-2"]
    monkeypatch.setitem(
        memory_study.TASKS,
        "recall-2",
        replace(task, config=replace(task.config, learning_rate=1.0)),
    )
    main(replace(study, report_only=True))
    assert json.loads((study.results / "memory.json").read_text())["tasks"] == {}
    main(study)
    assert capsys.readouterr().out.count("recall-2-") == 4


@pytest.mark.parametrize("cut", ["\r\n64,1,1,", "\r\n64,1,1,1,1,0.", "\r\n128,1,1,1,1,0.1", ""])
def test_a_line_that_was_cut_off_anywhere_is_left_out(cut, tmp_path):
    header = "steps,seconds,processor_seconds,episodic_return,rollout_seconds,update_seconds"
    (tmp_path / "curve.csv").write_text(f"{header}\r\n32,1,1,1,1,0.5{cut}", newline="")
    assert [row["steps"] for row in curve_of(tmp_path / "curve.csv")] == [32][: len(cut)]


@pytest.mark.parametrize("wrong", [{"tasks": ("recall",)}, {"cores": ("rnn",)}])
def test_unknown_names_are_refused_with_the_known_ones(study, wrong):
    ((field, (name,)),) = wrong.items()
    with pytest.raises(ConfigError, match=f"{field[:-1]} must be of .*, not '{name}'"):
        main(replace(study, **wrong))
    assert not study.runs.exists()


@pytest.mark.integration
def test_finished_runs_are_reported_whatever_is_installed_now(study, monkeypatch, capsys):
    main(study)
    name, task = "popgym:of-another-machine-v0", memory_study.TASKS["recall-2"]
    popgym = replace(task, config=replace(task.config, environment=name))
    monkeypatch.setitem(memory_study.TASKS, "recall-2", popgym)
    for path in study.runs.glob("*.json"):
        path.write_text(json.dumps(json.loads(path.read_text()) | {"environment": name}))
    monkeypatch.setattr(memory_study.importlib.util, "find_spec", lambda name: None)
    for again in (study, replace(study, report_only=True)):
        (study.results / "memory.json").unlink()
        main(again)
        result = json.loads((study.results / "memory.json").read_text())
        assert "recall-2" in result["tasks"]
        assert bool(result["update"]) != again.report_only
    (study.runs / "recall-2-mingru-0.csv").unlink()
    main(study)
    assert "popgym is not installed, left out: recall-2-mingru-0" in capsys.readouterr().out
