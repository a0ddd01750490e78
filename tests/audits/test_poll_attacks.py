"""Attacks on questions to records: each is stopped, and works where what stops it is removed."""

from __future__ import annotations

import os
from dataclasses import replace

import numpy as np
import pytest
from securefedcollm_audits.protocol import poll_attacks, poll_cohort
from securefedcollm_audits.protocol.cases import adversary

from securefedcollm.errors import BudgetExceeded, LocalProtocolError
from securefedcollm.federation.questions import polling, polls, voting
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.privacy.votes import Votes

CASES = (*poll_attacks.ASKER_CASES, *poll_attacks.SERVER_CASES)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.__name__)
def test_the_attack_is_stopped(case):
    outcome = case()
    assert outcome.held, outcome
    assert outcome.learnt == ()
    assert adversary(case.__name__) == ("server" if case in CASES[-2:] else "asker")


def forgotten(monkeypatch):
    """The ledger knows no question again."""
    monkeypatch.setattr(voting, "charge_of", lambda poll: os.urandom(16).hex())


def unbound(monkeypatch):
    """The header of a sum says nothing of the question."""
    real = polls.sum_header
    for module in (voting, polling):
        monkeypatch.setattr(
            module,
            "sum_header",
            lambda study, roster, _, votes: real(study, roster, bytes(32), votes),
        )


def quieter(monkeypatch):
    """Silos add half of their noise."""
    real = Votes.protect

    def protect(votes, content, noise):
        exact = votes.exact(content)
        return exact + (real(votes, content, noise) - exact) // 2

    monkeypatch.setattr(Votes, "protect", protect)


def welcoming(monkeypatch):
    """Silos answer whoever asks."""

    class Welcoming(poll_cohort.Voters):
        def _booth(self, name):
            everybody = {who: key.public for who, key in self.keys.items()}
            return replace(super()._booth(name), askers=everybody)

    monkeypatch.setattr(poll_attacks, "Voters", Welcoming)


def refusing(monkeypatch):
    """A silo of which no record answers refuses."""
    real = Ledger.reserve

    def reserve(ledger, *about, records=None, individually=False, **more):
        if individually and ledger.owner == "silo-1" and not len(records):
            raise LocalProtocolError("no record answers")
        return real(ledger, *about, records=records, individually=individually, **more)

    monkeypatch.setattr(Ledger, "reserve", reserve)


def staying_away(monkeypatch):
    """A silo of which one record cannot pay beforehand does not begin."""
    real = poll_cohort.prepay

    def prepay(*about):
        paid = real(*about)
        if not np.all(paid):
            raise BudgetExceeded("some records cannot pay")
        return paid

    monkeypatch.setattr(poll_cohort, "prepay", prepay)


def unchecked(monkeypatch):
    """Nobody looks at signatures."""
    monkeypatch.setattr(voting, "verify", lambda *any_signature: None)


class Anything:
    def __ne__(self, other):
        return False

    __hash__ = None


def nameless(monkeypatch):
    """Nor at who is said to ask."""
    unchecked(monkeypatch)
    monkeypatch.setattr(voting, "poll_header", lambda *about: Anything())


@pytest.mark.parametrize(
    ("case", "weaken", "told"),
    [
        (poll_attacks.asked_again, forgotten, "a second answer of silo-1 after a restart"),
        (poll_attacks.different_questions, unbound, "votes, which are the first silo's own"),
        (poll_attacks.missing_noise, quieter, "of the noise that was charged"),
        (poll_attacks.own_noise, welcoming, "a sum whose noise is partly its own"),
        (poll_attacks.spent_records, refusing, "no record answers"),
        (poll_attacks.absent_silos, staying_away, "stays away"),
        (poll_attacks.swapped_question, unchecked, "4 silos answer what nobody signed"),
        (poll_attacks.exchanged_names, nameless, "4 silos answer what nobody signed"),
    ],
    ids=lambda value: getattr(value, "__name__", ""),
)
def test_without_what_stops_it_the_attack_works(monkeypatch, case, weaken, told):
    weaken(monkeypatch)
    outcome = case()
    assert not outcome.held
    assert any(told in one for one in outcome.learnt), outcome


@pytest.mark.parametrize("case", [poll_attacks.averaged_noise, poll_attacks.restarted_silos])
def test_silos_that_forget_what_records_have_answered_answer_for_ever(case):
    outcome = case(forgetful=True)
    assert not outcome.held
    assert "of a record that paid for 3" in outcome.learnt[0]
