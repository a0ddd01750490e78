"""What who asks may do to the time, the memory and the disk of a silo whose records vote."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from securefedcollm_audits.protocol.poll_cohort import longest_choices

from securefedcollm.errors import ConfigError, RemoteProtocolError
from securefedcollm.evidence.entries import Refused
from securefedcollm.federation.questions import voting
from securefedcollm.federation.questions.polls import Poll, make_poll
from securefedcollm.federation.questions.voting import READY, Booth, count_labels
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.accounts import Overlaps
from securefedcollm.privacy.votes import MOST_CHOICES
from securefedcollm.tuning.content import folded
from tests.support.polling import CHOICES, QUESTION, Voters, asked, booth_of, votes


@pytest.fixture(scope="module")
def voters(tmp_path_factory: pytest.TempPathFactory) -> Voters:
    return Voters(tmp_path_factory.mktemp("voters"))


def test_what_an_asker_makes_a_silo_do_depends_on_no_record(voters, tmp_path):
    """Adversary: an asker whose choices take long to fold, and who counts the records that a
    question retrieved by the time of the reply.

    Control: a reader that is called for each of them folds as often as there are.
    """
    folds = list[str]()

    def folding(text: str) -> str:
        folds.append(text)
        return folded(text)

    poll = make_poll(voters.study, bytes(16), SigningKey.generate(), QUESTION, longest_choices())
    assert len(poll.encode()) > Poll.LIMIT * 0.9
    read = count_labels([folded(f"w{number}") for number in range(900)], folding)
    found, one_by_one = [], []
    for many in (0, 900):
        chosen, none = np.arange(900) < many, np.zeros(900, np.int64)
        reading = read(poll)
        found.append(len(folds))
        reading(chosen, none)
        assert len(folds) == found[-1]  # nothing of it once records are read
        folds.clear()
        for at in np.flatnonzero(chosen):
            read(poll)(np.arange(900) == at, none)
        one_by_one.append(len(folds))
        folds.clear()
    assert found == [MOST_CHOICES] * 2
    assert one_by_one == [0, 900 * MOST_CHOICES]


def test_a_silo_refuses_texts_that_take_long_to_fold_by_the_frame_alone(
    voters, tmp_path, monkeypatch
):
    """Adversary: an asker with a run of accents, sorting which takes time with its square.

    Control: without the check a silo folds them.
    """
    marks = "e" + "\u0301" * 200 + "\u0316" * 200
    with voters.polls(tmp_path / "run") as polls:
        booth = booth_of(polls)
        with pytest.raises(ConfigError, match="over 30 accents"):
            polls.ask(f"w1 {marks}", CHOICES)
        sent = [asked(polls, question=f"w1 {marks}"), asked(polls, choices=("w50", marks))]
        before, charges = booth.evidence.size, len(booth.ledger.entries())
        for frame in sent:
            with pytest.raises(RemoteProtocolError, match="over 30 accents"):
                booth.open("server").handle(frame)
        assert {type(entry.what) for entry in booth.evidence.entries[before:]} <= {Refused}
        assert len(booth.ledger.entries()) == charges
        monkeypatch.setattr(voting, "stream_safe", lambda text: True)
        for frame in sent:
            assert booth.open("server").handle(frame) == READY


def test_a_silo_refuses_a_poll_that_is_too_long_by_itself(voters, tmp_path):
    """Adversary: the server, whose relay would refuse it."""
    with voters.polls(tmp_path / "run") as polls:
        booth = booth_of(polls)
        assert booth.open("server").handle(asked(polls, choices=longest_choices())) == READY
        longer = asked(polls, choices=(*longest_choices()[:-1], "w50" * 2000))
        with pytest.raises(RemoteProtocolError):
            booth.open("server").handle(longer)
        with pytest.raises(ConfigError, match="over 63 KiB"):
            polls.ask(QUESTION, (*longest_choices()[:-1], "w50" * 2000))


def abandon(booth: Booth, frame: bytes) -> None:
    conversation = booth.open("server")
    conversation.handle(frame)
    conversation.close()


def test_polls_that_an_asker_leaves_make_no_later_one_harder(voters, tmp_path, monkeypatch):
    """Adversary: an asker that begins questions and leaves them. No record pays for those. Control:
    questions that it goes on with are what later ones are weighed with."""
    monkeypatch.setattr(voting, "MOST_DROPPED", 8)
    weighed = list[int]()
    real = Overlaps.alike

    def alike(overlaps: Any, entries: Any, chosen: Any) -> Any:
        weighed.append(len(entries))
        return real(overlaps, entries, chosen)

    monkeypatch.setattr(Overlaps, "alike", alike)
    with voters.polls(tmp_path / "run") as polls:
        booth = booth_of(polls)
        for _ in range(8):
            abandon(booth, asked(polls))
        assert {*weighed} == {0}
        with pytest.raises(RemoteProtocolError, match="began 8 questions and left them"):
            booth.open("server").handle(asked(polls))
    with voters.polls(tmp_path / "run") as polls:  # its owner begins again
        votes(polls)
        weighed.clear()
        abandon(booth_of(polls), asked(polls))
        assert {*weighed} == {1}


def test_a_silos_process_begins_no_more_polls_of_an_asker_than_its_slot_has_room_for(
    voters, tmp_path, monkeypatch
):
    """Adversary: an asker whose questions cost no record anything. Control: a poll less."""
    monkeypatch.setattr(voting, "MOST_ASKED", 2)
    with voters.polls(tmp_path / "run") as polls:
        booth = booth_of(polls)
        for _ in range(2):
            booth.open("server").handle(asked(polls))
        with pytest.raises(RemoteProtocolError, match="asked 2 questions"):
            booth.open("server").handle(asked(polls))
