"""Run folders whose files hold what no run writes: refused by name, and never waited for."""

import json
import os

import pytest

from minrl import cli
from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.model_config import ModelConfig
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import CheckpointError, ConfigError
from minrl.scripts.evaluate import EvaluateConfig, evaluate_run
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import TrainConfig

DEEP = "[" * 200_000


def config(**changes):
    return json.dumps({**TrainConfig().to_json(), **changes})


def part(name, **changes):
    content = TrainConfig().to_json()
    return json.dumps({**content, name: {**content[name], **changes}})


CONFIGS = {
    "deep": (DEEP, "recursion"),
    "no object": ("[1]", "not of this version|mapping"),
    "text": ("x", "Expecting value"),
    "not UTF-8": (b"\xff", "decode"),
    "large": (" " * (5 << 20), "larger than any such file"),
    "a model that is a number": (config(model=5), "mapping"),
    "a field that is unknown": (config(colour="blue"), "unexpected keyword"),
    "steps of text": (config(steps="many"), "steps must be a whole number, not 'many'"),
    "steps without end": (config(steps=10**400), "steps must be a whole number, not 1000"),
    "steps of nothing": (config(steps=None), "steps must be a whole number, not None"),
    "steps that are true": (config(steps=True), "steps must be a whole number, not True"),
    "a dataset that is a number": (config(dataset=5), "not iterable"),
    "datasets that are numbers": (config(dataset=[5]), "dataset must be a tuple, each text"),
    "a preset that is a list": (config(preset=[1]), r"preset must be text, not \[1\]"),
    "targets of text": (config(targets=["high"]), "targets must be a tuple, each a number"),
    "a target without end": (config(targets=[10**400]), "targets must be a tuple, each a number"),
    "a folder that is a number": (config(run_dir=5), "not of this version"),
    "width": (part("model", width=[64]), r"width must be a whole number, not \[64\]"),
    "backbone": (part("model", backbone=["mingru"]), "backbone must be text"),
    "flag": (part("model", normalize="no"), "normalize must be true or false, not 'no'"),
    "attention": (part("model", attention_context="20"), "must be a whole number or nothing"),
    "rate": (part("optimization", learning_rate="fast"), "learning_rate must be a number"),
    "schedule": (part("optimization", schedule={}), "schedule must be text"),
}


@pytest.fixture
def run(tmp_path):
    (tmp_path / "config.json").write_text(config())
    return RunFolder(tmp_path)


@pytest.mark.parametrize("kind", CONFIGS)
def test_a_configuration_of_other_types_is_refused(run, kind, capsys):
    content, message = CONFIGS[kind]
    content = content if isinstance(content, bytes) else content.encode()
    (run.path / "config.json").write_bytes(content)
    with pytest.raises(ConfigError, match=rf"cannot read .*config\.json: .*({message})"):
        run.read_config()
    assert cli.main(["train", "--resume", str(run.path)]) == 2
    assert "config.json" in capsys.readouterr().err


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        '{"step": "1"}',
        '{"step": 1.5}',
        '{"step": null}',
        '{"step": [1]}',
        f'{{"step": {10**400}}}',
        '{"step": 1, "train/loss": "low"}',
        '{"step": 1, "train/loss": [0.1]}',
        '{"step": 1, "train/loss": null}',
    ],
    ids=lambda line: line[:30],
)
def test_metrics_that_are_no_numbers_are_refused_by_line(run, line):
    run.metrics_file.write_text(f'{{"step": 1, "train/loss": NaN}}\n{{"cut\n\n{line}\n')
    with pytest.raises(ConfigError, match=r"cannot read .*metrics\.jsonl, line 4: it has"):
        run.read_metrics()


def evaluation(**changes):
    line = {"checkpoint": "last", "step": 3, "environment_id": "Hopper-v5", "episodes": 1}
    return json.dumps({**line, "target_return": None, **changes})


@pytest.mark.parametrize(
    "line",
    [
        DEEP,
        "{}",
        evaluation(checkpoint=["last"]),
        evaluation(step="3"),
        evaluation(step={}),
        evaluation(target_return="all"),
        evaluation(environment_id=None),
        evaluation(seed=[1]),
        evaluation(refresh_every="never"),
    ],
    ids=lambda line: line[:30],
)
def test_evaluations_of_other_types_are_refused_by_line(run, line):
    run.evaluations_file.write_text(f"{evaluation()}\n{evaluation(seed=1)}\n")
    assert len(run.read_evaluations()) == 2
    run.append_evaluation(json.loads(evaluation(seed=2)))
    with run.evaluations_file.open("a") as file:
        file.write(line)
    with pytest.raises(ConfigError, match=r"cannot read .*evaluations\.jsonl, line 4: it has"):
        run.read_evaluations()


@pytest.mark.parametrize("name", ["config.json", "metrics.jsonl", "evaluations.jsonl"])
def test_a_named_pipe_in_the_place_of_a_file_is_not_waited_for(run, name):
    (run.path / name).unlink(missing_ok=True)
    os.mkfifo(run.path / name)
    read = {
        "config.json": [run.read_config],
        "metrics.jsonl": [run.read_metrics, lambda: run.forget_after(1, evaluated=True)],
        "evaluations.jsonl": [run.read_evaluations, lambda: run.append_evaluation({})],
    }
    for function in read[name]:
        with pytest.raises(ConfigError, match=f"cannot read .*{name}"):
            function()


@pytest.mark.parametrize("missing", ["step", "environment", "dataset"])
def test_a_checkpoint_that_is_not_that_of_a_run_is_not_evaluated(run, missing):
    model = TrajectoryModel(11, 3, ModelConfig(width=8, num_layers=1))
    info = {"step": 1, "environment": "Hopper-v5", "dataset": {}}
    del info[missing]
    agent = DecisionAgent(model, target_return=1.0, info=info)
    run.checkpoints.save(1, model.state_dict(), agent.header(), {})
    with pytest.raises(CheckpointError, match=f"the last checkpoint of .* has no {missing}"):
        evaluate_run(run.path, EvaluateConfig(episodes=1, targets=(1.0,)))


def test_a_run_that_says_no_more_than_it_must_is_evaluated(run, capsys):
    model = TrajectoryModel(11, 3, ModelConfig(width=8, num_layers=1))
    info = {"step": 1, "environment": "Hopper-v5", "dataset": {}}
    agent = DecisionAgent(model, target_return=1.0, info=info)
    run.checkpoints.save(1, model.state_dict(), agent.header(), {})
    with pytest.raises(ConfigError, match="does not say what it was asked for: give --targets"):
        evaluate_run(run.path, EvaluateConfig(episodes=1))
    evaluate_run(run.path, EvaluateConfig(episodes=1, targets=(1.0,)))
    assert "score in percent: the data does not say of what" in capsys.readouterr().out
