"""Attacks of a malicious server on CKKS rounds whose key an authority holds.

Colluding silos sign what the server likes; the last of the cohort does. The authority does not
collude: with it, the server could open every ciphertext, as the documentation says.
"""

from __future__ import annotations

import numpy as np

from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.authority import messages as am
from securefedcollm.aggregation.ckks.parameters import DEGREE
from securefedcollm.aggregation.ckks.secrets import CkksSecrets
from securefedcollm.aggregation.header import RoundHeader
from securefedcollm.aggregation.messages import Ask, sign
from securefedcollm.aggregation.steps import Step
from securefedcollm.primitives import SigningKey, sha256
from securefedcollm_audits.protocol import malformed
from securefedcollm_audits.protocol.cohort import Cohort, altered
from securefedcollm_audits.protocol.keyed_cohort import NAME, Round, authority, cohort, leaks
from securefedcollm_audits.protocol.outcome import Outcome, both

VICTIM, COLLUDER = "silo-001", "silo-004"


def _judge(attack: str, made: Cohort, refuser: str, reason: str, *rounds: Round) -> Outcome:
    """Refused by ``refuser``, in words that contain ``reason``, in the last round; no leak."""
    learnt = tuple(leaks(made, *rounds))
    why = rounds[-1].refused.get(refuser, "")
    held = bool(why) and reason in why and not learnt
    return Outcome(attack, learnt, why or "nobody refused", held)


def _attempt(made: Cohort, number: int) -> RoundHeader:
    return altered(made.header, attempt=number)


def _only(request: am.OpenRequest, keep: int) -> am.OpenRequest:
    return altered(request, consents=request.consents[:keep], parts=request.parts[:keep])


def authority_single_ciphertext() -> Outcome:
    """Ask the authority to decrypt one silo's ciphertext."""
    made = cohort()
    played = Round(made)
    played.say(NAME, _only(played.request(), 1))
    return _judge("one ciphertext for a sum", made, NAME, "a list of 1 silos", played)


def authority_too_few() -> Outcome:
    """Ask for a sum of fewer silos than the study's minimum."""
    made = cohort()
    played = Round(made)
    played.say(NAME, _only(played.request(), 2))
    return _judge("a sum of two silos", made, NAME, "a list of 2 silos; 3 are needed", played)


def authority_not_the_sum() -> Outcome:
    """Give the victim's ciphertext unchanged, and nothing for all others."""
    made = cohort()
    played = Round(made)
    request = played.request()
    empty = [altered(part, second=bytes(len(part.second))) for part in request.parts[1:]]
    played.say(NAME, altered(request, parts=(request.parts[0], *empty)))
    reason = "ciphertext is not the one it committed to"
    return _judge("an aggregate that is not the sum", made, NAME, reason, played)


def authority_repeated_ciphertext() -> Outcome:
    """Have one ciphertext counted for every silo; the sum is a multiple of one vector."""
    made = cohort()
    played = Round(made)
    request = played.request()
    parts = (request.parts[0],) * len(request.parts)
    first = played.say(NAME, altered(request, parts=parts)) is None
    one = _judge("one ciphertext for all", made, NAME, "not the one it committed to", played)
    again = Round(made, header=_attempt(made, 1))
    request = again.request()
    same = (request.consents[0],) * len(request.consents)
    second = again.say(NAME, altered(request, consents=same, parts=parts)) is None
    two = _judge("one silo for all", made, NAME, "repeated or unknown silos", played, again)
    return both(one, two) if first and second else one


def authority_tampered_ciphertext() -> Outcome:
    """Flip one bit of a ciphertext on its way to the authority."""
    made = cohort()
    played = Round(made)
    request = played.request()
    changed = bytearray(request.parts[1].second)
    changed[100] ^= 1
    part = altered(request.parts[1], second=bytes(changed))
    played.say(NAME, altered(request, parts=(request.parts[0], part, *request.parts[2:])))
    return _judge("a flipped bit", made, NAME, "silo-002's ciphertext is not the one", played)


def authority_second_opening() -> Outcome:
    """Open all silos, then, in another attempt, all except the victim: compare the sums."""
    made = cohort()
    first = Round(made)
    first.play()
    second = Round(made, header=_attempt(made, 1))
    request = second.request()
    rest = altered(request, consents=request.consents[1:], parts=request.parts[1:])
    second.say(NAME, rest)
    return _judge("a second sum of the round", made, NAME, "a second time", first, second)


def authority_second_answer() -> Outcome:
    """Ask a restored snapshot of the authority again: averaged answers have less flooding noise."""
    made = cohort()
    played = Round(made)
    request = played.request()
    side, twin = played.sides[NAME], authority(made)
    memory = dict(vars(side))
    memory["_secrets"].close = lambda: None  # the snapshot's memory is its own
    vars(twin).update(memory)
    assert played.say(NAME, request)
    played.sides[NAME] = twin
    played.say(NAME, request)
    return _judge("a second answer of one attempt", made, NAME, "a second time", played)


def authority_second_key() -> Outcome:
    """Restart the authority within an attempt, so that silos encrypt under two keys."""
    made = cohort()
    played = Round(made).until(Step.ENCRYPT)
    played.sides[NAME] = authority(made)
    played.say(NAME, Ask(made.header))
    return _judge("a second key in one attempt", made, NAME, "a second time", played)


def authority_replay() -> Outcome:
    """Ask for last attempt's ciphertexts under this attempt's key; then with its consents only."""
    made = cohort()
    old, new = Round(made), Round(made, header=_attempt(made, 1))
    before = old.request()
    new.until(Step.UNMASK)
    new.say(NAME, before)
    one = _judge("ciphertexts of another attempt", made, NAME, "for another round", old, new)
    third = Round(made, header=_attempt(made, 2))
    third.say(NAME, altered(third.request(), consents=before.consents))
    reason = "consent for another round"
    return both(one, _judge("consents of another attempt", made, NAME, reason, old, new, third))


def authority_substituted_key() -> Outcome:
    """Offer silos a key of the server's own; then the authority's key of another attempt."""
    made = cohort()
    played = Round(made).until(Step.ENCRYPT)
    mine = SigningKey.generate()
    keys = played.coordinator._keys
    genuine, part = keys.statement, keys.parts[0]
    played.say(VICTIM, am.KeyOffer(made.header, sign(genuine, mine), part))
    one = _judge("the server's own key", made, VICTIM, "auditor's key with a bad signature", played)
    later = Round(made, header=_attempt(made, 1)).until(Step.ENCRYPT)
    later.say(VICTIM, am.KeyOffer(later.header, genuine, part))
    reason = "auditor's key for another round"
    two = _judge("a key of another attempt", made, VICTIM, reason, played, later)
    third = Round(made, header=_attempt(made, 2)).until(Step.ENCRYPT)
    keys = third.coordinator._keys
    third.say(VICTIM, am.KeyOffer(third.header, keys.statement, keys.parts[3]))
    reason = "key is not the one made for this silo"
    three = _judge("the colluder's key", made, VICTIM, reason, played, later, third)
    return both(both(one, two), three)


def authority_split_lists() -> Outcome:
    """Show the victim one list of commitments, and complete another one, with a ciphertext that is
    minus the others', once its ciphertext is there: the "sum" would be the victim's vector."""
    made = cohort()
    played = Round(made).until(Step.UPLOAD)
    sealed = played.coordinator._sealed
    victim = made.roster.index(VICTIM)
    played.say(VICTIM, m.SealedRoll(tuple(sealed.values())))
    first = played.deliveries[VICTIM]
    forged = _minus(made, first)
    colluder = made.roster.index(COLLUDER)
    size = polynomials.polynomial_bytes(m.ring_of(made.header))
    seconds = m.polynomial_digests(forged.second, size)
    key_id = played.coordinator._key_id
    root = m.cipher_root(key_id, colluder, forged.first, seconds)
    lie = sign(altered(sealed[colluder], root=root), made.keys[COLLUDER])
    roll = tuple({**sealed, colluder: lie}.values())
    for name in ("silo-002", "silo-003"):
        played.say(name, m.SealedRoll(roll))
    consent = am.Consent(made.header.digest, colluder, bytes(64), m.transcript(key_id, roll))
    deliveries = played.deliveries
    names = made.names[:3]
    parts = [am.CipherPart(sha256(deliveries[n].first), deliveries[n].second) for n in names]
    request = am.OpenRequest(
        roll,
        (*(deliveries[n].consent for n in names), sign(consent, made.keys[COLLUDER])),
        (*parts, forged),
    )
    assert request.consents[0].index == victim
    played.say(NAME, request)
    reason = f"{VICTIM}'s consent is to other ciphertexts"
    return _judge("a ciphertext chosen after the victim's", made, NAME, reason, played)


def _minus(made: Cohort, delivery: am.CipherDelivery) -> am.CipherPart:
    ring, shape = m.ring_of(made.header), m.shape_of(made.header)
    zero = np.zeros((shape.groups, DEGREE), dtype=np.uint64)
    second = polynomials.subtract(
        zero, polynomials.unpack(delivery.second, ring, shape.groups), ring
    ) % np.uint64(ring.prime)
    return am.CipherPart(sha256(delivery.first), polynomials.pack(second, ring))


def authority_malformed_ciphertext() -> Outcome:
    """Have a colluder upload a constant for its c1, read its keys' secret out of the opened sum,
    and try it on the victim's ciphertext."""
    made = cohort()
    ring, shape = m.ring_of(made.header), m.shape_of(made.header)
    played, bits = Round(made), ring.scale_bits - 2
    secrets = played.sides[COLLUDER]._secrets
    assert isinstance(secrets, CkksSecrets)
    secrets._upload = malformed.upload(ring, shape, bits)
    kept = secrets._upload
    secrets.encrypt = lambda joint: kept  # type: ignore[method-assign]
    played.play()
    total = np.zeros((shape.chunks, DEGREE), dtype=np.uint64)
    for delivery in played.deliveries.values():
        polynomials.accumulate(total, delivery.first, ring)
    assert played.opened
    polynomials.accumulate(total, played.opened.share, ring)
    found = malformed.read_secrets(ring, shape, total, bits)
    learnt = list(leaks(made, played))
    if set(np.unique(found)) != {-1, 0, 1}:
        learnt.append("nothing: the attack itself went wrong")
    delivery = played.deliveries[VICTIM]
    opened = malformed.open_with(ring, shape, found, delivery.first, delivery.second)
    if (opened[: made.values] == made.vectors[VICTIM]).mean() > 0.5:
        learnt.append(f"the vector of {VICTIM}")
    defence = "the secret that is read is of the colluder's own keys, and opens nobody else's"
    return Outcome("a constant for a ciphertext", tuple(learnt), defence, not learnt)


def authority_invented_silo() -> Outcome:
    """Sign commitments and consent in the name of silos that are not there."""
    made = cohort()
    played = Round(made)
    request, mine = played.request(), SigningKey.generate()
    sealed = tuple(sign(entry, mine) for entry in request.sealed)
    played.say(NAME, altered(request, sealed=sealed))
    one = _judge("invented commitments", made, NAME, "commitment with a bad signature", played)
    again = Round(made, header=_attempt(made, 1))
    request = again.request()
    consents = tuple(sign(entry, mine) for entry in request.consents)
    again.say(NAME, altered(request, consents=consents))
    reason = "consent with a bad signature"
    return both(one, _judge("invented consents", made, NAME, reason, played, again))


def authority_downgrade() -> Outcome:
    """Announce the round with a lower quorum than the study's."""
    made = cohort()
    played = Round(made)
    lower = altered(made.header.parameters, colluders=0, min_silos=2, threshold=3)
    played.say(NAME, Ask(altered(made.header, parameters=lower)))
    return _judge("a lower quorum", made, NAME, "differs from the authority's in: para", played)


def authority_false_notice() -> Outcome:
    """Tell a silo that the sum has more silos than it has, so that the silo counts missing noise;
    then that it is in a sum which it is not in."""
    made = cohort()
    played = Round(made)
    played.until(Step.UPLOAD)
    frame = next(iter(played.coordinator.requests().values()))
    for name in made.names[:3]:  # silo-004 is lost
        played.coordinator.receive(name, played.sides[name].handle(frame))
    played.coordinator.lost(COLLUDER, "lost")
    played.coordinator.advance()
    played.until(Step.NOTE)
    true = played.coordinator._statement
    played.say(VICTIM, am.Notice(altered(true, survivors=(1, 2, 3, 4))))
    one = _judge("more noise than there is", made, VICTIM, "bad signature", played)
    left = played.sides[COLLUDER].handle(frame)  # it uploads too late
    assert left
    played.say(COLLUDER, am.Notice(true))
    reason = "not about a sum with this silo's ciphertext"
    return both(one, _judge("a sum without the silo", made, COLLUDER, reason, played))


def authority_out_of_order() -> Outcome:
    """Ask to decrypt before there is a key; then once more after the sum was opened."""
    made = cohort()
    honest = Round(made)
    request = honest.request()
    early = Round(made, header=_attempt(made, 1))
    early.say(NAME, request)
    one = _judge("a decryption without a key", made, NAME, "ask frame", honest, early)
    honest.say(NAME, request)
    honest.say(NAME, request)
    return both(one, _judge("a decryption once more", made, NAME, "this attempt is over", honest))


CASES = (
    authority_single_ciphertext,
    authority_too_few,
    authority_not_the_sum,
    authority_repeated_ciphertext,
    authority_tampered_ciphertext,
    authority_second_opening,
    authority_second_answer,
    authority_second_key,
    authority_replay,
    authority_substituted_key,
    authority_split_lists,
    authority_malformed_ciphertext,
    authority_invented_silo,
    authority_downgrade,
    authority_false_notice,
    authority_out_of_order,
)
