"""docs/auditor.md: a stranger's bundle."""

from __future__ import annotations

import re

import pytest

from tests.support.typed import type_page

pytestmark = pytest.mark.timeout(600)


@pytest.mark.soak
def test_the_page_for_the_auditor(tmp_path):
    done = type_page("auditor.md", tmp_path, timeout=500)
    said = done.stdout
    assert done.returncode == 0, said[-3000:] + done.stderr[-3000:]
    assert re.findall(r"evidence verified offline: (\d+) checks passed", said) == ["25", "25", "26"]
    failed = re.findall(r"evidence does NOT hold: 1 of the checks failed \((\S+)\)", said)
    assert failed == ["expected", "expected", "archive"]
    assert said.count("exit code 1") == 3
    assert "not compared: the study" in said
    assert "not strong" in (tmp_path / "report.html").read_text()
