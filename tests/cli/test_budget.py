"""``budget plan``, ``show`` and ``report``, as a person or a script runs them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from securefedcollm_audits.privacy.finding import Finding, write_down
from securefedcollm_cli.budget import app
from typer.testing import CliRunner

from securefedcollm.errors import ConfigError, StateError
from securefedcollm.evidence.log import FILE_NAME, EvidenceLog
from securefedcollm.federation import sizes
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.events import Gaussian
from securefedcollm.privacy.ledger import Ledger, Reservation
from securefedcollm.study import digest, dump_study, load_study
from securefedcollm.study.identity import create_identity

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"


def run(*words: object):
    return CliRunner().invoke(app, [str(word) for word in words])


def output(*words: object) -> str:
    result = run(*words)
    assert result.exit_code == 0, result.exception
    return result.stdout


def test_plan_as_json():
    (made,) = json.loads(output("plan", QUICKSTART, "--json"))
    assert made["epsilon"] == 8.0
    assert [f"{o['unit']}/{o['noise']}" for o in made["options"]] == [
        "record/local",
        "record/distributed",
        "silo/distributed",
    ]
    assert all(option["epsilon"] <= 8.0 for option in made["options"])


def test_plan_for_people_says_what_is_hopeless():
    text = " ".join(output("plan", QUICKSTART, "--epsilon", "1", "--values", "5000").split())
    assert "ε = 1" in text
    assert "5,000 values" in text
    assert "hopeless" in text
    assert "silo/distributed would release noise, not a model" in text
    assert "record/distributed: charged ε = 1.000, 0." in text
    assert "if all silos stay; joint DP-SGD" in text


def test_plan_of_a_study_without_privacy_needs_an_epsilon():
    result = run("plan", QUICKSTART, "--set", "privacy=null")
    assert isinstance(result.exception, ConfigError)
    assert "--epsilon" in result.exception.hint
    words = ("--set", "privacy=null", "--epsilon", "3", "--json")
    (made,) = json.loads(output("plan", QUICKSTART, *words))
    assert made["epsilon"] == 3.0


SUBJECT = ("--set", "privacy.unit=subject", "--set", "privacy.subject=patient")


def test_plan_for_a_whole_patient_counts_patients():
    (made,) = json.loads(output("plan", QUICKSTART, *SUBJECT, "--json"))
    ours, *_ = made["options"]
    assert (ours["unit"], ours["noise"], ours["offered"]) == ("subject", "local", True)
    assert ours["sampling_rate"] == 256 / sizes.BUILTIN_SUBJECTS


def test_plan_for_subjects_of_a_file_asks_how_many_there_are():
    files = "task.data={train: a.csv, test: b.csv, public: 9, per_silo: 900}"
    result = run("plan", QUICKSTART, *SUBJECT, "--set", files)
    assert isinstance(result.exception, ConfigError)
    assert "give --records N" in result.exception.hint


def test_sizes_of_the_built_in_study_are_the_real_ones():
    """The planner must not load torch: its copy of these facts is checked against the source."""
    from securefedcollm.tuning.builtin import RECIPES
    from securefedcollm.tuning.models import PREPARED
    from securefedcollm.tuning.world import VOCABULARY, World

    study = load_study(QUICKSTART)
    for role, recipe in RECIPES.items():
        assert {
            "hidden_size": recipe.hidden,
            "intermediate_size": recipe.intermediate,
            "num_hidden_layers": recipe.layers,
            "num_attention_heads": recipe.heads,
            "num_key_value_heads": recipe.heads,
            "vocab_size": len(VOCABULARY),
            "tie_word_embeddings": True,
        } == sizes.BUILTIN_MODELS[f"hospital-{role}"]
    assert {*sizes.BUILTIN_MODELS} == {"hospital-llm", "hospital-slm", *PREPARED}
    records = World(seed=1, silos=4).records(0)
    assert len(records) == sizes.BUILTIN_RECORDS
    assert len({record.subject for record in records}) == sizes.BUILTIN_SUBJECTS
    assert sizes.update_values(study, None) == 11_264
    assert sizes.update_values(load_study("pretrain", ["adapter={method: full}"]), None) == 134_464


@pytest.mark.parametrize(
    ("adapter", "values"),
    [
        ("{method: ffa-lora, rank: 4}", 704 * 2 * 4),
        ("{method: lora, rank: 4}", (704 + 64 * 6 + 192) * 2 * 4),
        ("{method: rolora, rank: 4}", 704 * 2 * 4),
        ("{method: ffa-lora, rank: 4, targets: [q_proj, v_proj]}", 128 * 2 * 4),
        ("{method: ffa-lora, rank: 4, top_layers: 1}", 704 * 4),
    ],
)
def test_adapter_sizes(adapter, values):
    assert sizes.update_values(load_study(QUICKSTART, [f"adapter={adapter}"]), None) == values


def test_every_built_in_model_has_its_own_size():
    """SmolLM2: 30 layers of q, k, v, o, gate, up and down; their outputs for FFA-LoRA of rank 8."""
    outputs = 576 + 192 + 192 + 576 + 1536 + 1536 + 576
    change = ["models.slm.source=builtin:smollm2-135m", "adapter={method: ffa-lora, rank: 8}"]
    assert sizes.update_values(load_study(QUICKSTART, change), None) == 8 * 30 * outputs
    top = [*change, "models.slm.top_layers=4"]
    assert sizes.update_values(load_study(QUICKSTART, top), None) == 8 * 4 * outputs
    unknown = load_study(QUICKSTART, ["models.slm.source=builtin:nothing"])
    with pytest.raises(ConfigError, match="not known before it is loaded"):
        sizes.update_values(unknown, None)


def test_size_of_a_model_in_a_directory(tmp_path):
    (tmp_path / "slm").mkdir()
    config = {
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
    }
    (tmp_path / "slm" / "config.json").write_text(json.dumps(config))
    study = load_study(QUICKSTART, ["models.slm.source='path:slm'"])
    per_layer = 576 + 192 + 192 + 576 + 1536 + 1536 + 576
    assert sizes.update_values(study, tmp_path) == 8 * 30 * per_layer
    with pytest.raises(ConfigError, match="not known"):
        sizes.update_values(study, None)
    (tmp_path / "slm" / "config.json").write_text("{}")
    with pytest.raises(ConfigError, match="Llama-style"):
        sizes.update_values(study, tmp_path)
    (tmp_path / "slm" / "config.json").unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        sizes.update_values(study, tmp_path)


@pytest.fixture
def ledger(tmp_path):
    path = tmp_path / "runs" / "quickstart" / "silos" / "north" / "ledger.sqlite"
    with Ledger(path, "north") as opened:
        opened.release(
            opened.reserve("d" * 64, "record", "run", 0, 0, [Gaussian(2.0)], (8.0, 1e-5))
        )
    return path


def test_show(ledger, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for words in (("show",), ("show", "--ledger", ledger)):
        text = output(*words)
        assert "north" in text
        assert "1 released" in text
    (found,) = json.loads(output("show", "--json"))
    assert found["accounts"][0]["budget"] == {"epsilon": 8.0, "delta": 1e-5}
    assert found["accounts"][0]["spent"]["epsilon"] < 8.0


def test_no_report_has_the_whole_fingerprint_of_a_file(ledger, tmp_path):
    """Adversary: its reader, who knows all records but one and tries what the last may say."""
    shown = [output("show", "--json", "--ledger", ledger), output("show", "--ledger", ledger)]
    output("report", "--html", tmp_path / "page.html", "--ledger", ledger)
    for text in (*shown, (tmp_path / "page.html").read_text(encoding="utf-8")):
        assert "d" * 9 not in text
    assert json.loads(shown[0])[0]["accounts"][0]["dataset"] == "d" * 8  # the control
    with Ledger(ledger, "north") as opened:
        assert opened.entries()[0].key.dataset == "d" * 64


def test_show_without_a_ledger(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert isinstance(run("show").exception, ConfigError)
    assert isinstance(run("show", "--ledger", "absent").exception, StateError)


def test_report(ledger, tmp_path):
    page = tmp_path / "budget.html"
    assert str(page) in output("report", "--html", page, "--ledger", ledger).replace("\n", "")
    assert "Privacy budget of north" in page.read_text(encoding="utf-8")
    failed = run("report", "--html", tmp_path / "no" / "where.html", "--ledger", ledger)
    assert isinstance(failed.exception, StateError)


def test_plan_of_a_joint_study_trades_steps_for_noise():
    joint = QUICKSTART.with_name("quickstart-joint.yaml")
    (made,) = json.loads(output("plan", joint, "--values", "5000", "--json"))
    choices = made["joint_choices"]
    assert [choice["steps"] for choice in choices] == [15, 30, 60, 120, 240]
    assert {round(c["steps"] * c["batch_size"] / 1000) for c in choices} == {31}
    ratios = [choice["run_noise_to_signal"] for choice in choices]
    assert ratios == sorted(ratios)
    assert choices[2]["megabytes"] == pytest.approx(60 * 5000 * 4 / 1e6)
    text = output("plan", joint, "--values", "5000")
    assert "Joint DP-SGD with as many gradients, ε = 8" in text


def test_a_plan_for_silos_of_unequal_size_asks_for_the_smallest():
    with pytest.raises(ConfigError, match=r"task\.data\.skew") as refusal:
        sizes.unit_records(load_study(QUICKSTART, ["task.data.skew=4"]))
    assert "--records" in refusal.value.hint


@pytest.fixture
def home(tmp_path):
    create_identity("north", tmp_path / "home" / "identity.json", None)
    return tmp_path / "home"


def spend_some(home, words, events):
    with Ledger(home / "ledger.sqlite", "north") as ledger:
        contents = [(word.encode() * 32, None) for word in words]
        about = {"records": ledger.identify(contents), "study": words}
        ledger.reserve(words, "record", "run", 0, 0, events, (3.0, 1e-5), **about)


def test_set_pins_what_studies_may_ask_of_a_record(home):
    words = ["set", "--home", home, "--epsilon"]
    assert "--delta" in str(run(*words, "8").exception)
    assert "ε = 8 at δ = 1e-05" in output(*words, "8", "--delta", "1e-5")
    assert "it was ε = 8" in output(*words, "4")
    spend_some(home, "ab", [Gaussian(3.0)])
    assert "--raise" in run(*words, "9").exception.hint
    assert json.loads(output(*words, "9", "--raise", "--json"))["epsilon"] == 9.0
    (found,) = json.loads(output("show", "--ledger", home / "ledger.sqlite", "--json"))
    assert found["pinned"] == {"epsilon": 9.0, "delta": 1e-5}
    assert isinstance(run(*words, "0", "--delta", "1e-5").exception, ConfigError)


def test_show_by_record_says_worst_median_and_unspent(home):
    spend_some(home, "abc", [Gaussian(3.0)])
    spend_some(home, "cdefg", [Gaussian(4.0)])
    path = home / "ledger.sqlite"
    (found,) = json.loads(output("show", "--ledger", path, "--json"))
    first, second = (one["standing"] for one in found["sets"])
    assert (first["accounts"], second["accounts"]) == (3, 5)
    assert first["worst"] == second["worst"] > first["median"] > second["median"] > 0
    assert (first["untouched"], found["unattributed"]) == (0, 0)
    with Ledger(path, "north") as ledger:
        for entry in ledger.entries():
            if entry.key.dataset == "abc":
                ledger.void(Reservation(entry.key, entry.reserved, entry.row))
    (found,) = json.loads(output("show", "--ledger", path, "--json"))
    assert found["sets"][0]["standing"]["untouched"] == 2
    text = output("show", "--ledger", path)
    for said in ("north", "1 reserved", "1 void", "all studies together"):
        assert said in text


def test_show_says_what_an_older_ledger_cannot_attribute(ledger):
    (found,) = json.loads(output("show", "--ledger", ledger, "--json"))
    assert (found["unattributed"], found["sets"]) == (1, [])
    assert "1 charges of an older version" in output("show", "--ledger", ledger)


@pytest.fixture
def audited(tmp_path):
    """A run's directory with three audits in the server's log: two of the study, one of another."""
    study = load_study(QUICKSTART)
    (tmp_path / "server").mkdir()
    (tmp_path / "study.yaml").write_text(dump_study(study))
    key = SigningKey(bytes(32))
    log = EvidenceLog(tmp_path / "server" / FILE_NAME, study=digest(study), owner="server", key=key)
    log.close()
    for of, bound in ((study, 1.37), (study, 2.5), (load_study(QUICKSTART, ["seed=1"]), 7.0)):
        found = Finding("mechanism", of, "one step", 2.66, bound, 1e-5, [], {"canaries": 2.0})
        write_down(found, tmp_path, "server", key)
    return tmp_path


def test_plan_says_what_audits_of_the_study_proved(audited):
    text = output("plan", QUICKSTART, "--values", "5000", "--run", audited)
    lines = [line for line in text.splitlines() if line.startswith("audited")]
    assert len(lines) == 2
    assert lines[0] == (
        "audited: ε ≥ 2.500 of 2.660 claimed for what it attacked, by `mechanism` in the log of "
        "server (95 %, δ = 1e-05)"
    )
    words = ("plan", QUICKSTART, "--values", "5000", "--epsilon", "3", "--json")
    (made,) = json.loads(output(*words, "--run", audited))
    assert made["audited"] == []  # the study's own ε is another
    assert "audited" not in json.loads(output(*words))[0]
    words = ("plan", QUICKSTART, "--values", "5000", "--json", "--run", audited)
    (made,) = json.loads(output(*words))
    assert [row["bound"] for row in made["audited"]] == [2.5, 1.37]
    ours = made["options"][0]
    assert made["audited"][0]["bound"] < ours["hoped"] < ours["epsilon"] <= 8.0


def test_plan_without_an_audit_of_the_study_says_so(audited, tmp_path):
    words = ("plan", QUICKSTART, "--values", "5000", "--set", "seed=2", "--run")
    assert "audited: no audit of this study is in the logs" in output(*words, audited)
    nowhere = run(*words, tmp_path / "none")
    assert isinstance(nowhere.exception, ConfigError)
    assert "is not a run directory" in str(nowhere.exception)
