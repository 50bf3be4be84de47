"""Checkpoints made to harm: nothing is executed, little memory is taken, the process lives."""

import copy
import io
import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch

from minrl.agents.checkpoint import load_weights, pack_weights
from minrl.agents.decision_agent import DecisionAgent
from minrl.agents.trainer_archive import read_trainer_state
from minrl.agents.trajectory import ModelConfig, TrajectoryModel
from minrl.errors import CheckpointError

MOST_MEMORY = 256 << 20
COMMAND = b"\x80\x02cposix\nsystem\nX\x0d\x00\x00\x00touch was-run\x85R."


def archive_of(instructions, compression=zipfile.ZIP_STORED, **members):
    """Return torch's form of an archive with these instructions and members."""
    sound = io.BytesIO()
    torch.save({"moments": torch.ones(4)}, sound)
    made = io.BytesIO()
    with zipfile.ZipFile(sound) as source, zipfile.ZipFile(made, "w", compression) as target:
        for member in source.infolist():
            name = member.filename.partition("/")[2]
            content = {"data.pkl": instructions, **members}.get(name, source.read(member))
            target.writestr(member.filename, content)
        for name in members.keys() - {member.filename for member in target.infolist()}:
            if not any(member.filename.endswith(name) for member in target.infolist()):
                target.writestr(f"archive/{name}", members[name])
    return made.getvalue()


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def instructions_of(state, replace=(b"", b"")):
    content = zipfile.ZipFile(io.BytesIO(saved(state))).read("archive/data.pkl")
    assert replace[0] in content
    return content.replace(*replace)


def legacy_tar():
    made = io.BytesIO()
    with tarfile.open(fileobj=made, mode="w") as archive:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(COMMAND)
            archive.addfile(member, io.BytesIO(COMMAND))
    return made.getvalue()


def overlapping_members():
    """An archive that names one member a thousand times, as the best zip bombs do."""
    made = io.BytesIO(saved({"moments": torch.ones(1000)}))
    with zipfile.ZipFile(made, "a") as archive:
        big = max(archive.infolist(), key=lambda member: member.file_size)
        for number in range(1000):
            again = copy.copy(big)
            again.filename = f"archive/data/{number + 1}"
            archive.filelist.append(again)
            archive.NameToInfo[again.filename] = again
        archive.writestr("archive/one-more", b"")
    return made.getvalue()


NESTED = {"optimizer": {"state": [{0: torch.ones(2), 1: Call(os.system, "touch was-run")}]}}
TENSOR = {"moments": torch.ones(4)}
PAYLOADS = {
    "os.system": (lambda: archive_of(COMMAND), "names posix system"),
    "eval": (lambda: saved({"a": Call(eval, "open('was-run', 'w')")}), "names __builtin__ eval"),
    "exec": (lambda: saved({"a": Call(exec, "open('was-run', 'w')")}), "names __builtin__ exec"),
    "deep in a sound state": (lambda: saved(NESTED), "names posix system"),
    "a pickle in a pickle": (
        lambda: saved({"a": Call(pickle.loads, COMMAND)}),
        "names pickle loads",
    ),
    "a pickle of protocol 4": (
        lambda: archive_of(pickle.dumps({"a": Call(os.system, "touch was-run")}, 4)),
        "the pickle instruction (FRAME|STACK_GLOBAL|MEMOIZE)",
    ),
    "an instance of a class": (
        lambda: archive_of(b"(X\x0d\x00\x00\x00touch was-runiposix\nsystem\n."),
        "the pickle instruction INST",
    ),
    "legacy tar": (legacy_tar, "not a zip file"),
    "legacy pickle": (lambda: COMMAND, "not a zip file"),
    "TorchScript": (
        lambda: archive_of(b"\x80\x02}.", **{"constants.pkl": COMMAND}),
        "it has 2 pickles",
    ),
    "deep tuples as a key": (
        lambda: archive_of(b"\x80\x02})" + 500_000 * b"\x85" + b"K\x01s."),
        "nested more than 50 deep",
    ),
    "deep lists": (
        lambda: archive_of(b"\x80\x02" + 100_000 * b"]" + 99_999 * b"a" + b"."),
        "nested more than 50 deep",
    ),
    "a tuple as a key": (lambda: saved({("a", "b"): 1}), "dict with plain keys"),
    "a tuple as the name of a storage": (
        lambda: archive_of(instructions_of(TENSOR, (b"X\x01\x00\x00\x000", b"K\x01\x85"))),
        "storage in an unknown way",
    ),
    "a list in itself": (lambda: archive_of(b"\x80\x02]q\x00h\x00a."), "uses a list"),
    "a billion laughs": (
        lambda: archive_of(
            b"\x80\x02)" + b"".join(b"q%ch%c\x86" % (i, i) for i in range(60)) + b"."
        ),
        "a nested tuple twice",
    ),
    "bytes without end": (
        lambda: archive_of(b"\x80\x02cbuiltins\nbytearray\n\x8a\x05\x00\x00\x00\x00\x02\x85R."),
        "names builtins bytearray",
    ),
    "a set": (lambda: saved({"a": {1, 2}}), "names __builtin__ set"),
    "zip bomb": (
        lambda: archive_of(
            instructions_of({"moments": torch.ones(4)}),
            zipfile.ZIP_DEFLATED,
            **{"data/0": bytes(32 << 20)},
        ),
        "a member is compressed",
    ),
    "overlapping members": (overlapping_members, "members are larger than the file|Overlapped"),
    "giant storage": (
        lambda: archive_of(
            instructions_of(TENSOR, (b"K\x04tq", b"\x8a\x05\x00\x00\x00\x00\x02tq"))
        ),
        "record size|does not match",
    ),
    "giant shape": (
        lambda: saved({"a": torch.ones(1).expand(1 << 20, 1 << 20)}),
        r"a tensor of shape \(1048576, 1048576\) has fewer values",
    ),
    "shape beyond its storage": (
        lambda: archive_of(
            instructions_of(TENSOR, (b"K\x00K\x04\x85", b"K\x00\x8a\x05\x00\x00\x00\x00\x02\x85"))
        ),
        "out of bounds|resize storage",
    ),
    "no dict": (lambda: saved([1, 2]), "it is no dict"),
    "cut short": (lambda: archive_of(b"\x80\x02}q"), "not enough data"),
    "an empty stack": (lambda: archive_of(b"\x80\x02s."), "index out of range|pop from empty"),
}

LOAD_ALL = """
import encodings.cp437, json, pathlib, resource, sys  # the encoding of names in zip files
from minrl.agents.checkpoint import CheckpointFolder
from minrl.errors import CheckpointError

folder = CheckpointFolder(pathlib.Path("folder"))
folder.trainer_state(0)
try:
    folder.trainer_state(1)
except CheckpointError:  # whatever is imported late is there now
    pass
executed = []
sys.addaudithook(
    lambda event, arguments: executed.append(f"{event} {arguments[:1]}")
    if event.split(".")[0] in ("subprocess", "import", "exec", "pickle", "socket", "ctypes")
    or event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.mkdir")
    else None
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for step in folder.steps()[2:]:
    before = peak
    executed.clear()
    try:
        folder.trainer_state(step)
    except CheckpointError as error:
        message = str(error)
    else:
        message = "loaded"
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([step, message, executed, (peak - before) << 10]), flush=True)
"""


def plant(folder, step, content):
    """Write a checkpoint whose digests are right: they keep out damage, not malice."""
    from minrl.agents import checkpoint

    weights, trainer, record = folder._files(step)
    folder.path.mkdir(exist_ok=True)
    weights.write_bytes(b"")
    trainer.write_bytes(content)
    digests = {path.name: checkpoint.digest_of(path.read_bytes()) for path in (weights, trainer)}
    record.write_text(checkpoint._seal({"step": step, "files": digests}))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What loading said of each payload, what it executed, and the memory it took."""
    from minrl.agents.checkpoint import CheckpointFolder

    path = tmp_path_factory.mktemp("run")
    folder = CheckpointFolder(path / "folder")
    plant(folder, 0, saved({"moments": torch.ones(4), "rates": [(0.9, 0.99)] * 2}))
    plant(folder, 1, saved({1, 2}))
    for step, (payload, _) in enumerate(PAYLOADS.values(), 2):
        plant(folder, step, payload())
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL], cwd=path, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {rows[-1:]}: {done.stderr}"
    assert not (path / "was-run").exists()
    return {kind: row[1:] for kind, row in zip(PAYLOADS, rows, strict=True)}


@pytest.mark.parametrize("kind", PAYLOADS)
def test_hostile_trainer_state_is_refused_and_not_executed(verdicts, kind):
    message, executed, memory = verdicts[kind]
    assert "trainer.pt cannot be read as trainer state: " in message
    assert re.search(PAYLOADS[kind][1], message), message
    assert executed == []
    assert memory <= MOST_MEMORY


def test_what_training_saves_is_read(tmp_path):
    model = torch.nn.Sequential(*[torch.nn.Linear(3, 3) for _ in range(20)])
    optimizer = torch.optim.AdamW(model.parameters(), betas=(0.8, 0.9)).state_dict()
    for index, parameter in enumerate(model.parameters()):  # as after a step
        optimizer["state"][index] = {"step": torch.tensor(1.0), "exp_avg": parameter.detach() / 3}
    state = {
        "step": 10**12,
        "none": None,
        "long": list(range(2500)),
        "rates": [0.5, -1, (1, 2.0)],
        "text": "\u03b1",
        "flags": {"yes": True, 3: False},
        "model": model.state_dict(),
        "optimizer": optimizer,
        "other": [torch.zeros(0), torch.tensor(3), torch.ones(2, 3).T, torch.ones(4)[1:]],
        "kinds": [
            torch.ones(2, dtype=kind)
            for kind in (torch.float64, torch.bfloat16, torch.int64, torch.uint8, torch.bool)
        ],
    }
    found = read_trainer_state(saved(state))
    assert found.keys() == state.keys()
    for name in ("step", "none", "long", "rates", "text", "flags"):
        assert found[name] == state[name]
    assert found["optimizer"]["param_groups"] == state["optimizer"]["param_groups"]
    for one, other in zip(
        found["other"] + found["kinds"], state["other"] + state["kinds"], strict=True
    ):
        assert one.dtype == other.dtype
        assert torch.equal(one, other)
    for index, moments in state["optimizer"]["state"].items():
        for name, value in moments.items():
            assert torch.equal(found["optimizer"]["state"][index][name], value)
    assert all(torch.equal(found["model"][name], v) for name, v in state["model"].items())


@pytest.mark.parametrize(
    ("field", "value", "message", "built_on"),
    [
        ("width", 1 << 14, "the model's embed_return.weight is", [{"meta"}]),
        ("num_layers", 1 << 30, "more layers than it has weights", []),
        ("num_layers", 2, "the model has no backbone", [{"meta"}]),
        ("tokens", "none", "tokens must be one of", []),
        ("width", "wide", "not supported between", []),
    ],
)
def test_an_agent_that_describes_what_it_does_not_hold_is_refused_unbuilt(
    field, value, message, built_on, tmp_path, monkeypatch
):
    model = TrajectoryModel(5, 2, ModelConfig(width=16, num_layers=1))
    DecisionAgent(model, target_return=1.0).save(tmp_path / "agent.safetensors")
    tensors, header = load_weights(tmp_path / "agent.safetensors")
    header["model"]["config"][field] = value
    (tmp_path / "agent.safetensors").write_bytes(pack_weights(tensors, header))
    plain, devices = TrajectoryModel.__init__, []

    def note_devices(self, *arguments):
        plain(self, *arguments)
        devices.append({parameter.device.type for parameter in self.parameters()})

    monkeypatch.setattr(TrajectoryModel, "__init__", note_devices)
    with pytest.raises(CheckpointError, match=f"does not fit this version of minrl: .*{message}"):
        DecisionAgent.load(tmp_path / "agent.safetensors")
    assert devices == built_on
