"""The published vectors: the generator makes exactly them, and the implementation agrees."""

from __future__ import annotations

import hashlib
import hmac
import json
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from securefedcollm_audits.protocol.cohort import MemoryJournal

from securefedcollm.aggregation import TRANSITIONS
from securefedcollm.aggregation.header import RingParameters, Roster, RoundHeader
from securefedcollm.aggregation.masking import packing, shamir
from securefedcollm.aggregation.masking.coordinator import CoordinatorRound
from securefedcollm.aggregation.masking.silo import SiloRound
from securefedcollm.aggregation.steps import Step
from securefedcollm.errors import RemoteProtocolError
from securefedcollm.primitives import AgreementKey, Keystream, SigningKey, sha256

from . import protocol_page
from .generate import HERE, VECTORS, render

STEPS = [step.value for step in TRANSITIONS]
unhex = bytes.fromhex


def load(name: str) -> Any:
    return json.loads((HERE / f"{name}.json").read_text())


@pytest.mark.parametrize("name", VECTORS)
def test_the_files_are_what_the_generator_makes(name: str) -> None:
    assert (HERE / f"{name}.json").read_text() == render(name), (
        "run python -m tests.vectors.generate and review the difference"
    )


def test_no_file_is_left_over() -> None:
    assert {path.stem for path in HERE.glob("*.json")} == set(VECTORS)


def recorded(pieces: list[str]) -> Callable[[int], bytes]:
    left = [unhex(piece) for piece in pieces]

    def read(count: int) -> bytes:
        piece = left.pop(0)
        assert len(piece) == count
        return piece

    return read


def make_header() -> tuple[RoundHeader, Roster]:
    vector = load("round")
    fields = vector["header"]
    roster = Roster({name: unhex(key) for name, key in vector["roster"].items()})
    header = RoundHeader(
        study_digest=unhex(fields["study_digest"]),
        run_id=unhex(fields["run_id"]),
        round=fields["round"],
        attempt=fields["attempt"],
        model_digest=unhex(fields["model_digest"]),
        parameters=RingParameters(**fields["parameters"]),
        roster_root=unhex(fields["roster_root"]),
        suite=fields["suite"],
    )
    return header, roster


def make_silo(name: str) -> tuple[SiloRound, MemoryJournal]:
    header, roster = make_header()
    silo = load("round")["silos"][name]
    journal = MemoryJournal()
    side = SiloRound(
        header=header,
        roster=roster,
        name=name,
        signing_key=SigningKey(unhex(silo["identity_seed"])),
        vector=np.array(silo["vector"], dtype=np.int64),
        vector_id=sha256(np.array(silo["vector"], dtype=np.int64).tobytes()),
        journal=journal,
        random=recorded(silo["random"]),
    )
    return side, journal


@pytest.mark.parametrize("name", [f"silo-00{i}" for i in range(1, 6)])
def test_a_silo_replays_the_round(name: str) -> None:
    vector = load("round")
    side, journal = make_silo(name)
    for step in STEPS:
        if name in vector["frames"][step]:
            frames = vector["frames"][step][name]
            assert side.handle(unhex(frames["request"])).hex() == frames["reply"]
    entries = {key.hex(): value.hex() for key, value in journal.entries.items()}
    assert entries == vector["silos"][name]["journal"]


def test_the_coordinator_replays_the_round() -> None:
    vector = load("round")
    header, roster = make_header()
    assert header.digest.hex() == vector["header_digest"]
    coordinator = CoordinatorRound(header=header, roster=roster)
    for step in STEPS:
        for name, request in coordinator.requests().items():
            if name in vector["frames"][step]:
                assert request.hex() == vector["frames"][step][name]["request"]
                coordinator.receive(name, unhex(vector["frames"][step][name]["reply"]))
        coordinator.advance()
    result = coordinator.result
    assert result.sum.tolist() == vector["sum"]
    assert list(result.survivors) == vector["survivors"]
    assert list(result.dropouts) == vector["dropouts"]
    assert result.transcript.hex() == vector["transcript"]
    plain = np.sum([vector["silos"][name]["vector"] for name in vector["survivors"]], axis=0)
    assert plain.tolist() == vector["sum"]


@pytest.mark.parametrize("title", load("bad_requests"))
def test_bad_requests_are_refused(title: str) -> None:
    frames = load("round")["frames"]
    bad = load("bad_requests")[title]
    side, _ = make_silo(bad["silo"])
    for step in STEPS[: STEPS.index(bad["step"])]:
        side.handle(unhex(frames[step][bad["silo"]]["request"]))
    with pytest.raises(RemoteProtocolError):
        side.handle(unhex(bad["request"]))
    assert side.step is Step.FAILED


@pytest.mark.parametrize("title", load("bad_replies"))
def test_bad_replies_are_refused(title: str) -> None:
    frames = load("round")["frames"]
    bad = load("bad_replies")[title]
    header, roster = make_header()
    coordinator = CoordinatorRound(header=header, roster=roster)
    for step in STEPS[: STEPS.index(bad["step"])]:
        for name, pair in frames[step].items():
            coordinator.receive(name, unhex(pair["reply"]))
        coordinator.advance()
    with pytest.raises(RemoteProtocolError):
        coordinator.receive(bad["silo"], unhex(bad["reply"]))
    assert bad["silo"] in coordinator.excluded


def test_packing_in_plain_integers() -> None:
    """The packing vectors, by the formula of the protocol page instead of by array operations."""
    for case in load("packing"):
        shape = RingParameters(**case["parameters"])
        words = [0] * shape.words
        for i, value in enumerate(case["vector"]):
            field, word = divmod(i, shape.words)
            words[word] += (value + shape.bound) << field * shape.field_bits
        assert b"".join(word.to_bytes(8, "little") for word in words).hex() == case["words"]
        total = np.array(words, dtype=np.uint64)
        assert packing.unpack(total, shape, 1).tolist() == case["vector"]


def test_shares_in_plain_integers() -> None:
    for case in load("shamir"):
        noise = unhex(case["random"])
        coefficients = [
            int.from_bytes(noise[i : i + 48], "big") % shamir.PRIME
            for i in range(0, len(noise), 48)
        ]
        polynomial = [*coefficients, int(case["secret"], 16)]  # highest degree first
        degree = case["threshold"] - 1
        assert len(polynomial) == degree + 1
        for x, share in zip(case["holders"], case["shares"], strict=True):
            value = sum(c * x ** (degree - i) for i, c in enumerate(polynomial)) % shamir.PRIME
            assert value == int(share, 16)


def test_mask_words_are_the_keystream() -> None:
    case = load("masks")
    words = Keystream(unhex(case["key"])).words(4).tobytes().hex()
    assert words == case["first_words"]


def test_keys_by_the_formulas_of_the_page() -> None:
    """The key schedule once more, with nothing but the standard library."""
    case = load("keys")
    header, transcript = unhex(case["header"]), unhex(case["transcript"])

    def derive(secret: bytes, info: bytes) -> str:  # RFC 5869, one block of output
        extracted = hmac.digest(header, secret, "sha256")
        return hmac.digest(extracted, info + b"\1", "sha256").hex()

    def index(*values: int) -> bytes:
        return b"".join(value.to_bytes(2, "big") for value in values)

    def hashed(*parts: bytes) -> str:
        return hashlib.sha256(b"securefedcollm/v1/" + b"".join(parts)).hexdigest()

    secret = AgreementKey(unhex(case["secret_of_1"])).agree(unhex(case["public_of_2"]))
    prefix = b"securefedcollm/v1/"
    pair = derive(secret, prefix + b"pair\0" + transcript + index(1, 2))
    box = derive(secret, prefix + b"box\0" + transcript + index(1, 2))
    own = derive(unhex(case["seed"]), prefix + b"self\0" + transcript + index(1, 1))
    assert (pair, box) == (case["pair_mask_key"], case["box_key_1_to_2"])
    assert own == case["self_mask_key_of_1"]
    seed, share = unhex(case["seed"]), unhex(case["share"])
    assert hashed(b"seed-commitment\0", header, index(1, 1), seed) == case["seed_commitment_of_1"]
    for kind in ("seed", "key"):
        committed = hashed(b"share-commitment\0", header, index(1, 2), kind.encode() + b"\0", share)
        assert committed == case[f"{kind}_share_commitment_1_to_2"]
    lists = hashed(b"lists\0", transcript, index(2, 1), index(1, 3, 2))
    assert lists == case["lists_1_3_and_2"]


def test_the_protocol_page_is_up_to_date() -> None:
    page = protocol_page.PAGE.read_text()
    assert protocol_page.render(page) == page, "run python -m tests.vectors.protocol_page"
    assert "| R4 | `unmask` | `opening` | `unmask` | `done` |" in page
    assert "`agreement`" in page
