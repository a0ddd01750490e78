"""A malicious asker, or the server that carries its frames, against questions to records.

The sum of the votes is a masked sum like that of a round, so the attacks on that are those of
:mod:`.server_attacks`. Here are the attacks on what makes a sum the answer to a question: who asks,
what, how often, who pays, and how much noise there is. What nobody can see is not played: a silo
that votes as it likes, within its bound.

The tests remove what stops each attack, and it works.
"""

from __future__ import annotations

import contextlib
import math

import msgspec
import numpy as np

from securefedcollm.errors import BudgetExceeded, SecureFedCoLLMError
from securefedcollm.federation.questions.polls import make_poll, votes_of
from securefedcollm.federation.questions.voting import READY
from securefedcollm.federation.records import SERVER
from securefedcollm.privacy.votes import MOST_CHOICES
from securefedcollm_audits.protocol.outcome import Outcome, observed
from securefedcollm_audits.protocol.poll_cohort import (
    CHOICES,
    COUNT,
    QUESTIONS,
    RUN,
    SILOS,
    TOPIC,
    Talk,
    Voters,
    carried,
    shown,
)

VICTIM = SILOS[0]
QUIET = "what no record is about"
_MANY = tuple(f"choice {number}" for number in range(MOST_CHOICES))
_POLLS = 5
_LEAST = 0.75
"""Of the noise that was charged: 320 draws of honest noise are below it with probability 1e-9. So a
fifth too little would go unnoticed here; tests of the mechanism itself are exact."""


def asked_again() -> Outcome:
    """Have one question summed twice, over other silos: at once, and after all silos' restart. The
    difference of two sums of the same votes would be the votes of the silo that is left out."""
    voters, learnt, words = Voters(), list[str](), ""
    poll = make_poll(voters.study, RUN, voters.keys[SERVER], TOPIC, CHOICES).encode()
    first, _ = _begun(voters, SERVER, poll)
    for when in ("at once", "after a restart"):
        if when != "at once":
            voters.restart()
        again, refused = _begun(voters, SERVER, poll)
        learnt += [f"a second answer of {silo} {when}" for silo in again]
        words = words or next(iter(refused.values()), "")
    return Outcome(
        "one question summed twice",
        tuple(learnt),
        f"the ledger knows every question that a silo began: {words}",
        held=len(first) == len(SILOS) and not learnt,
    )


def _begun(voters: Voters, asker: str, poll: bytes) -> tuple[list[str], dict[str, str]]:
    """The silos that begin to answer this frame, and why the others do not."""
    talk, begun = Talk(voters, asker), list[str]()
    for silo in SILOS:
        with contextlib.suppress(SecureFedCoLLMError):
            if talk(silo, poll) == READY:
                begun.append(silo)
    talk.close()
    return begun, talk.refused


def averaged_noise(*, forgetful: bool = False) -> Outcome:
    """Ask the same thing again and again under two names, to average the noise away."""
    voters, voted = Voters(forgetful=forgetful), 0
    for number in range(2 * QUESTIONS):
        asker = (SERVER, SILOS[-1])[number % 2]
        voted += round(voters.ask(asker).tally.votes[0] / COUNT)
        if forgetful:
            voters.restart()
    return observed(
        "one thing asked under two names",
        f"{voted} votes of a record that paid for {QUESTIONS}",
        f"of {2 * QUESTIONS} questions a record answers {voted}: all askers draw on one account",
        held=voted == QUESTIONS,
    )


def restarted_silos(*, forgetful: bool = False) -> Outcome:
    """Have the silos killed between questions, so that a record's answers are forgotten."""
    voters, voted = Voters(forgetful=forgetful), 0
    for _ in range(QUESTIONS + 2):
        voted += round(voters.ask().tally.votes[0] / COUNT)
        voters.restart()
    return observed(
        "silos killed after each answer",
        f"{voted} votes of a record that paid for {QUESTIONS}",
        f"what a record has answered is on disk before its vote leaves: {voted} answers",
        held=voted == QUESTIONS,
    )


def different_questions() -> Outcome:
    """Ask one silo what is of interest and all others something else, so that the sum is its own
    answer."""
    voters, learnt = Voters(), ""
    quiet = make_poll(voters.study, RUN, voters.keys[SERVER], QUIET, CHOICES).encode()

    def change(silo: str, number: int, frame: bytes) -> bytes:
        return frame if number or silo == VICTIM else quiet

    words = "nothing was opened"
    try:
        opinion = carried(voters, voters.canvass(), change=change)
    except SecureFedCoLLMError as error:
        words = error.message.split(" (")[0]
    else:
        if VICTIM in opinion.survivors:
            learnt = f"{opinion.tally.votes[0]:.0f} votes, which are the first silo's own"
    return observed(
        "other questions for other silos",
        learnt or "a sum of different questions",
        f"the header of the sum binds the question: {words}",
        held=not learnt,
    )


def missing_noise() -> Outcome:
    """Take a colluding silo's noise off the sum of the fewest silos, and compare what is left with
    what a record is charged for."""
    voters, found = Voters(), list[float]()
    for _ in range(_POLLS):
        found += voters.ask(SERVER, QUIET, _MANY).tally.votes
    votes = votes_of(voters.study, MOST_CHOICES)
    share = float(np.std(found)) * votes.levels / math.sqrt(len(SILOS))  # of one silo
    honest = voters.study.quorum - voters.study.silos.colluders
    left = share * math.sqrt(honest) / (votes.noise_multiplier * votes.sensitivity)
    return observed(
        "noise without a colluder's share",
        f"a sum with {left:.0%} of the noise that was charged",
        f"{left:.0%} of the noise that a record is charged for is left in the smallest sum",
        held=left >= _LEAST,
    )


def own_noise() -> Outcome:
    """Ask as a silo in a study that allows for no colluder: it knows its own share of the noise."""
    voters = Voters(colluders=0)
    try:
        carried(voters, voters.canvass(SILOS[-1]), SILOS[-1])
        words = ""
    except SecureFedCoLLMError as error:
        words = error.message.split(" (")[-1]
    return observed(
        "a silo asks where nobody may collude",
        "a sum whose noise is partly its own",
        f"silos refuse: {words}",
        held="may not ask" in words,
    )


def spent_records() -> Outcome:
    """Tell from what a silo sends, refuses or writes whether its records have any answers left."""
    seen = {}
    for case in ("fresh", "spent"):
        voters = Voters()
        for _ in range(QUESTIONS if case == "spent" else 0):
            voters.ask()
        seen[case] = _view(voters)
    return _same("records that have spent their answers", seen)


def absent_silos() -> Outcome:
    """Tell from a silo that stays away that one of its records has spent its budget elsewhere, in a
    study in which it was tuned on."""
    seen = {}
    for case, poor in (("none", 0), ("one record", 1)):
        try:
            seen[case] = _view(Voters(poor=poor))
        except BudgetExceeded as error:
            seen[case] = ("stays away", error.message)
    return _same("a silo that stays away", seen)


def _view(voters: Voters) -> tuple[object, ...]:
    """What an asker, and a reader of the silo's evidence, has of a question but the noised sum."""
    talk = Talk(voters, SERVER)
    size = voters.logs[VICTIM].size
    try:
        voters.canvass().ask(TOPIC, CHOICES, talk)
    except SecureFedCoLLMError as error:
        talk.refused.setdefault("everybody", error.message)
    talk.close()
    return talk.lengths.get(VICTIM), talk.refused, shown(voters.logs[VICTIM].entries[size:])


def _same(attack: str, seen: dict[str, tuple[object, ...]]) -> Outcome:
    one, other = seen.values()
    return observed(
        attack,
        f"{' against '.join(seen)}: {other[:2]} differs from {one[:2]}",
        f"replies of {one[0]} bytes, no refusal and the same evidence in both",
        held=one == other,
    )


# ---- the server, which carries the frames ----


def swapped_question() -> Outcome:
    """Put another question into the asker's frame, so that silos' records pay for the server's."""
    voters = Voters()
    poll = make_poll(voters.study, RUN, voters.keys[SERVER], TOPIC, CHOICES)
    return _unsigned(
        "a question swapped on its way",
        voters,
        msgspec.structs.replace(poll, question=QUIET).encode(),
    )


def exchanged_names() -> Outcome:
    """Bring a silo's question as the server's."""
    voters = Voters()
    poll = make_poll(voters.study, RUN, voters.keys[SILOS[-1]], TOPIC, CHOICES)
    return _unsigned("askers of records exchanged", voters, poll.encode())


def _unsigned(attack: str, voters: Voters, poll: bytes) -> Outcome:
    begun, refused = _begun(voters, SERVER, poll)
    return observed(
        attack,
        f"{len(begun)} silos answer what nobody signed",
        f"silos check who signed what: {next(iter(refused.values()), 'nobody refused')}",
        held=not begun,
    )


ASKER_CASES = (
    asked_again,
    averaged_noise,
    restarted_silos,
    different_questions,
    missing_noise,
    own_noise,
    spent_records,
    absent_silos,
)
SERVER_CASES = (swapped_question, exchanged_names)
