"""``study check --propose-clip``: a clip norm from public rows, and from nothing else."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.federation.charged import ChargedTraining
from tests.support.inputs import make_inputs

NONE = ("--set", "privacy=none")
OWN = ("--set", "task.data={}")
SILO = (
    *("--set", "privacy.unit=silo", "--set", "privacy.noise=distributed"),
    *("--set", "privacy.clip_norm=1"),
)


@pytest.fixture(scope="module")
def inputs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


def check(inputs: Path, *words: object, text: bool = False):
    arguments = ["study", "check", inputs / "tiny.yaml", "--data", inputs, "--propose-clip"]
    arguments += [*words, *([] if text else ["--json"])]
    result = CliRunner().invoke(app, [str(word) for word in arguments])
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout if text else json.loads(result.stdout)["clip"]


def test_the_proposal_leaves_the_update_whole(inputs: Path) -> None:
    found = check(inputs, "--set", "aggregation.clip_norm=0.001")
    assert found["clip_norm"] >= 1.5 * found["norm"]
    assert found["kept"] == pytest.approx(0.001 / found["norm"])
    assert not found["made_up"]
    assert found["rows"] == 8  # the labelled ones fill a batch
    assert check(inputs, "--set", f"aggregation.clip_norm={found['clip_norm']}")["kept"] == 1.0
    line = check(inputs, *NONE, text=True)
    assert "clip norm         one round on 8 public rows" in line
    assert "Proposed for aggregation.clip_norm: " in line


def test_distributed_noise_gets_no_room_to_spare(inputs: Path) -> None:
    plain, silo = check(inputs, *NONE), check(inputs, *SILO)
    assert silo["norm"] == pytest.approx(plain["norm"])
    assert silo["norm"] <= silo["clip_norm"] < plain["clip_norm"]
    assert "the noise grows with it" in check(inputs, *SILO, text=True)


def test_answers_are_made_up_where_the_public_rows_have_none(inputs: Path) -> None:
    found = check(inputs, *NONE, "--set", "task.data.public_labelled=0")
    assert found["made_up"]
    assert found["rows"] == 32
    assert found["norm"] > 0


def test_private_answers_do_not_matter(inputs: Path, tmp_path: Path) -> None:
    """The same public file gives the same proposal, whatever lies in the silos' own."""
    public = ("--public", inputs / "test.jsonl", *NONE)
    before = check(inputs, *public)
    other = tmp_path / "other"
    shutil.copytree(inputs, other)
    rows = [json.loads(line) for line in (other / "train.jsonl").read_text().splitlines()]
    for row in rows:
        row["answer"] = 0
    (other / "train.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert check(other, *public) == before
    assert before["rows"] == 24


@pytest.mark.parametrize(
    ("more", "says"),
    [
        ([*OWN, "--records", "32"], "--public: the study has no public rows"),
        ([*OWN, "--public", "test.jsonl"], "--propose-clip: a silo's noise is a part"),
        (
            ["--set", "privacy.noise=distributed", "--set", "local.sampling_rate=0.05"],
            "aggregation.clip_norm: joint DP-SGD sums gradients",
        ),
    ],
)
def test_what_no_proposal_can_be_made_for(inputs: Path, more: list[str], says: str) -> None:
    words = [inputs / word if word == "test.jsonl" else word for word in more]
    with pytest.raises(ConfigError) as caught:
        check(inputs, *words)
    assert str(caught.value).startswith(says)
    assert caught.value.hint


def test_public_rows_without_a_proposal_are_refused(inputs: Path) -> None:
    words = ["study", "check", str(inputs / "tiny.yaml"), "--public", str(inputs / "test.jsonl")]
    with pytest.raises(ConfigError, match="--public: only a proposal reads public rows"):
        CliRunner().invoke(app, words, catch_exceptions=False)


def test_a_silo_that_was_clipped_is_told_the_command(caplog: pytest.LogCaptureFixture) -> None:
    plan = SimpleNamespace(aggregation=SimpleNamespace(clip_norm=1.0))
    silo = SimpleNamespace(_study=plan, _name="a")
    with caplog.at_level(logging.WARNING):
        ChargedTraining._compare_with_clip(silo, np.ones(16, dtype=np.float32), 0)  # type: ignore[arg-type]
    assert "scaled down to 25 %" in caplog.text
    assert "study check CONFIG --propose-clip" in caplog.text
