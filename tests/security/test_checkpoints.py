"""Checkpoints made to harm: nothing is executed, little memory is taken, the process lives."""

import json
import os
import pickle
import re
import subprocess
import sys
import tarfile
import zipfile
from io import BytesIO

import pytest
import torch

from minrl.agents import checkpoint
from minrl.agents.checkpoint import pack_weights
from minrl.agents.files import digest_of

MOST_MEMORY = 256 << 20
COMMAND = b"\x80\x02cposix\nsystem\nX\x0d\x00\x00\x00touch was-run\x85R."
TENSORS = {"moments": torch.ones(4)}


class Call:
    """Pickles as the call of a function."""

    def __init__(self, function, *arguments):
        self.call = function, arguments

    def __reduce__(self):
        return self.call


def pickled(state):
    buffer = BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def archive(**members):
    made = BytesIO()
    with zipfile.ZipFile(made, "w") as target:
        for name, content in members.items():
            target.writestr(f"archive/{name}", content)
    return made.getvalue()


def legacy_tar():
    made = BytesIO()
    with tarfile.open(fileobj=made, mode="w") as target:
        for name in ("sys_info", "pickle", "storages", "tensors"):
            member = tarfile.TarInfo(name)
            member.size = len(COMMAND)
            target.addfile(member, BytesIO(COMMAND))
    return made.getvalue()


def safetensors_of(header, data=b"", size=None):
    """Return the bytes of a file with this header, right or wrong."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if size is None else size).to_bytes(8, "little") + text + data


def describing(*shape, offsets=(0, 16), dtype="F32", data=bytes(16), name="a"):
    entry = {"dtype": dtype, "shape": shape, "data_offsets": offsets}
    return safetensors_of({name: entry, "__metadata__": {"minrl": "{}"}}, data)


def sealed(text):
    """Return a sound file whose own header is this text, if need be with its digest."""
    return safetensors_of({"__metadata__": {"minrl": text}})


def tree_of(tree, tensors=None):
    return pack_weights(TENSORS if tensors is None else tensors, {"tree": tree})


LEAF = {"tensor": "moments"}
PLAIN = r"holds no minrl agent|damaged or not a safetensors file"
# Files of any kind in the place of weights or of trainer state.
FILES = {
    "os.system": (lambda: pickled({"a": Call(os.system, "touch was-run")}), PLAIN),
    "eval": (lambda: pickled({"a": Call(eval, "open('was-run', 'w')")}), PLAIN),
    "a pickle in a pickle": (lambda: pickled({"a": Call(pickle.loads, COMMAND)}), PLAIN),
    "a pickle of protocol 4": (lambda: pickle.dumps(Call(os.system, "touch was-run"), 4), PLAIN),
    "a legacy pickle": (lambda: COMMAND, PLAIN),
    "a legacy tar": (legacy_tar, PLAIN),
    "two archives' names": (lambda: archive(**{"DATA.PKL": COMMAND, "data.pkl": b"}."}), PLAIN),
    "TorchScript": (lambda: archive(**{"constants.pkl": COMMAND, "data.pkl": COMMAND}), PLAIN),
    "zip bomb": (lambda: archive(**{"data/0": bytes(4 << 20)}), PLAIN),
    "empty": (lambda: b"", PLAIN),
    "header cut short": (lambda: safetensors_of(b"{", size=100), PLAIN),
    "giant header": (lambda: safetensors_of(b"{}", size=1 << 60), "header is larger"),
    "large header": (lambda: safetensors_of(b" " * (5 << 20)), "header is larger"),
    "giant shape": (lambda: describing(1 << 40, 1 << 40), PLAIN),
    "giant shape of nothing": (lambda: describing(0, 1 << 62, offsets=(0, 0), data=b""), ""),
    "many axes": (lambda: describing(*[1] * 100_000, offsets=(0, 4), data=bytes(4)), ""),
    "offsets beyond the end": (lambda: describing(1 << 30, offsets=(0, 4 << 30)), PLAIN),
    "offsets backwards": (lambda: describing(4, offsets=(16, 0)), PLAIN),
    "overlapping tensors": (
        lambda: safetensors_of(
            {str(i): {"dtype": "U8", "shape": [16], "data_offsets": [0, 16]} for i in range(1000)},
            bytes(16),
        ),
        PLAIN,
    ),
    "unknown kind of number": (lambda: describing(4, dtype="F24"), PLAIN),
    "many names": (
        lambda: safetensors_of(
            {f"{i}": {"dtype": "U8", "shape": [0], "data_offsets": [0, 0]} for i in range(20_000)}
        ),
        "holds no minrl agent",
    ),
    "deep header": (lambda: safetensors_of(b'{"a":' * 100_000), PLAIN),
    "deep JSON": (lambda: sealed("[" * 1_000_000), "its JSON cannot be read"),
    "many lists": (lambda: sealed("[" + "[]," * 1_300_000 + "[]]"), "its JSON cannot be read"),
    "many lists in an object": (
        lambda: sealed('{"a":[' + "[]," * 600_000 + '[]],"sha256":""}'),
        "does not match its SHA-256",
    ),
    "a number without end": (lambda: sealed('{"a": ' + "9" * 10_000 + "}"), "cannot be read"),
    "JSON of another kind": (lambda: sealed("[1, 2]"), "its JSON cannot be read"),
}
# Trainer states that are sound files.
TREES = {
    "no tree": (lambda: pack_weights(TENSORS, {}), "moments has no place in it"),
    "no dict": (lambda: tree_of([LEAF]), "it is no dict"),
    "a tensor": (lambda: tree_of(LEAF), "it is no dict"),
    "a tensor twice": (lambda: tree_of({"tuple": [LEAF, LEAF]}), "is not there, or was used"),
    "a tensor that is not there": (lambda: tree_of({"tensor": "x"}), "the tensor x is not there"),
    "a tensor without a place": (lambda: tree_of({"dict": []}), "moments has no place in it"),
    "a call": (lambda: tree_of({"call": ["os.system", "touch was-run"]}), "unknown kind"),
    "an object with more keys": (lambda: tree_of({**LEAF, "dict": []}), "unknown kind"),
    "an object without keys": (lambda: tree_of({}), "unknown kind"),
    "a name that is a list": (lambda: tree_of({"tensor": ["moments"]}), "unknown kind"),
    "a list as a key": (lambda: tree_of({"dict": [[["a"], 1]]}), "other than keys and values"),
    "a bool as a key": (lambda: tree_of({"dict": [[True, 1]]}), "other than keys and values"),
    "half a pair": (lambda: tree_of({"dict": [["a"]]}), "other than keys and values"),
    "infinity": (lambda: tree_of({"dict": [["a", float("inf")]]}), "inf is not finite"),
    "nan": (lambda: tree_of({"dict": [["a", float("nan")]]}), "nan is not finite"),
    "deep tuples": (lambda: tree_of(nested("tuple", 60)), "nested more than 50 deep"),
    "many dicts": (
        lambda: tree_of({"tuple": [{"dict": []} for _ in range(200_000)]}, {}),
        "it is no dict",
    ),
}


def nested(kind, depth):
    tree = LEAF
    for _ in range(depth):
        tree = {kind: [tree]}
    return tree


LOAD_ALL = """
import json, pathlib, resource, sys
from minrl.agents.checkpoint import CheckpointFolder, load_weights
from minrl.errors import CheckpointError

folder = CheckpointFolder(pathlib.Path("folder"))
folder.trainer_state(0)
executed = []
sys.addaudithook(
    lambda event, arguments: executed.append(f"{event} {arguments[:1]}")
    if event.split(".")[0] in ("subprocess", "import", "exec", "pickle", "socket", "ctypes")
    or event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.remove", "os.mkdir")
    else None
)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for step in folder.steps()[1:]:
    messages = []
    executed.clear()
    for read in (lambda: load_weights(folder.weights(step)), lambda: folder.trainer_state(step)):
        try:
            read()
        except CheckpointError as error:
            messages.append(str(error))
        else:
            messages.append("loaded")
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([step, messages, executed, (peak - before) << 10]), flush=True)
"""


def plant(folder, step, content):
    """Write a checkpoint whose digests are right: they keep out damage, not malice."""
    folder.path.mkdir(exist_ok=True)
    paths = [folder._file(step, suffix) for suffix in ("safetensors", "trainer.safetensors")]
    for path in paths:
        path.write_bytes(content)
    known = {"format": 2, "step": step, "files": {path.name: digest_of(content) for path in paths}}
    folder._file(step, "json").write_text(checkpoint._seal(known))


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What loading said of each payload, what it executed, and the memory it took."""
    path = tmp_path_factory.mktemp("run")
    folder = checkpoint.CheckpointFolder(path / "folder")
    plant(folder, 0, tree_of({"dict": [["moments", LEAF]]}))
    for step, (payload, _) in enumerate([*FILES.values(), *TREES.values()], 1):
        plant(folder, step, payload())
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL], cwd=path, capture_output=True, text=True
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {rows[-1:]}: {done.stderr}"
    assert not (path / "was-run").exists()
    return {kind: row[1:] for kind, row in zip([*FILES, *TREES], rows, strict=True)}


@pytest.mark.integration
@pytest.mark.parametrize("kind", [*FILES, *TREES])
def test_hostile_files_are_refused_and_not_executed(verdicts, kind):
    (weights, trainer), executed, memory = verdicts[kind]
    message = (FILES | TREES)[kind][1]
    assert "trainer.safetensors cannot be read as trainer state: " in trainer
    assert re.search(message, trainer), trainer
    if kind in FILES:
        assert re.search(message, weights), weights
        assert weights != "loaded"
    assert executed == []
    assert memory <= MOST_MEMORY
