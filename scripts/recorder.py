"""What happens beside the training loop: progress, metrics, evaluations, checkpoints."""

import math
import platform
import sys
import time
import warnings
from collections.abc import Sequence

import numpy as np
import torch
from tqdm.auto import tqdm

from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.training import StepReport, Trainer
from minrl.data.episodes import DatasetInfo
from minrl.data.windows import Batch
from minrl.envs.evaluation import Evaluation, format_return
from minrl.envs.rollout import evaluate
from minrl.errors import EvaluationError
from minrl.scripts.machine import device_name
from minrl.scripts.plots import plot_learning_curve
from minrl.scripts.run_folder import Metrics, RunFolder
from minrl.scripts.train_config import TrainConfig


class Recorder:
    """Watches a trainer and writes what it does into a run folder.

    Args:
        run: Where to write.
        metrics: Opened by ``run.metrics()``.
        config: Of the run, complete.
        trainer: What to watch.
        dataset: Goes into every checkpoint.
        held_out: Batches to measure the action error on, if there are any.
        losses: Of the steps since the last line of metrics, if the run is resumed between two; NaN
            for those that were skipped.
    """

    def __init__(
        self,
        run: RunFolder,
        metrics: Metrics,
        config: TrainConfig,
        trainer: Trainer,
        dataset: DatasetInfo,
        held_out: Sequence[Batch],
        losses: Sequence[float] = (),
    ):
        self.run, self.metrics, self.config, self.trainer = run, metrics, config, trainer
        self.dataset, self.held_out, self.losses = dataset, held_out, list(losses)
        self.bar = tqdm(
            total=config.steps,
            initial=trainer.step_count,
            unit="step",
            desc="train",
            mininterval=0.1 if sys.stderr.isatty() else 5.0,  # a log file needs few lines
        )
        self.unread: list[StepReport] = []  # looking at one would wait for its step to be done
        self.shown: dict[str, str] = {}
        self.saved_step = trainer.step_count  # nothing to save yet, or restored from there
        self.steps_timed, self.seconds = 0, 0.0
        self.started = time.perf_counter()

    def after_step(self, report: StepReport) -> None:
        """Log, save and evaluate when it is time."""
        config, step = self.config, self.trainer.step_count
        self.steps_timed += 1
        self.bar.update()
        self.unread.append(report)
        last = step == config.steps
        if step % config.log_every == 0 or last:
            self._log(report)
        if step % config.eval_every == 0 or last:
            self.seconds += time.perf_counter() - self.started
            self.save()  # first, so that nothing in the evaluation can lose the training
            self.evaluate()
            self.started = time.perf_counter()

    def save(self) -> None:
        """Write a checkpoint of this moment."""
        self._read_losses()
        agent = self.agent()
        losses = [loss for loss in self.losses if not math.isnan(loss)]
        state = {
            "trainer": self.trainer.state_dict(),
            "losses": torch.tensor(losses, dtype=torch.float64),
            "skipped": len(self.losses) - len(losses),
            **circumstances(self.trainer),
        }
        weights = agent.model.state_dict()
        self.metrics.sync()  # a resumed run keeps the lines up to its checkpoint
        self.run.checkpoints.save(self.trainer.step_count, weights, agent.header(), state)
        self.saved_step = self.trainer.step_count

    def agent(self) -> DecisionAgent:
        """Return the agent that the weights of this moment make."""
        return make_agent(self.config, self.trainer, self.dataset)

    def close(self) -> None:
        """Save what is not saved yet, and write the table and the picture of all metrics."""
        try:
            if self.trainer.is_between_steps and self.trainer.step_count != self.saved_step:
                self.save()
            self.run.write_csv()
            title = (
                f"{self.config.model.backbone} on {self.dataset.dataset_id}, "
                f"seed {self.config.seed}"
            )
            path = self.run.path / "learning_curve.png"
            plot_learning_curve(self.run.read_metrics(), self.config.targets, title, path)
        finally:  # last: what it prints to may be gone
            self.bar.close()

    def _read_losses(self) -> None:
        self.losses += [math.nan if report.skipped else report.loss for report in self.unread]
        self.unread.clear()

    def _log(self, report: StepReport) -> None:
        self._read_losses()
        now = time.perf_counter()
        seconds = self.seconds + now - self.started
        values = {
            "train/lr": report.learning_rate,
            "time/steps_per_s": self.steps_timed / max(seconds, 1e-9),
        }
        self.steps_timed, self.seconds, self.started = 0, 0.0, now
        losses = [loss for loss in self.losses if not math.isnan(loss)]
        if losses:  # none if every step was skipped
            values["train/loss"] = float(np.mean(losses))
            self.shown["loss"] = f"{values['train/loss']:.4f}"
        if skipped := len(self.losses) - len(losses):
            values["train/skipped_steps"] = self.shown["skipped"] = skipped
        self.losses.clear()
        if math.isfinite(report.grad_norm):
            values["train/grad_norm"] = report.grad_norm
        self.metrics.write(self.trainer.step_count, values)
        self.bar.set_postfix(self.shown)

    def evaluate(self) -> None:
        """Measure action error and returns; the mean return at the first target is the score.

        An environment that fails costs this evaluation, not the training.
        """
        step, config, score = self.trainer.step_count, self.config, None
        if self.held_out:
            error = self.trainer.action_error(self.held_out)
            self.metrics.write(step, {"eval/action_error": error})
        if config.environment and config.eval_episodes:
            agent = self.agent()
            try:
                first, *_ = [self._evaluate(agent, target) for target in config.targets]
            except EvaluationError as error:
                warnings.warn(f"step {step} has no score: {error}; training goes on", stacklevel=2)
                return
            score = first.return_mean
            self.shown["return"] = format_return(score)
            if first.normalized:
                self.shown["score"] = f"{first.normalized['mean']:.1f}%"
            self.bar.set_postfix(self.shown)
        self.metrics.sync()  # or a power cut could take what is said to have been measured
        self.run.checkpoints.note_evaluation(step, score)

    def _evaluate(self, agent: DecisionAgent, target: float) -> Evaluation:
        self.bar.set_postfix({**self.shown, "evaluating": f"{target:g}"})
        evaluation = evaluate(
            agent,
            self.config.environment,
            episodes=self.config.eval_episodes,
            target_return=target,
            seed=self.config.selection_seed,
            references=agent.references,
        )
        self.metrics.write(self.trainer.step_count, evaluation_metrics(evaluation))
        return evaluation


def make_agent(config: TrainConfig, trainer: Trainer, dataset: DatasetInfo) -> DecisionAgent:
    """Return the agent that a trainer's weights make.

    Raises:
        ConfigError: If it could not act: its window is too large.
    """
    return DecisionAgent(
        trainer.acting_model,
        target_return=config.targets[0],
        refresh_every=config.refresh_every,
        context=config.burn_in + config.context,  # as many steps as training sees
        info={
            "step": trainer.step_count,
            "dataset": vars(dataset),
            "environment": config.environment,
            "training": config.to_json(),
            "trained_on": device_name(trainer.device),
        },
    )


def circumstances(trainer: Trainer) -> dict[str, str | int]:
    """Return what, besides seed and data, the last bits of the weights depend on."""
    name = "cpu"
    if trainer.device.type == "cuda":
        name = torch.cuda.get_device_name(trainer.device)
    return {
        "torch": str(torch.__version__),
        "threads": torch.get_num_threads(),
        "device": name,
        "processes": trainer.world_size,
        "instructions": f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}",
        "numpy": np.__version__,
    }


def evaluation_metrics(evaluation: Evaluation) -> dict[str, float]:
    """Return an evaluation's figures by TensorBoard tag."""
    values = {
        "return_mean": evaluation.return_mean,
        "return_std": evaluation.return_std,
        "length_mean": evaluation.length_mean,
    }
    if evaluation.normalized:
        values["normalized_score_mean"] = evaluation.normalized["mean"]
        values["normalized_score_std"] = evaluation.normalized["std"]
    return {
        f"eval/{evaluation.target_return:g}/{name}": value
        for name, value in values.items()
        if math.isfinite(value)
    }
