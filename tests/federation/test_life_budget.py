"""A record has one budget for its whole life: the next study is refused, or skips who cannot pay.

Adversary: the authors of one study after another about the same records, and a server that would
like to know which of them a silo has left.
"""

from __future__ import annotations

import json
import shutil
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
from securefedcollm_audits.verification.expected import Expected
from securefedcollm_audits.verification.verify import verify
from securefedcollm_cli.main import app, main
from typer.testing import CliRunner

from securefedcollm.errors import BudgetExceeded, ConfigError
from securefedcollm.evidence.log import FILE_NAME
from securefedcollm.federation.cotuning import contents_of
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.privacy.identities import key_path
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.cohort import same_ledger
from securefedcollm.study import Study, load_study
from tests.support.chain import next_study, simulated
from tests.support.inputs import make_inputs
from tests.support.rounds import Killed

NAMES = ("silo-1", "silo-2", "silo-3", "silo-4")
OTHERS = "seed=11"
"""Deals the same file out afresh: about a quarter of each silo's records are its old ones."""


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def paid(inputs):
    """A finished study after which every record of every silo has spent its budget."""
    return simulated(
        load_study(inputs / "tiny.yaml", ["rounds=1"]), inputs, "paid", ledgers=book(inputs)
    )


def book(inputs: Path) -> Path:
    return inputs / "ledgers"


def charged(ledgers: Path, name: str):
    """Of each study in the ledger: (digest, the records that paid)."""
    with Ledger(ledgers / f"{name}.sqlite", name) as ledger:
        found = {e.about.study: ledger.stored(e.about.records) for e in ledger.entries()}
    return list(found.items())


def words_of(study: Study, inputs: Path) -> dict[str, list[bytes]]:
    """By silo: what the ledger knows each record by that is dealt to it."""
    silos = deal(study, inputs).silos
    return {name: [c.words for c in contents_of(own)] for name, own in silos.items()}


class Watched:
    """The kinds and sizes of all replies that leave a silo."""

    def __init__(self, monkeypatch):
        self.replies: list[tuple[str, int]] = []
        real = EmbeddedEngine.exchange

        def exchange(engine, frames, timeout):
            replies = real(engine, frames, timeout)
            self.replies += [(name, len(reply)) for name, reply in sorted(replies.items())]
            return replies

        monkeypatch.setattr(EmbeddedEngine, "exchange", exchange)


@pytest.mark.soak
def test_the_second_study_of_a_chain_leaves_out_whom_the_first_has_spent(inputs, paid, monkeypatch):
    second, ledgers = next_study(paid, [OTHERS]), book(inputs)
    with pytest.raises(BudgetExceeded, match=r"silo-1: .*cannot pay.* is spent") as refused:
        simulated(second, inputs, "skipping", ledgers=ledgers)
    assert "--records skip" in refused.value.hint
    assert not (inputs / "skipping").exists()
    assert all(len(charged(ledgers, name)) == 1 for name in NAMES)

    with monkeypatch.context() as patch:
        watched = Watched(patch)
        run = simulated(second, inputs, "skipping", ledgers=ledgers, records="skip")
    with monkeypatch.context() as patch:  # the control: nobody has paid for anything yet
        control = Watched(patch)
        simulated(second, inputs, "control", ledgers=inputs / "fresh", records="skip")
    assert watched.replies == control.replies  # whoever is left out, and how many

    told = json.loads((run / "results.json").read_text())["silos"]
    taking_part = {silo["name"]: silo["records"] for silo in told}
    spent, dealt = words_of(load_study(paid / "study.yaml"), inputs), words_of(second, inputs)
    for name in NAMES:
        assert 0 < taking_part[name] == sum(words not in spent[name] for words in dealt[name]) < 32
        (_, old), (_, new) = charged(ledgers, name)
        assert not new.within(old).any()  # only the rest has paid
        with Ledger(ledgers / f"{name}.sqlite", name) as ledger:
            assert 7.0 < ledger.standing(old).worst <= 8.0
            assert 7.0 < ledger.standing(new).worst <= 8.0
            ledger.verify()
    assert len(set(taking_part.values())) > 1

    verdict = verify(run / "evidence.zip", Expected(earlier=[paid / "evidence.zip"]))
    assert verdict.holds
    assert {r.name for r in verdict.results if r.status == "pass"} >= {"continued"}


@pytest.mark.soak
def test_a_study_without_a_record_that_can_pay_is_refused(inputs, paid):
    """The same records again. Of others, above, the rest can pay."""
    again, ledgers = next_study(paid), book(inputs)
    for records in ("refuse", "skip"):
        with pytest.raises(BudgetExceeded, match=r"silo-1: .* left"):
            simulated(again, inputs, "refused", ledgers=ledgers, records=records)
        assert not (inputs / "refused").exists()


def test_a_study_that_sets_records_aside_is_refused_and_skip_is_no_way_out(inputs, paid):
    """The control: without a validation the hint names it."""
    for changes, named in (([], True), (["validation={share: 0.25}"], False)):
        study = next_study(paid, ["seed=13", "local.batch_size=4", *changes])
        with pytest.raises(BudgetExceeded, match=r"silo-1: .* records cannot pay") as refused:
            simulated(study, inputs, "refused", ledgers=book(inputs))
        assert ("--records skip" in refused.value.hint) is named


def test_a_finished_run_goes_on_with_the_ledgers_that_it_was_charged_in(inputs, paid):
    """Else the next study of a life would find empty ones, and the same records would pay again."""
    study = load_study(paid / "study.yaml")
    for ledgers in (inputs / "elsewhere", None):
        kept = nullcontext() if ledgers is None else pytest.raises(ConfigError, match="--ledgers")
        with kept:
            simulated(study, inputs, "paid", ledgers=ledgers, resume=True)
    gone, away = book(inputs) / "silo-2.sqlite", inputs / "away"
    shutil.move(book(inputs), away)
    for other in ("nothing", "a fresh one"):
        if other == "a fresh one":
            with Ledger(gone, "silo-2"):
                pass
        with pytest.raises(ConfigError, match=r"silo-. has spent by the ledger .* is gone"):
            simulated(study, inputs, "paid", ledgers=book(inputs), resume=True)
        shutil.rmtree(book(inputs), ignore_errors=True)
        book(inputs).mkdir()
        shutil.copy(away / "silo-1.sqlite", book(inputs))
        shutil.copy(key_path(away / "silo-1.sqlite"), book(inputs))
    shutil.rmtree(book(inputs))
    shutil.move(away, book(inputs))
    simulated(study, inputs, "paid", ledgers=book(inputs), resume=True)  # the control


def test_a_start_that_was_killed_before_its_log_was_written_goes_on(tmp_path):
    home, ledgers = tmp_path / "silo-1", tmp_path / "ledgers"
    home.mkdir()
    (home / FILE_NAME).touch()
    assert same_ledger(home, "silo-1", None) == home / "ledger.sqlite"
    assert same_ledger(home, "silo-1", ledgers) == ledgers / "silo-1.sqlite"


def test_a_refused_start_removes_no_older_run(inputs, paid):
    simulated(next_study(paid, ["privacy=none"]), inputs, "older")
    with pytest.raises(BudgetExceeded):
        simulated(next_study(paid), inputs, "older", ledgers=book(inputs), overwrite=True)
    assert (inputs / "older" / "results.json").exists()


@pytest.mark.soak
def test_a_run_that_skips_goes_on_with_the_records_that_it_began_with(inputs, paid, monkeypatch):
    second, ledgers = next_study(paid, ["seed=12", "study=killed"]), book(inputs)
    real, seen = EmbeddedEngine.exchange, []

    def dies(engine, frames, timeout):
        replies = real(engine, frames, timeout)
        seen.append(replies)
        if len(seen) == 2:
            raise Killed
        return replies

    with monkeypatch.context() as patch:
        patch.setattr(EmbeddedEngine, "exchange", dies)
        with pytest.raises(Killed):
            simulated(second, inputs, "killed", ledgers=ledgers, records="skip")
    began = {name: charged(ledgers, name)[-1] for name in NAMES}
    with pytest.raises(ConfigError, match="silo-1: the run began without some") as caught:
        simulated(second, inputs, "killed", ledgers=ledgers, resume=True)
    assert "--records skip" in caught.value.hint
    with pytest.raises(ConfigError, match=r"--ledgers: the run of silo-1 began with another"):
        simulated(second, inputs, "killed", ledgers=inputs / "other", resume=True, records="skip")
    simulated(second, inputs, "killed", ledgers=ledgers, resume=True, records="skip")
    for name, (study, records) in began.items():
        assert study == second.digest.hex()
        assert charged(ledgers, name)[-1][1].digest == records.digest


@pytest.mark.soak
def test_a_life_is_refused_at_its_second_study_and_goes_on_with_skip(
    inputs, tmp_path, monkeypatch, capsys
):
    life, out = tmp_path / "life.yaml", tmp_path / "life"
    life.write_text((inputs / "tiny.yaml").read_text() + "---\nseed: 11\n")
    words = ["simulate", life, "--data", inputs, "--out", out, "--workers", "0"]
    words = [str(word) for word in (*words, "--set", "rounds=1")]
    monkeypatch.setattr(sys, "argv", ["securefedcollm", *words])
    with pytest.raises(SystemExit) as ended:
        main()
    assert ended.value.code == 2
    said = capsys.readouterr().err
    assert "error: silo-1: record data: " in said
    assert "of 8 is spent" in said
    assert "--records skip" in said
    assert (out / "tiny" / "results.json").exists()
    assert not (out / "tiny-2").exists()
    assert len(charged(out / "ledgers", "silo-1")) == 1

    result = CliRunner().invoke(app, [*words, "--resume", "--records", "skip", "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert [evidence["holds"] for evidence in found["evidence"]] == [True, True]
    assert found["evidence"][1]["passed"] == found["evidence"][0]["passed"] + 1  # the chain
    assert {silo["records"] for silo in found["studies"][0]["silos"]} == {32}
    assert all(silo["records"] < 32 for silo in found["studies"][1]["silos"])
    assert len(charged(out / "ledgers", "silo-1")) == 2

    # The next one starts with new ledgers, or the old ones would refuse it.
    monkeypatch.setattr(EmbeddedEngine, "exchange", lambda engine, frames, timeout: stop())
    with pytest.raises(Killed):
        CliRunner().invoke(app, [*words, "--overwrite"])
    assert not (out / "tiny-2").exists()
    assert charged(out / "ledgers", "silo-1") == []


def stop():
    raise Killed


def test_nothing_is_left_out_of_a_life_with_a_validation(inputs, tmp_path):
    """Said before the first study begins, not hours later."""
    text = (inputs / "tiny.yaml").read_text() + "---\nvalidation: {share: 0.2}\n"
    (tmp_path / "life.yaml").write_text(text)
    words = ["simulate", tmp_path / "life.yaml", "--data", inputs, "--records", "skip"]
    words += ["--out", tmp_path / "life"]
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(result.exception, ConfigError)
    assert result.exception.where == "--records"
    assert not (tmp_path / "life").exists()
