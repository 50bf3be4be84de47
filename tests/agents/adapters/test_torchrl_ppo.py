"""TorchRL's own recurrent PPO around our cores, on Recall."""

import functools

import pytest
import torch

pytest.importorskip("torchrl")

from tensordict.nn import TensorDictModule, TensorDictSequential
from torchrl.envs import GymEnv, SerialEnv, TransformedEnv
from torchrl.modules import MLP, OneHotCategorical, ProbabilisticActor, set_recurrent_mode
from torchrl.modules.utils import get_env_transforms_from_module
from torchrl.objectives import ClipPPOLoss
from torchrl.objectives.value import GAE

import minrl.envs.recall  # noqa: F401 - registers the environment
from minrl.agents.adapters.torchrl import BackboneModule, MinGRUModule, MinLSTMModule
from minrl.agents.backbones.blocks import Backbone

# torchrl.collectors warns, when it is imported, of a deprecated class that it defines itself.
pytestmark = pytest.mark.filterwarnings("ignore:Creating .*WeightUpdater:DeprecationWarning")

STATE, NEXT_STATE = "recurrent_state", ("next", "recurrent_state")


class Learner:
    """TorchRL's recurrent PPO on Recall: actor and critic on one core, its collector and losses."""

    def __init__(
        self, recurrent, *, environments=8, steps=24, total=-1, cues=4, length=4, width=32
    ):
        from torchrl.collectors import Collector

        core = self.core = recurrent(cues + 1, width, in_key="observation", out_key="embedding")
        policy = MLP(in_features=width, out_features=cues, num_cells=[])
        value = MLP(in_features=width, out_features=1, num_cells=[])
        self.actor = ProbabilisticActor(
            TensorDictSequential(core, TensorDictModule(policy, ["embedding"], ["logits"])),
            in_keys=["logits"],
            distribution_class=OneHotCategorical,
            return_log_prob=True,
        )
        self.critic = TensorDictSequential(
            core, TensorDictModule(value, ["embedding"], ["state_value"])
        )
        make = functools.partial(GymEnv, "minrl/Recall-v0", cues=cues, length=length)
        self.environment = TransformedEnv(
            SerialEnv(environments, make), get_env_transforms_from_module(self.actor)
        )
        self.environment.set_seed(0)
        self.collector = Collector(
            self.environment,
            self.actor,
            frames_per_batch=environments * steps,
            total_frames=total * environments * steps,
        )
        self.advantage = GAE(
            gamma=0.95,
            lmbda=0.95,
            average_gae=True,
            value_network=self.critic,
            deactivate_vmap=True,
        )
        self.loss = ClipPPOLoss(self.actor, self.critic, entropy_coeff=0.01, critic_coeff=0.5)
        self.optimiser = torch.optim.Adam(self.loss.parameters(), lr=1e-2)

    def learn(self, batch, epochs):
        """Update on a batch; return the fraction of right answers in it."""
        for _ in range(epochs):
            with set_recurrent_mode(True):  # losses set it themselves, advantages do not
                self.advantage(batch)
            losses = self.loss(batch)
            total = sum(loss for key, loss in losses.items() if key.startswith("loss_"))
            self.optimiser.zero_grad()
            total.backward()
            torch.nn.utils.clip_grad_norm_(self.loss.parameters(), 0.5)
            self.optimiser.step()
        ends = batch["next", "done"]
        return (batch["next", "reward"].sum() / ends.sum()).item()


def _learned(*sizes, **keys):
    module = MinGRUModule(*sizes, learn_initial_state=True, **keys)
    torch.nn.init.normal_(module.gru.bias_h0)
    return module


def _backbone(features, width, **keys):
    """A Backbone has the width of its input: the observation's, here."""
    return BackboneModule(Backbone(features, 2, convolution=3), **keys)


RECURRENT = {
    "mingru": (lambda *sizes, **keys: MinGRUModule(*sizes, 2, **keys), (2, 32)),
    "minlstm": (MinLSTMModule, (1, 32)),
    "learned initial state": (_learned, (1, 32)),
    "backbone": (_backbone, (2 * (5 + 2 * 5),)),
}


@pytest.mark.parametrize("kind", RECURRENT)
def test_state_is_in_resets_and_carries_over_in_a_rollout(kind):
    recurrent, state_shape = RECURRENT[kind]
    learner = Learner(recurrent, length=3, width=5 if kind == "backbone" else 32)
    environment = learner.environment
    assert environment.reset()[STATE].shape == (8, *state_shape)
    rollout = environment.rollout(12, learner.actor, break_when_any_done=False)
    starts = rollout["is_init"].squeeze(-1)
    assert starts.nonzero()[:, 1].unique().tolist() == [0, 5, 10]
    assert not rollout[STATE][starts].any()
    later = ~starts[:, 1:]
    torch.testing.assert_close(
        rollout[STATE][:, 1:][later], rollout[NEXT_STATE][:, :-1][later], rtol=0, atol=0
    )
    assert rollout[STATE][:, 1:][later].flatten(1).any(1).all()
    with set_recurrent_mode(True):
        result = learner.core(rollout.copy())
    torch.testing.assert_close(result["embedding"], rollout["embedding"])


@pytest.mark.parametrize("shifted", [False, True])
def test_value_of_the_next_step_is_the_next_value(shifted):
    """TorchRL's advantage hands on its own states and starts: neither is lost or a step late."""
    learner = Learner(MinGRUModule, length=3)
    batch = next(iter(learner.collector))
    options = {"value_network": learner.critic, "deactivate_vmap": True, "shifted": shifted}
    with set_recurrent_mode(True):
        GAE(gamma=0.9, lmbda=0.9, **options)(batch)
    with torch.no_grad():
        stepwise = learner.critic(batch.select("observation", "is_init", STATE))["state_value"]
    torch.testing.assert_close(batch["state_value"], stepwise)
    later = ~batch["next", "done"][:, :-1]
    torch.testing.assert_close(batch["next", "state_value"][:, :-1][later], stepwise[:, 1:][later])


@pytest.mark.parametrize("recurrent", [MinGRUModule, MinLSTMModule])
def test_one_update_of_ppo_reaches_every_parameter(recurrent):
    learner = Learner(recurrent)
    before = [parameter.detach().clone() for parameter in learner.loss.parameters()]
    learner.learn(next(iter(learner.collector)), epochs=1)
    for old, new in zip(before, learner.loss.parameters(), strict=True):
        assert new.grad.abs().sum() > 0
        assert not torch.equal(old, new)


@pytest.mark.slow
@pytest.mark.parametrize("recurrent", [MinGRUModule, MinLSTMModule])
def test_ppo_learns_to_remember(recurrent):
    torch.manual_seed(0)
    learner = Learner(recurrent, environments=16, steps=30, total=80)
    right = [learner.learn(batch, epochs=8) for batch in learner.collector]
    assert sum(right[-10:]) / 10 > 0.8  # chance: 0.25
