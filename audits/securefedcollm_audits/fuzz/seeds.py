"""Seeds of the fuzz targets for files: a small study, its bundle, and a few records."""

from __future__ import annotations

import csv
import hashlib
import io
import json
import struct
from typing import Any, Final

from securefedcollm.evidence.bundle import pack
from securefedcollm.evidence.entries import canonical
from securefedcollm.evidence.note import origin, sign_checkpoint
from securefedcollm.primitives import SigningKey, merkle_root
from securefedcollm.study import dump_study, study_from_tree

NAMES: Final = ("server", "silo-1", "silo-2", "silo-3")

STUDY: Final[dict[str, Any]] = {
    "study": "fuzz",
    "rounds": 2,
    "task": {"data": {"builtin": "hospitals"}},
    "models": {"llm": {"source": "builtin:llm"}, "slm": {"source": "builtin:slm"}},
    "silos": {"count": 3},
    "local": {"steps": 5, "batch_size": 8, "learning_rate": 0.1},
    "privacy": {"epsilon": 8.0, "delta": 1e-5},
}

ROWS: Final[dict[str, list[dict[str, Any]]]] = {
    "multiple_choice": [
        {"question": "Which gas?", "choices": ["neon", "oxygen"], "answer": 1, "subject": "air"},
        {"question": "NA", "choices": ["1", "naïve", 'a "b"'], "answer": 0, "subject": "x, y"},
        {"prompt": "Q:", "question": "two\nlines", "choices": ["a", "b"], "answer": 0},
    ],
    "classification": [{"text": "good", "label": "yes"}, {"text": "bad", "label": 0}],
    "instruction": [
        {"instruction": "do", "response": "done"},
        {"instruction": "a", "response": "b"},
    ],
    "text": [{"text": "some words", "answer": None}, {"text": "more"}],
    "image_classification": [
        {"image": [[0, 9], [255, 1], [7, 8]], "label": "yes"},
        {"image": [[4, 4]], "label": "no"},
    ],
    "audio_classification": [{"audio": [0, 9] * 800, "label": "yes"}],
}


def study_text() -> str:
    """A study in YAML, every default written out."""
    return dump_study(study_from_tree(STUDY))


def records(kind: str, suffix: str) -> bytes:
    """A file of records in one of the formats."""
    rows = ROWS[kind]
    if suffix == ".jsonl":
        return "".join(f"{json.dumps(row)}\n" for row in rows).encode()
    names = sorted({name for row in rows for name in row})
    if suffix == ".csv":
        text = io.StringIO()
        sheet = csv.writer(text)
        sheet.writerow(names)
        for row in rows:
            sheet.writerow([_cell(row.get(name)) for name in names])
        return text.getvalue().encode()
    import pyarrow as pa
    import pyarrow.parquet as pq

    file = io.BytesIO()
    table = {name: [row.get(name) for row in rows] for name in names}
    if "label" in table:
        table["label"] = [str(label) for label in table["label"]]
    pq.write_table(pa.table(table), file)
    return file.getvalue()


def crowded(kind: str, count: int) -> bytes:
    """A line whose picture or recording has one text of ``count`` letters among its numbers."""
    row: list[Any] = ["x" * count, *[0] * 2000]
    column, value = ("audio", row) if kind == "audio_classification" else ("image", [row])
    return json.dumps({column: value, "label": "yes"}).encode() + b"\n"


def picture(form: str) -> bytes:
    """A small picture as an image file, with an orientation where the format has one."""
    from PIL import Image

    file, exif = io.BytesIO(), Image.Exif()
    exif[0x0112] = 6
    shades = bytes(range(0, 240, 5))
    options = {} if form == "BMP" else {"exif": exif}
    Image.frombytes("RGB", (4, 4), shades).save(file, form, **options)
    return file.getvalue()


def sound(extensible: bool) -> bytes:
    """A short recording as a WAV file, in the plain or the extensible form, with a note."""
    form = struct.pack("<HHIIHH", 1, 1, 16_000, 32_000, 2, 16)
    if extensible:
        guid = bytes.fromhex("0100000000001000800000aa00389b71")
        form = b"\xfe\xff" + form[2:] + struct.pack("<HHI", 22, 16, 4) + guid
    parts = [(b"LIST", b"INFO"), (b"fmt ", form), (b"data", bytes(range(256)) * 13)]
    body = b"".join(name + struct.pack("<I", len(part)) + part for name, part in parts)
    return b"RIFF" + struct.pack("<I", 4 + len(body)) + b"WAVE" + body


def _cell(value: Any) -> Any:
    return json.dumps(value) if isinstance(value, list) else value


def bundle_members() -> dict[str, bytes]:
    """A bundle of two rounds, one of them lost: an entry of every kind, every head signed."""
    study = study_from_tree(STUDY)
    keys = {name: SigningKey(hashlib.sha256(name.encode()).digest()) for name in NAMES}
    members = {"study.json": canonical(study.tree)}
    for name in NAMES:
        told = _SERVER if name == "server" else _SILO
        leaves = [
            canonical(
                {"owner": name, "seq": seq, "time": f"2026-01-01T00:00:{seq:02}Z", "what": what}
            )
            for seq, what in enumerate([_opened(keys, study.digest.hex()), *told])
        ]
        head = sign_checkpoint(
            origin(study.digest, name), keys[name], len(leaves), merkle_root(leaves)
        )
        members[f"logs/{name}.jsonl"] = b"".join(leaf + b"\n" for leaf in leaves)
        members[f"heads/{name}.json"] = canonical([head.note])
    members["artefacts.json"] = canonical({"slm/adapter.safetensors": _HEX})
    members["sbom.json"] = b"{}"
    return members


def bundle() -> bytes:
    """Those members as an archive."""
    return pack(bundle_members())


_HEX: Final = "ab" * 32
_AT: Final[dict[str, Any]] = {"round": 0, "attempt": 0, "header": _HEX}
_LISTS: Final[dict[str, Any]] = {
    **_AT,
    "delivery": _HEX,
    "survivors": ["silo-1", "silo-2", "silo-3"],
    "dropouts": [],
    "lists": _HEX,
}
_BEGUN: Final[dict[str, Any]] = {
    **_AT,
    "kind": "round",
    "base": _HEX,
    "layout": _HEX,
    "adapter": _HEX,
    "model": _HEX,
    "values": 1000,
    "mechanism": None,
    "clip": None,
}
_CHARGE: Final[dict[str, Any]] = {
    "account": "ab" * 16,
    "unit": "record",
    "round": 0,
    "training": 0,
    "ledger": _HEX,
}
_EVENTS: Final = [{"kind": "poisson-gaussian", "q": 0.1, "noise_multiplier": 1.0, "steps": 5}]
_AUDITED: Final[dict[str, Any]] = {
    "kind": "audited",
    "audit": "mechanism",
    "study": _HEX,
    "code": _HEX,
    "setting": "one step",
    "claimed": 2.0,
    "bound": 1.0,
    "delta": 1e-5,
    "held": True,
    "figures": {"auc": 0.5},
}
_SERVER: Final = [
    _BEGUN,
    {**_LISTS, "kind": "opening", "agreements": {"silo-1": "cd" * 64}, "ciphertexts": None},
    {**_AT, "kind": "summed", "survivors": ["silo-1", "silo-2"], "sum": _HEX, "word": None},
    {"kind": "finished", "round": 0, "adapter": _HEX, "files": {"slm/adapter.safetensors": _HEX}},
    {"kind": "failed", "round": 1, "attempt": 0, "error": "QuorumError"},
    {"kind": "lost", "round": 1},
    _AUDITED,
]
_SILO: Final = [
    {**_CHARGE, "kind": "reserved", "events": _EVENTS, "epsilon": 8.0, "delta": 1e-5},
    _BEGUN,
    {**_CHARGE, "kind": "released"},
    {**_AT, "kind": "uploaded", "delivery": _HEX},
    {**_LISTS, "kind": "agreed"},
    {**_AT, "kind": "unmasked", "lists": _HEX, "seeds_of": ["silo-1"], "keys_of": []},
    {
        **_CHARGE,
        "kind": "settled",
        "events": _EVENTS,
        "spent": {"epsilon": 1.0, "delta": 1e-5, "accountant": "pld"},
    },
    {"kind": "refused", "error": "RemoteProtocolError"},
    {"kind": "witnessed", "size": 4, "root": _HEX},
    _AUDITED,
]


def _opened(keys: dict[str, SigningKey], study: str) -> dict[str, Any]:
    roster = [
        {"name": name, "role": "server" if name == "server" else "silo", "key": key.public.hex()}
        for name, key in keys.items()
    ]
    return {
        "kind": "opened",
        "study": study,
        "run": "ab" * 16,
        "roster": roster,
        "version": "0.1.0",
        "code": _HEX,
        "sbom": None,
    }
