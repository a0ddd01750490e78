"""The server's part in questions: what one member does is not at the cost of another."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import pytest

from securefedcollm.errors import EvidenceError, TransportError
from securefedcollm.federation.engines import Failure
from securefedcollm.federation.questions import letters as post
from securefedcollm.federation.questions import relay as relay_module
from securefedcollm.federation.questions.relay import Pace, Relay
from securefedcollm.retrieval import Terms

TERMS = Terms(documents=40, dimension=16, block_bytes=96, fetched=3)
SIZES = post.of_documents(TERMS)
LIMIT = SIZES.seconds
THREAD = bytes(post.THREAD_BYTES)
QUESTION = post.Letter("clinic", THREAD, "question", b"what?")
SCORES = post.Letter("ann", THREAD, "scores", b"so much")
Reply = Callable[[list[post.Letter]], list[post.Letter] | Failure]


@dataclass
class Members:
    """Members as their calls show them, with a clock that stands still but for what they take."""

    now: float = 0.0
    replies: dict[str, Reply] = field(default_factory=dict)
    called: list[str] = field(default_factory=list)

    def exchange(self, frames: Mapping[str, bytes], timeout: float) -> dict[str, bytes | Failure]:
        ((name, frame),) = frames.items()
        self.called.append(name)
        answer = self.replies.get(name, lambda letters: [])(post.decode_carry(frame).letters)
        return {name: answer if isinstance(answer, Failure) else post.encode(post.Carried(answer))}

    def relay(self) -> Relay:
        silos = ["clinic", "slow"]
        return Relay(self, bytes(16), ["ann", *silos], silos, SIZES, clock=lambda: self.now)


def takes(members: Members, seconds: float, reply: Reply = lambda letters: []) -> Reply:
    """A member that lets its call wait."""

    def late(letters):
        members.now += seconds
        return reply(letters)

    return late


def no(letters: list[post.Letter]) -> Failure:
    return Failure("no reply in time")


def conversation(members: Members) -> list[str]:
    """ann asks the clinic once, which answers; the list fills with the kinds that reach ann."""
    heard: list[str] = []
    asks = [QUESTION]

    def ann(letters):
        heard.extend(letter.kind for letter in letters)
        return [asks.pop()] if asks else []

    members.replies["ann"] = ann
    members.replies["clinic"] = lambda letters: [SCORES] if letters else []
    return heard


class Together(Relay):
    """Calls everybody in turn and waits for each: no threads."""

    def run_until(self, stop):
        while not stop():
            self.turn()


@pytest.mark.parametrize("kind", [Relay, Together])
def test_nobody_waits_for_the_call_of_another(kind):
    """Adversary: a member whose call never ends. The control waits for it with everybody."""
    members, stuck, go_on, over = Members(), threading.Event(), threading.Event(), threading.Event()
    heard = conversation(members)

    def slow(letters):
        stuck.set()
        go_on.wait(20)
        return []

    members.replies["slow"] = slow
    relay = members.relay()
    relay.__class__ = kind
    loop = threading.Thread(target=relay.run_until, args=[over.is_set])
    loop.start()
    try:
        assert stuck.wait(10)
        if kind is Relay:
            while not heard:
                assert loop.is_alive()
                time.sleep(0.01)
            assert heard == ["scores"]
        else:
            assert members.called == ["ann", "clinic", "slow"]
            assert heard == []
    finally:
        over.set()
        go_on.set()
        loop.join(10)


def test_a_fault_of_the_servers_own_part_ends_all_calls():
    members = Members()

    def damaged(letters):
        raise EvidenceError("the log is not what this member wrote")

    members.replies["ann"] = damaged
    with pytest.raises(EvidenceError):
        members.relay().run_until(lambda: False)


def test_who_lets_calls_wait_is_called_ever_less():
    """Adversary: a silo that never answers, or answers when the time is over."""
    for reply in (no, lambda letters: []):
        members = Members()
        members.replies["slow"] = takes(members, LIMIT + 1, reply)
        relay, pauses = members.relay(), []
        for _ in range(7):
            relay.turn()
            pauses.append(round(relay._rests["slow"].until - members.now))
            members.now = relay._rests["slow"].until
        assert pauses == [15, 30, 60, 120, 240, 240, 240]


def test_a_reply_in_time_costs_nothing_and_one_only_halves_the_rest():
    members = Members()
    members.replies["slow"] = takes(members, LIMIT - 1)
    relay = members.relay()
    relay.turn()
    assert relay._rests == {}
    members.replies["slow"] = takes(members, LIMIT, no)
    for _ in range(3):
        relay.turn()
        members.now = relay._rests["slow"].until
    members.replies["slow"] = lambda letters: []
    left = []
    while relay._rests:
        left.append(relay._rests["slow"].pause)
        relay.turn()
    assert left == [120, 60, 30, 15]


def test_a_silo_that_is_away_does_not_pay_for_a_slow_one():
    """The slow one takes all its time; the clinic is not connected, which is told at once."""
    members = Members()
    members.replies["slow"] = takes(members, LIMIT - 1)
    members.replies["clinic"] = lambda letters: Failure("is not connected")
    relay = members.relay()
    for _ in range(20):
        relay.turn()
        assert relay._rests["clinic"].until - members.now <= relay_module.ABSENT
        members.now += 1
    members.replies["clinic"] = lambda letters: []
    members.now += relay_module.ABSENT
    relay.turn()
    assert relay._rests == {}


def test_the_engine_says_who_was_waited_for():
    """Another member was let in meanwhile, which took 25 s; this one was not there at once."""
    members = Members()
    for waited, pause in ((0.0, relay_module.ABSENT), (25.0, relay_module.REST)):
        members.replies["slow"] = takes(members, 25, lambda letters, w=waited: Failure("gone", w))
        relay = members.relay()
        relay.turn()
        assert relay._rests["slow"].until == pytest.approx(members.now + pause)


def test_an_asker_that_misses_a_call_gets_its_answers_with_the_next():
    """The control forgets what could not be brought."""
    for relay_kind, brought in ((Relay, ["scores"]), (Forgetful, [])):
        members = Members()
        heard = conversation(members)
        relay = members.relay()
        relay.__class__ = relay_kind
        relay.turn()
        relay.turn()
        back = members.replies["ann"]
        members.replies["ann"] = lambda letters: Failure("is not connected")
        relay.turn()
        relay.turn()  # it is not called now
        members.replies["ann"] = back
        members.now += 10
        relay.turn()
        assert heard == brought


class Forgetful(Relay):
    def _keep(self, name, letters):
        pass


def test_mail_is_kept_while_nobody_at_all_is_connected(monkeypatch):
    members = Members()
    heard = conversation(members)
    relay = members.relay()
    relay.turn()
    relay.turn()
    assert [letter.kind for letter in relay.waiting("ann")] == ["scores"]

    def nobody(frames, timeout):
        members.now += 60  # for anybody
        raise TransportError("0 silos are connected")

    with monkeypatch.context() as patch:
        patch.setattr(members, "exchange", nobody)
        relay.turn()
    assert [letter.kind for letter in relay.waiting("ann")] == ["scores"]
    members.now += relay_module.ABSENT
    relay.turn()
    assert heard == ["scores"]


def test_an_asker_is_told_at_once_that_a_silo_is_away():
    members = Members()
    heard = conversation(members)
    members.replies["clinic"] = no
    relay = members.relay()
    for _ in range(3):
        relay.turn()
    assert heard == ["declined"]


def test_a_question_to_a_silo_that_rests_is_declined_at_once():
    """Also one that was on its way when the silo's nonsense came."""
    members = Members()
    heard = conversation(members)
    other = post.Letter("ann", b"n" * post.THREAD_BYTES, "scores", b"x")
    members.replies["clinic"] = lambda letters: [other]
    relay = members.relay()
    relay.turn()
    assert relay.waiting("clinic") == []
    relay.turn()
    assert heard == ["declined"]


def test_what_nobody_asked_for_is_dropped_and_said_once(caplog):
    """Adversary: a silo that sends scores and blocks by the hundred, in the open thread too."""
    members = Members()
    heard = conversation(members)
    blocks = post.Letter("ann", THREAD, "blocks", b"x")
    other = post.Letter("ann", b"n" * post.THREAD_BYTES, "scores", b"x")
    relay = members.relay()
    members.replies["clinic"] = lambda letters: [SCORES, blocks] if letters else []
    relay.turn()
    for flood in ([SCORES], [blocks], [other]):
        members.replies["slow"] = lambda letters, flood=flood: flood
        relay.turn()
        members.now += 300
    members.replies["clinic"] = lambda letters: [SCORES, blocks]
    pauses = []
    for _ in range(8):
        relay.turn()
        pauses.append(relay._rests["clinic"].until - members.now)
        members.now = relay._rests["clinic"].until
    assert pauses[-3:] == [240] * 3
    assert heard == ["scores"]  # the clinic's, to the only question
    lines = [record.getMessage() for record in caplog.records]
    assert len(lines) == len(set(lines)) == 3  # for a member and a kind


def test_a_busy_member_is_called_at_once_but_not_without_end():
    """Adversary: a member that always has a letter. Each call costs it, or another, a write."""
    pace = Pace()
    assert [pace.after(False) for _ in range(8)] == [0.1, 0.2, 0.4, 0.8, 1.0, 1.0, 1.0, 1.0]
    assert [pace.after(True) for _ in range(30)] == [0.0] * 24 + [0.5] * 6
    assert not pace.hurried  # a letter does not end the pause either
    assert (pace.after(False), pace.hurried) == (0.1, True)
