"""The trajectory model: return, observation and action tokens through a recurrent backbone.

Decision Mamba's layout (arXiv 2403.19925, after Decision Transformer, arXiv 2106.01345) with a
minimal RNN, or one of its rivals, as the mixer. All inputs and outputs are in the environment's
units: the model holds the normalisation of observations, the scale of returns and the bounds of
actions.
"""

from dataclasses import asdict

import torch
from torch import Tensor, nn

from minrl.agents.backbones.blocks import ALL, Backbone, State
from minrl.agents.backbones.dropout import Dropout
from minrl.agents.backbones.scan import check_flags
from minrl.agents.model_config import (
    BEFORE_THE_CHOICE,
    DEFAULT_ATTENTION_CONTEXT,
    DEFAULT_RETURN_SCALE,
    MIXER_FIELDS,
    ModelConfig,
)
from minrl.errors import ConfigError


class TrajectoryModel(nn.Module):
    """Predict each action from the returns, observations and actions up to it.

    Tokens of step t are (a_{t-1}, R_t, s_t), the previous action first, so that one call per step
    is all it takes online; without a previous action (the start of a sequence) its token is left
    out, and the sequence reads R_0 s_0 a_0 R_1 s_1 ... as in the papers. Each embedding is a linear
    map, plus the embedding of its timestep if the model sees the time, followed by LayerNorm and
    dropout; the action comes from the state token through LayerNorm, a linear map and tanh, scaled
    to the bounds.

    The state is a tuple of (B, ...) tensors: the backbone's, then the last action, (B, A).

    Args:
        observation_size: O.
        action_size: A.
        config: Everything else.
    """

    def __init__(self, observation_size: int, action_size: int, config: ModelConfig | None = None):
        super().__init__()
        self.config = config = config or ModelConfig()
        if problems := config.problems():
            raise ConfigError("; ".join(problems))
        self.observation_size, self.action_size = observation_size, action_size
        self.return_scale = config.return_scale or DEFAULT_RETURN_SCALE
        interleaved = config.tokens == "interleaved"
        options = {name: getattr(config, name) for name in MIXER_FIELDS[config.backbone]}
        if config.backbone == "transformer":
            steps = config.attention_context or DEFAULT_ATTENTION_CONTEXT
            options["context"] = steps * config.tokens_per_step
        sees_all = config.tokens != "observation"
        self.embed_return = nn.Linear(1, config.width) if sees_all else None
        self.embed_observation = nn.Linear(observation_size, config.width)
        self.embed_action = self.embed_timestep = None
        if sees_all:
            # Without a bias a joint token shows "no action yet" and mid-range as zero.
            self.embed_action = nn.Linear(action_size, config.width, bias=interleaved)
        if sees_all and config.max_timestep:
            self.embed_timestep = nn.Embedding(config.max_timestep, config.width)
            nn.init.normal_(self.embed_timestep.weight, std=config.timestep_std)
        self.embedding_norm = nn.LayerNorm(config.width)
        self.embedding_dropout = Dropout(config.dropout)
        self.backbone = Backbone(
            config.width,
            config.num_layers,
            config.backbone,
            mlp_ratio=config.mlp_ratio,
            dropout=config.dropout,
            convolution=config.convolution,
            **options,
        )
        self.output_norm = nn.LayerNorm(config.width)
        self.head = nn.Linear(config.width, action_size)
        self.register_buffer("observation_mean", torch.zeros(observation_size))
        self.register_buffer("observation_std", torch.ones(observation_size))
        self.register_buffer("action_low", -torch.ones(action_size))
        self.register_buffer("action_high", torch.ones(action_size))

    def describe(self) -> dict:
        """Return what :meth:`from_description` needs to build the same (untrained) model."""
        return {
            "observation_size": self.observation_size,
            "action_size": self.action_size,
            "config": asdict(self.config),
        }

    @classmethod
    def from_description(cls, description: dict) -> "TrajectoryModel":
        """Build the model that :meth:`describe` described.

        Raises:
            ConfigError: If something in it is impossible.
        """
        config = ModelConfig(**{**BEFORE_THE_CHOICE, **description["config"]})
        return cls(description["observation_size"], description["action_size"], config)

    def initial_state(self, batch_size: int) -> State:
        """Return the state before an episode: the learned one, and no action (mid-range)."""
        no_action = self.action_middle.expand(batch_size, -1)
        return (*self.backbone.initial_state(batch_size), no_action)

    def forward(
        self,
        observations: Tensor,
        actions: Tensor,
        returns: Tensor,
        timesteps: Tensor,
        *,
        state: State | None = None,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        action_dropout: float = 0.0,
    ) -> tuple[Tensor, State]:
        """Predict the action of every step of a batch of sequences, in parallel.

        Args:
            observations: (B, T, O).
            actions: The actions taken, (B, T, A); a_t is seen only after step t.
            returns: What each step is told of the return, (B, T), in reward units: of the whole
                episode or from the step on, by the configuration's ``condition``.
            timesteps: Step in the episode, (B, T) integer.
            state: From the call before, to go on where it ended; a new sequence if not given.
            resets: (B, T) bool, True where a new episode starts at that step.
            mask: (B, T) bool, False where a step is not valid; its inputs may be anything. Without
                a ``state``, pad on the right: a sequence starts with its first step.
            action_dropout: Chance to hide each previous action from the model, in training.

        Returns:
            Predicted actions, (B, T, A), and the state after the last valid step.

        Raises:
            ValueError: If something has another shape, or a flag another type.
        """
        self._check_shapes(observations, actions=actions, returns=returns, timesteps=timesteps)
        check_flags(observations.shape[:2], resets=resets, mask=mask)
        if mask is not None:
            observations = observations.masked_fill(~mask.unsqueeze(-1), 0.0)
            actions = actions.masked_fill(~mask.unsqueeze(-1), 0.0)
            returns = returns.masked_fill(~mask, 0.0)
            timesteps = timesteps.masked_fill(~mask, 0)
        if state is None:
            backbone_state = None
            last_action = self.action_middle.expand(observations.shape[0], -1)
        else:
            backbone_state, last_action = state[:-1], state[-1]
        taken = _actions_before(actions, last_action.to(actions.dtype), mask)
        embedded = self._embed(
            observations, taken[:, :-1], returns, timesteps, resets, action_dropout
        )
        # Without a past, the sequence starts at the first return: no action token before it.
        interleaved = self.config.tokens == "interleaved"
        skip = 1 if state is None and interleaved else 0
        hidden, after = self.backbone(
            self.embedding_dropout(self.embedding_norm(embedded[:, skip:])),
            backbone_state,
            resets=None if resets is None else self._spread_starts(resets)[:, skip:],
            mask=None if mask is None else self._spread(mask)[:, skip:],
            outputs=slice(2 - skip, None, 3) if interleaved else ALL,  # the state tokens
        )
        normalised = torch.tanh(self.head(self.output_norm(hidden)))
        predicted = self.action_middle + self.action_reach * normalised
        return predicted, (*after, taken[:, -1])

    def _check_shapes(self, observations: Tensor, **others: Tensor) -> None:
        if observations.dim() != 3 or observations.shape[2] != self.observation_size:
            wanted, found = f"(B, T, {self.observation_size})", tuple(observations.shape)
            raise ValueError(f"observations must be {wanted}, not {found}")
        batch_and_time = tuple(observations.shape[:2])
        for name, given in others.items():
            wanted = batch_and_time + ((self.action_size,) if name == "actions" else ())
            if given.shape != wanted:
                raise ValueError(f"{name} must be {wanted}, not {tuple(given.shape)}")

    def step(
        self,
        observation: Tensor,
        target_return: Tensor,
        timestep: Tensor,
        state: State,
        reset: Tensor | None = None,
    ) -> tuple[Tensor, State]:
        """Predict one action and advance the state; ``forward`` with T = 1.

        Args:
            observation: (B, O).
            target_return: What the step is told of the return, (B,), in reward units.
            timestep: (B,) integer.
            state: From the step before, or ``initial_state(B)``. Its last tensor is the action
                taken at the step before; replace it if the caller changed the action.
            reset: (B,) bool, True where an episode starts at this step: also at the first step
                from ``initial_state``, or interleaved tokens see an action before it.

        Returns:
            The action (B, A) and the state, whose last tensor is that action.
        """
        unseen = state[-1].unsqueeze(1)  # in place of a_t, which only later steps would see
        predicted, after = self(
            observation.unsqueeze(1),
            unseen,
            target_return.unsqueeze(1),
            timestep.unsqueeze(1),
            state=state,
            resets=None if reset is None else reset.unsqueeze(1),
        )
        action = predicted.squeeze(1)
        return action, (*after[:-1], action)

    def _embed(
        self,
        observations: Tensor,
        previous: Tensor,
        returns: Tensor,
        timesteps: Tensor,
        resets: Tensor | None,
        action_dropout: float,
    ) -> Tensor:
        normalised = (observations - self.observation_mean) / self.observation_std
        observed = self.embed_observation(normalised)  # B T D
        if self.config.tokens == "observation":
            return observed
        batch, length, _ = observations.shape
        now = self._embed_timesteps(timesteps)
        seen = self.embed_action((previous - self.action_middle) / self.action_reach)
        if self.training and action_dropout:
            hidden = torch.rand(batch, length, 1, device=seen.device) < action_dropout
            seen = seen.masked_fill(hidden, 0.0)
        told = self.embed_return(returns.unsqueeze(-1) / self.return_scale)
        if self.config.tokens == "joint":
            if resets is not None:
                seen = seen.masked_fill(resets.unsqueeze(-1), 0.0)
            return seen + told + observed + now
        before = self._embed_timesteps(timesteps - 1)
        tokens = [seen + before, told + now, observed + now]
        return torch.stack(tokens, dim=2).flatten(1, 2)

    def _embed_timesteps(self, timesteps: Tensor) -> Tensor | float:
        if self.embed_timestep is None:
            return 0.0
        return self.embed_timestep(timesteps.clamp(0, self.config.max_timestep - 1))  # B T D

    def _spread(self, mask: Tensor) -> Tensor:
        """Spread the mask of steps, (B, T), over their tokens."""
        return mask.repeat_interleave(self.config.tokens_per_step, dim=1)

    def _spread_starts(self, resets: Tensor) -> Tensor:
        """Spread resets of steps, (B, T), over their tokens: an episode starts at its return's."""
        if self.config.tokens != "interleaved":
            return resets
        no = torch.zeros_like(resets)
        return torch.stack([no, resets, no], dim=2).flatten(1, 2)

    @property
    def action_middle(self) -> Tensor:
        """The middle of the action bounds, (A,)."""
        return (self.action_low + self.action_high) / 2

    @property
    def action_reach(self) -> Tensor:
        """Half the width of the action bounds, (A,); not zero even where the bounds are equal."""
        return ((self.action_high - self.action_low) / 2).clamp(min=1e-6)


def _actions_before(actions: Tensor, before: Tensor, mask: Tensor | None) -> Tensor:
    """Return the last valid action before each step and after the last one, (B, T + 1, A)."""
    every = torch.cat([before.unsqueeze(1), actions], dim=1)
    if mask is None:
        return every
    steps = torch.arange(1, mask.shape[1] + 1, device=mask.device)
    last = torch.where(mask, steps, 0).cummax(1).values  # B T, 0 where none is valid yet
    last = nn.functional.pad(last, (1, 0)).unsqueeze(-1)
    return every.gather(1, last.expand_as(every))
