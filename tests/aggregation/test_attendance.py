"""Who takes part in a step: the rules that the coordinators of all schemes share."""

from __future__ import annotations

import pytest
from securefedcollm_audits.protocol import keyed_cohort

from securefedcollm.aggregation import TRANSITIONS, Step
from securefedcollm.aggregation.attendance import AttendedRound
from securefedcollm.aggregation.header import RingParameters, Roster, RoundHeader
from securefedcollm.aggregation.masking.messages import Agreement
from securefedcollm.aggregation.messages import UNSIGNED, sign
from securefedcollm.errors import (
    ConfigError,
    LocalProtocolError,
    ProtocolError,
    RemoteProtocolError,
)
from securefedcollm.primitives import SigningKey

KEYS = {f"silo-{number}": SigningKey(bytes([number] * 32)) for number in (1, 2, 3, 4)}
ROSTER = Roster({name: key.public for name, key in KEYS.items()})
SIZES = RingParameters(10, 5, 8, silos=4, min_silos=3, threshold=3, colluders=1)
HEADER = RoundHeader(bytes(32), bytes(16), 0, 0, bytes(32), SIZES, ROSTER.root)


class Toy(AttendedRound):
    """A scheme in which everybody says anything but ``b"no"``, step after step."""

    def __init__(self, others: tuple[str, ...] = ()) -> None:
        super().__init__(HEADER, ROSTER, TRANSITIONS, others)
        self.said: dict[int, bytes] = {}
        self.forgotten = False

    def requests(self) -> dict[str, bytes]:
        self._check_running()
        return dict.fromkeys(self._waiting(), b"say")

    def _take(self, name: str, frame: bytes) -> None:
        if frame == b"no":
            self._blame(name, "said no")
        self.said[self._roster.index(name)] = frame

    def _close(self) -> None:
        self.said = self._quorum(self.said)

    def _forget(self) -> None:
        self.forgotten = True

    def signed(self, name: str, message: Agreement) -> int:
        return self._check_signed(name, message)


def test_nobody_replies_twice_or_after_being_out() -> None:
    toy = Toy()
    toy.receive("silo-1", b"yes")
    with pytest.raises(RemoteProtocolError, match="second or a late frame in step advertise"):
        toy.receive("silo-1", b"something else")
    with pytest.raises(RemoteProtocolError, match="said no") as blamed:
        toy.receive("silo-2", b"no")
    assert blamed.value.peer == "silo-2"
    with pytest.raises(RemoteProtocolError, match="second or a late frame"):
        toy.receive("silo-2", b"yes")
    assert toy.said == {1: b"yes"}
    assert toy.excluded == {"silo-2": "said no"}
    assert set(toy.requests()) == {"silo-3", "silo-4"}


def test_who_has_not_replied_is_out_and_asked_nothing_more() -> None:
    toy = Toy()
    for name in ("silo-4", "silo-1", "silo-3"):
        toy.receive(name, b"yes")
    assert toy.advance()
    assert toy.excluded == {"silo-2": "no reply in step advertise"}
    assert list(toy.requests()) == ["silo-1", "silo-3", "silo-4"]
    with pytest.raises(RemoteProtocolError, match="second or a late frame in step share"):
        toy.receive("silo-2", b"yes")


def test_a_silo_lost_after_its_reply_is_not_among_those_that_go_on() -> None:
    toy = Toy()
    for name in KEYS:
        toy.receive(name, b"yes")
    toy.lost("silo-2", "hung up")
    toy.lost("silo-2", "a second reason")
    assert toy.advance()
    assert toy.excluded == {"silo-2": "hung up"}
    assert set(toy.said) == {1, 3, 4}


def test_below_the_quorum_the_attempt_fails_for_good_and_forgets() -> None:
    toy = Toy()
    toy.receive("silo-1", b"yes")
    toy.receive("silo-3", b"yes")
    toy.lost("silo-4", "hung up")
    why = r"only 2 silos completed step advertise; 3 are needed \(silo-2: no reply in step adv"
    with pytest.raises(ProtocolError, match=why):
        toy.advance()
    assert toy.step is Step.FAILED
    assert toy.forgotten
    for call in (toy.requests, toy.advance, lambda: toy.receive("silo-1", b"yes")):
        with pytest.raises(LocalProtocolError, match=r"attempt is over \(failed\)") as over:
            call()
        assert over.value.hint == "start a new Toy"
    with pytest.raises(LocalProtocolError, match="no result at step failed"):
        _ = toy.result


def test_only_those_who_take_part_are_known() -> None:
    for call in (lambda t, n: t.lost(n, "?"), lambda t, n: t.receive(n, b"yes")):
        with pytest.raises(ConfigError, match="'office' is not on it"):
            call(Toy(), "office")
    toy = Toy(others=("office",))
    toy.lost("office", "hung up")
    assert toy.excluded == {"office": "hung up"}


def test_a_frame_is_of_its_sender_and_of_this_attempt() -> None:
    """Adversary: a silo or the network that speaks for another silo, or replays a frame."""
    made = {
        name: sign(Agreement(HEADER.digest, index, UNSIGNED, bytes(32)), KEYS[name])
        for index, name in enumerate(ROSTER.names, start=1)
    }
    assert Toy().signed("silo-2", made["silo-2"]) == 2
    old = sign(Agreement(bytes(32), 2, UNSIGNED, bytes(32)), KEYS["silo-2"])
    forged = sign(Agreement(HEADER.digest, 2, UNSIGNED, bytes(32)), KEYS["silo-1"])
    for message, why in (
        (made["silo-1"], "a frame of another silo, round"),
        (old, "a frame of another silo, round"),
        (forged, "a bad signature"),
    ):
        toy = Toy()
        with pytest.raises(RemoteProtocolError, match=why):
            toy.signed("silo-2", message)
        assert why in toy.excluded["silo-2"]


@pytest.mark.parametrize("gone", [1, 2])
def test_who_is_lost_after_committing_is_off_the_authority_s_list_too(gone: int) -> None:
    """As in the other schemes; below a quorum the attempt fails before anybody uploads."""
    made = keyed_cohort.cohort(4)
    played = keyed_cohort.Round(made).until(Step.ENCRYPT)
    side = played.coordinator
    for name, frame in side.requests().items():
        side.receive(name, played.sides[name].handle(frame))
    for name in made.names[:gone]:
        side.lost(name, "hung up")
    if gone == 2:
        with pytest.raises(ProtocolError, match="only 2 silos completed step encrypt"):
            side.advance()
        return
    result = played.play()
    assert (result.survivors, result.dropouts) == (made.names[1:], ())
    assert set(played.deliveries) == set(made.names[1:])
