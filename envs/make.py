"""Making Gymnasium environments: quiet ones, with errors that say what to do."""

from __future__ import annotations

import contextlib
import difflib
import warnings
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

import numpy as np

from minrl.errors import EnvError

if TYPE_CHECKING:
    import gymnasium
    from gymnasium.envs.registration import EnvSpec

_SUPPORTED = "minrl supports one-dimensional Boxes of observations and of float actions"


@contextlib.contextmanager
def quiet_mujoco() -> Iterator[None]:
    """Silence what MuJoCo and Gymnasium say when old but sound models are made.

    MuJoCo 4 warns that HalfCheetah's ``settotalmass`` is deprecated, on stderr and in a
    ``MUJOCO_LOG.TXT`` in the working folder; with a handler of our own it does neither. Gymnasium
    warns that v4 environments are out of date, but D4RL data belong to them. Any other message of
    MuJoCo comes out as an ordinary Python warning.

    Works on whatever makes an environment inside the ``with`` block, third-party code included.
    """
    messages: list[str] = []
    with warnings.catch_warnings(), contextlib.ExitStack() as stack:
        warnings.filterwarnings("ignore", message=".*is out of date", category=DeprecationWarning)
        with contextlib.suppress(ImportError):  # environments without MuJoCo need none of this
            import mujoco

            previous = mujoco.get_mju_user_warning()
            mujoco.set_mju_user_warning(messages.append)
            stack.callback(mujoco.set_mju_user_warning, previous)
        yield
    for message in messages:
        if "is deprecated" not in message:
            warnings.warn(f"MuJoCo: {message}", RuntimeWarning, stacklevel=3)


def _near_matches(environment_id: str) -> str:
    """Name registered environments whose ids look like this one, newest version first."""
    import gymnasium

    known = {identifier.lower(): identifier for identifier in gymnasium.registry}
    matches = difflib.get_close_matches(environment_id.lower(), known, n=4, cutoff=0.6)
    names = sorted((known[match] for match in matches), reverse=True)
    hint = f"did you mean {', '.join(names)}?" if names else "gymnasium.registry has all ids."
    return f"{hint} If it is your own, import its module first: minrl --import MODULE ..."


def find_spec(environment_id: str) -> EnvSpec:
    """Return what an environment is registered as.

    Raises:
        EnvError: If the id is unknown (near matches are named), no text, or names a module to
            import.
    """
    import gymnasium

    if not isinstance(environment_id, str):
        raise EnvError(
            "an environment is named by its Gymnasium id, such as 'Hopper-v5', not by "
            f"{environment_id!r:.80}"
        )
    if ":" in environment_id:
        raise EnvError(
            f"environment id {environment_id!r} names a module to import, which is refused; import "
            "the module that registers the environment yourself (minrl --import MODULE ...) and "
            "give the id after the colon"
        )
    if environment_id not in gymnasium.registry:
        raise EnvError(f"unknown environment {environment_id!r}: {_near_matches(environment_id)}")
    return gymnasium.registry[environment_id]


def make_env(environment_id: str, *, render: bool = False, **kwargs: Any) -> gymnasium.Env:
    """Make a registered environment without warnings, log files or the passive checker.

    Args:
        environment_id: Id such as ``Hopper-v5``. Ids that import a module (``module:Name-v0``) are
            refused, because ids also come from datasets and checkpoints.
        render: Make it able to ``render()`` RGB frames.
        **kwargs: Passed to ``gymnasium.make``, for example ``max_episode_steps``.

    Raises:
        EnvError: If the id is unknown (near matches are named), its simulator is missing, it fails,
            or it has no frames to render.
    """
    import gymnasium

    find_spec(environment_id)
    if render:
        kwargs["render_mode"] = "rgb_array"
    try:
        with quiet_mujoco():
            warnings.filterwarnings("ignore", message=".*not in the possible render_modes")
            environment = gymnasium.make(environment_id, disable_env_checker=True, **kwargs)
    except (gymnasium.error.DependencyNotInstalled, ImportError) as error:
        raise EnvError(
            f"environment {environment_id!r} needs software that is not installed: {error}"
        ) from error
    except gymnasium.error.Error as error:
        raise EnvError(f"environment {environment_id!r} cannot be made: {error}") from error
    except (Exception, SystemExit) as error:  # whatever its own code raises
        raise EnvError(f"environment {environment_id!r} cannot be made: {error!r}") from error
    if render and "rgb_array" not in (environment.metadata.get("render_modes") or ()):
        environment.close()
        raise EnvError(
            f"environment {environment_id!r} cannot be filmed: its metadata names no rgb_array "
            "among its render_modes"
        )
    return environment


def check_spaces(env: gymnasium.Env) -> None:
    """Refuse an environment whose observations or actions the agents cannot handle.

    Raises:
        EnvError: If a space is not a one-dimensional Box (or the action one not of floats); the
            message names the space found and what is supported.
    """
    from gymnasium.spaces import Box

    name = env.spec.id if env.spec is not None else type(env.unwrapped).__name__
    for role, space in (("observation", env.observation_space), ("action", env.action_space)):
        one_dimensional = isinstance(space, Box) and len(space.shape) == 1
        if not one_dimensional or (
            role == "action" and not np.issubdtype(space.dtype, np.floating)
        ):
            kind = type(space).__name__
            if isinstance(space, Box):
                kind = f"Box of shape {space.shape} and type {space.dtype}"
            hint = ""
            if role == "observation":
                hint = ". Wrap it, for example in gymnasium.wrappers.FlattenObservation"
            elif not isinstance(space, Box):
                hint = "; for others take the layers alone (minrl.MinGRU, minrl.Backbone)"
            raise EnvError(
                f"environment {name!r} has an {role} space of kind {kind}; {_SUPPORTED}{hint}"
            )


def make_limited_env(
    environment_id: str, max_episode_steps: int | None = None, *, render: bool = False
) -> gymnasium.Env:
    """Make an environment that agents can act in and whose episodes surely end.

    Raises:
        EnvError: As ``make_env`` and ``check_spaces``, or if neither the environment nor the caller
            limits the length of an episode.
    """
    limit = {} if max_episode_steps is None else {"max_episode_steps": max_episode_steps}
    environment = make_env(environment_id, render=render, **limit)
    try:
        check_spaces(environment)
        if environment.spec is None or environment.spec.max_episode_steps is None:
            raise EnvError(
                f"environment {environment_id!r} has no limit on the length of an episode; "
                "register it with max_episode_steps, or give that where a function takes it"
            )
    except EnvError:
        environment.close()
        raise
    return environment


def make_limited_envs(
    environment_id: str, count: int, max_episode_steps: int | None = None
) -> list[gymnasium.Env]:
    """Make as many as asked for, or none.

    Raises:
        EnvError: As ``make_limited_env``.
    """
    environments: list[gymnasium.Env] = []
    with contextlib.ExitStack() as stack:
        for _ in range(count):
            environments.append(make_limited_env(environment_id, max_episode_steps))
            stack.callback(environments[-1].close)
        stack.pop_all()
    return environments
