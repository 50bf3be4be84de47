"""The shape of a trajectory model: its settings, their ranges, and which mixer takes which."""

import math
from dataclasses import dataclass

from minrl.agents.backbones.blocks import MIXERS
from minrl.agents.backbones.scan_torch import CANDIDATES
from minrl.agents.field_types import wrong_types

DEFAULT_ATTENTION_CONTEXT = 20
DEFAULT_RETURN_SCALE = 1000.0  # the Decision Transformer's, gym/experiment.py

TOKENS = ("interleaved", "joint", "observation")
CONDITIONS = ("return-to-go", "return")
# What configurations had that were written before there was a choice.
BEFORE_THE_CHOICE = {"condition": "return-to-go"}

# The fields of a ModelConfig that a mixer takes, besides its width.
MIXER_FIELDS = {
    "mingru": ("expansion", "learn_initial_state", "candidate"),
    "minlstm": ("expansion", "learn_initial_state", "candidate", "normalize", "forget_bias"),
    "gilr": ("expansion", "learn_initial_state"),
    "gilr_lstm": ("expansion", "learn_initial_state"),
    "gru": ("expansion", "learn_initial_state"),
    "lstm": ("expansion", "learn_initial_state"),
    "mamba": ("expansion",),
    "transformer": ("num_heads",),
    "mlp": (),
}


def ignored_fields(backbone: str) -> set[str]:
    """Return the fields of a ModelConfig that are for other mixers than this one, known or not."""
    of_mixers = {name for fields in MIXER_FIELDS.values() for name in fields}
    ignored = of_mixers.difference(MIXER_FIELDS.get(backbone, ()))
    return ignored if backbone == "transformer" else ignored | {"attention_context"}


@dataclass(frozen=True)
class ModelConfig:
    """The shape of a :class:`minrl.TrajectoryModel`."""

    backbone: str = "mingru"
    """Sequence mixer: mingru, minlstm, gilr, gilr_lstm, gru, lstm, mamba, transformer, or mlp,
    which without a convolution looks at the present alone."""
    tokens: str = "joint"
    """joint: one token a step, about 2.5 times faster to train; interleaved: return, observation
    and action are tokens of their own, as in the paper; observation: nothing but that is seen."""
    condition: str = "return"
    """What a step is told of the return. return: the rewards of the whole episode at every step, so
    that acting needs none; return-to-go: those from this step on, as in the papers."""
    width: int = 64
    """Features of a token."""
    num_layers: int = 3
    """Residual blocks."""
    expansion: int = 1
    """Hidden channels of the mixer per feature."""
    mlp_ratio: int = 4
    """Hidden features of the MLP per feature; 0 leaves the MLP out."""
    dropout: float = 0.0
    """On embedded tokens, after mixers and after MLPs."""
    convolution: int = 0
    """Kernel size of a causal convolution before each mixer; 0 leaves it out."""
    candidate: str = "g"
    """mingru and minlstm: what the candidate passes through, g (the paper's), identity or tanh."""
    learn_initial_state: bool = True
    """Recurrent mixers: whether the state before an episode is learned, rather than zero."""
    normalize: bool = True
    """minlstm only: divide the gates by their sum (the paper's equations; its released code
    does not)."""
    forget_bias: float = 3.0
    """minlstm only: added to the forget gate's bias at the start."""
    num_heads: int = 1
    """transformer only: heads of the attention."""
    attention_context: int | None = None
    """transformer only: steps that it looks back on; by default those of a training window."""
    max_timestep: int = 0
    """Timesteps with an embedding of their own; later ones share the last. With 0 there is none,
    and the model does not see the time; in the papers it does. A transformer has no other sense of
    position: give it as many as an episode has steps, as its presets do."""
    timestep_std: float = 0.02
    """Standard deviation of their embeddings at the start."""
    return_scale: float | None = None
    """Returns are divided by this; by default 1000, as in the papers, or in training on other
    tasks than theirs the largest return in the data."""

    @property
    def tokens_per_step(self) -> int:
        """Tokens that a step of an episode becomes."""
        return 3 if self.tokens == "interleaved" else 1

    def problems(self) -> list[str]:
        """Return what is impossible in this configuration, naming field and range."""
        if found := wrong_types(self):
            return found
        found = [
            f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
            for name, allowed in (
                ("backbone", MIXERS),
                ("tokens", TOKENS),
                ("condition", CONDITIONS),
                ("candidate", CANDIDATES),
            )
            if getattr(self, name) not in allowed
        ]
        for name, least in (
            ("width", 1),
            ("num_layers", 1),
            ("expansion", 1),
            ("mlp_ratio", 0),
            ("convolution", 0),
            ("num_heads", 1),
            ("max_timestep", 0),
        ):
            if getattr(self, name) < least:
                found.append(f"{name} must be at least {least}, not {getattr(self, name)}")
        context, scale = self.attention_context, self.return_scale
        undivided = self.backbone == "transformer" and self.width % max(self.num_heads, 1)
        wrong = (
            ("attention_context", context is not None and context < 1, "be at least 1"),
            ("num_heads", undivided, f"divide the width, {self.width}"),
            (
                "mlp_ratio",
                self.backbone == "mlp" and not self.mlp_ratio,
                "be at least 1 with the backbone mlp",
            ),
            ("dropout", not 0 <= self.dropout < 1, "be in [0, 1)"),
            (
                "return_scale",
                scale is not None and not 0 < scale < math.inf,
                "be positive and finite",
            ),
            ("timestep_std", not 0 <= self.timestep_std < math.inf, "be 0 or more and finite"),
            ("forget_bias", not math.isfinite(self.forget_bias), "be finite"),
        )
        found += [
            f"{name} must {rule}, not {getattr(self, name)}"
            for name, is_wrong, rule in wrong
            if is_wrong
        ]
        return found
