"""The silos' refusals, one by one: the same rule and the same words in every scheme."""

from __future__ import annotations

import pytest

from securefedcollm.aggregation.checks import (
    check_announced,
    check_identity,
    check_list,
    check_own,
    record_once,
)
from securefedcollm.aggregation.ckks.parameters import CKKS_SUITES
from securefedcollm.aggregation.header import RingParameters, Roster, RoundHeader
from securefedcollm.aggregation.inmemory import MemoryJournal
from securefedcollm.aggregation.masking.messages import Agreement
from securefedcollm.aggregation.messages import UNSIGNED, sign
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import ConfigError, LocalProtocolError, RemoteProtocolError
from securefedcollm.primitives import SigningKey, sha256

KEYS = {f"silo-{number}": SigningKey(bytes([number] * 32)) for number in (1, 2, 3)}
ROSTER = Roster({name: key.public for name, key in KEYS.items()})


@pytest.mark.parametrize(
    ("members", "why"),
    [
        ([1, 2, 2, 3], "repeated or unknown"),
        ([2, 1, 3], "repeated or unknown"),
        ([1, 2, 4], "repeated or unknown"),
        ([1, 3], "left this silo out of the roll"),
        ([1, 2], "a roll of 2 silos; 3 are needed"),
    ],
)
def test_a_list_is_ascending_allowed_with_this_silo_and_a_quorum(members, why) -> None:
    check_list([1, 2, 3], range(1, 4), 3, own=2, what="roll")
    with pytest.raises(RemoteProtocolError, match=why) as refused:
        check_list(members, range(1, 4), 3, own=2, what="roll")
    assert refused.value.peer == "server"


def test_what_was_said_once_is_said_again_and_nothing_else() -> None:
    """A second answer names what it is the second one in: the attempt, or the round."""
    journal = MemoryJournal()
    for key, scope in ((b"keys:", "attempt"), (b"vector:", "round"), (b"open:", "round")):
        record_once(journal, key, sha256(b"one"), Step.SHARE)
        record_once(journal, key, sha256(b"one"), Step.SHARE)
        with pytest.raises(RemoteProtocolError, match=rf"answered in this {scope} \(share\)"):
            record_once(journal, key, sha256(b"two"), Step.SHARE)


def test_a_silo_knows_its_own_frames() -> None:
    """Adversary: a relay that shows what this silo signed elsewhere, or has altered since."""
    key = KEYS["silo-1"]
    own = sign(Agreement(bytes(32), 1, UNSIGNED, sha256(b"lists")), key)
    check_own(own, own)
    for other in (
        sign(Agreement(bytes(32), 1, UNSIGNED, sha256(b"others")), key),
        Agreement(bytes(32), 1, UNSIGNED, sha256(b"lists")),
    ):
        with pytest.raises(RemoteProtocolError, match="an agreement that this silo did not send"):
            check_own(own, other, "an agreement")


def test_a_silo_begins_with_its_own_identity_and_a_vector_id() -> None:
    assert check_identity(ROSTER, "silo-2", KEYS["silo-2"], bytes(32)) == 2
    with pytest.raises(LocalProtocolError, match="this identity is not silo-2's"):
        check_identity(ROSTER, "silo-2", KEYS["silo-1"], bytes(32))
    with pytest.raises(LocalProtocolError, match="a vector id has 32 bytes"):
        check_identity(ROSTER, "silo-2", KEYS["silo-2"], b"")
    with pytest.raises(ConfigError, match="not on it"):
        check_identity(ROSTER, "silo-4", KEYS["silo-1"], bytes(32))


def test_another_round_is_refused_by_the_names_of_its_fields() -> None:
    sizes = RingParameters(10, 5, 8, 3, 3, 3, 1)
    own = RoundHeader(bytes(32), bytes(16), 0, 0, bytes(32), sizes, ROSTER.root)
    check_announced(own, own)
    other = RoundHeader(
        bytes(32), bytes(16), 1, 0, bytes(32), sizes, ROSTER.root, CKKS_SUITES["precise"]
    )
    with pytest.raises(RemoteProtocolError, match="differs from this silo's in: round, suite"):
        check_announced(own, other)
