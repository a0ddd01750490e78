"""Attacks of a server, with colluding silos, on rounds on a random graph.

Those in :data:`REFUSALS` break a rule that silos insist on, and are refused. Alone they would teach
the server nothing even if they were not, so no control can show them leak. All others have one in
the tests: without the defence the attack shows the server a silo's vector.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import Final

from securefedcollm.aggregation.masking.graph.messages import (
    Letter,
    Neighbours,
    Peer,
    Post,
    Tally,
)
from securefedcollm.aggregation.masking.graph.silo import GraphSiloRound
from securefedcollm.aggregation.masking.messages import BOX_BYTES
from securefedcollm.errors import LocalProtocolError
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


_Signatures = dict[str, bytes]


def _two_lists(
    show: Callable[[Sequence[str], _Signatures, _Signatures], _Signatures],
) -> tuple[GraphPuppet, list[str]]:
    """Show the victim's neighbours that all survive, and everybody else that these are lost.

    The neighbours would then open the victim's seed, and the rest the neighbours' masks.

    Args:
        show: (survivors, signatures over the neighbours' list, over the others') → those that the
            neighbours are shown.

    Returns:
        The server, and the neighbours.
    """
    puppet, victim, near, rest = _targeted("split")
    names = puppet.cohort.names
    lost = puppet.survey(rest, sorted([victim, *rest]))
    mine = puppet.survey(near, names)
    signed = [{n: one.signature for n, one in some.items()} for some in (mine, lost)]
    shown = show(names, *signed)
    puppet.open(near, names, shown, next(iter(mine.values())).lists)
    puppet.open(rest, sorted([victim, *rest]), signed[1], next(iter(lost.values())).lists)
    return puppet, near


def graph_split_survivors() -> Outcome:
    """Show the victim's neighbours another list, with signatures made up where there are none."""
    puppet, near = _two_lists(lambda names, mine, lost: {name: bytes(64) for name in names} | mine)
    return _judge("two lists of survivors", puppet, near, "agreement", least=20)


def graph_few_agreements() -> Outcome:
    """Show them another list with fewer agreements than the threshold, all of them genuine."""
    puppet, near = _two_lists(lambda names, mine, lost: mine)
    return _judge("too few agreements", puppet, near, "7 agreements; 18 are needed", least=20)


def graph_other_survivors() -> Outcome:
    """Show them another list with a threshold of signatures, most of them over the first one."""
    puppet, near = _two_lists(lambda names, mine, lost: lost | mine)
    return _judge("agreements to another list", puppet, near, "bad signature", least=20)


def graph_eclipse() -> Outcome:
    """Put colluders in the place of those that the victim drew: enough to have both its secrets."""
    cohort = GraphCohort(colluders=5)
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names)
    chosen = Neighbours(tuple(Peer.of(puppet.adverts[j]) for j in range(5, 13)))
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
    return _judge("two rolls", puppet, names[:6], "a letter that")


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
    cohort.betray(puppet.spy, header)
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


def graph_two_posts() -> Outcome:
    """Restore the victim's neighbours before their uploads, and show each one letter less.

    The difference of a neighbour's two uploads is its mask with the victim. Neighbours that the
    victim masks with because it drew them *and* they it are called dropouts, whose masks open.
    """
    cohort = GraphCohort(
        silos=32, neighbours=7, shares=4, minimum=22, colluders=2, values=3, label="0"
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
    both = [name for name in near if 1 in puppet.drawn[cohort.roster.index(name)]]
    survivors = [name for name in names if name not in both]
    signed = puppet.survey(survivors, survivors)
    lists = next(iter(signed.values())).lists
    puppet.open(survivors, survivors, {n: one.signature for n, one in signed.items()}, lists)
    clones = [name for name in near if name not in both and name in names[:30]]
    again = GraphPuppet(cohort, spy=puppet.spy)
    again.ask()
    again.roll(clones, names)
    again.deal({name: puppet.neighbours(name) for name in clones})
    again.deliver({name: puppet.post(name, names, hidden=[victim]) for name in clones})
    return _judge("one letter less", again, clones, "a second time", least=20)


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
    posts = [puppet.post(name, names) for name in names[:3]]
    first, second, third = (post.letters[0] for post in posts)
    spoilt = [
        altered(first, box=first.box[::-1]),
        altered(second, commitments=bytes(32)),
        first if third is not first else second,  # another holder's
    ]
    for name, post, letter in zip(names, posts, spoilt, strict=False):
        puppet.deliver({name: altered(post, letters=(letter, *post.letters[1:]))})
    return _judge("altered letters", puppet, names[:3], "a letter that")


def graph_crowd() -> Outcome:
    """Direct more silos at one than can have drawn it, so that it masks with thousands."""
    cohort = GraphCohort(silos=120, neighbours=16, shares=9, minimum=100, values=3, label="crowd")
    puppet, names = GraphPuppet(cohort), cohort.names
    puppet.ask()
    puppet.roll(names[:1], names)
    puppet.deal({names[0]: puppet.neighbours(names[0])})
    senders = tuple(Peer.of(puppet.adverts[index]) for index in range(2, 121))
    letters = (Letter(bytes(BOX_BYTES), bytes(32)),) * len(senders)
    puppet.call(names[0], Post(puppet.packed(names), senders, letters))
    return _judge("more neighbours than drew", puppet, names[:1], "draw one silo")


def graph_weak_sizes(side: type[GraphSiloRound] = GraphSiloRound) -> Outcome:
    """Have silos join a study with so few shares that the colluders among the neighbours suffice.

    Args:
        side: the silos' class; the tests play it with one that looks at no sizes.
    """
    attack = "sizes of the server's choice"
    cohort = GraphCohort(colluders=5, minimum=10, neighbours=9, label="weak sizes", side=side)
    names = cohort.names
    try:
        puppet = GraphPuppet(cohort)
    except LocalProtocolError as error:
        return Outcome(attack, (), error.message, held="too few for 12 silos" in error.message)
    puppet.through_upload()
    return _judge(attack, puppet, names, "too few")


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
    graph_two_posts,
    graph_rechallenges,
    graph_altered_letters,
    graph_crowd,
    graph_weak_sizes,
)

REFUSALS: Final[tuple[Callable[[], Outcome], ...]] = (
    graph_targeted_neighbourhood,
    graph_split_rolls,
    graph_split_deliveries,
    graph_rechallenges,
    graph_altered_letters,
    graph_crowd,
)
"""Of these, the attacks without a control."""
