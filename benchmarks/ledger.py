"""The ledger by record on a large file: identities, reservation, and the records' spent budget.

    python -m benchmarks.ledger --records 1000000 --json

It makes a file of that many records, and earlier studies that each charged another part of it. So
there are as many accounts as parts, and one of uncharged records. ``s`` is wall-clock on
one thread, ``cpu_s`` the process's own time; the files are on the disk that ``TMPDIR`` names.
``peak_mb`` is what the step added to the process's peak memory. Last, with ``--check``,
``data check`` of such a file, which reads it as the silo does.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar

from benchmarks._machine import machine
from securefedcollm.privacy.accounting import claim
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.identities import Content
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.report import read_report
from securefedcollm.tuning.cleaning import check_file
from securefedcollm.tuning.content import whole_row
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.splits import record_content

T = TypeVar("T")
BUDGET = (8.0, 1e-5)
WORDS = "the patient came back after three weeks with the same complaint and a new one " * 2
EVENTS = [PoissonGaussian(0.001, 1.0, 50)]


def contents(first: int, last: int) -> Iterator[Content]:
    """Contents of records of some 200 characters, as a silo computes them from its questions."""
    for i in range(first, last):
        question = Question(f"Question: case {i}: {WORDS}\nAnswer:", ("yes", "no", "unsure"), 0)
        row = {"question": f"case {i}: {WORDS}", "choices": ["yes", "no", "unsure"]}
        yield Content(record_content(question), None, whole_row(row))


def measured(what: Callable[[], T]) -> tuple[T, dict[str, float]]:
    before, start, busy = _peak(), time.perf_counter(), time.process_time()
    made = what()
    seconds, busy = time.perf_counter() - start, time.process_time() - busy
    return made, {
        "s": round(seconds, 2),
        "cpu_s": round(busy, 2),
        "peak_mb": round(_peak() - before, 1),
    }


def _peak() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1000.0


def run(records: int, studies: int, check: bool) -> dict[str, Any]:
    claim(EVENTS, 1e-5)  # imports
    found: dict[str, Any] = {"records": records, "studies": studies}
    with tempfile.TemporaryDirectory() as place:
        path = Path(place) / "ledger.sqlite"
        with Ledger(path, "north") as ledger:
            part = records // (studies + 1)
            for number in range(studies):
                some = ledger.identify(contents(number * part, (number + 2) * part))
                _reserve(ledger, f"study {number}", some)
            whole, found["identities"] = measured(lambda: ledger.identify(contents(0, records)))
            _, found["foresee"] = measured(
                lambda: ledger.foresee("all", "record", EVENTS, 3, BUDGET, records=whole)
            )
            _, found["reserve_first"] = measured(lambda: _reserve(ledger, "all", whole))
            _, found["reserve_next"] = measured(lambda: _reserve(ledger, "all", whole, 1))
            standing, found["consent"] = measured(lambda: ledger.standing(whole))
            found["spent"] = {"most": standing.worst, "median": standing.median}
        found["ledger_mb"] = round(sum(p.stat().st_size for p in Path(place).iterdir()) / 1e6, 1)
        _, found["budget_show"] = measured(lambda: read_report(path, details=False))
        if check:
            file = Path(place) / "records.jsonl"
            with file.open("w") as out:
                for i in range(records):
                    choices = ["yes", "no", "unsure"]
                    row = {"question": f"case {i}: {WORDS}", "choices": choices, "answer": i % 3}
                    out.write(json.dumps(row) + "\n")
            _, found["data_check"] = measured(lambda: check_file(file))
    return found


def _reserve(ledger: Ledger, name: str, records: Any, round_: int = 0) -> None:
    ledger.reserve(name, "record", name, round_, 0, EVENTS, BUDGET, records=records, study=name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--records", type=int, default=1_000_000)
    parser.add_argument("--studies", type=int, default=4)
    parser.add_argument("--check", action="store_true", help="also `data check` of such a file")
    parser.add_argument("--json", action="store_true")
    given = parser.parse_args()
    found = {"benchmark": "ledger"} | run(given.records, given.studies, given.check)
    found["machine"] = machine("numpy")
    if given.json:
        print(json.dumps(found))
    else:
        for key, value in found.items():
            print(f"{key:<14} {value}")


if __name__ == "__main__":
    main()
