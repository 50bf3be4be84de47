"""The whole configuration of a training run, its presets, and what is impossible in it."""

import dataclasses
import json
import math
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, get_args

from minrl.agents.field_types import wrong_types
from minrl.agents.model_config import BEFORE_THE_CHOICE, ModelConfig, ignored_fields
from minrl.agents.training import OptimizationConfig
from minrl.data.validate import OnBadEpisode
from minrl.envs.scores import d4rl_task
from minrl.errors import ConfigError

DEFAULT_DATASET = "minrl/hopper/medium-expert-v0"

# Evaluations while training choose the best checkpoint; the final ones, which report it, must not
# share their start states.
SELECTION_SEED, FINAL_SEED = 10_000, 20_000

# Returns to ask for, in reward units (the Decision Transformer's code, gym/experiment.py).
PAPER_TARGETS = {
    "hopper": (3600.0, 1800.0),
    "halfcheetah": (12000.0, 6000.0),
    "walker2d": (5000.0, 2500.0),
}

# Width and learning rate of each task in Decision Mamba (gym/run_experiments.sh), which "Were RNNs
# All We Needed?" says it follows.
PAPER_TASKS = {
    ("hopper", "medium"): (256, 1e-4),
    ("hopper", "medium-replay"): (256, 1e-4),
    ("walker2d", "medium"): (128, 1e-4),
}
PAPER_DEFAULT = (128, 1e-3)
# The Decision Transformer's own, for all tasks (gym/experiment.py).
PAPER_TRANSFORMER = (128, 1e-4)
# Both papers' code has an embedding of each timestep, left at nn.Embedding's N(0, 1).
PAPER_TIMESTEPS = 1000
PAPER_TIMESTEP_STD = 1.0

# What is usual with a backbone: Mamba's released code expands by 2, a transformer has no other
# sense of position than the time, and who clones behaviour sees the observation alone.
MODEL_SETTINGS = {
    "mamba": {"expansion": 2},
    "transformer": {"max_timestep": PAPER_TIMESTEPS},
    "mlp": {"tokens": "observation"},
}

# A transformer is trained on windows, and acts on them (Decision Transformer, arXiv 2106.01345).
REFRESH_EVERY = {"transformer": 1}


@dataclass(frozen=True)
class TrainConfig:
    """Everything a run depends on; written to its folder as config.json.

    From Python start from :func:`quick` or :func:`paper`: the field ``preset`` only says which.
    """

    dataset: tuple[str, ...] = (DEFAULT_DATASET,)
    """Minari ids; several are joined. minrl/* are made on first use, others are downloaded."""
    on_bad_episode: str = "raise"
    """raise refuses a dataset with a malformed episode; drop leaves such out and says so."""
    environment: str | None = None
    """Gymnasium id to evaluate in; by default the one the data came from."""
    preset: str = "quick"
    """quick: minutes on two CPU cores; paper: the papers' widths, rates and 100,000 steps, and the
    return-to-go and the time are told."""
    model: ModelConfig = field(default_factory=ModelConfig)
    optimization: OptimizationConfig = field(default_factory=OptimizationConfig)
    steps: int = 4000
    """Training steps."""
    batch_size: int = 128
    """Windows a step, over all processes."""
    context: int = 20
    """Steps of a window that count in the loss, up to the longest episode."""
    burn_in: int = 0
    """Steps before a window that only warm up the recurrent state."""
    seed: int = 0
    """Of weights, windows, dropout and evaluation."""
    device: str = "auto"
    """cpu, cuda, cuda:1 ...; auto: a GPU if there is one."""
    targets: tuple[float, ...] = ()
    """Returns to ask for; "best" is judged by the first. Default: the mean return of the best tenth
    of the data and that of all; with the preset paper, for hopper, halfcheetah and walker2d, the
    Decision Transformer's."""
    refresh_every: int = 0
    """When acting, rebuild the state this often from the last steps, as many as a window and its
    burn-in; 0 never, 1 always."""
    eval_every: int = 1000
    """Steps between evaluations, each after a checkpoint."""
    eval_episodes: int = 10
    """Episodes for each target in those evaluations; 0: none."""
    final_episodes: int = 100
    """Episodes for each target at the end, on other seeds; 0: no final evaluation."""
    held_out: float = 0.05
    """Share of the episodes kept from training, to measure the action error on; 0: none."""
    best_fraction: float = 1.0
    """Train only on the episodes of the highest returns that hold this share of the steps; with
    the backbone mlp, 0.1 is "10 % BC"."""
    match_parameters: int | None = None
    """Choose the width, in place of --width, with which the model has about this many
    parameters."""
    log_every: int = 50
    """Steps between lines of metrics."""
    run_dir: Path | None = None
    """Folder of the run; by default runs/DATASET/BACKBONE-sSEED-TIME."""

    def check(self) -> None:
        """Refuse what is impossible.

        Raises:
            ConfigError: Names every such field and its allowed range.
        """
        if problems := wrong_types(self):
            raise ConfigError("; ".join(_with_flag_name(problem) for problem in problems))
        problems = self.model.problems() + self.optimization.problems()
        if self.preset not in PRESETS:
            problems.append(f"preset must be one of {', '.join(PRESETS)}, not {self.preset!r}")
        if not self.dataset:
            problems.append("dataset must name at least one dataset")
        for name, least in (
            ("steps", 1),
            ("batch_size", 1),
            ("context", 1),
            ("burn_in", 0),
            ("seed", 0),
            ("refresh_every", 0),
            ("eval_every", 1),
            ("eval_episodes", 0),
            ("final_episodes", 0),
            ("log_every", 1),
        ):
            if getattr(self, name) < least:
                problems.append(f"{name} must be at least {least}, not {getattr(self, name)}")
        if not all(math.isfinite(target) for target in self.targets):
            problems.append(f"targets must be finite, not {self.targets}")
        answers = get_args(OnBadEpisode)
        for name, is_possible, wanted in (
            ("on_bad_episode", self.on_bad_episode in answers, " or ".join(answers)),
            ("dataset", len(set(self.dataset)) == len(self.dataset), "different ids"),
            ("held_out", 0 <= self.held_out < 1, "in [0, 1)"),
            ("best_fraction", 0 < self.best_fraction <= 1, "in (0, 1]"),
            (
                "match_parameters",
                self.match_parameters is None or self.match_parameters > 0,
                "positive",
            ),
        ):
            if not is_possible:
                problems.append(f"{name} must be {wanted}, not {getattr(self, name)!r}")
        if problems:
            raise ConfigError("; ".join(_with_flag_name(problem) for problem in problems))

    def without_effect(self) -> list[str]:
        """Return the names of the flags that are set and that this model does not look at."""
        usual = PRESETS[self.preset](self.dataset, self.model.backbone)
        given, default = flatten(self), flatten(usual)
        names = sorted(name for name in self.ignored() if given[name] != default[name])
        return [name.replace("_", "-") for name in names]

    def ignored(self) -> set[str]:
        """Return the names of the fields that this model does not look at."""
        return ignored_settings(flatten(self))

    @property
    def selection_seed(self) -> int:
        """Of the start states while training, from which the best checkpoint is chosen."""
        return SELECTION_SEED + self.seed

    @property
    def final_seed(self) -> int:
        """Of the start states at the end."""
        return FINAL_SEED + self.seed

    def to_json(self) -> dict[str, Any]:
        """Return plain values; :meth:`from_json` reads them back."""
        values = dataclasses.asdict(self)
        values["run_dir"] = None if self.run_dir is None else str(self.run_dir)
        return json.loads(json.dumps(values))

    @classmethod
    def from_json(cls, values: dict[str, Any]) -> "TrainConfig":
        """Read what :meth:`to_json` wrote.

        Raises:
            ConfigError: If a field is unknown or missing, for instance written by another version,
                or of another type.
        """
        try:
            values = {**values, "model": {**BEFORE_THE_CHOICE, **values["model"]}}
            config = cls(
                **{
                    **values,
                    "model": ModelConfig(**values["model"]),
                    "optimization": OptimizationConfig(**values["optimization"]),
                    "dataset": tuple(values["dataset"]),
                    "targets": tuple(values["targets"]),
                    "run_dir": None if values["run_dir"] is None else Path(values["run_dir"]),
                }
            )
        except (TypeError, KeyError) as error:
            raise ConfigError(f"this configuration is not of this version: {error}") from error
        problems = wrong_types(config)
        parts = (
            (cls, values),
            (ModelConfig, values["model"]),
            (OptimizationConfig, values["optimization"]),
        )
        for kind, given in parts:  # what was not there yet is not what is the default now
            names = [field.name for field in dataclasses.fields(kind)]
            problems += [f"{name} is missing" for name in names if name not in given]
        if problems:
            raise ConfigError(f"this configuration is not of this version: {'; '.join(problems)}")
        return config

    def continued_with(self, changed: "TrainConfig") -> "TrainConfig":
        """Return the configuration with which a run of this one is continued.

        What ``changed`` leaves open, for the data to decide, stays as it is.

        Raises:
            ConfigError: If it differs in a field that decides the weights.
        """
        free = ("device", "final_episodes", "steps")
        for name, old in flatten(self).items():
            new = flatten(changed)[name]
            is_open = new in (None, ()) or (name == "width" and changed.match_parameters)
            if new != old and name not in free and not is_open:
                can = ", ".join(free).replace("_", "-")
                raise ConfigError(
                    f"{name.replace('_', '-')} is {_as_given(old)} in this run and cannot be "
                    f"{_as_given(new)} when it is resumed; only {can} can change"
                )
        if changed.steps != self.steps and self.optimization.schedule == "cosine":
            warnings.warn(
                f"the learning rate goes on as if this run had been one of {changed.steps:,} steps "
                f"from the start, not of {self.steps:,}: after a finished run it rises again",
                stacklevel=2,
            )
        return dataclasses.replace(self, **{name: getattr(changed, name) for name in free})


def _with_flag_name(problem: str) -> str:
    name, _, rest = problem.partition(" ")
    return f"{name.replace('_', '-')} {rest}"


def _as_given(value: Any) -> str:
    """Return a value as it stands on a command line."""
    return " ".join(map(str, value)) if isinstance(value, tuple) else str(value)


def flatten(config: TrainConfig) -> dict[str, Any]:
    """Return the fields of the configuration and its parts by name, in one level."""
    values = {item.name: getattr(config, item.name) for item in dataclasses.fields(config)}
    parts = values.pop("model"), values.pop("optimization")
    return values | dataclasses.asdict(parts[0]) | dataclasses.asdict(parts[1])


def ignored_settings(settings: dict[str, Any]) -> set[str]:
    """Return the names of those of a flattened configuration that its model does not look at."""
    backbone, tokens = settings["backbone"], settings["tokens"]
    ignored = ignored_fields(backbone)
    if tokens == "observation":
        ignored |= {"action_dropout", "condition", "max_timestep", "return_noise"}
    if tokens == "observation" or not settings["max_timestep"]:
        ignored.add("timestep_std")
    if backbone == "mlp" and not settings["convolution"] and tokens != "joint":
        # It sees the observation's token alone; a joint one holds the action before it.
        ignored |= {"action_dropout", "burn_in", "refresh_every", "return_noise"}
    return ignored


def task_of(dataset: str) -> tuple[str | None, str | None]:
    """Return robot and level named in a dataset id: ("hopper", "medium-replay"), else None."""
    levels = ("medium-replay", "medium-expert", "medium")
    return d4rl_task(dataset), next((x for x in levels if x in dataset.lower()), None)


def quick(dataset: tuple[str, ...] = (DEFAULT_DATASET,), backbone: str = "mingru") -> TrainConfig:
    """Return the default preset: minutes on two CPU cores."""
    return TrainConfig(
        dataset=dataset,
        model=ModelConfig(backbone, **MODEL_SETTINGS.get(backbone, {})),
        refresh_every=REFRESH_EVERY.get(backbone, 0),
    )


def paper(dataset: tuple[str, ...] = (DEFAULT_DATASET,), backbone: str = "mingru") -> TrainConfig:
    """Return the published recipe: Decision Mamba's, width and rate by task.

    A transformer has the Decision Transformer's width and rate.
    """
    width, learning_rate = PAPER_TASKS.get(task_of(dataset[0]), PAPER_DEFAULT)
    if backbone == "transformer":
        width, learning_rate = PAPER_TRANSFORMER
    model = ModelConfig(
        backbone,
        tokens="interleaved",
        condition="return-to-go",
        width=width,
        dropout=0.1,
        max_timestep=PAPER_TIMESTEPS,
        timestep_std=PAPER_TIMESTEP_STD,
    )
    return TrainConfig(
        dataset=dataset,
        preset="paper",
        model=dataclasses.replace(model, **MODEL_SETTINGS.get(backbone, {})),
        optimization=OptimizationConfig(
            learning_rate=learning_rate,
            warmup_steps=10_000,
            schedule="constant",
            weight_decay=1e-4,
            return_noise=0.0,
        ),
        targets=PAPER_TARGETS.get(task_of(dataset[0])[0], ()),
        refresh_every=REFRESH_EVERY.get(backbone, 0),
        batch_size=64,
        steps=100_000,
        held_out=0.0,
        eval_every=10_000,
        eval_episodes=100,
    )


PRESETS = {"quick": quick, "paper": paper}
