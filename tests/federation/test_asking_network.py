"""Members that ask each other through the server: found, counted, relayed, killed, restarted."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path

import msgspec
import numpy as np
import pytest

import securefedcollm as sfc
from securefedcollm.errors import (
    ConfigError,
    EvidenceError,
    LocalProtocolError,
    RemoteProtocolError,
    TransportError,
)
from securefedcollm.evidence.entries import Asked, Counted, Heard, Refused, Served
from securefedcollm.federation import messages, roles
from securefedcollm.federation.engines.door import Door, knock
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.questions import letters as post
from securefedcollm.federation.questions.counter import (
    ask_process,
    open_for_questions,
)
from securefedcollm.federation.questions.inquiry import Fetching
from securefedcollm.federation.questions.quota import SUFFIX
from securefedcollm.federation.status import told
from securefedcollm.federation.workload import silent
from securefedcollm.retrieval import Asker
from tests.support.arithmetic import ArithmeticServer, ArithmeticSilo
from tests.support.asking import TEXTS
from tests.support.network import SILOS, Network, Signed, kinds, log_of, shape, verified


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> Signed:
    return Signed(tmp_path_factory.mktemp("signed"), questions=40)


@pytest.fixture
def network(signed: Signed, tmp_path: Path) -> Iterator[Network]:
    shutil.copytree(signed.homes["server"].parent, tmp_path / "homes")
    homes = {name: tmp_path / "homes" / path.name for name, path in signed.homes.items()}
    fresh = signed.members.afresh(tmp_path / "shelves")
    made = Network(signed, homes, fresh.indexes)
    yield made
    made.close()


def test_a_silo_and_the_server_ask_over_the_network(network, tmp_path):
    found = network.ask("silo-1", TEXTS["silo-3"][2])
    assert (found.hits[0].silo, found.hits[0].passage.text) == ("silo-3", TEXTS["silo-3"][2])
    assert found.answered == ["silo-2", "silo-3"]
    assert (found.failed, found.suspect) == ({}, {})
    found = network.ask("server", TEXTS["silo-1"][0])
    assert found.hits[0].passage.text == TEXTS["silo-1"][0]
    assert found.answered == list(SILOS)
    assert kinds(network, "silo-1") == [Asked, Heard, Counted, Served]
    assert kinds(network, "server") == [Asked, Heard]
    verified(network, tmp_path)


@pytest.mark.soak
def test_the_same_members_ask_train_and_ask_again(network, tmp_path):
    """One run: its evidence begins with a question, and the training goes on with it."""
    network.ask("silo-1", "w1 w2")
    network.ask("server", "w1 w2")

    def party(name, progress):
        return roles.silo_session(
            network.members[name], ArithmeticSilo(name), progress=progress, threads=1
        )

    with EmbeddedEngine(SILOS, party, workers=0, progress=silent) as engine:
        record = roles.coordinate(network.members["server"], engine, ArithmeticServer())
    assert record["finished"]
    for name in (*SILOS, "server"):
        network.restart(name)
    assert network.ask("silo-1", "w1 w2").answered == ["silo-2", "silo-3"]
    assert network.ask("server", "w1 w2").answered == list(SILOS)
    verified(network, tmp_path)


def test_two_members_ask_at_once(network, tmp_path):
    asked = {name: network.hand_in(name, TEXTS["silo-2"][0]) for name in ("silo-1", "silo-3")}
    for name, waiting in asked.items():
        assert set(network.turns(waiting).fetched.fetches) == set(SILOS) - {name}
    verified(network, tmp_path)


def view(network: Network, words: str) -> list[object]:
    """What the server, and each silo, sees of a question: all that crosses, in order."""
    network.wire.seen.clear()
    network.ask("silo-1", words)
    return [(silo, way, shape(frame)) for silo, way, frame in network.wire.seen]


def test_server_and_silos_see_the_same_of_two_questions(network):
    useful = view(network, TEXTS["silo-2"][0])
    crossed = [kind for *_, (_, _, inner) in useful for _, kind, *_ in inner]
    assert sorted(set(crossed)) == ["blocks", "question", "scores", "selection"]
    assert len(crossed) == 16  # two silos, four frames, each into the server and out of it
    assert view(network, "w99 w98 w97") == useful


class GoodMatches(Fetching):
    """As many blocks as there are passages of use: no fixed k."""

    def _best(self, scores):
        first, *others = super()._best(scores)
        return (first, *(document for document in others if scores[document] > 0.1))


class Unpadded(Asker):
    """No row for what is not wanted."""

    def _encrypt(self, kind, product, vectors):
        used = vectors[vectors.any(axis=1)]
        return super()._encrypt(kind, msgspec.structs.replace(product, vectors=len(used)), used)


class UsefulSilos(Fetching):
    """Blocks are fetched only where a passage scored well."""

    def steps(self, query):
        going = super().steps(query)
        came = yield next(going)
        selections = going.send(came)
        served = yield {silo: f for silo, f in selections.items() if silo in self.useful}
        try:
            going.send(served)
        except StopIteration as end:
            return end.value

    def _each(self, given, take):
        taken = super()._each(given, take)
        if all(isinstance(found, np.ndarray) for found in taken.values()):
            self.useful = {silo for silo, scores in taken.items() if scores.max() > 0.9}
        return taken


PORT = "securefedcollm.federation.questions.stock.Fetching"
ASKER = "securefedcollm.federation.questions.inquiry.Asker"


@pytest.mark.parametrize(
    "weak", [{PORT: GoodMatches, ASKER: Unpadded}, {PORT: UsefulSilos}], ids=["k", "silos"]
)
def test_without_a_fixed_k_or_padding_the_view_tells_questions_apart(network, monkeypatch, weak):
    """Positive control of the test before."""
    for place, kind in weak.items():
        monkeypatch.setattr(place, kind)
    assert view(network, TEXTS["silo-2"][0]) != view(network, "w99 w98 w97")


def test_a_silo_that_is_down_costs_itself_alone(network, tmp_path):
    network.kill("silo-2")
    found = network.ask("silo-1", "w1 w2")
    assert found.answered == ["silo-3"]
    assert found.failed == {"silo-2": "is not connected to the server"}
    network.start("silo-2")
    assert network.ask("silo-1", "w1 w2").answered == ["silo-3"]  # it is not called yet
    network.now += 6
    assert network.ask("silo-1", "w1 w2").answered == ["silo-2", "silo-3"]
    verified(network, tmp_path)


@pytest.mark.parametrize("victim", ["silo-1", "silo-2", "server"])
def test_whoever_is_killed_in_any_step_nothing_is_answered_twice(network, tmp_path, victim):
    """silo-1 asks, silo-2 answers, the server carries; one of them begins anew after each turn."""
    for turn in range(1, 6):
        waiting = network.hand_in("silo-1", "w9 w10 w11")
        for _ in range(turn):
            network.relay.turn()
        network.restart(victim)
        for _ in range(4 if victim != "silo-1" else 0):
            network.relay.turn()
            network.now += 70  # the asker's patience ends
        assert waiting.done() or victim == "silo-1"
    assert network.ask("silo-1", "w9 w10 w11").answered == ["silo-2", "silo-3"]
    spent = network.ports["silo-2"]._matter.stock.quota.spent("silo-1")
    counted = [e.what.number for e in log_of(network, "silo-2") if isinstance(e.what, Counted)]
    asked = [e for e in log_of(network, "silo-1") if isinstance(e.what, Asked)]
    assert len(set(counted)) == len(counted) <= spent <= len(asked) == 6
    assert spent >= 5 if victim != "server" else spent >= 4
    verified(network, tmp_path)


def test_what_the_carrier_repeats_is_not_answered_again(network, tmp_path):
    """Adversary: the server, which replays every call to silo-2, also after silo-2's restart."""
    recorded = []

    def keep(silo, way, frame):
        if (silo, way) == ("silo-2", "in"):
            recorded.append(frame)
        return frame

    network.wire.meddle = keep
    network.ask("silo-1", "w1 w2")
    before = kinds(network, "silo-2")
    for round_ in range(2):
        for frame in recorded:
            reply = post.decode_carried(network.ports["silo-2"].step(frame), "silo-2")
            assert {letter.kind for letter in reply.letters} <= {"declined"}
        if not round_:
            network.restart("silo-2")
    assert before == [Counted, Served]
    assert kinds(network, "silo-2") == [Counted, Served, Refused]
    assert network.ports["silo-2"]._matter.stock.quota.spent("silo-1") == 1
    verified(network, tmp_path)


def meddled(network, change):
    """The server changes every letter with a frame on its way to a member."""

    def at(silo, way, frame):
        if way == "out":
            return frame
        carry = post.decode_carry(frame)
        return post.encode(msgspec.structs.replace(carry, letters=change(silo, carry.letters)))

    network.wire.meddle = at


def flipped(silo, letters):
    made = []
    for letter in letters:
        content = bytearray(letter.content)
        content[len(content) // 2] ^= 1
        made.append(msgspec.structs.replace(letter, content=bytes(content)))
    return made


def as_another(silo, letters):
    """silo-2 is told that silo-3 asks; silo-1, that the answer is silo-3's."""
    other = {"silo-1": "silo-3", "silo-2": "silo-3"}
    return [
        msgspec.structs.replace(letter, who=other.get(letter.who, letter.who)) for letter in letters
    ]


def swapped(silo, letters):
    """Two silos' answers exchanged on the way to the asker."""
    if len(letters) != 2:
        return letters
    one, two = letters
    return [
        msgspec.structs.replace(one, content=two.content),
        msgspec.structs.replace(two, content=one.content),
    ]


@pytest.mark.parametrize("change", [flipped, as_another, swapped])
def test_what_the_carrier_alters_or_exchanges_is_refused(network, tmp_path, change):
    meddled(network, change)
    waiting = network.hand_in("silo-1", "w1 w2")
    for _ in range(6):
        network.relay.turn()
        network.now += 40
    found = waiting.result(0).fetched
    assert found.fetches == {}
    assert set(found.failed) == {"silo-2", "silo-3"}
    if change is not swapped:  # nothing was counted for what the asker did not sign
        quotas = [network.ports[silo]._matter.stock.quota for silo in ("silo-2", "silo-3")]
        assert [quota.spent("silo-1") for quota in quotas] == [0, 0]
    network.wire.meddle = lambda silo, way, frame: frame
    assert network.ask("silo-1", "w1 w2").answered == ["silo-2", "silo-3"]
    verified(network, tmp_path)


def test_a_second_run_of_the_study_is_answered_nothing(network):
    """Adversary: a server that shows a silo another run, whose evidence would never meet ours."""
    network.ask("silo-1", "w1 w2")
    port = network.ports["silo-2"]
    assert post.decode_carried(port.step(post.encode(post.Carry(bytes(16), []))), "x").letters == []
    network.restart("silo-2")
    port = network.ports["silo-2"]
    port.step(post.encode(post.Carry(bytes(16), [])))
    assert port._log is None
    assert network.ask("silo-1", "w1 w2").answered == ["silo-2", "silo-3"]


def test_the_limit_holds_and_the_asker_is_told(network):
    network.most = 1  # agreed to at the silos
    for silo in ("silo-2", "silo-3"):
        network.restart(silo)
    assert network.ask("silo-1", "w1 w2").failed == {}
    refused = network.ask("silo-1", "w1 w2")
    assert refused.answered == []
    assert refused.failed == dict.fromkeys(["silo-2", "silo-3"], post.REASONS[b"spent"])


def test_a_silo_agrees_to_fewer_questions_but_not_to_more(network):
    member, index = network.members["silo-2"], network.shelves["silo-2"]
    network.ask("silo-1", "w1 w2")
    own = roles.open_shelf(member, index, 1)
    assert (own.terms.questions, own.terms.together, own.terms.pooled) == (1, 2, 2)
    assert (own.terms.telling, own.terms.reads_all) == (6, False)
    assert own.terms.spent == {"server": 0, "silo-1": 1, "silo-3": 0}
    assert own.terms.askers == ["server", "silo-1", "silo-3"]
    assert (own.terms.passages, own.terms.documents, own.terms.fetched) == (2, 4, 2)
    own.close()
    with pytest.raises(
        ConfigError, match=r"--questions: 41 is above the 40 questions of the study"
    ):
        roles.open_shelf(member, index, 41)


def test_a_member_without_a_shelf_asks_and_says_that_it_has_none(signed, network):
    network.kill("silo-2")
    del network.shelves["silo-2"]
    network.start("silo-2")
    assert network.ask("silo-2", "w1 w2").answered == ["silo-1", "silo-3"]
    assert network.ask("silo-1", "w1 w2").failed == {"silo-2": post.REASONS[b"none"]}


def test_a_count_that_was_put_back_ends_the_silos_process(network):
    network.ask("silo-1", "w1 w2")
    network.kill("silo-2")
    for file in network.shelves["silo-2"].parent.glob(f"silo-2.index{SUFFIX}*"):
        file.unlink()
    network.start("silo-2")
    with pytest.raises(EvidenceError, match="counts 0 questions of silo-1, and the evidence log 1"):
        network.relay.turn()


@pytest.mark.parametrize(
    "frame", [b"", b"\xc1", post.encode(["carry", bytes(15), []]), b"\x91" * 2000]
)
def test_a_member_answers_nothing_to_what_is_no_call(network, frame):
    reply = network.ports["silo-2"].step(frame)
    assert post.decode_carried(reply, "silo-2").letters == []
    assert network.ports["silo-2"]._log is None


def test_who_runs_the_other_command_is_told_which(network, caplog):
    """`client` at a silo that `shelf relay` calls, and `shelf serve` at one that `server` calls."""
    trains = roles.silo_session(
        network.members["silo-2"], ArithmeticSilo("silo-2"), progress=silent, threads=1
    )
    reply = trains.step(post.encode(post.Carry(network.relay.run, [])))
    with pytest.raises(RemoteProtocolError, match=r"silo-2: runs `securefedcollm client`") as told:
        post.decode_carried(reply, "silo-2")
    assert "shelf serve" in told.value.hint
    refused = messages.decode_reply(reply, "silo-2")
    assert "runs `securefedcollm shelf relay`" in refused.message
    begin = messages.encode(messages.EndRun(b"run"))
    for _ in range(3):
        reply = network.ports["silo-3"].step(begin)
    with pytest.raises(RemoteProtocolError, match="silo-3: runs `securefedcollm shelf serve`"):
        messages.decode_reply(reply, "silo-3")
    (line,) = [each.getMessage() for each in caplog.records if "silo-3" in each.getMessage()]
    assert "server: runs `securefedcollm server`, a training" in line


def test_nothing_of_a_question_is_in_a_repr(network):
    waiting = network.hand_in("silo-1", TEXTS["silo-3"][2])
    handed = network.counters["silo-1"]._waiting.queue[0]
    network.relay.turn()
    shown = [repr(handed), repr(network.ports["silo-1"]._errand)]
    result = network.turns(waiting)
    shown += [repr(each) for each in (result, result.fetched, *result.fetched.fetches.values())]
    words = {word for texts in TEXTS.values() for text in texts for word in text.split()}
    for text in shown:
        assert "array" not in text
        assert words.isdisjoint(text.replace("'", " ").split())
    assert TEXTS["silo-3"][2] in str(result.fetched.fetches["silo-3"].passages)  # or it shows none


def test_a_hundred_bad_questions_are_one_line_in_the_log(network, caplog):
    letter = post.Letter("silo-2", bytes(post.THREAD_BYTES), "question", b"x")
    network.wire.meddle = lambda silo, way, frame: (
        post.encode(post.Carried([letter])) if (silo, way) == ("silo-1", "out") else frame
    )
    for _ in range(100):
        network.relay.turn()
    assert len(caplog.records) == 1
    line = told(log_of(network, "silo-2")[-1], network.signed.study)
    assert line == (
        "REFUSED a request of the server, or a question that it carried: RemoteProtocolError"
    )


def flood(network, *letters):
    """What silo-1 gets through to silo-2 by these letters."""
    network.wire.meddle = lambda silo, way, frame: (
        post.encode(post.Carried(list(letters))) if (silo, way) == ("silo-1", "out") else frame
    )
    network.relay.turn()
    network.wire.meddle = lambda silo, way, frame: frame
    network.now += 300  # who sends what makes no sense is left alone for a while
    return list(network.relay._mail.get("silo-2", {}).values())


def test_the_relay_passes_nothing_on_that_makes_no_sense(network):
    """Adversary: a member that has others compute, or fills the server's memory."""
    at = bytes(post.THREAD_BYTES)
    longest = network.relay.sizes.longest["question"]
    fine = post.Letter("silo-2", at, "question", b"x")
    assert [letter.who for letter in flood(network, fine, fine)] == ["silo-1"]
    for wrong in (
        post.Letter("silo-2", at, "question", bytes(longest + 1)),
        post.Letter("silo-1", at, "question", b"x"),
        post.Letter("nobody", at, "question", b"x"),
        post.Letter("server", at, "question", b"x"),
        post.Letter("silo-2", at, "declined", b"x" * 100),
    ):
        assert flood(network, wrong) == []
    assert set(network.relay._mail) == set()
    for _ in range(6):
        network.relay.turn()
    assert network.relay._rests == {}
    network.wire.meddle = lambda silo, way, frame: b"junk" if way == "out" else frame
    network.relay.turn()
    assert network.relay._rests["silo-1"].pause == 30.0
    network.wire.meddle = lambda silo, way, frame: frame
    network.now += 16
    network.relay.turn()
    assert network.relay._rests["silo-1"].pause == 15.0  # one good reply only halves it
    network.relay.turn()
    assert network.relay._rests == {}


def test_a_question_whose_asker_has_gone_does_not_leave(signed, network):
    """It would count. One ``ask`` was interrupted while the server was away."""
    run = network.members["silo-1"].run
    with Door(network.counters["silo-1"].visit) as door:
        open_for_questions(run, door.path)
        with knock(str(door.path)) as wire:
            wire.send(["ask", signed.space.embed(["w1"])[0].astype("<f8").tobytes(), 60.0])
        with knock(str(door.path)) as wire:  # what is no question
            wire.send(["ask", b"1234567", 60.0])
            with pytest.raises(EOFError):
                wire.receive()
        waiting = network.counters["silo-1"]._waiting.queue[0]
        assert wait_for(lambda: waiting.result.cancelled())
    network.relay.turn()
    assert kinds(network, "silo-1") == []


def wait_for(happened) -> bool:
    deadline = time.monotonic() + 5
    while not happened() and time.monotonic() < deadline:
        time.sleep(0.02)
    return happened()


def test_an_embedding_of_another_length_is_refused_and_nothing_leaves(network):
    waiting = network.counters["silo-1"].hand_in(np.ones(5))
    with pytest.raises(LocalProtocolError, match="an embedding of 5 numbers, not 6"):
        network.turns(waiting)
    assert network.ask("silo-1", "w1 w2").answered == ["silo-2", "silo-3"]


def test_ask_on_the_members_machine_meets_its_process(signed, network, tmp_path):
    """``sfc.ask`` in one process, the member's port behind a door in another thread."""
    home, stop = network.homes["silo-1"], threading.Event()
    run = network.members["silo-1"].run
    with pytest.raises(ConfigError, match="no process of this member is there to ask"):
        roles.ask_from(signed.study, home, "w1", signed.space)
    with Door(network.counters["silo-1"].visit) as door:
        open_for_questions(run, door.path)
        asked = partial(
            sfc.ask, TEXTS["silo-3"][2], signed.file, home=home, data=signed.members.data
        )
        with ThreadPoolExecutor(1) as pool:
            answer = pool.submit(asked)
            while not answer.done():
                network.relay.turn()
                stop.wait(0.01)
            found = answer.result()
        assert (found.passages[0].silo, found.passages[0].text) == ("silo-3", TEXTS["silo-3"][2])
        assert (found.spent, found.limit) == ({"silo-2": 1, "silo-3": 1}, 40)
        assert found.directory == run
        with pytest.raises(TransportError, match="does not carry questions now"):
            ask_process(run, signed.space.embed(["w1"])[0], 0.1)  # the server is silent
    with pytest.raises(ConfigError, match="no process of this member"):
        ask_process(run, np.zeros(6), 1.0)
    assert sfc.verify(found.bundle()).holds
