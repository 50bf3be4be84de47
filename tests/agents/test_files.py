"""Files that are written whole or not at all."""

import errno
import hashlib
import os
import stat
from pathlib import Path

import pytest

from minrl.agents import files
from minrl.agents.files import digest_of_file, read_text, replace_files, write_atomically
from minrl.errors import CheckpointError


def test_all_is_on_the_disk_before_any_name_changes(tmp_path, monkeypatch):
    events, plain_fsync, plain_replace = [], os.fsync, os.replace

    def fsync(descriptor):
        plain_fsync(descriptor)
        found = os.fstat(descriptor)
        events.append("folder" if stat.S_ISDIR(found.st_mode) else found.st_size)

    def replace(old, new):
        plain_replace(old, new)
        events.append(new.name)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    replace_files({tmp_path / "a": b"12", tmp_path / "b": b"345"})
    assert events == [2, 3, "a", "folder", "b", "folder"]


def test_no_file_changes_when_one_cannot_be_written(tmp_path):
    old, missing = tmp_path / "a", tmp_path / "missing" / "b"
    old.write_bytes(b"old")
    with pytest.raises(
        CheckpointError, match=f"cannot write {missing}: No such file or directory$"
    ):
        replace_files({old: b"new", missing: b""})
    assert list(tmp_path.iterdir()) == [old]
    assert old.read_bytes() == b"old"


def test_ctrl_c_leaves_nothing_behind_and_is_passed_on(tmp_path, monkeypatch):
    def interrupt(descriptor):
        raise KeyboardInterrupt

    monkeypatch.setattr(os, "fsync", interrupt)
    with pytest.raises(KeyboardInterrupt):
        write_atomically(tmp_path / "a", b"content")
    assert not list(tmp_path.iterdir())


@pytest.fixture
def refuse_folders(monkeypatch):
    """Return a function that makes syncs of folders fail with an error, and lists which did."""
    plain = os.fsync

    def refuse(number):
        refused = []

        def fsync(descriptor):
            if stat.S_ISDIR(os.fstat(descriptor).st_mode):
                refused.append(descriptor)
                raise OSError(number, os.strerror(number))
            plain(descriptor)

        monkeypatch.setattr(os, "fsync", fsync)
        return refused

    return refuse


def test_a_folder_that_fails_to_sync_is_an_error_and_is_closed(tmp_path, refuse_folders):
    refused = refuse_folders(errno.EIO)
    with pytest.raises(CheckpointError, match="Input/output error"):
        write_atomically(tmp_path / "a", b"content")
    assert len(refused) == 1
    with pytest.raises(OSError, match="Bad file descriptor"):
        os.fstat(refused[0])


@pytest.mark.parametrize("number", [errno.EINVAL, errno.ENOTSUP, errno.EBADF])
def test_a_file_system_that_cannot_sync_folders_is_written_to(tmp_path, refuse_folders, number):
    refused = refuse_folders(number)
    write_atomically(tmp_path / "file", b"content")
    assert (tmp_path / "file").read_bytes() == b"content"
    assert refused


def test_windows_which_cannot_open_folders_is_not_asked_to(tmp_path, monkeypatch):
    opened, plain = [], os.open
    path = tmp_path / "file"
    with monkeypatch.context() as patch:
        patch.setattr(os, "name", "nt")
        patch.setattr(os, "open", lambda name, *more: opened.append(name) or plain(name, *more))
        write_atomically(path, b"content")
    assert (opened, path.read_bytes()) == ([], b"content")


@pytest.mark.parametrize("mask", [0o022, 0o077])
def test_files_have_the_mode_that_the_user_wants_for_new_ones(tmp_path, mask):
    before = os.umask(mask)
    try:
        write_atomically(tmp_path / "file", b"content")
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "file").stat().st_mode) == 0o666 & ~mask


def test_text_is_read_up_to_the_largest_size(tmp_path, monkeypatch):
    monkeypatch.setattr(files, "LARGEST_TEXT", 100)
    path = tmp_path / "a.json"
    path.write_bytes(b"x" * 100)
    assert read_text(path) == "x" * 100
    path.write_bytes(b"x" * 101)
    with pytest.raises(CheckpointError, match=r"a\.json is larger than any such file should be"):
        read_text(path)
    path.write_bytes(b"\xff")
    with pytest.raises(CheckpointError, match=r"cannot read .*a\.json"):
        read_text(path)


def test_the_digest_of_a_large_file_is_that_of_all_of_it(tmp_path):
    content = os.urandom((5 << 20) + 7)
    (tmp_path / "a").write_bytes(content)
    assert digest_of_file(tmp_path / "a") == hashlib.sha256(content).hexdigest()


@pytest.mark.skipif(not os.path.isfile("/proc/self/mem"), reason="Linux has a file that fails")
@pytest.mark.parametrize("read", [read_text, digest_of_file])
def test_a_file_that_fails_while_it_is_read_is_named(read):
    with pytest.raises(CheckpointError, match=r"cannot read /proc/self/mem: .*Input/output error"):
        read(Path("/proc/self/mem"))  # nothing is mapped at its start
