"""Policies for sb3-contrib's ``RecurrentPPO`` whose memory is a minGRU or minLSTM.

    from minrl.agents.adapters.sb3_contrib import MinGruPolicy
    model = RecurrentPPO(MinGruPolicy, env)

or, by name, ``RecurrentPPO("MinGruPolicy", env)``: ``RecurrentPPO`` knows the names once this
module has been imported. They take the arguments of ``MlpLstmPolicy``, ``lstm_kwargs`` going to
:class:`minrl.MinGRU` or :class:`minrl.MinLSTM`, and keep its names, so that what is written for it
(``policy.lstm_actor``, ``lstm_hidden_size`` and so on) finds what it looks for.

Where an episode starts inside a batch, the library steps through the sequences in a Python loop to
reset the LSTM's state. Here that is one parallel pass, resets included.
"""

from typing import Any

import numpy as np
from torch import Tensor

from minrl.agents.adapters.libraries import check_call, interface_of
from minrl.agents.adapters.parts import refuse_options
from minrl.agents.backbones.cells import MinGRU, MinLSTM

with interface_of("sb3-contrib", install="pip install sb3-contrib", known="2.9"):
    from sb3_contrib import RecurrentPPO
    from sb3_contrib.common.recurrent.policies import (
        RecurrentActorCriticCnnPolicy,
        RecurrentActorCriticPolicy,
        RecurrentMultiInputActorCriticPolicy,
    )

    check_call(
        RecurrentActorCriticPolicy.__init__,
        *(None, "observation_space", "action_space", "lr_schedule"),
        **{"lstm_hidden_size": 1, "n_lstm_layers": 1},
        **{"shared_lstm": False, "enable_critic_lstm": True},
    )
    check_call(
        RecurrentActorCriticPolicy._process_sequence,
        *("features", "lstm_states", "episode_starts", "lstm"),
    )
    check_call(
        RecurrentActorCriticPolicy.predict,
        *(None, "observation"),
        **{"state": None, "episode_start": None, "deterministic": False},
    )
    _ALIASES = RecurrentPPO.policy_aliases

__all__ = [
    "CnnMinGruPolicy",
    "CnnMinLstmPolicy",
    "MinGruPolicy",
    "MinLstmPolicy",
    "MultiInputMinGruPolicy",
    "MultiInputMinLstmPolicy",
]


class _MinimalPolicy(RecurrentActorCriticPolicy):
    """``MlpLstmPolicy`` with cores of ours in the places of its LSTMs.

    Args:
        *args: As in ``RecurrentActorCriticPolicy``.
        lstm_kwargs: For the core, such as ``{"memory": 100}``.
        **kwargs: As in ``RecurrentActorCriticPolicy``.

    Raises:
        ValueError: If the core is asked for pairs of states.
    """

    core: type[MinGRU] | type[MinLSTM]

    def __init__(self, *args, lstm_kwargs: dict[str, Any] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        self.lstm_kwargs = lstm_kwargs or {}
        refuse_options(self.lstm_kwargs, return_cell="the library's pairs of states are made here")
        self.lstm_actor = self._make_core()
        if self.lstm_critic is not None:
            self.lstm_critic = self._make_core()
        # The one there is holds the parameters of the LSTMs. Its rate, the schedule's first, stays.
        rate = self.optimizer.param_groups[0]["lr"]
        self.optimizer = self.optimizer_class(self.parameters(), lr=rate, **self.optimizer_kwargs)

    def _make_core(self) -> MinGRU | MinLSTM:
        layers, _, width = self.lstm_hidden_state_shape
        # Sequences come one after the other, so batch first is how they lie in memory.
        return self.core(self.features_dim, width, layers, batch_first=True, **self.lstm_kwargs)

    @staticmethod
    def _process_sequence(
        features: Tensor,
        lstm_states: tuple[Tensor, Tensor],
        episode_starts: Tensor,
        lstm: MinGRU | MinLSTM,
    ) -> tuple[Tensor, tuple[Tensor, Tensor]]:
        """Run B sequences, padded at their ends to T steps, in one pass.

        Args:
            features: (B*T, F), sequence after sequence.
            lstm_states: Twice the state before the first step, (L, B, H): the library's buffers
                keep an h and a c, and the core has one state.
            episode_starts: (B*T,), not zero where the step is the first of an episode: the state is
                reset before it.
            lstm: The core.

        Returns:
            The core's output, (B*T, H), and twice its last state, (L, B, H).
        """
        state = lstm_states[0]
        sequences = state.shape[1]
        features = features.reshape(sequences, -1, lstm.input_size)  # B T F
        resets = episode_starts.reshape(sequences, -1) != 0  # B T
        output, state = lstm(features, state, resets=resets)
        return output.flatten(0, 1), (state, state)

    def predict(
        self,
        observation: np.ndarray | dict[str, np.ndarray],
        state: tuple[np.ndarray, ...] | None = None,
        episode_start: np.ndarray | None = None,
        deterministic: bool = False,
    ) -> tuple[np.ndarray, tuple[np.ndarray, ...] | None]:
        """Return actions and the next state, as the library's policies do.

        With neither ``state`` nor ``episode_start``, an episode starts, from the core's own initial
        state, which may be a learned one; the library would start from zeros.
        """
        if state is None and episode_start is None:
            tensors, _ = self.obs_to_tensor(observation)
            rows = next(iter(tensors.values())) if isinstance(tensors, dict) else tensors
            episode_start = np.ones(len(rows), dtype=bool)
        return super().predict(observation, state, episode_start, deterministic)

    def _get_constructor_parameters(self) -> dict[str, Any]:
        # The library's list has none of these: its own policies load with default sizes alone.
        layers, _, width = self.lstm_hidden_state_shape
        return super()._get_constructor_parameters() | {
            "lstm_hidden_size": width,
            "n_lstm_layers": layers,
            "shared_lstm": self.shared_lstm,
            "enable_critic_lstm": self.enable_critic_lstm,
            "share_features_extractor": self.share_features_extractor,
            "lstm_kwargs": self.lstm_kwargs,
        }


class MinGruPolicy(_MinimalPolicy):
    """Recurrent policy and value function for vectors, with minGRU cores."""

    core = MinGRU


class MinLstmPolicy(_MinimalPolicy):
    """Recurrent policy and value function for vectors, with minLSTM cores."""

    core = MinLSTM


class CnnMinGruPolicy(MinGruPolicy, RecurrentActorCriticCnnPolicy):
    """:class:`MinGruPolicy` for images."""


class CnnMinLstmPolicy(MinLstmPolicy, RecurrentActorCriticCnnPolicy):
    """:class:`MinLstmPolicy` for images."""


class MultiInputMinGruPolicy(MinGruPolicy, RecurrentMultiInputActorCriticPolicy):
    """:class:`MinGruPolicy` for dictionaries of observations."""


class MultiInputMinLstmPolicy(MinLstmPolicy, RecurrentMultiInputActorCriticPolicy):
    """:class:`MinLstmPolicy` for dictionaries of observations."""


for _policy in (
    CnnMinGruPolicy,
    CnnMinLstmPolicy,
    MinGruPolicy,
    MinLstmPolicy,
    MultiInputMinGruPolicy,
    MultiInputMinLstmPolicy,
):
    _ALIASES[_policy.__name__] = _policy
