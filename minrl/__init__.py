"""minrl: offline reinforcement learning with minimal RNNs.

A return-conditioned trajectory model whose sequence mixer is a minGRU or minLSTM ("Were RNNs All
We Needed?", arXiv 2410.01201): trained in parallel with a scan over whole sequences, acting online
one step at a time with a recurrent state.

Names are imported on first use, so that ``from minrl import MinGRU`` loads torch and nothing else.
"""

import importlib
from typing import TYPE_CHECKING

__version__ = "0.1.0"

_HOME = {
    "Backbone": "minrl.agents.backbones.blocks",
    "MinGRU": "minrl.agents.backbones.cells",
    "MinLSTM": "minrl.agents.backbones.cells",
    "ModelConfig": "minrl.agents.model_config",
    "TrajectoryModel": "minrl.agents.trajectory",
    "DecisionAgent": "minrl.agents.decision_agent",
    "load_dataset": "minrl.data.minari_source",
    "evaluate": "minrl.envs.rollout",
    "normalized_score": "minrl.envs.scores",
}

__all__ = [
    "Backbone",
    "DecisionAgent",
    "MinGRU",
    "MinLSTM",
    "ModelConfig",
    "TrajectoryModel",
    "__version__",
    "evaluate",
    "load_dataset",
    "normalized_score",
]


if TYPE_CHECKING:
    from minrl.agents.backbones.blocks import Backbone
    from minrl.agents.backbones.cells import MinGRU, MinLSTM
    from minrl.agents.decision_agent import DecisionAgent
    from minrl.agents.model_config import ModelConfig
    from minrl.agents.trajectory import TrajectoryModel
    from minrl.data.minari_source import load_dataset
    from minrl.envs.rollout import evaluate
    from minrl.envs.scores import normalized_score


def __getattr__(name: str) -> object:
    """Import a public name from its module when it is first asked for."""
    if name not in _HOME:
        raise AttributeError(f"module 'minrl' has no attribute {name!r}")
    value = getattr(importlib.import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """List the public names, imported yet or not."""
    return sorted(set(globals()) | set(__all__))
