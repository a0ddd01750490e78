"""Runs as its own process: kill -9 before the k-th SQL statement of a ledger's life, for every k.

With a second argument every charge is about a set of records.

Each life is a forked child (so that the accountants are imported once) that reports what it was
told through a pipe before it goes on. Prints one JSON line a life: k, and the steps acknowledged.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
from pathlib import Path

from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.ledger import Ledger

BUDGET = (20.0, 1e-5)
PLANNED, ACTUAL = [Gaussian(2.0, 3)], [Gaussian(2.0, 2)]


def live(path: Path, kill_at: int, out: int, by_record: bool) -> None:
    """reserve, release, settle; then a second reservation."""
    ledger = Ledger(path, "north")
    seen = 0

    def count(_: str) -> None:
        nonlocal seen
        seen += 1
        if seen == kill_at:
            os.kill(os.getpid(), signal.SIGKILL)

    records = None
    if by_record:
        words = (f"record {i}" for i in range(20))
        records = ledger.identify((hashlib.sha256(w.encode()).digest(), None) for w in words)
    ledger._journal._db.set_trace_callback(count)
    first = ledger.reserve("data", "record", "run", 0, 0, PLANNED, BUDGET, records=records)
    os.write(out, b"reserve\n")
    ledger.release(first)
    os.write(out, b"release\n")
    ledger.settle(first, ACTUAL)
    os.write(out, b"settle\n")
    ledger.reserve("data", "record", "run", 1, 0, PLANNED, BUDGET, records=records)
    os.write(out, b"second\n")


def main(folder: Path, by_record: bool) -> None:
    for kill_at in range(1, 200):
        path = folder / f"{kill_at}.db"
        read, write = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(read)
            live(path, kill_at, write, by_record)
            os._exit(0)
        os.close(write)
        with os.fdopen(read) as pipe:
            told = pipe.read().split()
        _, status = os.waitpid(child, 0)
        killed = os.WIFSIGNALED(status)
        print(json.dumps({"k": kill_at, "told": told, "killed": killed}), flush=True)
        if not killed:
            return
    sys.exit("the life never ended")


if __name__ == "__main__":
    from securefedcollm.privacy.accounting import claim

    claim(PLANNED, 1e-5)  # import before forking
    main(Path(sys.argv[1]), len(sys.argv) > 2)
