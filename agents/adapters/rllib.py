"""A recurrent module for RLlib (its new API stack) whose memory is a minGRU or minLSTM.

    from minrl.agents.adapters.rllib import MinimalRecurrentModule
    config = PPOConfig().environment("CartPole-v1").rl_module(
        rl_module_spec=RLModuleSpec(
            module_class=MinimalRecurrentModule,
            model_config={
                "core": "mingru",
                "core_options": {"memory": 200},
                "hidden_size": 128,
                "max_seq_len": 64,
            },
        )
    )

RLlib cuts episodes into rows of at most ``max_seq_len`` steps, each with the state it starts from,
so no episode starts inside a row and no resets are needed. It fills rows up with zeros at their
ends, so no mask is needed either: a step sees only the steps before it, and what comes out at the
filled steps, state included, RLlib drops. Its ``LOSS_MASK`` would be the wrong mask besides: it
also leaves out the last observation of an episode, whose value the return is bootstrapped from.
"""

from typing import Any

import gymnasium as gym
import numpy as np
from torch import Tensor, nn

from minrl.agents.adapters.libraries import check_call, interface_of
from minrl.agents.adapters.parts import make_core, make_head

with interface_of("ray", install='pip install "ray[rllib]"', known="2.60"):
    from ray.rllib.core.columns import Columns
    from ray.rllib.core.rl_module.apis import ValueFunctionAPI
    from ray.rllib.core.rl_module.torch import TorchRLModule

    check_call(TorchRLModule._forward, None, {})
    check_call(TorchRLModule._forward_train, None, {})
    check_call(TorchRLModule.get_initial_state, None)
    check_call(TorchRLModule.get_train_action_dist_cls, None)
    check_call(ValueFunctionAPI.compute_values, None, {}, embeddings=None)
    _ = Columns.STATE_IN, Columns.STATE_OUT, Columns.EMBEDDINGS, Columns.ACTION_DIST_INPUTS

__all__ = ["MinimalRecurrentModule"]

_CORE_OPTIONS = {"bias", "dropout", "candidate", "memory", "normalize", "forget_bias"}


class MinimalRecurrentModule(TorchRLModule, ValueFunctionAPI):
    """Observation, linear layer, core, and a head each for the policy and the value.

    Takes what every RLModule takes. Of its ``model_config`` it reads

    * ``core``: "mingru" (the default) or "minlstm";
    * ``hidden_size``: width of the core and of the layers around it, H, by default 128;
    * ``num_layers``: of the core, L, by default 1;
    * ``core_options``: more of its arguments, such as ``{"memory": 200}``, but for
      ``learn_initial_state`` (RLlib keeps the states, and starts from zeros) and ``return_cell``;

    and RLlib reads ``max_seq_len``, the steps T of a row, which it wants of every recurrent module.
    """

    def setup(self) -> None:
        """Build the layers; RLlib calls this.

        Raises:
            ValueError: If the observations are not a one-dimensional Box, ``core`` is unknown, has
                one of the options that it may not have, or has them outside of ``core_options``, or
                RLlib's own LSTM is asked for too.
            TypeError: If the core has no such option.
        """
        space = self.observation_space
        if not isinstance(space, gym.spaces.Box) or len(space.shape) != 1:
            raise ValueError(
                f"observations must be a one-dimensional Box, not {space}; RLlib's connector "
                "FlattenObservations makes them one"
            )
        misplaced = sorted(_CORE_OPTIONS.intersection(self.model_config))
        if misplaced:
            raise ValueError(f"model_config: {', '.join(misplaced)} belong in core_options")
        if self.model_config.get("use_lstm"):
            raise ValueError("model_config: no use_lstm, the core is the memory already")
        width = self.model_config.get("hidden_size", 128)
        outputs = self.get_train_action_dist_cls().required_input_dim(space=self.action_space)
        self.encoder = nn.Sequential(nn.Linear(space.shape[0], width), nn.ReLU())
        self.core = make_core(
            self.model_config.get("core", "mingru"),
            width,
            self.model_config.get("num_layers", 1),
            self.model_config.get("core_options", {}),
            learn_initial_state="RLlib starts from zeros",
            return_cell="RLlib is given one state",
        )
        self.policy_head = make_head(width, outputs)
        self.value_head = make_head(width, 1)

    def get_initial_state(self) -> dict[str, np.ndarray]:
        """Return the state before an episode, of one environment: {"h": (L, H)}, zeros."""
        return {"h": np.zeros((self.core.num_layers, self.core.hidden_size), np.float32)}

    def compute_values(self, batch: dict[str, Any], embeddings: Tensor | None = None) -> Tensor:
        """Return the value of every step, (B, T), of embeddings if they are there already."""
        if embeddings is None:
            embeddings, _ = self._remember(batch)
        return self.value_head(embeddings).squeeze(-1)

    def _forward(self, batch: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
        output = self._forward_train(batch, **kwargs)
        del output[Columns.EMBEDDINGS]  # or else they are kept in the episodes, step by step
        return output

    def _forward_train(self, batch: dict[str, Any], **_kwargs: Any) -> dict[str, Any]:
        embeddings, state = self._remember(batch)
        return {
            Columns.ACTION_DIST_INPUTS: self.policy_head(embeddings),
            Columns.STATE_OUT: state,
            Columns.EMBEDDINGS: embeddings,
        }

    def _remember(self, batch: dict[str, Any]) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the core's output (B, T, H) and the state after the last step (B, L, H)."""
        state = batch[Columns.STATE_IN]["h"].transpose(0, 1)  # L B H
        hidden, state = self.core(self.encoder(batch[Columns.OBS].float()), state)
        return hidden, {"h": state.transpose(0, 1)}
