"""What mounts lack, such as network drives and folders of a virtual machine's host."""

import errno
import os
import stat

import numpy as np
import pytest

from plotarmour.cli import UserError
from plotarmour.files import locked, map_file, write_json


def failing(code):
    def fail(*args, **keywords):
        raise OSError(code, os.strerror(code))
    return fail


@pytest.mark.skipif(os.name != "posix", reason="folders are not synced here")
@pytest.mark.parametrize("code", [errno.EINVAL, errno.ENOTSUP])
def test_a_folder_that_cannot_be_synced_is_passed_over(tmp_path, monkeypatch, code):
    """Guards: no run and no token file in a folder that VirtualBox shares, although all of it is written."""
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (failing(code) if stat.S_ISDIR(os.fstat(handle).st_mode) else
                                                     fsync)(handle))
    write_json(tmp_path / "run.json", {})
    assert os.listdir(tmp_path) == ["run.json"]
    monkeypatch.setattr(os, "fsync", failing(code))
    with pytest.raises(OSError, match=os.strerror(code)):
        write_json(tmp_path / "run.json", {})


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.EOPNOTSUPP, errno.EIO, errno.ENOSYS])
def test_a_mount_without_locks_is_warned_of(tmp_path, monkeypatch, warned, code):
    """Guards: a traceback and a hidden folder that stays, on a network drive without locks."""
    monkeypatch.setattr(pytest.importorskip("fcntl"), "flock", failing(code))
    with warned() as messages:
        with locked(tmp_path / ".lock", tmp_path / "x.bin"):
            assert (tmp_path / ".lock").is_dir()
    assert os.listdir(tmp_path) == [] and messages in ([], [
        f"{tmp_path} is on a mount without locks: take care that no other process writes {tmp_path / 'x.bin'}."])
    assert messages or code == errno.ENOSYS  # filelock then locks by a file


def test_a_mount_without_shared_mappings_gives_a_private_one(tmp_path, monkeypatch):
    """Guards: "No such device" of a token file on a network drive, without the file's name."""
    path, memmap = tmp_path / "x.bin", np.memmap
    np.arange(4, dtype="<u2").tofile(path)

    def without_shared(path, dtype, mode, *rest):
        return (failing(errno.ENODEV) if mode == "r" else memmap)(path, dtype, mode, *rest)

    monkeypatch.setattr(np, "memmap", without_shared)
    mapped = map_file(path, "<u2", 2, (3,))
    assert mapped.tolist() == [1, 2, 3] and not mapped.flags.writeable
    monkeypatch.setattr(np, "memmap", failing(errno.ENODEV))
    with pytest.raises(UserError, match="x.bin cannot be mapped into memory: No such device. Copy it"):
        map_file(path, "<u2")
