"""minGRU and minLSTM in AMAGO: trajectory encoders where "rnn" and "transformer" stand.

    import minrl.agents.adapters.amago  # registers "mingru" and "minlstm"

    encoder = cli_utils.switch_traj_encoder(config, arch="mingru", memory_size=256, layers=3)
    experiment = amago.Experiment(traj_encoder_type=encoder, ...)

AMAGO wants gymnasium below 1.0 and this package one above, so no extra installs both; the adapter
needs no gymnasium, and AMAGO 3.3 has been run, in an environment of its own, with

    pip install .
    pip install gin-config einops termcolor accelerate wandb gym
    pip install --no-deps gymnasium==0.29.1 git+https://github.com/UT-Austin-RPL/amago

AMAGO trains on sequences of one episode, without an incoming state and without resets inside, and
acts step by step with a state of a few vectors per environment, however long the episode.
"""

import numpy as np
import torch
from torch import Tensor, nn

from minrl.agents.adapters.libraries import check_call, interface_of
from minrl.agents.backbones.blocks import Backbone, State

with interface_of("amago", install="see this module's docstring", known="3.3"):
    import gin
    from amago.nets.traj_encoders import TrajEncoder, register_traj_encoder

    check_call(TrajEncoder.__init__, None, tstep_dim=1, max_seq_len=1)
    check_call(TrajEncoder.init_hidden_state, None, batch_size=1, device="cpu")
    check_call(TrajEncoder.reset_hidden_state, None, hidden_state=None, dones=None)
    check_call(TrajEncoder.forward, None, None, time_idxs=None, hidden_state=None, log_dict=None)


class _BackboneTrajEncoder(TrajEncoder):
    """Projection to the memory size, :class:`Backbone`, LayerNorm.

    Args:
        tstep_dim: Features of an encoded step, given by AMAGO.
        max_seq_len: Given by AMAGO; not looked at, as there is neither a cache nor a position.
        memory_size: Features of the residual stream and of the output.
        n_layers: Residual blocks. Both are named as AMAGO's ``switch_traj_encoder`` binds them.
        **options: Of the :class:`Backbone`: expansion, mlp_ratio, dropout, convolution, and the
            cell's.
    """

    cell: str

    def __init__(
        self, tstep_dim: int, max_seq_len: int, memory_size: int = 256, n_layers: int = 3, **options
    ):
        super().__init__(tstep_dim, max_seq_len)
        self.input = nn.Linear(tstep_dim, memory_size)
        self.backbone = Backbone(memory_size, n_layers, self.cell, **options)
        self.norm = nn.LayerNorm(memory_size)

    @property
    def emb_dim(self) -> int:
        """Features of the output."""
        return self.norm.normalized_shape[0]

    @torch.no_grad()  # AMAGO calls these two outside its own no_grad, to act
    def init_hidden_state(self, batch_size: int, device: torch.device) -> State:
        """Return the learned state before an episode, a tuple of (B, ...) tensors."""
        return self.backbone.initial_state(batch_size, device)

    @torch.no_grad()
    def reset_hidden_state(self, hidden_state: State | None, dones: np.ndarray) -> State | None:
        """Set the rows whose episode has just ended, ``dones`` (B,) bool, to the initial state."""
        if hidden_state is None:
            return None
        mask = torch.as_tensor(dones, dtype=torch.bool, device=hidden_state[0].device)
        return self.backbone.reset_state(hidden_state, mask)

    def forward(
        self,
        seq: Tensor,
        time_idxs: Tensor | None = None,
        hidden_state: State | None = None,
        log_dict: dict | None = None,
    ) -> tuple[Tensor, State | None]:
        """Encode sequences.

        Args:
            seq: (B, T, tstep_dim).
            time_idxs: (B, T, 1), not looked at.
            hidden_state: While acting, from the call before; None starts anew, to train.
            log_dict: Not written to.

        Returns:
            (B, T, memory_size), and the new state, None if none was given.
        """
        output, after = self.backbone(self.input(seq), hidden_state)
        return self.norm(output), None if hidden_state is None else after


@gin.configurable
@register_traj_encoder("mingru")
class MinGRUTrajEncoder(_BackboneTrajEncoder):
    """AMAGO's "mingru": see :class:`_BackboneTrajEncoder` for the arguments."""

    cell = "mingru"


@gin.configurable
@register_traj_encoder("minlstm")
class MinLSTMTrajEncoder(_BackboneTrajEncoder):
    """AMAGO's "minlstm": see :class:`_BackboneTrajEncoder` for the arguments."""

    cell = "minlstm"
