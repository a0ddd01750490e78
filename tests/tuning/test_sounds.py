"""Recordings are read in every form, within bounds; bad ones are named by their line."""

from __future__ import annotations

import json
import struct
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import soundfile
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import DataError
from securefedcollm.tuning.adpcm import decoded, encoded
from securefedcollm.tuning.attached import UnreadableError
from securefedcollm.tuning.data import read_questions, write_questions
from securefedcollm.tuning.media import PICTURE, SOUND, Medium
from securefedcollm.tuning.question import Question
from securefedcollm.tuning.sounds import (
    LEAST,
    MOST,
    MOST_BYTES,
    digest_of,
    noise_like,
    pack,
    unfold,
)
from securefedcollm.tuning.splits import record_content, record_id
from tests.support.sounds import riff, spoken, wav

LABELS = ["yes", "no"]
LAYOUT: dict[str, Any] = {"kind": "audio_classification", "labels": LABELS}
PCM = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)


def in_lines(folder: Path, *rows: dict[str, Any]) -> Path:
    path = folder / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def read(path: Path) -> list[Question]:
    return read_questions(path, **LAYOUT)


def test_every_form_of_a_file_gives_the_same_records(tmp_path: Path) -> None:
    sounds = [spoken(i, LEAST + i) for i in range(3)]
    (tmp_path / "calls").mkdir()
    for i, samples in enumerate(sounds):
        (tmp_path / "calls" / f"{i}.wav").write_bytes(wav(samples))
    paths = [f"calls/{i}.wav" for i in range(3)]
    labels = ["yes", "no", "yes"]
    by_path = ({"audio": p, "label": n} for p, n in zip(paths, labels, strict=True))
    found = {"paths": read(in_lines(tmp_path, *by_path))}
    cells = [f"{p},{n}\n" for p, n in zip(paths, labels, strict=True)]
    (tmp_path / "rows.csv").write_text("".join(["audio,label\n", *cells]))
    found["csv"] = read(tmp_path / "rows.csv")
    arrays = [{"audio": x.tolist(), "label": n} for x, n in zip(sounds, labels, strict=True)]
    found["arrays"] = read(in_lines(tmp_path, *arrays))
    content = [{"bytes": wav(x), "path": None} for x in sounds]
    pq.write_table(pa.table({"audio": content, "label": labels}), tmp_path / "rows.parquet")
    found["bytes"] = read(tmp_path / "rows.parquet")
    lists = pa.array([x.tolist() for x in sounds], pa.list_(pa.int16()))
    pq.write_table(pa.table({"audio": lists, "label": labels}), tmp_path / "rows.parquet")
    found["lists"] = read(tmp_path / "rows.parquet")
    for form, questions in found.items():
        assert questions == found["paths"], form
        assert [q.content for q in questions] == [digest_of(pack(x)) for x in sounds], form
        for question, samples in zip(questions, sounds, strict=True):
            assert np.array_equal(unfold(question.signal), samples)
    assert [q.answer for q in found["paths"]] == [0, 1, 0]


def test_dealt_rows_are_read_back_as_they_were(tmp_path: Path) -> None:
    rows = [{"audio": spoken(i).tolist(), "label": "no"} for i in range(3)]
    questions = read(in_lines(tmp_path, *rows))
    write_questions(tmp_path / "again.jsonl", questions, "speaker", "audio_classification")
    again = read(tmp_path / "again.jsonl")
    assert again == questions
    assert [record_content(q) for q in again] == [record_content(q) for q in questions]


def test_what_makes_a_recording_the_same_record(tmp_path: Path) -> None:
    """The budget is of what is heard: no name, notes, form of samples or label renews it."""
    coarse = (np.arange(LEAST) * 37 % 256).astype(np.uint8)
    samples = ((coarse.astype(np.int32) - 128) * 256).astype(np.int16)
    wide = PCM.replace(b"\x01\x00", b"\xfe\xff", 1) + struct.pack("<HHI", 22, 16, 4)
    wide += bytes.fromhex("0100000000001000800000aa00389b71")
    same = {
        "a.wav": wav(samples),
        "b.wav": wav(coarse, width=1),
        "c.wav": riff((b"LIST", b"INFOISFT"), (b"fmt ", PCM), (b"data", samples.tobytes())),
        "d.wav": riff((b"fmt ", wide), (b"data", samples.tobytes()), (b"id3 ", b"abcd")),
    }
    other = {"e.wav": wav(samples[::-1].copy()), "f.wav": wav(np.append(samples, np.int16(0)))}
    for name, content in (same | other).items():
        (tmp_path / name).write_bytes(content)
    rows = [{"audio": name, "label": LABELS[i % 2]} for i, name in enumerate(same | other)]
    found = read(in_lines(tmp_path, *rows))
    assert len({record_content(q) for q in found[: len(same)]}) == 1
    assert len({record_content(q) for q in found}) == 3
    assert len({record_id(q) for q in found[:2]}) == 2  # of one file, labels count


def test_rows_with_the_same_label_are_different_records(tmp_path: Path) -> None:
    """The label may be all the text of a row: then its samples tell rows apart in a ledger."""
    arrays = read(
        in_lines(tmp_path, *({"audio": spoken(i).tolist(), "label": "yes"} for i in (1, 2)))
    )
    found = {"arrays": arrays}
    for form, names in {"bytes": (None, None), "names": ("x.wav", "y.wav")}.items():
        content = [{"bytes": wav(spoken(i + 1)), "path": name} for i, name in enumerate(names)]
        table = pa.table({"audio": content, "label": ["yes"] * 2})
        pq.write_table(table, tmp_path / "rows.parquet")
        found[form] = read(tmp_path / "rows.parquet")
    for form, questions in found.items():
        assert len({q.row for q in questions}) == 2, form
        assert all(q.row for q in questions), form


REPORT = "The patient asks for water and a nurse."


def test_a_transcript_beside_a_recording_is_one_record_for_both_kinds_of_study(
    tmp_path: Path,
) -> None:
    """Adversary: a study's author, to whom every kind would be a fresh budget."""
    content = {"bytes": wav(spoken(1)), "path": "x.wav"}
    table = pa.table({"audio": [content], "text": [REPORT], "label": ["yes"]})
    pq.write_table(table, tmp_path / "r.parquet")
    (heard,), (told,) = (
        read(tmp_path / "r.parquet"),
        read_questions(tmp_path / "r.parquet", kind="classification", labels=LABELS),
    )
    assert heard.row == told.row != b""


FAULTY: dict[str, tuple[Any, str]] = {
    "not there": ("secret.wav", "names a file that is not there"),
    "above": ("../secret.wav", "leads out of the folder"),
    "by a link": ("link.wav", "leads out of the folder"),
    "text": (b"no recording", "is no WAV or FLAC file"),
    "of ours": (pack(spoken(1)), "is no WAV or FLAC file"),
    "empty": (b"", "is no WAV or FLAC file"),
    "cut off": (wav(spoken(1))[:-40], "is shorter than it says"),
    "endless": (riff((b"fmt ", PCM)) + b"data" + b"\xff" * 9, "is shorter than it says"),
    "no samples": (riff((b"fmt ", PCM)), "holds no samples"),
    "no kind": (riff((b"data", bytes(9999))), "does not say what its samples are"),
    "half a kind": (riff((b"fmt ", PCM[:9])), "does not say what its samples are"),
    "two kinds": (riff((b"fmt ", PCM), (b"fmt ", PCM)), "says twice"),
    "many parts": (riff(*[(b"note", b"")] * 1000, (b"fmt ", PCM)), "has over 1,000 parts"),
    "other rate": (wav(spoken(1), rate=44_100), "has 44,100 samples a second, and not 16,000"),
    "stereo": (wav(spoken(1, 2 * LEAST), channels=2), "has 2 channels"),
    "deep": (wav(np.zeros(3 * LEAST, dtype=np.uint8), width=3), "has 24 bits a sample"),
    "floats": (riff((b"fmt ", b"\x03\x00" + PCM[2:])), "no whole numbers (PCM)"),
    "short": (wav(spoken(1, LEAST - 1)), "shorter than a tenth of a second"),
    "long": (wav(np.zeros(MOST + 1, dtype=np.int16)), "longer than 60 seconds"),
    "padded": (wav(spoken(1)) + bytes(MOST_BYTES), "is over 4 MiB long"),
    "few numbers": ([1, 2, 3], "shorter than a tenth of a second"),
    "too loud": ([40_000] * LEAST, "outside of -32768 to 32767"),
    "fractions": ([0.5] * LEAST, "is no list of whole numbers"),
    "a text": (["x", *[0] * LEAST], "is no list of whole numbers"),
    "truth values": ([True] * LEAST, "is no list of whole numbers"),
    "lists": ([[1]] * LEAST, "is no list of whole numbers"),
    "beyond all scales": ([2**62, *[0] * LEAST], "outside of -32768 to 32767"),
    "a number": (7, "is a int, and no recording"),
    "missing": (None, "is missing"),
}


@pytest.mark.parametrize("case", FAULTY)
def test_a_bad_recording_is_named_by_its_line_and_nothing_of_it_is_told(
    case: str, tmp_path: Path
) -> None:
    folder = tmp_path / "in"
    folder.mkdir()
    (tmp_path / "secret.wav").write_bytes(wav(spoken(1)))
    (folder / "link.wav").symlink_to(tmp_path / "secret.wav")
    (folder / "good.wav").write_bytes(wav(spoken(2)))
    value, problem = FAULTY[case]
    if isinstance(value, bytes):
        (folder / "bad.wav").write_bytes(value)
        value = "bad.wav"
    good = {"audio": "good.wav", "label": "yes"}
    path = in_lines(folder, good, {"audio": value, "label": "no"})
    with pytest.raises(DataError, match="field 'audio'") as refused:
        read(path)
    assert refused.value.where == f"{path}:2"
    assert problem in refused.value.problem
    assert "secret" not in str(refused.value)
    assert len(read(in_lines(folder, good))) == 1  # the control


@pytest.mark.parametrize("medium", [SOUND, PICTURE], ids=lambda medium: medium.noun)
def test_one_long_text_among_numbers_takes_no_memory(medium: Medium) -> None:
    """Adversary: a file of kilobytes, of which an array of texts takes gigabytes."""
    row = ["x" * 50_000, *[""] * LEAST]
    value = row if medium is SOUND else [row]
    tracemalloc.start()
    try:
        with pytest.raises(UnreadableError, match="whole numbers"):
            medium.array(value)
        taken = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert taken < 1 << 20
    row = ["x" * 500, *[""] * LEAST]
    assert np.asarray(row).nbytes > 500 * LEAST  # the control, a hundredth as wide


def test_data_check_finds_what_a_poor_archive_holds(tmp_path: Path) -> None:
    loud = (spoken(3, 2 * LEAST).astype(np.int32) * 50).clip(-32768, 32767).astype(np.int16)
    files = {
        "a.wav": wav(spoken(1)),
        "copy.wav": riff((b"fmt ", PCM), (b"LIST", b"note"), (b"data", spoken(1).tobytes())),
        "other.wav": wav(spoken(1)),
        "silent.wav": wav(spoken(2) // 2000),
        "loud.wav": wav(loud),
    }
    for name, content in files.items():
        (tmp_path / name).write_bytes(content)
    rows = [
        *({"audio": name, "label": "yes"} for name in ("a.wav", "copy.wav")),
        *({"audio": name, "label": "no"} for name in ("other.wav", "silent.wav", "loud.wav")),
        {"audio": "gone.wav", "label": "no"},
    ]
    path = in_lines(tmp_path, *rows)
    at = [f"{path}:{line}" for line in range(1, 7)]
    code, found = checked(path)
    assert code == 1
    assert found["duplicates"] == [at[:2]]
    assert found["conflicts"] == [at[:3]]
    assert found["constant"] == [at[3]]
    assert found["clipped"] == [at[4]]
    assert found["unusable"] == [[at[5], "field 'audio' names a file that is not there"]]
    code, found = checked(in_lines(tmp_path, rows[0]))  # the control
    assert code == 0
    assert not any(found[name] for name in ("duplicates", "conflicts", "constant", "clipped"))


def checked(path: Path) -> tuple[int, dict[str, Any]]:
    words = ["data", "check", str(path), "--task", "audio_classification", "--json"]
    for label in LABELS:
        words += ["--label", label]
    result = CliRunner().invoke(app, words)
    return result.exit_code, json.loads(result.stdout)


def test_flac_is_the_same_record(tmp_path: Path) -> None:
    samples = spoken(1)
    soundfile.write(tmp_path / "a.flac", samples, 16_000, subtype="PCM_16")
    (tmp_path / "a.wav").write_bytes(wav(samples))
    (tmp_path / "bad.flac").write_bytes((tmp_path / "a.flac").read_bytes()[:200])
    flac, plain = read(
        in_lines(tmp_path, *({"audio": f"a.{kind}", "label": "yes"} for kind in ("flac", "wav")))
    )
    assert flac == plain
    assert flac.content == plain.content
    with pytest.raises(DataError, match=r"cannot be decoded|shorter"):
        read(in_lines(tmp_path, {"audio": "bad.flac", "label": "yes"}))


def test_noise_is_as_long_as_what_it_is_like() -> None:
    sound = pack(spoken(1, LEAST + 5))
    assert len(noise_like(sound, 1)) == len(sound)
    assert noise_like(sound, 1) == noise_like(sound, 1) != noise_like(sound, 2)


def test_four_bits_a_sample_keep_speech_and_the_standards_first_steps() -> None:
    t = np.arange(4000)
    sung = (8000 * np.sin(t / 9) * np.sin(t / 400)).astype(np.int16)[None]
    error = decoded(encoded(sung)).astype(float) - sung
    assert np.std(error) < np.std(sung) / 20
    # From 0 with a step of 7: 7 is a difference of (4 + 2 + 1 + ½) eighths of it times 2, cut.
    assert decoded(np.array([[0x77]], dtype=np.uint8)).tolist() == [[11, 41]]
