"""Make the protocol's test vectors: ``python -m tests.vectors.generate`` writes ``v1/*.json``.

Positive vectors carry the randomness they were made with; ``bad_*`` hold frames and values that an
implementation must refuse. Byte strings are hex, integers are JSON numbers or, from 2^53 on, hex.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from securefedcollm_audits.protocol.cohort import Cohort, altered, play, recorded

from securefedcollm.aggregation.header import RingParameters, RoundHeader
from securefedcollm.aggregation.masking import keys, masks, packing, shamir
from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.masking.messages import Deal, Delivery, Opening, Survey, Unmask
from securefedcollm.aggregation.messages import decode, lists_digest
from securefedcollm.aggregation.steps import TRANSITIONS, Step
from securefedcollm.primitives import AgreementKey, Keystream, RandomSource, sha256

HERE = Path(__file__).parent / "v1"
Json: TypeAlias = Any


class Recorder:
    """A random source that remembers what it gave out."""

    def __init__(self, source: RandomSource) -> None:
        self.source = source
        self.given: list[str] = []

    def __call__(self, count: int) -> bytes:
        drawn = self.source(count)
        self.given.append(drawn.hex())
        return drawn


def parameters_json(parameters: RingParameters) -> Json:
    return {name: getattr(parameters, name) for name in parameters.__struct_fields__}


def header_json(header: RoundHeader) -> Json:
    return {
        "suite": header.suite,
        "study_digest": header.study_digest.hex(),
        "run_id": header.run_id.hex(),
        "round": header.round,
        "attempt": header.attempt,
        "model_digest": header.model_digest.hex(),
        "parameters": parameters_json(header.parameters),
        "roster_root": header.roster_root.hex(),
    }


def packing_vectors() -> Json:
    cases: list[Json] = []
    for values, bound, bits in ((5, 1, 16), (7, 1000, 21), (9, 100, 13), (4, 2**31 - 1, 64)):
        shape = Cohort(values=values, bound=bound, field_bits=bits).header.parameters
        noise = Keystream(sha256(b"packing")).words(values) % np.uint64(2 * bound + 1)
        vector = noise.astype(np.int64) - bound
        words = np.empty(shape.words, dtype="<u8")
        packing.pack(vector, shape, words)
        cases.append(
            {
                "parameters": parameters_json(shape),
                "vector": vector.tolist(),
                "words": words.tobytes().hex(),
            }
        )
    return cases


def mask_vectors() -> Json:
    key = sha256(b"mask key")
    words = np.zeros(20_000, dtype="<u8")
    masks.apply(words, add=[key])
    return {
        "key": key.hex(),
        "first_words": words[:4].tobytes().hex(),
        "words_16384_to_16387": words[16384:16388].tobytes().hex(),
        "sha256_of_20000_words": sha256(words.tobytes()).hex(),
    }


def shamir_vectors() -> Json:
    cases: list[Json] = []
    for threshold, holders in ((2, (1, 2, 3)), (3, (1, 4, 9, 128)), (5, tuple(range(2, 9)))):
        recorder = Recorder(recorded(f"shamir {threshold}"))
        secret = sha256(b"secret", bytes([threshold]))
        shares = shamir.deal(secret, threshold, holders, recorder)
        cases.append(
            {
                "secret": secret.hex(),
                "threshold": threshold,
                "holders": list(holders),
                "random": recorder.given[0],
                "shares": [share.hex() for share in shares],
                "weights_of_first": [f"{w:066x}" for w in shamir.weights(holders[:threshold])],
            }
        )
    return cases


def key_vectors() -> Json:
    a, b = AgreementKey(sha256(b"a")), AgreementKey(sha256(b"b"))
    header, transcript, seed = sha256(b"header"), sha256(b"transcript"), sha256(b"seed")
    share = bytes(33)
    return {
        "secret_of_1": sha256(b"a").hex(),
        "public_of_1": a.public.hex(),
        "secret_of_2": sha256(b"b").hex(),
        "public_of_2": b.public.hex(),
        "header": header.hex(),
        "transcript": transcript.hex(),
        "seed": seed.hex(),
        "box_key_1_to_2": keys.box_key(a, b.public, header, transcript, 1, 2).hex(),
        "box_associated_1_to_2": keys.box_associated(header, transcript, 1, 2).hex(),
        "pair_mask_key": keys.pair_mask_key(a, b.public, header, transcript, 1, 2).hex(),
        "self_mask_key_of_1": keys.self_mask_key(seed, header, transcript, 1).hex(),
        "seed_commitment_of_1": keys.seed_commitment(header, 1, seed).hex(),
        "share": share.hex(),
        "seed_share_commitment_1_to_2": keys.share_commitment(header, 1, 2, "seed", share).hex(),
        "key_share_commitment_1_to_2": keys.share_commitment(header, 1, 2, "key", share).hex(),
        "lists_1_3_and_2": lists_digest(transcript, (1, 3), (2,)).hex(),
    }


def round_vectors() -> Json:
    """Five silos, the first one lost at upload; every frame in both directions."""
    cohort = Cohort(label="vectors")
    recorders = {name: Recorder(cohort.randomness(name, cohort.header)) for name in cohort.names}
    silos = {name: cohort.silo(name, random=recorders[name]) for name in cohort.names}
    frames: dict[str, dict[str, dict[str, str]]] = {step.value: {} for step in TRANSITIONS}

    def request(step: Step, name: str, frame: bytes) -> bytes | None:
        if step is Step.UPLOAD and name == cohort.names[0]:
            return None
        frames[step.value][name] = {"request": frame.hex()}
        return frame

    def reply(step: Step, name: str, frame: bytes) -> bytes:
        frames[step.value][name]["reply"] = frame.hex()
        return frame

    coordinator = CoordinatorRound(header=cohort.header, roster=cohort.roster)
    result = play(silos, coordinator, request=request, reply=reply)
    return {
        "header": header_json(cohort.header),
        "header_digest": cohort.header.digest.hex(),
        "attempt_scope": cohort.header.attempt_scope.hex(),
        "round_scope": cohort.header.round_scope.hex(),
        "roster": {name: key.public.hex() for name, key in cohort.keys.items()},
        "silos": {
            name: {
                "identity_seed": cohort.keys[name].seed().hex(),
                "vector": cohort.vectors[name].tolist(),
                "random": list(recorders[name].given),
                "journal": {k.hex(): v.hex() for k, v in cohort.journals[name].entries.items()},
            }
            for name in cohort.names
        },
        "frames": frames,
        "survivors": list(result.survivors),
        "dropouts": list(result.dropouts),
        "transcript": result.transcript.hex(),
        "sum": result.sum.tolist(),
    }


def bad_requests() -> Json:
    """Requests that the second silo of ``round.json`` must refuse, with the step it is in."""
    good = round_vectors()["frames"]
    name = "silo-002"
    asked = {step: bytes.fromhex(frames[name]["request"]) for step, frames in good.items()}
    survey = decode(Survey, asked["agree"], "server")
    opening = decode(Opening, asked["unmask"], "server")
    delivery = decode(Delivery, asked["upload"], "server")
    swapped = (delivery.parcels[1], delivery.parcels[0], *delivery.parcels[2:])
    bad: dict[str, tuple[str, bytes]] = {
        "empty": ("advertise", b""),
        "trailing byte": ("advertise", asked["advertise"] + b"\0"),
        "another step": ("advertise", asked["share"]),
        "truncated": ("share", asked["share"][:-1]),
        "non-canonical tag": ("share", asked["share"].replace(b"\xa4roll", b"\xd9\x04roll", 1)),
        "signature altered": ("share", _flipped(asked["share"], b"\xc4\x40")),
        "parcels swapped": ("upload", altered(delivery, parcels=swapped).encode()),
        "a dealer without parcel": (
            "upload",
            altered(delivery, parcels=delivery.parcels[1:]).encode(),
        ),
        "a silo on both lists": ("agree", altered(survey, dropouts=(1, 2)).encode()),
        "below the quorum": (
            "agree",
            Survey(survivors=(2, 3, 4), dropouts=(1, 5)).encode(),
        ),
        "this silo lost": ("agree", Survey(survivors=(1, 3, 4, 5), dropouts=(2,)).encode()),
        "other lists": (
            "unmask",
            altered(opening, survivors=(1, 2, 3, 4, 5), dropouts=()).encode(),
        ),
        "too few agreements": (
            "unmask",
            altered(opening, agreements=opening.agreements[1:]).encode(),
        ),
        "an agreement twice": (
            "unmask",
            altered(opening, agreements=(opening.agreements[0], *opening.agreements[:3])).encode(),
        ),
    }
    return {
        title: {"step": step, "silo": name, "request": frame.hex()}
        for title, (step, frame) in bad.items()
    }


def bad_replies() -> Json:
    """Replies of the second silo of ``round.json`` that the coordinator must refuse."""
    good = round_vectors()["frames"]
    name = "silo-002"
    said = {step: bytes.fromhex(frames[name]["reply"]) for step, frames in good.items()}
    deal = decode(Deal, said["share"], name)
    unmask = decode(Unmask, said["unmask"], name)
    bad: dict[str, tuple[str, bytes]] = {
        "empty": ("advertise", b""),
        "signature altered": ("advertise", _flipped(said["advertise"], b"\xc4\x40")),
        "another index": ("advertise", said["advertise"].replace(b"\x02\xc4", b"\x03\xc4", 1)),
        "parcels swapped": (
            "share",
            altered(deal, parcels=(deal.parcels[1], deal.parcels[0], *deal.parcels[2:])).encode(),
        ),
        "a word too few": ("upload", said["upload"][:-8]),
        "a word altered": ("upload", said["upload"][:-1] + bytes([said["upload"][-1] ^ 1])),
        "another magic": ("upload", b"X" + said["upload"][1:]),
        "signature of another step": ("agree", said["unmask"]),
        "a share altered": (
            "unmask",
            altered(unmask, shares=(bytes(33), *unmask.shares[1:])).encode(),
        ),
    }
    return {
        title: {"step": step, "silo": name, "reply": frame.hex()}
        for title, (step, frame) in bad.items()
    }


def _flipped(frame: bytes, before: bytes) -> bytes:
    at = frame.index(before) + len(before)
    return frame[:at] + bytes([frame[at] ^ 1]) + frame[at + 1 :]


VECTORS = {
    "packing": packing_vectors,
    "masks": mask_vectors,
    "shamir": shamir_vectors,
    "keys": key_vectors,
    "round": round_vectors,
    "bad_requests": bad_requests,
    "bad_replies": bad_replies,
}


def render(name: str) -> str:
    """The text of one vector file."""
    return json.dumps(VECTORS[name](), indent=1) + "\n"


def main() -> None:
    HERE.mkdir(exist_ok=True)
    for name in VECTORS:
        (HERE / f"{name}.json").write_text(render(name))


if __name__ == "__main__":
    main()
