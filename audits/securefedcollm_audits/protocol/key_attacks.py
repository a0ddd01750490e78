"""A malicious server, with colluding silos, against the keys of honest silos: seeds, identities and
the roll of all keys."""

from __future__ import annotations

from collections.abc import Callable

from securefedcollm.aggregation.masking import keys
from securefedcollm.aggregation.messages import sign
from securefedcollm.primitives import AgreementKey, SigningKey, sha256
from securefedcollm_audits.protocol.cohort import Cohort, Puppet, altered, recorded
from securefedcollm_audits.protocol.outcome import Outcome, both, judge, observed, respelled

BIRTHDAY = 1 << 18
"""Number of seeds to try for two with one mask: enough where a seed has 32 bits."""


def narrow_seed() -> Outcome:
    """Search the masks of a generator that folds its secret into fewer than 256 bits.

    Two ways to find one without knowing how it folds: bits that change nothing, and masks that
    repeat (birthday): 2^18 seeds have 8 pairs in common, on average, if there are 2^32 masks.
    """
    seed, header, delivery = bytes(range(32)), sha256(b"header"), bytes(32)
    flips = [(int.from_bytes(seed, "big") ^ 1 << bit).to_bytes(32, "big") for bit in range(256)]
    others = [count.to_bytes(32, "little") for count in range(BIRTHDAY)]
    seeds = {seed, *flips, *others}
    masks = {keys.self_mask_key(s, header, delivery, 1) for s in seeds}
    whole = len(masks) == len(seeds) and {len(mask) for mask in masks} == {32}
    drawn = {_committed(flip) for flip in (None, *range(32))}
    return observed(
        "folded seed",
        "masks repeat, or bytes of the seed are not random",
        "each of 256 seed bits is drawn and changes a 256-bit key; no two of 2^18 keys are equal",
        held=whole and len(drawn) == 33,
    )


def _committed(flip: int | None) -> bytes:
    """A silo's commitment to its seed, with one byte of what it was drawn from altered."""
    cohort = Cohort(silos=4)
    victim = cohort.names[0]
    source, drawn = cohort.randomness(victim, cohort.header), bytearray()

    def random(count: int) -> bytes:
        start = len(drawn)
        drawn.extend(source(count))
        at = 2 * 32 + (flip or 0)  # after the secrets for masks and shares
        if flip is not None and start <= at < len(drawn):
            drawn[at] ^= 0xFF
        return bytes(drawn[start:])

    silos = {name: cohort.silo(name) for name in cohort.names}
    silos[victim] = cohort.silo(victim, random=random)
    puppet = Puppet(cohort, silos)
    return puppet.roll(cohort.names, puppet.ask().values())[victim].statement.seed_commitment


def middleman() -> Outcome:
    """Replace a silo's keys by the relay's, unsigned or signed by another identity."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    adverts = puppet.ask()
    target = cohort.names[1]
    own = altered(adverts[target], mask_public=AgreementKey(bytes(range(32))).public)
    signed = sign(own, SigningKey.generate(recorded("relay")))
    puppet.roll([cohort.names[0]], (adverts | {target: own}).values())
    puppet.roll([cohort.names[2]], (adverts | {target: signed}).values())
    refusers = [cohort.names[0], cohort.names[2]]
    return judge("keys of the relay's own", puppet, refusers, "bad signature")


def invented_peers() -> Outcome:
    """Fill the roll with silos that are not on the roster, or with one silo twice."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    adverts = list(puppet.ask().values())
    invented = sign(altered(adverts[0], index=6), SigningKey.generate(recorded("sybil")))
    puppet.roll(cohort.names[:1], [*adverts, invented])
    puppet.roll(cohort.names[1:2], [*adverts, adverts[4]])
    return judge("invented peers", puppet, cohort.names[:2], "repeated or unknown")


def small_order_mask_key() -> Outcome:
    """A colluder signs a mask key that fixes every pairwise secret to zero."""
    return _small_order("mask_public")


def small_order_share_key() -> Outcome:
    """A colluder signs a share key that fixes every box key to zero."""
    return _small_order("share_public")


def _small_order(field: str) -> Outcome:
    cohort = Cohort()
    puppet = Puppet(cohort)
    adverts = puppet.ask()
    friend = cohort.names[-1]
    weak = sign(altered(adverts[friend], **{field: bytes(32)}), cohort.keys[friend])
    puppet.silos[friend]._own_keys = adverts[friend] = weak  # a modified client
    deals = puppet.roll(cohort.names, adverts.values())
    if len(deals) == len(cohort.names):
        puppet.deliver(cohort.honest, deals)
    return judge(f"{field} of small order", puppet, cohort.honest, "unusable public key")


def repeated_keys() -> Outcome:
    """A colluder signs a peer's public key as its own, as it is or in other bytes that X25519 reads
    as the same key, and the server lets it through."""
    return both(_repeated(lambda key: key), _repeated(respelled))


def _repeated(spell: Callable[[bytes], bytes]) -> Outcome:
    cohort = Cohort()
    puppet = Puppet(cohort)
    adverts = puppet.ask()
    victim, friend = cohort.names[0], cohort.names[-1]
    copied = altered(adverts[friend], mask_public=spell(adverts[victim].mask_public))
    adverts[friend] = sign(copied, cohort.keys[friend])
    puppet.roll(cohort.honest, adverts.values())
    return judge("one key twice on the roll", puppet, cohort.honest, "appears twice")


def stolen_identity() -> Outcome:
    """Relay keys or a dealing signed with the victim's own stolen identity key."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    names, stolen = cohort.names, cohort.keys[cohort.names[0]]
    adverts = puppet.ask()
    false = sign(altered(adverts[names[0]], mask_public=bytes(range(32))), stolen)
    puppet.roll(names[:1], (adverts | {names[0]: false}).values())
    second = Puppet(Cohort())
    deals = second.roll(names, second.ask().values())
    statement = sign(altered(deals[names[0]].statement, seed_commitment=bytes(32)), stolen)
    deals[names[0]] = altered(deals[names[0]], statement=statement)
    second.deliver(names[:1], deals)
    return both(
        judge("a stolen identity key", puppet, names[:1], "did not send"),
        judge("a stolen identity key", second, names[:1], "did not send"),
    )


def split_rolls() -> Outcome:
    """Show a colluding dealer another roll than its holders."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    deals = puppet.roll(cohort.names, puppet.ask().values())
    friend = cohort.names[-1]
    statement = sign(altered(deals[friend].statement, roll=bytes(32)), cohort.keys[friend])
    deals[friend] = altered(deals[friend], statement=statement)
    puppet.deliver(cohort.honest, deals)
    return judge("equivocated rolls", puppet, cohort.honest, "another roll")
