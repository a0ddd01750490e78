"""A life of several studies: killed anywhere it goes on, and every study's evidence is a chain.

Adversary: the power cut, and a slip of the operator's pen.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
from securefedcollm_audits.verification.expected import Expected
from securefedcollm_audits.verification.verify import verify
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError
from securefedcollm.federation.continuing import continued
from securefedcollm.federation.cotuning import ServerTuning, SiloTuning
from securefedcollm.federation.dealing import deal
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import sha256
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.simulation.life import play
from securefedcollm.simulation.plan import SimulationPlan
from securefedcollm.study import load_study
from tests.support.chain import PLAIN, next_study, simulated
from tests.support.inputs import make_inputs
from tests.support.rounds import Killed

ADAPTERS = ("slm", "llm")
LIFE = ("tiny", "tiny-2", "last")


@pytest.fixture(scope="module")
def inputs(tmp_path_factory):
    directory = tmp_path_factory.mktemp("inputs")
    make_inputs(directory)
    return directory


@pytest.fixture(scope="module")
def first(inputs):
    """A finished run without noise, so that what follows it can be compared bit for bit."""
    return simulated(load_study(inputs / "tiny.yaml", [*PLAIN, "rounds=1"]), inputs, "first")


def adapters(run: Path) -> list[str]:
    files = [run / "adapters" / name / "adapter_model.safetensors" for name in ADAPTERS]
    return [sha256(file.read_bytes()).hex() for file in files]


def charges(run: Path) -> dict[str, list[tuple[object, ...]]]:
    """By silo: what its ledger has charged, and what for."""
    found = {}
    for home in sorted((run / "silos").iterdir()):
        with Ledger(home / "ledger.sqlite", home.name) as ledger:
            found[home.name] = [(e.key.round, e.state, e.counted) for e in ledger.entries()]
    return found


class Counting:
    """Dies before or after the k-th exchange of the process; never, if ``at`` is negative."""

    def __init__(self, monkeypatch, at=-1, *, before=False):
        self.seen, real = 0, EmbeddedEngine.exchange

        def exchange(engine, frames, timeout):
            self.seen += 1
            if before and self.seen == at:
                raise Killed
            replies = real(engine, frames, timeout)
            if self.seen == at:
                raise Killed
            return replies

        monkeypatch.setattr(EmbeddedEngine, "exchange", exchange)


@pytest.mark.soak
@pytest.mark.parametrize("privacy", ["none", "{epsilon: 8, delta: 1e-5}"])
def test_killed_in_every_exchange_the_second_study_goes_on(inputs, first, monkeypatch, privacy):
    study = next_study(first, [f"privacy={privacy}"], orthogonal=True)
    name = "exact" if privacy == "none" else "noised"
    with monkeypatch.context() as patch:
        counting = Counting(patch)
        whole = simulated(study, inputs, f"{name}-whole")
    assert counting.seen >= 5
    for at in range(1, counting.seen + 1):
        for before in (True, False) if privacy == "none" else (False,):
            cut = f"{name}-{at}-{before}"
            with monkeypatch.context() as patch:
                Counting(patch, at, before=before)
                with pytest.raises(Killed):
                    simulated(study, inputs, cut)
            run = simulated(study, inputs, cut, resume=True)
            if privacy == "none":
                assert adapters(run) == adapters(whole)
            assert charges(run) == charges(whole)
            verdict = verify(run / "evidence.zip", Expected(earlier=[first / "evidence.zip"]))
            assert verdict.holds
            assert {r.name for r in verdict.results if r.status == "pass"} >= {"continued"}


def test_the_second_study_begins_with_what_the_first_released(inputs, first):
    study = next_study(first)
    told = json.loads((first / "results.json").read_text())["table"]
    before = {f"{row['model']}/{g}": a for row in told for g, a in row["accuracy"].items()}
    dealt = deal(study, inputs)
    server = ServerTuning(study, public=dealt.public, test=dealt.test, data=inputs)
    assert server.evaluate() == pytest.approx(before)


def test_a_silo_keeps_the_very_file_that_the_server_releases(inputs, first, tmp_path):
    """So a participant's own copy of an earlier adapter has the digest that the study names."""
    study = next_study(first, orthogonal=True)
    dealt = deal(study, inputs)
    server = ServerTuning(study, public=dealt.public, data=inputs)
    silo = SiloTuning(study, "silo-1", dealt.silos["silo-1"], data=inputs)
    assert silo.base_digest == server.base_digest
    assert (
        silo.base_digest
        != ServerTuning(
            load_study(first / "study.yaml"), public=dealt.public, data=inputs
        ).base_digest
    )
    server.save(tmp_path)
    silo.save(server.adapter() + 0.125, tmp_path / "silo", {"proof.json": b"{}"})
    file = "adapter_model.safetensors"
    assert (tmp_path / "slm" / file).read_bytes() != (tmp_path / "silo" / file).read_bytes()
    silo.save(server.adapter(), tmp_path / "silo", {"proof.json": b"{}"})
    assert (tmp_path / "slm" / file).read_bytes() == (tmp_path / "silo" / file).read_bytes()


def test_a_directory_named_as_in_a_participants_home_is_found(inputs, first, tmp_path):
    study = next_study(first)
    (link,) = study.tree["continue"]["earlier"]
    for name in ("llm", "slm", "train.jsonl", "test.jsonl"):
        (tmp_path / name).symlink_to(inputs / name)
    study = load_study(study.tree | {"continue": {"earlier": [link | {"run": "elsewhere"}]}})
    with pytest.raises(ConfigError, match="is not there"):
        ServerTuning(study, public=(), data=tmp_path, distillation=False)
    (tmp_path / f"tiny-{link['study'][:12]}").symlink_to(first)
    ServerTuning(study, public=(), data=tmp_path, distillation=False)


def life_of(inputs: Path) -> Path:
    text = (inputs / "tiny.yaml").read_text()
    later = "---\nsilos: {count: 3}\ncontinue: {orthogonal: true}\n---\nstudy: last\n"
    (inputs / "life.yaml").write_text(text + later + "silos: {count: 4}\n")
    return inputs / "life.yaml"


@pytest.mark.soak
def test_a_file_of_several_studies_is_played_and_goes_on_where_it_was_killed(
    inputs, tmp_path, monkeypatch
):
    from securefedcollm.study.life import load_life

    trees = load_life(life_of(inputs), [*PLAIN, "rounds=1"])
    plan = SimulationPlan(out=tmp_path / "whole", data=inputs, workers=0)
    with monkeypatch.context() as patch:
        counting = Counting(patch)
        results = play(trees, plan, silent, lambda text: None)
    assert [result["study"] for result in results] == ["tiny", "tiny-2", "last"]
    assert [len(result["silos"]) for result in results] == [4, 3, 4]  # silos come and go
    cut = SimulationPlan(out=tmp_path / "cut", data=inputs, workers=0)
    with monkeypatch.context() as patch:
        Counting(patch, counting.seen // 2, before=False)
        with pytest.raises(Killed):
            play(trees, cut, silent, lambda text: None)
    assert (cut.out / "tiny-2").exists()
    assert not (cut.out / "last").exists()
    said = (cut.out / "tiny" / "server" / "evidence.sqlite").stat().st_mtime_ns
    again = SimulationPlan(out=cut.out, data=inputs, workers=0, resume=True)
    assert len(play(trees, again, silent, lambda text: None)) == 3
    assert (cut.out / "tiny" / "server" / "evidence.sqlite").stat().st_mtime_ns == said
    for name in ("tiny", "tiny-2", "last"):
        assert adapters(cut.out / name) == adapters(plan.out / name)


def files(directory: Path) -> dict[str, bytes]:
    """Every file under ``directory``, with its content."""
    found = (path for path in directory.rglob("*") if path.is_file())
    return {str(path.relative_to(directory)): path.read_bytes() for path in found}


@pytest.mark.soak
def test_simulate_verifies_every_study_of_a_life(inputs, tmp_path):
    words = ["simulate", life_of(inputs), "--data", inputs, "--out", tmp_path / "life"]
    words += ["--workers", "0", "--set", "rounds=1", "--set", "privacy=none"]
    result = CliRunner().invoke(app, [*map(str, words), "--json"])
    assert result.exit_code == 0, result.exception
    found = json.loads(result.stdout)
    assert [evidence["holds"] for evidence in found["evidence"]] == [True] * 3
    passed = [evidence["passed"] for evidence in found["evidence"]]
    assert passed[0] + 1 == passed[1] == passed[2]  # the chain is one check more
    for name in LIFE:  # what others are shown and sign names no place of this machine
        assert str(tmp_path) not in (tmp_path / "life" / name / "study.yaml").read_text()
    links = load_study(tmp_path / "life" / "last" / "study.yaml").continues.earlier
    assert [link.run for link in links] == ["tiny", "tiny-2"]
    again = CliRunner().invoke(app, [str(word) for word in words])
    assert isinstance(again.exception, ConfigError)
    before = files(tmp_path / "life")
    assert not [name for name in before if name.endswith("-wal")]  # each database is closed
    for more in (["--set", "models.slm.source=path:gone"], ["--resume"]):
        failed = CliRunner().invoke(app, [*map(str, words), "--overwrite", *more])
        assert isinstance(failed.exception, ConfigError)
        assert files(tmp_path / "life") == before  # a start that fails loses nothing
    (tmp_path / "life" / "notes").write_text("ours")
    more = ["--overwrite", "--states", tmp_path / "states", "--set", "adapter.top_layers=1"]
    shown = CliRunner().invoke(app, [*map(str, words), *map(str, more)])
    assert "after each study" in shown.stdout
    assert shown.stdout.count("evidence verified offline") == 3
    assert (tmp_path / "life" / "notes").read_text() == "ours"
    after = files(tmp_path / "life")
    assert all(after[f"{name}/results.json"] != before[f"{name}/results.json"] for name in LIFE)
    assert any((tmp_path / "states").iterdir())


def test_a_strangers_directory_is_never_removed(inputs, tmp_path):
    """A slip of the pen: ``--out ~ --overwrite``."""
    for number, name in enumerate(("thesis", "tiny")):  # also one that is called as a study
        home = tmp_path / str(number)
        (home / name).mkdir(parents=True)
        (home / name / "work.tex").write_text("years of work")
        words = ["simulate", life_of(inputs), "--data", inputs, "--out", home, "--overwrite"]
        result = CliRunner().invoke(app, [str(word) for word in words])
        assert isinstance(result.exception, ConfigError)
        assert "nothing is removed" in str(result.exception)
        assert (home / name / "work.tex").exists()


def test_only_a_finished_run_that_is_its_own_can_be_continued(inputs, first, tmp_path):
    with pytest.raises(ConfigError, match="not a run directory"):
        continued(tmp_path, "x")
    for number, (remove, said) in enumerate(
        (
            ("results.json", "not finished"),
            ("server", "no evidence log"),
            ("adapters", "there is no"),
        )
    ):
        run = tmp_path / str(number)
        run.mkdir()
        for path in first.iterdir():
            if path.name != remove:
                (run / path.name).symlink_to(path)
        with pytest.raises(ConfigError, match=said) as caught:
            continued(run, "x")
        assert caught.value.hint


@pytest.mark.parametrize("method", ["prompt", "prefix"])
def test_virtual_tokens_are_no_start(inputs, method):
    study = load_study(inputs / "tiny.yaml", [*PLAIN, "rounds=1"])
    adapter = {"method": method, "virtual_tokens": 2}
    study = load_study({**study.tree, "adapter": adapter, "study": method})
    run = simulated(study, inputs, method)
    with pytest.raises(ConfigError, match="cannot be folded") as caught:
        continued(run, method)
    assert "ffa-lora" in caught.value.hint


def test_all_weights_go_on_from_an_adapter_and_leave_a_model(inputs, first):
    changes = ["models.llm=none", "distillation={}", "adapter={method: full}"]
    run = simulated(next_study(first, changes), inputs, "full")
    verdict = verify(run / "evidence.zip", Expected(earlier=[first / "evidence.zip"]))
    assert verdict.holds
    assert {r.name for r in verdict.results if r.status == "pass"} >= {"continued"}
    told = json.loads((run / "results.json").read_text())["table"]
    before = json.loads((first / "results.json").read_text())["table"]
    slm = [row["accuracy"] for row in before if row["model"] == "slm"]
    assert told[0]["accuracy"] == pytest.approx(slm[-1])  # before it begins
    with pytest.raises(ConfigError, match="whole model") as caught:
        continued(run, "full")
    assert "path:" in caught.value.hint


def test_the_command_writes_a_study_that_runs(inputs, first):
    out = inputs / "next.yaml"
    result = CliRunner().invoke(app, ["study", "continue", str(first), "--out", str(out)])
    assert result.exit_code == 0, result.exception
    assert "tiny-2 goes on from tiny" in result.stdout
    study = load_study(out)
    assert study.continues.earlier[0].run == "first"
    simulated(study, inputs, "by-command")
    words = ["study", "continue", inputs / "by-command", "--config", inputs / "tiny.yaml"]
    words += ["--set", "study=fresh", "--set", "silos.count=3", "--orthogonal", "--as", "b"]
    shown = CliRunner().invoke(app, [str(word) for word in words])
    (inputs / "shown.yaml").write_text(shown.stdout)
    written = load_study(inputs / "shown.yaml")
    assert [link.run for link in written.continues.earlier] == ["first", "b"]
    assert (written.study, written.silos.count) == ("fresh", 3)
    assert written.continues.orthogonal


def test_beside_the_adapter_stands_what_it_has_to_be_put_on(inputs, first):
    """Adversary: nobody; somebody who loads it on the base model alone gets another model."""
    study = next_study(first)
    run = simulated(study, inputs, "beside")
    here = run / "adapters" / "slm"
    contract = json.loads((here / "task.json").read_text())
    (link,) = contract["continues"]
    assert link["slm"] == adapters(first)[0]
    assert link["study_sha256"] == load_study(first / "study.yaml").digest.hex()
    assert "does not fit the base model alone" in (here / "README.md").read_text()
    earlier = first / "adapters" / "slm"
    assert "continues" not in json.loads((earlier / "task.json").read_text())
    assert "does not fit" not in (earlier / "README.md").read_text()


def test_evaluate_and_merge_of_a_run_fold_what_it_started_from(inputs, first):
    run = simulated(next_study(first), inputs, "whole")
    told = json.loads((run / "results.json").read_text())["table"]
    slm = next(r["accuracy"] for r in told if (r["model"], r["method"]) == ("slm", "FedCoLLM"))
    words = ["model", "evaluate", "--run", run, "--role", "slm"]
    result = CliRunner().invoke(app, [str(w) for w in (*words, "--data", inputs, "--json")])
    assert result.exit_code == 0, result.exception
    scores = json.loads(result.stdout)["all"]
    assert scores["accuracy"] == pytest.approx(sum(slm.values()) / len(slm))
    words = ["model", "merge", "--run", run, "--role", "slm", "--out", inputs / "merged"]
    assert CliRunner().invoke(app, [str(w) for w in (*words, "--data", inputs)]).exit_code == 0
    words = ["model", "evaluate", "--test", inputs / "test.jsonl", "--json"]
    words += ["--model", inputs / "merged"]
    again = json.loads(CliRunner().invoke(app, [str(word) for word in words]).stdout)["all"]
    assert again["gold_log_prob"] == pytest.approx(scores["gold_log_prob"], abs=1e-5)
    elsewhere = inputs / "elsewhere"
    shutil.copytree(run, elsewhere / "whole")
    for name in ("slm", "llm"):
        (elsewhere / name).symlink_to(inputs / name)
    words = [
        "model",
        "merge",
        "--run",
        elsewhere / "whole",
        "--role",
        "slm",
        "--out",
        inputs / "no",
    ]
    alone = CliRunner().invoke(app, [str(w) for w in (*words, "--data", elsewhere)])
    assert isinstance(alone.exception, ConfigError)
    assert "the earlier run's adapter is not there" in str(alone.exception)
    (elsewhere / "first").symlink_to(first)  # the control: beside the run
    words = [*words[:-1], inputs / "yes", "--data", elsewhere]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
