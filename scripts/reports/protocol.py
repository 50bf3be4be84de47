"""What the runs of a report had in common and where they differ, by their own configurations."""

from typing import Any

from minrl.scripts.reports.collect import Run
from minrl.scripts.reports.comparison import way_to_act
from minrl.scripts.reports.methods import NOT_THE_METHOD, Method
from minrl.scripts.train_config import (
    FINAL_SEED,
    PRESETS,
    SELECTION_SEED,
    flatten,
    ignored_settings,
)

# Settings that a reader must know of, with their names; of others only where methods differ.
PROTOCOL = {
    "preset": "preset",
    "steps": "training steps",
    "batch_size": "batch size",
    "context": "context length",
    "attention_context": "attention context",
    "burn_in": "burn-in steps before the context",
    "learning_rate": "learning rate",
    "schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "return_noise": "noise on the returns",
    "width": "width",
    "num_layers": "blocks",
    "tokens": "tokens",
    "condition": "return that a step is told",
    "max_timestep": "timesteps that it is told",
    "dropout": "dropout",
    "match_parameters": "parameters matched to",
    "best_fraction": "share of the data (best episodes)",
    "held_out": "share of episodes held out",
    "refresh_every": "acting",
    "eval_every": "steps between evaluations",
    "eval_episodes": "episodes of each, per target",
    "precision": "precision",
    "device": "device",
}

# Said task by task, or nothing that a reader can use.
OF_THE_TASK = ("targets", "return_scale")
SAYS_NOTHING = {"None", "auto"}


# What the preset quick has was chosen on these: by the returns of final episodes, or by speed.
CHOSEN_ON = {
    "minGRU on Hopper medium-expert": ("learning_rate", "weight_decay", "batch_size", "dropout"),
    "minGRU on Walker2d medium-expert, seeds 0 to 2": ("return_noise",),
    "minGRU on medium-replay and -expert data, seeds 0 to 3": ("condition",),
    "the same, the Transformer's on all data, seed 0": ("max_timestep",),
    "minGRU's training speed": ("tokens", "context"),
}


def describe_protocol(
    runs: list[Run], methods: list[Method], labels: dict[tuple[str, str | None], str]
) -> dict[str, Any]:
    """Return what the runs' own configurations say they had in common, and where they differ.

    Args:
        runs: All.
        methods: All.
        labels: What tasks are called, by id and environment.
    """
    ours = [run for run in runs if run.library is None]
    return {
        "settings": _compare_settings(ours, methods, labels),
        "chosen_on": _chosen_on(ours, methods),
        "seeds": sorted({run.seed for run in runs}),
        "selection_seed": SELECTION_SEED,
        "final_seed": FINAL_SEED,
        "episodes": sorted({e["episodes"] for run in runs for e in run.evaluations}),
        "unexpected_seeds": _unexpected_seeds(ours),
        "versions": _versions(ours),
        "machines": sorted({run.machine for run in ours if run.machine}),
        "peers": {
            run.method: {"library": run.library, "steps": run.steps, "note": run.note}
            for run in runs
            if run.library is not None
        },
    }


def _compare_settings(
    runs: list[Run], methods: list[Method], labels: dict[tuple[str, str | None], str]
) -> dict[str, dict[str, list[str]]]:
    """Return by setting and value who has it: methods, or tasks where it goes by these.

    What only an ablation changes is said where its worth is, not here.
    """
    families = {method.name: method.family for method in methods if not method.changes}
    others = dict.fromkeys(name for run in runs for name in run.settings)
    others = [name for name in others if name not in (*PROTOCOL, *NOT_THE_METHOD, *OF_THE_TASK)]
    settings = {}
    for name in (*PROTOCOL, *others):
        found = [
            (
                _shown(name, run.settings[name], families[run.method]),
                run.method,
                labels["+".join(run.datasets), run.environment],
            )
            for run in runs
            if run.method in families and _counts(name, run.settings)
        ]
        values = dict.fromkeys(value for value, *_ in found)
        if values.keys() - SAYS_NOTHING and (name in PROTOCOL or len(values) > 1):
            settings[PROTOCOL.get(name, name.replace("_", " "))] = _who_has(found)
    return settings


def _counts(name: str, settings: dict[str, Any]) -> bool:
    """Return whether a run looks at a setting; how it acts is said of all."""
    return name in settings and (name == "refresh_every" or name not in ignored_settings(settings))


def _who_has(found: list[tuple[str, str, str]]) -> dict[str, list[str]]:
    """Return by value who has it, from values, methods and tasks: in as few words as tell all."""
    methods, tasks, values = {}, {}, {}
    for value, method, task in found:
        methods.setdefault(method, set()).add(value)
        tasks.setdefault(task, set()).add(value)
    goes_by_tasks = len(methods) > 1 and all(len(of_task) == 1 for of_task in tasks.values())
    for value, method, task in found:
        who = method
        if len(methods[method]) > 1:
            who = task if goes_by_tasks else f"{method} on {task}"
        values.setdefault(value, set()).add(who)
    return {value: sorted(names) for value, names in values.items()}


def _shown(name: str, value: Any, family: str) -> str:
    if name == "refresh_every":
        return way_to_act(value, family)
    if name == "max_timestep" and not value:
        return "none"
    if isinstance(value, int):
        return f"{value:,}" if value >= 1000 else f"{value}"
    return f"{value:,g}" if isinstance(value, float) and value >= 1000 else f"{value}"


def _chosen_on(runs: list[Run], methods: list[Method]) -> dict[str, list[str]]:
    """Return on what the preset's settings that all runs have, but for ablations, were chosen."""
    names = {method.name for method in methods if not method.changes}
    settings = [run.settings for run in runs if run.method in names]
    settings = [own for own in settings if own["tokens"] != "observation"]  # behaviour cloning
    usual = [flatten(PRESETS["quick"](backbone=own["backbone"])) for own in settings]
    found = {}
    for where, chosen in CHOSEN_ON.items():
        kept = [
            name
            for name in chosen
            if all(own[name] == preset[name] for own, preset in zip(settings, usual, strict=True))
        ]
        if kept and settings:
            found[where] = [PROTOCOL[name] for name in kept]
    return found


def _unexpected_seeds(runs: list[Run]) -> list[str]:
    """Name the runs whose final episodes are not those that the protocol says."""
    return [
        run.folder
        for run in runs
        if any(e["seed"] != FINAL_SEED + run.seed for e in run.evaluations)
    ]


def _versions(runs: list[Run]) -> dict[str, list[str]]:
    found: dict[str, set[str]] = {}
    for run in runs:
        for name, version in run.versions.items():
            found.setdefault(name, set()).add(version)
    return {name: sorted(versions) for name, versions in found.items()}
