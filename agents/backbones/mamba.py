"""Mamba's selective state space model as a mixer."""

import math

import torch
from torch import Tensor, nn
from torch.nn import functional

from minrl.agents.backbones.convolution import DepthwiseConvolution
from minrl.agents.backbones.mixers import ALL, State
from minrl.agents.backbones.selective_scan import selective_scan

# How long a step of a channel, delta, is at the start: log-uniform between these.
SHORTEST_STEP, LONGEST_STEP = 1e-3, 1e-1


class MambaMixer(nn.Module):
    """The selective SSM of Mamba (Gu & Dao, arXiv 2312.00752, algorithm 2 and section 3.4).

    Names, shapes and initial values of the parameters are those of ``mamba_ssm.Mamba``, whose
    ``state_dict`` can be loaded. With B by Euler's rule, as there. Our trainer's weight decay knows
    no exceptions; Mamba's own training leaves out ``A_log`` and ``D``.

    Args:
        width: D, features in and out.
        expansion: Inner channels per feature, E / D.
        state_size: Numbers that each inner channel keeps, N.
        kernel_size: Steps that the causal convolution sees, the current one included.
        rank: Of the map from inner channels to the lengths of their steps; D / 16 if not given.
    """

    def __init__(
        self,
        width: int,
        *,
        expansion: int = 2,
        state_size: int = 16,
        kernel_size: int = 4,
        rank: int | None = None,
    ):
        super().__init__()
        inner = expansion * width
        self.state_size, self.rank = state_size, rank or math.ceil(width / 16)
        self.in_proj = nn.Linear(width, 2 * inner, bias=False)
        self.conv1d = DepthwiseConvolution(inner, kernel_size)
        self.x_proj = nn.Linear(inner, self.rank + 2 * state_size, bias=False)
        self.dt_proj = nn.Linear(self.rank, inner)
        self.A_log = nn.Parameter(torch.empty(inner, state_size))
        self.D = nn.Parameter(torch.empty(inner))
        self.out_proj = nn.Linear(inner, width, bias=False)
        self._initialise()

    @torch.no_grad()
    def _initialise(self) -> None:
        """Set what ``nn.Linear`` and ``nn.Conv1d`` do not."""
        bound = self.rank**-0.5
        nn.init.uniform_(self.dt_proj.weight, -bound, bound)
        span = math.log(SHORTEST_STEP), math.log(LONGEST_STEP)
        steps = torch.empty_like(self.dt_proj.bias).uniform_(*span).exp()
        self.dt_proj.bias.copy_(steps + torch.log(-torch.expm1(-steps)))  # softplus undone
        self.A_log.copy_(torch.arange(1, self.state_size + 1).log().expand_as(self.A_log))
        nn.init.ones_(self.D)

    def initial_state(self, batch_size: int) -> State:
        """Return no past inputs and an empty memory: zeros, ((B, K - 1, E), (B, N, E))."""
        empty = self.A_log.new_zeros(batch_size, self.state_size, len(self.A_log))
        return (*self.conv1d.initial_state(batch_size), empty)

    def forward(
        self,
        x: Tensor,
        state: State | None = None,
        *,
        resets: Tensor | None = None,
        mask: Tensor | None = None,
        outputs: slice = ALL,
    ) -> tuple[Tensor, State]:
        """Mix (B, T, D) along time."""
        past, memory = (None, None) if state is None else (state[:1], state[1])
        x, gate = self.in_proj(x).chunk(2, dim=-1)  # B T E
        x, past = self.conv1d(x, past, resets=resets, mask=mask)
        x = functional.silu(x)
        sizes = [self.rank, self.state_size, self.state_size]
        delta, enter, read = self.x_proj(x).split(sizes, dim=-1)  # B T R, B T N, B T N
        delta = functional.softplus(self.dt_proj(delta))
        rates = self.A_log.exp().t()  # N E
        y, memory = selective_scan(x, delta, rates, enter, read, memory, resets=resets, mask=mask)
        y = torch.addcmul(y, self.D, x)[:, outputs] * functional.silu(gate[:, outputs])
        return self.out_proj(y.to(gate.dtype)), (*past, memory)
