"""The fastest form of a policy's step that a machine has."""

import threading
import warnings
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from torch import Tensor

from minrl.agents.cuda_graph import captured
from minrl.agents.native_step import native_step
from minrl.agents.plain_step import plain_step
from minrl.agents.step_policy import StepPolicy


def fast_step(policy: StepPolicy) -> Callable:
    """Return the fastest function that does what :func:`plain_step` does without a window."""
    if policy.model.action_low.device.type == "cuda":
        return GraphStep(policy)
    return native_step(policy) or partial(plain_step, policy)


class GraphStep:
    """A policy's step as a CUDA graph: one launch instead of one for each of some fifty kernels.

    Weights are read where they are, so changes in place need no notice; tensors put in their place
    and another ``return_scale`` are noticed at the next step at which an environment starts an
    episode. Other modules or hooks are not: make a new agent.

    Args:
        policy: On a CUDA device.
    """

    def __init__(self, policy: StepPolicy):
        self.policy = policy
        self._lock = threading.Lock()  # one call at a time: they share buffers
        self._batch = 0

    def __reduce__(self):
        """Copy and pickle as what it was made from: a graph has no other form."""
        return fast_step, (self.policy,)

    def __call__(
        self,
        observations: np.ndarray,
        returns: np.ndarray,
        timesteps: np.ndarray,
        starts: np.ndarray,
        state: Tensor,
    ) -> tuple[np.ndarray, Tensor]:
        """Return the actions and the next state; see :meth:`StepPolicy.forward`."""
        arrays = (
            np.require(observations, requirements="CW"),
            returns.astype(np.float32),
            timesteps,
            starts,
        )
        tensors = (*map(torch.from_numpy, arrays), state)
        # Buffers made in a caller's inference mode could not be written to outside of it.
        with self._lock, torch.inference_mode(False), torch.no_grad():
            if len(state) != self._batch or (starts.any() and self._moved()):
                self._capture(tensors)
            for buffer, tensor in zip(self._inputs, tensors, strict=True):
                buffer.copy_(tensor)
            actions, after = self._step()
            return actions.cpu().numpy(), after.clone()

    def _moved(self) -> bool:
        """Return whether any weight is not where it was captured, or the scale another."""
        weights = [*self.policy.parameters(), *self.policy.buffers()]
        places = [weight.data_ptr() for weight in weights]
        same_scale = self.policy.model.return_scale == self._scale
        return not same_scale or places != [weight.data_ptr() for weight in self._weights]

    def _capture(self, tensors: tuple[Tensor, ...]) -> None:
        device = self.policy.model.action_low.device
        weights = [*self.policy.parameters(), *self.policy.buffers()]
        self._weights = [weight.detach() for weight in weights]  # kept alive: the graph reads them
        self._scale = self.policy.model.return_scale
        self._inputs = [tensor.to(device, copy=True) for tensor in tensors]
        self._batch = len(tensors[-1])
        self._step = partial(self.policy, *self._inputs)
        try:
            self._step = captured(self._step, device)
        except RuntimeError as error:
            warnings.warn(f"acting without a CUDA graph, slower: {error}", stacklevel=3)
