"""Malicious silos against the honest server: it goes on without them, or stops and names them.

The liar is the last silo of the cohort: the library's own silo, modified as an attacker would.
Under masks no server can notice a dishonest vector that is within bounds; see
``docs/protocol.md``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable

import numpy as np

from securefedcollm.aggregation.masking import shamir
from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.masking.keys import parcel_digest
from securefedcollm.aggregation.masking.messages import Advertise, Agreement, Deal, Refusal, Unmask
from securefedcollm.aggregation.masking.silo import SiloRound
from securefedcollm.aggregation.masking.upload import HEAD_BYTES, MAGIC, Upload, words_digest
from securefedcollm.aggregation.messages import UNSIGNED, Signed, decode, sign
from securefedcollm.aggregation.steps import TRANSITIONS, Step
from securefedcollm.errors import ProtocolError, RemoteProtocolError
from securefedcollm.primitives import AgreementKey
from securefedcollm_audits.protocol.cohort import Cohort, altered, play
from securefedcollm_audits.protocol.outcome import Outcome, both, observed, respelled

Forge = Callable[[Cohort, SiloRound, bytes], bytes | None]
_SILOS = 6


def _attack(
    attack: str, forges: dict[Step, Forge], reason: str, *, lost: int = 0, spoken_of: int = -1
) -> Outcome:
    """The liar forges its replies; the first ``lost`` silos drop at upload.

    Held if the reason given for silo number ``spoken_of`` (the liar, or its victim) contains
    ``reason``, and the sum, if there is one, is exactly that of the survivors.
    """
    cohort = Cohort(silos=_SILOS)
    liar, subject = cohort.names[-1], cohort.names[spoken_of]
    silos = {name: cohort.silo(name) for name in cohort.names}
    coordinator = CoordinatorRound(header=cohort.header, roster=cohort.roster)

    def reply(step: Step, name: str, frame: bytes) -> bytes | None:
        if step is Step.UPLOAD and name in cohort.names[:lost]:
            return None
        if step in forges and name == liar:
            return forges[step](cohort, silos[name], frame)
        return frame

    try:
        result = play(silos, coordinator, reply=reply)
    except RemoteProtocolError as error:
        held = error.peer == subject and reason in error.message
        return observed(attack, "nobody was named", f"aborted: {error.message}", held=held)
    except ProtocolError as error:
        held = spoken_of == -1 and reason in error.message
        return observed(attack, "nobody was told", f"aborted: {error.message}", held=held)
    exact = bool(np.array_equal(result.sum, cohort.plain_sum(result.survivors)))
    why = result.excluded.get(subject, "")
    held = exact and bool(why) and reason in why
    return observed(attack, "a wrong sum or no name", f"went on without it: {why}", held=held)


def _all(outcomes: Iterable[Outcome]) -> Outcome:
    first, *rest = outcomes
    for outcome in rest:
        first = both(first, outcome)
    return first


def _resigned(cohort: Cohort, message: Signed, **changes: object) -> bytes:
    return sign(altered(message, **changes), cohort.keys[cohort.names[-1]]).encode()


def bad_signatures() -> Outcome:
    """A wrong signature in every step."""

    def flip(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        # msgpack marks a binary of 64 bytes with c4 40; an upload has its signature at 80.
        at = 80 if frame.startswith(MAGIC) else frame.find(b"\xc4\x40") + 2
        return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]

    return _all(_attack("bad signatures", {step: flip}, "bad signature") for step in TRANSITIONS)


def malformed() -> Outcome:
    """Garbage, nothing, a truncated and an oversized frame, in every step."""
    forges: tuple[Forge, ...] = (
        lambda cohort, silo, frame: b"\xff\x00garbage",
        lambda cohort, silo, frame: b"",
        lambda cohort, silo, frame: frame[:-1],
        lambda cohort, silo, frame: frame + bytes(1 << 20),
    )
    return _all(
        _attack("malformed frames", {step: forge}, "") for step in TRANSITIONS for forge in forges
    )


def impersonation() -> Outcome:
    """Send what another silo has just said."""
    said: dict[Step, bytes] = {}
    cohort = Cohort(silos=_SILOS)

    def keep(step: Step, name: str, frame: bytes) -> bytes:
        said.setdefault(step, frame)
        return frame

    play(
        {name: cohort.silo(name) for name in cohort.names},
        CoordinatorRound(header=cohort.header, roster=cohort.roster),
        reply=keep,
    )

    def repeat(step: Step) -> Forge:
        return lambda cohort, silo, frame: said[step]

    return _all(
        _attack("another silo's frames", {step: repeat(step)}, "of another silo")
        for step in TRANSITIONS
    )


def copied_keys() -> Outcome:
    """Advertise a peer's public key as one's own, as it is or in another spelling, or one key for
    both purposes."""

    def copy(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        secret = cohort.randomness(cohort.names[0], cohort.header)(32)
        own = decode(Advertise, frame, "liar")
        return _resigned(cohort, own, mask_public=AgreementKey(secret).public)

    def double(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        own = decode(Advertise, frame, "liar")
        return _resigned(cohort, own, mask_public=own.share_public)

    def respell(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        copied = decode(Advertise, copy(cohort, silo, frame), "liar")
        return _resigned(cohort, copied, mask_public=respelled(copied.mask_public))

    return _all(
        _attack("copied keys", {Step.ADVERTISE: forge}, stopped)
        for forge, stopped in (
            (copy, "in use already"),
            (double, "in use already"),
            (respell, "misspelled"),
        )
    )


def small_order_keys() -> Outcome:
    """Advertise a key with which every shared secret is zero; peers would refuse the roll."""

    def weak(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        return _resigned(cohort, decode(Advertise, frame, "liar"), share_public=bytes(32))

    return _attack("keys of small order", {Step.ADVERTISE: weak}, "small order")


def unfitting_dealing() -> Outcome:
    """Deal to others than the roll, or make a statement about another roll or other parcels."""

    def fewer(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        deal = decode(Deal, frame, "liar")
        statement = altered(deal.statement, parcels=deal.statement.parcels[1:])
        statement = sign(statement, cohort.keys[cohort.names[-1]])
        return Deal(statement, deal.parcels[1:]).encode()

    def other(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        deal = decode(Deal, frame, "liar")
        return Deal(deal.statement, (deal.parcels[1], *deal.parcels[1:])).encode()

    def another_roll(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        deal = decode(Deal, frame, "liar")
        statement = altered(deal.statement, roll=bytes(32))
        return Deal(sign(statement, cohort.keys[cohort.names[-1]]), deal.parcels).encode()

    return _all(
        _attack("a dealing off the roll", {Step.SHARE: forge}, "does not fit the roll")
        for forge in (fewer, other, another_roll)
    )


def bad_boxes() -> Outcome:
    """Deal one holder a box that does not open, or shares other than committed to."""
    honest_lengths = {"box": 82, "seed_share_commitment": 32, "key_share_commitment": 32}

    def forge(field: str) -> Forge:
        def bad(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
            deal = decode(Deal, frame, "liar")
            parcel = altered(deal.parcels[0], **{field: bytes(honest_lengths[field])})
            parcels = (parcel, *deal.parcels[1:])
            digests = tuple(map(parcel_digest, parcels))
            statement = altered(deal.statement, parcels=digests)
            silo._own_statement = sign(statement, cohort.keys[cohort.names[-1]])
            return Deal(silo._own_statement, parcels).encode()

        return bad

    return _all(
        _attack("bad share boxes", {Step.SHARE: forge(field)}, "refused: silo-006", spoken_of=0)
        for field in honest_lengths
    )


def false_commitment() -> Outcome:
    """Commit to another self-mask seed than the one shared out."""

    def forge(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        deal = decode(Deal, frame, "liar")
        statement = altered(deal.statement, seed_commitment=bytes(32))
        silo._own_statement = sign(statement, cohort.keys[cohort.names[-1]])
        return Deal(silo._own_statement, deal.parcels).encode()

    return _attack("a false seed commitment", {Step.SHARE: forge}, "shares of another secret")


def false_mask_secret() -> Outcome:
    """Share out another mask secret than the advertised key's, then drop out."""
    return _all(
        _attack(
            "shares of another mask secret",
            {
                Step.ADVERTISE: _sharing(secret),
                Step.SHARE: _sharing(bytes(32)),
                Step.UPLOAD: lambda cohort, silo, frame: None,
            },
            reason,
        )
        for secret, reason in (
            (bytes(31) + b"\1", "shares of another secret"),
            ((shamir.PRIME - 1).to_bytes(33, "big"), "shares of no secret"),
        )
    )


def _sharing(secret: bytes) -> Forge:
    def forge(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        assert silo._secrets is not None
        silo._secrets.mask_secret = secret
        return frame

    return forge


def false_refusal() -> Outcome:
    """Accuse an honest dealer, or nobody on the roll, instead of uploading."""

    def accuse(accused: int, delivery: bytes | None = None) -> Forge:
        def forge(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
            refusal = Refusal(
                header=cohort.header.digest,
                index=_SILOS,
                signature=UNSIGNED,
                delivery=delivery or silo._delivery_digest,
                accused=accused,
            )
            return _resigned(cohort, refusal)

        return forge

    return _all(
        _attack("false accusations", {Step.UPLOAD: forge}, reason)
        for forge, reason in (
            (accuse(1), "refused: silo-001"),
            (accuse(99), "refused another delivery"),
            (accuse(1, bytes(32)), "refused another delivery"),
        )
    )


def other_delivery() -> Outcome:
    """Upload a vector masked for another set of peers."""

    def forge(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        words = np.frombuffer(frame, dtype="<u8", offset=HEAD_BYTES)
        key = cohort.keys[cohort.names[-1]]
        header = cohort.header.digest
        upload = sign(Upload(header, _SILOS, UNSIGNED, bytes(32), words_digest(words)), key)
        head = MAGIC + header + bytes(32) + _SILOS.to_bytes(8, "little") + upload.signature
        return head + frame[HEAD_BYTES:]

    return _attack("another delivery", {Step.UPLOAD: forge}, "another delivery")


def other_lists() -> Outcome:
    """Agree to, or open, other lists than were asked for."""

    def forge(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        kind: type[Agreement | Unmask] = Agreement if silo.step is Step.UNMASK else Unmask
        return _resigned(cohort, decode(kind, frame, "liar"), lists=bytes(32))

    return _all(
        _attack("other lists", {step: forge}, "other lists") for step in (Step.AGREE, Step.UNMASK)
    )


def wrong_shares() -> Outcome:
    """Open with an altered share, a share of another dealer, or too few."""

    def forge(change: Callable[[tuple[bytes, ...]], tuple[bytes, ...]]) -> Forge:
        def bad(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
            unmask = decode(Unmask, frame, "liar")
            return _resigned(cohort, unmask, shares=change(unmask.shares))

        return bad

    changes = (
        lambda shares: (bytes(33), *shares[1:]),
        lambda shares: (shares[1], shares[0], *shares[2:]),
        lambda shares: shares[1:],
    )
    return _all(
        _attack("wrong shares", {Step.UNMASK: forge(change)}, reason, lost=lost)
        for change, reason in zip(
            changes, ("a wrong share", "a wrong share", "other lists"), strict=True
        )
        for lost in (0, 1)
    )


def out_of_bounds() -> Outcome:
    """Upload values that spill into the neighbouring fields."""

    def forge(cohort: Cohort, silo: SiloRound, frame: bytes) -> bytes:
        words = np.frombuffer(frame, dtype="<u8", offset=HEAD_BYTES).copy()
        words += np.uint64(1) << np.uint64(63)
        header, delivery = cohort.header.digest, silo._delivery_digest
        unsigned = Upload(header, _SILOS, UNSIGNED, delivery, words_digest(words))
        upload = sign(unsigned, cohort.keys[cohort.names[-1]])
        head = MAGIC + header + delivery + _SILOS.to_bytes(8, "little") + upload.signature
        return head + words.tobytes()

    return _attack("values out of bounds", {Step.UPLOAD: forge}, "out of bounds")
