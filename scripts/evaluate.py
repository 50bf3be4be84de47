"""``minrl evaluate``: a trained run in its environment, every target, last and best checkpoint."""

import errno
import re
import warnings
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from tqdm.auto import tqdm

from minrl.agents.decision_agent import DecisionAgent
from minrl.envs.evaluation import Evaluation, format_return
from minrl.envs.make import make_limited_env
from minrl.envs.rollout import evaluate
from minrl.envs.video import check_video, record_video
from minrl.errors import CheckpointError, ConfigError, EvaluationError
from minrl.scripts.plots import plot_target_vs_return
from minrl.scripts.run_folder import RunFolder

SWEEP_TARGETS, SWEEP_EPISODES = 6, 10
CHECKPOINT_CHOICES = ("both", "last", "best")


@dataclass(frozen=True)
class EvaluateConfig:
    """What to evaluate, and how."""

    episodes: int = 100
    """For each target and checkpoint."""
    targets: tuple[float, ...] = ()
    """Returns to ask for; by default those of the run."""
    checkpoint: str = "both"
    """last, best or both. Best is the one with the highest return at the first target while
    training, on other start states than these."""
    environment: str | None = None
    """Gymnasium id; by default the one the run was trained for."""
    seed: int | None = None
    """Of the start states, by default that of the run's final evaluation; the same seed gives the
    same numbers."""
    num_envs: int | None = None
    """Environments stepped together."""
    num_workers: int = 0
    """Processes that hold the environments, so that one which crashes or hangs takes nothing with
    it; 0 for this process. The numbers are the same."""
    timeout: float = 60.0
    """Seconds that a worker may take for one step of its environments."""
    refresh_every: int | None = None
    """Rebuild the recurrent state from the last context steps this often: 0 never, 1 at every step
    (windowed acting); by default as the run was trained to."""
    device: str = "cpu"
    """cpu, cuda ..."""

    def check(self) -> None:
        """Refuse what is impossible.

        Raises:
            ConfigError: Names the field and what is allowed.
        """
        if self.checkpoint not in CHECKPOINT_CHOICES:
            allowed = ", ".join(CHECKPOINT_CHOICES)
            raise ConfigError(f"checkpoint must be one of {allowed}, not {self.checkpoint!r}")
        if self.episodes < 1:
            raise ConfigError(f"episodes must be at least 1, not {self.episodes}")
        for name, least in (("seed", 0), ("num_envs", 1), ("num_workers", 0), ("refresh_every", 0)):
            given = getattr(self, name)
            if given is not None and given < least:
                raise ConfigError(f"{name.replace('_', '-')} must be at least {least}, not {given}")
        if not self.timeout > 0:
            raise ConfigError(f"timeout must be above 0 seconds, not {self.timeout}")


def evaluate_command(run: Path, /, config: EvaluateConfig, video: Path | None = None) -> None:
    """Evaluate a trained run: returns and normalised scores of its last and best checkpoints.

    Args:
        run: Folder of the run.
        config: What and how.
        video: Write one episode at the first target to this .mp4 or .gif file.
    """
    if video is None:
        evaluate_run(run, config)
        return
    config.check()
    name = "best" if config.checkpoint == "best" else "last"
    agent, environment = load_agent(run, name, config)
    check_video(video, environment)  # before an evaluation, which may take long
    first, *_ = evaluate_run(run, config)
    target = config.targets[0] if config.targets else agent.target_return
    record_video(agent, environment, video, target_return=target, seed=first.seed)
    print(f"video of one episode of the {name} checkpoint at target {target:g}: {video}")


def evaluate_run(run: Path | str, config: EvaluateConfig = EvaluateConfig()) -> list[Evaluation]:
    """Evaluate checkpoints of a run, print the table, and append to evaluations.jsonl.

    Raises:
        ConfigError: If a value is impossible or the environment is of other sizes.
        CheckpointError: If there is no sound checkpoint.
        EvaluationError: If the environment fails; what was finished until then is printed.
    """
    config.check()
    folder = RunFolder(run)
    trained = folder.read_config()
    targets = config.targets or trained.targets
    if not targets:
        raise ConfigError(f"{run} does not say what it was asked for: give --targets")
    seed = trained.final_seed if config.seed is None else config.seed
    names = ("last", "best") if config.checkpoint == "both" else (config.checkpoint,)
    agents = {name: load_agent(run, name, config) for name in names}
    evaluations, shown = [], {}
    print(TABLE_HEAD)
    for name, (agent, environment_id) in agents.items():
        step = agent.info["step"]
        if step in shown:
            print(f"{name:<5} {step:>7}  the same checkpoint as {shown[step]}")
            continue
        shown[step] = name
        for target in targets:
            evaluation = _evaluate(agent, environment_id, target, seed, config, name)
            print(table_row(name, step, evaluation))
            evaluations.append(evaluation)
            line = {"checkpoint": name, "step": step, "refresh_every": agent.refresh_every}
            try:
                folder.append_evaluation(line | evaluation.to_dict())
            except OSError as error:
                if error.errno not in (errno.EACCES, errno.EROFS):
                    raise
                warnings.warn(f"not written down: {error}", stacklevel=2)  # another user's run
    agent, environment_id = agents[names[0]]
    scale = "no reference scores are known"
    if evaluations[0].normalized is not None:
        note = agent.info["dataset"].get("score_note") or "the data does not say of what"
        scale = f"score in percent: {note}"
    print(f"{config.episodes} episodes each in {environment_id}, seed {seed}; {scale}")
    return evaluations


def _evaluate(
    agent: DecisionAgent,
    environment_id: str,
    target: float,
    seed: int,
    config: EvaluateConfig,
    name: str,
) -> Evaluation:
    """Evaluate at one target behind a progress bar; if that fails, print what was finished."""
    with tqdm(total=config.episodes, unit="episode", desc=f"{name} {target:g}", leave=False) as bar:
        try:
            return evaluate(
                agent,
                environment_id,
                episodes=config.episodes,
                target_return=target,
                seed=seed,
                num_envs=config.num_envs,
                num_workers=config.num_workers,
                timeout=config.timeout,
                references=agent.references,
                on_episode=lambda *_: bar.update(),
            )
        except EvaluationError as error:
            for episode, (total, length) in error.finished.items():
                print(f"finished: episode {episode}, return {total:.1f}, {length} steps")
            raise


def load_agent(
    run: Path | str, checkpoint: str, config: EvaluateConfig
) -> tuple[DecisionAgent, str]:
    """Load an agent and name the environment to run it in.

    Raises:
        ConfigError: If there is no environment, or it has other sizes than the agent.
        CheckpointError: If there is no sound checkpoint, or it is not that of a run.
    """
    if not Path(run).is_dir():
        raise ConfigError(f"{run} is not the folder of a run")
    agent = DecisionAgent.load(run, checkpoint=checkpoint, device=config.device)
    if missing := {"step", "environment", "dataset"} - agent.info.keys():
        raise CheckpointError(f"the {checkpoint} checkpoint of {run} has no {min(missing)}")
    if config.refresh_every is not None:
        agent.refresh_every = config.refresh_every
    trained_for = agent.info["environment"]
    environment = config.environment or trained_for
    if environment is None:
        raise ConfigError("the data of this run names no environment: give --environment")
    sizes = agent.model.observation_size, agent.model.action_size
    check_environment(environment, sizes, trained_for, "this checkpoint")
    return agent, environment


def check_environment(name: str, sizes: tuple[int, int], belongs_to: str | None, what: str) -> None:
    """Refuse an environment that data or a checkpoint does not belong to.

    Args:
        name: Gymnasium id.
        sizes: Of observations and actions in the data or checkpoint.
        belongs_to: The environment it is from, if known; another version of it will do.
        what: "the data" or "this checkpoint".

    Raises:
        EnvError: If there is no such environment, it is not supported, or has no time limit.
        ConfigError: If it is another one.
    """
    environment = make_limited_env(name)
    found = environment.observation_space.shape[0], environment.action_space.shape[0]
    environment.close()
    other = belongs_to is not None and _without_version(name) != _without_version(belongs_to)
    if other or found != sizes:
        raise ConfigError(
            f"{what} is from {belongs_to or 'elsewhere'} ({sizes[0]} observations, {sizes[1]} "
            f"actions), not from {name} ({found[0]} and {found[1]}); another version of the same "
            "environment will do, no other"
        )


def _without_version(environment_id: str) -> str:
    return re.sub(r"-v\d+$", "", environment_id)


def plot_asked_against_got(run: Path | str, *, lowest: float) -> None:
    """Ask the last checkpoint for returns from ``lowest`` to its target; draw what it gets."""
    agent, environment = load_agent(run, "last", EvaluateConfig())
    seed = RunFolder(run).read_config().final_seed
    targets = np.linspace(lowest, agent.target_return, SWEEP_TARGETS)
    evaluations = [
        evaluate(agent, environment, episodes=SWEEP_EPISODES, target_return=target, seed=seed)
        for target in tqdm(targets, unit="target", desc="asked against got", leave=False)
    ]
    title = f"{agent.model.config.backbone} on {agent.info['dataset']['dataset_id']}"
    plot_target_vs_return(evaluations, title, Path(run) / "target_vs_return.png")


TABLE_HEAD = (
    f"{'':<5} {'step':>7} {'target':>8} {'return':>16} {'95 % interval':>18} {'length':>7} "
    f"{'score':>14}"
)


def table_row(name: str, step: int, evaluation: Evaluation) -> str:
    """Return one line of the table."""
    returns, interval, score = format_return(evaluation.return_mean), "-", "-"
    spread = len(evaluation.returns) > 1
    if spread:
        low, high = evaluation.interval_95
        returns = f"{returns} ± {format_return(evaluation.return_std)}"
        interval = f"{format_return(low)} to {format_return(high)}"
    if normalized := evaluation.normalized:
        score = f"{normalized['mean']:.1f}" + (f" ± {normalized['std']:.1f}" if spread else "")
    return (
        f"{name:<5} {step:>7} {evaluation.target_return:>8g} {returns:>16} {interval:>18} "
        f"{evaluation.length_mean:>7.0f} {score:>14}"
    )
