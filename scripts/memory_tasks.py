"""What the memory study trains on what: its tasks, with their settings, and the cores."""

from dataclasses import dataclass, replace

from minrl.scripts.examples.ppo_recurrent import Config


@dataclass(frozen=True)
class Contestant:
    """A core, and how it is shown."""

    title: str
    colour: str
    core: str
    num_layers: int = 1


# Two layers of ours have as many weights as one of nn.GRU (minLSTM) or fewer (minGRU).
CORES = {
    "gru": Contestant("nn.GRU", "tab:grey", "gru"),
    "lstm": Contestant("nn.LSTM", "black", "lstm"),
    "mingru": Contestant("MinGRU", "tab:cyan", "mingru"),
    "minlstm": Contestant("MinLSTM", "tab:olive", "minlstm"),
    "mingru-2": Contestant("MinGRU, 2 layers", "tab:blue", "mingru", 2),
    "minlstm-2": Contestant("MinLSTM, 2 layers", "tab:orange", "minlstm", 2),
    "backbone": Contestant("Backbone", "tab:pink", "backbone"),
    "backbone-2": Contestant("Backbone, 2 blocks", "tab:green", "backbone", 2),
}

RECALL = Config(num_envs=32, num_steps=64, hidden_size=64, learning_rate=1e-3, total_steps=150_000)
BASE = replace(RECALL, anneal=True, gae_lambda=0.95, memory=10)


@dataclass(frozen=True)
class Task:
    """A task, and what is known about its returns."""

    title: str
    config: Config
    without_memory: float | None = None
    """The best return without any memory, where that is known."""


TASKS = {
    "recall-20": Task(
        "Recall, 20 blank steps", replace(RECALL, environment_options={"length": 20}), 0.25
    ),
    "cartpole": Task(
        "CartPole, no velocities",
        replace(
            BASE,
            environment="CartPole-v1",
            hide_velocities=True,
            normalize=True,
            num_steps=32,
            memory=20,
            gae_lambda=0.9,
            entropy_coefficient=0.0,
            total_steps=400_000,
        ),
    ),
    "repeat-previous": Task(
        "POPGym RepeatPreviousEasy",
        replace(BASE, environment="popgym:popgym-RepeatPreviousEasy-v0"),
        -0.5,
    ),
    "count-recall": Task(
        "POPGym CountRecallEasy",
        replace(BASE, environment="popgym:popgym-CountRecallEasy-v0", memory=100),
    ),
    "hopper": Task(
        "Hopper, no velocities",
        replace(
            BASE,
            environment="Hopper-v5",
            hide_velocities=True,
            normalize=True,
            learning_rate=3e-4,
            memory=20,
            entropy_coefficient=0.0,
            total_steps=300_000,
        ),
    ),
    "recall-200": Task(
        "Recall, 200 blank steps",
        replace(
            RECALL,
            environment_options={"length": 200},
            num_steps=404,
            total_steps=1_000_000,
        ),
        0.25,
    ),
}
