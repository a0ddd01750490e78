"""Runs as its own process: reserve as often as the ledger allows, beside another that does too."""

from __future__ import annotations

import hashlib
import sys
import time
from pathlib import Path

from securefedcollm.errors import BudgetExceeded
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.ledger import Ledger


def main(folder: Path, name: str, by_record: bool) -> None:
    claim([Gaussian(2.0)], 1e-5)
    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < 2:
        time.sleep(0.001)
    with Ledger(folder / "ledger.db", "north") as ledger:
        records = dataset = None
        if by_record:  # each has a file of its own, with one record in common
            contents = [(hashlib.sha256(word.encode()).digest(), None) for word in (name, "shared")]
            records, dataset = ledger.identify(contents), name
        for attempt in range(100):
            about = (dataset or "data", "record", name, 0, attempt)
            try:
                ledger.reserve(*about, [Gaussian(2.0)], (8.0, 1e-5), records=records)
            except BudgetExceeded:
                print(attempt)
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3:] == ["records"])
