"""Entries, signed heads and the append-only log."""

from __future__ import annotations

import json
import sqlite3
import threading

import pytest

from securefedcollm.errors import CryptoError, EvidenceError, StateError
from securefedcollm.evidence.entries import (
    Failed,
    Lost,
    Opened,
    Refused,
    decode_canonical,
    decode_entry,
    encode_entry,
)
from securefedcollm.evidence.log import EvidenceLog
from securefedcollm.evidence.note import cosign, origin, parse_checkpoint, sign_checkpoint
from securefedcollm.primitives import SigningKey, merkle_root

STUDY = bytes(range(32))
KEY = SigningKey(b"k" * 32)
OTHER = SigningKey(b"o" * 32)


def open_log(directory, **changes):
    arguments = {"study": STUDY, "owner": "silo-1", "key": KEY, "now": lambda: 1e9}
    return EvidenceLog(directory / "evidence.sqlite", **(arguments | changes))


def test_what_was_appended_is_there_after_a_reopening_under_a_signed_head(tmp_path):
    log = open_log(tmp_path)
    log.append(Lost(round=0))
    log.append(Refused(error="BudgetExceeded"))
    second = open_log(tmp_path)  # another process
    second.append(Lost(round=1))
    log.append(Lost(round=2))
    assert [entry.seq for entry in log.entries] == [0, 1, 2, 3]
    again = open_log(tmp_path, key=None)
    assert again.leaves == log.leaves
    again.head.verify(KEY.public)
    assert (again.head.size, again.head.root) == (4, merkle_root(log.leaves))
    assert len(again.heads()) == 1  # earlier heads that nobody cosigned are superseded
    with pytest.raises(StateError, match="opened for reading"):
        again.append(Lost(round=3))


def test_a_log_that_another_process_is_just_creating_is_waited_for(tmp_path):
    other = sqlite3.connect(
        tmp_path / "evidence.sqlite", isolation_level=None, check_same_thread=False
    )
    other.execute("BEGIN IMMEDIATE")  # SQLite answers the change into WAL at once: locked
    release = threading.Timer(0.2, other.execute, ["COMMIT"])
    release.start()
    open_log(tmp_path).append(Lost(round=0))
    release.join()
    other.close()


def test_cosigned_heads_are_kept(tmp_path):
    log = open_log(tmp_path)
    log.append(Lost(round=0))
    name = origin(STUDY, "silo-2")
    log.add_cosignatures(1, {name: cosign(log.head, name, OTHER, 77)})
    # A server that died before it was done asks again: one line of each witness stays.
    log.add_cosignatures(1, {name: cosign(log.head, name, OTHER, 78)})
    assert len(log.head.lines) == 2
    log.append(Lost(round=1))
    first, second = log.heads()
    assert (first.size, second.size) == (1, 2)
    assert first.verify_cosigned(name, OTHER.public) == 77
    with pytest.raises(CryptoError, match="no signature by"):
        second.verify_cosigned(name, OTHER.public)


def test_the_file_refuses_updates_and_a_forced_one_is_found(tmp_path):
    log = open_log(tmp_path)
    log.append(Lost(round=0))
    log.append(Lost(round=1))
    log.close()
    db = sqlite3.connect(tmp_path / "evidence.sqlite")
    for change in ("DELETE FROM entries", "UPDATE entries SET body = x'00'"):
        with pytest.raises(sqlite3.IntegrityError, match="append-only"):
            db.execute(change)
    db.execute("DROP TRIGGER entries_keep")
    forged = log.leaves[0].replace(b'"round":0', b'"round":7')
    db.execute("UPDATE entries SET body = ? WHERE seq = 0", (forged,))
    db.commit()
    with pytest.raises(EvidenceError, match="not those that silo-1 signed"):
        open_log(tmp_path)
    db.execute("DROP TRIGGER entries_hold")
    db.execute("DELETE FROM entries WHERE seq = 0")
    db.commit()
    with pytest.raises(EvidenceError, match="entry 0 is missing"):
        open_log(tmp_path)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"study": bytes(32)}, "for this study"),
        ({"owner": "silo-2"}, "of another log"),
        ({"key": OTHER}, "another identity of silo-1"),
    ],
)
def test_a_log_serves_one_study_owner_and_identity(tmp_path, changes, message):
    open_log(tmp_path).append(Lost(round=0))
    with pytest.raises(EvidenceError, match=message):
        open_log(tmp_path, **changes)


def test_a_log_that_cannot_be_written_stops_the_caller(tmp_path):
    (tmp_path / "evidence.sqlite").write_bytes(b"not a database" * 100)
    with pytest.raises(StateError, match="cannot be used"):
        open_log(tmp_path)


def test_guessing_private_content_from_a_blinded_digest_needs_the_file(tmp_path):
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
    a, b = (open_log(tmp_path / name) for name in "ab")
    assert a.blinded(b"records") == open_log(tmp_path / "a").blinded(b"records")
    assert a.blinded(b"records") != b.blinded(b"records")


def good():
    from securefedcollm.evidence.entries import Entry

    what = Failed(round=1, attempt=2, error="ProtocolError")
    return encode_entry(Entry(3, "2026-01-02T03:04:05Z", "server", what))


@pytest.mark.parametrize(
    "change",
    [
        (b'"round":1', b'"round":1.0'),
        (b'"round":1', b'"round":1,"round":2'),
        (b'"round":1', b'"round":99999999999999999999999'),
        (b'"round":1', b'"round":-1'),
        (b'"round":1', b'"round":1,"x":0'),
        (b'"failed"', b'"unheard-of"'),
        (b"{", b" {"),
        (b"2026-01-02", b"yesterday!"),
        (b"server", b"\xff\xfe\x00"),
        (b'"round":1', b'"round":' + b"9" * 5000),
        (b'"round":1', b'"round":' + b"[" * 100000),
    ],
)
def test_an_entry_has_one_spelling(change):
    assert encode_entry(decode_entry(good(), "here")) == good()
    with pytest.raises(EvidenceError, match=r"^here: not an entry") as caught:
        decode_entry(good().replace(*change, 1), "here")
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize("raw", [b"", b"{", b'{"a":1,"a":1}', b"1e400", b"[" * 100000, b"9" * 5000])
def test_documents_that_are_not_canonical_are_refused(raw):
    with pytest.raises(ValueError, match=r"JSON|canonical"):
        decode_canonical(raw)


def test_a_checkpoint_is_a_signed_note_in_one_spelling():
    """C2SP signed-note, tlog-checkpoint and tlog-cosignature."""
    name, witness = origin(STUDY, "server"), origin(STUDY, "silo-1")
    head = sign_checkpoint(name, KEY, 42, b"r" * 32)
    head = head.with_line(witness, cosign(head, witness, OTHER, 1_700_000_000))
    body, _, signatures = head.note.partition("\n\n")
    assert body.split("\n")[:2] == [name, "42"]
    assert len(signatures.splitlines()) == 2
    read = parse_checkpoint(head.note)
    read.verify(KEY.public)
    assert read.verify_cosigned(witness, OTHER.public) == 1_700_000_000
    with pytest.raises(CryptoError):
        read.verify(OTHER.public)
    for old, new in (("\n42\n", "\n43\n"), ("server\n", "server2\n")):
        with pytest.raises(CryptoError):
            parse_checkpoint(head.note.replace(old, new, 1)).verify(KEY.public)
    moved = head.lines[0], (witness, head.lines[1][1][:4] + bytes(8) + head.lines[1][1][12:])
    forged = type(head)(head.origin, head.size, head.root, moved)
    with pytest.raises(CryptoError):  # the time is signed too
        forged.verify_cosigned(witness, OTHER.public)
    for old, new in (
        ("\n42\n", "\n042\n"),
        ("\n\n", "\n"),
        ("— ", "- "),
        ("=", ""),
        ("\n42", "\nx"),
    ):
        with pytest.raises(EvidenceError, match="well-formed"):
            parse_checkpoint(head.note.replace(old, new, 1))


def test_notes_are_never_other_signed_messages():
    for text in (b"no newline", b"nul\0\n", b"DSSEv1 1 a 1 b\n"):
        with pytest.raises(ValueError, match="a note is text"):
            KEY.sign_note(text)


def test_an_entry_repr_and_json_hold_only_typed_fields():
    fields = {f for kind in (Opened, Failed) for f in kind.__struct_fields__}
    assert not fields & {"seed", "secret", "loss", "norm", "records"}
    assert json.loads(good())["what"] == {
        "kind": "failed",
        "round": 1,
        "attempt": 2,
        "error": "ProtocolError",
    }
