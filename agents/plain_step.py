"""The step of a policy in plain PyTorch, on any device, and with a window of recent steps."""

import contextlib
import threading
from collections.abc import Iterator

import numpy as np
import torch
from torch import Tensor

from minrl.agents.recent_steps import RecentSteps
from minrl.agents.step_policy import StepPolicy, inside_bounds, without_outliers

SINGLE_THREAD_BELOW = 256


@torch.inference_mode()
def plain_step(
    policy: StepPolicy,
    observations: np.ndarray,
    returns: np.ndarray,
    timesteps: np.ndarray,
    starts: np.ndarray,
    state: Tensor,
    window: RecentSteps | None = None,
) -> tuple[np.ndarray, Tensor]:
    """Return the actions and the next state; see :meth:`StepPolicy.forward`.

    Args:
        policy: What to compute.
        observations: (B, O) float32.
        returns: (B,), in reward units.
        timesteps: (B,) int64.
        starts: (B,) bool.
        state: (B, S), on the policy's device.
        window: The steps before this one, to which it is added: the model goes through them all
            rather than on from the state, of which only the last action is then kept.
    """
    model = policy.model
    arrays = (
        np.require(observations, requirements="CW"),
        returns.astype(np.float32),
        timesteps,
    )
    inputs = tuple(torch.from_numpy(array).to(state.device) for array in arrays)
    reset = torch.from_numpy(starts).to(state.device) if starts.any() else None
    with few_threads(len(observations)):
        if window is None:
            actions, after = policy(*inputs, reset, state)
        else:
            *parts, previous_actions = policy.split(state)
            seen = without_outliers(model, *inputs[:2])
            window.append(
                *seen, timesteps=inputs[2], previous_actions=previous_actions, starts=starts
            )
            actions = inside_bounds(model, window.predict(model))
            after = policy.join((*parts, actions))
    return actions.cpu().numpy(), after


@contextlib.contextmanager
def few_threads(batch: int) -> Iterator[None]:
    """Compute small batches on one CPU thread.

    Handing out work this small costs more than it saves, and where other processes compete for the
    cores it costs 50 times as much (measured: 51 ms a step instead of 1).
    """
    if batch >= SINGLE_THREAD_BELOW:
        yield
        return
    with _Threads.lock:
        if not _Threads.inside:
            _Threads.before = torch.get_num_threads()
        _Threads.inside += 1
        torch.set_num_threads(1)
    try:
        yield
    finally:
        with _Threads.lock:
            _Threads.inside -= 1
            torch.set_num_threads(_Threads.before)


class _Threads:
    """The number of PyTorch's threads before the first of the callers that are inside now.

    One that comes later finds the 1 that the first has set, and must not put that back.
    """

    lock, inside, before = threading.Lock(), 0, 1
