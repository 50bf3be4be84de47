import dataclasses

import pytest

from minrl.agents.trajectory import TrajectoryModel
from minrl.data.minari_source import load_dataset
from minrl.errors import ConfigError
from minrl.scripts.study_grid import datasets_of

TASK = "hopper/medium-expert"
ROBOTS = ("hopper", "halfcheetah", "walker2d")
LEVELS = ("medium", "medium-replay", "medium-expert")


def test_names_of_tasks():
    assert datasets_of("walker2d/medium-replay") == ["minrl/walker2d/medium-replay-v0"]
    assert datasets_of("mujoco/hopper/expert-v0") == ["mujoco/hopper/expert-v0"]
    joined = "minrl/hopper/medium-v0+mujoco/hopper/expert-v0"
    assert datasets_of("hopper/medium+mujoco/hopper/expert-v0") == [joined]
    nine = {f"minrl/{robot}/{level}-v0" for robot in ROBOTS for level in LEVELS}
    assert set(datasets_of("all")) == nine
    with pytest.raises(ConfigError, match=r"unknown task 'hoper/medium': tasks are hopper/medium"):
        datasets_of("hoper/medium")


def test_a_grid_has_every_combination_once(hopper_id, tmp_path, plan):
    methods = ("mingru", "bc", "bc10", "mingru")
    runs = plan(tmp_path, tasks=(TASK, hopper_id), backbones=methods, seeds=2)
    found = [(run.run_dir, run.model.backbone, run.best_fraction, run.seed) for run in runs]
    parent = tmp_path / hopper_id
    assert found == [
        (parent / f"{name}-s{seed}", backbone, fraction, seed)
        for seed in (0, 1)
        for name, backbone, fraction in (
            ("mingru", "mingru", 1.0),
            ("bc", "mlp", 1.0),
            ("bc10", "mlp", 0.1),
        )
    ]
    assert {(run.steps, run.batch_size, run.model.width) for run in runs} == {(12, 8, 16)}
    assert {run.model.tokens for run in runs} == {"joint", "observation"}  # the preset's choices


def test_a_study_may_begin_at_any_seed(hopper_id, tmp_path, plan):
    whole = plan(tmp_path, seeds=5)
    assert plan(tmp_path, seeds=2, first_seed=3) == whole[3:]
    assert [run.seed for run in whole[3:]] == [3, 4]


def test_a_varied_field_adds_runs_that_differ_in_it_alone(hopper_id, tmp_path, plan):
    vary = ("tokens=joint,interleaved", "context=10,20", "candidate=identity")
    base, *variants = plan(tmp_path, vary=vary)
    names = [run.run_dir.name for run in variants]
    assert names == [
        "mingru,tokens=interleaved-s0",
        "mingru,context=10-s0",
        "mingru,candidate=identity-s0",
    ]
    changes = [{"tokens": "interleaved"}, {}, {"candidate": "identity"}]
    for run, change in zip(variants, changes, strict=True):
        assert run.model == dataclasses.replace(base.model, **change)
    assert [run.context for run in variants] == [20, 10, 20]
    # An LSTM has no candidate to vary: no run would differ from its base.
    names = [run.run_dir.name for run in plan(tmp_path, backbones=("lstm",), vary=vary)]
    assert names == ["lstm-s0", "lstm,tokens=interleaved-s0", "lstm,context=10-s0"]
    # Behaviour cloning sees observations alone, and with other tokens it would be another method.
    vary += ("return-noise=0,0.2", "burn-in=3", "learning-rate=1e-4", "best_fraction=0.1")
    names = [run.run_dir.name for run in plan(tmp_path, backbones=("bc",), vary=vary)]
    assert names == ["bc-s0", "bc,context=10-s0", "bc,learning-rate=1e-4-s0"]


def test_cloning_stays_cloning_whatever_is_set_for_all(hopper_id, tmp_path, plan):
    changed = ("tokens=interleaved", "best-fraction=0.5", "steps=7")
    runs = plan(tmp_path, backbones=("mingru", "bc", "bc10"), more=changed)
    told = [(run.model.tokens, run.best_fraction, run.steps) for run in runs]
    assert told == [("interleaved", 0.5, 7), ("observation", 1.0, 7), ("observation", 0.1, 7)]


def test_values_of_every_kind_can_be_set_and_told_apart(hopper_id, tmp_path, plan):
    more = ("targets=3000 1000", "learning_rate=1e-4", "learn-initial-state=False")
    (run,) = plan(tmp_path, more=more)
    assert run.targets == (3000.0, 1000.0)
    assert run.optimization.learning_rate == 1e-4
    assert run.model.learn_initial_state is False
    names = [run.run_dir.name for run in plan(tmp_path, vary=("targets=3 1,3_1",))[1:]]
    assert len(set(names)) == len(names) == 2


WRONG = {
    "backbone": ({"backbones": ("minigru",)}, "backbones must be of mingru, .*, not 'minigru'"),
    "none": ({"backbones": ()}, "backbones must name at least one"),
    "preset": ({"preset": "fast"}, "preset must be of quick, paper, not 'fast'"),
    "seeds": ({"seeds": 0}, "seeds must be at least 1, not 0"),
    "first seed": ({"first_seed": -1}, "first-seed must be at least 0, not -1"),
    "workers": ({"workers": 0}, "workers must be at least 1, not 0"),
    "gpus": ({"gpus": -1.0}, "gpus must be at least 0"),
    "gpus of this machine": ({"gpus": 0.5}, "and 0 without --ray, not 0.5"),
    "quote": ({"more": ("targets='3600",)}, "cannot be read: No closing quotation"),
    "form": ({"more": ("steps",)}, "'steps' must be of the form name=value"),
    "form of a variant": ({"vary": ("tokens",)}, "'tokens' must be of the form name=value"),
    "value": ({"vary": ("tokens=joint,wrong",)}, "tokens must be one of .*, not 'wrong'"),
    "grid": ({"more": ("seed=3",)}, "seed is not for --set or --vary"),
    "width": (
        {"vary": ("width=8,16",), "match_parameters": True},
        "width is chosen by --match-parameters",
    ),
}


@pytest.mark.parametrize("case", WRONG)
def test_what_is_impossible_is_refused_before_anything_is_made(case, tmp_path, plan):
    options, message = WRONG[case]
    with pytest.raises(ConfigError, match=message):
        plan(tmp_path / "study", tasks=("walker2d/medium",), **options)  # not made in these tests
    assert not (tmp_path / "study").exists()


def test_an_unknown_setting_is_named(tmp_path, capsys, plan):
    with pytest.raises(SystemExit) as stopped:
        plan(tmp_path, more=("widht=3",))
    assert stopped.value.code == 2
    assert "--widht" in capsys.readouterr().err


def test_matched_runs_have_the_parameters_of_the_presets_mingru(hopper_id, tmp_path, plan):
    runs = plan(tmp_path, backbones=("mingru", "minlstm", "bc"), match_parameters=True)
    data = load_dataset(hopper_id)
    sizes = data.observations.shape[1], data.actions.shape[1]
    mingru = TrajectoryModel(*sizes, runs[0].model)
    expected = sum(parameter.numel() for parameter in mingru.parameters())
    assert {run.match_parameters for run in runs} == {expected}
