"""An environment that goes wrong at one step of one episode, in every way, and a policy for it."""

import ctypes
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import gymnasium
import numpy as np
from gymnasium import spaces

BAD_EPISODE = 7  # where tests let it go wrong, with some episodes before and after


def seed_of(episode, seed=0):
    """The seed that an evaluation resets an episode with."""
    return int(np.random.SeedSequence([seed, episode]).generate_state(1)[0])


def hang_holding_the_interpreter():
    re.match("(a+)+b", "a" * 60)  # centuries, in C, and no other thread gets a turn


def raise_error(reason):
    raise OSError(reason)


def die_and_leave_a_copy():
    """The copy holds all that is open, so that no connection breaks off."""
    if os.fork() == 0:
        time.sleep(1000)
    os.kill(os.getpid(), signal.SIGKILL)


class Unreadable:
    """As a tensor that takes gradients: an array, but not for NumPy."""

    def __array__(self, *_, **__):
        raise RuntimeError("use detach() first")


DEADLY = {
    "SIGKILL": lambda: os.kill(os.getpid(), signal.SIGKILL),
    "SIGSTOP": lambda: os.kill(os.getpid(), signal.SIGSTOP),
    "segfault": lambda: ctypes.string_at(0),
    "signal 40": lambda: os.kill(os.getpid(), 40),  # of those for real time, without a name
    "fork": die_and_leave_a_copy,
    "os._exit": lambda: os._exit(3),
    "sleep": lambda: time.sleep(1000),
    "stuck": hang_holding_the_interpreter,
    "sys.exit": lambda: sys.exit("gave up"),
    "raise": lambda: raise_error("simulator crashed"),
    "look around": lambda: raise_error({"torch", "pytest", "minrl.agents"} & set(sys.modules)),
}


class Faulty(gymnasium.Env):
    """Episodes of 3 to 9 random rewards.

    Args:
        fault: of ``DEADLY``, or "observation", "reward", "shape", "nothing" (a None), "tensor".
        where: "reset", "step" (the third), "close" or "init".
        episode: to fail in.
        mark: a file that says that it has come to the fault.
        helper: whether it starts a program of its own.
        told: to be quoted in an error, so that it shows what has arrived.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1.0, 1.0, (1,))

    def __init__(self, fault=None, where="step", episode=0, mark=None, helper=False, told=None):
        self.fault, self.where, self.mark, self.told = fault, where, mark, told
        self.episode_seed = seed_of(episode)
        self.seed = None
        self.helper = subprocess.Popen(["sleep", "1000"]) if helper else None
        self.fail_in("init")

    def fail_in(self, place):
        if self.where != place or self.fault not in DEADLY:
            return
        if place in ("reset", "step") and self.seed != self.episode_seed:
            return
        if self.mark:
            Path(self.mark).touch()
        DEADLY[self.fault]()

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seed, self.steps = seed, 0
        if self.told is not None:
            raise_error(repr(self.told))
        self.left = int(self.np_random.integers(3, 10))
        self.fail_in("reset")
        return self.observe(), {}

    def step(self, action):
        if self.steps == 2:
            self.fail_in("step")
        poisoned = self.seed == self.episode_seed and self.steps == 2
        reward = float(self.np_random.normal()) + float(action[0])
        observation = self.observe()
        if poisoned and self.fault == "observation":
            observation[1] = np.nan
        if poisoned and self.fault == "reward":
            reward = np.nan
        if poisoned and self.fault == "shape":
            observation = observation[:1]
        if poisoned and self.fault == "nothing":
            observation = None
        if poisoned and self.fault == "tensor":
            observation = Unreadable()
        self.steps += 1
        self.left -= 1
        return observation, reward, self.left == 0, False, {}

    def observe(self):
        return self.np_random.normal(size=2).astype(np.float32)

    def close(self):
        self.fail_in("close")
        if self.helper:
            self.helper.kill()
            self.helper.wait()


class Steady:
    """A policy that remembers how far each row is, so that a wrong reset shows."""

    def reset(self, mask=None, *, target_return=None, num_envs=None):
        if num_envs is not None:
            self.counts = np.zeros(num_envs)
        self.counts[slice(None) if mask is None else mask] = 0

    def act(self, observations, rewards=None):
        self.counts += 1
        return np.tanh(observations[:, :1] + 0.1 * self.counts[:, None] + rewards[:, None])
