"""Videos hold the episode that evaluation plays; what is missing is said in words."""

import imageio_ffmpeg
import numpy as np
import pytest
from PIL import Image

from minrl.envs import video
from minrl.envs.rollout import evaluate
from minrl.envs.video import choose_gl, record_video
from minrl.errors import EnvError


class Still:
    def reset(self, mask=None, *, target_return=None, num_envs=None):
        self.batch = num_envs or self.batch

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
