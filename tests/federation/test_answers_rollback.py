"""Disks of silos whose records vote over the network: older copies put back, heads, a full disk."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from securefedcollm.errors import EvidenceError, StateError
from securefedcollm.evidence.entries import Voting, decode_entry, encode_entry
from securefedcollm.federation.questions import answering, records
from securefedcollm.federation.questions.prepaid import has_prepaid
from securefedcollm.privacy import journal
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import digest
from tests.support.network import log_of
from tests.support.polling import QUESTION, RECORDS, record
from tests.support.vote_network import SILOS, SignedVoters, VoteNetwork, begun, called


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> SignedVoters:
    return SignedVoters(tmp_path_factory.mktemp("signed"), questions=6)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(answering, "SLOT", 0.01)


@pytest.fixture
def network(signed: SignedVoters, tmp_path: Path) -> Iterator[VoteNetwork]:
    made = begun(signed, tmp_path)
    yield made
    made.close()


def test_an_older_ledger_ends_the_silos_process(network):
    """Adversary: an operator who puts back the ledger of answers, or the silo's own."""
    home = network.homes["silo-2"]
    (answers,) = home.glob("ledger.answers-*.sqlite")
    network.kill("silo-2")
    kept = {file: file.read_bytes() for file in home.glob("ledger*.sqlite")}
    network.start("silo-2")
    network.poll()
    network.kill("silo-2")
    newer = {file: file.read_bytes() for file in kept}
    answers.write_bytes(kept[answers])
    network.start("silo-2")
    with pytest.raises(EvidenceError, match="does not contain"):
        network.relay.turn()
    network.kill("silo-2")
    answers.write_bytes(newer[answers])
    (home / "ledger.sqlite").unlink()
    (home / "ledger.key").unlink()
    with pytest.raises(StateError, match="does not say that the answers"):
        network.start("silo-2")
    (home / "ledger.sqlite").write_bytes(newer[home / "ledger.sqlite"])


def test_heads_in_evidence_tell_nothing_of_a_record_that_joined(network, monkeypatch):
    """Adversary: a reader of the evidence, who compares the head of the silo's own ledger before
    and after a restart: with a record more that can pay, and without.

    Control: where a start writes nothing by itself, it is the same if nobody new paid.
    """

    def heads() -> list[int]:
        found = [e.what.prepaid for e in log_of(network, "silo-2") if isinstance(e.what, Voting)][
            -3:
        ]
        return [found.index(head) for head in found]

    patterns = {}
    for start in ("noted", "silent"):
        if start == "silent":
            monkeypatch.setattr(records, "begin_answering", lambda own, *_: own.head.digest)
            network.restart("silo-2")
        for more in (None, record(f"w9 {start}", "w50")):
            network.poll(words="w90 w91")
            network.kill("silo-2")
            own = network.shelves["silo-2"]
            network.shelves["silo-2"] = own if more is None else [*own, more]
            network.start("silo-2")
            network.now += 70
        network.poll(words="w90 w91")
        patterns[start] = heads()
    assert patterns == {"noted": [0, 1, 2], "silent": [0, 0, 2]}


def _copy(source: Path, target: Path) -> None:
    if source.is_dir():
        shutil.copytree(source, target, symlinks=True)
    else:
        shutil.copy(source, target)


def test_an_older_pair_of_evidence_and_answers_ends_the_silos_process(network):
    """Adversary: a backup that puts back all but the silo's own ledger, so that evidence and ledger
    of answers agree."""
    home = network.homes["silo-2"]
    network.poll(words="w90 w91")
    network.kill("silo-2")
    older = [home / "studies", *home.glob("ledger.answers-*.sqlite")]
    kept = home.parent / "kept"
    kept.mkdir()
    for path in older:
        _copy(path, kept / path.name)
    network.start("silo-2")
    network.now += 70
    network.poll()
    network.restart("silo-2")  # notes that answer
    network.kill("silo-2")
    for path in older:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
        _copy(kept / path.name, path)
    with pytest.raises(EvidenceError, match="older than silo-2's own ledger"):
        network.start("silo-2")
    network.stacks.pop("silo-2").close()


def test_a_ledger_from_before_a_later_prepayment_ends_the_silos_process(network):
    """Adversary: an operator who puts back the silo's own ledger, so that records which were added
    to its file, and have answered, have their whole budget again.

    Control: some prepayment of the study is in the older copy too.
    """
    home, study = network.homes["silo-2"], network.members["silo-2"].study
    book = home / "ledger.sqlite"
    network.kill("silo-2")
    older = book.read_bytes()
    network.shelves["silo-2"] = [*RECORDS["silo-2"], record("w9 w9", "w50")]
    network.start("silo-2")
    network.poll()
    network.kill("silo-2")
    newer = book.read_bytes()
    book.write_bytes(older)
    with Ledger(book, "silo-2") as ledger:
        assert has_prepaid(ledger, book, digest(study))
    with pytest.raises(StateError, match="is older than"):
        network.start("silo-2")
    book.write_bytes(newer)
    network.start("silo-2")
    network.now += 70
    assert network.poll(words="w90 w91").survivors == SILOS
    # Evidence of an older version, which did not say it, reads as it was written.
    entry = next(entry for entry in log_of(network, "silo-2") if isinstance(entry.what, Voting))
    old = msgspec.structs.replace(entry, what=msgspec.structs.replace(entry.what, prepaid=None))
    raw = encode_entry(old)
    assert b"prepaid" in encode_entry(entry)
    assert b"prepaid" not in raw
    assert decode_entry(raw, "") == old


def test_a_full_disk_refuses_before_any_record_is_looked_at(network, monkeypatch):
    """Adversary: an asker of a silo whose disk is about full, where a larger set would not fit.

    Control: without the check the same question is answered.
    """
    network.poll(words="w90 w91")
    booth = network.ports["silo-2"]._answering
    looked, free = [], [0]
    real = booth.shelf.index.retrieved
    monkeypatch.setattr(booth.shelf.index, "retrieved", lambda *a: looked.append(1) or real(*a))
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(journal, "disk_usage", lambda _: usage._replace(free=free[0]))
    for words in (QUESTION, "w90 w91"):
        assert called(network, words, ("server",)) == ["declined"]
    assert not looked
    free[0] = usage.free
    assert called(network, QUESTION, ("server",)) == ["ready"]
    assert looked


def test_what_cannot_be_given_back_ends_no_call(network, monkeypatch, caplog):
    """Adversary: an asker that begins questions and leaves them, at a silo whose disk is full.

    Control: giving back was tried.
    """
    network.poll(words="w90 w91")
    assert called(network, QUESTION, ("server",)) == ["ready"]
    tried = []

    def full(*_: Any) -> None:
        tried.append(1)
        raise StateError("no space left on the device", hint="make room")

    monkeypatch.setattr(network.ports["silo-2"]._answering.ledger, "void", full)
    network.now += 400
    assert called(network, QUESTION, ("server",)) == ["ready"]
    assert tried
    assert "could not be given back" in caplog.text
