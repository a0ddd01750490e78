"""A malicious server, with colluding silos, against honest silos."""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np

from securefedcollm.aggregation.header import RoundHeader
from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.masking.messages import Advertise, Agreement
from securefedcollm.aggregation.masking.upload import HEAD_BYTES
from securefedcollm.aggregation.messages import sign
from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.primitives import sha256
from securefedcollm_audits.protocol.cohort import Cohort, Puppet, altered, play
from securefedcollm_audits.protocol.outcome import Outcome, both, judge, observed


def both_lists() -> Outcome:
    """List one silo as survivor and as dropout, to be handed both of its secrets."""
    cohort = Cohort(silos=6)
    puppet = Puppet(cohort)
    puppet.through_upload()
    puppet.survey(cohort.names, cohort.names, cohort.names[:1])
    return judge("one silo in both lists", puppet, cohort.names, "do not split")


def both_lists_at_opening() -> Outcome:
    """Agree on honest lists, then ask to open others."""
    cohort = Cohort(silos=6)
    puppet = Puppet(cohort)
    puppet.through_upload()
    names, victim = cohort.names, cohort.names[:1]
    agreements = puppet.survey(names, names).values()
    puppet.open(names[:3], names, victim, agreements)
    puppet.open(names[3:], names[1:], victim, agreements)
    return judge("other lists after agreement", puppet, names, "other lists")


def downgrade() -> Outcome:
    """Announce a smaller modulus, threshold, quorum, cohort or vector than the study's."""
    cohort = Cohort()
    parameters = cohort.header.parameters
    weaker = [
        altered(parameters, bound=1, field_bits=8),
        altered(parameters, threshold=5),
        altered(parameters, min_silos=4),
        altered(parameters, colluders=0, min_silos=2, threshold=3),
        altered(parameters, values=1),
    ]
    puppet = Puppet(cohort)
    for name, shown in zip(cohort.names, weaker, strict=True):
        puppet.ask([name], altered(cohort.header, parameters=shown))
    impossible = [{"threshold": 1}, {"field_bits": 1}, {"silos": 1}, {"min_silos": 1}]
    outcome = judge("weaker parameters", puppet, cohort.names, "parameters")
    held = all(_refused_by_floor(cohort.header, **change) for change in impossible)
    floors = observed("floors", "parameters below the floors", "", held=held)
    return both(outcome, floors)


def _refused_by_floor(header: RoundHeader, **change: int) -> bool:
    try:
        altered(header.parameters, **change)
    except ConfigError:
        return True
    return False


def victim_alone() -> Outcome:
    """Run the round with the victim alone, or with the victim and colluders."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    adverts = puppet.ask()
    victim, other, friend = cohort.names[0], cohort.names[1], cohort.names[-1]
    puppet.roll([victim], [adverts[victim]])
    puppet.roll([other], [adverts[other], adverts[friend]])
    return judge("a cohort below the quorum", puppet, [victim, other], "are needed")


def side_channels() -> Outcome:
    """Read sizes, counts or metrics off what travels beside the masked vector."""
    sizes: list[set[int]] = []
    for scale in (0, 1):
        cohort = Cohort(silos=4, values=40)
        for vector in cohort.vectors.values():
            vector[:] = scale * cohort.bound
        sizes.append({len(frame) for frame in Puppet(cohort).through_upload().values()})
    fixed = {HEAD_BYTES + 8 * cohort.header.parameters.words}
    return observed(
        "metrics beside the vector",
        "a size that depends on the vector",
        "an upload is a fixed head and masked words of fixed length, nothing else",
        held=sizes == [fixed, fixed],
    )


def overflow() -> Outcome:
    """Wrap the sum: extreme vectors of all silos, and a vector out of bounds."""
    exact = True
    for factor in (1, -1):
        cohort = Cohort(silos=7, bound=4681, field_bits=16)  # 2·4681·7 + 1 = 65,535: no slack
        for vector in cohort.vectors.values():
            vector[:] = factor * cohort.bound
        coordinator = CoordinatorRound(header=cohort.header, roster=cohort.roster)
        result = play({name: cohort.silo(name) for name in cohort.names}, coordinator)
        exact = exact and bool((result.sum == factor * cohort.bound * cohort.silos).all())
    cohort.vectors[cohort.names[0]][-1] = cohort.bound + 1
    defence = "nobody refused"
    try:
        cohort.silo(cohort.names[0])
    except LocalProtocolError as error:
        defence = error.message
    held = exact and "exceeds the bound" in defence
    return observed("overflow", "a wrapped sum", defence, held=held)


def small_values() -> Outcome:
    """Tell an all-zero vector by its masked form: no bit of a masked word may be biased."""
    cohort = Cohort(silos=3, values=64_000, bound=1)
    for vector in cohort.vectors.values():
        vector[:] = 0
    frame = Puppet(cohort).through_upload()[cohort.names[0]]
    words = np.frombuffer(frame, dtype=np.uint8, offset=HEAD_BYTES).reshape(-1, 8)
    ones = np.unpackbits(words, axis=1).mean(axis=0)
    limit = 5 * 0.5 / np.sqrt(len(words))  # five standard deviations of a fair bit
    return observed(
        "bias of small values",
        "a biased bit",
        f"all 64 bit positions are fair within {limit:.3f}",
        held=bool((abs(ones - 0.5) < limit).all()),
    )


def late_upload() -> Outcome:
    """Call an uploader a dropout, have its mask key opened, then use its held-back upload."""
    cohort = Cohort(silos=6)
    puppet = Puppet(cohort)
    puppet.through_upload()  # the spy has the victim's upload, too
    victim, *rest = cohort.names
    puppet.survey([victim], rest, [victim])
    agreements = puppet.survey(rest, rest, [victim])
    puppet.open(rest, rest, [victim], agreements.values())
    outcome = judge("a dropout's late upload", puppet, [victim], "left this silo out")
    opened = [one.members for one in puppet.spy.opened()]
    honest_sum = observed("", "another sum", "", held=frozenset(range(2, 6)) in opened)
    return both(outcome, honest_sum)


def inconsistent_models() -> Outcome:
    """Send the victim another global model, so that its update stands out in the sum."""
    cohort = Cohort()
    victim = cohort.names[0]
    other = altered(cohort.header, model_digest=sha256(b"another model"))
    silos = {
        name: cohort.silo(name, header=other if name == victim else None) for name in cohort.names
    }
    puppet = Puppet(cohort, silos)
    adverts = puppet.ask(cohort.names[1:]) | puppet.ask([victim], other)
    puppet.roll(cohort.names, adverts.values())
    return judge("inconsistent models", puppet, cohort.names, "global model")


def split_survivors() -> Outcome:
    """Show two groups different survivor sets, and open both with a colluder's signatures."""
    cohort = Cohort(silos=6)
    puppet = Puppet(cohort)
    puppet.through_upload()
    names = cohort.names
    for group, lost in ((names[1:3], names[0]), ((names[0], names[3]), names[4])):
        survivors = [name for name in names if name != lost]
        signed = puppet.survey(group, survivors, [lost])
        signed |= {names[5]: _as_colluder(cohort, signed[group[0]])}
        puppet.open(group, survivors, [lost], signed.values())
    return judge("equivocated survivor sets", puppet, names[:4], "3 agreements; 4 are needed")


def mixed_agreements() -> Outcome:
    """Fill up a quorum with signatures over other lists."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    puppet.through_upload()
    names = cohort.names
    signed = puppet.survey(names[:3], names[:4], names[4:]) | puppet.survey(names[3:4], names)
    puppet.open(names[:3], names[:4], names[4:], signed.values())
    return judge("agreements to other lists", puppet, names[:3], "other lists")


def split_deliveries() -> Outcome:
    """Show two groups different sets of dealers, then ask for one quorum of both."""
    cohort = Cohort(silos=6)
    puppet = Puppet(cohort)
    names = cohort.names
    deals = puppet.roll(names, puppet.ask().values())
    puppet.deliver(names[1:3], {name: deals[name] for name in names[1:]})
    puppet.deliver((names[0], *names[3:5]), deals)
    signed = puppet.survey(names[1:3], names[1:])
    signed |= puppet.survey(names[3:5], names[1:], names[:1])
    signed |= {names[5]: _as_colluder(cohort, signed[names[1]])}
    puppet.open(names[1:3], names[1:], [], signed.values())
    return judge("equivocated deliveries", puppet, names[1:3], "other lists")


def _as_colluder(cohort: Cohort, agreement: Agreement) -> Agreement:
    """What the last silo signs when it works with the server: anything."""
    name = cohort.names[-1]
    return sign(altered(agreement, index=cohort.roster.index(name)), cohort.keys[name])


def altered_boxes() -> Outcome:
    """Hand silos other holders' parcels, altered boxes, or too few."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    names = cohort.names
    deals = puppet.roll(names, puppet.ask().values())
    foreign = puppet.delivery(names[4], deals).parcels
    for name, change in (
        (names[0], lambda parcels: (altered(parcels[0], box=bytes(82)), *parcels[1:])),
        (names[1], lambda parcels: (foreign[0], *parcels[1:])),
        (names[2], lambda parcels: parcels[1:]),
        (names[3], lambda parcels: (altered(parcels[0], holder=5), *parcels[1:])),
    ):
        delivery = puppet.delivery(name, deals)
        puppet.call(name, altered(delivery, parcels=change(delivery.parcels)))
    return judge("altered share boxes", puppet, names[:4], "parcel")


def crash_and_restart() -> Outcome:
    """After the opening, crash the silos and ask again with other lists."""
    cohort = Cohort(silos=6)
    names = cohort.names
    puppet = Puppet(cohort)
    puppet.through_upload()
    puppet.open(names, names, [], puppet.survey(names, names).values())
    restarted = {name: cohort.silo(name, incarnation="restarted") for name in names}
    again = Puppet(cohort, restarted, puppet.spy)
    again.ask()
    return judge("a crash and fresh secrets", again, names, "a second time")


def snapshots() -> Outcome:
    """Restore the silos from a snapshot and drive them elsewhere, at every step."""
    cohort = Cohort(silos=6)
    names = cohort.names
    puppet = Puppet(cohort)
    deals = puppet.roll(names, puppet.ask().values())
    puppet.deliver(names, deals)
    puppet.open(names, names, [], puppet.survey(names, names).values())
    refused: dict[str, str] = {}
    for step in ("share", "upload", "agree"):
        # The same incarnation has the same secrets, as a restored process image does.
        clone = Puppet(cohort, spy=puppet.spy)
        adverts = clone.ask()
        if step == "share":
            clone.roll(names[:5], [adverts[name] for name in names[:5]])
        else:
            clone.roll(names, adverts.values())
        if step == "upload":
            clone.deliver(names[:5], {name: deals[name] for name in names[:5]})
        if step == "agree":
            clone.deliver(names, deals)
            clone.survey(names[:5], names[:5], names[5:])
        outcome = judge("snapshots", clone, names[:5], "a second time")
        if not outcome.held:
            return outcome
        refused |= clone.refused
    return outcome


def second_attempt() -> Outcome:
    """Let an opened attempt "fail", and open another one without the victim: subtract the sums."""
    cohort = Cohort(silos=6)
    names, opened_by = cohort.names, (*cohort.names[:3], cohort.names[5])
    puppet = Puppet(cohort)
    puppet.through_upload()
    agreements = puppet.survey(names, names)
    puppet.open(opened_by, names, [], agreements.values())  # a quorum; two honest silos not asked
    header = altered(cohort.header, attempt=1)
    cohort.betray(puppet.spy, header)
    again = Puppet(cohort, {name: cohort.silo(name, header=header) for name in names}, puppet.spy)
    deals = again.roll(names, again.ask(header=header).values())
    again.deliver(names, deals)
    rest = names[1:]
    agreements = again.survey(rest, rest, names[:1])
    again.open(rest, rest, names[:1], agreements.values())
    return judge("a second sum of one round", again, names[1:3], "a second time")


def second_vector() -> Outcome:
    """Have a silo train again and open its new vector with the same others': subtract the sums."""
    cohort = Cohort(silos=6)
    names = cohort.names
    puppet = Puppet(cohort)
    puppet.through_upload()
    puppet.open(names, names, [], puppet.survey(names, names).values())
    for name in cohort.honest:
        cohort.vectors[name] = -cohort.vectors[name]
    header = altered(cohort.header, attempt=1)
    cohort.betray(puppet.spy, header)
    again = Puppet(cohort, {name: cohort.silo(name, header=header) for name in names}, puppet.spy)
    again.deliver(names, again.roll(names, again.ask(header=header).values()))
    return judge("another vector in one round", again, cohort.honest, "a second time")


def replays() -> Outcome:
    """Relay keys, dealings and agreements of another study, run, round, attempt or model."""
    changes: list[dict[str, object]] = [
        {"study_digest": sha256(b"another study")},
        {"run_id": bytes(15) + b"\1"},
        {"round": 4},
        {"attempt": 1},
        {"model_digest": sha256(b"another model")},
    ]
    outcome: Outcome | None = None
    for change in changes:
        for step in ("keys", "dealing", "agreement"):
            played = _replay(step, change)
            outcome = both(outcome, played) if outcome else played
    assert outcome
    return outcome


def _replay(step: str, change: dict[str, object]) -> Outcome:
    cohort = Cohort()
    names, peer = cohort.names, cohort.names[1]
    header = altered(cohort.header, **change)
    old = Puppet(cohort, {name: cohort.silo(name, header=header) for name in names})
    old_adverts = old.ask(header=header)
    old_deals = old.roll(names, old_adverts.values())
    old.deliver(names, old_deals)
    old_agreements = old.survey(names, names)
    cohort.journals.update({name: type(cohort.journals[name])() for name in names})
    puppet = Puppet(cohort)
    adverts: dict[str, Advertise] = puppet.ask()
    if step == "keys":
        adverts[peer] = old_adverts[peer]
    deals = puppet.roll(names, adverts.values())
    if step == "dealing":
        deals[peer] = old_deals[peer]
    if step != "keys":
        puppet.deliver(names, deals)
    if step == "agreement":
        agreements = puppet.survey(names, names)
        puppet.open(names, names, [], (agreements | {peer: old_agreements[peer]}).values())
    refusers = [name for name in names if name != peer or step == "agreement"]
    return judge("replayed frames", puppet, refusers, f"{step} for another round")


def out_of_order() -> Outcome:
    """Skip steps, go back, or ask twice."""
    cohort = Cohort(silos=6)
    puppet = Puppet(cohort)
    names = cohort.names
    adverts = puppet.ask()
    puppet.survey(names[:1], names)  # before there is an upload
    puppet.ask(names[1:2])  # a second time
    deals = puppet.roll(names[2:], adverts.values())
    puppet.roll(names[2:3], adverts.values())
    rest: Iterable[str] = names[3:]
    puppet.deliver(rest, deals)
    puppet.open(rest, names[3:], names[:3], [])  # before agreement
    return judge("frames out of order", puppet, names, "")


def repeated_signers() -> Outcome:
    """Count one survivor's agreement twice to reach the quorum."""
    cohort = Cohort()
    puppet = Puppet(cohort)
    puppet.through_upload()
    names = cohort.names
    signed = list(puppet.survey(names[:3], names).values())
    puppet.open(names[:3], names, [], [*signed, signed[0]])
    return judge("repeated signatures", puppet, names[:3], "distinct survivors")
