"""minGRU and minLSTM in PufferLib: what stands where its LSTM wrapper or its MinGRU stands.

PufferLib 3: ``MinGRUWrapper`` and ``MinLSTMWrapper`` are built and called as its ``LSTMWrapper``
is, around a policy with ``encode_observations`` and ``decode_actions``:

    policy = MinGRUWrapper(environment, Policy(environment), input_size=128, hidden_size=128)

PufferLib 4: ``MinGRUNetwork`` and ``MinLSTMNetwork`` are built and called as its ``MinGRU`` is,
between the encoder and the decoder of its ``Policy``.

Both protocols are plain PyTorch, so nothing of PufferLib is imported here. As PufferLib has it, a
state starts at zero with each segment of the rollout and is carried over the ends of episodes
inside the segment, while acting and training alike: its trainers do not pass on where these lie.
That holds where a rollout is one segment of each agent (``batch_size="auto"``); with larger batches
PufferLib 3 acts on from a state that it does not train from.
"""

import torch
from torch import Tensor, nn

from minrl.agents.adapters.parts import refuse_options
from minrl.agents.backbones.cells import MinGRU, MinLSTM


class _RecurrentWrapper(nn.Module):
    """A policy of PufferLib 3 with a cell between its two halves.

    The state in PufferLib's dict is "lstm_h", all layers side by side; "lstm_c", which a minimal
    RNN has no use for, is the same tensor.

    Args:
        env: Has ``single_observation_space``.
        policy: Has ``encode_observations(observations, state=)``, to (N, input_size), and
            ``decode_actions(hidden)``, from (N, hidden_size) to logits and values (N, 1).
        input_size: Features that the policy encodes to.
        hidden_size: Features that it decodes.
        num_layers: Of the cell.
        **options: Of the cell, but for ``learn_initial_state`` (its trainer's states are zeros) and
            ``return_cell``.
    """

    cell: type[MinGRU]

    def __init__(
        self,
        env,
        policy: nn.Module,
        input_size: int = 128,
        hidden_size: int = 128,
        num_layers: int = 1,
        **options,
    ):
        super().__init__()
        refuse_options(
            options,
            learn_initial_state="PufferLib starts from zeros",
            return_cell="PufferLib's second state is made here",
        )
        self.policy = policy
        self.observation_shape = env.single_observation_space.shape
        self.is_continuous = getattr(policy, "is_continuous", False)  # PufferLib asks for it
        self.core = self.cell(input_size, hidden_size, num_layers, batch_first=True, **options)
        self.hidden_size = num_layers * hidden_size  # by which its trainer makes room for states

    def forward_eval(self, observations: Tensor, state: dict) -> tuple:
        """Act one step.

        Args:
            observations: (B, *observation).
            state: "lstm_h", (B, num_layers * H), or None before the first step; the new one is
                written there, and the output to "hidden".

        Returns:
            Logits and values of the policy for B observations.
        """
        encoded = self.policy.encode_observations(observations, state=state)
        hidden, h = self.core.step(encoded, self._layers_of(state.get("lstm_h")))
        state["hidden"] = hidden
        state["lstm_h"] = state["lstm_c"] = h.transpose(0, 1).flatten(1)
        return self.policy.decode_actions(hidden)

    def forward(self, observations: Tensor, state: dict) -> tuple:
        """Run segments in parallel, to train.

        Args:
            observations: (B, T, *observation), or (B, *observation), which is T = 1.
            state: "lstm_h", (1, B, num_layers * H), or None for zeros; the last one is written
                there, detached, and the output (B, T, H) to "hidden".

        Returns:
            Logits of the policy for B * T observations, and values (B, T).

        Raises:
            ValueError: If the observations have another shape.
        """
        steps = len(observations.shape) - len(self.observation_shape) - 1
        if steps not in (0, 1) or observations.shape[steps + 1 :] != self.observation_shape:
            raise ValueError(
                f"expected (B, T, {self.observation_shape}) or (B, {self.observation_shape}), "
                f"got {tuple(observations.shape)}"
            )
        batch, length = observations.shape[0], observations.shape[1] if steps else 1
        flat = observations.reshape(batch * length, *self.observation_shape)
        encoded = self.policy.encode_observations(flat, state=state)
        before = state.get("lstm_h")
        hidden, h = self.core(
            encoded.reshape(batch, length, -1),
            self._layers_of(None if before is None else before[0]),
        )  # B T H, L B H
        logits, values = self.policy.decode_actions(hidden.flatten(0, 1))
        state["hidden"] = hidden
        state["lstm_h"] = state["lstm_c"] = h.detach().transpose(0, 1).flatten(1).unsqueeze(0)
        return logits, values.reshape(batch, length)

    def _layers_of(self, state: Tensor | None) -> Tensor | None:
        """Turn (B, num_layers * H) into (num_layers, B, H)."""
        return (
            None
            if state is None
            else state.unflatten(1, (self.core.num_layers, -1)).transpose(0, 1)
        )


class MinGRUWrapper(_RecurrentWrapper):
    """PufferLib 3's ``LSTMWrapper`` with a minGRU; see :class:`_RecurrentWrapper`."""

    cell = MinGRU


class MinLSTMWrapper(_RecurrentWrapper):
    """PufferLib 3's ``LSTMWrapper`` with a minLSTM; see :class:`_RecurrentWrapper`."""

    cell = MinLSTM


class _Network(nn.Module):
    """A network of PufferLib 4: a stack of cells from hidden features to hidden features.

    Args:
        hidden_size: H.
        num_layers: L.
        **config: PufferLib's configuration of the network. What is an option of the cell goes
            there, but for ``learn_initial_state`` and ``return_cell``, what is meant for other
            networks nowhere.

    Raises:
        ValueError: If one of these two is set.
    """

    cell: type[MinGRU]
    cell_options: tuple[str, ...] = ("bias", "dropout", "candidate", "memory")

    def __init__(self, hidden_size: int, num_layers: int = 1, **config):
        super().__init__()
        refuse_options(
            config,
            learn_initial_state="PufferLib starts from zeros",
            return_cell="PufferLib is given one state",
        )
        self.hidden_size, self.num_layers = hidden_size, num_layers
        options = {name: config[name] for name in self.cell_options if name in config}
        self.core = self.cell(hidden_size, hidden_size, num_layers, batch_first=True, **options)

    def initial_state(self, batch_size: int, device: torch.device) -> tuple[Tensor]:
        """Return zeros, ((L, B, H),)."""
        return (self.core.initial_state(batch_size, device),)

    def forward_eval(self, h: Tensor, state: tuple[Tensor]) -> tuple[Tensor, tuple[Tensor]]:
        """Act one step: (B, H) and the state to (B, H) and the new state."""
        output, after = self.core.step(h, state[0])
        return output, (after,)

    def forward_train(self, h: Tensor) -> Tensor:
        """Run segments in parallel, each from the initial state: (B, T, H) to (B, T, H)."""
        return self.core(h)[0]


class MinGRUNetwork(_Network):
    """PufferLib 4's ``MinGRU`` with this package's cell; see :class:`_Network`."""

    cell = MinGRU


class MinLSTMNetwork(_Network):
    """The same with a minLSTM; see :class:`_Network`."""

    cell = MinLSTM
    cell_options = (*_Network.cell_options, "normalize", "forget_bias")
