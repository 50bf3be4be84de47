"""``minrl benchmark libraries``: our cores inside TorchRL and sb3-contrib, against their own.

What is varied is how often episodes start inside the batch: TorchRL's modules then cut it into
pieces and pad these, and sb3-contrib's policies go through it step by step.
"""

import functools
import importlib
from collections.abc import Callable

import torch
from torch import Tensor

from minrl.scripts.benchmarks.measuring import Clock, Contestant, Prepared, compete, summarise
from minrl.scripts.benchmarks.report import Report, print_case

ENVIRONMENTS, STEPS, WIDTH = 16, 128, 128
RESETS = (0, 1, 4, 16)  # episode starts inside each row of TorchRL's batch
EPISODES = (1000, 300, 50, 12)  # steps of an episode in sb3-contrib's environments

ADAPTERS = "minrl.agents.adapters"
MODULES = {
    "mingru": (f"{ADAPTERS}.torchrl", "MinGRUModule", "GRUModule"),
    "minlstm": (f"{ADAPTERS}.torchrl", "MinLSTMModule", "LSTMModule"),
}
POLICIES = {
    "mingru": (f"{ADAPTERS}.sb3_contrib", "MinGruPolicy", "MlpLstmPolicy"),
    "minlstm": (f"{ADAPTERS}.sb3_contrib", "MinLstmPolicy", "MlpLstmPolicy"),
}


def run_libraries(grid: str, seconds: float, report: Report) -> None:
    """Measure and add to the report.

    Args:
        grid: "quick" measures the first and last case of each library only.
        seconds: Of the rounds of each contestant in each case.
        report: What to add to.
    """
    for library, entries, prepare, values, varied in (
        ("torchrl", MODULES, _prepare_module, RESETS, "resets a row"),
        ("sb3-contrib", POLICIES, _prepare_policy, EPISODES, "steps an episode"),
    ):
        for value in (values[0], values[-1]) if grid == "quick" else values:
            for core, (module, ours, theirs) in entries.items():
                contestants = [
                    Contestant(f"minrl {ours}", functools.partial(prepare, module, ours)),
                    Contestant(theirs, functools.partial(prepare, None, theirs)),
                ]
                clock = Clock(report.device)
                outcomes = compete(contestants, value, clock, seconds=seconds)
                case = {"library": library, "core": core, "varied": varied, "value": value}
                case["times"] = summarise(outcomes)
                print_case(f"{library} {core}, {value} {varied}", case["times"])
                report.add("cases", case)
        report.save()


def _prepare_module(adapter: str | None, name: str, resets: int) -> Prepared:
    """Return forward and backward pass of a TorchRL module over whole sequences.

    In each row so many episodes start, at steps that are drawn, the same for all contestants.
    """
    from tensordict import TensorDict
    from torchrl import modules

    source = modules if adapter is None else importlib.import_module(adapter)
    options = {} if adapter else {"recurrent_backend": "pad"}
    module = getattr(source, name)(
        input_size=WIDTH, hidden_size=WIDTH, in_key="observation", out_key="embedding", **options
    )
    random = torch.Generator().manual_seed(0)
    observations = torch.randn(ENVIRONMENTS, STEPS, WIDTH, generator=random)
    starts = torch.zeros(ENVIRONMENTS, STEPS, 1, dtype=torch.bool)
    starts[:, 0] = True
    for row in starts[..., 0]:
        row[1 + torch.randperm(STEPS - 1, generator=random)[:resets]] = True

    def run() -> None:
        module.zero_grad()
        batch = {"observation": observations, "is_init": starts}
        with modules.set_recurrent_mode(True):
            output: Tensor = module(TensorDict(batch, [ENVIRONMENTS, STEPS]))["embedding"]
        output.square().mean().backward()

    return Prepared(run)


def _prepare_policy(adapter: str | None, name: str, episode: int) -> Prepared:
    """Return ``RecurrentPPO.train()`` on a rollout of episodes of so many steps."""
    from sb3_contrib import RecurrentPPO
    from stable_baselines3.common.env_util import make_vec_env

    if adapter is not None:
        importlib.import_module(adapter)  # which makes the policy known
    model = RecurrentPPO(
        name,
        make_vec_env(_environment_of(episode), ENVIRONMENTS),
        n_steps=STEPS,
        batch_size=ENVIRONMENTS * STEPS,
        n_epochs=1,
        policy_kwargs={"lstm_hidden_size": WIDTH, "net_arch": []},
        device="cpu",
        seed=0,
    )
    model.learn(ENVIRONMENTS * STEPS)
    return Prepared(model.train)


def _environment_of(length: int) -> Callable:
    """Return what makes an environment with episodes of this length, but for the first.

    The first ones have lengths of their own, so that not all environments begin at once.
    """
    import gymnasium as gym
    import numpy as np

    class Noise(gym.Env):
        observation_space = gym.spaces.Box(-np.inf, np.inf, (WIDTH,), np.float32)
        action_space = gym.spaces.Discrete(4)
        left = None

        def reset(self, *, seed=None, options=None):
            super().reset(seed=seed)
            is_first, self.left = self.left is None, length
            if is_first:
                self.left = int(self.np_random.integers(1, length + 1))
            return self._draw(), {}

        def step(self, _action):
            self.left -= 1
            return self._draw(), 0.0, self.left <= 0, False, {}

        def _draw(self):
            return self.np_random.standard_normal(WIDTH, dtype=np.float32)

    return Noise
