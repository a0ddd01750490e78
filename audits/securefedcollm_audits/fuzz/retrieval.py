"""Fuzz targets of private questions: frames, letters, and the files of a shelf.

Adversary of ``question``: the carrier between an honest asker and silo, who alters frames. Of
``letters``: the server and members, who send any bytes. Of ``index``, ``reduction`` and ``quota``:
whoever wrote, or damaged, the file.
"""

from __future__ import annotations

import sqlite3
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Final

import numpy as np

from securefedcollm.errors import BudgetExceeded, SecureFedCoLLMError
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.federation.questions.letters import (
    ASKS,
    Carried,
    Carry,
    Letter,
    decode_carried,
    decode_carry,
    encode,
    of_documents,
)
from securefedcollm.federation.questions.port import Chair, QuestionPort
from securefedcollm.federation.questions.quota import StoredQuota
from securefedcollm.federation.questions.relay import Relay
from securefedcollm.federation.questions.stock import Documents, Stock
from securefedcollm.primitives import KEY_BYTES, SigningKey, sha256
from securefedcollm.retrieval import Index, PreparedShelf, Reduction, Terms
from securefedcollm.retrieval.reduction import dimensions_of
from securefedcollm_audits.fuzz.files import Dice, FoundError, altered, harmless, on_disk
from securefedcollm_audits.protocol.cohort import recorded
from securefedcollm_audits.protocol.retrieval_cohort import (
    SMALL,
    Pair,
    index_of,
    talk,
    text_of,
)

_MOST: Final = 3
"""Questions that the fuzzed count allows."""
_TINY: Final = Terms(documents=6, dimension=4, block_bytes=96, fetched=1)


@cache
def _pair() -> Pair:
    return Pair(most=10**9)


def question(script: bytes) -> str:
    """A whole question with one frame altered. Nothing that its author did not sign is used."""
    dice, pair = Dice(script), _pair()
    target = dice.one_of(("question", "scores", "selection", "blocks"))
    before = pair.counted()
    sent: dict[str, bool] = {}

    def meddle(kind: str, frame: bytes) -> bytes:
        if kind != target:
            return frame
        changed = altered(frame, dice)
        sent["changed"] = changed != frame
        return changed

    found = talk(pair.ask(text_of(pair.silo, 1)), pair.answer(), meddle)
    if sent.get("changed") and found.passages is not None:
        raise FoundError(f"an altered {target} got through")
    if sent.get("changed") and target == "question" and pair.counted() != before:
        raise FoundError("a question was counted that its asker did not sign")
    if not found.stopped.isprintable():
        raise FoundError("an error that is not one printable line")
    return "answered" if found.passages is not None else "stopped"


_FOLDER: Final = tempfile.TemporaryDirectory(prefix="securefedcollm-fuzz-")
"""Of the member; gone with the process."""


@cache
def _member() -> tuple[QuestionPort, EvidenceLog]:
    """A silo's port over a count and a log."""
    home = Path(_FOLDER.name)
    keys = {name: SigningKey.generate(recorded(name)) for name in ("ann", "clinic")}
    study, shelf = bytes(32), PreparedShelf(index_of("clinic", _TINY, 3), _TINY)
    log = EvidenceLog(home / "log", study=study, owner="clinic", key=keys["clinic"])
    chair = Chair(study, "clinic", keys["clinic"], {}, {"ann": keys["ann"].public})
    stock = Stock(shelf, StoredQuota(home / "count", 10**6))
    return QuestionPort(chair, lambda run: log, Documents(_TINY, stock)), log


def letters(script: bytes) -> str:
    """Calls to a member, and a member's reply to the server: any bytes, or letters altered.

    A member answers every letter that asks with one word, and the server passes on only what makes
    sense.
    """
    dice = Dice(script)
    port, log = _member()
    kinds = ("question", "scores", "selection", "blocks", "poll", "request", "reply", "declined")
    made = [
        Letter(
            dice.one_of(("ann", "clinic", "", "bob", "x" * 64)),
            bytes(16),
            dice.one_of(kinds),
            bytes(dice.below(200)),
        )
        for _ in range(dice.below(4))
    ]
    frame = altered(encode(Carry(bytes(16), made)), dice)
    size = log.size
    replied = decode_carried(port.step(frame), "clinic").letters
    if any(letter.kind != "declined" for letter in replied) or log.size > size + 1:
        raise FoundError("a member answered what nobody signed")
    reply = altered(encode(Carried(made)), dice)
    relay = Relay(_Silent(reply), bytes(16), ["ann"], ["clinic"], of_documents(SMALL))
    relay.turn()
    relay.turn()
    try:
        arrived = [
            letter
            for each in ("ann", "clinic")
            for letter in decode_carry(encode(Carry(bytes(16), list(relay.waiting(each))))).letters
        ]
    except SecureFedCoLLMError as error:
        raise FoundError(f"the server passes on what no member reads: {error}") from None
    if any(letter.kind in ASKS and letter.who != "ann" for letter in arrived):
        raise FoundError("the server lets a member ask that may not")
    return f"{len(arrived)} passed on"


class _Silent:
    """An engine whose members all say the same."""

    def __init__(self, reply: bytes) -> None:
        self._reply = reply

    def exchange(self, frames: Any, timeout: float) -> dict[str, Any]:
        return dict.fromkeys(frames, self._reply)


def index(script: bytes) -> str:
    """An index file, its digest mended or not. What is read serves questions, and encodes to the
    same bytes."""
    dice = Dice(script)
    content = _mended(index_of("clinic", _TINY, 3).encode(), dice)
    with on_disk("shelf.index", content) as path:
        try:
            read = Index.load(path, _TINY if dice.below(2) else None)
        except SecureFedCoLLMError as error:
            return harmless(error)
        if read.encode() != content:
            raise FoundError("an index is read as another")
        _ = read.passages
        if (read.entries.shape[1], read.blocks.shape[1]) == (4, 96) and len(read) <= 6:
            PreparedShelf(Index(read.entries, read.blocks, _TINY.space), _TINY).close()
    return "read"


def reduction(script: bytes) -> str:
    """A map's file, its digest mended or not. What is read gives unit vectors, or an error."""
    dice = Dice(script)
    drawn = np.random.default_rng(1).normal(size=(40, 6))
    content = _mended(Reduction.fit(drawn, 3).encode(), dice)
    try:
        dimensions_of(content, "public.map")
        read = Reduction.decode(content, "public.map")
        with np.errstate(all="ignore"):
            mapped = read.apply(np.ones((2, read.dimensions[0])))
    except SecureFedCoLLMError as error:
        return harmless(error)
    if read.encode() != content:
        raise FoundError("a map is read as another")
    if not np.allclose(np.linalg.norm(mapped, axis=1), 1.0):
        raise FoundError("a map gives what is no unit vector")
    return "read"


def _mended(content: bytes, dice: Dice) -> bytes:
    """A file altered before its digest; mostly with the digest made anew."""
    changed = altered(content[:-KEY_BYTES], dice)
    return changed + (sha256(changed) if dice.below(4) else content[-KEY_BYTES:])


@cache
def _count() -> bytes:
    """A count with one question in it, in one file."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "count"
        quota = StoredQuota(path, _MOST)
        quota.take("ann", bytes(16))
        quota.close()
        with sqlite3.connect(path) as db:
            db.execute("PRAGMA wal_checkpoint(TRUNCATE)")
        return path.read_bytes()


def quota(script: bytes) -> str:
    """A count of questions, damaged. It opens or does not, and never lets an asker have more than
    the limit from here on."""
    content = altered(_count(), Dice(script))
    answered = 0
    with on_disk("count", content) as path:
        try:
            opened = StoredQuota(path, _MOST)
        except SecureFedCoLLMError as error:
            return harmless(error)
        try:
            for number in range(2 * _MOST):
                answered += opened.take("ann", number.to_bytes(16, "big")) is not None
        except BudgetExceeded:
            ended = "spent"
        except SecureFedCoLLMError as error:
            ended = harmless(error)
        else:
            ended = "endless"
        finally:
            opened.close()
    if answered > _MOST:
        raise FoundError(f"{answered} questions were answered, {_MOST} are the most")
    return ended


TARGETS: Final[dict[str, Callable[[bytes], str]]] = {
    "question": question,
    "letters": letters,
    "index": index,
    "reduction": reduction,
    "quota": quota,
}
