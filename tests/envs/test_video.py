"""Videos hold the episode that evaluation plays; what is missing is said in words."""

import gymnasium
import imageio_ffmpeg
import numpy as np
import pytest
from gymnasium.envs.registration import EnvSpec
from gymnasium.spaces import Box
from PIL import Image

from minrl.envs import video
from minrl.envs.rollout import evaluate
from minrl.envs.video import check_video, choose_gl, record_video
from minrl.errors import ConfigError, EnvError


class Still:
    def reset(self, mask=None, *, target_return=None, num_envs=None):
        self.batch, self.target_return = num_envs or self.batch, target_return

    def act(self, observations, rewards=None):
        return np.zeros((self.batch, 3))


@pytest.fixture(scope="session")
def offscreen_gl():
    try:
        return choose_gl()
    except EnvError as error:
        pytest.skip(str(error))


def test_gif_and_mp4_show_the_episode_of_the_evaluation(offscreen_gl, tmp_path):
    expected = evaluate(Still(), "Hopper-v5", episodes=1, seed=9, max_episode_steps=13)
    for name in ("episode.gif", "new/episode.mp4"):
        result = record_video(
            Still(), "Hopper-v5", tmp_path / name, seed=9, max_episode_steps=13, fps=25
        )
        np.testing.assert_array_equal(result.returns, expected.returns)
    with Image.open(tmp_path / "episode.gif") as gif:
        assert gif.n_frames == 3  # 14 frames at 125 per second, every fifth
        assert gif.info["duration"] == 40
        first = np.asarray(gif.convert("RGB"))
    assert first.std() > 20  # a picture, not a blank
    frames, seconds = imageio_ffmpeg.count_frames_and_secs(str(tmp_path / "new" / "episode.mp4"))
    assert frames == 3
    assert seconds == pytest.approx(3 / 25, abs=0.02)
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["episode.mp4"]


class Dark(gymnasium.Env):
    """An environment that needs no OpenGL; its rewards are drawn."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 30}  # noqa: RUF012
    observation_space, action_space = Box(-1.0, 1.0, (2,)), Box(-1.0, 1.0, (3,))

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), self.np_random.normal(), False, False, {}

    def render(self):
        return np.zeros((16, 16, 3), np.uint8)


def test_the_episode_is_of_the_seed_and_asked_for_the_target(tmp_path, monkeypatch):
    spec = EnvSpec("Dark-v0", Dark, max_episode_steps=4)
    monkeypatch.setitem(gymnasium.registry, "Dark-v0", spec)
    expected, agent = evaluate(Still(), "Dark-v0", episodes=1, seed=9), Still()
    path = tmp_path / "episode.gif"
    result = record_video(agent, "Dark-v0", path, target_return=700.0, seed=9)
    assert agent.target_return == result.target_return == 700.0
    assert (result.seed, result.returns.tolist()) == (9, expected.returns.tolist())
    other = record_video(agent, "Dark-v0", path, max_episode_steps=2)
    assert (agent.target_return, other.seed, other.lengths.tolist()) == (None, 0, [2])


@pytest.mark.filterwarnings("ignore:.*render_modes")
def test_an_environment_without_frames_is_refused(tmp_path, monkeypatch):
    spec = EnvSpec("Dark-v0", Dark, max_episode_steps=4)
    monkeypatch.setitem(gymnasium.registry, "Dark-v0", spec)
    for refuse in (
        lambda path: check_video(path, "Dark-v0"),
        lambda path: record_video(Still(), "Dark-v0", path),
    ):
        for modes in ([], None):
            monkeypatch.setitem(Dark.metadata, "render_modes", modes)
            with pytest.raises(EnvError, match="'Dark-v0' cannot be filmed: its metadata names no"):
                refuse(tmp_path / "film.gif")


def test_a_place_that_cannot_be_written_to_is_refused_before_a_frame_is_drawn(
    tmp_path, monkeypatch
):
    spec = EnvSpec("Dark-v0", Dark, max_episode_steps=4)
    monkeypatch.setitem(gymnasium.registry, "Dark-v0", spec)
    folder, file = tmp_path / "folder.gif", tmp_path / "file"
    folder.mkdir()
    file.touch()
    with pytest.raises(EnvError, match=r"folder\.gif': it is a folder"):
        check_video(folder, "Dark-v0")
    with pytest.raises(EnvError, match=r"file/film\.gif': File exists"):
        check_video(file / "film.gif", "Dark-v0")
    check_video(tmp_path / "new" / "film.gif", "Dark-v0")


def test_failed_recording_leaves_the_old_file(offscreen_gl, tmp_path, monkeypatch):
    path = tmp_path / "old.gif"
    path.write_bytes(b"old")

    def fail(path, frames, fps):
        path.write_bytes(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(video, "_write_gif", fail)
    with pytest.raises(OSError, match="disk full"):
        record_video(Still(), "Hopper-v5", path, max_episode_steps=2)
    assert [(file.name, file.read_bytes()) for file in tmp_path.iterdir()] == [("old.gif", b"old")]


def test_a_negative_seed_is_named(tmp_path):
    with pytest.raises(ConfigError, match="seed must be at least 0, not -1"):
        record_video(Still(), "Hopper-v5", tmp_path / "film.gif", seed=-1)


def test_unknown_kind_of_file_is_named(tmp_path):
    with pytest.raises(EnvError, match=r"episode\.avi'.*\.mp4 or \.gif"):
        record_video(Still(), "Hopper-v5", tmp_path / "episode.avi")


def test_a_backend_of_the_user_s_that_fails_is_named(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "nonsense")
    with pytest.raises(EnvError, match=r"no offscreen OpenGL.*nonsense.*unset it"):
        choose_gl()


def test_without_any_backend_the_packages_to_install_are_named(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    monkeypatch.setattr(video.sys, "platform", "linux")
    # An impossible platform of PyOpenGL makes both backends fail for real.
    monkeypatch.setenv("PYOPENGL_PLATFORM", "nonsense")
    with pytest.raises(EnvError, match=r"egl: .*osmesa: .*libegl1.*libosmesa6"):
        choose_gl()


def test_a_hanging_probe_ends(monkeypatch):
    monkeypatch.setattr(video, "_PROBE", "import time; time.sleep(60)")
    monkeypatch.setattr(video, "_PROBE_SECONDS", 0.5)
    assert video._probe_gl("egl") == "no answer in 0.5 s"
