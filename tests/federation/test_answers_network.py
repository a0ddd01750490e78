"""Records that vote over the network: every process, the test as the carrier, kills, and lies."""

from __future__ import annotations

import time
from collections import Counter as Tally
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol.poll_cohort import shown

from securefedcollm.errors import ConfigError, ProtocolError
from securefedcollm.evidence.entries import Entry, Polled, Refused, Tallied, Voted, Voting
from securefedcollm.federation.engines.door import Door
from securefedcollm.federation.questions import answering
from securefedcollm.federation.questions import letters as post
from securefedcollm.federation.questions.counter import open_for_questions
from securefedcollm.federation.questions.port import GRACE, LATE_GRACE
from securefedcollm.federation.status import told
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.ask_records import ask_records_from
from tests.support.network import kinds, log_of, verified
from tests.support.polling import CHOICES, QUESTION
from tests.support.vote_network import SILOS, SignedVoters, VoteNetwork, begun, called, votes

SLOT = 0.01


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> SignedVoters:
    return SignedVoters(tmp_path_factory.mktemp("signed"), questions=6)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "SLOT", SLOT)


@pytest.fixture
def network(signed: SignedVoters, tmp_path: Path) -> Iterator[VoteNetwork]:
    made = begun(signed, tmp_path)
    yield made
    made.close()


def charges(network: VoteNetwork, name: str) -> dict[str, str]:
    """The silo's charges for answers: which poll, and in what state."""
    (book,) = network.homes[name].glob("ledger.answers-*.sqlite")
    with Ledger(book, name) as ledger:
        return {entry.key.run: entry.state for entry in ledger.entries()}


def test_the_server_and_a_silo_ask_records(network, tmp_path):
    opinion = network.poll()
    assert votes(opinion) == [2, 1, 0]
    assert (opinion.survivors, opinion.failed) == (SILOS, {})
    assert votes(network.poll("silo-1", "w30 w31 w32")) == [0, 1, 0]
    assert kinds(network, "server") == [Polled, Tallied]
    assert kinds(network, "silo-1") == [Voting, Voted, Polled, Voting, Voted, Tallied]
    assert kinds(network, "silo-2") == [Voting, Voted] * 2
    assert [told(entry, network.signed.study) for entry in log_of(network, "silo-1")[1:]] == [
        "a question of server: charged, votes about to leave",
        "agreed to a sum of the votes of 4 silos",
        "a question of this member to the silos' records is about to leave",
        "a question of silo-1: charged, votes about to leave",
        "agreed to a sum of the votes of 4 silos",
        "the votes of 4 silos were opened",
    ]
    verified(network, tmp_path)


def shape(way: str, frame: bytes) -> list[tuple[str, str, int]]:
    """What a carrier can tell of a call without a key."""
    letters = (post.decode_carry(frame) if way == "in" else post.decode_carried(frame, "x")).letters
    return [(letter.who, letter.kind, len(letter.content)) for letter in letters]


def test_the_server_sees_the_same_whatever_was_found(network):
    """Frames, and what silos write down, in three cases: records that vote, none, all spent."""
    network.poll(words="w90 w91")
    seen = {}
    for case, words in (("votes", QUESTION), ("nothing", "w90 w91 w92"), ("spent", QUESTION)):
        if case == "spent":
            for _ in range(5):
                network.poll()
        network.wire.seen.clear()
        before = len(log_of(network, "silo-1"))
        opinion = network.poll(words=words.ljust(len("w90 w91 w92")))
        crossed = [(silo, way, shape(way, frame)) for silo, way, frame in network.wire.seen]
        entries = shown(log_of(network, "silo-1")[before:])
        seen[case] = (votes(opinion), crossed, entries)
    assert [seen[case][0] for case in ("votes", "nothing", "spent")] == [
        [2, 1, 0],
        [0] * 3,
        [0] * 3,
    ]
    assert seen["votes"][1:] == seen["nothing"][1:] == seen["spent"][1:]


@pytest.mark.parametrize(
    "turns", [(4, 8, 11), pytest.param(range(1, 14), marks=pytest.mark.soak)], ids=["some", "all"]
)
@pytest.mark.parametrize("victim", ["silo-1", "silo-2", "server"])
def test_whoever_is_killed_in_any_step_pays_nothing_twice(network, tmp_path, victim, turns):
    """silo-1 asks and votes, silo-2 votes, the server carries; one begins anew after each turn."""
    asked = 0
    for turn in turns:
        waiting = network.hand_in("silo-1", QUESTION)
        for _ in range(turn):
            network.relay.turn()
        network.restart(victim)
        for _ in range(10 if victim != "silo-1" else 0):
            network.relay.turn()
            network.now += 70  # patience ends
        asked += 1
        assert waiting.done() or victim == "silo-1"
    network.now += 400
    network.relay.turn()  # silos drop what nobody goes on with
    assert network.poll("silo-1", "w90 w91").survivors == SILOS
    for silo in SILOS:
        left = [entry.what.header for entry in log_of(network, silo) if _is(entry, Voting)]
        opened = [entry.what.header for entry in log_of(network, silo) if _is(entry, Voted)]
        assert len({*left}) == len(left) >= len(opened) == len({*opened})
        states = Tally(charges(network, silo).values())
        # What left is paid; what did not is given back. Nothing stays in between.
        assert states["released"] + states["settled"] == len(left)
        assert states["settled"] == len(opened)
        assert states["reserved"] == 0
    polled = [entry for entry in log_of(network, "silo-1") if _is(entry, Polled)]
    assert len(polled) == asked + 1
    verified(network, tmp_path)


def _is(entry: Entry, kind: type) -> bool:
    return isinstance(entry.what, kind)


def test_what_was_charged_and_never_left_is_given_back_after_a_kill(network):
    """Control: a vote that may have left stays charged."""
    for turns, state in ((4, "void"), (8, "released")):
        before = charges(network, "silo-2")
        network.hand_in("silo-1", QUESTION)
        for _ in range(turns):
            network.relay.turn()
        network.restart("silo-2")
        network.relay.turn()
        (new,) = charges(network, "silo-2").keys() - before.keys()
        assert charges(network, "silo-2")[new] == state
        network.restart("silo-1")


def test_what_the_carrier_repeats_is_not_answered_again(network, tmp_path):
    """Adversary: the server, which replays every call to silo-2, also after silo-2's restart."""
    recorded = []

    def keep(silo, way, frame):
        if (silo, way) == ("silo-2", "in"):
            recorded.append(frame)
        return frame

    network.wire.meddle = keep
    network.poll()
    before, paid = kinds(network, "silo-2"), charges(network, "silo-2")
    for round_ in range(2):
        for frame in recorded:
            reply = post.decode_carried(network.ports["silo-2"].step(frame), "silo-2")
            assert {letter.kind for letter in reply.letters} <= {"declined"}
        if not round_:
            network.restart("silo-2")
    assert before == [Voting, Voted]
    assert {*kinds(network, "silo-2")[2:]} <= {Refused}
    assert charges(network, "silo-2") == paid
    verified(network, tmp_path)


def flipped(silo, letters):
    made = []
    for letter in letters:
        content = bytearray(letter.content)
        content[len(content) // 2] ^= 1
        made.append(msgspec.structs.replace(letter, content=bytes(content)))
    return made


def as_another(silo, letters):
    """A silo is told that another one asks."""
    return [msgspec.structs.replace(letter, who="silo-3") for letter in letters]


def as_itself(silo, letters):
    return [msgspec.structs.replace(letter, who=silo) for letter in letters]


@pytest.mark.parametrize("kind", ["poll", "request"])
@pytest.mark.parametrize("change", [flipped, as_another, as_itself])
def test_what_the_carrier_alters_is_refused_and_costs_nothing(network, tmp_path, change, kind):
    def at(silo, way, frame):
        if way == "out" or silo not in ("silo-1", "silo-2"):
            return frame
        carry = post.decode_carry(frame)
        letters = [
            letter
            for given in carry.letters
            for letter in (change(silo, [given]) if given.kind == kind else [given])
        ]
        return post.encode(msgspec.structs.replace(carry, letters=letters))

    network.wire.meddle = at
    waiting = network.hand_in("server", QUESTION)
    for _ in range(8):
        network.relay.turn()
        network.now += 40
    with pytest.raises(ProtocolError):  # two of four are left, and three are needed
        waiting.result(0)
    network.wire.meddle = lambda silo, way, frame: frame
    network.now += 400
    network.relay.turn()
    assert {*charges(network, "silo-2").values()} <= {"void"}
    assert votes(network.poll()) == [2, 1, 0]
    verified(network, tmp_path)


def test_a_silo_that_is_down_costs_its_own_votes(network, tmp_path):
    network.kill("silo-2")
    opinion = network.poll()
    assert opinion.survivors == ("silo-1", "silo-3", "silo-4")
    assert votes(opinion) == [1, 1, 0]
    network.start("silo-2")
    network.now += 70  # it is called again
    assert network.poll(words="w90 w91").survivors == SILOS
    verified(network, tmp_path)


def test_a_second_run_of_the_study_is_answered_nothing(network):
    network.poll()
    port = network.ports["silo-2"]
    assert post.decode_carried(port.step(post.encode(post.Carry(bytes(16), []))), "x").letters == []


def test_the_time_of_a_call_tells_nothing_of_records_and_is_one_slot_for_all(network, monkeypatch):
    """Adversary: an asker with a clock; and askers who ask at once, so that the silo waits so long
    that the server gives up its call.

    Control: without slots the same calls take other times.
    """
    network.poll(words="w90 w91")
    booth = network.ports["silo-2"]._answering

    def slowly(poll: Any) -> Any:
        network.now += texts  # the asker's own work

        def reading(retrieved: Any, _: Any) -> Any:
            network.now += SLOT / 100 * retrieved.sum()
            return np.zeros(len(poll.choices))

        return reading

    texts = 0.0
    object.__setattr__(booth, "read", slowly)
    took: dict[float | None, list[float]] = {}
    for slot in (SLOT, None):
        monkeypatch.setattr(answering.Answers, "slot", slot)
        for words in (QUESTION, "w90 w91"):
            network.waited.clear()
            began = network.now
            kinds_ = called(network, words, ("server", "silo-1", "silo-3", "server"))
            assert kinds_ == ["ready"] * 3 + ["declined"]
            assert len(network.waited) == (slot is not None)
            took.setdefault(slot, []).append(network.now - began)
    assert took[SLOT] == pytest.approx([SLOT] * 2)
    assert took[None] == pytest.approx([SLOT / 100 * 15, 0.0])
    # Adversary: an asker whose texts fill its slot up to where the records' work would cross its
    # end. The slot begins after them.
    monkeypatch.setattr(answering.Answers, "slot", SLOT)
    texts = SLOT * 0.98 / 3
    monkeypatch.setattr(network.ports["silo-2"].pace, "begin", lambda: paced.append(network.now))
    for words in (QUESTION, "w90 w91"):
        began, paced = network.now, list[float]()
        called(network, words, ("server", "silo-1", "silo-3"))
        assert paced == pytest.approx([began + 3 * texts])  # so do the ticks of other calls
        assert network.now - began == pytest.approx(3 * texts + SLOT)
    # Control: a slot that begins with the call.
    crossed = [-(-(3 * texts + work) // SLOT) for work in (SLOT / 100 * 15, 0.0)]
    assert crossed == [2, 1]


def test_a_slot_of_a_training_is_not_one_of_questions(network):
    """A silo that waits for hours answers nobody, and the server gives up its call."""
    study = network.members["silo-2"].study
    local = msgspec.structs.replace(study.local, reply_slot=86_400.0)
    sizes = answering.answers_sizes(msgspec.structs.replace(study, local=local))
    assert sizes.seconds == 30 + 2 * answering.MOST_SLOT


def test_a_question_for_documents_at_the_door_ends_nothing(network):
    waiting = network.counters["server"].hand_in(np.zeros(6))
    network.relay.turn()
    with pytest.raises(ConfigError, match="this study asks records"):
        waiting.result(0)
    assert votes(network.poll()) == [2, 1, 0]


def test_a_member_without_records_asks_and_says_that_it_has_none(signed, tmp_path):
    network = begun(signed, tmp_path)
    try:
        network.shelves.pop("silo-4")
        network.restart("silo-4")
        opinion = network.poll("silo-4")
        assert opinion.survivors == ("silo-1", "silo-2", "silo-3")
        assert opinion.failed == {"silo-4": "has nothing to answer from here"}
    finally:
        network.close()


def test_a_silo_asks_only_where_the_study_allows_for_a_colluder(tmp_path):
    """It knows its own share of the noise. Its own machine refuses, and so do the silos."""
    signed = SignedVoters(tmp_path / "place", {"silos": {"count": 4, "colluders": 0}}, questions=6)
    network = begun(signed, tmp_path)
    try:
        assert network.poll().survivors == SILOS
        waiting = network.hand_in("silo-1", QUESTION)
        network.relay.turn()
        with pytest.raises(ConfigError, match="the study allows for no colluder"):
            waiting.result(0)
        booth = network.ports["silo-2"]._answering
        assert booth is not None
        assert set(booth.askers) == {"server"}
    finally:
        network.close()


def test_a_slow_silo_does_not_make_askers_wait_its_whole_time(network):
    """Adversary: a silo that lets every call wait to its last second, or answers nothing. Only
    where too few others answer does a question wait as long as a slow machine may take."""
    full = 2 * network.ports["server"]._matter.sizes.seconds

    def question(slow: tuple[str, ...]) -> float:
        def late(silo: str, way: str, frame: bytes) -> bytes:
            carry = post.decode_carry(frame) if way == "in" and silo in slow else None
            return frame if carry is None else post.encode(post.Carry(carry.run, []))

        network.wire.meddle = late
        began, waiting = network.now, network.hand_in("server", "w90 w91")
        while not waiting.done() and network.now < began + 10 * full:
            network.relay.turn()
            network.now += 0.1
        return network.now - began

    quick = question(())
    first, second = question(("silo-4",)), question(("silo-4",))
    assert quick < 3.0
    assert GRACE < first < GRACE + 4 * quick
    assert LATE_GRACE < second < LATE_GRACE + 4 * quick < first
    assert question(()) < 2 * quick
    assert question(("silo-3", "silo-4")) >= full  # control: too few for a sum


def test_ask_on_the_members_machine_meets_its_process(signed, network):
    member, home = network.members["server"], network.homes["server"]
    with pytest.raises(ConfigError, match="over 63 KiB"):
        ask_records_from(home, "w1 " * 21800, CHOICES, signed.study)
    with Door(network.counters["server"].visit) as door, ThreadPoolExecutor(1) as pool:
        open_for_questions(member.run, door.path)
        asked = pool.submit(ask_records_from, home, QUESTION, CHOICES, signed.study)
        deadline = time.monotonic() + 20
        while not asked.done() and time.monotonic() < deadline:
            network.relay.turn()
            time.sleep(0.01)
        vote = asked.result(1)
    assert vote.choice == "w50"
    assert list(vote.counted) == list(SILOS)
    assert vote.directory == member.run
