"""Attacks of a server, with colluding silos, on rounds on a random graph."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Final

from securefedcollm.aggregation.masking.graph.messages import Neighbours, Tally
from securefedcollm.primitives import sha256
from securefedcollm_audits.protocol.cohort import altered
from securefedcollm_audits.protocol.graph_cohort import GraphCohort, GraphPuppet
from securefedcollm_audits.protocol.outcome import Outcome


def _judge(
    attack: str, puppet: GraphPuppet, refusers: Iterable[str], reason: str, least: int = 2
) -> Outcome:
    """The spy learnt nothing, and each of ``refusers`` refused in words containing ``reason``."""
    learnt = tuple(puppet.spy.leaks(least))
    words = [puppet.refused.get(name, "") for name in refusers]
    refused = bool(words) and all(reason in why for why in words)
    defence = next(filter(None, words), "") or "nobody refused"
    return Outcome(attack, learnt, defence, held=refused and not learnt)


def _targeted(label: str) -> tuple[GraphPuppet, str, list[str], list[str]]:
    """A cohort after its uploads, the victim, its neighbours, and the rest of the silos.

    The server hides from the victim who drew it. So the victim masks with its own draws alone.
    """
    cohort = GraphCohort(
        silos=32, neighbours=7, shares=4, minimum=22, colluders=2, values=3, label=label
    )
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names)
    puppet.deal({name: puppet.neighbours(name) for name in names})
    victim = names[0]
    posts = {name: puppet.post(name, names) for name in names}
    posts[victim] = puppet.post(victim, names, hidden=names)
    puppet.deliver(posts)
    near = [puppet.name(index) for index in puppet.drawn[1]]
    rest = [name for name in names if name != victim and name not in near]
    return puppet, victim, near, rest


def graph_targeted_neighbourhood() -> Outcome:
    """Call all neighbours of one silo lost, for everybody: their masks open, and it is alone."""
    puppet, victim, _near, rest = _targeted("targeted")
    puppet.survey([victim, *rest], [victim, *rest])
    return _judge("one silo's neighbours lost", puppet, [victim], "of its 7 neighbours")


def graph_split_survivors() -> Outcome:
    """Show the victim's neighbours that all survive, and everybody else that these are lost.

    The neighbours then open the victim's seed, and the rest the neighbours' masks.
    """
    puppet, victim, near, rest = _targeted("split")
    names = puppet.cohort.names
    alive = sorted([victim, *rest])
    for group, survivors in ((near, names), (rest, alive)):
        signed = puppet.survey(group, survivors)
        lists = next(iter(signed.values())).lists
        # Those asked have signed; for the others the server makes signatures up.
        everyone = {name: bytes(64) for name in survivors}
        everyone |= {name: agreement.signature for name, agreement in signed.items()}
        puppet.open(signed, survivors, everyone, lists)
    return _judge("two lists of survivors", puppet, near, "agreement", least=20)


def graph_few_agreements() -> Outcome:
    """Count fewer agreements than the threshold, all of them genuine."""
    cohort = GraphCohort()
    puppet = GraphPuppet(cohort)
    puppet.through_upload()
    names = cohort.names
    signed = puppet.survey(names[:6], names)
    lists = next(iter(signed.values())).lists
    puppet.open(signed, names, {n: one.signature for n, one in signed.items()}, lists)
    return _judge("too few agreements", puppet, names[:6], "6 agreements; 7 are needed")


def graph_other_survivors() -> Outcome:
    """Show signatures of a threshold of silos over another list."""
    cohort = GraphCohort()
    puppet = GraphPuppet(cohort)
    puppet.through_upload()
    names = cohort.names
    signed = puppet.survey(names[:8], names) | puppet.survey(names[8:11], names[:11])
    lists = signed[names[8]].lists
    puppet.open(names[8:11], names[:11], {n: signed[n].signature for n in names[:11]}, lists)
    return _judge("agreements to another list", puppet, names[8:11], "bad signature")


def graph_eclipse() -> Outcome:
    """Put colluders in the place of those that the victim drew: enough to have both its secrets."""
    cohort = GraphCohort(colluders=5)
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names)
    chosen = Neighbours(tuple(puppet.adverts[j] for j in range(5, 13)))
    for name in names:
        own = chosen if name == names[0] else puppet.neighbours(name)
        puppet.deal({name: own})
    puppet.deliver({name: puppet.post(name, names) for name in names})
    return _judge("neighbours of the server's choice", puppet, names[:1], "than this silo drew")


def graph_grinding() -> Outcome:
    """Restart the victim until it draws enough colluders to have both its secrets."""
    cohort = GraphCohort(silos=20, colluders=6, minimum=16, label="grinding")
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names)
    refused: dict[str, str] = {}
    for number in range(100):
        victim = {names[0]: cohort.member(names[0], incarnation=f"again {number}")}
        again = GraphPuppet(cohort, {**puppet.silos, **victim}, puppet.spy)
        advert = again.ask(names=names[:1])
        again.roll(names[:1], names)
        refused |= again.refused
        if advert and len({*range(15, 21)} & {*again.drawn.get(1, ())}) >= 5:
            puppet.silos, puppet.adverts = again.silos, puppet.adverts | advert
            puppet.drawn |= again.drawn
            break
    puppet.deal({name: puppet.neighbours(name) for name in names})
    puppet.deliver({name: puppet.post(name, names) for name in names})
    puppet.refused = refused | puppet.refused
    return _judge("draws until they suit", puppet, names[:1], "a second time")


def graph_split_rolls() -> Outcome:
    """Show two groups different rolls, and relay letters between them."""
    cohort = GraphCohort(minimum=9)
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names[:6], names[:11])
    puppet.roll(names[6:], names)
    puppet.deal({name: puppet.neighbours(name) for name in names})
    puppet.deliver({name: puppet.post(name, names[:11]) for name in names[:6]})
    return _judge("two rolls", puppet, names[:6], "bad signature")


def graph_split_deliveries() -> Outcome:
    """Show the victim other dealers than the rest, and open its seed as if it were one of them."""
    cohort = GraphCohort()
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names)
    puppet.deal({name: puppet.neighbours(name) for name in names})
    victim, rest = names[0], names[1:]
    lost = next(n for n in reversed(rest) if cohort.roster.index(n) not in puppet.drawn[1])
    puppet.deliver({victim: puppet.post(victim, [n for n in names if n != lost])})
    puppet.deliver({name: puppet.post(name, names) for name in rest})
    signed = puppet.survey(rest, names)
    lists = next(iter(signed.values())).lists
    puppet.open(signed, names, {n: one.signature for n, one in signed.items()}, lists)
    holders = [name for name in rest if 1 in puppet.spy.senders(cohort.roster.index(name))]
    return _judge("two deliveries", puppet, holders, f"{victim}'s upload")


def graph_second_attempt() -> Outcome:
    """Let an agreed attempt "fail", and open another one without the victim: subtract the sums."""
    cohort = GraphCohort()
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.through_upload()
    signed = puppet.survey(names, names)
    lists = next(iter(signed.values())).lists
    puppet.open(names, names, {n: one.signature for n, one in signed.items()}, lists)
    header = altered(cohort.header, attempt=1)
    cohort.tell(puppet.spy, header)
    fresh = {name: cohort.member(name, header=header) for name in names}
    again = GraphPuppet(cohort, fresh, puppet.spy)
    again.ask(header)
    again.roll(names)
    again.deal({name: again.neighbours(name) for name in names})
    again.deliver({name: again.post(name, names) for name in names})
    rest = names[1:]
    if signed := again.survey(rest, rest):
        lists = next(iter(signed.values())).lists
        again.open(rest, rest, {n: one.signature for n, one in signed.items()}, lists)
    return _judge("a second sum of one round", again, names[1:], "a second time")


def graph_rechallenges() -> Outcome:
    """Restore silos from a snapshot, until they challenge what the server can show."""
    cohort = GraphCohort()
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.through_upload()
    puppet.survey(names, names)
    puppet.call(names[0], Tally(puppet.packed(names), sha256(b"made up")))
    clone = GraphPuppet(cohort, spy=puppet.spy)
    clone.through_upload()
    clone.survey(names, names)
    clone.call(names[0], Tally(clone.packed(names), sha256(b"made up again")))
    return _judge("a second challenge", clone, names[:1], "a second time")


def graph_altered_letters() -> Outcome:
    """Hand silos altered letters, or other holders'."""
    cohort = GraphCohort()
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names)
    puppet.deal({name: puppet.neighbours(name) for name in names})
    posts = [puppet.post(name, names) for name in names[:2]]
    first = posts[0].letters[0]
    box = altered(first, parcel=altered(first.parcel, box=bytes(82)))
    letters = (box, *posts[0].letters[1:])
    puppet.deliver({names[0]: altered(posts[0], letters=letters)})
    sender = posts[1].senders[0].index
    foreign = next(x for x in puppet.deals[sender].letters if x.parcel.holder != 2)
    puppet.deliver({names[1]: altered(posts[1], letters=(foreign, *posts[1].letters[1:]))})
    return _judge("altered letters", puppet, names[:2], "letter")


CASES: Final[tuple[Callable[[], Outcome], ...]] = (
    graph_targeted_neighbourhood,
    graph_split_survivors,
    graph_few_agreements,
    graph_other_survivors,
    graph_eclipse,
    graph_grinding,
    graph_split_rolls,
    graph_split_deliveries,
    graph_second_attempt,
    graph_rechallenges,
    graph_altered_letters,
)
