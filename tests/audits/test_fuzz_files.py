"""The fuzz targets for files: a few inputs of each, what they must find, what they once found."""

from __future__ import annotations

import contextlib
import json
import re
import sys
import time
from itertools import count

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from securefedcollm_audits.fuzz import files as fuzz_files
from securefedcollm_audits.fuzz import retrieval as fuzz_retrieval
from securefedcollm_audits.fuzz import seeds as seeds
from securefedcollm_audits.fuzz import targets as fuzz
from securefedcollm_audits.report.report import make_report
from securefedcollm_audits.verification.charged import decode_events
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.evidence.bundle import decode_bundle, pack
from securefedcollm.evidence.entries import canonical
from securefedcollm.federation.questions.relay import Relay
from securefedcollm.study import study_from_tree

TARGETS = fuzz_files.TARGETS | fuzz_retrieval.TARGETS


@pytest.mark.parametrize("target", TARGETS)
@settings(max_examples=15, deadline=None)
@given(script=st.binary(max_size=fuzz_files.LONGEST))
def test_no_script_breaks_a_reader(target, script):
    fuzz_files.bounded(TARGETS[target], fuzz_files.SECONDS, script)


def test_the_target_of_pictures_reads_what_is_whole(monkeypatch):
    monkeypatch.setattr(fuzz_files, "altered", lambda content, dice: content)
    assert {fuzz_files.picture(bytes([form])) for form in range(5)} == {"read"}
    monkeypatch.setattr(fuzz_files, "altered", lambda content, dice: content[:60])
    assert fuzz_files.picture(b"") == "refused"


def test_the_target_of_recordings_reads_what_is_whole(monkeypatch):
    monkeypatch.setattr(fuzz_files, "altered", lambda content, dice: content)
    assert {fuzz_files.sound(bytes([form])) for form in range(2)} == {"read"}
    monkeypatch.setattr(fuzz_files, "altered", lambda content, dice: content[:60])
    assert fuzz_files.sound(b"") == "refused"


def unaltered(monkeypatch):
    monkeypatch.setattr(fuzz_retrieval, "altered", lambda content, dice: content)


def test_the_targets_of_questions_read_what_is_whole(monkeypatch):
    """Else they would only ever look at refusals."""
    unaltered(monkeypatch)
    assert fuzz_retrieval.question(b"") == "answered"
    assert fuzz_retrieval.letters(bytes([1, 1, 0, 99])) == "1 passed on"
    assert fuzz_retrieval.index(b"") == fuzz_retrieval.reduction(b"") == "read"
    assert fuzz_retrieval.quota(b"") == "spent"


class Lax(Relay):
    """Passes everything on."""

    def _may(self, sender, letter):
        return True


def test_what_the_targets_of_questions_look_for_is_a_finding(monkeypatch):
    """Each of them, where the product does not do what it should."""
    with monkeypatch.context() as patch:
        patch.setattr("securefedcollm.retrieval.shelf.verify", lambda *any_signature: None)
        patch.setattr(
            fuzz_retrieval, "altered", lambda frame, dice: frame[:-1] + bytes([frame[-1] ^ 1])
        )
        with pytest.raises(fuzz_files.FoundError, match=r"counted|through"):
            fuzz_retrieval.question(b"")
    unaltered(monkeypatch)
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_retrieval, "Relay", Lax)
        with pytest.raises(fuzz_files.FoundError, match="that may not"):
            fuzz_retrieval.letters(bytes([1, 1, 0, 99]))
    with monkeypatch.context() as patch:
        patch.setattr(fuzz_retrieval.StoredQuota, "spent", lambda quota, asker: 0)
        with pytest.raises(fuzz_files.FoundError, match="questions were answered, 3 are the most"):
            fuzz_retrieval.quota(b"")
    for target, kind in ((fuzz_retrieval.index, "Index"), (fuzz_retrieval.reduction, "Reduction")):
        made = getattr(fuzz_retrieval, kind)
        first, whole = count(), made.encode
        with monkeypatch.context() as patch:
            patch.setattr(made, "encode", lambda it, w=whole, n=first: w(it) + bytes(next(n)))
            with pytest.raises(fuzz_files.FoundError, match="as another"):
                target(b"")


def test_a_count_whose_schema_is_no_text_ends_in_one_line():
    """SQLite quotes the file's bytes in its message, which Python could not decode."""
    script = bytes.fromhex(
        "1373f253dc6410ed4aa10367e82e0fb81ba3f980e95ab429182b1664793859c6d8b77af628001e3dcaebbd3a6ba6"
        "0b09e175c3ed5765399622"
    )
    assert fuzz_retrieval.quota(script) in {"StateError", "spent"}


def test_what_the_targets_start_from_is_read(tmp_path):
    """Else they would only ever look at refusals."""
    path = tmp_path / "evidence.zip"
    path.write_bytes(seeds.bundle())
    assert set(decode_bundle(seeds.bundle(), path).logs) == set(seeds.NAMES)
    assert fuzz_files._looked_at(path) == "checked"
    assert study_from_tree(seeds.STUDY).study == "fuzz"


def test_a_footer_that_ended_the_process_ends_in_one_line():
    """Arrow threw across C++ when it was asked for the size of a column."""
    script = bytes.fromhex("bc7797186458ea6fd219b670557fd926f5aa9deee237b88a")
    assert fuzz_files.data(script) in {"DataError", "read"}


@pytest.mark.parametrize("kind", ["image_classification", "audio_classification"])
def test_a_long_text_among_numbers_ends_in_one_line(kind, monkeypatch):
    """NumPy made every number as wide as the text: two gigabytes of half a megabyte."""
    monkeypatch.setattr(fuzz_files, "altered", lambda content, dice: b"")
    made = []
    whole = seeds.crowded
    monkeypatch.setattr(seeds, "crowded", lambda *how: made.append(how) or whole(*how))
    script = bytes([tuple(seeds.ROWS).index(kind), 0, 1, 1, 7, 255, 255])
    assert fuzz_files.bounded(fuzz_files.data, fuzz_files.SECONDS, script) == "DataError"
    assert made == [(kind, (1 << 19) - 1)]


def test_a_slow_reader_a_large_one_and_an_error_that_acts_are_findings():
    def large(script):
        return str(len(bytearray(fuzz_files.BYTES + (1 << 28))))

    def acts(script):
        error = ConfigError("x")
        error.hint = "\x1b[2J"
        return fuzz_files.harmless(error)

    with pytest.raises(fuzz_files.SlowError):
        fuzz_files.bounded(lambda script: time.sleep(0) or spin(), 0.2, b"")
    with pytest.raises(fuzz_files.FoundError, match="one printable line"):
        fuzz_files.bounded(acts, 5.0, b"")
    if fuzz_files._peak() < fuzz_files.BYTES:  # else an earlier test was larger
        with pytest.raises(fuzz_files.FoundError, match="memory"):
            fuzz_files.bounded(large, 5.0, b"")


def spin():
    while True:
        pass


def test_the_program_replays_an_input(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fuzz", "--target", "study", "--input", ""])
    fuzz.main()
    assert capsys.readouterr().out in {"read\n", "ConfigError\n"}


GAUSSIAN = {"kind": "gaussian", "noise_multiplier": 1.0, "count": 1}
POISSON = {"kind": "poisson-gaussian", "q": 0.1, "noise_multiplier": 1.0, "steps": 5}
DISCRETE = {
    "kind": "discrete-gaussian",
    "share_sigma": 100.0,
    "sensitivity": 10,
    "values": 1000,
    "shares": 3,
    "colluders": 1,
    "count": 1,
    "q": 1.0,
}
GREEDY = [
    GAUSSIAN | {"count": 2**31},
    GAUSSIAN | {"count": 10**6},
    GAUSSIAN | {"noise_multiplier": 1e-300},
    POISSON | {"steps": 2**31},
    POISSON | {"noise_multiplier": 0.001},
    POISSON | {"noise_multiplier": 1e300},
    POISSON | {"q": 1.0, "steps": 10**6},
    DISCRETE | {"shares": 2**31},
    DISCRETE | {"values": 2**52},
    DISCRETE | {"sensitivity": 2**31},
    DISCRETE | {"q": 0.1, "sensitivity": 2**31},
    DISCRETE | {"share_sigma": 1e300},
]
GREEDY += [e | {"kind": "rounded-gaussian"} for e in GREEDY if e["kind"] == "discrete-gaussian"]
"""Each had an accountant run for minutes, or ask for terabytes."""


TOO_MUCH = r"no run releases|more than can be computed|must be at most"


def forged(path, name, kind, **changes):
    """A bundle in which the first entry of a kind says something else."""
    members = seeds.bundle_members()
    entries = [json.loads(line) for line in members[f"logs/{name}.jsonl"].splitlines()]
    entry = next(e for e in entries if e["what"]["kind"] == kind)
    entry["what"].update(changes)
    members[f"logs/{name}.jsonl"] = b"".join(canonical(e) + b"\n" for e in entries)
    path.write_bytes(pack(members))
    return path


@pytest.mark.parametrize("kind", ["reserved", "settled"])
@pytest.mark.parametrize("event", GREEDY, ids=lambda e: str({**e})[9:60])
def test_an_event_that_no_run_releases_counts_against_the_bundle(tmp_path, event, kind):
    """Adversary: a bundle's maker, against the memory and patience of the auditor."""
    path = forged(tmp_path / "evidence.zip", "silo-1", kind, events=[event])

    verdict = verify(path)
    assert not verdict.holds
    if kind == "reserved":  # of which nothing is counted once it is settled
        with contextlib.suppress(EvidenceError):
            make_report(path)
        return
    said = [fault for result in verdict.failed for fault in result.faults]
    assert any(re.search(TOO_MUCH, text) for text in said)
    with pytest.raises(EvidenceError, match=TOO_MUCH):
        make_report(path)


def test_events_of_honest_runs_are_within_the_bounds():
    for event in (
        GAUSSIAN,
        POISSON,
        DISCRETE,
        POISSON | {"steps": 10**6, "noise_multiplier": 50.0},
    ):
        assert decode_events([event])


def test_a_round_beyond_all_numbers_is_not_counted_up_to(tmp_path):
    path = forged(tmp_path / "evidence.zip", "server", "opening", round=2**53 - 1)
    report, _ = make_report(path)
    assert len(report.rounds) < 20
