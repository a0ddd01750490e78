"""``python -m securefedcollm_audits verify FILE``: for auditors who want a small installation."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from securefedcollm.errors import SecureFedCoLLMError

if TYPE_CHECKING:
    from securefedcollm_audits.verification.expected import Expected


def main(arguments: Sequence[str] | None = None) -> None:
    """Exit code 0: everything that the bundle covers holds; 1: something does not; 2: bad input."""
    parser = argparse.ArgumentParser(prog="python -m securefedcollm_audits", description=__doc__)
    commands = parser.add_subparsers(dest="command", required=True)
    command = commands.add_parser("verify", help="check a bundle offline")
    command.add_argument("file", type=Path, help="the bundle")
    command.add_argument("--study", type=Path, metavar="FILE", help="your own copy of the study")
    command.add_argument(
        "--key",
        action="append",
        default=[],
        metavar="NAME=HEX",
        help="a participant's public key, as you have it from that participant (repeatable)",
    )
    command.add_argument(
        "--earlier",
        action="append",
        default=[],
        type=Path,
        metavar="BUNDLE",
        help="the bundle of an earlier run that the study continues (repeatable)",
    )
    command.add_argument("--json", action="store_true", help="print one JSON object")
    given = parser.parse_args(arguments)
    from securefedcollm_audits.verification.expected import expectation

    try:
        expected = expectation(given.study, given.key, given.earlier)
        sys.exit(_verify(given.file, expected, given.json))
    except SecureFedCoLLMError as error:
        print(f"error: {error} — {error.hint}", file=sys.stderr)
        sys.exit(2)


def _verify(file: Path, expected: Expected, as_json: bool) -> int:
    from securefedcollm_audits.verification import table
    from securefedcollm_audits.verification.verify import verify

    verdict = verify(file, expected)
    print(json.dumps(table.plain(verdict), indent=2) if as_json else table.text(verdict))
    return 0 if verdict.holds else 1


if __name__ == "__main__":
    main()
