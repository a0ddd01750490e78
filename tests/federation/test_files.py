"""Private directories: what a kill leaves is removed by the next one, and nothing else is."""

from __future__ import annotations

import fcntl
import os
import signal
import subprocess
import sys
import tempfile

import pytest

from securefedcollm.errors import StateError
from securefedcollm.federation.files import PrivateDirectory

KILLED = """
import os, signal, sys
from pathlib import Path
from securefedcollm.federation.files import PrivateDirectory
directory = PrivateDirectory(Path(sys.argv[1]), ".sfc-")
(directory.path / "secret").write_text("the key")
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_what_a_killed_process_left_is_removed_by_the_next(tmp_path):
    done = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=False)
    assert done.returncode == -signal.SIGKILL
    (left,) = tmp_path.iterdir()
    assert (left / "secret").exists()
    with PrivateDirectory(tmp_path, ".sfc-") as path:
        assert list(tmp_path.iterdir()) == [path]
        assert path.stat().st_mode & 0o777 == 0o700
    assert not list(tmp_path.iterdir())


def test_what_somebody_holds_or_is_no_private_directory_is_left(tmp_path):
    """Adversary: another user of /tmp, who has our name on a link to what is not ours to remove."""
    precious = tmp_path / "precious"
    precious.mkdir(mode=0o700)
    (precious / "file").touch()
    (tmp_path / ".sfc-link").symlink_to(precious)
    (tmp_path / ".sfc-open").mkdir(mode=0o755)
    (tmp_path / ".sfc-file").touch()
    (tmp_path / ".sfc-of-somebody-else").mkdir(mode=0o700)
    with PrivateDirectory(tmp_path, ".sfc-") as held, PrivateDirectory(tmp_path, ".sfc-") as mine:
        names = {path.name for path in tmp_path.iterdir()}
        assert names == {
            "precious",
            ".sfc-link",
            ".sfc-open",
            ".sfc-file",
            ".sfc-of-somebody-else",
            held.name,
            mine.name,
        }
    assert (precious / "file").exists()


def test_one_that_another_sweep_was_faster_to_hold_is_not_used(tmp_path, monkeypatch):
    """It is about to be removed by who holds it."""
    made, make = [], tempfile.mkdtemp

    def swept(**where):
        path = make(**where)
        made.append(path)
        if len(made) == 1:
            lock = os.open(path, os.O_RDONLY)
            fcntl.flock(lock, fcntl.LOCK_EX)
        return path

    monkeypatch.setattr(tempfile, "mkdtemp", swept)
    with PrivateDirectory(tmp_path, ".sfc-") as path:
        assert made == [made[0], str(path)]
        assert made[0] != str(path)


def test_a_place_that_cannot_be_written_is_named(tmp_path):
    with pytest.raises(StateError, match="absent: cannot be written"):
        PrivateDirectory(tmp_path / "absent", ".sfc-")
