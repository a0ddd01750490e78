"""One answer after another, and none after a failure: what silos and key holders share."""

from __future__ import annotations

import copy
import pickle

import numpy as np
import pytest
from securefedcollm_audits.protocol.cohort import Cohort

from securefedcollm.aggregation import Step
from securefedcollm.aggregation.answering import AnsweringSide
from securefedcollm.aggregation.header import RingParameters, Roster, RoundHeader
from securefedcollm.aggregation.inmemory import MemoryJournal
from securefedcollm.aggregation.masking.messages import Agreement
from securefedcollm.aggregation.messages import UNSIGNED
from securefedcollm.errors import LocalProtocolError, RemoteProtocolError, StateError
from securefedcollm.primitives import SigningKey, sha256

KEYS = {f"silo-{number}": SigningKey(bytes([number] * 32)) for number in (1, 2, 3, 4)}
ROSTER = Roster({name: key.public for name, key in KEYS.items()})
SIZES = RingParameters(10, 5, 8, silos=4, min_silos=3, threshold=3, colluders=1)
HEADER = RoundHeader(bytes(32), bytes(16), 0, 0, bytes(32), SIZES, ROSTER.root)


class Secrets:
    def __init__(self, fault: BaseException | None = None) -> None:
        self.closed, self.fault = 0, fault

    def close(self) -> None:
        self.closed += 1
        if self.fault:
            raise self.fault


class Toy(AnsweringSide[Secrets]):
    """Signs whatever 32 bytes it is sent, in three steps."""

    def __init__(self, journal, secrets=None) -> None:
        super().__init__(
            header=HEADER,
            roster=ROSTER,
            signing_key=KEYS["silo-1"],
            journal=journal,
            steps=(Step.ENCRYPT, Step.UPLOAD, Step.NOTE),
        )
        self.fault: BaseException | None = None
        self._hold(secrets or Secrets())

    def _answer(self, frame: bytes, secrets: Secrets) -> bytes:
        if self.fault:
            raise self.fault
        message = Agreement(self._header_digest, 1, UNSIGNED, lists=frame)
        return self._say(self.step.value.encode() + b":", message).encode()


def test_every_step_is_answered_once_in_order_and_then_no_more() -> None:
    toy = Toy(MemoryJournal())
    secrets, seen = toy._secrets, []
    for _ in range(3):
        seen.append(toy.step)
        assert secrets.closed == 0
        assert toy.handle(bytes(32))
    assert seen == [Step.ENCRYPT, Step.UPLOAD, Step.NOTE]
    assert toy.step is Step.DONE
    assert (toy._secrets, secrets.closed) == (None, 1)
    with pytest.raises(RemoteProtocolError, match=r"this attempt is over \(done\)"):
        toy.handle(bytes(32))


@pytest.mark.parametrize(
    "fault",
    [
        RemoteProtocolError("no", peer="server"),
        StateError("the disk is full", hint="make room"),
        ZeroDivisionError(),
        KeyboardInterrupt(),
    ],
    ids=lambda fault: type(fault).__name__,
)
def test_whatever_fails_the_secrets_are_gone_and_nothing_is_answered_any_more(fault) -> None:
    toy = Toy(MemoryJournal())
    toy.handle(bytes(32))
    secrets, toy.fault = toy._secrets, fault
    with pytest.raises(type(fault)):
        toy.handle(bytes(32))
    assert (toy.step, toy._secrets, secrets.closed) == (Step.FAILED, None, 1)
    toy.fault = None
    with pytest.raises(RemoteProtocolError, match=r"this attempt is over \(failed\)"):
        toy.handle(bytes(32))


def test_secrets_that_cannot_be_closed_are_dropped_all_the_same() -> None:
    toy = Toy(MemoryJournal(), Secrets(OSError("the descriptor is gone")))
    with pytest.raises(OSError, match="descriptor"):
        toy.close()
    assert (toy.step, toy._secrets) == (Step.FAILED, None)
    with pytest.raises(RemoteProtocolError, match="over"):
        toy.handle(bytes(32))


def test_a_closed_side_answers_nothing_and_a_finished_one_stays_finished() -> None:
    toy, done = Toy(MemoryJournal()), Toy(MemoryJournal())
    toy.close()
    toy.close()
    assert toy.step is Step.FAILED
    with pytest.raises(RemoteProtocolError, match="over"):
        toy.handle(bytes(32))
    for _ in range(3):
        done.handle(bytes(32))
    done.close()
    assert done.step is Step.DONE


def test_a_second_process_says_the_same_or_nothing() -> None:
    """Adversary: a server that restarts this process, or talks to a clone of it."""
    journal = MemoryJournal()
    first, clone = Toy(journal), Toy(journal)
    said = first.handle(sha256(b"one"))
    assert clone.handle(sha256(b"one")) == said
    first.handle(sha256(b"two"))
    with pytest.raises(RemoteProtocolError, match="a second time"):
        clone.handle(sha256(b"another"))
    assert clone.step is Step.FAILED


def test_a_side_is_of_its_own_roster_and_not_copied() -> None:
    toy = Toy(MemoryJournal())
    assert repr(toy) == "Toy(step=encrypt)"
    for use in (copy.copy, copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="a Toy holds secrets"):
            use(toy)
    others = Roster({name: key.public for name, key in list(KEYS.items())[:3]})
    with pytest.raises(LocalProtocolError):
        AnsweringSide.__init__(
            toy,
            header=HEADER,
            roster=others,
            signing_key=KEYS["silo-1"],
            journal=MemoryJournal(),
            steps=(Step.UPLOAD,),
        )


def test_a_vector_that_was_not_masked_yet_is_overwritten() -> None:
    cohort = Cohort()
    silo = cohort.silo(cohort.names[0])
    words = silo._secrets.buffer.words
    before = np.array(words)
    with pytest.raises(RemoteProtocolError):
        silo.handle(b"nonsense")
    assert before.any()
    assert not words.any()
