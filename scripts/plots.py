"""The two pictures of a run."""

import io
from collections.abc import Sequence
from pathlib import Path

from minrl.agents.files import write_atomically
from minrl.envs.evaluation import Evaluation


def plot_learning_curve(rows: list[dict], targets: Sequence[float], title: str, path: Path) -> None:
    """Draw return and losses against training steps.

    Args:
        rows: Lines of metrics.
        targets: Returns asked for.
        title: Of the picture.
        path: Where to write the PNG.
    """
    figure, (score_axis, loss_axis) = _subplots(2, title)
    for target in targets:
        tag = f"eval/{target:g}"
        evaluated = [row for row in rows if f"{tag}/return_mean" in row]
        steps = [row["step"] for row in evaluated]
        means = [row[f"{tag}/return_mean"] for row in evaluated]
        spread = [row.get(f"{tag}/return_std", 0.0) for row in evaluated]
        (line,) = score_axis.plot(steps, means, marker="o", label=f"asked for {target:g}")
        low = [mean - std for mean, std in zip(means, spread, strict=True)]
        high = [mean + std for mean, std in zip(means, spread, strict=True)]
        score_axis.fill_between(steps, low, high, alpha=0.2, color=line.get_color())
    score_axis.set_ylabel("return (mean ± std over episodes)")
    for tag, label in (("train/loss", "training"), ("eval/action_error", "held out")):
        if points := [(row["step"], row[tag]) for row in rows if tag in row]:
            loss_axis.plot(*zip(*points, strict=True), label=label)
    loss_axis.set_ylabel("squared action error")
    loss_axis.set_yscale("log")
    for axis in (score_axis, loss_axis):
        axis.set_xlabel("training steps")
        if axis.lines:
            axis.legend()
    _save(figure, path)


def plot_target_vs_return(evaluations: Sequence[Evaluation], title: str, path: Path) -> None:
    """Draw the return got against the return asked for, one point an episode."""
    figure, (axis,) = _subplots(1, title)
    evaluations = sorted(evaluations, key=lambda evaluation: evaluation.target_return)
    asked = [evaluation.target_return for evaluation in evaluations]
    for evaluation in evaluations:
        points = [evaluation.target_return] * len(evaluation.returns)
        axis.plot(points, evaluation.returns, ".", color="tab:blue", alpha=0.3)
    means = [evaluation.return_mean for evaluation in evaluations]
    axis.plot(asked, means, marker="o", color="tab:blue", label="got (mean)")
    ends = [min(asked), max(asked)]
    axis.plot(ends, ends, "--", color="grey", label="as asked")
    axis.set_xlabel("return asked for")
    axis.set_ylabel("return got")
    axis.legend()
    _save(figure, path)


def _subplots(count: int, title: str):
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * count, 4), layout="constrained")
    axes = figure.subplots(1, count, squeeze=False)[0]
    figure.suptitle(title, fontsize=10)
    for axis in axes:
        axis.grid(alpha=0.3)
        axis.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _save(figure, path: Path) -> None:
    picture = io.BytesIO()
    figure.savefig(picture, dpi=120)
    write_atomically(path, picture.getvalue())
