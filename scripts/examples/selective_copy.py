"""Selective copying: how deep must a stack of minimal RNNs be to pick tokens out of noise?

    python -m minrl.scripts.examples.selective_copy --depths 1 2 3

A few data tokens lie scattered among noise; at the end the model must say them again, in order
(Mamba, arXiv 2312.00752, section 4.1.1; table 1 of "Were RNNs All We Needed?", arXiv 2410.01201).
The gates of one minimal layer look at the current token alone, so one layer cannot tell the third
data token from the fourth; from the second layer on, gates look at a summary of the past.

With a GPU this is the paper's length, 4096 noise and data tokens; on a CPU a shorter one, which is
an easier task: its accuracies are not those of the paper's table.
"""

import json
import platform
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from itertools import product
from pathlib import Path
from statistics import mean, stdev

import torch
import tyro
from torch import Tensor, nn
from torch.optim.lr_scheduler import LinearLR

from minrl.agents.backbones.blocks import Backbone
from minrl.agents.devices import choose_device
from minrl.agents.files import write_atomically
from minrl.errors import ConfigError, MinrlError

NOISE = 0

EVALUATION_SEED, EVALUATION_BATCHES = 1_000_000, 8

# Percent, arXiv 2410.01201: 400,000 steps of 3 blocks. Its other figures are left out because we
# could not check them at the source.
PAPER = {("mingru", 3): "99.5"}
PAPER_TASK = "16 of 4096"


@dataclass(frozen=True)
class Task:
    """What the sequences look like.

    Args:
        length: Noise and data tokens before the answer.
        tokens: Data tokens to say again.
        vocabulary: Symbols: noise, data symbols, and the marker that asks for the answer.
    """

    length: int
    tokens: int = 16
    vocabulary: int = 16

    def __post_init__(self):
        if not 1 <= self.tokens <= self.length:
            raise ConfigError(f"tokens must be in 1 to length {self.length}, not {self.tokens}")
        if self.vocabulary < 4:
            raise ConfigError("vocabulary must be at least 4: noise, marker and two data symbols")

    def sample(self, batch_size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Draw sequences.

        Args:
            batch_size: B.
            generator: On the CPU, so that every device sees the same sequences.

        Returns:
            Sequences (B, length + tokens), the last ``tokens`` of them markers, and the data tokens
            in order, (B, tokens): the k-th is the answer at the k-th marker.
        """
        shape = (batch_size, self.tokens)
        answers = torch.randint(1, self.vocabulary - 1, shape, generator=generator)  # B K
        draws = torch.rand(batch_size, self.length, generator=generator)
        places = draws.topk(self.tokens).indices.sort().values  # B K, any set equally likely
        sequences = torch.full((batch_size, self.length + self.tokens), NOISE)
        sequences[:, self.length :] = self.vocabulary - 1
        return sequences.scatter(1, places, answers), answers


class Copier(nn.Module):
    """Embedding, residual blocks of a minimal RNN alone (no MLP, no convolution), norm, head.

    Args:
        task: Tells the number of symbols.
        cell: "mingru" or "minlstm".
        depth: Blocks.
        width: Features of the residual stream, D.
        expansion: Hidden channels per feature.
        dropout: After each block.
    """

    def __init__(
        self, task: Task, cell: str, depth: int, width: int, expansion: int, dropout: float
    ):
        super().__init__()
        self.answer = slice(-task.tokens, None)
        self.embedding = nn.Embedding(task.vocabulary, width)
        self.backbone = Backbone(
            width, depth, cell, expansion=expansion, mlp_ratio=0, dropout=dropout
        )
        self.norm = nn.LayerNorm(width)
        self.head = nn.Linear(width, task.vocabulary, bias=False)

    def forward(self, sequences: Tensor) -> Tensor:
        """Return logits at the markers, (B, tokens, vocabulary)."""
        x, _ = self.backbone(self.embedding(sequences), outputs=self.answer)  # B K D
        return self.head(self.norm(x))


@dataclass(frozen=True)
class Settings:
    """The models and their training. None: the paper's value on a GPU, minutes of work on a CPU.

    Args:
        cells: mingru, minlstm.
        depths: Blocks of the models to train.
        seeds: One model each.
        length: Noise and data tokens: 4096 on a GPU, 64 on a CPU.
        tokens: Data tokens: 16 on a GPU, 8 on a CPU.
        steps: Optimiser steps: 400000 on a GPU, 1500 on a CPU.
        learning_rate: At first, from where it falls linearly to 0: 0.0003 on a GPU, 0.003 on a CPU.
        dropout: After each block: 0.1 on a GPU, 0 on a CPU.
        expansion: Hidden channels per feature: 6 on a GPU, 2 on a CPU.
        batch_size: Sequences per step.
        width: Features of the residual stream.
        evaluations: Number of them during training, on sequences that are not trained on.
        device: auto, cpu, cuda ...
        output: Where to write the JSON; the picture lies beside it.
    """

    cells: tuple[str, ...] = ("mingru", "minlstm")
    depths: tuple[int, ...] = (1, 2, 3)
    seeds: tuple[int, ...] = (0,)
    length: int | None = None
    tokens: int | None = None
    steps: int | None = None
    learning_rate: float | None = None
    dropout: float | None = None
    expansion: int | None = None
    batch_size: int = 64
    width: int = 64
    evaluations: int = 30
    device: str = "auto"
    output: Path = Path("runs/selective_copy.json")

    def on(self, device: torch.device) -> "Settings":
        """Fill in what is None."""
        names = ("length", "tokens", "steps", "learning_rate", "dropout", "expansion")
        short, paper = (64, 8, 1500, 3e-3, 0.0, 2), (4096, 16, 400_000, 3e-4, 0.1, 6)
        defaults = dict(zip(names, short if device.type == "cpu" else paper, strict=True))
        missing = {name: value for name, value in defaults.items() if getattr(self, name) is None}
        return replace(self, **missing)


def train(settings: Settings, cell: str, depth: int, seed: int, device: torch.device) -> dict:
    """Train one model.

    Returns:
        Its row of the results: accuracy is the percentage of data tokens said right at the end,
        curve is of (step, accuracy).
    """
    torch.manual_seed(seed)
    task = Task(settings.length, settings.tokens)
    model = Copier(task, cell, depth, settings.width, settings.expansion, settings.dropout)
    model.to(device)
    optimizer = torch.optim.Adam(model.parameters(), lr=settings.learning_rate)
    schedule = LinearLR(optimizer, 1.0, 0.0, total_iters=settings.steps)
    generator = torch.Generator().manual_seed(seed)
    every = max(1, settings.steps // settings.evaluations)
    started, curve = time.perf_counter(), []
    for step in range(1, settings.steps + 1):
        sequences, answers = task.sample(settings.batch_size, generator)
        logits = model(sequences.to(device))  # B K V
        loss = nn.functional.cross_entropy(logits.flatten(0, 1), answers.to(device).flatten())
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % every == 0 or step == settings.steps:
            curve.append((step, measure_accuracy(model, task, device)))
            print(
                f"{cell} depth {depth} seed {seed}: step {step}, {curve[-1][1]:.1f} %", flush=True
            )
    return {
        "cell": cell,
        "depth": depth,
        "seed": seed,
        "accuracy": curve[-1][1],
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "seconds": round(time.perf_counter() - started, 1),
        "curve": curve,
    }


@torch.no_grad()
def measure_accuracy(model: nn.Module, task: Task, device: torch.device) -> float:
    """Return the percentage of data tokens said right, on the same sequences at every call."""
    generator = torch.Generator().manual_seed(EVALUATION_SEED)
    model.eval()
    right = 0
    for _ in range(EVALUATION_BATCHES):  # of 64, so that length 4096 fits wherever it trains
        sequences, answers = task.sample(64, generator)
        right += (model(sequences.to(device)).argmax(-1).cpu() == answers).sum().item()
    model.train()
    return round(100 * right / (EVALUATION_BATCHES * answers.numel()), 2)


def make_table(rows: Sequence[dict], length: int, tokens: int) -> str:
    """Return a markdown table of the mean accuracy over seeds, beside the paper's."""
    lines = [
        f"| cell | depth | accuracy, {tokens} of {length} (seeds) | paper, {PAPER_TASK} |",
        "|---|---|---|---|",
    ]
    for cell, depth in dict.fromkeys((row["cell"], row["depth"]) for row in rows):
        ours = [row["accuracy"] for row in rows if (row["cell"], row["depth"]) == (cell, depth)]
        spread = f" ± {stdev(ours):.1f}" if len(ours) > 1 else ""
        paper = PAPER.get((cell, depth), "-")
        lines.append(f"| {cell} | {depth} | {mean(ours):.1f}{spread} ({len(ours)}) | {paper} |")
    return "\n".join(lines)


def plot(rows: Sequence[dict], title: str, path: Path) -> None:
    """Draw accuracy against steps, one colour a depth, one panel a cell."""
    from matplotlib.figure import Figure

    cells = list(dict.fromkeys(row["cell"] for row in rows))
    figure = Figure(figsize=(4.5 * len(cells), 3.5), layout="constrained")
    panels = figure.subplots(1, len(cells), sharey=True, squeeze=False)[0]
    for cell, panel in zip(cells, panels, strict=True):
        labelled = set()
        for row in (row for row in rows if row["cell"] == cell):
            depth = row["depth"]
            label = None if depth in labelled else f"depth {depth}"
            labelled.add(depth)
            panel.plot(*zip(*row["curve"], strict=True), color=f"C{depth - 1}", label=label)
        panel.set(title=cell, xlabel="optimiser steps", ylim=(0, 102))
        panel.grid(alpha=0.3)
        panel.legend()
    panels[0].set_ylabel("data tokens right, %")
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=100)


def main(settings: Settings) -> list[dict]:
    """Train every model asked for; print the table, write JSON and picture.

    The JSON is written anew after each model, so that what stops the next one costs that alone.
    """
    device = choose_device(settings.device)
    settings = settings.on(device)
    runs = list(product(settings.cells, settings.depths, settings.seeds))
    settings.output.parent.mkdir(parents=True, exist_ok=True)
    chosen = {k: v for k, v in asdict(settings).items() if k not in ("output", "device")}
    where = {"device": device.type, "machine": platform.machine(), "torch": torch.__version__}
    rows: list[dict] = []
    result = {"task": "selective copying", "settings": chosen, **where, "rows": rows}
    for cell, depth, seed in runs:
        rows.append(train(settings, cell, depth, seed, device))
        write_atomically(settings.output, (json.dumps(result, indent=1) + "\n").encode())
    print(make_table(rows, settings.length, settings.tokens))
    title = f"selective copying: {settings.tokens} data tokens among {settings.length}"
    plot(rows, title, settings.output.with_suffix(".png"))
    return rows


if __name__ == "__main__":
    try:
        main(tyro.cli(Settings))
    except MinrlError as error:
        raise SystemExit(f"selective_copy: error: {error}") from None
