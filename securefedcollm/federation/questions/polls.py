"""A question to the silos' records: its frame, and the secure sum that answers it.

Adversary: the asker, which would put another question to every silo, so that the sum shows what one
of them answered. The header of the sum binds the signed question and the mechanism, so silos that
were asked different things refuse each other's keys.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Annotated, ClassVar, Final

import msgspec

from securefedcollm.aggregation import SUITE, Roster, RoundHeader
from securefedcollm.aggregation.header import Digest
from securefedcollm.aggregation.messages import UNSIGNED, Signable, Signature, sign
from securefedcollm.errors import ConfigError
from securefedcollm.federation.plan import round_header
from securefedcollm.foreign import stream_safe
from securefedcollm.primitives import RandomSource, SigningKey, sha256
from securefedcollm.privacy.votes import MOST_CHOICES, Votes, VoteSetting, calibrate_votes
from securefedcollm.study import Study, digest
from securefedcollm.study.retrieval import Retrieval

_PREFIX: Final = b"securefedcollm/v1/votes-"
_NUMBER_BYTES: Final = 16
_Number = Annotated[bytes, msgspec.Meta(min_length=_NUMBER_BYTES, max_length=_NUMBER_BYTES)]
_Text = Annotated[str, msgspec.Meta(min_length=1, max_length=1 << 16)]
_Choices = Annotated[tuple[_Text, ...], msgspec.Meta(min_length=2, max_length=MOST_CHOICES)]


class Poll(Signable, frozen=True, tag="poll"):
    """Asker → silo: a question and what to choose from. ``before``: :func:`poll_header`.

    Nobody sends or reads a longer one: an encoder reads 512 tokens.
    """

    CONTEXT: ClassVar[bytes] = _PREFIX + b"poll"
    LIMIT: ClassVar[int] = 64 << 10

    before: Digest
    signature: Signature
    number: _Number
    question: _Text
    choices: _Choices

    def signed(self) -> bytes:
        """64 bytes. The random number keeps a reader of evidence from testing guesses."""
        content = msgspec.msgpack.encode((self.question, self.choices))
        return self.before + sha256(_PREFIX, b"content\0", self.number, content)

    @property
    def digest(self) -> bytes:
        """32 bytes that stand for the poll."""
        return poll_digest(self.signed())

    def __repr__(self) -> str:
        return f"Poll({len(self.choices)} choices)"


def poll_digest(signed: bytes) -> bytes:
    """:attr:`Poll.digest`, for a reader of evidence who has only what was signed."""
    return sha256(_PREFIX, b"poll\0", signed)


def charge_of(poll: bytes) -> str:
    """``Key.run`` of what the ledger of answers charges for a poll with this digest."""
    return sha256(poll).hex()[:32]


def poll_header(study: bytes, run: bytes, asker: bytes) -> bytes:
    """Who asks in which run of which study: 32 bytes, in every poll's signature.

    Args:
        study: its digest, 32 bytes.
        run: the run's id, 16 bytes.
        asker: its Ed25519 public key, 32 bytes.
    """
    return sha256(_PREFIX, b"header\0", study, run, asker)


def make_poll(
    study: Study,
    run: bytes,
    key: SigningKey,
    question: str,
    choices: tuple[str, ...],
    random: RandomSource = os.urandom,
) -> Poll:
    """A signed question.

    Raises:
        ConfigError: see :func:`check_poll`.
    """
    check_poll(question, choices)
    made = Poll(
        before=poll_header(digest(study), run, key.public),
        signature=UNSIGNED,
        number=random(_NUMBER_BYTES),
        question=question,
        choices=choices,
    )
    return sign(made, key)


def check_poll(question: str, choices: Sequence[str]) -> None:
    """Raises: ConfigError, if there is no question, or are no proper choices; if they are too long,
    or not :func:`~securefedcollm.foreign.stream_safe`."""
    if not question.strip():
        raise ConfigError("no question", where="QUESTION", hint="give it some words")
    if not 2 <= len(choices) <= MOST_CHOICES:
        raise ConfigError(
            f"{len(choices)} choices", where="choices", hint=f"give 2 to {MOST_CHOICES}"
        )
    if len({" ".join(c.split()) for c in choices}) < len(choices) or not all(
        c.strip() for c in choices
    ):
        raise ConfigError("a choice is empty or there twice", where="choices", hint="mend the list")
    if sum(len(text.encode()) + 8 for text in (question, *choices)) > Poll.LIMIT - 1024:
        raise ConfigError(
            f"question and choices are over {(Poll.LIMIT >> 10) - 1} KiB",
            where="QUESTION",
            hint="shorten them; an encoder reads 512 tokens",
        )
    if not all(map(stream_safe, (question, *choices))):
        raise ConfigError(
            "question or a choice has over 30 accents on one letter",
            where="QUESTION",
            hint="silos refuse that (UAX #15, stream-safe text); write it without them",
        )


def answers_study(study: Study) -> str:
    """The name under which ledgers have the charges of a study's answers, hex.

    Every record's charges under it stay within the study's claim for answers by themselves.
    """
    return answers_name(digest(study))


def answers_name(study: bytes) -> str:
    """:func:`answers_study` of the study with this digest, 32 bytes."""
    return sha256(b"securefedcollm/answers/v1\0", study).hex()


def answers_of(study: Study) -> Retrieval:
    """The section of a study that asks records.

    Raises:
        ConfigError: it asks none.
    """
    if study.retrieval is None or study.retrieval.mode != "answers":
        raise ConfigError(
            "this study asks no records",
            where="retrieval.mode",
            hint="answers; configs/answers.yaml shows it",
        )
    return study.retrieval


def claim_of(study: Study) -> tuple[float, float]:
    """(ε, δ) of all answers of one record in this study."""
    plan, privacy = answers_of(study), study.privacy
    assert privacy is not None  # study.retrievalchecks
    return plan.epsilon or privacy.epsilon, privacy.delta


def vote_setting(study: Study) -> VoteSetting:
    """What fixes the mechanism of a study's answers, except its noise."""
    plan = answers_of(study)
    whole = plan.reader == "model"
    return VoteSetting(
        field_bound=study.field.bound,
        shares=study.quorum,
        colluders=study.silos.colluders,
        votes=1 if whole else plan.votes,
        whole=whole,
    )


def votes_of(study: Study, choices: int) -> Votes:
    """The mechanism of a question with so many choices.

    Raises:
        ConfigError: the study's field has no room for the noise.
    """
    setting = vote_setting(study)
    z = calibrate_votes(*claim_of(study), answers_of(study).questions, setting)
    return Votes(setting, z, choices)


def sum_header(study: Study, roster: Roster, poll: bytes, votes: Votes) -> RoundHeader:
    """The header of the secure sum that answers a poll: masks between all silos, in every study.

    Every poll has a run of its own with one sum and one attempt, so that no two of them ever share
    keys or journals with each other or with the study's rounds.

    Args:
        poll: its digest, 32 bytes.
    """
    header = round_header(
        study,
        roster=roster,
        run_id=poll[:16],
        round_=0,
        attempt=0,
        model=sha256(_PREFIX, b"sum\0", poll, votes.identity),
        values=votes.choices,
    )
    return msgspec.structs.replace(header, suite=SUITE)
