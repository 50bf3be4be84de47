"""What a device does in a training step, without ever waiting for the host.

Nothing here looks at a number: even whether a step is skipped is decided where the numbers are. So
a GPU can be given a step before it has done the last one, and do it as one CUDA graph.
"""

import contextlib
import copy
import warnings
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn

from minrl.agents.cuda_graph import captured
from minrl.agents.losses import masked_action_loss
from minrl.agents.trajectory import TrajectoryModel

if TYPE_CHECKING:
    from minrl.agents.training import OptimizationConfig
    from minrl.data.windows import WindowSampler

Inputs = dict[str, Tensor]

# The data of a GPU's whole memory that may stay there.
SHARE_FOR_DATA = 0.25


class Update:
    """Forward, backward and the change of the weights: one step's work, its inputs on the device.

    A step whose loss or gradient is not finite changes nothing; so does one on an empty batch.

    Args:
        model: Whose weights are moved.
        parallel: The same, or its ``DistributedDataParallel``.
        optimizer: A fused one.
        config: How.
    """

    def __init__(
        self,
        model: TrajectoryModel,
        parallel: nn.Module,
        optimizer: torch.optim.Optimizer,
        config: "OptimizationConfig",
    ):
        self.model, self.parallel, self.optimizer = model, parallel, optimizer
        self.config = config
        self.device = model.action_low.device
        averaged = config.ema_decay > 0
        self.average = copy.deepcopy(model).requires_grad_(False) if averaged else None
        for module in self.average.modules() if averaged else ():
            if isinstance(module, nn.RNNBase):  # cuDNN wants the copies side by side
                module.flatten_parameters()
        # Learning rate, steps in the loss (on all processes), share of the new weights in the
        # average: what changes from step to step is read from here.
        self.numbers = torch.zeros(3, device=self.device)
        self.share_learning_rate()

    def share_learning_rate(self) -> None:
        """Make the optimizer take its learning rate from ``numbers``."""
        for group in self.optimizer.param_groups:
            group["lr"] = self.numbers[0]

    def __call__(self, inputs: Inputs) -> Tensor:
        """Take the step; return its loss and the norm of its gradient, (2,)."""
        _, count, share = self.numbers
        self.optimizer.zero_grad()
        error = self.summed_error(self.parallel, inputs, self.config.action_dropout)
        world_size = dist.get_world_size() if self.parallel is not self.model else 1
        # The ranks' gradients are averaged, so that this is the gradient of the global mean.
        (error * (world_size / count)).backward()
        loss = error.detach() / count
        if self.parallel is not self.model:
            dist.all_reduce(loss)
        gradients = [p.grad for p in self.model.parameters() if p.grad is not None]
        results = torch.stack([loss, nn.utils.get_total_norm(gradients)])
        finite = results.isfinite().all().float()
        # Fused optimizers divide by the one, and do nothing at all if the other is 1.
        self.optimizer.grad_scale = (results[1] / self.config.gradient_clip).clamp(min=1.0)
        self.optimizer.found_inf = 1.0 - finite
        for group in self.optimizer.param_groups:
            group["capturable"] = self._is_captured()
        self.optimizer.step()
        if self.average is not None:
            self._move_average(share * finite)
        return results

    def summed_error(self, model: nn.Module, inputs: Inputs, action_dropout: float = 0.0) -> Tensor:
        """Return the action error, summed over the steps that count in the loss."""
        # Padding is on the right: no valid step sees it, and so it needs no mask but that of the
        # loss. It must be finite, though, since even 0 * NaN is NaN.
        mask, loss_mask = inputs["mask"], inputs["loss_mask"]
        actions = inputs["actions"]
        precision = contextlib.nullcontext()
        if self.config.precision == "bfloat16":
            precision = torch.autocast(self.device.type, torch.bfloat16)
        with precision:
            predicted, _ = model(
                inputs["observations"].masked_fill(~mask.unsqueeze(-1), 0.0),
                actions.masked_fill(~mask.unsqueeze(-1), 0.0),
                inputs["returns"].masked_fill(~mask, 0.0),
                inputs["timesteps"],
                action_dropout=action_dropout,
            )
        return masked_action_loss(predicted.float(), actions, loss_mask, self.model.action_reach)

    @torch.no_grad()
    def _move_average(self, share: Tensor) -> None:
        averages = list(self.average.parameters())
        changes = torch._foreach_sub(list(self.model.parameters()), averages)
        torch._foreach_mul_(changes, share)
        torch._foreach_add_(averages, changes)

    def _is_captured(self) -> bool:
        return self.device.type == "cuda" and torch.cuda.is_current_stream_capturing()


class ResidentStep:
    """A step on windows of data that stays on the device: only their places go there.

    Args:
        sampler: Whose data.
        update: What to do with a batch.
        rows: Windows in it, B.
    """

    def __init__(self, sampler: "WindowSampler", update: Update, rows: int):
        self.update = update
        device = update.device
        # A copy only if need be: PyTorch warns of arrays that must not be written to.
        arrays = (torch.from_numpy(np.require(x, requirements="W")) for x in sampler.arrays)
        self.observations, self.actions, self.returns = (x.to(device) for x in arrays)
        self.offsets = torch.arange(sampler.length, device=device)
        self.windows = torch.zeros(4, rows, dtype=torch.int64, device=device)
        self.return_factors = torch.ones(rows, 1, device=device)
        self._run = self._gather_and_update

    @staticmethod
    def fits(sampler: "WindowSampler", device: torch.device) -> bool:
        """Return whether the data leaves enough of the device's memory to the training."""
        if device.type != "cuda":
            return True
        free, _ = torch.cuda.mem_get_info(device)
        return sum(array.nbytes for array in sampler.arrays) <= SHARE_FOR_DATA * free

    def __call__(self, windows: np.ndarray, return_factors: np.ndarray) -> Tensor:
        """Take the step on these windows, (4, B); see :meth:`WindowSampler.windows`.

        Their returns are multiplied by ``return_factors``, (B, 1) float32.
        """
        write(self.windows, windows)
        write(self.return_factors, return_factors)
        return self._run()

    def capture(self) -> None:
        """Do all later steps as one CUDA graph, or as before where that cannot be."""
        # Warming up must not train: nothing changes on an empty batch.
        self.windows.zero_()
        self.update.numbers.zero_()
        try:
            self._run = captured(self._gather_and_update, self.update.device)
        except RuntimeError as error:
            warnings.warn(f"training without a CUDA graph, slower: {error}", stacklevel=2)

    def gather(self) -> Inputs:
        """Return the batch; what is not valid in it is some other episode's."""
        episode_start, first, drawn, stop = self.windows.unsqueeze(-1)  # B 1
        rows = first + self.offsets  # B T
        mask = rows < stop
        taken = rows.clamp(max=len(self.observations) - 1).flatten()
        return {
            "observations": self.observations.index_select(0, taken).unflatten(0, rows.shape),
            "actions": self.actions.index_select(0, taken).unflatten(0, rows.shape),
            "returns": self.returns.index_select(0, taken).view(rows.shape) * self.return_factors,
            "timesteps": rows - episode_start,
            "mask": mask,
            "loss_mask": mask & (rows >= drawn),
        }

    def _gather_and_update(self) -> Tensor:
        return self.update(self.gather())


def write(target: Tensor, values: np.ndarray) -> None:
    """Copy values into a tensor on a device, without waiting for the device."""
    source = torch.from_numpy(np.ascontiguousarray(values))
    if target.is_cuda:
        source = source.pin_memory()
    target.copy_(source, non_blocking=True)
