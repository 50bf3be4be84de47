"""Recurrent PPO in one file, in the style of CleanRL: read it top to bottom and copy from it.

    python -m minrl.scripts.examples.ppo_recurrent --core mingru --environment-options length 20

trains on `minrl/Recall-v0`; `--core lstm` does the same with `nn.LSTM`. What differs between the
two is `Agent.remember`: episodes end inside the rollouts, so `nn.LSTM` has to be run step by step,
its state multiplied by (1 - done), where a minGRU takes all steps in one parallel pass.

PPO: Schulman et al. 2017, arXiv 1707.06347; the recurrent minibatches hold whole rollouts of some
of the environments, from the state that the rollout began with, as in CleanRL's ppo_atari_lstm.
"""

import csv
import functools
import time
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import gymnasium as gym
import numpy as np
import torch
import tyro
from torch import Tensor, nn
from torch.distributions import Categorical, Independent, Normal

import minrl.envs.recall  # registers minrl/Recall-v0
from minrl.agents.backbones.blocks import Backbone
from minrl.agents.backbones.cells import CELLS
from minrl.agents.backbones.memory import remember
from minrl.envs.partial import HideVelocities

State = Tensor | tuple[Tensor, ...]


@dataclass
class Config:
    """What to train, and how."""

    core: Literal["gru", "lstm", "mingru", "minlstm", "backbone"] = "mingru"
    """The recurrent core."""
    environment: str = minrl.envs.recall.RECALL_ID
    """Gymnasium id; MODULE:ID imports a module that registers it."""
    environment_options: dict[str, int] = field(default_factory=dict)
    """Passed to gymnasium.make, for example: length 20 cues 4."""
    hide_velocities: bool = False
    """Leave the velocities out of the observation."""
    normalize: bool = False
    """Normalise observations and rewards by their running statistics (for physics)."""
    output: Path = Path("ppo_recurrent.csv")
    """Where the learning curve is written."""
    seed: int = 0
    total_steps: int = 100_000
    """Environment steps, over all environments."""
    num_envs: int = 16
    num_steps: int = 128
    """Steps of each environment in a rollout."""
    hidden_size: int = 128
    num_layers: int = 1
    """Layers of the core, or blocks of the backbone."""
    memory: int = 200
    """Steps that the slowest channels of the core remember before any training."""
    learning_rate: float = 3e-3
    anneal: bool = False
    """Lower the learning rate to zero, linearly over the run."""
    gamma: float = 0.99
    gae_lambda: float = 0.3
    """Low, because Recall rewards nothing but the last action; 0.95 where actions act later."""
    num_minibatches: int = 4
    """Minibatches of whole environments in an epoch."""
    update_epochs: int = 4
    clip: float = 0.2
    entropy_coefficient: float = 0.01
    value_coefficient: float = 0.5
    max_grad_norm: float = 0.5


def make_environments(config: Config) -> gym.vector.SyncVectorEnv:
    """Make the environments; an observation after `done` is the first of the next episode."""
    wrappers = [gym.wrappers.RecordEpisodeStatistics]
    if config.hide_velocities:
        wrappers.append(HideVelocities)
    wrappers.append(gym.wrappers.FlattenObservation)
    if config.normalize:
        scaled = functools.partial(gym.wrappers.NormalizeReward, gamma=config.gamma)
        wrappers += [gym.wrappers.NormalizeObservation, scaled]
    environments = gym.make_vec(
        config.environment,
        config.num_envs,
        vectorization_mode="sync",
        vector_kwargs={"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP},
        wrappers=wrappers,
        disable_env_checker=True,
        **config.environment_options,
    )
    if config.normalize:
        share_statistics(environments)
    return environments


def share_statistics(environments: gym.vector.SyncVectorEnv) -> None:
    """Let one running mean and variance serve all environments.

    With statistics of its own, each would show the policy another scale and another middle: in one
    where the cart often drifts to the left, left of the track's middle would look like the middle.
    """
    first = environments.envs[0]  # NormalizeReward, and in it NormalizeObservation
    for environment in environments.envs[1:]:
        environment.return_rms = first.return_rms
        environment.env.obs_rms = first.env.obs_rms


def make_core(name: str, size: int, num_layers: int, memory: int) -> nn.Module:
    """Make a core with `size` features in and out.

    At the start every channel forgets at a rate of its own, over 2 to `memory` steps, evenly in the
    logarithm; else gates begin half open, and what lies ten steps back has no gradient (Tallec &
    Ollivier 2018, arXiv 1804.11188).
    """
    if name == "backbone":
        # With a short convolution, as in the papers: gates that look at the input alone cannot tell
        # what came four steps ago from what came three.
        return Backbone(size, num_layers, convolution=4, batch_first=False, memory=memory)
    if name in CELLS:
        return CELLS[name](size, size, num_layers, memory=memory)
    core = {"gru": nn.GRU, "lstm": nn.LSTM}[name](size, size, num_layers)
    begin_as_ours(core, memory)
    return core


def begin_as_ours(core: nn.GRU | nn.LSTM, memory: int) -> None:
    """Let the cores of PyTorch begin with the memories of ours, so that all compare fairly."""
    # The rows of the gates that hold the state (+1) or let it go (-1).
    rows, signs = (slice(1, 2), (1,)) if isinstance(core, nn.GRU) else (slice(0, 2), (-1, 1))
    for name, parameter in core.named_parameters():
        if name.startswith("weight_hh"):
            nn.init.orthogonal_(parameter)
        elif name.startswith("bias"):
            nn.init.zeros_(parameter)
    for layer in range(core.num_layers):
        weight, bias = (getattr(core, f"{kind}_ih_l{layer}") for kind in ("weight", "bias"))
        gates = (-1, core.hidden_size)
        remember(weight.unflatten(0, gates)[rows], bias.unflatten(0, gates)[rows], signs, memory)


def linear(inputs: int, outputs: int, gain: float) -> nn.Linear:
    """Make a linear layer with orthogonal weights and no bias at the start."""
    layer = nn.Linear(inputs, outputs)
    nn.init.orthogonal_(layer.weight, gain)
    nn.init.zeros_(layer.bias)
    return layer


def head(size: int, outputs: int, gain: float) -> nn.Sequential:
    """Make a head with a hidden layer: what a linear recurrence holds is not yet a velocity."""
    return nn.Sequential(linear(size, size, 2**0.5), nn.Tanh(), linear(size, outputs, gain))


def loop_over_time(
    core: nn.GRU | nn.LSTM, hidden: Tensor, state: State, dones: Tensor
) -> tuple[Tensor, State]:
    """Run `nn.GRU` or `nn.LSTM` step by step, forgetting where an episode starts."""
    outputs = []
    for step, keep in zip(hidden.unsqueeze(1), (~dones).to(hidden)[:, None, :, None], strict=True):
        state = each_part(state, lambda part, keep=keep: part * keep)
        output, state = core(step, state)
        outputs.append(output)
    return torch.cat(outputs), state


def each_part(state: State, function) -> State:
    """Apply a function to a state, or to each tensor of it if it is a tuple."""
    return tuple(map(function, state)) if isinstance(state, tuple) else function(state)


class Agent(nn.Module):
    """Encoder, recurrent core, and the heads of policy and value."""

    def __init__(self, observation_size: int, actions: gym.Space, config: Config):
        super().__init__()
        size = config.hidden_size
        if not isinstance(actions, (gym.spaces.Discrete, gym.spaces.Box)):
            raise ValueError(f"actions must be Discrete or Box, not {actions}")
        self.discrete = isinstance(actions, gym.spaces.Discrete)
        action_size = int(actions.n) if self.discrete else int(np.prod(actions.shape))
        self.encoder = nn.Sequential(
            nn.Linear(observation_size, size), nn.LayerNorm(size), nn.Tanh()
        )
        self.core = make_core(config.core, size, config.num_layers, config.memory)
        self.policy, self.value = head(size, action_size, 0.01), head(size, 1, 1.0)
        self.log_std = None if self.discrete else nn.Parameter(torch.zeros(action_size))

    def initial_state(self, batch_size: int) -> State:
        """Return the state before an episode."""
        if not isinstance(self.core, (nn.GRU, nn.LSTM)):
            return self.core.initial_state(batch_size)
        zeros = torch.zeros(self.core.num_layers, batch_size, self.core.hidden_size)
        return (zeros, zeros) if isinstance(self.core, nn.LSTM) else zeros

    def rows(self, state: State, rows: Tensor) -> State:
        """Return the part of a state that belongs to some of the environments."""
        dimension = 0 if isinstance(self.core, Backbone) else 1
        return each_part(state, lambda part: part.index_select(dimension, rows))

    def remember(self, hidden: Tensor, state: State, dones: Tensor) -> tuple[Tensor, State]:
        """Run the core over (T, B, H); `dones[t]` says that `hidden[t]` starts an episode."""
        if isinstance(self.core, (nn.GRU, nn.LSTM)):
            return loop_over_time(self.core, hidden, state, dones)
        return self.core(hidden, state, resets=dones)

    def forward(
        self, observations: Tensor, state: State, dones: Tensor
    ) -> tuple[torch.distributions.Distribution, Tensor, State]:
        """Return the distribution of actions and the values (T, B), and the state after."""
        hidden, state = self.remember(self.encoder(observations), state, dones)
        output = self.policy(hidden)
        values = self.value(hidden).squeeze(-1)
        if self.discrete:
            return Categorical(logits=output, validate_args=False), values, state
        normal = Normal(output, self.log_std.exp(), validate_args=False)
        return Independent(normal, 1, validate_args=False), values, state


@dataclass
class Rollout:
    """T steps of B environments; `dones[t]` belongs to `observations[t]`."""

    observations: Tensor  # T B F
    dones: Tensor  # T B, True where the observation is the first of an episode
    actions: Tensor  # T B or T B A
    log_probabilities: Tensor  # T B
    values: Tensor  # T+1 B
    rewards: Tensor  # T B
    done_after: Tensor  # B, the flag that the next rollout begins with
    first_state: State


class Collector:
    """Steps the environments, and keeps what has to live from one rollout to the next."""

    def __init__(self, environments: gym.vector.VectorEnv, agent: Agent, config: Config):
        self.environments, self.agent, self.config = environments, agent, config
        # One number for all would be counted up from environment to environment, and neighbouring
        # runs would share most of theirs.
        seeds = np.random.SeedSequence(config.seed).generate_state(config.num_envs)
        observation, _ = environments.reset(seed=seeds.tolist())
        self.observation = torch.as_tensor(observation, dtype=torch.float32)
        self.done = torch.ones(config.num_envs, dtype=torch.bool)
        self.state = agent.initial_state(config.num_envs)
        self.returns: deque[float] = deque(maxlen=50)  # of the last episodes

    @torch.no_grad()
    def collect(self) -> Rollout:
        """Act for `num_steps` steps."""
        columns: list[tuple[Tensor, ...]] = []
        first_state = each_part(self.state, torch.clone)
        for _ in range(self.config.num_steps):
            observation, done = self.observation, self.done
            policy, values, self.state = self.agent(observation[None], self.state, done[None])
            actions = policy.sample()
            rewards = self.step(actions[0])
            log_probabilities = policy.log_prob(actions)[0]
            columns.append((observation, done, actions[0], log_probabilities, values[0], rewards))
        observations, dones, actions, log_probabilities, values, rewards = map(
            torch.stack, zip(*columns, strict=True)
        )
        _, after, _ = self.agent(self.observation[None], self.state, self.done[None])
        values = torch.cat([values, after])
        return Rollout(
            observations, dones, actions, log_probabilities, values, rewards, self.done, first_state
        )

    def step(self, actions: Tensor) -> Tensor:
        """Step the environments, and return the rewards.

        An episode that is cut off would have gone on: the value of what it would have seen next
        is added to its last reward (Pardo et al. 2018, arXiv 1712.00378).
        """
        taken = actions.numpy()
        space = self.environments.single_action_space
        if isinstance(space, gym.spaces.Box):
            taken = taken.reshape(-1, *space.shape).clip(space.low, space.high)
        else:
            taken = taken + space.start
        observation, rewards, terminated, truncated, infos = self.environments.step(taken)
        rewards = torch.as_tensor(rewards, dtype=torch.float32)
        cut_off = truncated & ~terminated
        if cut_off.any():
            last = observation.copy()
            last[cut_off] = np.stack(infos["final_obs"][cut_off])
            last = torch.as_tensor(last, dtype=torch.float32)
            _, values, _ = self.agent(last[None], self.state, torch.zeros(1, len(last)).bool())
            rewards += self.config.gamma * values[0] * torch.as_tensor(cut_off)
        if "final_info" in infos:
            self.returns.extend(infos["final_info"]["episode"]["r"][terminated | truncated])
        self.observation = torch.as_tensor(observation, dtype=torch.float32)
        self.done = torch.as_tensor(terminated | truncated)
        return rewards


def advantages_of(rollout: Rollout, gamma: float, gae_lambda: float) -> Tensor:
    """Generalised advantage estimates, (T, B) (Schulman et al. 2016, arXiv 1506.02438, eq. 16)."""
    continues = 1.0 - torch.cat([rollout.dones[1:], rollout.done_after[None]]).float()  # T B
    errors = rollout.rewards + gamma * continues * rollout.values[1:] - rollout.values[:-1]
    advantages = torch.zeros_like(errors)
    following = torch.zeros_like(errors[0])
    for step in reversed(range(len(errors))):
        following = errors[step] + gamma * gae_lambda * continues[step] * following
        advantages[step] = following
    return advantages


def loss_of(agent: Agent, rollout: Rollout, advantages: Tensor, rows: Tensor, config: Config):
    """PPO's loss on the whole rollouts of some environments."""
    policy, values, _ = agent(
        rollout.observations[:, rows],
        agent.rows(rollout.first_state, rows),
        rollout.dones[:, rows],
    )
    targets = (advantages + rollout.values[:-1])[:, rows]
    advantages = advantages[:, rows]
    advantages = (advantages - advantages.mean()) / (advantages.std() + 1e-8)
    changes = policy.log_prob(rollout.actions[:, rows]) - rollout.log_probabilities[:, rows]
    ratio = changes.exp()
    clipped = ratio.clamp(1 - config.clip, 1 + config.clip)
    policy_loss = -torch.min(ratio * advantages, clipped * advantages).mean()
    value_loss = 0.5 * (values - targets).square().mean()
    entropy = policy.entropy().mean()
    return (
        policy_loss + config.value_coefficient * value_loss - config.entropy_coefficient * entropy
    )


def update(
    agent: Agent, optimizer: torch.optim.Optimizer, rollout: Rollout, config: Config
) -> None:
    """Improve the agent on one rollout."""
    advantages = advantages_of(rollout, config.gamma, config.gae_lambda)
    for _ in range(config.update_epochs):
        for rows in torch.randperm(config.num_envs).chunk(config.num_minibatches):
            optimizer.zero_grad()
            loss_of(agent, rollout, advantages, rows, config).backward()
            nn.utils.clip_grad_norm_(agent.parameters(), config.max_grad_norm)
            optimizer.step()


def make_agent(environments: gym.vector.VectorEnv, config: Config) -> Agent:
    """Make an agent for the spaces of the environments."""
    size = environments.single_observation_space.shape[0]
    return Agent(size, environments.single_action_space, config)


def train(config: Config) -> list[dict[str, float]]:
    """Train, write the learning curve to `config.output` and return its rows."""
    if config.num_envs % config.num_minibatches:
        raise ValueError("num_envs must be a multiple of num_minibatches")
    if config.num_envs // config.num_minibatches * config.num_steps < 2:
        raise ValueError("a minibatch must have two steps at least, to normalise advantages")
    torch.manual_seed(config.seed)
    environments = make_environments(config)
    agent = make_agent(environments, config)
    optimizer = torch.optim.Adam(agent.parameters(), lr=config.learning_rate, eps=1e-5)
    collector = Collector(environments, agent, config)
    steps_per_rollout = config.num_envs * config.num_steps
    num_updates = -(-config.total_steps // steps_per_rollout)
    rollout_seconds = update_seconds = 0.0
    processor_start = time.process_time()
    rows: list[dict[str, float]] = []
    with config.output.open("w", newline="") as file:
        for index in range(num_updates):
            start = time.perf_counter()
            rollout = collector.collect()
            collected = time.perf_counter()
            if config.anneal:
                optimizer.param_groups[0]["lr"] = config.learning_rate * (1 - index / num_updates)
            update(agent, optimizer, rollout, config)
            rollout_seconds += collected - start
            update_seconds += time.perf_counter() - collected
            rows.append(
                {
                    "steps": (index + 1) * steps_per_rollout,
                    "seconds": rollout_seconds + update_seconds,
                    "processor_seconds": time.process_time() - processor_start,
                    "episodic_return": float(np.mean(collector.returns or [np.nan])),
                    "rollout_seconds": rollout_seconds,
                    "update_seconds": update_seconds,
                }
            )
            writer = csv.DictWriter(file, rows[0])
            if index == 0:
                writer.writeheader()
            writer.writerow(rows[-1])
            file.flush()
    environments.close()
    return rows


if __name__ == "__main__":
    last = train(tyro.cli(Config))[-1]
    print("  ".join(f"{name} {value:.6g}" for name, value in last.items()))
