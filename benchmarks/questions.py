"""A public question set, dealt out once into fixed files for every participant.

    python -m benchmarks.questions TRAIN.jsonl TEST.jsonl OUT --public 860 --labelled 60

TRAIN and TEST hold one object a line with ``question``, ``choices`` and ``answer`` (an index). OUT
gets ``public.jsonl`` (the first ``--labelled`` questions keep their answers), ``silo-1.jsonl`` …,
``development.jsonl`` (to choose settings on) and ``test.jsonl``. Questions of TEST are taken out of
TRAIN, and of equal questions all but one. The order is drawn from a fixed seed, so that everybody
has the same files.

`securefedcollm experiment` deals anew for every seed, and a large model then reads other prompts
under each. With these files it reads every prompt once (`--states`). The price is stated with the
results: seeds vary the training alone, and not who has which question.
"""

from __future__ import annotations

import argparse
import json
import random
from collections.abc import Sequence
from pathlib import Path
from typing import Any

Row = dict[str, Any]


def read(path: Path) -> list[Row]:
    """The rows of ``path``."""
    with path.open(encoding="utf-8") as lines:
        return [json.loads(line) for line in lines if line.strip()]


def write(path: Path, rows: Sequence[Row]) -> None:
    """One object a line."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows), "utf-8")


def main(arguments: Sequence[str] | None = None) -> None:
    """Write the files."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name in ("train", "test", "out"):
        parser.add_argument(name, type=Path)
    for name, default in (
        ("--public", 860),
        ("--labelled", 60),
        ("--silos", 4),
        ("--per-silo", 250),
        ("--development", 400),
        ("--max-test", 500),
        ("--seed", 2026),
    ):
        parser.add_argument(name, type=int, default=default)
    plan = parser.parse_args(arguments)
    test = read(plan.test)
    known = {row["question"] for row in test}
    rows = [row for row in read(plan.train) if row["question"] not in known]
    random.Random(plan.seed).shuffle(rows)
    first: dict[str, Row] = {}
    for row in rows:
        first.setdefault(row["question"], row)
    rows = list(first.values())
    parts = {"public": plan.public, "development": plan.development}
    parts |= {f"silo-{number + 1}": plan.per_silo for number in range(plan.silos)}
    if sum(parts.values()) > len(rows):
        parser.error(f"{sum(parts.values())} questions are needed, {plan.train} has {len(rows)}")
    plan.out.mkdir(parents=True, exist_ok=True)
    for name, count in parts.items():
        mine, rows = rows[:count], rows[count:]
        if name == "public":
            asked = [{k: v for k, v in row.items() if k != "answer"} for row in mine]
            write(plan.out / "public-answered.jsonl", mine)
            mine = mine[: plan.labelled] + asked[plan.labelled :]
        write(plan.out / f"{name}.jsonl", mine)
    random.Random(plan.seed).shuffle(test)
    write(plan.out / "test.jsonl", test[: plan.max_test])


if __name__ == "__main__":
    main()
