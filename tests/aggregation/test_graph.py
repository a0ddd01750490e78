"""Masking on a random graph: exact sums under losses, honest blame, bounds, and attacks that work
where a defence is missing."""

from __future__ import annotations

import dataclasses
import itertools
import math
from fractions import Fraction

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol import graph_attacks
from securefedcollm_audits.protocol.cohort import altered, play
from securefedcollm_audits.protocol.graph_cohort import GraphCohort, SmallGraphSilo

from securefedcollm.aggregation import answering
from securefedcollm.aggregation.header import MAX_COHORT, RingParameters, RoundHeader
from securefedcollm.aggregation.masking.graph import bounds as bounds_room
from securefedcollm.aggregation.masking.graph import choice
from securefedcollm.aggregation.masking.graph.bounds import (
    bounds,
    cut,
    derive,
    most_senders,
    shares_for,
)
from securefedcollm.aggregation.masking.graph.coordinator import GraphCoordinatorRound
from securefedcollm.aggregation.masking.graph.messages import (
    Challenge,
    Draw,
    Letters,
    Members,
    Neighbours,
    Peer,
    Post,
    Proof,
    Shares,
    Tally,
)
from securefedcollm.aggregation.masking.graph.silo import GraphSiloRound
from securefedcollm.aggregation.masking.messages import BOX_BYTES, Advertise, Refusal
from securefedcollm.aggregation.messages import UNSIGNED, decode, sign
from securefedcollm.aggregation.steps import GRAPH_TRANSITIONS, Step
from securefedcollm.errors import ConfigError, LocalProtocolError, ProtocolError
from securefedcollm.primitives import AgreementKey, merkle_root, sha256

STEPS = tuple(GRAPH_TRANSITIONS)


def played(cohort, **hooks):
    side = GraphCoordinatorRound(header=cohort.header, roster=cohort.roster)
    silos = {name: cohort.member(name) for name in cohort.names}
    return side, play(silos, side, **hooks)


def losing(*lost):
    """A reply hook: (step, silo) pairs are lost."""
    return lambda step, name, frame: None if (step, name) in lost else frame


# Rounds ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("step", STEPS, ids=lambda step: step.value)
def test_the_sum_is_exact_whatever_is_lost_in_a_step(step: Step) -> None:
    cohort = GraphCohort(label=f"lost {step.value}")
    lost = [(step, cohort.names[2]), (step, cohort.names[7])]
    _, result = played(cohort, reply=losing(*lost))
    gone = {name for _, name in lost} if STEPS.index(step) <= STEPS.index(Step.UPLOAD) else set()
    assert {*result.survivors} == {*cohort.names} - gone
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))
    assert {name for _, name in lost} <= {*result.excluded}


def test_the_sum_is_exact_with_a_loss_at_every_step() -> None:
    cohort = GraphCohort(silos=24, neighbours=12, shares=7, minimum=17, values=7)
    lost = list(zip(STEPS, cohort.names[::3], strict=False))
    _, result = played(cohort, reply=losing(*lost))
    assert len(result.survivors) == 20
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))


@pytest.mark.soak
def test_more_silos_than_a_complete_graph_has_and_two_lost_at_every_step() -> None:
    cohort = GraphCohort(silos=140, neighbours=30, shares=16, minimum=112, colluders=5, values=100)
    lost = [(step, cohort.names[7 * i + j]) for i, step in enumerate(STEPS) for j in range(2)]
    _, result = played(cohort, reply=losing(*lost))
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))


def test_below_the_quorum_nothing_is_opened() -> None:
    cohort = GraphCohort()
    lost = [(Step.UPLOAD, name) for name in cohort.names[:4]]
    with pytest.raises(ProtocolError, match="only 8 silos completed"):
        played(cohort, reply=losing(*lost))


@pytest.mark.parametrize(
    ("step", "lost", "hint"),
    [
        (Step.SHARE, 4, "start another attempt"),
        (Step.AGREE, 6, "go on with the next round: silos that have agreed open no other sum"),
        (Step.UNMASK, 8, "go on with the next round: silos that have agreed open no other sum"),
    ],
    ids=lambda value: getattr(value, "value", None),
)
def test_what_can_still_be_done_depends_on_whether_silos_are_bound(step, lost, hint) -> None:
    cohort = GraphCohort()
    with pytest.raises(ProtocolError) as caught:
        played(cohort, reply=losing(*((step, name) for name in cohort.names[:lost])))
    assert hint in caught.value.hint
    bound = [
        n for n in cohort.names if any(k.startswith(b"open:") for k in cohort.journals[n].entries)
    ]
    assert bool(bound) is (step is not Step.SHARE)


def test_a_silo_without_neighbours_ends_the_attempt_before_anybody_signs() -> None:
    cohort = GraphCohort(minimum=9, neighbours=6, shares=5)
    shown = GraphCoordinatorRound(header=cohort.header, roster=cohort.roster)
    silos = {name: cohort.member(name) for name in cohort.names}
    seen: dict[str, tuple[int, ...]] = {}

    def reply(step, name, frame):
        if step is Step.UPLOAD and cohort.roster.index(name) in shown._drawn[1][:2]:
            return None
        seen[name] = ()
        return frame

    with pytest.raises(ProtocolError, match="neighbours left after step upload"):
        play(silos, shown, reply=reply)
    for name in cohort.names:
        assert not any(key.startswith(b"open:") for key in cohort.journals[name].entries)


# Malicious silos ---------------------------------------------------------------------------------


def resigned(cohort, name, kind, change):
    """A reply hook: silo ``name`` sends a changed message of ``kind``, signed again."""

    def hook(step, sender, frame):
        if sender != name or frame.startswith(b"sfcmupl1"):
            return frame
        try:
            message = decode(kind, frame, name)
        except ProtocolError:
            return frame
        return sign(change(message), cohort.keys[name]).encode()

    return hook


@pytest.mark.parametrize(
    ("kind", "change", "blamed"),
    [
        (Advertise, lambda m: altered(m, mask_public=m.share_public), "in use already"),
        (Advertise, lambda m: altered(m, mask_public=bytes(32)), "small order"),
        (Draw, lambda m: altered(m, roll=bytes(32)), "another roll"),
        (Letters, lambda m: altered(m, dealt=m.dealt[1:]), "does not fit its draw"),
        (Challenge, lambda m: altered(m, tally=bytes(32)), "another tally"),
        (Shares, lambda m: altered(m, shares=(bytes(33), *m.shares[1:])), "wrong share"),
        (Shares, lambda m: altered(m, shares=m.shares[1:]), "other lists"),
    ],
)
def test_a_silo_that_breaks_a_rule_is_named_and_the_sum_goes_on(kind, change, blamed) -> None:
    cohort = GraphCohort(label=f"blame {kind.__name__}")
    name = cohort.names[4]
    _, result = played(cohort, reply=resigned(cohort, name, kind, change))
    assert blamed in result.excluded[name]
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))


@pytest.mark.parametrize(
    "spoil",
    [{"box": bytes(BOX_BYTES)}, {"seed_share_commitment": bytes(32)}],
    ids=lambda spoil: next(iter(spoil)),
)
def test_a_dealer_of_bad_letters_is_named_by_their_holders(spoil) -> None:
    cohort = GraphCohort(minimum=5, neighbours=4, shares=3)
    bad = cohort.names[4]
    hook = resigned(
        cohort,
        bad,
        Letters,
        lambda m: altered(m, dealt=(altered(m.dealt[0], **spoil), *m.dealt[1:])),
    )

    def reply(step, name, frame):
        arrived = hook(step, name, frame)
        if step is Step.UPLOAD and not arrived.startswith(b"sfcmupl1"):
            assert decode(Refusal, arrived, name).accused == cohort.roster.index(bad)
        return arrived

    _, result = played(cohort, reply=reply)
    assert [why for why in result.excluded.values() if f"{bad} dealt it a bad share" in why]
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))


def test_shares_of_another_secret_name_their_dealer() -> None:
    cohort = GraphCohort()
    bad = cohort.names[3]
    change = resigned(cohort, bad, Letters, lambda m: altered(m, seed_commitment=bytes(32)))
    with pytest.raises(ProtocolError, match="shares of another secret"):
        played(cohort, reply=change)


# Malicious server --------------------------------------------------------------------------------


def two_sets(cohort, post):
    """One sender that the silo knows from its neighbours, with other keys, which it signed too."""
    at = next(i for i, peer in enumerate(post.senders) if peer.index in cohort.known)
    peer = post.senders[at]
    keys = [AgreementKey(sha256(bytes([place]))).public for place in (1, 2)]
    entry = Advertise(cohort.header.digest, peer.index, UNSIGNED, *keys)
    other = Peer.of(sign(entry, cohort.keys[cohort.roster.name(peer.index)]))
    return altered(post, senders=(*post.senders[:at], other, *post.senders[at + 1 :]))


@pytest.mark.parametrize(
    ("kind", "change", "refusal"),
    [
        (Members, lambda c, m: altered(m, members=b""), "a roll that is no set"),
        (Post, lambda c, m: altered(m, letters=m.letters[1:]), "one letter of each sender"),
        (Post, lambda c, m: altered(m, senders=m.senders[::-1]), "have not dealt"),
        (Post, two_sets, "two sets of"),
        (Tally, lambda c, m: altered(m, signers=b""), "silos that do not survive"),
        (Proof, lambda c, m: altered(m, signatures=m.signatures[1:]), "another number of"),
        (
            Proof,
            lambda c, m: altered(m, signatures=(bytes(64), *m.signatures[1:])),
            "that it had not counted",
        ),
        (Proof, lambda c, m: altered(m, uploads=m.uploads[1:]), "the upload of every survivor"),
    ],
)
def test_a_silo_refuses_what_breaks_a_rule_and_the_others_go_on(kind, change, refusal) -> None:
    cohort = GraphCohort(silos=14, minimum=9, label=f"server {refusal}")
    cohort.known = set()
    victim = cohort.names[0]

    def request(step, name, frame):
        if name == victim and step is Step.SHARE:
            cohort.known = {peer.index for peer in decode(Neighbours, frame, "server").peers}
        if name != victim:
            return frame
        try:
            message = decode(kind, frame, "server")
        except ProtocolError:
            return frame
        return change(cohort, message).encode()

    _, result = played(cohort, request=request)
    assert refusal in result.excluded[victim]
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))


# Positive controls: the attacks of `audit protocol` work where the defence is missing ------------

ATTACKS = {
    graph_attacks.graph_split_survivors: (GraphSiloRound, "_check_signed_by_many"),
    graph_attacks.graph_other_survivors: (GraphSiloRound, "_check_signed_by_many"),
    graph_attacks.graph_few_agreements: (GraphSiloRound, "_check_many"),
    graph_attacks.graph_second_attempt: (answering, "record_once"),
    graph_attacks.graph_grinding: (answering, "record_once"),
    graph_attacks.graph_two_posts: (answering, "record_once"),
}
"""The attack, and the check without which it shows the server a silo's vector."""


@pytest.mark.parametrize(
    ("attack", "defence"), ATTACKS.items(), ids=lambda x: getattr(x, "__name__", "")
)
def test_the_attack_works_without_the_defence(attack, defence, monkeypatch) -> None:
    drawn = choice.samples
    monkeypatch.setattr(  # of fewer signatures than it takes, all
        choice, "samples", lambda p, g, count: count if count < p.threshold else drawn(p, g, count)
    )
    monkeypatch.setattr(*defence, lambda *_: None)
    outcome = attack()
    assert not outcome.held
    second = attack is graph_attacks.graph_second_attempt
    assert any(("2 sums in one round" if second else "silo-001 alone") in x for x in outcome.learnt)


def test_a_graph_of_the_servers_choice_shows_the_victim(monkeypatch) -> None:
    drawn = choice.neighbours_of
    monkeypatch.setattr(
        choice,
        "neighbours_of",
        lambda secret, roll, members, index, count: (
            tuple(range(5, 13)) if index == 1 else drawn(secret, roll, members, index, count)
        ),
    )
    outcome = graph_attacks.graph_eclipse()
    assert any("silo-001 alone" in leak for leak in outcome.learnt)


def test_sizes_of_the_servers_choice_show_a_silo() -> None:
    assert graph_attacks.graph_weak_sizes().held
    outcome = graph_attacks.graph_weak_sizes(SmallGraphSilo)
    assert not outcome.held
    assert any(" alone" in leak for leak in outcome.learnt)


def test_every_attack_has_a_control_or_says_that_it_has_none() -> None:
    others = {graph_attacks.graph_eclipse, graph_attacks.graph_weak_sizes}
    refused = {*graph_attacks.REFUSALS}
    assert {*graph_attacks.CASES} == {*ATTACKS} | others | refused
    assert not refused & ({*ATTACKS} | others)


def test_silos_answer_only_under_sizes_that_keep_the_bounds() -> None:
    """With the library's own silo: 40 silos, of which two may collude and four may be lost."""
    graph = derive(40, 2, 36)
    cohort = GraphCohort(
        silos=40,
        colluders=2,
        minimum=36,
        neighbours=graph.neighbours,
        shares=graph.shares,
        values=2,
        side=GraphSiloRound,
    )
    _, result = played(cohort, reply=losing(*((Step.UPLOAD, name) for name in cohort.names[:4])))
    assert np.array_equal(result.sum, cohort.plain_sum(result.survivors))
    for sizes in ({"shares": graph.shares - 1, "colluders": 9}, {"neighbours": 8, "shares": 5}):
        weak = dataclasses.replace(cohort, **sizes)
        with pytest.raises(LocalProtocolError, match=r"too few for 40 silos.*2\^") as caught:
            weak.member(weak.names[0])
        assert "derive" in caught.value.hint


# Draws, sets and the tree ------------------------------------------------------------------------


def test_draws_are_uniform_over_all_sets() -> None:
    members = (2, 3, 5, 7, 11)
    counts = dict.fromkeys(itertools.combinations((2, 3, 7, 11), 2), 0)
    for number in range(1200):
        secret = sha256(number.to_bytes(4, "big"))
        counts[choice.neighbours_of(secret, sha256(b"roll"), members, 5, 2)] += 1
    # χ² of 6 cells, 5 degrees of freedom: above 20.5 in one of a thousand
    assert sum((found - 200) ** 2 / 200 for found in counts.values()) < 20.5


def test_sets_have_one_spelling() -> None:
    for silos, members in ((3, (1, 3)), (8, (8,)), (9, (1, 9)), (200, tuple(range(3, 201, 7)))):
        packed = choice.pack_set(members, silos)
        assert len(packed) == -(-silos // 8)
        assert choice.read_set(packed, silos) == members
        assert choice.read_set(packed + b"\0", silos) is None
    assert choice.read_set(b"\x08", 3) is None


@pytest.mark.parametrize("count", [1, 2, 3, 5, 8, 13, 64, 100])
def test_shown_leaves_lead_to_the_merkle_root(count: int) -> None:
    leaves = [sha256(bytes([number])) * 2 for number in range(count)]
    tree = choice.tree(leaves)
    (root,) = tree[-1]
    assert root == merkle_root(leaves)
    rng = np.random.default_rng(count)
    for shown in {1, count // 3, count - 1, count} - {0}:
        places = sorted(rng.choice(count, shown, replace=False).tolist())
        nodes = choice.nodes_for(tree, places)
        assert len(nodes) <= min(shown * math.ceil(math.log2(count or 1)), count - shown)
        mine = {place: leaves[place] for place in places}
        assert choice.root_of(mine, count, nodes) == root
        assert choice.root_of(mine | {places[0]: b"other"}, count, nodes) != root
        assert choice.root_of(mine, count, [*nodes, bytes(32)]) is None
        if nodes:
            assert choice.root_of(mine, count, nodes[:-1]) is None
            assert choice.root_of(mine, count, [*nodes[:-1], bytes(32)]) != root


# Bounds ------------------------------------------------------------------------------------------


def test_hypergeometric_tails_by_counting() -> None:
    population, marked, drawn, least = 9, 4, 5, 3
    hits = [
        sum(one < marked for one in taken) >= least
        for taken in itertools.combinations(range(population), drawn)
    ]
    assert Fraction(*bounds_room._at_least(population, marked, drawn, least)) == Fraction(
        sum(hits), len(hits)
    )


def test_k_and_t_for_a_thousand_silos() -> None:
    assert derive(1000, 50, 950) == choice.Graph(68, 48)
    graph = derive(1000, 100, 900)
    assert graph == choice.Graph(130, 91)
    found = bounds(1000, 100, 900, graph)
    assert found.corrupt <= -60
    assert found.lists <= -60
    assert found.cut <= -60
    assert found.dropped <= -30
    assert found.hidden == 3
    assert bounds(1000, 100, 900, choice.Graph(130, 90)).corrupt > -60
    for k in range(100, 130):  # found by bisection: none of fewer neighbours keeps them
        assert bounds_room._keeping(1000, 100, 900, k) is None


@pytest.mark.soak
def test_ten_thousand_silos() -> None:
    graph = derive(10_000, 1000, 9000)
    assert graph == choice.Graph(170, 119)
    bounds(10_000, 1000, 9000, graph).check()


def test_more_silos_than_the_colluders_draw_nobody_by_chance() -> None:
    parameters = RingParameters.smallest(values=1, bound=1, silos=40, colluders=2)
    parameters = altered(parameters, min_silos=36)
    graph, chance = choice.Graph(8, 5), Fraction(8, 35)
    most = most_senders(parameters, graph) - 2

    def more(than: int) -> Fraction:
        tail = (
            math.comb(39, j) * chance**j * (1 - chance) ** (39 - j) for j in range(than + 1, 40)
        )
        return 40 * sum(tail, Fraction(0))

    assert more(most) <= Fraction(1, 2**60) < more(most - 1)


def test_the_least_number_of_left_out_silos_keeps_the_bound() -> None:
    for n, c, quorum, graph in ((100, 5, 90, choice.Graph(26, 16)), (16, 1, 15, derive(16, 1, 15))):
        found = bounds(n, c, quorum, graph)
        assert found.cut == cut(n, c, quorum, graph, found.hidden) <= -60
        assert cut(n, c, quorum, graph, found.hidden - 1) > -60


def test_a_whole_run_is_a_union_over_attempts_and_sums() -> None:
    found = bounds(1000, 100, 900, derive(1000, 100, 900))
    once = sum(Fraction(2) ** math.floor(x) for x in (found.corrupt, found.lists, found.cut))
    assert 2 ** found.whole_run(64, 100) >= 6400 * once
    assert -48 < found.whole_run(64, 100) < -46
    found.check_run(64, 100)
    assert found.whole_run(64, 1 << 70) == 0
    # Control: what is enough for one attempt is not enough for a server that tries often.
    weak = msgspec.structs.replace(found, corrupt=-40.5)
    weak.check_run(1, 1)
    with pytest.raises(ConfigError, match=r"64 attempts at each of 100 sums.*2\^-27"):
        weak.check_run(64, 100)


def test_fewest_shares_against_counting() -> None:
    for silos, colluders, quorum, k in ((12, 3, 10, 8), (30, 6, 25, 20), (200, 20, 180, 60)):
        t = shares_for(silos, colluders, quorum, k)
        chances = [
            silos * Fraction(*bounds_room._at_least(quorum - 1, colluders, k, 2 * s - k)) <= 2**-60
            and 2 * s > k
            for s in range(k + 1)
        ]
        assert t == max(2, chances.index(True)) if True in chances else t == k


def test_the_bound_on_cuts_is_above_what_happens() -> None:
    """Small enough to try every choice of survivors: the bound must not be below the frequency."""
    n, c, quorum, graph = 9, 1, 8, choice.Graph(4, 3)
    rng = np.random.default_rng(5)
    bound = 2 ** cut(n, c, quorum, graph, 0)
    honest, hits, tries = range(n - c), 0, 400
    for _ in range(tries):
        drawn = [
            {*rng.choice([j for j in range(n) if j != i], graph.neighbours, replace=False).tolist()}
            for i in honest
        ]
        hits += any(
            _is_cut(drawn, {*part}, {*alive} - {*part}, graph.kept)
            for lost in range(n - quorum + 1)
            for alive in itertools.combinations(honest, n - c - lost)
            for size in range(graph.kept + 1, len(alive))
            for part in itertools.combinations(alive, size)
        )
    assert hits / tries <= min(1, bound) + 3 / math.sqrt(tries)


def _is_cut(drawn, part, others, kept) -> bool:
    return all(len(drawn[i] & part) >= kept and not drawn[i] & others for i in part)


def test_signatures_asked_for() -> None:
    parameters = RingParameters.smallest(values=1, bound=1, silos=1000, colluders=100)
    graph = choice.Graph(130, 91)
    assert 540 < choice.samples(parameters, graph, parameters.threshold) <= parameters.threshold
    few = choice.samples(parameters, graph, 810)
    assert few < 20
    # The bound at that number holds, and at one fewer it does not.
    g, t = graph.fooled, parameters.threshold
    for asked, holds in ((few, True), (few - 1, False)):
        fooled = Fraction(math.comb(t - 1, asked), math.comb(810, asked))
        chance = 1000 * math.comb(130, g) * fooled**g
        assert (chance <= Fraction(1, 2**60)) is holds


@pytest.mark.parametrize(("k", "t"), [(4, 2), (4, 5), (3, 1)])
def test_impossible_graphs(k: int, t: int) -> None:
    with pytest.raises(ConfigError, match="neighbours"):
        choice.Graph(k, t)


def test_headers_without_a_fitting_graph_are_refused() -> None:
    cohort = GraphCohort()
    for suite in ("securefedcollm-masking-v1", choice.Graph(9, 6).suite, cohort.graph.suite + "0"):
        cohort.header = altered(cohort.header, suite=suite)
        with pytest.raises((LocalProtocolError, ConfigError), match=r"no graph|50 shares"):
            cohort.member(cohort.names[0])


def test_many_silos_take_a_graph() -> None:
    sizes = {"values": 1, "bound": 1}
    many = RingParameters.smallest(silos=129, **sizes)
    rest = {"study_digest": bytes(32), "run_id": bytes(16), "round": 0, "attempt": 0}
    rest |= {"model_digest": bytes(32), "parameters": many, "roster_root": bytes(32)}
    with pytest.raises(ConfigError, match="129 silos"):
        RoundHeader(**rest)
    assert RoundHeader(**rest, suite=choice.Graph(20, 12).suite).on_graph
    with pytest.raises(ConfigError, match="silos"):
        RingParameters.smallest(silos=MAX_COHORT + 1, **sizes)
