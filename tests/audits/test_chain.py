"""``audit verify --earlier``: a study starts from what the earlier runs released, or it shows.

Adversary: whoever writes the next study, or hands the auditor another past. Every attack goes
through with every other check: only the chain stops it.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from securefedcollm_audits.report.report import make_report
from securefedcollm_audits.verification.expected import Expected
from securefedcollm_audits.verification.verify import verify
from securefedcollm_cli.audit import write_bundle
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, EvidenceError
from securefedcollm.evidence.bundle import pack, read_members
from securefedcollm.evidence.entries import canonical
from securefedcollm.federation import tuned
from securefedcollm.federation.continuing import beside, earlier_bundles
from securefedcollm.primitives import sha256
from securefedcollm.study import load_study
from securefedcollm.tuning.models import load_model
from tests.support.chain import PLAIN, next_study, simulated
from tests.support.inputs import make_inputs


@pytest.fixture(scope="module")
def life(tmp_path_factory):
    """Two honest runs, the second from what the first released, and a third."""
    inputs = tmp_path_factory.mktemp("life")
    study = load_study(make_inputs(inputs), [*PLAIN, "rounds=1"])
    first = simulated(study, inputs, "first")
    second = simulated(next_study(first), inputs, "second")
    simulated(next_study(second, orthogonal=True), inputs, "third")
    return inputs


def bundle(inputs, name):
    return inputs / name / "evidence.zip"


def followed(inputs, name, *earlier):
    """What the chain says of a bundle, and whether all the rest holds."""
    paths = [x if hasattr(x, "parent") else bundle(inputs, x) for x in earlier]
    verdict = verify(bundle(inputs, name), Expected(earlier=paths))
    chain = next(r for r in verdict.results if r.name == "continued")
    assert [r.name for r in verdict.failed if r.name != "continued"] == []
    return chain


def test_an_honest_chain_verifies_offline(life):
    assert followed(life, "second", "first").status == "pass"
    whole = followed(life, "third", "second", "first")
    assert whole.status == "pass"
    assert "2 earlier runs (tiny, tiny-2)" in whole.evidence


def test_a_pinned_base_is_pinned_with_what_is_folded_into_it(life):
    """A study pins the files that its participants have, so the pin is that of the first base."""
    pin = load_model("path:slm", base_dir=life).digest
    simulated(next_study(life / "first", [f"models.slm.sha256={pin}"]), life, "pinned")
    verdict = verify(bundle(life, "pinned"))
    models = next(r for r in verdict.results if r.name == "models")
    assert models.status == "pass"
    assert "as the study pins it" in models.evidence
    assert followed(life, "pinned", "first").status == "pass"


def test_a_past_that_nobody_shows_is_not_believed(life):
    for earlier in ((), ("second",)):
        chain = followed(life, "third", *earlier)
        assert chain.status == "not covered"
        assert "first" in chain.evidence
    with pytest.raises(ConfigError, match="no earlier run"):
        verify(bundle(life, "first"), Expected(earlier=[bundle(life, "second")]))


@pytest.mark.soak
def test_a_past_whose_budget_nobody_shows_is_not_believed(tmp_path):
    """Whoever overspent in the earlier run hands over the server's log alone."""
    study = load_study(make_inputs(tmp_path), ["rounds=1"])
    first = simulated(study, tmp_path, "first")
    simulated(next_study(first), tmp_path, "second")
    assert followed(tmp_path, "second", "first").status == "pass"  # the control
    alone = tmp_path / "alone.zip"
    write_bundle(first, alone, ["server"])
    assert verify(alone).holds
    chain = followed(tmp_path, "second", alone)
    assert chain.status == "not covered"
    assert "charged-first, mechanism" in chain.evidence
    rows = life_of(tmp_path, "second", "first")
    reports = [make_report(bundle(tmp_path, name))[0] for name in ("first", "second")]
    assert [row.spent for row in rows] == [report.epsilon for report in reports]
    assert life_of(tmp_path, "second", alone)[0].spent is None


def life_of(inputs, name, *earlier):
    paths = [x if hasattr(x, "parent") else bundle(inputs, x) for x in earlier]
    return make_report(bundle(inputs, name), None, Expected(earlier=paths))[0].life


def test_a_report_that_cannot_be_made_does_not_blame_the_wrong_bundle(life, monkeypatch):
    """The figures of an earlier bundle may be what cannot be computed."""

    def broken(*given):
        raise ValueError("no such figure")

    monkeypatch.setattr("securefedcollm_audits.report.report.life", broken)
    with pytest.raises(EvidenceError, match="or a bundle of an earlier run: too broken"):
        life_of(life, "second", "first")


def test_a_bundle_of_another_study_is_not_taken_for_the_earlier_one(life, tmp_path, monkeypatch):
    """In a directory of the same name, of another life, where the command is typed."""
    study = load_study(life / "second" / "study.yaml")
    shutil.copytree(life / "third", tmp_path / "first")
    monkeypatch.chdir(tmp_path)
    assert earlier_bundles(study, None) == []
    (tmp_path / "first" / "study.yaml").unlink()
    assert earlier_bundles(study, None) == []
    with beside(life / "second"):
        assert earlier_bundles(study, None) == [life / "first" / "evidence.zip"]
    monkeypatch.chdir(life / "second")
    with beside(Path()):
        assert earlier_bundles(study, None) == [life / "first" / "evidence.zip"]


def caught(life, name, *earlier):
    chain = followed(life, name, *earlier)
    assert chain.status == "fail"
    return " ".join(chain.faults)


def test_another_adapter_than_the_run_released_is_caught(life):
    """The authors put a file of their own in the released one's place, and its digest into the
    study. All who load it find the file that the study names."""
    run = life / "elsewhere"
    shutil.copytree(life / "first" / "adapters", run / "adapters")
    path = run / "adapters" / "slm" / "adapter_model.safetensors"
    tensors = load_file(path)
    save_file({name: np.float32(1.5) * value for name, value in tensors.items()}, path)
    study = next_study(life / "first")
    (link,) = study.tree["continue"]["earlier"]
    swapped = link | {"run": "elsewhere", "slm": sha256(path.read_bytes()).hex()}
    study = load_study(study.tree | {"continue": {"earlier": [swapped]}})
    simulated(study, life, "swapped")
    assert verify(bundle(life, "swapped")).holds  # as far as anybody can see without the chain
    assert "released another slm adapter" in caught(life, "swapped", "first")


def test_without_the_file_that_the_study_names_no_run_begins(life):
    study = next_study(life / "first")
    (link,) = study.tree["continue"]["earlier"]
    for run, said in (("second", "is not the adapter that the study names"), ("x", "not there")):
        other = load_study(study.tree | {"continue": {"earlier": [link | {"run": run}]}})
        with pytest.raises(ConfigError, match=said):
            simulated(other, life, "none")
        assert not (life / "none").exists()


def test_another_run_of_the_same_study_is_caught(life):
    """Somebody runs the first study twice and continues from the run that pleases."""
    study = load_study(life / "first" / "study.yaml")
    simulated(study, life, "again")
    assert "is another run of that study" in caught(life, "second", "again")
    assert [row.sound for row in life_of(life, "second", "again")] == [None, True]


@pytest.mark.soak
def test_a_wrong_head_scale_or_past_is_caught(life):
    study = next_study(life / "second")
    one, two = study.tree["continue"]["earlier"]
    for number, (change, said) in enumerate(
        (
            ([one, two | {"root": "0" * 64}], "is another run of that study"),
            ([one, two | {"entries": 999}], "the study names 999"),
            ([one, two | {"scale": two["scale"] / 2}], "its adapters have the scale"),
            ([one, two | {"llm": None}], "released another llm adapter"),
            (
                [two | {"study": one["study"]}, one | {"study": two["study"]}],
                "released another slm",
            ),
        )
    ):
        other = load_study(study.tree | {"continue": {"earlier": change}})
        simulated(other, life, f"wrong-{number}")
        assert verify(bundle(life, f"wrong-{number}")).holds
        assert said in caught(life, f"wrong-{number}", "first", "second")
    only = load_study(study.tree | {"continue": {"earlier": [two]}})  # the first is left out
    simulated(only, life, "short")
    assert "started from other runs" in caught(life, "short", "second")


def test_participants_who_tune_another_base_are_caught(life, monkeypatch):
    """Server and silos together leave the fold out, whatever their study says."""
    monkeypatch.setattr(tuned, "released", lambda study, name, data: ())
    monkeypatch.setattr(tuned, "base_of", lambda study, name, raw: raw)
    simulated(next_study(life / "first"), life, "bare")
    assert verify(bundle(life, "bare")).holds
    assert "tuned the base" in caught(life, "bare", "first")


def test_an_earlier_run_that_does_not_verify_is_caught(life, tmp_path):
    members = read_members(bundle(life, "first"))
    del members["manifest.json"]
    listed = json.loads(members["artefacts.json"])
    path = min(listed)
    members["artefacts.json"] = canonical(listed | {path: "0" * 64})
    forged = tmp_path / "forged.zip"
    forged.write_bytes(pack(members))
    assert "not so" in caught(life, "second", forged)
    assert "not so" in caught(life, "third", forged, "second")
    forged.write_bytes(b"no archive")
    assert "not so" in caught(life, "second", forged)


def test_a_bundle_of_another_study_is_no_past(life):
    assert "does not name" in caught(life, "second", "first", "third")
    assert "second bundle" in caught(life, "second", "first", "first")


def test_an_edited_study_fits_nothing_else(life, tmp_path):
    """Whoever holds the bundle changes the digests in its study: every header is bound to it."""
    members = read_members(bundle(life, "second"))
    del members["manifest.json"]
    study = json.loads(members["study.json"])
    study["continue"]["earlier"][0]["root"] = "0" * 64
    members["study.json"] = canonical(study)
    forged = tmp_path / "forged.zip"
    forged.write_bytes(pack(members))
    failed = {r.name for r in verify(forged, Expected(earlier=[bundle(life, "first")])).failed}
    assert {"continued", "membership", "headers"} <= failed


def test_the_command_line_follows_the_chain(life):
    words = ["audit", "verify", str(bundle(life, "second")), "--json"]
    for more, status in (([], "not covered"), (["--earlier", bundle(life, "first")], "pass")):
        result = CliRunner().invoke(app, [*words, *map(str, more)])
        assert result.exit_code == 0
        results = json.loads(result.stdout)["results"]
        assert {r["status"] for r in results if r["name"] == "continued"} == {status}
    wrong = CliRunner().invoke(app, [*words, "--earlier", str(bundle(life, "third"))])
    assert wrong.exit_code == 1


def test_the_report_names_the_chain_and_covers_it(life, tmp_path):
    page = tmp_path / "report.html"
    words = ["audit", "report", bundle(life, "third"), "--html", page]
    for name in ("first", "second"):
        words += ["--earlier", bundle(life, name)]
    assert CliRunner().invoke(app, [str(word) for word in words]).exit_code == 0
    text = page.read_text()
    assert "2 earlier runs (tiny, tiny-2)" in text
    for name in ("first", "second"):
        assert load_study(life / name / "study.yaml").digest.hex()[:16] in text
    assert "tiny-3 (this one)" in text


def test_the_report_has_a_row_for_every_study_of_the_chain(life, tmp_path):
    rows = life_of(life, "third", "second")
    assert [row.sound for row in rows] == [None, True, True]
    assert [row.name for row in rows[:2]] == ["", "tiny-2"]  # nobody showed the first
    assert [row.rounds for row in rows[1:]] == ["1 of 1", "1 of 1"]
    assert life_of(life, "first") == []
    members = read_members(bundle(life, "second"))
    broken = tmp_path / "broken.zip"
    del members["manifest.json"]
    broken.write_bytes(pack({**members, "heads/silo-1.json": members["heads/silo-2.json"]}))
    assert [row.sound for row in life_of(life, "third", broken)] == [None, False, True]
