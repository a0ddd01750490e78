"""A malicious server against CKKS rounds: what it learns.

A ciphertext does not say what it is a ciphertext of, and every silo's share opens whatever it is
made for. So "nothing was learnt" means here: no honest silo made a share for anything but the
committed sum. ``Round.shares`` says who made one.
"""

from __future__ import annotations

import os

import msgspec
import numpy as np
import pytest
from securefedcollm_audits.protocol.cohort import recorded
from securefedcollm_audits.protocol.threshold_attacks import (
    threshold_malformed_ciphertext,
    threshold_malformed_key,
)

from securefedcollm.aggregation import AbandonedError, Step
from securefedcollm.aggregation.ckks import messages as m
from securefedcollm.aggregation.ckks import polynomials
from securefedcollm.aggregation.ckks.parameters import CkksRing, Shape
from securefedcollm.aggregation.ckks.secrets import KeyShares
from securefedcollm.aggregation.ckks.threshold import silo as threshold_silo
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import RandomSource, sha256
from tests.support.cohort import (
    REQUESTS,
    STEPS,
    Round,
    at,
    attempt,
    cohort,
    edit,
    fails,
    opened,
    sign_as,
    silo,
)

VICTIM, OTHER, COLLUDER = "silo-001", "silo-002", "silo-004"
SIZE = 30720


def test_the_server_and_all_silos_but_one_cannot_open_a_sum() -> None:
    """Adversary: the server, with every share but one silo's, before that one has answered."""
    made = cohort(4, bound=2**15 - 1)
    rng = np.random.default_rng(1)
    for vector in made.vectors.values():
        vector[:] = rng.integers(-10, 11, len(vector))
    played = Round(made)
    uploads: dict[str, m.CipherUpload] = {}

    def keep(step: Step, name: str, frame: bytes) -> bytes:
        if step is Step.UPLOAD:
            uploads[name] = msgspec.msgpack.decode(frame, type=m.CipherUpload)
        return frame

    played.play(reply=keep)
    ring = m.ring_of(made.header)
    first = np.zeros((2, 4096), dtype=np.uint64)
    for upload in uploads.values():
        first = polynomials.add(first, polynomials.unpack(upload.first, ring, 2), ring)
    sum_first = polynomials.pack(first, ring)
    shares = [
        msgspec.msgpack.decode(played.received[Step.UNMASK, name], type=m.Partial).share
        for name in made.names
    ]
    plain = made.plain_sum(made.names)
    for missing in range(4):
        rest = shares[:missing] + shares[missing + 1 :]
        error = opened(made, sum_first, rest) - plain
        assert np.abs(error).mean() > 1e3 * np.abs(plain).mean()
    # Positive control: with the last share it does open; a single ciphertext does not, even so.
    assert np.abs(opened(made, sum_first, shares) - plain).max() < 0.5
    alone = opened(made, uploads[VICTIM].first, shares) - made.vectors[VICTIM]
    assert np.abs(alone).mean() > 1e3 * 10


@pytest.mark.parametrize("case", [threshold_malformed_ciphertext, threshold_malformed_key])
def test_a_colluder_reads_no_secret_of_others_out_of_the_sum(case) -> None:
    """Adversary: a server, and a colluder that does not encrypt but uploads a constant, or gives a
    constant for its part of the victim's keys."""
    outcome = case()
    assert outcome.held, outcome


class OneSet(KeyShares):
    """All silos encrypt under the same keys."""

    def __init__(self, ring, shape, common, silos, random) -> None:
        super().__init__(ring, shape, common, 1, random)
        self.ring, self.silos = ring, silos

    def key_parts(self) -> tuple[bytes, ...]:
        return super().key_parts() * self.silos

    def decrypt(self, seconds) -> bytes:
        total, *rest = seconds.values()
        for second in rest:
            total = polynomials.add(total, second, self.ring)
        return super().decrypt({1: total})


@pytest.mark.parametrize("broken", ["one set of keys", "one committee"])
def test_without_keys_or_committees_of_their_own_the_same_attacks_succeed(
    broken: str, monkeypatch
) -> None:
    """Positive control: what the attacks of ``audit protocol`` would find."""
    if broken == "one set of keys":
        monkeypatch.setattr(threshold_silo, "KeyShares", OneSet)
        assert threshold_malformed_ciphertext().learnt == ("the vector of silo-001",)
        return
    shape = CkksRing.shape

    def single(self, values: int, colluders: int) -> Shape:
        return shape(self, values, 0)

    monkeypatch.setattr(CkksRing, "shape", single)
    assert threshold_malformed_key().learnt == ("the vector of silo-001",)


def test_a_server_cannot_give_one_member_another_ciphertext_to_multiply() -> None:
    """Adversary: a server that has the victim's ciphertext multiplied twice, and nobody else's; or
    one that swaps one group of it."""
    for keep in (0, SIZE):
        made = cohort(4, values=3 * 4096)
        assert m.shape_of(made.header).groups > 1

        def change(message: m.Pieces, keep: int = keep) -> dict[str, tuple[m.PieceList, ...]]:
            victim, other = message.lists[0], message.lists[1]
            forged = other.pieces[:keep] + victim.pieces[keep:]
            lie = msgspec.structs.replace(other, pieces=forged)
            return {"lists": (victim, lie, *message.lists[2:])}

        played = Round(made)
        fails(played, request=at(Step.AGREE, None, edit(m.Pieces, change)))
        assert played.shares == []
        assert set(played.refused) == set(made.names)
        why = "silo-002's ciphertext is not the one it committed to"
        assert all(why in said for said in played.refused.values())


SERVER_LIES = {
    # (step, what the server sends instead, what the silo says)
    "another silo's key commitment left out of the list": (
        Step.SHARE,
        lambda r: {"entries": r.entries[:2]},
        "sent a list of 2 silos; 3 are needed",
    ),
    "the victim left out": (Step.SHARE, lambda r: {"entries": r.entries[1:]}, "left this silo out"),
    "one silo twice": (
        Step.SHARE,
        lambda r: {"entries": (*r.entries[:3], r.entries[2])},
        "repeated or unknown silos",
    ),
    "an invented silo": (
        Step.SHARE,
        lambda r: {
            "entries": (*r.entries, msgspec.structs.replace(r.entries[3], index=5)),
        },
        "repeated or unknown silos",
    ),
    "a key commitment of its own making": (
        Step.SHARE,
        lambda r: {
            "entries": (
                r.entries[0],
                msgspec.structs.replace(r.entries[1], commitment=bytes(32)),
                *r.entries[2:],
            )
        },
        "key commitment with a bad signature",
    ),
    "a key part of its own making": (
        Step.ENCRYPT,
        lambda r: {
            "entries": (
                *r.entries[:3],
                msgspec.structs.replace(r.entries[3], digests=r.entries[0].digests),
            )
        },
        "key part with a bad signature",
    ),
    "a key of its own in the place of a member's": (
        Step.ENCRYPT,
        lambda r: {
            "entries": (
                *r.entries[:3],
                msgspec.structs.replace(r.entries[3], parts=r.entries[0].parts),
            )
        },
        "silo-004's key part is not the one it committed to",
    ),
    "no key of a member": (
        Step.ENCRYPT,
        lambda r: {"entries": (*r.entries[:3], msgspec.structs.replace(r.entries[3], parts=()))},
        "silo-004's key part is not the one it committed to",
    ),
    "fewer key holders than a quorum": (
        Step.ENCRYPT,
        lambda r: {"entries": r.entries[:2]},
        "sent a list of 2 silos; 3 are needed",
    ),
    "another ciphertext commitment": (
        Step.UPLOAD,
        lambda r: {
            "entries": (
                *r.entries[:3],
                msgspec.structs.replace(r.entries[3], root=r.entries[2].root),
            )
        },
        "ciphertext commitment with a bad signature",
    ),
    "a ciphertext left out of the sum": (
        Step.UPLOAD,
        lambda r: {"entries": r.entries[:3]},
        "not of the silos that share the key",
    ),
    "one piece list too few": (
        Step.AGREE,
        lambda r: {"lists": r.lists[:3]},
        "did not relay one piece list for each member",
    ),
    "a piece of another ciphertext": (
        Step.AGREE,
        lambda r: {
            "lists": (
                *r.lists[:3],
                msgspec.structs.replace(r.lists[3], pieces=r.lists[2].pieces),
            )
        },
        "silo-004's ciphertext is not the one it committed to",
    ),
    "another member's whole ciphertext": (
        Step.AGREE,
        lambda r: {"lists": (*r.lists[:3], r.lists[2])},
        "silo-004's ciphertext is not the one it committed to",
    ),
    "empty pieces": (
        Step.AGREE,
        lambda r: {"lists": (*r.lists[:3], msgspec.structs.replace(r.lists[3], pieces=b""))},
        "silo-004's ciphertext is not the one it committed to",
    ),
    "a verdict left out": (
        Step.UNMASK,
        lambda r: {"verdicts": r.verdicts[:3]},
        "not of the silos that share the key",
    ),
    "another member's verdict": (
        Step.UNMASK,
        lambda r: {
            "verdicts": (
                *r.verdicts[:3],
                msgspec.structs.replace(r.verdicts[3], signature=r.verdicts[2].signature),
            )
        },
        "verdict with a bad signature",
    ),
}


@pytest.mark.parametrize("lie", SERVER_LIES)
def test_what_the_server_tells_one_silo(lie: str) -> None:
    """Adversary: the server, which lies to the victim in one frame. It gets no share of it."""
    step, change, reason = SERVER_LIES[lie]
    made = cohort(4)
    played = Round(made)
    hook = at(step, VICTIM, edit(REQUESTS[step], change))
    if step is Step.SHARE:  # no key yet: the others go on without the victim
        assert VICTIM not in played.play(request=hook).survivors
    else:
        assert VICTIM in fails(played, request=hook)
    assert reason in played.refused[VICTIM]
    assert VICTIM not in played.shares


def test_silos_that_were_sent_different_models_do_not_make_a_key() -> None:
    """Adversary: a server that singles the victim out by its model (arXiv 2111.07380)."""
    made = cohort(4)
    other = msgspec.structs.replace(made.header, model_digest=sha256(b"another model"))
    sides = {n: silo(made, n, other if n == VICTIM else made.header) for n in made.names}
    played = Round(made, silos=sides)
    served = Round(made, header=other).coordinator.requests()[VICTIM]
    hook = at(Step.ADVERTISE, VICTIM, lambda frame: served)
    result = played.play(request=hook)
    assert VICTIM not in result.survivors
    assert "another silo, round, study or global model" in result.excluded[VICTIM]
    made = cohort(4)
    played = Round(made, silos={n: silo(made, n, other) for n in made.names})
    fails(played)
    assert all("differs from this silo's in: model_digest" in w for w in played.refused.values())


def test_a_split_view_of_the_key_ends_before_any_ciphertext_leaves() -> None:
    """Adversary: a server that shows two silos a key of all four, and two others one of three."""
    made = cohort(4)
    played = Round(made).until(Step.SHARE)
    three = edit(m.KeyCommitments, lambda r: {"entries": r.entries[:3]})
    played.exchange(request=at(Step.SHARE, VICTIM, three))
    assert "committed to" in played.coordinator.excluded[VICTIM]
    assert played.coordinator.step is Step.ENCRYPT
    played.play()
    assert VICTIM not in played.shares
    assert played.silos[VICTIM].step is Step.ENCRYPT


def test_a_commitment_under_another_key_is_not_added_up() -> None:
    """Adversary: a server that shows a colluder's commitment under its own key: SEAL would add
    ciphertexts of different keys without an error."""
    made = cohort(4)

    def change(roll: m.SealedRoll) -> dict[str, tuple[m.Sealed, ...]]:
        forged = sign_as(made, COLLUDER, roll.entries[3], key=bytes(32))
        return {"entries": (*roll.entries[:3], forged)}

    played = Round(made)
    fails(played, request=at(Step.UPLOAD, VICTIM, edit(m.SealedRoll, change)))
    assert "under another key than this silo's" in played.refused[VICTIM]
    assert (Step.UPLOAD, VICTIM) not in played.received


class Forked:
    """What a process draws: from ``source``, which a snapshot's restoration changes."""

    def __init__(self, source: RandomSource) -> None:
        self.source = source

    def __call__(self, count: int) -> bytes:
        return self.source(count)


def test_a_cloned_silo_does_not_answer_twice() -> None:
    """Adversary: a server that restores a snapshot of the victim, for a second share with other
    flooding noise (their average has less of it), or for a second ciphertext."""
    for step in (Step.ENCRYPT, Step.UPLOAD, Step.UNMASK):
        made = cohort(4)
        past, restored = recorded("the victim"), recorded("the victim")
        played = Round(made)
        side = played.silos[VICTIM] = silo(made, VICTIM, random=past)
        frames: list[bytes] = []

        def seen(now: Step, name: str, frame: bytes, frames: list[bytes] = frames) -> bytes:
            frames.extend([frame] if name == VICTIM else [])
            return frame

        while played.coordinator.step is not step:
            played.exchange(request=seen)
        frame = played.coordinator.requests()[VICTIM]
        random = Forked(restored)
        clone = silo(made, VICTIM, random=random)
        for before in frames:  # as far as the snapshot; from there on it draws what nobody knows
            clone.handle(before)
        random.source = os.urandom
        side.handle(frame)
        if step is Step.UPLOAD:  # the very same ciphertext may leave again
            assert clone.handle(frame)
        else:
            with pytest.raises(RemoteProtocolError, match="asks a second time"):
                clone.handle(frame)


def test_a_second_attempt_opens_the_same_members_or_nothing() -> None:
    """Adversary: a server that has the sum, calls the attempt lost, and repeats it without the
    victim. The difference of the two sums would be the victim's vector."""
    made = cohort(4)
    Round(made).play()
    again = Round(made, header=attempt(made, 1))
    again.coordinator.lost(VICTIM, "so the server says")
    with pytest.raises(AbandonedError):
        again.play()
    assert again.shares == []
    assert set(again.refused) == set(made.names) - {VICTIM}
    assert all("asks a second time" in why for why in again.refused.values())


def test_one_vector_a_round_whatever_the_attempt() -> None:
    """Adversary: as above, with the difference in the victim's vector and not in the members."""
    made = cohort(4)
    Round(made).until(Step.UPLOAD)  # an attempt that is given up before anything was opened
    made.vectors[VICTIM] = made.vectors[VICTIM] + 0
    made.vectors[VICTIM][0] ^= 1
    again = Round(made, header=attempt(made, 1))
    with pytest.raises(AbandonedError):
        again.play()
    assert set(again.refused) == {VICTIM}
    assert (Step.ENCRYPT, VICTIM) not in again.received


def test_frames_of_another_round_or_attempt_are_not_this_one_s() -> None:
    """Adversary: a server that replays what silos signed in an earlier attempt."""
    made = cohort(4)
    earlier = Round(made)
    recorded: dict[Step, bytes] = {}

    def keep(step: Step, name: str, frame: bytes) -> bytes:
        recorded.setdefault(step, frame)
        return frame

    earlier.play(request=keep)
    for step in STEPS[1:]:
        again = Round(made, header=attempt(made, 1 + STEPS.index(step)))
        replay = at(step, None, lambda frame, step=step: recorded[step])
        fails(again, request=replay)
        assert set(again.refused) == set(made.names)
        assert again.shares == []
