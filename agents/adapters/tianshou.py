"""A recurrent network for Tianshou whose memory is a minGRU or minLSTM.

    from minrl.agents.adapters.tianshou import MinimalRecurrent
    network = MinimalRecurrent(layer_num=1, state_shape=(2,), action_shape=2)

stands where ``tianshou.utils.net.common.Recurrent`` stands: the network of a ``DiscreteQLearning``
policy, or the ``preprocess_net`` of an actor or critic, with a buffer of ``stack_num`` frames.

Tianshou's collectors carry the state from step to step and set it to zero where an episode ends,
so that the next observation starts anew. Training sees the last ``stack_num`` observations alone,
from a zero state; at the start of an episode the buffer repeats its first observation to fill up.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from minrl.agents.adapters.libraries import check_call, interface_of
from minrl.agents.adapters.parts import make_core, make_head

with interface_of("tianshou", install="pip install tianshou", known="2.0"):
    from tianshou.data import Batch
    from tianshou.utils.net.common import (
        ActionReprNetWithVectorOutput,
        ModuleWithVectorOutput,
        Recurrent,
    )

    check_call(ActionReprNetWithVectorOutput.forward, None, None, state=None, info=None)
    check_call(ModuleWithVectorOutput.__init__, None, 1)
    check_call(
        Recurrent.__init__, None, layer_num=1, state_shape=1, action_shape=1, hidden_layer_size=1
    )

__all__ = ["MinimalRecurrent"]


class MinimalRecurrent(ActionReprNetWithVectorOutput[Batch]):
    """Observation, linear layer, core, and a head on the last step's output.

    Takes the arguments of Tianshou's ``Recurrent``.

    Args:
        layer_num: Layers of the core, L.
        state_shape: Of one observation; its size is D.
        action_shape: Of the output; its size is A.
        hidden_layer_size: Width of the core and of the layers around it, H.
        core: "mingru" or "minlstm".
        **options: More arguments of the core, such as ``memory``, but for ``learn_initial_state``
            (Tianshou's collectors start from zeros) and ``return_cell``.

    Raises:
        ValueError: If ``core`` is neither, or has one of these two.
        TypeError: If the core has no such option.
    """

    def __init__(
        self,
        *,
        layer_num: int,
        state_shape: int | Sequence[int],
        action_shape: int | Sequence[int],
        hidden_layer_size: int = 128,
        core: str = "mingru",
        **options: Any,
    ):
        super().__init__(int(np.prod(action_shape)))
        width, self.state_size = hidden_layer_size, int(np.prod(state_shape))
        self.state_axes = len(np.atleast_1d(state_shape))
        self.encoder = nn.Sequential(nn.Linear(self.state_size, width), nn.ReLU())
        self.core = make_core(
            *(core, width, layer_num, options),
            learn_initial_state="Tianshou starts from zeros",
            return_cell="Tianshou is given one state",
        )
        self.head = make_head(width, self.output_dim)

    def forward(
        self,
        obs: np.ndarray | Tensor,
        state: Batch | dict[str, Any] | None = None,
        info: dict[str, Any] | None = None,
    ) -> tuple[Tensor, Batch]:
        """Return the output at the last step, (B, A), and the state after it.

        Args:
            obs: (B, T, *state_shape), or (B, *state_shape) for one step.
            state: What the call before returned, {"hidden": (B, L, H)}; zeros if not given.
            info: Not looked at.

        Raises:
            KeyError: If there is a state without "hidden".
        """
        weight = self.core.weight_ih_l0
        obs = torch.as_tensor(obs, device=weight.device, dtype=weight.dtype)
        steps = 1 if obs.dim() == 1 + self.state_axes else obs.shape[1]
        obs = obs.reshape(len(obs), steps, self.state_size)
        hidden = None
        if state is not None:
            if "hidden" not in state:
                raise KeyError(f"expected a state with 'hidden', got one with {list(state.keys())}")
            hidden = torch.as_tensor(state["hidden"], device=weight.device).transpose(0, 1)  # L B H
        output, hidden = self.core(self.encoder(obs), hidden)
        # Tianshou keeps the state in its buffer: it must not hold on to the graph.
        return self.head(output[:, -1]), Batch(hidden=hidden.detach().transpose(0, 1))
