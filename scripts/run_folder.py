"""What a run leaves behind: configuration, metrics in three forms, checkpoints, pictures."""

import contextlib
import csv
import json
import time
from collections.abc import Iterator
from pathlib import Path

from minrl.agents.checkpoint import CheckpointFolder, write_atomically
from minrl.errors import ConfigError
from minrl.scripts.train_config import TrainConfig


class RunFolder:
    """The folder of one training run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"
        self.checkpoints = CheckpointFolder(self.path / "checkpoints")

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """Make the folder and write config.json.

        Raises:
            ConfigError: If the folder has something in it already, or cannot be made.
        """
        path = config.run_dir
        if path is None:
            name = f"{config.model.backbone}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
            path = Path("runs", "+".join(config.dataset), name)
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise ConfigError(
                f"run-dir {path} exists already: choose another, or go on with it by "
                f"minrl train --resume {path}"
            )
        try:
            path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise ConfigError(f"run-dir {path} cannot be made: {error}") from error
        run = cls(path)
        run.write_json("config.json", config.to_json())
        return run

    def read_config(self) -> TrainConfig:
        """Read config.json.

        Raises:
            ConfigError: If there is none, or it cannot be read.
        """
        path = self.path / "config.json"
        try:
            return TrainConfig.from_json(json.loads(path.read_text()))
        except FileNotFoundError as error:
            raise ConfigError(f"{self.path} is not a run: it has no config.json") from error
        except (OSError, ValueError, AttributeError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error

    def is_finished(self) -> bool:
        """Return whether training came to its last step."""
        steps = self.checkpoints.steps()
        return bool(steps) and steps[-1] >= self.read_config().steps

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON file into the folder, atomically."""
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def read_metrics(self) -> list[dict]:
        """Return all lines of metrics so far, each a dict with "step"."""
        return _read_lines(self.metrics_file)

    def read_evaluations(self) -> list[dict]:
        """Return all final evaluations so far, each what ``Evaluation.to_dict`` gives and more."""
        return _read_lines(self.path / "evaluations.jsonl")

    def was_evaluated(self, config: TrainConfig, step: int) -> bool:
        """Return whether all that is measured after a step while training was measured.

        Args:
            config: Of the run.
            step: Of its checkpoint.
        """
        if not step or (step % config.eval_every and step != config.steps):
            return True  # nothing is
        if config.environment and config.eval_episodes:
            return self.checkpoints.header(step)["score"] is not None
        rows = self.read_metrics()
        return any(row["step"] == step and "eval/action_error" in row for row in rows)

    def forget_after(self, step: int, *, evaluated: bool) -> None:
        """Drop metrics later than ``step``, which a resumed run writes anew.

        Args:
            step: Where it goes on.
            evaluated: Whether the evaluation after that step came to its end; if not, what it
                wrote goes too.
        """
        kept = [
            json.dumps(row) + "\n"
            for row in self.read_metrics()
            if row["step"] < step
            or (row["step"] == step and (evaluated or not any("eval/" in name for name in row)))
        ]
        write_atomically(self.metrics_file, "".join(kept).encode())

    def write_csv(self) -> None:
        """Write metrics.csv, one row a step, from the lines so far."""
        rows: dict[int, dict] = {}
        for row in self.read_metrics():
            rows.setdefault(row["step"], {}).update(row)
        columns = list(dict.fromkeys(name for row in rows.values() for name in row))
        with (self.path / "metrics.csv").open("w", newline="") as file:
            writer = csv.DictWriter(file, columns)
            writer.writeheader()
            writer.writerows(rows[step] for step in sorted(rows))

    @contextlib.contextmanager
    def metrics(self, first_step: int = 0) -> Iterator["Metrics"]:
        """Open the metrics for writing, after what is there."""
        from torch.utils.tensorboard import SummaryWriter

        purge = first_step + 1 if first_step else None
        with (
            self.metrics_file.open("a") as file,
            SummaryWriter(str(self.path), purge_step=purge) as board,
        ):
            yield Metrics(file, board)


class Metrics:
    """Writes each line of metrics to metrics.jsonl and to TensorBoard."""

    def __init__(self, file, board):
        self._file, self._board = file, board

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write values measured after ``step`` training steps, by TensorBoard tag."""
        self._file.write(json.dumps({"step": step, **values}) + "\n")
        self._file.flush()
        for tag, value in values.items():
            self._board.add_scalar(tag, value, step)


def _read_lines(path: Path) -> list[dict]:
    rows = []
    for line in path.read_text().splitlines() if path.exists() else ():
        with contextlib.suppress(ValueError):  # a line cut short by a crash
            rows.append(json.loads(line))
    return rows
