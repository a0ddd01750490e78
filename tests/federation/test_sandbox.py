"""Landlock around FLARE's processes: the kit, Python and the system, and nothing else."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

pytest.importorskip("nvflare")

CONFINED = """
import json, subprocess, sys
from pathlib import Path
from securefedcollm.federation.engines.flare.sandbox import confine
kit, private = map(Path, sys.argv[1:])
found = {"confined": confine(kit)}
def attempt(what, call):
    try:
        call()
        found[what] = True
    except PermissionError:
        found[what] = False
attempt("reads its kit", (kit / "key").read_bytes)
attempt("writes its kit", lambda: (kit / "sub").mkdir() or (kit / "sub" / "log").write_text("x"))
attempt("imports", lambda: __import__("nvflare.apis.workspace"))
attempt("reads records", private.read_bytes)
attempt("lists their folder", lambda: list(private.parent.iterdir()))
attempt("writes beside them", lambda: private.with_name("new").write_text("x"))
attempt("removes them", private.unlink)
attempt("writes to /tmp", lambda: Path("/tmp/securefedcollm-sandbox-test").write_text("x"))
cat = subprocess.run(["cat", str(private)], capture_output=True)
found["its child reads records"] = cat.returncode == 0
print(json.dumps(found))
"""


def test_a_confined_process_has_its_kit_and_nothing_of_its_users(tmp_path):
    """Adversary: who has FLARE read or write a file, in whatever way."""
    kit, private = tmp_path / "home" / "kit", tmp_path / "home" / "records.jsonl"
    kit.mkdir(parents=True)
    (kit / "key").write_text("k")
    private.write_text("patient 1")
    done = subprocess.run(
        [sys.executable, "-c", CONFINED, str(kit), str(private)], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout)
    if not found["confined"]:
        pytest.skip("this kernel has no Landlock")
    assert [name for name, worked in found.items() if worked] == [
        "confined",
        "reads its kit",
        "writes its kit",
        "imports",
    ]
    assert private.read_text() == "patient 1"
