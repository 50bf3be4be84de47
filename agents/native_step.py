"""The step of a policy in one call of compiled code, for models on the CPU."""

import ctypes
import functools
import threading
from collections.abc import Callable
from operator import attrgetter

import numpy as np
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_post_hook

from minrl.agents.backbones.native import load_kernels
from minrl.agents.backbones.scan_torch import PARTS
from minrl.agents.backbones.threads import run_parallel
from minrl.agents.native_layout import GROUP, LANES
from minrl.agents.plain_step import plain_step
from minrl.agents.step_policy import LARGEST, StepPolicy
from minrl.agents.trajectory import TrajectoryModel

COMPILED = ("mingru", "minlstm", "gilr")

KERNELS = "minrl.agents.native_step_kernels"

VERSION = attrgetter("_version")

# Rows below which another thread is not worth waking.
LEAST_ROWS = 64

# Steps after which it is worth looking again at what nobody counts.
LOOK_EVERY = 100


class NativeStep:
    """A :class:`StepPolicy` in compiled code: equal to rounding, and as pure a function.

    It acts on a copy of the weights, which is renewed when they have changed. Some changes are seen
    at the very next step: operations in place on a parameter, such as ``load_state_dict``, because
    PyTorch counts them, and steps of an optimiser. Others (writing to ``parameter.data`` or through
    a NumPy view, replacing a tensor or a module, hooks, ``return_scale``) are looked for when one
    of the first kind is seen, when all environments start an episode, and when one does and
    ``LOOK_EVERY`` steps have passed. A model that is then found to be no longer what its
    description builds acts by :func:`plain_step`.

    Args:
        policy: One that :func:`native_step` has found to fit.
        kernel: The compiled function.
    """

    def __init__(self, policy: StepPolicy, kernel: Callable):
        self.policy, self.kernel = policy, kernel
        self._lock = threading.Lock()  # one call at a time: they share buffers
        self._batch: int | None = None
        self._steps_unseen = 0
        self._form, self._optimizer_steps = _form(policy.model), _optimizer_steps()
        self._tracked = _weights(policy.model)
        self._count, self._fits = self._counted(), True
        self._weights = self._packed()

    def __reduce__(self):
        """Copy and pickle as what it was made from: machine code has no other form."""
        return native_step, (self.policy,)

    def __call__(
        self,
        observations: np.ndarray,
        returns: np.ndarray,
        timesteps: np.ndarray,
        starts: np.ndarray,
        state: Tensor,
    ) -> tuple[np.ndarray, Tensor]:
        """Return the actions and the next state; see :meth:`StepPolicy.forward`."""
        batch = len(observations)
        state = self._checked(state, batch)
        with self._lock:
            self._steps_unseen += 1
            if self._counted() != self._count or self._is_time_to_look(starts):
                self._renew()
            if not self._fits:
                inputs = (observations, returns, timesteps, starts, state)
                return plain_step(self.policy, *inputs)
            if batch != self._batch:
                self._allocate(batch)
            self._observations[...] = observations
            self._returns[...] = returns
            self._timesteps[...] = timesteps
            self._starts[...] = starts
            after = torch.empty_like(state)
            arguments = (state.data_ptr(), after.data_ptr(), *self._arguments)
            if batch < 2 * LEAST_ROWS:
                self.kernel(*arguments, *self._all_rows)
            else:
                run_parallel(self.kernel, arguments, batch, least=LEAST_ROWS)
            return self._actions.copy(), after

    def _is_time_to_look(self, starts: np.ndarray) -> bool:
        """Return whether to look at the model, which takes as long as ten steps."""
        started = np.count_nonzero(starts)
        return started == len(starts) or (started > 0 and self._steps_unseen >= LOOK_EVERY)

    def _checked(self, state: Tensor, batch: int) -> Tensor:
        """Return the state in the form whose memory the compiled code may read."""
        wanted = (batch, self.policy.state_size)
        if state.shape != wanted or state.dtype != torch.float32 or state.device.type != "cpu":
            raise ValueError(
                f"this state is of another model or number of environments: it is "
                f"{tuple(state.shape)} {state.dtype} on {state.device.type}, not {wanted} "
                "torch.float32 on cpu"
            )
        return state.contiguous()

    def _allocate(self, batch: int) -> None:
        """Make the buffers for a batch, and the arguments that point to them."""
        policy, config = self.policy, self.policy.model.config
        observed, acted = policy.model.observation_size, policy.model.action_size
        hidden, features = config.width * config.expansion, config.width * config.mlp_ratio
        gates = PARTS[policy.model.backbone.blocks[0].mixer.cell.gates] * hidden
        widest = max(*map(_padded, (gates, features, acted)), acted + 1 + observed)
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
            config.tokens_per_step,
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
        """Return how often PyTorch has seen a weight change, or an optimiser, fused ones too."""
        return sum(map(VERSION, self._tracked)) + self._optimizer_steps[0]

    def _renew(self) -> None:
        """Look at the whole model, and copy its weights if they changed."""
        self._steps_unseen = 0
        model = self.policy.model
        weights = _weights(model)
        self._fits = _fits(model, weights) and _form(model) == self._form
        if self._fits:
            self._tracked = weights
            self._count = self._counted()
            if self._changed():
                np.copyto(self._weights, self._packed())

    def _changed(self) -> bool:
        """Return whether anything is not what was copied."""
        same = self.policy.model.return_scale == self._scale
        return not (same and all(map(torch.equal, self._tracked, self._copied)))

    def _packed(self) -> np.ndarray:
        """Return a copy of all weights, in the order in which the step reads them."""
        model = self.policy.model
        self._scale = model.return_scale
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
            first = cell.initial_state(1)[0, 0]
            pieces += [first, *_linear(block.mixer.output)]
            if block.mlp is not None:
                pieces += [*_norm(block.mlp_norm), *_linear(block.mlp[0]), *_linear(block.mlp[2])]
        pieces += [*_norm(model.output_norm), *_linear(model.head)]
        return torch.cat([piece.detach().flatten() for piece in pieces]).numpy()


def native_step(policy: StepPolicy) -> NativeStep | None:
    """Return the compiled step of a policy; None where there is none, or no compiler."""
    model = policy.model
    if type(model) is not TrajectoryModel or model.config.backbone not in COMPILED:
        return None
    if min(model.observation_size, model.action_size) == 0:
        return None
    if model.config.tokens == "observation" or not _fits(model, _weights(model)):
        return None
    with torch.device("meta"):
        described = TrajectoryModel.from_description(model.describe()).eval()
    if _form(model) != _form(described):
        return None
    cell = model.backbone.blocks[0].mixer.cell
    convolution = "convolution" if model.config.convolution else "none"
    kernels = load_kernels(KERNELS, cell.gates, cell.candidate, convolution)
    return kernels and NativeStep(policy, kernels["step"])


@functools.cache
def _optimizer_steps() -> list[int]:
    """Return a number that every step of any optimiser raises: fused ones bump no versions."""
    count = [0]

    def raise_count(*_) -> None:
        count[0] += 1

    register_optimizer_step_post_hook(raise_count)
    return count


def _fits(model: TrajectoryModel, weights: list[Tensor]) -> bool:
    """Return whether there are no hooks, and compiled code can read the weights."""
    for module in model.modules():
        if module._forward_hooks or module._forward_pre_hooks:
            return False
    return all(  # inference tensors do not count their changes
        weight.dtype == torch.float32 and weight.device.type == "cpu" and not weight.is_inference()
        for weight in weights
    )


def _form(model: TrajectoryModel) -> list:
    """Return all but weights and scale that decides what a model computes: equal or not."""
    return [
        (
            type(module),
            {
                name: value
                for name, value in vars(module).items()
                if not name.startswith("_") and name != "return_scale"
            },
            [
                (name, None if weight is None else weight.shape)
                for name, weight in (*module._parameters.items(), *module._buffers.items())
            ],
        )
        for module in model.modules()
    ]


def _weights(model: TrajectoryModel) -> list[Tensor]:
    # Twice as fast as by parameters() and buffers(), at every start of an episode.
    return [
        weight
        for module in model.modules()
        for weight in (*module._parameters.values(), *module._buffers.values())
        if weight is not None
    ]


def _constants(model: TrajectoryModel) -> list[Tensor]:
    room = LARGEST * model.observation_std
    timesteps = [] if model.embed_timestep is None else [model.embed_timestep.weight]
    return [
        *timesteps,
        model.observation_mean - room,
        model.observation_mean + room,
        model.observation_mean,
        model.observation_std,
        model.action_middle,
        model.action_reach,
        model.action_low,
        model.action_high,
        model.action_low.new_tensor([model.return_scale, LARGEST]),
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
