import dataclasses
import json

import pytest
import torch

from minrl.agents.backbones.blocks import MIXERS
from minrl.agents.model_config import ModelConfig
from minrl.agents.trajectory import TrajectoryModel
from minrl.errors import ConfigError
from minrl.scripts.match_parameters import count_parameters, match_width
from minrl.scripts.train_config import PRESETS, TrainConfig, paper, quick, task_of


def test_presets_are_the_published_recipes():
    assert quick().to_json()["preset"] == "quick"
    hopper = paper(("minrl/hopper/medium-v0",))
    assert (hopper.model.width, hopper.optimization.learning_rate) == (256, 1e-4)
    walker = paper(("d4rl/walker2d/medium-v2",))
    assert (walker.model.width, walker.optimization.learning_rate) == (128, 1e-4)
    cheetah = paper(("mujoco/halfcheetah/medium-replay-v0",))
    assert (cheetah.model.width, cheetah.optimization.learning_rate) == (128, 1e-3)
    replay = paper(("minrl/hopper/medium-replay-v0",))
    assert (replay.model.width, replay.optimization.learning_rate) == (256, 1e-4)
    transformer = paper(("mujoco/halfcheetah/medium-v0",), "transformer")
    assert (transformer.model.width, transformer.optimization.learning_rate) == (128, 1e-4)
    assert hopper.targets == replay.targets == (3600, 1800)
    assert walker.targets == (5000, 2500)
    assert cheetah.targets == transformer.targets == (12000, 6000)
    assert paper(("other/robot-v0",)).targets == ()
    for config in (hopper, replay, walker, cheetah, transformer):
        assert (config.model.tokens, config.model.condition) == ("interleaved", "return-to-go")
        assert (config.model.max_timestep, config.model.timestep_std) == (1000, 1.0)
        assert config.optimization.schedule == "constant"
        assert (config.steps, config.optimization.warmup_steps) == (100_000, 10_000)
        assert (config.context, config.batch_size, config.model.num_layers) == (20, 64, 3)
        assert (config.model.dropout, config.optimization.weight_decay) == (0.1, 1e-4)
        config.check()


def test_tasks_are_those_that_d4rl_has():
    assert task_of("d4rl/Hopper/medium-replay-v2") == ("hopper", "medium-replay")
    assert task_of("Walker2d-v5") == ("walker2d", None)
    assert task_of("halfcheetah-medium-v2") == ("halfcheetah", "medium")
    assert task_of("me/grasshopper/random-v0") == (None, None)
    assert paper(("dm_control/hopper-hop-v0",)).targets == ()  # its rewards are others


def test_configuration_survives_its_json():
    config = dataclasses.replace(paper(), targets=(1.0, 2.0))
    assert TrainConfig.from_json(json.loads(json.dumps(config.to_json()))) == config


@pytest.mark.parametrize("part", [None, "model", "optimization"])
def test_what_a_configuration_lacks_is_not_what_is_the_default_now(part):
    values = quick().to_json()
    name = {None: "held_out", "model": "width", "optimization": "return_noise"}[part]
    del (values if part is None else values[part])[name]
    with pytest.raises(ConfigError, match=f"not of this version: {name} is missing"):
        TrainConfig.from_json(values)


@pytest.mark.parametrize("preset", PRESETS.values())
@pytest.mark.parametrize("backbone", MIXERS)
def test_presets_suit_every_backbone(preset, backbone):
    config = preset(backbone=backbone)
    config.check()
    assert config.model.backbone == backbone
    assert (config.refresh_every == 1) == (backbone == "transformer")
    assert (config.model.tokens == "observation") == (backbone == "mlp")


@pytest.mark.parametrize("backbone", MIXERS)
def test_counted_parameters_are_those_of_the_model(backbone):
    config = quick(backbone=backbone).model
    parameters = TrajectoryModel(11, 3, config).parameters()
    assert count_parameters(config, 11, 3) == sum(map(torch.numel, parameters))


@pytest.mark.parametrize(
    ("backbone", "parameters"),
    [("mingru", 4_783), ("mingru", 250_000), *((backbone, 30_000) for backbone in MIXERS)],
)
def test_no_width_comes_nearer_to_the_parameters_asked_for(backbone, parameters):
    config = quick(backbone=backbone).model

    def distance(width):
        wide = dataclasses.replace(config, width=width)
        return abs(count_parameters(wide, 11, 3) - parameters)

    width = match_width(config, 11, 3, parameters)
    others = [*range(4, 500, 60), *range(max(width - 8, 4), width + 9, 4)]
    assert width == min(sorted(others), key=distance)


def test_matched_widths_can_be_divided_among_the_heads():
    config = ModelConfig("transformer", num_heads=6, width=60)
    assert match_width(config, 11, 3, 100_000) % 12 == 0


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("best_fraction", 0.0),
        ("best_fraction", 1.1),
        ("match_parameters", -1),
        ("match_parameters", 0),
        ("held_out", 1.0),
    ],
)
def test_impossible_values_are_named_as_flags(field, value):
    with pytest.raises(ConfigError, match=f"^{field.replace('_', '-')} must be .*, not {value}"):
        TrainConfig(**{field: value}).check()
