"""How each method is drawn, the same in every figure and told apart without colours too."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Style:
    """Colour, line and marker of a method."""

    colour: str
    line: str = "-"
    marker: str = "o"
    width: float = 1.4


# After the colour-blind safe palette of Okabe and Ito, lightened or darkened where needed to be
# read on white as well as on black.
STYLES = {
    "mingru": Style("#0a84d6", marker="o", width=2.2),
    "minlstm": Style("#e0600b", marker="s", width=2.2),
    "gilr": Style("#3fa7c9", "--", "P"),
    "gilr_lstm": Style("#c08a3e", "--", "X"),
    "gru": Style("#d19a00", "-", "^"),
    "lstm": Style("#8a6fd1", "-", "v"),
    "mamba": Style("#c862a0", "--", "D"),
    "transformer": Style("#12a07a", "--", "h"),
    "mlp": Style("#6f7f94", ":", "<"),
    "BC": Style("#8a8a8a", ":", "<"),
    "10 % BC": Style("#a3745c", ":", ">"),
}
OTHERS = (
    Style("#b04a5a", "-.", "*"),
    Style("#5a7d2a", "-.", "p"),
    Style("#7a5ab0", "-.", "d"),
    Style("#2a8a8a", "-.", "8"),
)


def styles_of(methods: Sequence[dict[str, Any]]) -> dict[str, Style]:
    """Return the style of each method without changes of settings, by name."""
    styles, unknown = {}, 0
    for method in methods:
        if method["name"] in STYLES:
            styles[method["name"]] = STYLES[method["name"]]
        elif not method["changes"]:
            styles[method["name"]] = OTHERS[unknown % len(OTHERS)]
            unknown += 1
    return styles
