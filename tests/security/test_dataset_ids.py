import os
import sys

import pytest
from hopper_files import write_minari

from minrl.data.dataset_ids import EMBEDDED_IDS, REMOTE_IDS, check_id, dataset_folder
from minrl.data.minari_source import load_dataset
from minrl.errors import DatasetError

HOSTILE = [
    "",
    "..",
    ".",
    "../x-v0",
    "../../etc/passwd",
    "a/../b-v0",
    "a/..-v0",
    "/etc/passwd",
    "/etc/passwd-v0",
    "//server/share-v0",
    "~/x-v0",
    "~root-v0",
    "$HOME/x-v0",
    "a//b-v0",
    "a/b-v0/",
    "a/b-v0\n",
    "\na/b-v0",
    "a/b\x00-v0",
    "a\\b-v0",
    "..\\x-v0",
    "C:\\x-v0",
    "C:/x-v0",
    "a/b-v",
    "a/b",
    "a/b-v0.0",
    "a/b-v\u0661",
    "a/\u2024\u2024/b-v0",
    "a/\u2025/b-v0",
    "\u0430dmin/x-v0",
    "hf://owner/x-v0",
    "x y-v0",
    "a" * 5000 + "-v0",
    "%2e%2e/x-v0",
    "a/b-v0;rm",
    "os:system-v0",
]


def file_events_of(function):
    """Return the error a call ends in, and the audit events on files or processes meanwhile."""
    events, active = [], [True]

    def hook(event, arguments):
        if active and event.partition(".")[0] in ("open", "os", "shutil", "subprocess", "glob"):
            events.append((event, arguments))

    sys.addaudithook(hook)  # cannot be removed, only muted
    try:
        function()
    except DatasetError as error:
        return error, events
    finally:
        active.clear()
    return None, events


@pytest.mark.parametrize("dataset_id", HOSTILE, ids=lambda text: ascii(text)[:30])
def test_hostile_id_is_refused_before_any_file_access(dataset_id):
    for ids in (dataset_id, ["minrl/hopper/medium-v0", dataset_id]):
        error, events = file_events_of(lambda ids=ids: load_dataset(ids))
        assert "malformed dataset id" in str(error)
        assert events == []


def test_file_access_would_have_been_noticed(datasets_path):
    error, events = file_events_of(lambda: load_dataset("aa/b-v0", download=False))
    assert "not on this machine" in str(error)
    assert events


def test_id_of_another_type_is_refused():
    for value in (None, 3, b"a-v0"):
        with pytest.raises(DatasetError, match="malformed"):
            check_id(value)


def test_known_ids_are_well_formed():
    assert len(EMBEDDED_IDS) == 9
    for dataset_id in (*EMBEDDED_IDS, *REMOTE_IDS, "D4RL/door/human-v2", "x-v10"):
        assert check_id(dataset_id) == dataset_id


def test_link_that_leads_out_of_the_datasets_folder_is_refused(tmp_path, monkeypatch):
    root = tmp_path / "datasets"
    root.mkdir()
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    outside = tmp_path / "outside"
    (outside / "x-v0" / "data").mkdir(parents=True)
    os.symlink(outside, root / "inside")
    with pytest.raises(DatasetError, match="lies outside"):
        dataset_folder("inside/x-v0")
    with pytest.raises(DatasetError, match="lies outside"):
        load_dataset("inside/x-v0", download=False)


def test_link_that_leads_out_of_a_dataset_is_refused(tmp_path, monkeypatch):
    root = tmp_path / "datasets"
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(root))
    dataset_id = write_minari(root, "honest")
    data = root / dataset_id / "data"
    os.symlink("main_data.hdf5", data / "same-folder")  # leads nowhere else
    assert load_dataset(dataset_id).num_episodes == 1
    (data / "main_data.hdf5").rename(tmp_path / "other.hdf5")
    os.symlink(tmp_path / "other.hdf5", data / "main_data.hdf5")
    with pytest.raises(
        DatasetError, match=r"main_data\.hdf5 is a link out of the dataset's folder"
    ):
        load_dataset(dataset_id)
