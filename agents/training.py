"""One training step and everything it depends on: a pure function of (weights, seed, step)."""

import functools
import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, fields, replace

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from minrl.agents.device_step import Inputs, ResidentStep, Update, write
from minrl.agents.field_types import wrong_types
from minrl.agents.fitting import check_count, check_keys, check_moments, check_weights
from minrl.agents.trajectory import TrajectoryModel
from minrl.data.windows import Batch, WindowSampler
from minrl.errors import CheckpointError, ConfigError, TrainingError

SKIPS_ALLOWED = 10
RETURN_NOISE_KEY = (1,)  # other numbers than the windows of that seed and step are drawn with


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
    return_noise: float = 0.1
    """Standard deviation of a factor, drawn for each window, that makes its returns too high
    or too low, so that the model does not lean on their exact values."""
    ema_decay: float = 0.0
    """Decay a step of the averaged weights that act; 0: the weights themselves act."""
    precision: str = "float32"
    """float32, or bfloat16 for the matrix products (autocast)."""

    def problems(self) -> list[str]:
        """Return what is impossible in this configuration, naming field and range."""
        if found := wrong_types(self):
            return found
        for name, allowed in (
            ("schedule", ("constant", "cosine")),
            ("precision", ("float32", "bfloat16")),
        ):
            if getattr(self, name) not in allowed:
                found.append(
                    f"{name} must be one of {', '.join(allowed)}, not {getattr(self, name)!r}"
                )
        for name, is_possible, wanted in (
            ("learning_rate", 0 < self.learning_rate < math.inf, "be positive and finite"),
            ("gradient_clip", self.gradient_clip > 0, "be positive"),
            ("warmup_steps", self.warmup_steps >= 0, "not be negative"),
            ("weight_decay", 0 <= self.weight_decay < math.inf, "be finite and not negative"),
            ("action_dropout", 0 <= self.action_dropout < 1, "be in [0, 1)"),
            ("return_noise", 0 <= self.return_noise < 1, "be in [0, 1)"),
            ("ema_decay", 0 <= self.ema_decay < 1, "be in [0, 1)"),
        ):
            if not is_possible:
                found.append(f"{name} must {wanted}, not {getattr(self, name)}")
        return found


class StepReport:
    """What one training step did; looking at its numbers waits for the device to do it.

    Attributes:
        step: Which one, counted from 0.
        learning_rate: Its.
    """

    def __init__(self, step: int, learning_rate: float, results: Tensor):
        self.step, self.learning_rate = step, learning_rate
        self._results, self._done = results.to("cpu", non_blocking=True), None
        if results.is_cuda:
            self._done = torch.cuda.current_stream(results.device).record_event()

    @functools.cached_property
    def _numbers(self) -> list[float]:
        if self._done is not None:
            self._done.synchronize()
        return self._results.tolist()

    @property
    def loss(self) -> float:
        """Mean squared action error before the step."""
        return self._numbers[0]

    @property
    def grad_norm(self) -> float:
        """Norm of the gradient before it was clipped."""
        return self._numbers[1]

    @property
    def skipped(self) -> bool:
        """Whether the step was left out, because one of them is not finite."""
        return not all(map(math.isfinite, self._numbers))


class Trainer:
    """Moves a model's weights, one batch at a time.

    Everything random in step ``t`` comes from (seed, t), so that a run cut at any step goes on
    bit for bit from ``state_dict()``. Under ``torchrun`` each process takes every world-size-th row
    of the batch, and the result is that of one process with the whole batch.

    Args:
        model: Moved to ``device``.
        config: See :class:`OptimizationConfig`.
        total_steps: Length of the whole run, for the cosine schedule.
        seed: Of what is random in a step: dropout, hidden actions, noise on the returns.
        device: For instance "cpu" or "cuda".

    Attributes:
        is_between_steps: Whether the weights are those of ``step_count`` steps. They may not be
            after an exception that came from outside, such as ``KeyboardInterrupt``.
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
        if problems := config.problems():
            raise ConfigError("; ".join(problems))
        self.model = model.to(device)
        self.config, self.total_steps, self.seed = config, total_steps, seed
        self.device = torch.device(device)
        self.step_count = self._skips_in_a_row = 0
        self.is_between_steps = True
        distributed = dist.is_available() and dist.is_initialized()
        self.rank = dist.get_rank() if distributed else 0
        self.world_size = dist.get_world_size() if distributed else 1
        optimizer = torch.optim.AdamW(
            model.parameters(),
            lr=config.learning_rate,
            weight_decay=config.weight_decay,
            fused=True,
        )
        self.update = Update(
            model,
            DistributedDataParallel(model) if distributed else model,
            optimizer,
            config,
        )
        self._sampler: WindowSampler | None = None
        self._resident: ResidentStep | None = None
        self._unread: deque[StepReport] = deque()
        # A GPU is given the next step before the host looks at what the last one did.
        self._reports_behind = 1 if self.device.type == "cuda" else 0

    @property
    def _rows(self) -> slice:
        """Of the windows of the whole batch, those of this process."""
        return slice(self.rank, None, self.world_size)

    @property
    def acting_model(self) -> TrajectoryModel:
        """The model that acts and is saved: the average of the weights if there is one."""
        return self.model if self.update.average is None else self.update.average

    @property
    def skips_in_a_row(self) -> int:
        """Steps up to the last one that were all skipped."""
        self._read_reports()
        return self._skips_in_a_row

    def step(self, batch: Batch) -> StepReport:
        """Take one step on the global ``batch``; skip it if the gradient is not finite.

        Raises:
            TrainingError: After ten skipped steps in a row; the weights are those before them. (On
                a GPU one step later: it is not waited for.)
        """
        factors = self._return_factors(len(batch.returns))[self._rows]
        mine = batch.rows(self._rows)
        inputs = self._on_device(replace(mine, returns=mine.returns * factors))
        self._begin(batch.loss_mask.sum())
        return self._take(lambda: self.update(inputs))

    def step_from(self, sampler: WindowSampler) -> StepReport:
        """Take one step on the batch that ``sampler`` has for it, gathered on the device.

        Raises:
            TrainingError: As :meth:`step` does.
        """
        if self._sampler is not sampler:
            self._sampler, self._resident = sampler, self._make_resident(sampler)
        if self._resident is None:
            return self.step(sampler.batch(self.step_count))
        windows = sampler.windows(self.step_count)
        _, _, drawn, stop = windows
        self._begin((stop - drawn).sum())
        factors = self._return_factors(sampler.batch_size)[self._rows]
        return self._take(lambda: self._resident(windows[:, self._rows], factors))

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
        model = self.acting_model.eval()
        errors = [self.update.summed_error(model, self._on_device(batch)) for batch in batches]
        return float(sum(errors)) / sum(int(batch.loss_mask.sum()) for batch in batches)

    def state_dict(self) -> dict:
        """Return all that training goes on from: tensors, numbers, dicts."""
        average = self.update.average
        return {
            "step": self.step_count,
            "skips_in_a_row": self.skips_in_a_row,
            "model": self.model.state_dict(),
            "optimizer": self.update.optimizer.state_dict(),
            "average": None if average is None else average.state_dict(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Take up where :meth:`state_dict` was.

        Raises:
            CheckpointError: If a key is missing, unknown or of another shape; nothing has changed.
        """
        check_keys("the state of training", self.state_dict(), state)
        for name in ("step", "skips_in_a_row"):
            check_count(f"the state of training's {name}", state[name])
        check_weights("the model", self.model, state["model"])
        check_moments(self.model, self.update.optimizer, state["optimizer"])
        if self.update.average is not None:
            check_weights("the averaged model", self.update.average, state["average"])
        elif state["average"] is not None:
            raise CheckpointError("there are averaged weights, which ema_decay 0 has no use for")
        self.model.load_state_dict(state["model"])
        self.update.optimizer.load_state_dict(state["optimizer"])
        self.update.share_learning_rate()
        if self.update.average is not None:
            self.update.average.load_state_dict(state["average"])
        self.step_count, self._skips_in_a_row = state["step"], state["skips_in_a_row"]
        self.is_between_steps = True
        self._unread.clear()
        # A captured step would go on with the tensors that the optimizer had before.
        self._sampler = self._resident = None

    def _on_device(self, batch: Batch) -> Inputs:
        arrays = {field.name: getattr(batch, field.name) for field in fields(batch)}
        return {name: torch.from_numpy(x).to(self.device) for name, x in arrays.items()}

    def _make_resident(self, sampler: WindowSampler) -> ResidentStep | None:
        """Return a step whose data is on the device, captured if it can be; None if too large."""
        if not ResidentStep.fits(sampler, self.device):
            return None
        rows = len(range(sampler.batch_size)[self._rows])
        resident = ResidentStep(sampler, self.update, rows)
        if self.device.type == "cuda" and self.world_size == 1:
            self.model.train()
            resident.capture()
        return resident

    def _return_factors(self, rows: int) -> np.ndarray:
        """Return what the returns of each window of the whole batch are multiplied by, (B, 1).

        Drawn for all processes at once, so that several train as one would.
        """
        drawn = np.random.SeedSequence((self.seed, self.step_count), spawn_key=RETURN_NOISE_KEY)
        noise = np.random.default_rng(drawn).standard_normal((rows, 1), np.float32)
        return 1 + np.float32(self.config.return_noise) * noise

    def _begin(self, count: int) -> None:
        """Set what is particular to this step: random numbers, and those of :class:`Update`."""
        if self.device.type == "cpu":  # quicker by a fifth of a millisecond than the other
            torch.default_generator.manual_seed(self._seed_of_step())
        else:
            torch.manual_seed(self._seed_of_step())
        if not self.model.training:
            self.model.train()
        # The average starts as the weights after the first step.
        share = 1.0 - self.config.ema_decay if self.step_count else 1.0
        numbers = self.learning_rate_at(self.step_count), count, share
        write(self.update.numbers, np.array(numbers, np.float32))

    def _take(self, update: Callable[[], Tensor]) -> StepReport:
        self.is_between_steps = False
        try:
            results = update()
        except Exception:  # memory, for instance: such come before the weights are moved
            self.is_between_steps = True
            raise
        report = StepReport(self.step_count, self.learning_rate_at(self.step_count), results)
        self._unread.append(report)
        self.step_count += 1
        self.is_between_steps = True
        last = self._read_reports(self._reports_behind)
        if self._skips_in_a_row >= SKIPS_ALLOWED and last is not None:
            raise TrainingError(
                f"the loss or its gradient was not finite {SKIPS_ALLOWED} times in a row, last at "
                f"step {last.step + 1}: {self._name_what_is_not_finite(last)}; "
                "the weights are those of the last finite step"
            )
        return report

    def _name_what_is_not_finite(self, report: StepReport) -> str:
        if not math.isfinite(report.loss):
            return f"the loss is {report.loss}"
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None and not parameter.grad.isfinite().all():
                return f"the gradient of {name}, though not the loss ({report.loss})"
        return f"the norm of the gradient is {report.grad_norm}"

    def _read_reports(self, leave: int = 0) -> StepReport | None:
        """Count the skipped steps among all but the newest; return the last report read."""
        report = None
        while len(self._unread) > leave:
            report = self._unread.popleft()
            self._skips_in_a_row = self._skips_in_a_row + 1 if report.skipped else 0
        return report

    def _seed_of_step(self) -> int:
        mixed = np.random.SeedSequence((self.seed, self.step_count, self.rank))
        return int(mixed.generate_state(1, np.uint64)[0] >> np.uint64(1))
