"""One training step and everything it depends on: a pure function of (weights, seed, step)."""

import contextlib
import math
import os
from dataclasses import dataclass

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim.swa_utils import AveragedModel, get_ema_multi_avg_fn

from minrl.agents.losses import masked_action_loss
from minrl.agents.trajectory import TrajectoryModel
from minrl.data.windows import Batch
from minrl.errors import ConfigError, TrainingError

SKIPS_ALLOWED = 10


def choose_device(name: str) -> torch.device:
    """Return the device, "auto" being a GPU if there is one, each process of torchrun its own.

    Raises:
        ConfigError: If there is no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and dist.is_torchelastic_launched():
        name = f"cuda:{os.environ['LOCAL_RANK']}"
    try:
        return torch.empty(0, device=name).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0]
        raise ConfigError(f"device {name!r} cannot be used: {reason}") from error


@dataclass(frozen=True)
class OptimizationConfig:
    """How the weights are moved."""

    learning_rate: float = 3e-3
    """After the warm-up."""
    warmup_steps: int = 200
    """Steps over which the learning rate rises linearly."""
    schedule: str = "cosine"
    """constant, or cosine (down to zero at the last step), after the warm-up."""
    weight_decay: float = 0.1
    """AdamW's."""
    gradient_clip: float = 0.25
    """Largest norm of the gradient."""
    action_dropout: float = 0.0
    """Chance to hide a previous action from the model, so that it cannot lean on copying it."""
    ema_decay: float = 0.0
    """Decay a step of the averaged weights that act; 0: the weights themselves act."""
    precision: str = "float32"
    """float32, or bfloat16 for the matrix products (autocast)."""

    def problems(self) -> list[str]:
        """Return what is impossible in this configuration, naming field and range."""
        found = []
        for name, allowed in (
            ("schedule", ("constant", "cosine")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                found.append(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        for name in ("learning_rate", "gradient_clip"):
            if not getattr(self, name) > 0:
                found.append(f"{name} must be positive, not {getattr(self, name)}")
        for name in ("warmup_steps", "weight_decay"):
            if not getattr(self, name) >= 0:
                found.append(f"{name} must not be negative, not {getattr(self, name)}")
        for name in ("action_dropout", "ema_decay"):
            if not 0 <= getattr(self, name) < 1:
                found.append(f"{name} must be in [0, 1), not {getattr(self, name)}")
        return found


@dataclass(frozen=True)
class StepReport:
    """What one training step did."""

    loss: float
    grad_norm: float
    learning_rate: float
    skipped: bool


class Trainer:
    """Moves a model's weights, one batch at a time.

    Everything random in step ``t`` comes from (seed, t), so that a run cut at any step goes on
    bit for bit from ``state_dict()``. Under ``torchrun`` each process takes every world-size-th row
    of the batch, and the result is that of one process with the whole batch.

    Args:
        model: Moved to ``device``.
        config: See :class:`OptimizationConfig`.
        total_steps: Length of the whole run, for the cosine schedule.
        seed: Of dropout.
        device: For instance "cpu" or "cuda".
    """

    def __init__(
        self,
        model: TrajectoryModel,
        config: OptimizationConfig,
        *,
        total_steps: int,
        seed: int = 0,
        device: torch.device | str = "cpu",
    ):
        self.model = model.to(device)
        self.config, self.total_steps, self.seed = config, total_steps, seed
        self.device = torch.device(device)
        self.step_count = self.skips_in_a_row = 0
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        self.parallel = DistributedDataParallel(model) if distributed else model
        self.optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=self.device.type in ("cpu", "cuda"),
        )
        self.average = None
        if config.ema_decay:
            averaging = get_ema_multi_avg_fn(config.ema_decay)
            self.average = AveragedModel(model, multi_avg_fn=averaging)

    @property
    def acting_model(self) -> TrajectoryModel:
        """The model that acts and is saved: the average of the weights if there is one."""
        return self.model if self.average is None else self.average.module

    def step(self, batch: Batch) -> StepReport:
        """Take one step on the global ``batch``; skip it if the gradient is not finite.

        Raises:
            TrainingError: After ten skipped steps in a row; the weights are those before them.
        """
        torch.manual_seed(self._seed_of_step())
        self.model.train()
        rate = self.learning_rate_at(self.step_count)
        for group in self.optimizer.param_groups:
            group["lr"] = rate
        self.optimizer.zero_grad()
        local = batch.rows(slice(self.rank, None, self.world_size))
        count = float(batch.loss_mask.sum())
        error = self._summed_error(self.parallel, local, self.config.action_dropout)
        # The ranks' gradients are averaged, so that this is the gradient of the global mean.
        (error * (self.world_size / count)).backward()
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.config.gradient_clip)
        loss = error.detach()
        if self.world_size > 1:
            dist.all_reduce(loss)
        report = StepReport(loss.item() / count, norm.item(), rate, skipped=False)
        self.step_count += 1
        if not (math.isfinite(report.loss) and math.isfinite(report.grad_norm)):
            return self._skip(report)
        self.skips_in_a_row = 0
        self.optimizer.step()
        if self.average is not None:
            self.average.update_parameters(self.model)
        return report

    def learning_rate_at(self, step: int) -> float:
        """Return the learning rate of a step, counted from 0."""
        config = self.config
        rate = config.learning_rate * min(1.0, (step + 1) / max(config.warmup_steps, 1))
        if config.schedule == "cosine" and step >= config.warmup_steps:
            after = step - config.warmup_steps
            rate *= 0.5 * (
                1 + math.cos(math.pi * after / max(self.total_steps - config.warmup_steps, 1))
            )
        return rate

    @torch.no_grad()
    def action_error(self, batches: list[Batch]) -> float:
        """Return the mean squared action error of the acting model, without dropout."""
        self.acting_model.eval()
        total = sum(self._summed_error(self.acting_model, batch).item() for batch in batches)
        return total / sum(int(batch.loss_mask.sum()) for batch in batches)

    def state_dict(self) -> dict:
        """Return all that training goes on from: tensors, numbers, dicts."""
        return {
            "step": self.step_count,
            "skips_in_a_row": self.skips_in_a_row,
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "average": None if self.average is None else self.average.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up where :meth:`state_dict` was."""
        self.model.load_state_dict(state["model"])
        self.optimizer.load_state_dict(state["optimizer"])
        if self.average is not None:
            self.average.load_state_dict(state["average"])
        self.step_count, self.skips_in_a_row = state["step"], state["skips_in_a_row"]

    def _summed_error(self, model: nn.Module, batch: Batch, action_dropout: float = 0.0) -> Tensor:
        on_device = {
            name: torch.from_numpy(getattr(batch, name)).to(self.device)
            for name in (
                "observations",
                "actions",
                "returns_to_go",
                "timesteps",
                "mask",
                "loss_mask",
            )
        }
        loss_mask = on_device.pop("loss_mask")
        precision = contextlib.nullcontext()
        if self.config.precision == "bfloat16":
            precision = torch.autocast(self.device.type, torch.bfloat16)
        with precision:
            predicted, _ = model(**on_device, action_dropout=action_dropout)
        reach = self.model.action_reach
        return masked_action_loss(predicted.float(), on_device["actions"], loss_mask, reach)

    def _skip(self, report: StepReport) -> StepReport:
        self.skips_in_a_row += 1
        if self.skips_in_a_row >= SKIPS_ALLOWED:
            raise TrainingError(
                f"the loss or its gradient was not finite {SKIPS_ALLOWED} times in a row, last at "
                f"step {self.step_count} (loss {report.loss}, gradient norm {report.grad_norm}); "
                "the weights are those of the last finite step"
            )
        return StepReport(report.loss, report.grad_norm, report.learning_rate, skipped=True)

    def _seed_of_step(self) -> int:
        mixed = np.random.SeedSequence((self.seed, self.step_count, self.rank))
        return int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
