"""What the runs of a report had in common and where they differ, by their own configurations."""

from typing import Any

from minrl.scripts.reports.collect import Run
from minrl.scripts.reports.comparison import way_to_act
from minrl.scripts.reports.methods import NOT_THE_METHOD, Method
from minrl.scripts.train_config import FINAL_SEED, SELECTION_SEED

# Settings that a reader must know of, with their names; of others only where methods differ.
PROTOCOL = {
    "preset": "preset",
    "steps": "training steps",
    "batch_size": "batch size",
    "context": "context length",
    "burn_in": "burn-in steps before the context",
    "learning_rate": "learning rate",
    "schedule": "schedule",
    "warmup_steps": "warm-up steps",
    "weight_decay": "weight decay",
    "return_noise": "noise on the returns",
    "width": "width",
    "num_layers": "blocks",
    "tokens": "tokens",
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


def describe_protocol(runs: list[Run], methods: list[Method]) -> dict[str, Any]:
    """Return what the runs' own configurations say they had in common, and where they differ."""
    ours = [run for run in runs if run.library is None]
    return {
        "settings": _compare_settings(ours, methods),
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


def _compare_settings(runs: list[Run], methods: list[Method]) -> dict[str, dict[str, list[str]]]:
    """Return by setting and value the methods that have it.

    What only an ablation changes is said where its worth is, not here.
    """
    families = {method.name: method.family for method in methods if not method.changes}
    others = dict.fromkeys(name for run in runs for name in run.settings)
    others = [name for name in others if name not in (*PROTOCOL, *NOT_THE_METHOD, *OF_THE_TASK)]
    settings = {}
    for name in (*PROTOCOL, *others):
        values: dict[str, set[str]] = {}
        for run in runs:
            if name in run.settings and run.method in families:
                value = _shown(name, run.settings[name], families[run.method])
                values.setdefault(value, set()).add(run.method)
        if values.keys() - SAYS_NOTHING and (name in PROTOCOL or len(values) > 1):
            title = PROTOCOL.get(name, name.replace("_", " "))
            settings[title] = {value: sorted(names) for value, names in values.items()}
    return settings


def _shown(name: str, value: Any, family: str) -> str:
    if name == "refresh_every":
        return way_to_act(value, family)
    return f"{value:,g}" if isinstance(value, (int, float)) and value >= 1000 else f"{value}"


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
