"""A chain of two studies over FLARE, every role a process of its own as its user starts it.

Adversary: nobody new. What a chain and a validation promise has to hold between real roles as well.
Each silo has the first study's adapter from its own home, the ledgers go on, and the evidence is
one chain.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.federation.parts import validation_study
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import digest, load_study
from tests.support.consortium import SILOS, make_homes, play_roles
from tests.support.inputs import make_inputs
from tests.support.members import write_signed

pytestmark = [pytest.mark.soak, pytest.mark.long, pytest.mark.timeout(900)]


def typed(*words) -> str:
    result = CliRunner().invoke(app, [str(word) for word in words])
    assert result.exit_code == 0, (words, result.output, result.exception)
    return result.stdout


def run_of(home: Path, study) -> Path:
    return home / "studies" / f"{study.study}-{digest(study).hex()[:12]}"


def play(file: Path, homes: dict[str, Path], inputs: Path) -> None:
    """The study ``file`` on the files that were dealt out, to its end."""
    dealt = inputs / "dealt"
    words = {"server": ["server", file, "--public", dealt / "public.jsonl"]}
    for name in SILOS:
        words[name] = ["client", file, "--data", dealt / f"{name}.jsonl", "--budget", "8"]
    play_roles(words, homes, inputs)


def test_a_chain_whose_second_study_has_a_validation(tmp_path):
    homes, inputs = make_homes(tmp_path), tmp_path / "inputs"
    inputs.mkdir()
    make_inputs(inputs)
    changes = ["silos.count=3", "rounds=1", "privacy.epsilon=3"]
    file = write_signed(load_study(inputs / "tiny.yaml", changes), homes, tmp_path / "first.yaml")
    first = load_study(file)
    typed("study", "deal", file, "--out", inputs / "dealt", "--data", inputs)
    play(file, homes, inputs)

    follows = tmp_path / "follows.yaml"
    words = ["study", "continue", run_of(homes["server"], first), "--orthogonal", "--out", follows]
    words += ["--set", "validation={share: 0.25}", "--set", "rounds=2"]
    typed(*words, "--set", "keep={metric: private}")
    file = write_signed(load_study(follows), homes, tmp_path / "second.yaml")
    second = load_study(file)
    play(file, homes, inputs)

    # What the server was told of the records that were set aside: noised counts, once a round.
    run = run_of(homes["server"], second)
    rounds = json.loads((run / "results.json").read_text())["rounds"]
    assert [len(record["private"]["counts"]) for record in rounds] == [2, 2]
    for name in SILOS:
        home = homes[name]
        with Ledger(home / "ledger.sqlite", name) as ledger:
            studies = [entry.about.study for entry in ledger.entries()]
            tuned, held = digest(second).hex(), validation_study(second)
            assert studies == [digest(first).hex(), tuned, held, tuned, held]
            for entry in ledger.entries():
                assert ledger.standing(ledger.stored(entry.about.records)).worst <= 8.0
        adapters = [
            (place / "adapters/slm/adapter_model.safetensors").read_bytes()
            for place in (run_of(home, second), run)
        ]
        assert adapters[0] == adapters[1]

    said = (homes["silo-1"] / "said.log").read_text()
    assert "(this silo was in it)" in said
    assert "round 1 of 2, validation: the counts are finished and charged" in said
    for part in ("tuned on", "set aside"):
        assert f"the run is settled for the records that are {part}: ε = " in said

    # One participant's bundles hold. All of them together, merged, are a chain.
    merged = {}
    for study, its_file in ((first, tmp_path / "first.yaml"), (second, file)):
        bundles = [tmp_path / f"{name}-{study.study}.zip" for name in homes]
        for home, bundle in zip(homes.values(), bundles, strict=True):
            typed("audit", "bundle", run_of(home, study), "--out", bundle)
            typed("audit", "verify", bundle, "--study", its_file)
        merged[study.study] = tmp_path / f"{study.study}.zip"
        typed("audit", "merge", *bundles, "--out", merged[study.study])
    words = ["audit", "verify", merged[second.study], "--study", file, "--json"]
    found = json.loads(typed(*words, "--earlier", merged[first.study]))
    assert found["holds"]
    passed = {check["name"] for check in found["results"] if check["status"] == "pass"}
    assert passed >= {"continued", "transcripts", "mechanism", "budget"}
    assert "continued" not in {  # the control
        check["name"] for check in json.loads(typed(*words))["results"] if check["status"] == "pass"
    }
