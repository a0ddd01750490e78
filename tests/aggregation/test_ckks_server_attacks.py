"""A malicious server against CKKS rounds: what it learns.

A ciphertext does not say what it is a ciphertext of, and every silo's share opens whatever it is
made for. So "nothing was learnt" means here: no honest silo made a share for anything but the
committed sum. ``Round.shares`` says who made one.
"""

from __future__ import annotations

import msgspec
import numpy as np
import pytest
from securefedcollm_audits import malformed

from securefedcollm.aggregation import AbandonedError, Step, ckks_ring
from securefedcollm.aggregation import ckks_messages as m
from securefedcollm.aggregation.ckks_seal import Seal
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import sha256

from .ckks_cohort import (
    REQUESTS,
    STEPS,
    Round,
    at,
    attempt,
    cohort,
    edit,
    fails,
    flipped,
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
        first = ckks_ring.add(first, ckks_ring.unpack(upload.first, ring, 2), ring)
    sum_first = ckks_ring.pack(first, ring)
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


def test_known_limit_a_malformed_ciphertext_bares_the_joint_secret() -> None:
    """Adversary: a server, and a colluder that does not encrypt but uploads a constant. The opened
    sum then gives away the joint secret, and so every other silo's vector. This is the limit that
    ``docs/ckks.md`` states: colluders may tell the server everything, but must encrypt as the
    protocol says. Under an authority's keys, of which every silo has its own, the same attack gains
    nothing (``audit protocol --case authority_malformed_ciphertext``). If this test fails, because
    the attack does, mend the documentation."""
    made = cohort(3, values=64 * 4096)
    ring, shape = m.ring_of(made.header), m.shape_of(made.header)
    played, bits = Round(made), ring.scale_bits - 3
    secrets = played.silos["silo-003"]._secrets
    secrets._upload = malformed.upload(ring, shape, bits)
    secrets.encrypt = lambda joint: secrets._upload
    played.play()
    total = np.zeros((shape.chunks, 4096), dtype=np.uint64)
    for name in made.names:
        for step, kind, field in (
            (Step.UPLOAD, m.CipherUpload, "first"),
            (Step.UNMASK, m.Partial, "share"),
        ):
            message = msgspec.msgpack.decode(played.received[step, name], type=kind)
            ckks_ring.accumulate(total, getattr(message, field), ring)
    found = malformed.read_secrets(ring, shape, total, bits)
    stolen = msgspec.msgpack.decode(played.received[Step.UPLOAD, VICTIM], type=m.CipherUpload)
    opened = malformed.open_with(ring, shape, found, stolen.first, stolen.second)
    np.testing.assert_array_equal(opened, made.vectors[VICTIM])


@pytest.mark.parametrize("vouching", [(), (OTHER,)])
def test_nobody_decrypts_a_single_ciphertext(vouching) -> None:
    """Adversary: a server that asks to decrypt the victim's ciphertext as if it were the sum, and
    a silo that vouches for it. Every chunk has an honest verifier who says otherwise."""
    made = cohort(4)
    played = Round(made).until(Step.AGREE)
    second = played.coordinator._seconds[made.roster.index(VICTIM)]
    digests = m.polynomial_digests(second, SIZE)
    played.exchange()
    verdicts = dict(played.coordinator._verdicts)
    for name in vouching:
        index = made.roster.index(name)
        mine = m.assigned(index, (1, 2, 3, 4), 1, 2)
        assert mine  # this colluder does have a say
        lie = b"".join(digests[32 * k : 32 * k + 32] for k in mine)
        verdicts[index] = sign_as(made, name, verdicts[index], sums=lie)
    evil = m.Aggregate(tuple(verdicts.values()), second).encode()
    fails(played, request=lambda step, name, frame: evil)
    assert played.shares == []
    honest = [why for name, why in played.refused.items() if name not in vouching]
    assert len(honest) == 4 - len(vouching)
    assert all("does not vouch for" in why for why in honest)


def test_beyond_the_collusion_threshold_a_silo_still_fails_with_an_error_of_ours() -> None:
    """Adversary: both verifiers of a chunk, one more than the study allows, who vouch for bytes
    that are no polynomial."""
    made = cohort(4, values=10)
    played = Round(made).until(Step.UNMASK)
    junk = b"\xff" * SIZE
    verdicts = dict(played.coordinator._verdicts)
    for index in (1, 2):
        name = made.names[index - 1]
        verdicts[index] = sign_as(made, name, verdicts[index], sums=sha256(junk))
    evil = m.Aggregate(tuple(verdicts.values()), junk).encode()
    fails(played, request=lambda step, name, frame: evil)
    assert "not below the modulus" in played.refused["silo-003"]
    assert played.shares == []


def test_one_chunk_swapped_is_enough_to_be_refused() -> None:
    """Adversary: a server that sums honestly but for one chunk, which is the victim's alone."""
    made = cohort(4)
    played = Round(made).until(Step.AGREE)
    second = played.coordinator._seconds[made.roster.index(VICTIM)]

    def change(message: m.Aggregate) -> dict[str, bytes]:
        return {"second": message.second[:SIZE] + second[SIZE:]}

    fails(played, request=at(Step.UNMASK, None, edit(m.Aggregate, change)))
    assert played.shares == []
    assert all("group 1 is not the sum" in why for why in played.refused.values())


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
                msgspec.structs.replace(r.entries[3], part=r.entries[0].part),
            )
        },
        "key part with a bad signature",
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
    "a verdict altered": (
        Step.UNMASK,
        lambda r: {
            "verdicts": (
                *r.verdicts[:3],
                msgspec.structs.replace(r.verdicts[3], sums=r.verdicts[2].sums),
            )
        },
        "verdict with a bad signature",
    ),
    "an empty aggregate": (Step.UNMASK, lambda r: {"second": b""}, "another length"),
    "a short aggregate": (Step.UNMASK, lambda r: {"second": r.second[:-1]}, "does not vouch for"),
    "a flipped bit": (
        Step.UNMASK,
        lambda r: {"second": flipped(r.second)},
        "group 0 is not the sum",
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


def test_a_cloned_silo_does_not_answer_twice() -> None:
    """Adversary: a server that restores a snapshot of the victim, for a second share with other
    flooding noise (their average has less of it), or for a second ciphertext."""
    for step in (Step.ENCRYPT, Step.UPLOAD, Step.UNMASK):
        made = cohort(4)
        played = Round(made).until(step)
        side = played.silos[VICTIM]
        frame = played.coordinator.requests()[VICTIM]
        clone = silo(made, VICTIM)
        clone.__dict__.update({k: v for k, v in vars(side).items() if k != "_secrets"})
        secrets = vars(side._secrets) | {"_seal": Seal(side._ring)}
        clone._secrets = object.__new__(type(side._secrets))
        clone._secrets.__dict__.update(secrets)
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
