"""The runs of a study: tasks, methods, variants and seeds, each combination one training run."""

import dataclasses
import difflib
import json
import re
import shlex
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from urllib.parse import quote

import tyro

from minrl.agents.backbones.blocks import MIXERS
from minrl.data.dataset_ids import EMBEDDED_IDS, check_id
from minrl.data.minari_source import load_dataset
from minrl.errors import ConfigError
from minrl.scripts.match_parameters import count_parameters
from minrl.scripts.run_folder import RunFolder
from minrl.scripts.train_config import PRESETS, TrainConfig, flatten
from minrl.scripts.train_setup import complete

# Behaviour cloning is the backbone without memory, on all episodes or on the best tenth.
CLONING = {"bc": ("mlp", 1.0), "bc10": ("mlp", 0.1)}
TASKS = {re.sub(r"^minrl/(.*)-v0$", r"\1", name): name for name in EMBEDDED_IDS}

# What the grid itself decides, and what may differ between a run and its continuation.
OF_THE_GRID = ("dataset", "backbone", "preset", "seed", "run_dir", "match_parameters")
FREE = ("run_dir", "device", "final_episodes")


@dataclass(frozen=True)
class StudyConfig:
    """A grid of training runs and where to run them."""

    tasks: tuple[str, ...] = ("all",)
    """Such as hopper/medium (short for minrl/hopper/medium-v0), any other Minari id, ids joined
    with "+", or all: the nine embedded datasets."""
    backbones: tuple[str, ...] = ("mingru", "minlstm", "transformer", "bc")
    """Names of backbones; bc is behaviour cloning, bc10 the same on the best tenth of the data."""
    seeds: int = 5
    """How many; they are 0, 1, 2 ..., or follow on --first-seed."""
    first_seed: int = 0
    """The lowest; so that machines share a study, or one grows: 5 --first-seed 5 adds five."""
    preset: str = "quick"
    """As in minrl train: quick or paper."""
    set: tuple[str, ...] = ()
    """Flags of minrl train for all runs, such as steps=10000 batch-size=64 "targets=3600 1800"; bc
    and bc10 keep their tokens and their share of the data."""
    vary: tuple[str, ...] = ()
    """Ablations, such as tokens=joint,interleaved context=20,100: beside each run, one for each
    value that its method does not have anyway; one flag at a time."""
    match_parameters: bool = False
    """Choose each run's width so that it has as many parameters as the preset's mingru there."""
    workers: int = 1
    """Runs at the same time on this machine."""
    ray: str | None = None
    """Run on a Ray cluster instead: auto for the one of this machine, or an address."""
    cpus: int = 1
    """Threads of each run; on Ray also the cores it asks for."""
    gpus: float = 0.0
    """GPUs that each run asks Ray for; 0.25 puts four runs on one."""
    folder: Path = Path("runs/study")
    """Folder of the study; must be shared by all machines."""

    def check(self) -> None:
        """Refuse what is impossible.

        Raises:
            ConfigError: Names the flag and what is allowed.
        """
        for name, allowed in (
            ("preset", tuple(PRESETS)),
            ("backbones", (*MIXERS, *CLONING)),
        ):
            given = getattr(self, name)
            for value in (given,) if isinstance(given, str) else given:
                if value not in allowed:
                    raise ConfigError(f"{name} must be of {', '.join(allowed)}, not {value!r}")
        for name in ("tasks", "backbones"):
            if not getattr(self, name):
                raise ConfigError(f"{name} must name at least one")
        for name, least in (("seeds", 1), ("first_seed", 0), ("workers", 1), ("cpus", 1)):
            if getattr(self, name) < least:
                flag = name.replace("_", "-")
                raise ConfigError(f"{flag} must be at least {least}, not {getattr(self, name)}")
        if self.gpus < 0 or (self.gpus and not self.ray):
            raise ConfigError(f"gpus must be at least 0, and 0 without --ray, not {self.gpus}")
        if self.match_parameters and any(field.startswith("width=") for field in self.vary):
            raise ConfigError("width is chosen by --match-parameters: it cannot be varied too")


def runs_of(study: StudyConfig) -> list[TrainConfig]:
    """List all runs, a whole seed first, each with its folder; load the data if need be.

    Raises:
        ConfigError: If something is impossible, or a run is there already with other settings.
        DatasetError: If a dataset is unknown or refused.
    """
    study.check()
    datasets = [name for task in study.tasks for name in datasets_of(task)]
    methods = [
        (dataset, name, config)
        for dataset in dict.fromkeys(datasets)
        for name, config in methods_of(study, tuple(dataset.split("+")))
    ]
    for _, _, config in methods:  # before a dataset is made, which may take long
        config.check()
    loaded = {config.dataset: config.on_bad_episode for _, _, config in methods}
    sizes = {dataset: load_sizes(dataset, policy) for dataset, policy in loaded.items()}
    runs = []
    for seed in range(study.first_seed, study.first_seed + study.seeds):
        for dataset, name, config in methods:
            run_dir = study.folder / dataset / f"{name}-s{seed}"
            run = dataclasses.replace(config, seed=seed, run_dir=run_dir)
            if study.match_parameters:
                run = dataclasses.replace(run, match_parameters=budget_of(study, run, sizes))
            refuse_other_settings(run)
            runs.append(run)
    return runs


def datasets_of(task: str) -> list[str]:
    """Return the dataset ids that a name of a task stands for; a union is one, joined with "+".

    Raises:
        ConfigError: If it is neither a short name nor an id.
    """
    if task == "all":
        return list(TASKS.values())
    parts = [TASKS.get(part, part) for part in task.split("+")]
    for part in parts:
        if not re.search(r"-v\d+$", part):
            near = difflib.get_close_matches(part, TASKS, n=3)
            raise ConfigError(
                f"unknown task {part!r}: tasks are {', '.join(near or TASKS)}, all, or Minari ids, "
                "which end in -v and a number"
            )
        check_id(part)
    return ["+".join(parts)]


def methods_of(study: StudyConfig, dataset: tuple[str, ...]) -> list[tuple[str, TrainConfig]]:
    """Return name and configuration of every method and its variants on a dataset.

    A variant in which the flag has no effect, or which is another method, is none.
    """
    found = []
    for method in dict.fromkeys(study.backbones):
        base = configure(study.preset, dataset, method, study.set)
        found.append((method, base))
        for setting in settings_of(study.vary):
            name = setting.partition("=")[0].replace("-", "_")
            variant = configure(study.preset, dataset, method, (*study.set, setting))
            is_known = variant in [config for _, config in found]
            if not is_known and name not in variant.ignored():
                found.append((f"{method},{quote(setting, safe='=+')}", variant))
    return found


def settings_of(vary: tuple[str, ...]) -> list[str]:
    """Split name=first,second into name=first and name=second."""
    fields = [field.partition("=") for field in vary]
    return [f"{name}={value}" for name, _, values in fields for value in values.split(",")]


@lru_cache
def configure(
    preset: str, dataset: tuple[str, ...], method: str, settings: tuple[str, ...]
) -> TrainConfig:
    """Return the preset's configuration of a method with settings such as "steps=100" made.

    Raises:
        ConfigError: If a setting is not of that form, or is the grid's to decide.
    """
    backbone, best_fraction = CLONING.get(method, (method, 1.0))
    base = PRESETS[preset](dataset, backbone=backbone)
    base = dataclasses.replace(base, best_fraction=best_fraction)
    flags = []
    for setting in settings:
        name, equals, value = setting.partition("=")
        if not equals or not value:
            raise ConfigError(f"{name!r} must be of the form name=value")
        if name.replace("-", "_") in OF_THE_GRID:
            raise ConfigError(f"{name} is not for --set or --vary: it has a flag of its own")
        try:
            flags += [f"--{name}", *shlex.split(value)]
        except ValueError as error:
            raise ConfigError(f"{setting!r} cannot be read: {error}") from error
    parsing = (tyro.conf.OmitArgPrefixes, tyro.conf.FlagConversionOff)
    config = tyro.cli(TrainConfig, prog="minrl train", args=flags, default=base, config=parsing)
    if method in CLONING:  # with other tokens or episodes it would be another method
        model = dataclasses.replace(config.model, tokens=base.model.tokens)
        config = dataclasses.replace(config, best_fraction=best_fraction, model=model)
    return config


def load_sizes(dataset: tuple[str, ...], on_bad_episode: str) -> tuple[int, int]:
    """Make the dataset if it is not there, and return its sizes of observations and actions."""
    info = load_dataset(dataset, on_bad_episode=on_bad_episode).info
    return info.observation_size, len(info.action_low)


@lru_cache
def completed(config: TrainConfig) -> TrainConfig:
    """Return the configuration with what the data decides filled in."""
    return complete(config, load_dataset(config.dataset, on_bad_episode=config.on_bad_episode))


def budget_of(
    study: StudyConfig, run: TrainConfig, sizes: dict[tuple[str, ...], tuple[int, int]]
) -> int:
    """Return the number of parameters of the preset's mingru on the run's task."""
    mingru = configure(study.preset, run.dataset, "mingru", study.set)
    return count_parameters(mingru.model, *sizes[run.dataset])


def refuse_other_settings(run: TrainConfig) -> None:
    """Refuse a run whose folder holds one with other settings: they would be mixed in one study.

    Raises:
        ConfigError: Names the folder and the setting.
    """
    folder = RunFolder(run.run_dir)
    if not (folder.path / "config.json").exists():
        return
    try:
        begun = folder.read_config()
    except ConfigError:  # damaged: that run fails and says how, and the others are trained
        return
    wanted = completed(dataclasses.replace(run, seed=0, run_dir=None))
    there, wanted = (
        json.loads(json.dumps(flatten(config), default=str))
        for config in (begun, dataclasses.replace(wanted, seed=run.seed))
    )
    for name, value in wanted.items():
        if there[name] != value and name not in FREE:
            raise ConfigError(
                f"{folder.path} is a run with {name.replace('_', '-')} {there[name]!r}, not "
                f"{value!r}: choose another folder for this study"
            )
