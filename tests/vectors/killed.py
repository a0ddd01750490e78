"""Make runs that die in the middle of a round and pack what is left, and one finished run's bundle.

``v1/killed-*.tar.xz`` and ``v1/bundle-masking.zip`` were made with this file and the code of commit
a437405 (28 November 2026), from before the rooms of aggregation and federation were moved::

    git archive a437405 | tar x -C OLD
    cp tests/vectors/killed.py OLD/tests/vectors/ && cd OLD
    python -m tests.vectors.killed DIRECTORY

The training is arithmetic, so the files are small and the end of a run is the same everywhere.
:mod:`.test_killed` resumes them with the code of today. Later code makes later fixtures the same
way, by name; it must not make these again. ``v1/killed-rounded.tar.xz`` (30 November 2026) is of
the version that first charged sums as rounded ones::

    python -m tests.vectors.killed DIRECTORY rounded
"""

from __future__ import annotations

import os
import signal
import sys
import tarfile
import tempfile
from pathlib import Path
from typing import Any

from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation.messages import Aggregate, BeginRound, decode_request
from securefedcollm.study import Study
from tests.support.runs import CKKS, JOINT, RecordedRun, recorded_study

STUDIES: dict[str, dict[str, Any]] = {
    "masking": {},
    "joint": JOINT,
    "ckks": {"aggregation": CKKS},
    "authority": {"aggregation": CKKS | {"key_model": "authority"}},
    "rounded": JOINT,
}
KILLED_AT = {"masking": 5, "joint": 5, "ckks": 6, "authority": 4, "rounded": 5}
"""The exchange of the aggregation in which a sum is opened, from 1."""
SUM = 1
"""The sum whose opening is cut off, from 0; in joint DP-SGD it is the second of its round."""


class Dying:
    """An engine whose machine dies when two parties (or the one that is asked) have opened a sum:
    their answers are on the way, and the server never has them."""

    def __init__(self, engine: Any, at: int) -> None:
        self.engine, self.at = engine, at
        self.exchanges, self.sum = 0, -1

    def exchange(self, frames: Any, timeout: float) -> Any:
        said = [decode_request(frame) for frame in frames.values()]
        begun = [request.round for request in said if isinstance(request, BeginRound)]
        if begun:
            self.exchanges, self.sum = 0, begun[0]
        elif all(isinstance(request, Aggregate) for request in said):
            self.exchanges += 1
        if (self.sum, self.exchanges) == (SUM, self.at):
            self.engine.exchange(dict(list(frames.items())[:2]), timeout)
            os.kill(os.getpid(), signal.SIGKILL)
        return self.engine.exchange(frames, timeout)


def die(directory: Path, study: Study, at: int) -> None:
    """Run ``study`` in a process of its own until it is killed."""
    child = os.fork()
    if not child:
        RecordedRun(directory, study, wrap=lambda engine: Dying(engine, at)).go()
        os._exit(0)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "the run came to its end"


def pack(directory: Path, path: Path) -> None:
    """Everything in ``directory``, as the dead processes left it; SQLite makes ``-shm`` anew."""
    with tarfile.open(path, "w:xz", preset=9) as archive:
        for file in sorted(directory.rglob("*")):
            if file.is_file() and not file.name.endswith("-shm"):
                archive.add(file, file.relative_to(directory))


def main(out: Path, *kinds: str) -> None:
    """``kinds``: the killed runs to make; by default all of them, and the bundle."""
    out.mkdir(exist_ok=True)
    for kind in kinds or STUDIES:
        changes = STUDIES[kind]
        with tempfile.TemporaryDirectory() as scratch:
            directory = Path(scratch)
            die(directory, recorded_study(**changes), KILLED_AT[kind])
            pack(directory, out / f"killed-{kind}.tar.xz")
    if kinds:
        return
    with tempfile.TemporaryDirectory() as scratch:
        directory = Path(scratch)
        RecordedRun(directory, recorded_study()).go()
        (out / "bundle-masking.zip").write_bytes(make_bundle(directory))


if __name__ == "__main__":
    main(Path(sys.argv[1]), *sys.argv[2:])
