"""What the methods of a report are called: by their backbone, and by what is unusual about them."""

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from minrl.scripts.reports.collect import Run
from minrl.scripts.train_config import PRESETS, TrainConfig, flatten

BEHAVIOUR_CLONING, BEST_CLONING = "BC", "10 % BC"
MEMORYLESS = ("mlp", BEHAVIOUR_CLONING, BEST_CLONING)
OURS = ("mingru", "minlstm")
ORDER = (
    *OURS,
    *("gilr", "gilr_lstm", "gru", "lstm", "mamba", "transformer"),
    *MEMORYLESS,
)

# Settings that do not make another method: what it learns from and where, what merely follows from
# that, and what is only looked at.
NOT_THE_METHOD = (
    *("dataset", "on_bad_episode", "environment", "seed", "targets", "return_scale"),
    *("preset", "device", "run_dir", "log_every", "final_episodes", "backbone"),
)


@dataclass(frozen=True)
class Method:
    """One method of a report.

    Attributes:
        name: Unique in the report.
        family: The backbone, or what the method without its changes is called.
        changes: Settings that differ from the family's usual ones: name, value, usual value.
        library: Whose code it is; None for ours.
    """

    name: str
    family: str
    changes: tuple[tuple[str, Any, Any], ...] = ()
    library: str | None = None


def name_methods(runs: Sequence[Run]) -> list[Method]:
    """Set the method of each run and return all methods, in the order of the report."""
    methods: dict[str, Method] = {}
    families: dict[str, list[Run]] = {}
    for run in runs:
        if run.library is not None:
            methods[run.method] = Method(run.method, run.method, library=run.library)
        else:
            families.setdefault(family_of(run.settings), []).append(run)
    for family, members in families.items():
        for run, changes in _changes(members):
            parts = [f"{name}={_short(value)}" for name, value, _ in changes]
            run.method = ", ".join([family, *parts])
            methods.setdefault(run.method, Method(run.method, family, tuple(changes)))
    return sorted(methods.values(), key=_place)


def family_of(settings: dict[str, Any]) -> str:
    """Return what a configuration is called without regard to details."""
    backbone = settings["backbone"]
    if backbone != "mlp" or settings["tokens"] != "observation":
        return backbone
    return BEST_CLONING if settings["best_fraction"] == 0.1 else BEHAVIOUR_CLONING


def settings_of(run: Run) -> dict[str, Any]:
    """Return the settings that make a run's method."""
    settings = {k: v for k, v in run.settings.items() if k not in NOT_THE_METHOD}
    if settings["match_parameters"] is not None:
        settings.pop("width")  # it was chosen to match
    if settings["attention_context"] == settings["burn_in"] + settings["context"]:
        settings.pop("attention_context")  # it was filled in
    return settings


def _changes(runs: list[Run]) -> list[tuple[Run, list[tuple[str, Any, Any]]]]:
    """Return for each run of a family the settings that are unusual on its task.

    Usual is what most runs on the same task have, since some settings belong to the task; if as
    many have another value, what most runs of the family have; then what the preset says.
    """
    settings = [settings_of(run) for run in runs]
    presets = [_preset_of(run.settings) for run in runs]
    found = [(run, []) for run in runs]
    for name in dict.fromkeys(name for values in settings for name in values):
        having = [index for index, values in enumerate(settings) if name in values]
        anywhere = Counter(settings[index][name] for index in having)
        for task in dict.fromkeys(runs[index].datasets for index in having):
            here = [index for index in having if runs[index].datasets == task]
            on_task = Counter(settings[index][name] for index in here)
            preset = presets[here[0]][name]

            def rank(value, on_task=on_task, anywhere=anywhere, preset=preset):
                return on_task[value], anywhere[value], value == preset

            usual = max(on_task, key=rank)
            for index in here:
                if settings[index][name] != usual:
                    found[index][1].append((name, settings[index][name], usual))
    return found


def _preset_of(settings: dict[str, Any]) -> dict[str, Any]:
    preset = PRESETS.get(settings["preset"], PRESETS["quick"])
    config: TrainConfig = preset(settings["dataset"], settings["backbone"])
    return flatten(config)


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _place(method: Method) -> tuple:
    known = ORDER.index(method.family) if method.family in ORDER else math.inf
    return method.library is not None, known, bool(method.changes), method.name
