"""Runs as its own process: reserve as often as the ledger allows, beside another that does too."""

from __future__ import annotations

import sys
import time
from pathlib import Path

from securefedcollm.errors import BudgetExceeded
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.ledger import Ledger


def main(folder: Path, name: str) -> None:
    claim([Gaussian(2.0)], 1e-5)
    (folder / f"{name}.ready").touch()
    while len(list(folder.glob("*.ready"))) < 2:
        time.sleep(0.001)
    with Ledger(folder / "ledger.db", "north") as ledger:
        for attempt in range(100):
            try:
                ledger.reserve("data", "record", name, 0, attempt, [Gaussian(2.0)], (8.0, 1e-5))
            except BudgetExceeded:
                print(attempt)
                return


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2])
