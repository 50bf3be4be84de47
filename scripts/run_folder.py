"""What a run leaves behind: configuration, metrics in three forms, checkpoints, pictures."""

import contextlib
import csv
import io
import json
import os
import socket
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO, NoReturn

from minrl.agents.checkpoint import CheckpointFolder, is_finite_number
from minrl.agents.field_types import is_of
from minrl.agents.files import read_text, write_atomically
from minrl.errors import CheckpointError, ConfigError
from minrl.scripts.train_config import TrainConfig

LOCK = ".lock"
# What decides the outcome of an evaluation, of all that its line in evaluations.jsonl says.
MADE_AS = {
    "checkpoint": str,
    "step": int,
    "refresh_every": int | None,
    "environment_id": str,
    "target_return": float | None,
    "episodes": int,
    "seed": int | None,
}


class RunFolder:
    """The folder of one training run.

    Args:
        path: The folder.
    """

    def __init__(self, path: Path | str):
        self.path = Path(path)
        self.metrics_file = self.path / "metrics.jsonl"
        self.evaluations_file = self.path / "evaluations.jsonl"
        self.checkpoints = CheckpointFolder(self.path / "checkpoints")

    @classmethod
    def create(cls, config: TrainConfig) -> "RunFolder":
        """Make the folder and write config.json.

        Raises:
            ConfigError: If the folder has something in it already, or cannot be made.
        """
        name = f"{config.model.backbone}-s{config.seed}-{time.strftime('%Y%m%d-%H%M%S')}"
        default = Path("runs", "+".join(config.dataset), name)
        try:
            run = cls(config.run_dir or _make_one_of_its_own(default))
            run._refuse_used()  # before its lock would be in it
            run.path.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            path = config.run_dir or default
            raise ConfigError(f"run-dir {path} cannot be made: {error}") from error
        with run.locked():
            run._refuse_used()
            run.write_json("config.json", config.to_json())
        return run

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Hold the only right to train in this folder; the system frees it when its holder dies.

        Raises:
            ConfigError: If another process has it.
        """
        from filelock import FileLock, Timeout

        try:
            lock = FileLock(self.path / LOCK, timeout=0).acquire()
        except Timeout:
            raise ConfigError(f"another process is training in {self.path}") from None
        with lock:
            for leftover in self.path.glob("*.tmp"):  # of a file that was being written at a kill
                leftover.unlink(missing_ok=True)
            yield

    def read_config(self) -> TrainConfig:
        """Read config.json.

        Raises:
            ConfigError: If there is none, or it cannot be read.
        """
        path = self.path / "config.json"
        if not path.exists():
            raise ConfigError(f"{self.path} is not a run: it has no config.json")
        try:
            return TrainConfig.from_json(json.loads(read_text(path)))
        except (CheckpointError, ValueError, RecursionError) as error:
            raise ConfigError(f"cannot read {path}: {error}") from error

    def is_finished(self) -> bool:
        """Return whether training came to its last step."""
        steps = self.checkpoints.steps()
        return bool(steps) and self.checkpoints.last() >= self.read_config().steps

    def write_json(self, name: str, content: object) -> None:
        """Write a JSON file into the folder, atomically."""
        write_atomically(self.path / name, (json.dumps(content, indent=2) + "\n").encode())

    def read_metrics(self) -> list[dict]:
        """Return all lines of metrics so far, each a dict with "step".

        Raises:
            ConfigError: Names the file and the line that holds anything but numbers.
        """
        rows = _read_lines(self.metrics_file)
        for number, row in rows.items():
            wrong = [x for x in row.values() if not (isinstance(x, float) or is_finite_number(x))]
            if wrong or not is_of(row.get("step", 0), int):
                _refuse_line(self.metrics_file, number, wrong[0] if wrong else row["step"])
        return [row for row in rows.values() if "step" in row]

    def read_evaluations(self) -> list[dict]:
        """Return the evaluations so far, each what ``Evaluation.to_dict`` gives and more.

        Of those made in the same way, at a resume after a kill say, the latest.

        Raises:
            ConfigError: Names the file and the line that says in another way how it was made.
        """
        rows = _read_lines(self.evaluations_file)
        for number, row in rows.items():
            for name, declared in MADE_AS.items():
                if not is_of(row.get(name), declared):
                    _refuse_line(self.evaluations_file, number, row.get(name))
        return list({tuple(map(row.get, MADE_AS)): row for row in rows.values()}.values())

    def append_evaluation(self, row: dict) -> None:
        """Add an evaluation, whole even where a crash has cut the one before it."""
        _refuse_other_than_file(self.evaluations_file)
        with self.evaluations_file.open("ab+") as file:
            whole = not file.tell() or (file.seek(-1, os.SEEK_END), file.read(1))[1] == b"\n"
            file.write((b"" if whole else b"\n") + json.dumps(row).encode() + b"\n")

    def was_evaluated(self, config: TrainConfig, step: int) -> bool:
        """Return whether all that is measured after a step while training was measured.

        Args:
            config: Of the run.
            step: Of its checkpoint.
        """
        if not step or (step % config.eval_every and step != config.steps):
            return True  # nothing is
        header = self.checkpoints.header(step)
        return header.get("evaluated", header.get("score") is not None)  # format 1 had scores only

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
        table = io.StringIO(newline="")
        writer = csv.DictWriter(table, columns)
        writer.writeheader()
        writer.writerows(rows[step] for step in sorted(rows))
        write_atomically(self.path / "metrics.csv", table.getvalue().encode())

    @contextlib.contextmanager
    def metrics(self, first_step: int = 0) -> Iterator["Metrics"]:
        """Open the metrics for writing, after what is there.

        Args:
            first_step: Where the run goes on; TensorBoard shows no later steps of before.
        """
        number = len(list(self.path.glob("events.out.tfevents.*")))
        name = f"{int(time.time()):010d}.{socket.gethostname()}.{os.getpid()}.{number}"
        with contextlib.ExitStack() as files:
            try:
                lines = files.enter_context(self.metrics_file.open("ab", buffering=0))
                path = self.path / f"events.out.tfevents.{name}"
                events = files.enter_context(path.open("xb", buffering=0))
            except OSError as error:
                raise CheckpointError(f"cannot write in {self.path}: {error}") from error
            yield Metrics(lines, events, first_step)

    def _refuse_used(self) -> None:
        path = self.path
        if not path.exists():
            return
        if not path.is_dir():
            raise ConfigError(f"run-dir {path} is no folder")
        # What a process killed before it had written config.json leaves behind is nothing.
        if any(file.name != LOCK and file.suffix != ".tmp" for file in path.iterdir()):
            raise ConfigError(
                f"run-dir {path} exists already: choose another, or go on with it by "
                f"minrl train --resume {path}"
            )


def _make_one_of_its_own(path: Path) -> Path:
    """Make a folder that nobody else has, numbered if another run began in the same second."""
    path.parent.mkdir(parents=True, exist_ok=True)
    made, number = path, 1
    while True:
        try:
            made.mkdir()
        except FileExistsError:
            number += 1
            made = path.with_name(f"{path.name}-{number}")
        else:
            return made


class Metrics:
    """Appends each line of metrics to metrics.jsonl and to a TensorBoard file.

    TensorBoard's own writer does it in a thread, where a full disk goes unnoticed.

    Args:
        lines: Of JSON.
        events: Of TensorBoard; new.
        first_step: Where the run goes on.
    """

    def __init__(self, lines: BinaryIO, events: BinaryIO, first_step: int):
        from tensorboard.compat.proto import event_pb2, summary_pb2

        self._lines, self._events = lines, events
        self._event, self._summary = event_pb2.Event, summary_pb2.Summary
        self._append_event(file_version="brain.Event:2")
        if first_step:
            start = event_pb2.SessionLog(status=event_pb2.SessionLog.START)
            self._append_event(step=first_step + 1, session_log=start)

    def write(self, step: int, values: dict[str, float]) -> None:
        """Write values measured after ``step`` training steps, by TensorBoard tag.

        Raises:
            CheckpointError: If the disk is full.
        """
        _append(self._lines, (json.dumps({"step": step, **values}) + "\n").encode())
        scalars = [self._summary.Value(tag=tag, simple_value=x) for tag, x in values.items()]
        self._append_event(step=step, summary=self._summary(value=scalars))

    def sync(self) -> None:
        """Make the lines so far survive a power cut.

        Raises:
            CheckpointError: If the disk is full.
        """
        try:
            os.fsync(self._lines.fileno())
        except OSError as error:
            raise CheckpointError(f"cannot write {self._lines.name}: {error}") from error

    def _append_event(self, **content) -> None:
        from tensorboard.summary.writer.record_writer import RecordWriter

        record = io.BytesIO()
        event = self._event(wall_time=time.time(), **content)
        RecordWriter(record).write(event.SerializeToString())
        _append(self._events, record.getvalue())


def _append(file: BinaryIO, content: bytes) -> None:
    try:
        while content:
            content = content[file.write(content) :]
    except OSError as error:
        raise CheckpointError(f"cannot write {file.name}: {error}") from error


def _read_lines(path: Path) -> dict[int, dict]:
    """Return the objects in a file of JSON lines by the number of their line."""
    _refuse_other_than_file(path)
    rows = {}
    lines = path.read_text(errors="replace").splitlines() if path.exists() else ()
    for number, line in enumerate(lines, 1):
        try:
            rows[number] = json.loads(line)
        except ValueError:  # a line cut short by a crash
            continue
        except RecursionError:
            _refuse_line(path, number, line)
    return {number: row for number, row in rows.items() if isinstance(row, dict)}


def _refuse_line(path: Path, number: int, found: object) -> NoReturn:
    raise ConfigError(f"cannot read {path}, line {number}: it has {found!r:.50}")


def _refuse_other_than_file(path: Path) -> None:
    """Refuse a named pipe, for instance, which would be waited for."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"cannot read {path}: it is no file")
