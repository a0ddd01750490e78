"""Archives that are made to fill the memory, hang, or be read as two things: each ends in one line.

Adversary: whoever made the bundle, or holds it between two readings.
"""

from __future__ import annotations

import io
import json
import struct
import tracemalloc
import zipfile
import zlib
from pathlib import Path

import pytest
from securefedcollm_audits.report.report import make_report
from securefedcollm_audits.verification.compare import compare
from securefedcollm_audits.verification.verify import verify

from securefedcollm.errors import EvidenceError
from securefedcollm.evidence.archive import MAX_MEMBERS, zipped
from securefedcollm.evidence.bundle import decode_bundle, decode_members, pack
from securefedcollm.evidence.entries import canonical, decode_entry

PLACE = Path("evil.zip")


def refusal(content: bytes, most: float = 3.0) -> str:
    """What is said of the archive; it may take ``most`` times its own size of memory."""
    tracemalloc.start()
    try:
        with pytest.raises(EvidenceError) as caught:
            decode_bundle(content, PLACE)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert peak < most * len(content) + (8 << 20)
    assert str(caught.value).isprintable()
    return str(caught.value)


def nested(count: int, size: int) -> bytes:
    """``count`` members, each of which holds the headers of all that follow and one kernel of
    ``size`` bytes: every one has its own checksum, and zipfile reads them without complaint."""
    names = [b"logs/%06d.jsonl" % i for i in range(count)]
    body, offsets = bytes(size), []
    local, directory = struct.Struct("<4s5H3L2H"), struct.Struct("<4s6H3L5H2L")
    heads = []
    for name in reversed(names):
        crc, length = zlib.crc32(body), len(body)
        fields = (0, 0, 0, 33, crc, length, length, len(name), 0)
        body = local.pack(b"PK\x03\x04", 20, *fields) + name + body
        heads.append((name, crc, length, len(body)))
    for name, crc, length, behind in reversed(heads):
        fields = (0, 0, 0, 33, crc, length, length, len(name), 0, 0, 0, 0, 0, len(body) - behind)
        offsets.append(directory.pack(b"PK\x01\x02", 20, 20, *fields) + name)
    listed = b"".join(offsets)
    end = struct.pack("<4s4H2LH", b"PK\5\6", 0, 0, count, count, len(listed), len(body), 0)
    return body + listed + end


def members(count: int) -> bytes:
    """An archive of so many empty members."""
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as file:
        for i in range(count):
            file.writestr(zipfile.ZipInfo(f"{i}"), b"")
    return archive.getvalue()


def test_members_that_share_their_bytes_are_not_read():
    """A file of 4 MB would be 2 GB of members, and as much again to write them anew."""
    content = nested(500, 1 << 16)
    with zipfile.ZipFile(io.BytesIO(content)) as archive:  # and nothing else is wrong with it
        assert sum(len(archive.read(name)) for name in archive.namelist()) > 300 * len(content)
    assert "members that overlap" in refusal(content)


def test_a_directory_of_a_million_members_is_not_read():
    assert f"40000 members, {MAX_MEMBERS} are the most" in refusal(members(40_000), most=1)


def test_members_that_inflate_are_not_read():
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr("study.json", bytes(64 << 20))
    assert "a compressed member" in refusal(archive.getvalue())


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"PK",
        bytes(100),
        zipped({}) + b"x",
        zipped({"a": b"x" * 9})[:-1],
        zipped({"../a": b""}),
    ],
)
def test_what_is_no_archive_of_ours_is_said_to_be_none(content):
    assert "not a bundle" in refusal(content)


def test_the_one_spelling_is_read_back():
    written = {"a": b"x", "logs/b.jsonl": bytes(1000)}
    written |= {f"heads/{i}.json": b"{}" for i in range(MAX_MEMBERS - 3)}
    assert set(decode_members(pack(written), PLACE)) == {*written, "manifest.json"}


def deep(levels: int) -> bytes:
    return b'{"a":' * levels + b"1" + b"}" * levels


@pytest.mark.parametrize("name", ["study.json", "artefacts.json", "study.signatures.json"])
def test_deep_nesting_in_a_member_ends_in_one_line(name):
    rest = {"study.json": b"{}", "logs/server.jsonl": b"", "heads/server.json": b"[]"}
    for levels in (65, 10**5):
        text = refusal(pack(rest | {name: deep(levels)}), most=20)
        assert "nested more than 64 deep" in text or "study.json" in text


@pytest.mark.parametrize(
    "raw",
    [
        b'{"owner":"a","seq":0,"time":"2026-01-01T00:00:00Z","what":' + deep(20) + b"}",
        deep(10**5),
        b"x" * (300 << 10),
        b'{"owner":"a\\n","seq":0,"time":"2026-01-01T00:00:00Z\\n","what":{"kind":"lost","round":1}}',
    ],
    ids=["deep", "deeper", "long", "line break after the time"],
)
def test_a_hostile_entry_ends_in_one_line(raw):
    with pytest.raises(EvidenceError, match="not an entry"):
        decode_entry(raw, "silo-1#0")


def test_a_study_in_a_bundle_is_bounded_like_one_in_a_file(record_bundle):
    rest = decode_members(record_bundle.read_bytes(), PLACE)
    del rest["manifest.json"]
    study = json.loads(rest["study.json"])
    for change, says in (
        ({"aggregation": study["aggregation"] | {"value_bits": 10**9}}, "aggregation.value_bits"),
        ({"local": study["local"] | {"steps": 10**15}}, "local.steps: 1000000000000000 is too"),
        ({"task": study["task"] | {"labels": ["\x1b[2J", "b"]}}, "U+001B"),
        ({"task": study["task"] | {"labels": ["x" * (5 << 20), "b"]}}, "study.json is over 4 MiB"),
    ):
        assert says in refusal(pack(rest | {"study.json": canonical(study | change)}), most=20)


@pytest.mark.parametrize(
    "look",
    [verify, lambda path: make_report(path)[0].verdict, lambda path: compare(path, whole(path))],
    ids=["verify", "report", "compare"],
)
def test_what_is_hashed_is_what_is_checked(
    record_bundle,
    silo_bundle,
    tmp_path,
    monkeypatch,
    look,
):
    """Adversary: whoever may exchange the file while it is verified."""
    path, other = tmp_path / "evidence.zip", tmp_path / "other"
    path.write_bytes(record_bundle.read_bytes())
    other.write_bytes(silo_bundle.read_bytes())
    whole(path).write_bytes(record_bundle.read_bytes())
    honest, real = verify(record_bundle), Path.open

    def exchange(self, *words, **more):
        file = real(self, *words, **more)
        if self == path and other.exists():
            other.replace(path)  # what is open stays; a second reading would get another
        return file

    monkeypatch.setattr(Path, "open", exchange)
    found = look(path)
    assert not other.exists()
    assert found.holds
    assert found.digest == honest.digest
    assert found.sha256 in {honest.sha256, ""}  # "": of two bundles


def whole(path: Path) -> Path:
    return path.with_name("whole.zip")
