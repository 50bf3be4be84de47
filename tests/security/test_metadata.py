"""Metadata made to harm: read as text, refused with the reason, and never executed."""

import json
import os
import re
import subprocess
import sys

import pytest
from hopper_files import ROWS, box, metadata, write_minari

MOST_MEMORY = 256 << 20
COMMAND = "touch was-run"
HOSTILE_SPEC = {
    "id": "Evil-v0",
    "entry_point": "os:system",
    "kwargs": {"command": COMMAND},
    "vector_entry_point": "os:system",
    "additional_wrappers": [
        {"name": "W", "entry_point": "os:system", "kwargs": {"command": COMMAND}}
    ],
}


def changed(**changes):
    """Return a function that writes metadata with these changes; `...` leaves a key out."""

    def write(path):
        content = {k: v for k, v in (metadata() | changes).items() if v is not ...}
        path.write_text(json.dumps(content))

    return write


def text(content):
    return lambda path: path.write_bytes(content)


def one_gibibyte(path):
    os.truncate(path, 1 << 30)  # takes no room on the disk


def pipe(path):
    path.unlink()
    os.mkfifo(path)


def link_out(path):
    """A link to metadata that is nobody's business, and would do."""
    outside = path.parents[4] / "outside.json"
    outside.write_text(json.dumps(metadata() | {"env_spec": json.dumps({"id": "Secret-v0"})}))
    path.unlink()
    path.symlink_to(outside)


def link_to_endless_text(path):
    path.unlink()
    path.symlink_to("/dev/zero")


def folder_link_out(path):
    data, outside = path.parent, path.parents[4] / "outside"
    data.rename(outside)
    data.symlink_to(outside)


def space(**changes):
    return json.dumps(json.loads(box(-1, 1, 3)) | changes)


SPEC = json.dumps(HOSTILE_SPEC)
REFUSED = {
    "no observation space": (
        changed(env_spec=SPEC, observation_space=...),
        "no observation_space, and minrl builds no environment",
    ),
    "no action space": (changed(env_spec=SPEC, action_space=...), "no action_space, and"),
    "no space": (
        changed(env_spec=SPEC, eval_env_spec=SPEC, observation_space=..., action_space=...),
        "no observation_space, and",
    ),
    "no space and wrappers alone": (
        changed(
            env_spec=json.dumps(HOSTILE_SPEC | {"entry_point": "gymnasium.envs.mujoco:HopperEnv"}),
            action_space=...,
        ),
        "no action_space, and",
    ),
    "space of null": (changed(action_space="null"), "not usable"),
    "space of a class": (changed(action_space=space(type="os:system")), "of type os:system"),
    "huge shape": (changed(observation_space=space(shape=[10**12])), "has shape .* but bounds"),
    "huge product": (changed(observation_space=space(shape=[10**6] * 3)), "a Box of shape"),
    "negative shape": (changed(action_space=space(shape=[-3])), "has shape"),
    "no room": (changed(action_space=space(shape=[0], low=[], high=[])), "has shape"),
    "shape of text": (changed(action_space=space(shape=["3"])), "not usable"),
    "number beyond floats": (changed(action_space=space(low=[-(10**400)] * 3)), "OverflowError"),
    "bounds of text": (changed(action_space=space(low=["a", "b", "c"])), "not usable"),
    "ragged bounds": (changed(action_space=space(low=[[1], [1, 2], 3])), "not usable"),
    "deep bounds": (
        changed(action_space='{"type":"Box","shape":[3],"low":' + "[" * 100_000),
        "RecursionError|not usable",
    ),
    "bounds that are no numbers": (
        changed(action_space=space(low=[float("nan")] * 3)),
        "action_space has a lower bound that is not below its upper bound",
    ),
    "bounds the wrong way": (
        changed(action_space=space(low=[2.0] * 3)),
        "action_space has a lower bound that is not below its upper bound",
    ),
    "equal reference scores": (
        changed(ref_min_score=0.0, ref_max_score=0.0),
        "the lower first, not 0 and 0",
    ),
    "infinite reference score": (
        changed(ref_min_score=0.0, ref_max_score=float("inf")),
        "reference scores must be finite, the lower first, not 0 and inf",
    ),
    "reference score of nothing": (
        changed(ref_min_score=float("nan"), ref_max_score=1.0),
        "the lower first, not nan and 1",
    ),
    "reference score of text": (changed(ref_min_score="a", ref_max_score=1.0), "not usable"),
    "link out": (link_out, "is a link out of the dataset's folder, which minrl refuses"),
    "link of the folder out": (folder_link_out, "is a link out of the dataset's folder, which"),
    "link to endless text": (link_to_endless_text, "is a link out|not on this machine"),
    "endless limit": (changed(env_spec='{"max_episode_steps": Infinity}'), "OverflowError"),
    "specification of a list": (changed(env_spec="[1]"), "not usable"),
    "specification of a number": (changed(env_spec=7), "not usable"),
    "steps beyond the file": (changed(total_steps=10**15), "cannot be in [0-9]+ bytes"),
    "number of many digits": (
        text(b'{"total_steps": ' + b"9" * 100_000 + b"}"),
        "not usable",
    ),
    "steps of text": (changed(total_steps=str(ROWS)), "positive whole number"),
    "steps of a fraction": (changed(total_steps=8.0), "positive whole number"),
    "no episodes": (changed(total_episodes=0), "positive whole number"),
    "format of a path": (changed(data_format="../../x"), "data_format must be one of"),
    "format of a module": (changed(data_format="os:system"), "data_format must be one of"),
    "bad JSON": (text(b"{"), "not usable"),
    "no JSON": (text(b"\x80\x04\x95"), "not usable"),
    "a list": (text(b"[]"), "no observation_space"),
    "nothing": (text(b""), "not usable"),
    "deep JSON": (text(b"[" * 1_000_000), "not usable"),
    "one gibibyte": (one_gibibyte, "larger than any metadata should be"),
    "a pipe": (pipe, "not on this machine|incomplete"),
}
ACCEPTED = {
    "hostile specification": changed(env_spec=SPEC, eval_env_spec=SPEC),
    "an id that names a module": changed(env_spec=json.dumps({"id": "os:system-v0"})),
    "hostile requirements": changed(requirements=["; " + COMMAND], code_permalink="file:///"),
    "hostile description": changed(description="$(" + COMMAND + ")", author={"a": ["b"]}),
}

LOAD_ALL = """
import json, resource, sys
from minrl.data.minari_source import list_datasets, load_dataset
from minrl.errors import DatasetError

executed = []
load_dataset("hostile/honest-v0")
try:
    load_dataset("hostile/bad-JSON-v0")
except DatasetError:  # whatever is imported late is there now
    pass
ids = json.load(sys.stdin)
sys.addaudithook(
    lambda event, arguments: executed.append(f"{event} {arguments[:1]}")
    if event.split(".")[0] in ("subprocess", "import", "exec", "pickle", "socket", "ctypes")
    or event in ("os.system", "os.exec", "os.posix_spawn", "os.fork", "os.mkdir")
    else None
)
peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
for name in ids:
    before = peak
    executed.clear()
    try:
        message = f"loaded {load_dataset(name, download=False).info.environment_id}"
    except DatasetError as error:
        message = str(error)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    print(json.dumps([message, executed, (peak - before) << 10]), flush=True)
executed.clear()
rows = list_datasets()
secret = any(row.environment_id == "Secret-v0" for row in rows)
print(json.dumps(["listed, with a secret" if secret else "listed", executed, 0]))
"""


@pytest.fixture(scope="module")
def verdicts(tmp_path_factory):
    """What loading said of each kind, what it executed, and the memory it took."""
    root = tmp_path_factory.mktemp("datasets")
    write_minari(root, "honest")
    kinds = {kind: write for kind, (write, _) in REFUSED.items()} | ACCEPTED
    ids = [write_minari(root, kind) for kind in kinds]
    for dataset_id, write in zip(ids, kinds.values(), strict=True):
        write(root / dataset_id / "data" / "metadata.json")
    done = subprocess.run(
        [sys.executable, "-c", LOAD_ALL],
        cwd=root,
        input=json.dumps(ids),
        env=os.environ | {"MINARI_DATASETS_PATH": str(root)},
        capture_output=True,
        text=True,
        timeout=100,
    )
    rows = [json.loads(line) for line in done.stdout.splitlines()]
    assert done.returncode == 0, f"after {rows[-1:]}: {done.stderr}"
    assert not (root / "was-run").exists()
    return dict(zip([*kinds, "list"], rows, strict=True))


@pytest.mark.parametrize("kind", REFUSED)
def test_hostile_metadata_is_refused_and_not_executed(verdicts, kind):
    message, executed, memory = verdicts[kind]
    assert re.search(f"dataset hostile/.*{REFUSED[kind][1]}", message), message
    assert executed == []
    assert memory <= MOST_MEMORY


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_metadata_names_is_text_and_no_more(verdicts, kind):
    message, executed, _ = verdicts[kind]
    assert message.startswith("loaded ")
    assert executed == []


def test_listing_datasets_executes_nothing(verdicts):
    assert verdicts["list"][:2] == ["listed", []]


def test_an_environment_named_by_metadata_is_not_imported():
    from minrl.envs.make import make_env
    from minrl.errors import EnvError

    with pytest.raises(EnvError, match="names a module to import, which is refused"):
        make_env("os:system-v0")
    with pytest.raises(EnvError, match="unknown environment 'Evil-v0'"):
        make_env("Evil-v0")
