"""What several adapters build alike: a core by its name, and the layers after it."""

from torch import nn

from minrl.agents.backbones.cells import CELLS, MinGRU, MinLSTM


def make_core(
    name: str, width: int, num_layers: int, options: dict[str, object], **reasons: str
) -> MinGRU | MinLSTM:
    """Return a core from (B, T, width) to (B, T, width).

    Args:
        name: "mingru" or "minlstm".
        width: H.
        num_layers: L.
        options: More arguments of the core.
        **reasons: As in :func:`refuse_options`.

    Raises:
        ValueError: If the name is neither, or an option means nothing here.
        TypeError: If the core has no such option.
    """
    if name not in CELLS:
        raise ValueError(f"core must be one of {sorted(CELLS)}, not {name!r}")
    refuse_options(options, **reasons)
    return CELLS[name](width, width, num_layers, batch_first=True, **options)


def refuse_options(options: dict[str, object], **reasons: str) -> None:
    """Refuse options of a core that mean nothing where a library keeps its states.

    Args:
        options: What the user wants the core to have.
        **reasons: Why not, by the option's name.

    Raises:
        ValueError: If one of them is set, or how sequences lie, which adapters know.
    """
    if "batch_first" in options:
        raise ValueError("sequences lie as the library has them: no batch_first")
    for name, reason in reasons.items():
        if options.get(name):
            raise ValueError(f"{reason}: no {name}")


def make_head(width: int, outputs: int) -> nn.Module:
    """Return what makes outputs of a core's output.

    That is a weighted sum of its inputs: what differences of them mean, for example a velocity,
    takes one more layer.
    """
    return nn.Sequential(nn.Linear(width, width), nn.ReLU(), nn.Linear(width, outputs))
