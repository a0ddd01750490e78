"""Malicious silos, and a malicious network, against CKKS rounds: what they spoil, who is named."""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from securefedcollm.aggregation import AbandonedError, Step
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.errors import ProtocolError, RemoteProtocolError
from securefedcollm.primitives import sha256
from tests.support.cohort import (
    REPLIES,
    STEPS,
    Round,
    at,
    cohort,
    edit,
    fails,
    flipped,
    sign_as,
    silo,
)

OTHER, COLLUDER = "silo-002", "silo-004"
SIZE = 30720


def test_a_key_part_chosen_after_the_others_is_refused() -> None:
    """Adversary: a colluder that reveals b' = b₄ − Σ b of the others, to know the joint secret."""
    made = cohort(4)
    ring = m.ring_of(made.header)
    played = Round(made).until(Step.SHARE)
    parts: list[tuple[bytes, ...]] = []

    def rogue(step: Step, name: str, frame: bytes) -> bytes:
        part = msgspec.msgpack.decode(frame, type=m.KeyPart)
        parts.append(part.parts)
        if name != COLLUDER:
            return frame
        own = polynomials.unpack(part.parts[0], ring, 1)
        for other in parts[:-1]:
            own = polynomials.subtract(own, polynomials.unpack(other[0], ring, 1), ring)
        forged = (polynomials.pack(own, ring), *part.parts[1:])
        digests = tuple(map(sha256, forged))
        return sign_as(made, COLLUDER, part, parts=forged, digests=digests).encode()

    assert played.exchange(reply=rogue)
    assert played.coordinator.excluded == {
        COLLUDER: "revealed another key part than it committed to"
    }
    # A server that plays along fares no better: the silos check for themselves.
    made = cohort(4)
    played = Round(made).until(Step.ENCRYPT)

    def swap(message: m.KeyParts) -> dict[str, tuple[m.KeyPart, ...]]:
        last = message.entries[3]
        part, digests = message.entries[0].parts, message.entries[0].digests
        forged = sign_as(made, COLLUDER, last, parts=part, digests=digests)
        return {"entries": (*message.entries[:3], forged)}

    fails(played, request=at(Step.ENCRYPT, None, edit(m.KeyParts, swap)))
    honest = [why for name, why in played.refused.items() if name != COLLUDER]
    assert len(honest) == 3
    assert all("silo-004's key part is not the one it committed to" in why for why in honest)
    assert played.shares == []


def test_a_ciphertext_chosen_after_the_others_is_refused() -> None:
    """Adversary: a colluder that uploads minus the others' ciphertexts, so that the "sum" is one
    silo's vector. It committed to another before it saw them."""
    made = cohort(4)
    ring = m.ring_of(made.header)
    uploads: dict[str, m.CipherUpload] = {}

    def cancel(step: Step, name: str, frame: bytes) -> bytes:
        if step is not Step.UPLOAD:
            return frame
        uploads[name] = msgspec.msgpack.decode(frame, type=m.CipherUpload)
        if name != COLLUDER:
            return frame
        forged = []
        for half in ("first", "second"):
            rows = len(getattr(uploads[COLLUDER], half)) // SIZE
            total = np.zeros((rows, 4096), dtype=np.uint64)
            for other in ("silo-002", "silo-003"):
                part = polynomials.unpack(getattr(uploads[other], half), ring, rows)
                total = polynomials.subtract(total, part, ring)
            forged.append(polynomials.pack(total, ring))
        return m.CipherUpload(*forged).encode()

    played = Round(made)
    with pytest.raises(AbandonedError) as caught:
        played.play(reply=cancel)
    assert caught.value.lost == {COLLUDER: "uploaded another ciphertext than it committed to"}
    assert played.shares == []


SILO_LIES = {
    "a commitment for somebody else": (
        Step.ADVERTISE,
        lambda r: {"index": 1},
        "a frame of another silo",
    ),
    "a frame of another round": (
        Step.ADVERTISE,
        lambda r: {"header": bytes(32)},
        "a frame of another silo, round, study or global model",
    ),
    "an empty key part": (
        Step.SHARE,
        lambda r: {"parts": (b"", *r.parts[1:])},
        "than it committed to",
    ),
    "a key part too few": (Step.SHARE, lambda r: {"parts": r.parts[1:]}, "than it committed to"),
    "other commitments": (Step.SHARE, lambda r: {"commitments": bytes(32)}, "than it committed to"),
    "another key": (Step.ENCRYPT, lambda r: {"key": bytes(32)}, "encrypted under another key"),
    "an empty ciphertext": (
        Step.UPLOAD,
        lambda r: {"first": b"", "second": b""},
        "another ciphertext than it committed to",
    ),
    "half a ciphertext": (
        Step.UPLOAD,
        lambda r: {"first": r.first[:SIZE], "second": r.second[:SIZE]},
        "another ciphertext than it committed to",
    ),
    "a flipped bit in c0": (
        Step.UPLOAD,
        lambda r: {"first": flipped(r.first)},
        "another ciphertext than it committed to",
    ),
    "a flipped bit in c1": (
        Step.UPLOAD,
        lambda r: {"second": flipped(r.second)},
        "another ciphertext than it committed to",
    ),
    "other ciphertexts judged": (
        Step.AGREE,
        lambda r: {"transcript": bytes(32)},
        "judged other ciphertexts",
    ),
    "a share of another aggregate": (
        Step.UNMASK,
        lambda r: {"transcript": bytes(32)},
        "decrypted another aggregate",
    ),
    "an empty share": (Step.UNMASK, lambda r: {"share": b""}, "0 bytes are not 2 polynomials"),
}


@pytest.mark.parametrize("lie", SILO_LIES)
def test_what_one_silo_sends_is_checked_and_it_is_named(lie: str) -> None:
    """Adversary: one silo, which signs what it says. It can end an attempt, and is named for it."""
    step, change, reason = SILO_LIES[lie]
    made = cohort(4)
    key = None if REPLIES[step] is m.CipherUpload else made.keys[OTHER]
    hook = at(step, OTHER, edit(REPLIES[step], change, key))
    played = Round(made)
    if step in (Step.ADVERTISE, Step.SHARE):
        assert OTHER not in played.play(reply=hook).survivors
    else:
        fails(played, reply=hook)
        assert played.coordinator.step is Step.FAILED
    assert reason in played.coordinator.excluded[OTHER]
    assert set(played.coordinator.excluded) == {OTHER}


@pytest.mark.parametrize(
    ("upload", "reason"),
    [
        (m.CipherUpload(b"", b""), "0 bytes are not 4 polynomials"),
        (m.CipherUpload(bytes(SIZE), bytes(4 * SIZE)), "30720 bytes are not 2 polynomials"),
        (
            m.CipherUpload(bytes(2 * SIZE), bytes(4 * SIZE - 1)),
            "122879 bytes are not 4 polynomials",
        ),
        (m.CipherUpload(bytes(2 * SIZE), b"\xff" * 4 * SIZE), "a residue is not below the modulus"),
    ],
)
def test_a_ciphertext_that_was_never_one_is_refused_though_committed_to(upload, reason) -> None:
    """Adversary: a silo that commits to an empty ciphertext, to a part of one, or to no residues.
    SEAL would load the first as a valid, empty vector."""
    made = cohort(4)
    played = Round(made)
    secrets = played.silos[OTHER]._secrets.own

    secrets.encrypt, secrets.take_upload = lambda joint: upload, lambda: upload
    with pytest.raises(AbandonedError) as caught:
        played.play()
    assert reason in caught.value.lost[OTHER]
    assert played.shares == []


@pytest.mark.parametrize("step", [s for s in STEPS if s is not Step.UPLOAD])
def test_an_unsigned_change_is_the_network_s_and_refused(step: Step) -> None:
    made = cohort(4)
    unsigned = edit(REPLIES[step], lambda r: {"signature": flipped(r.signature, 5)})
    played = Round(made)
    if step in (Step.ADVERTISE, Step.SHARE):
        played.play(reply=at(step, OTHER, unsigned))
    else:
        fails(played, reply=at(step, OTHER, unsigned))
    assert played.coordinator.excluded[OTHER] == "sent a frame with a bad signature"


@pytest.mark.parametrize("wrong", ["share", "values"])
def test_garbage_that_only_shows_once_opened_is_not_released(wrong: str, monkeypatch) -> None:
    """Adversary: a silo whose share is wrong though well-formed, or that encrypted values outside
    the range. Nobody can say whose they are; there is no sum rather than a wrong one."""
    made = cohort(4)
    played = Round(made)
    if wrong == "share":
        key = made.keys[COLLUDER]
        hook = at(
            Step.UNMASK,
            COLLUDER,
            edit(m.Partial, lambda r: {"share": r.share[SIZE:] + r.share[:SIZE]}, key),
        )
    else:
        hook = None
        for name in made.names:
            made.vectors[name][17] = 4 * made.bound + 1 if name == COLLUDER else 0
        monkeypatch.setattr(polynomials, "check_vector", lambda *_: None)  # past its own check
        played.silos |= {n: silo(made, n) for n in made.names}
    assert "the opened sum is out of bounds" in fails(played, reply=hook)


def test_a_late_or_second_frame_changes_nothing() -> None:
    made = cohort(4)
    played = Round(made)
    server = played.coordinator
    frames = {n: played.silos[n].handle(f) for n, f in server.requests().items()}
    for name, frame in frames.items():
        server.receive(name, frame)
    with pytest.raises(RemoteProtocolError, match="a second or a late frame"):
        server.receive(OTHER, frames[OTHER])
    server.advance()
    assert server.excluded == {}
    np.testing.assert_array_equal(played.play().sum, made.plain_sum(made.names))


# Any frame, altered anyhow ----------------------------------------------------------------------


@given(
    step=st.sampled_from(STEPS),
    inbound=st.booleans(),
    victim=st.sampled_from(["silo-001", "silo-002", "silo-003"]),
    how=st.sampled_from(["cut", "flip", "insert", "append", "drop", "swap"]),
    place=st.floats(0, 1, exclude_max=True),
    value=st.binary(min_size=1, max_size=8),
)
@settings(max_examples=40, deadline=None, suppress_health_check=[HealthCheck.too_slow])
def test_a_frame_altered_in_any_way_is_refused_or_was_never_needed(
    step, inbound, victim, how, place, value
) -> None:
    """Adversary: the network. Either the sum is exact, or there is none and the error is ours."""
    made = cohort(3, values=20)
    last = {}

    def alter(frame: bytes) -> bytes | None:
        spot = int(place * len(frame))
        return {
            "cut": frame[:spot],
            "flip": flipped(frame, spot, value[0] % 8),
            "insert": frame[:spot] + value + frame[spot:],
            "append": frame + value,
            "drop": None,
            "swap": last.get("frame", frame[::-1]),
        }[how]

    def remember(now: Step, name: str, frame: bytes) -> bytes | None:
        altered = at(step, victim, alter)(now, name, frame)
        last["frame"] = frame
        return altered

    played = Round(made)
    hooks = {"request" if inbound else "reply": remember}
    try:
        result = played.play(**hooks)
    except ProtocolError:
        assert played.coordinator.step is Step.FAILED
    else:
        np.testing.assert_array_equal(result.sum, made.plain_sum(result.survivors))
