"""Fuzz targets: the aggregation protocol here, files of others in :mod:`.files`, private questions
in :mod:`.retrieval`.

``python -m securefedcollm_audits.fuzz --target NAME --seconds 60`` plays one target with random
inputs, and guided by coverage if the package ``atheris`` is installed. ``--help`` lists them.

``protocol``: a whole round, with frames altered by the input. Adversary: the network and the
server between honest state machines. Whatever happens to frames, both sides answer only with their
own errors, an opened sum is the sum of its survivors, and the server's notebook opens nothing else.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Final

import msgspec
import numpy as np

from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.errors import ProtocolError
from securefedcollm_audits.fuzz import files, retrieval
from securefedcollm_audits.protocol.cohort import Cohort, play

_OPERATION: Final = 6  # bytes of input that describe one alteration
_MOST: Final = 6  # alterations of one round
_FRAMES: Final = 50  # five requests and five replies of five silos


class BrokenError(Exception):
    """An alteration made the round reveal something, or open a wrong sum."""


def one_round(script: bytes) -> str:
    """Play a round of five silos with the alterations that ``script`` describes.

    Every six bytes are one alteration: frame, operation, place (two bytes), operand (two bytes).

    Returns:
        ``"summed"``, or the class of the error that ended the round.

    Raises:
        BrokenError: a wrong sum, or the spy learnt something.
        Exception: anything that is not this project's error is a finding, too.
    """
    plan = {
        script[at] % _FRAMES: script[at + 1 : at + _OPERATION]
        for at in range(0, min(len(script), _MOST * _OPERATION) - _OPERATION + 1, _OPERATION)
    }
    cohort = Cohort(label="fuzz")
    silos = {name: cohort.silo(name) for name in cohort.names}
    coordinator = CoordinatorRound(header=cohort.header, roster=cohort.roster)
    spy = cohort.spy()
    passed: list[bytes] = []

    def meddle(step: object, name: str, frame: bytes) -> bytes | None:
        operation = plan.get(len(passed))
        passed.append(frame)
        return frame if operation is None else _altered(frame, passed, operation)

    try:
        result = play(silos, coordinator, spy=spy, request=meddle, reply=meddle)
    except ProtocolError as error:
        ended = type(error).__name__
    else:
        ended = "summed"
        if not np.array_equal(result.sum, cohort.plain_sum(result.survivors)):
            raise BrokenError("a sum that is not the sum of its survivors")
    if spy.leaks():
        raise BrokenError(f"the server learnt {spy.leaks()}")
    return ended


def _altered(frame: bytes, passed: list[bytes], operation: bytes) -> bytes | None:
    kind, where, value = operation[0], operation[1:3], operation[3:5]
    at = int.from_bytes(where, "little") % len(frame)
    other = passed[int.from_bytes(value, "little") % len(passed)]
    match kind % 8:
        case 0:
            return None
        case 1:
            return frame[:at]
        case 2:
            return frame[:at] + bytes([frame[at] ^ (value[0] or 1)]) + frame[at + 1 :]
        case 3:
            return frame[:at] + value + frame[at:]
        case 4:
            return other
        case 5:
            return frame[:at] + other[at:]
        case 6:
            return frame + other
        case _:
            return _grafted(frame, other, at, value)


def _grafted(frame: bytes, other: bytes, at: int, value: bytes) -> bytes:
    """``frame`` with one field replaced by one of ``other``'s, well-formed as a message."""
    try:
        scion, stock = msgspec.msgpack.decode(other), msgspec.msgpack.decode(frame)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return frame[:at] + value + frame[at + 2 :]
    if isinstance(stock, list) and isinstance(scion, list):
        places, donors = _leaves(stock), _leaves(scion)
        place = places[at % len(places)]
        place.branch[place.key] = donors[value[0] % len(donors)].value
    return msgspec.msgpack.encode(stock)


@dataclass(frozen=True)
class _Leaf:
    """A place in a decoded message that holds no other message, and its value."""

    branch: Any  # the list or mapping that holds it
    key: Any
    value: Any


def _leaves(tree: Any) -> list[_Leaf]:
    branches = enumerate(tree) if isinstance(tree, list) else tree.items()
    return [
        leaf
        for key, value in branches
        for leaf in (
            _leaves(value) if isinstance(value, list | dict) else [_Leaf(tree, key, value)]
        )
    ]


def main() -> None:
    """Fuzz for a while; a finding ends the program with its input in hexadecimal."""
    parser = argparse.ArgumentParser(description=__doc__)
    targets = {"protocol": one_round, **files.TARGETS, **retrieval.TARGETS}
    parser.add_argument("--target", choices=targets, default="protocol", help="target to fuzz")
    parser.add_argument("--seconds", type=int, default=60)
    parser.add_argument("--input", type=bytes.fromhex, help="play this one input (hexadecimal)")
    arguments = parser.parse_args()
    logging.disable(logging.WARNING)  # what a party says of another's nonsense, thousands of times
    target = targets[arguments.target]
    longest = _OPERATION * _MOST
    if target is not one_round:
        longest = files.LONGEST
        target(b"")  # what is loaded at first use counts against no input
        target = partial(files.bounded, target, files.SECONDS)
    if arguments.input is not None:
        print(target(arguments.input))
        return
    try:
        import atheris
    except ImportError:
        _play_random(target, longest, arguments.seconds)
        return
    atheris.instrument_all()
    limits = [f"-max_total_time={arguments.seconds}", f"-max_len={longest}", "-len_control=0"]
    atheris.Setup([sys.argv[0], *limits], target)
    atheris.Fuzz()


def _play_random(target: Callable[[bytes], str], longest: int, seconds: int) -> None:
    deadline = time.monotonic() + seconds
    counts: dict[str, int] = {}
    slowest = 0.0
    with tempfile.NamedTemporaryFile(prefix="securefedcollm-fuzz-") as last:
        print(f"if this process dies, its input is in {last.name}", flush=True)
        while time.monotonic() < deadline:
            script = os.urandom(_OPERATION + os.urandom(1)[0] % (longest - _OPERATION + 1))
            Path(last.name).write_text(script.hex())
            started = time.process_time()
            try:
                ended = target(script)
            except (Exception, files.SlowError) as error:
                sys.exit(f"found by --input {script.hex()}: {error!r}")
            counts[ended] = counts.get(ended, 0) + 1
            slowest = max(slowest, time.process_time() - started)
    print(f"{sum(counts.values())} inputs, none over {slowest:.1f} s, no finding: {counts}")
