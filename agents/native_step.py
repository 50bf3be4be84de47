"""The step of a policy in one call of compiled code, for models on the CPU."""

import ctypes
import threading
from collections.abc import Callable
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor, nn

from minrl.agents.backbones.native import load_kernels, run_parallel
from minrl.agents.backbones.scan_torch import PARTS
from minrl.agents.step_policy import LARGEST, StepPolicy
from minrl.agents.trajectory import TrajectoryModel

KERNELS = "minrl.agents.native_step_kernels"

# As in the kernels: columns in a panel of a matrix, and in what matrices are padded to.
LANES, GROUP = 16, 64

VERSION = attrgetter("_version")

# Rows below which another thread is not worth waking.
LEAST_ROWS = 64


class NativeStep:
    """A :class:`StepPolicy` in compiled code: equal to rounding, and as pure a function.

    It has a copy of the weights, renewed when they changed. Changes that PyTorch counts (by
    optimisers, ``load_state_dict``, any operation in place) are noticed at every step; others
    (writing to ``parameter.data``, other parameters) when all environments start an episode.

    Args:
        policy: One that :func:`native_step` has found to fit.
        kernel: The compiled function.
    """

    def __init__(self, policy: StepPolicy, kernel: Callable):
        self.policy, self.kernel = policy, kernel
        self._lock = threading.Lock()  # one call at a time: they share buffers
        self._batch = 0
        self._pack()

    def __reduce__(self):
        """Copy and pickle as what it was made from: machine code has no other form."""
        return native_step, (self.policy,)

    def __call__(
        self,
        observations: np.ndarray,
        returns_to_go: np.ndarray,
        timesteps: np.ndarray,
        starts: np.ndarray,
        state: Tensor,
    ) -> tuple[np.ndarray, Tensor]:
        """Return the actions and the next state; see :meth:`StepPolicy.forward`."""
        batch = len(observations)
        with self._lock:
            if batch != self._batch:
                self._allocate(batch)
            fresh = np.count_nonzero(starts) == batch
            if self._counted() != self._count or (fresh and self._changed()):
                self._pack()
            self._observations[...] = observations
            self._returns[...] = returns_to_go
            self._timesteps[...] = timesteps
            self._starts[...] = starts
            after = torch.empty_like(state)
            arguments = (state.data_ptr(), after.data_ptr(), *self._arguments)
            if batch < 2 * LEAST_ROWS:
                self.kernel(*arguments, *self._all_rows)
            else:
                run_parallel(self.kernel, arguments, batch, least=LEAST_ROWS)
            return self._actions.copy(), after

    def _allocate(self, batch: int) -> None:
        """Make the buffers for a batch, and the arguments that point to them."""
        policy, config = self.policy, self.policy.model.config
        observed, acted = policy.model.observation_size, policy.model.action_size
        hidden, features = config.width * config.expansion, config.width * config.mlp_ratio
        gates = PARTS[policy.model.backbone.blocks[0].mixer.cell.gates] * hidden
        widest = max(_padded(gates), _padded(features), acted + 1 + observed)
        self._observations = np.empty((batch, observed), np.float32)
        self._returns, self._timesteps = np.empty((2, batch), np.float32)
        self._starts, never = np.empty(batch, bool), np.zeros(batch, bool)
        self._actions = np.empty((batch, acted), np.float32)
        row_floats = 2 * _padded(config.width) + widest
        scratch = np.empty((batch, row_floats), np.float32)
        self._buffers = (
            self._weights,
            self._observations,
            self._returns,
            self._timesteps,
            self._starts,
            never,
            self._actions,
            scratch,
        )
        sizes = (
            observed,
            acted,
            config.width,
            hidden,
            features,
            config.num_layers,
            config.convolution,
            3 if config.tokens == "interleaved" else 1,
            config.max_timestep - 1,
            self._body,
            row_floats,
        )
        # Made once as what C takes: from Python's numbers it would be 4 us a step.
        self._arguments = (
            *(ctypes.c_void_p(buffer.ctypes.data) for buffer in self._buffers),
            *map(ctypes.c_int64, sizes),
        )
        self._all_rows = (ctypes.c_int64(0), ctypes.c_int64(batch))
        self._batch = batch

    def _counted(self) -> int:
        """Return how often PyTorch has seen a weight change."""
        return sum(map(VERSION, self._tracked))

    def _changed(self) -> bool:
        """Return whether any weight is not what was copied."""
        weights = _weights(self.policy.model)
        return not all(map(torch.equal, weights, self._copied))

    def _pack(self) -> None:
        """Copy all weights to one buffer, in the order in which the step reads them."""
        model = self.policy.model
        self._tracked = _weights(model)
        self._count = self._counted()
        self._copied = [weight.detach().clone() for weight in self._tracked]
        pieces = _constants(model)
        embeddings = [model.embed_action, model.embed_return, model.embed_observation]
        if model.config.tokens == "joint":
            pieces += _panels(
                torch.cat([layer.weight for layer in embeddings], dim=1),
                model.embed_return.bias + model.embed_observation.bias,
            )
        else:
            pieces += [piece for layer in embeddings for piece in _panels(layer.weight, layer.bias)]
        self._body = sum(piece.numel() for piece in pieces)
        pieces += _norm(model.embedding_norm)
        for block in model.backbone.blocks:
            if block.convolution is not None:
                depthwise = block.convolution.depthwise
                pieces += [depthwise.weight.squeeze(1).t(), depthwise.bias]
                pieces += _linear(block.convolution.pointwise)
            cell = block.mixer.cell
            pieces += [*_norm(block.mixer_norm), *_panels(cell.weight_ih_l0, cell.bias_ih_l0)]
            pieces += [cell.bias_h0[0], *_linear(block.mixer.output)]
            if block.mlp is not None:
                pieces += [*_norm(block.mlp_norm), *_linear(block.mlp[0]), *_linear(block.mlp[2])]
        pieces += [*_norm(model.output_norm), *_linear(model.head)]
        packed = torch.cat([piece.detach().flatten() for piece in pieces]).numpy()
        if not self._batch:
            self._weights = packed
        np.copyto(self._weights, packed)


def native_step(policy: StepPolicy) -> NativeStep | None:
    """Return the compiled step of a policy; None where there is none, or no compiler."""
    model = policy.model
    if type(model) is not TrajectoryModel or model.config.backbone not in ("mingru", "minlstm"):
        return None
    for weight in _weights(model):  # inference tensors do not count their changes
        if weight.dtype != torch.float32 or weight.device.type != "cpu" or weight.is_inference():
            return None
    gates = model.config.backbone
    if gates == "minlstm" and not model.config.normalize:
        gates = "minlstm_unnormalised"
    convolution = "convolution" if model.config.convolution else "none"
    kernels = load_kernels(KERNELS, gates, model.config.candidate, convolution)
    return kernels and NativeStep(policy, kernels["step"])


def _weights(model: TrajectoryModel) -> list[Tensor]:
    return [*model.parameters(), *model.buffers()]


def _constants(model: TrajectoryModel) -> list[Tensor]:
    room = LARGEST * model.observation_std
    return [
        model.embed_timestep.weight,
        model.observation_mean - room,
        model.observation_mean + room,
        model.observation_mean,
        model.observation_std,
        model.action_middle,
        model.action_reach,
        model.action_low,
        model.action_high,
        torch.tensor([model.return_scale]),
    ]


def _norm(layer: nn.LayerNorm) -> list[Tensor]:
    return [layer.weight, layer.bias]


def _linear(layer: nn.Linear) -> list[Tensor]:
    return _panels(layer.weight, layer.bias)


def _panels(weight: Tensor, bias: Tensor) -> list[Tensor]:
    """Return the bias, then a weight (N, K) as panels (N / LANES, K, LANES), both padded."""
    columns, inputs = weight.shape
    missing = _padded(columns) - columns
    weight = nn.functional.pad(weight, (0, 0, 0, missing))
    panels = weight.view(-1, LANES, inputs).transpose(1, 2)
    return [nn.functional.pad(bias, (0, missing)), panels]


def _padded(columns: int) -> int:
    return -(-columns // GROUP) * GROUP
