"""``shelf serve --records``: what a silo's operator agrees to, and when its records pay."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from securefedcollm_cli import shelf
from securefedcollm_cli.main import app
from typer.testing import CliRunner, Result

from securefedcollm.errors import ConfigError
from securefedcollm.federation.questions import answering
from securefedcollm.privacy.ledger import Ledger
from tests.support.network import Signed
from tests.support.polling import COPIES, RECORDS
from tests.support.vote_network import SignedVoters


@pytest.fixture(scope="module")
def signed(tmp_path_factory: pytest.TempPathFactory) -> SignedVoters:
    quiet = {"privacy": {"epsilon": 4.0, "delta": 1e-5}}
    made = SignedVoters(tmp_path_factory.mktemp("signed"), quiet, questions=6, epsilon=4.0)
    for kit in ("silo-1/kit", "server/kit", "server/lead"):  # never started here
        (made.homes["server"].parent / kit / "startup").mkdir(parents=True)
    return made


@pytest.fixture
def file(tmp_path: Path) -> Path:
    rows = [
        {"question": one.prompt, "choices": list(one.choices), "answer": one.answer}
        for one in RECORDS["silo-1"]
    ]
    path = tmp_path / "records.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def serve(signed: SignedVoters, file: Path, *more: str, **options: Any) -> Result:
    words = ["shelf", "serve", str(signed.file), "--records", str(file)]
    words += ["--models", str(signed.voters.data), "--home", str(signed.homes["silo-1"])]
    return CliRunner().invoke(app, [*words, *more], **options)


def test_an_operator_sees_what_records_pay_and_declines_at_no_cost(signed, file):
    result = serve(signed, file, input="n\n")
    assert isinstance(result.exception, ConfigError)
    assert "not agreed; nothing was answered" in str(result.exception)
    for said in (
        "signed by all",
        "hub carries the questions and reads them",
        f"{3 * COPIES} records; they stay on this machine",
        "server, silo-1, silo-2, silo-3, silo-4; the asker chooses the questions",
        "only the sum of at least 3 silos is opened, with noise against 1",
        "a record answers 6 questions, then it is silent",
        "all answers of a record spend ε = 4 (δ = 1e-05); every record pays that now",
        "has spent ε = 0.000 of 4 (δ = 1e-05)",
        "agreeing pins that budget",
        "replies leave at multiples of 1 s",
    ):
        assert said in " ".join(result.stderr.split()), said
    with Ledger(signed.homes["silo-1"] / "ledger.sqlite", "silo-1") as ledger:
        assert ledger.entries() == []
        assert ledger.pinned is None
    said = json.loads(serve(signed, file, "--json", input="n\n").stdout.split("\n")[0])
    assert (said["event"], said["questions"], said["left_out"]) == ("terms", 6, 0)


def test_who_agrees_pays_once_and_is_told_so_the_next_time(signed, file, monkeypatch):
    seen = []
    monkeypatch.setattr(shelf, "serve", lambda port, *about: seen.append(port._matter))
    for _ in range(2):
        result = serve(signed, file, "--yes")
        assert result.exit_code == 0, result.output
    assert isinstance(seen[-1], answering.Answers)
    assert seen[-1].own.shelf.paid.all()
    with Ledger(signed.homes["silo-1"] / "ledger.sqlite", "silo-1") as ledger:
        (entry,) = ledger.entries()
        assert entry.state == "settled"
    said = serve(signed, file, input="n\n").stderr
    assert "agreeing pins" not in said
    assert "WARNING" not in said


@pytest.mark.parametrize("option", [["--index", "x"], ["--questions", "1"]])
def test_records_go_on_no_shelf(signed, file, option):
    result = serve(signed, file, *option)
    assert isinstance(result.exception, ConfigError)
    assert f"{option[0]}: this study asks records, which go on no shelf" in str(result.exception)


def test_documents_are_no_records(tmp_path, file):
    made = Signed(tmp_path / "place")
    words = ["shelf", "serve", str(made.file), "--records", str(file)]
    result = CliRunner().invoke(app, [*words, "--home", str(made.homes["silo-1"])])
    assert "--records: this study asks documents, which members read" in str(result.exception)


@pytest.mark.parametrize(
    ("words", "what"),
    [
        (["--records", "silo-1=x"], "--records: is for all roles on one machine"),
        (["--as", "silo-1"], "--as: is for all roles on one machine"),
        (["--shelf", "silo-1=x"], "--shelf: records are asked, and nobody reads them"),
        ([], "no process of this member is there to ask"),
    ],
)
def test_one_asks_over_the_network_or_on_one_machine(signed, words, what):
    asked = ["ask", "-", "--study", str(signed.file), "--home", str(signed.homes["silo-2"])]
    said = json.dumps({"question": "w1 w2", "choices": ["w50", "w51"]})
    result = CliRunner().invoke(app, [*asked, *words], input=said)
    assert isinstance(result.exception, ConfigError)
    assert what in str(result.exception)
