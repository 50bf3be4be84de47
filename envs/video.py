"""Recording an episode to a video file, offscreen."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from minrl.envs.evaluation import Evaluation
from minrl.envs.lanes import Lanes
from minrl.envs.make import make_limited_env
from minrl.envs.rollout import Policy, play_episodes, whole_number
from minrl.errors import EnvError

if TYPE_CHECKING:
    import gymnasium

_PROBE_SECONDS = 60
_PROBE = """
import importlib, sys, mujoco
context = importlib.import_module("mujoco." + sys.argv[1]).GLContext(64, 64)
context.make_current()
model = mujoco.MjModel.from_xml_string("<mujoco/>")
mujoco.MjrContext(model, mujoco.mjtFontScale.mjFONTSCALE_150)
"""


def _probe_gl(backend: str) -> str | None:
    """Try a MuJoCo rendering backend in a process of its own; return what went wrong, if any.

    In a subprocess, because a backend that fails can hang or crash, and the choice is final for a
    process once OpenGL has been imported in it.
    """
    environment = {**os.environ, "MUJOCO_GL": backend}
    command = [sys.executable, "-c", _PROBE, backend]
    try:
        result = subprocess.run(  # noqa: S603  our own program, no shell
            command, env=environment, capture_output=True, text=True, timeout=_PROBE_SECONDS
        )
    except subprocess.TimeoutExpired:
        return f"no answer in {_PROBE_SECONDS} s"
    if result.returncode == 0:
        return None
    return (result.stderr.strip().splitlines() or [f"exit status {result.returncode}"])[-1]


def choose_gl() -> str:
    """Choose how MuJoCo renders without a display, and return the name of the backend.

    A ``MUJOCO_GL`` that the user has set is respected. Else the first of EGL and OSMesa that works
    is written to ``MUJOCO_GL``, for the rest of the process; Windows and macOS need no choice.

    Raises:
        EnvError: If nothing works; the message says what to install.
    """
    wanted = os.environ.get("MUJOCO_GL", "").strip().lower()
    if not wanted and sys.platform != "linux":
        return "glfw"
    failures = {}
    for backend in [wanted] if wanted else ["egl", "osmesa"]:
        failures[backend] = _probe_gl(backend)
        if failures[backend] is None:
            os.environ["MUJOCO_GL"] = backend
            return backend
    details = "; ".join(f"{backend}: {reason}" for backend, reason in failures.items())
    advice = (
        f"MUJOCO_GL is set to {wanted!r}: unset it to let minrl choose, or install what it needs"
        if wanted
        else "install one, for example with: apt-get install libegl1 libgl1-mesa-dri "
        "(or libosmesa6)"
    )
    raise EnvError(f"no offscreen OpenGL to render with ({details}). {advice}")


class _FilmedEnvironment:
    """An environment that keeps every n-th frame of what is played in it."""

    def __init__(self, environment: Any, stride: int) -> None:
        self.frames: list[np.ndarray] = []  # (height, width, 3) uint8 each
        self.observation_space = environment.observation_space
        self.action_space = environment.action_space
        self._environment, self._stride, self._count = environment, stride, 0

    def reset(self, **kwargs: Any) -> Any:
        result = self._environment.reset(**kwargs)
        self._film()
        return result

    def step(self, action: np.ndarray) -> Any:
        result = self._environment.step(action)
        self._film()
        return result

    def _film(self) -> None:
        if self._count % self._stride == 0:
            self.frames.append(self._environment.render())
        self._count += 1


def _write_mp4(path: Path, frames: list[np.ndarray], fps: float) -> None:
    import imageio_ffmpeg

    height, width, _ = frames[0].shape
    writer = imageio_ffmpeg.write_frames(
        str(path), (width, height), fps=fps, macro_block_size=2, ffmpeg_log_level="error"
    )
    writer.send(None)
    for frame in frames:
        writer.send(np.ascontiguousarray(frame))
    writer.close()


def _write_gif(path: Path, frames: list[np.ndarray], fps: float) -> None:
    from PIL import Image

    first, *others = (Image.fromarray(frame).quantize(colors=64) for frame in frames)
    milliseconds = round(1000 / fps)
    first.save(path, save_all=True, append_images=others, duration=milliseconds, loop=0)


def choose_writer(path: Path) -> Callable[[Path, list[np.ndarray], float], None]:
    """Return what writes (path, frames, frames a second) to a file of this name.

    Raises:
        EnvError: If it is neither .mp4 nor .gif, or a library is missing.
    """
    if path.suffix.lower() == ".gif":
        return _write_gif
    if path.suffix.lower() != ".mp4":
        raise EnvError(f"cannot record a video to {str(path)!r}: the name must end in .mp4 or .gif")
    if importlib.util.find_spec("imageio_ffmpeg") is None:
        raise EnvError(
            f"writing {str(path)!r} needs imageio-ffmpeg: pip install imageio-ffmpeg, or record to "
            "a .gif"
        )
    return _write_mp4


def check_video(path: Path, environment_id: str) -> None:
    """Refuse what :func:`record_video` could not do, as far as that shows before a frame is drawn.

    Raises:
        EnvError: As :func:`record_video`, or if the file cannot be written there.
    """
    choose_writer(path)
    _make_filmable(environment_id).close()
    if path.is_dir():
        raise EnvError(f"cannot record a video to {str(path)!r}: it is a folder")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise EnvError(f"cannot record a video to {str(path)!r}: {error.strerror}") from error


def _make_filmable(environment_id: str, max_episode_steps: int | None = None) -> gymnasium.Env:
    environment = make_limited_env(environment_id, max_episode_steps, render=True)
    try:
        if hasattr(environment.unwrapped, "mujoco_renderer"):
            choose_gl()
            # On a CPU these two cost four fifths of a frame's time and hardly show.
            quality = environment.unwrapped.model.vis.quality
            quality.offsamples, quality.shadowsize = 0, 512
    except BaseException:
        environment.close()
        raise
    return environment


def record_video(
    agent: Policy,
    environment_id: str,
    path: str | Path,
    *,
    target_return: float | None = None,
    seed: int = 0,
    max_episode_steps: int | None = None,
    fps: float = 30.0,
) -> Evaluation:
    """Film one episode offscreen, at natural speed, and return what it earned.

    It is episode 0 of ``minrl.envs.rollout.evaluate`` with the same seed.

    Args:
        agent: See ``minrl.envs.rollout.Policy``.
        environment_id: Id such as ``Hopper-v5``.
        path: File to write, ``.mp4`` (needs the extra ``video``) or ``.gif``; replaced if it
            exists.
        target_return: Return to ask the agent for, in reward units.
        seed: Non-negative seed of the episode.
        max_episode_steps: Truncate the episode here; None keeps the environment's own limit.
        fps: Frames per second aimed at; frames are left out to get near it.

    Raises:
        ConfigError: If the seed is negative.
        EnvError: If the kind of file is unknown or its writer is not installed, the environment has
            no frames or nothing renders them offscreen (the message says what to install), or as
            ``minrl.envs.rollout.evaluate``.
    """
    seed = whole_number("seed", seed, 0)
    path = Path(path)
    write = choose_writer(path)
    with closing(_make_filmable(environment_id, max_episode_steps)) as environment:
        native_fps = environment.metadata.get("render_fps", fps)
        stride = max(1, round(native_fps / fps))
        filmed = _FilmedEnvironment(environment, stride)
        lanes = Lanes([filmed], environment_id, episodes=1, seed=seed)
        result = play_episodes(agent, lanes, episodes=1, target_return=target_return, seed=seed)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.stem}.partial{path.suffix}")
    try:
        write(partial, filmed.frames, native_fps / stride)
        os.replace(partial, path)
    finally:
        partial.unlink(missing_ok=True)
    return result
