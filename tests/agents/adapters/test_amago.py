"""With AMAGO itself, which wants gymnasium below 1.0: an environment of its own."""

import importlib
import itertools
import warnings

import gymnasium
import numpy as np
import pytest
import torch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # AMAGO imports gym, and says that it lacks FlashAttention
    amago = pytest.importorskip("amago")

import gin
from amago import cli_utils
from amago.envs import AMAGOEnv
from amago.loading import DiskTrajDataset
from amago.nets.traj_encoders import TrajEncoder, get_traj_encoder_cls
from amago.nets.tstep_encoders import FFTstepEncoder

import minrl.agents.adapters.amago as adapter
import minrl.envs.recall  # noqa: F401 - registers the environment
from minrl.errors import AdapterError

pytestmark = [
    # AMAGO reads env_name through its wrappers, and pins memory with or without a GPU.
    pytest.mark.filterwarnings("ignore:.*env.env_name to get variables:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*pin_memory:UserWarning"),
]

B, T, F, D = 4, 9, 6, 16
CPU = torch.device("cpu")


@pytest.fixture(params=["mingru", "minlstm"])
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def _fresh_gin():
    yield
    gin.clear_config()


def make_encoder(name, **options):
    """An encoder as AMAGO makes it, its learned initial state away from zero."""
    torch.manual_seed(0)
    encoder = get_traj_encoder_cls(name)(
        tstep_dim=F, max_seq_len=T, memory_size=D, n_layers=2, **options
    )
    with torch.no_grad():
        for parameter in encoder.parameters():
            parameter.add_(0.3 * torch.randn_like(parameter))
    return encoder.eval()


def act(encoder, seq, dones):
    """Step as AMAGO's interact does: dones[t] (B,) are reported after step t, before step t + 1."""
    hidden, outputs = encoder.init_hidden_state(len(seq), CPU), []
    for step in range(seq.shape[1]):
        times = torch.full((len(seq), 1, 1), step)
        with torch.no_grad():
            output, hidden = encoder(seq[:, step : step + 1], time_idxs=times, hidden_state=hidden)
        hidden = encoder.reset_hidden_state(hidden, dones[step])
        outputs.append(output)
    return torch.cat(outputs, 1), hidden


@pytest.mark.parametrize("options", [{}, {"convolution": 4, "expansion": 2}])
def test_stepwise_equals_sequence(name, options):
    encoder, seq = make_encoder(name, **options), torch.randn(B, T, F)
    output, hidden = encoder(seq, time_idxs=torch.arange(T).view(1, T, 1).expand(B, T, 1))
    assert hidden is None
    assert isinstance(encoder, TrajEncoder)
    assert output.shape == (B, T, encoder.emb_dim)
    stepwise, _ = act(encoder, seq, np.zeros((T, B), bool))
    torch.testing.assert_close(stepwise, output)


@pytest.mark.parametrize("options", [{}, {"convolution": 4}])
def test_episode_after_a_done_equals_one_on_its_own(name, options):
    encoder, seq = make_encoder(name, **options), torch.randn(B, T, F)
    dones = np.zeros((T, B), bool)
    dones[2, 0] = dones[5, 1] = dones[0, 2] = dones[4, 2] = True
    stepwise, _ = act(encoder, seq, dones)
    for row in range(B):
        ends = [0, *(np.flatnonzero(dones[:, row]) + 1), T]
        episodes = [seq[row : row + 1, a:b] for a, b in itertools.pairwise(ends)]
        alone = torch.cat([encoder(episode)[0] for episode in episodes], 1)
        torch.testing.assert_close(stepwise[row], alone[0])


def test_reset_rows_equal_fresh_rows_and_others_stay(name):
    encoder = make_encoder(name, convolution=3)
    dones = np.array([True, False, True, False])
    _, before = act(encoder, torch.randn(B, T, F), np.zeros((T, B), bool))
    kept = [part.clone() for part in before]
    after, fresh = encoder.reset_hidden_state(before, dones), encoder.init_hidden_state(B, CPU)
    for old, new, start in zip(kept, after, fresh, strict=True):
        torch.testing.assert_close(new[dones], start[dones], rtol=0, atol=0)
        torch.testing.assert_close(new[~dones], old[~dones], rtol=0, atol=0)
        assert not torch.equal(old[dones], start[dones])
        assert not new.requires_grad
    assert encoder.reset_hidden_state(None, dones) is None


def test_every_parameter_is_trained(name):
    encoder = make_encoder(name).train()
    encoder(torch.randn(B, T, F))[0].square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in encoder.parameters())


def test_amagos_own_switch_sets_the_sizes(name):
    config = {}
    encoder = cli_utils.switch_traj_encoder(
        config, arch=name, memory_size=24, layers=1, mlp_ratio=2
    )
    cli_utils.use_config(config, finalize=False)
    model = encoder(tstep_dim=F, max_seq_len=T)
    assert model.emb_dim == 24
    assert len(model.backbone.blocks) == 1
    assert model.backbone.blocks[0].mlp[0].out_features == 48


def test_another_interface_is_refused_by_name(monkeypatch):
    def forward(self, seq, hidden_state):
        """Lack two arguments."""

    monkeypatch.setattr(TrajEncoder, "forward", forward)
    with pytest.raises(AdapterError, match=r"amago .*forward.*known to work: 3\.3"):
        importlib.reload(adapter)


@pytest.mark.skipif(
    int(gymnasium.__version__.split(".")[0]) > 0, reason="AMAGO itself wants gymnasium below 1.0"
)
def test_amago_collects_trains_and_evaluates(name, tmp_path):
    def make_environment():
        environment = gymnasium.make(
            "minrl/Recall-v0", length=3, cues=2, disable_env_checker=True
        )  # gymnasium 0.29's checker does not know numpy 2
        return AMAGOEnv(environment, env_name="recall")

    config = {}
    encoder = cli_utils.switch_traj_encoder(config, arch=name, memory_size=16, layers=1)
    agent = cli_utils.switch_agent(config, "agent")
    cli_utils.use_config(config, finalize=False)
    experiment = amago.Experiment(
        run_name="test",
        ckpt_base_dir=str(tmp_path),
        max_seq_len=5,
        traj_save_len=5,
        dataset=DiskTrajDataset(str(tmp_path), "recall", dset_max_size=500),
        tstep_encoder_type=FFTstepEncoder,
        traj_encoder_type=encoder,
        agent_type=agent,
        make_train_env=make_environment,
        make_val_env=make_environment,
        parallel_actors=2,
        env_mode="sync",
        epochs=1,
        train_timesteps_per_epoch=50,
        train_batches_per_epoch=3,
        val_interval=1,
        val_timesteps_per_epoch=20,
        batch_size=4,
        dloader_workers=0,
        verbose=False,
    )
    with torch.compiler.set_stance("force_eager"):  # compiling would take longer than the run
        experiment.start()
        before = {
            key: value.clone() for key, value in experiment.policy.traj_encoder.state_dict().items()
        }
        experiment.learn()
        experiment.evaluate_test(make_environment, timesteps=20)
    after = experiment.policy.traj_encoder.state_dict()
    assert all(not torch.equal(after[key], before[key]) for key in before)
    assert [part.shape for part in experiment.hidden_state] == [(2, 16)]
