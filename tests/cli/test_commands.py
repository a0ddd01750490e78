"""Commands that need no model: help, study, identity; and what the process does with errors."""

from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from securefedcollm_cli.identity import read_passphrase
from securefedcollm_cli.main import app
from securefedcollm_cli.simulate import _accuracy_table
from typer.testing import CliRunner

from securefedcollm import __version__
from securefedcollm.aggregation.ckks.parameters import derive
from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm.federation.status import round_sentence
from securefedcollm.tuning.builtin import prepare
from securefedcollm.tuning.models import default_cache
from securefedcollm.tuning.recipe import silent

ROOT = Path(__file__).parents[2]
QUICKSTART = str(ROOT / "configs" / "quickstart.yaml")
COMMAND = str(Path(sys.executable).with_name("securefedcollm"))


def call(*arguments: str) -> str:
    result = CliRunner().invoke(app, list(arguments), env={"SECUREFEDCOLLM_PASSPHRASE": ""})
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exit_code == 0, result.output
    return result.stdout


def test_every_command_has_help():
    from typer.main import get_command

    def walk(command, path):
        yield path
        for name, child in getattr(command, "commands", {}).items():
            yield from walk(child, [*path, name])

    paths = list(walk(get_command(app), []))
    assert len(paths) > 15
    for path in paths:
        assert "Usage" in call(*path, "--help")


def test_a_terminal_without_the_letters_gets_something_for_them():
    done = subprocess.run(
        [COMMAND, "study", "check", QUICKSTART],
        env=os.environ | {"PYTHONIOENCODING": "cp1252"},
        capture_output=True,
        check=True,
    )
    assert b"rank 8, ? 16" in done.stdout  # α


def test_more_groups_than_a_line_holds_are_told_as_their_mean():
    scores = {f"subject {i}": i / 40 for i in range(40)}
    record = {"round": 1, "survivors": [1, 2], "evaluation": {f"slm/{g}": s for g, s in
              scores.items()}}  # fmt: skip
    assert round_sentence(record, 3) == "round 1/3, 2 silos: SLM mean of 40 groups 49 (%)"
    row = {"model": "slm", "method": "FedAvg", "accuracy": scores}
    table = _accuracy_table({"groups": list(scores), "table": [row]})
    assert [column.header for column in table.columns] == ["model", "method", "mean of 40 groups"]
    assert list(table.columns[2].cells) == ["48.8"]


def test_version():
    assert call("--version") == f"securefedcollm {__version__}\n"


@pytest.mark.parametrize(
    "arguments",
    [
        ["--help"],
        ["study", "check", QUICKSTART],
        ["study", "check", QUICKSTART, "--set", "aggregation.scheme=ckks"],
        ["study", "check", QUICKSTART, "--set", "privacy=none"],
        ["study", "schema"],
        ["study", "keys"],
    ],
)
def test_light_commands_never_import_torch(arguments):
    # Accountants, which plan the noise, stand on scipy.
    accountants = "check" in arguments and "privacy=none" not in arguments
    scipy = "" if accountants else ", 'scipy'"
    program = (
        "import sys; from securefedcollm_cli.main import app\n"
        "try: app()\n"
        "except SystemExit as end: code = end.code\n"
        f"heavy = {{'torch', 'transformers', 'peft', 'opacus', 'datasets', 'tenseal'{scipy}}}\n"
        "assert not heavy & set(sys.modules), heavy & set(sys.modules)\n"
        "sys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program, *arguments], capture_output=True)
    assert done.returncode == 0, done.stderr


def test_the_crypto_side_never_imports_torch():
    program = (
        "import sys, securefedcollm.aggregation.masking.silo\n"
        "import securefedcollm.aggregation.masking.coordinator\n"
        "import securefedcollm.privacy.ledger, securefedcollm.study.signing\n"
        "import securefedcollm.federation.silo, securefedcollm.federation.coordinator\n"
        "assert 'torch' not in sys.modules"
    )
    assert subprocess.run([sys.executable, "-c", program]).returncode == 0


def test_study_check_says_what_follows():
    facts = json.loads(call("study", "check", QUICKSTART, "--json"))
    assert facts["threshold"] == 3
    assert facts["fields_per_word"] == 3
    text = call("study", "check", QUICKSTART, "--set", "privacy=none")
    assert "no differential privacy" in text
    assert text.endswith("the study is sound\n")


def test_study_check_predicts_the_error_of_a_ckks_sum():
    ckks = ["--set", "aggregation.scheme=ckks"]
    facts = json.loads(call("study", "check", QUICKSTART, *ckks, "--json"))["ckks"]
    assert (facts["set"], facts["exact"], facts["modulus_bits"]) == ("precise", True, 60)
    assert facts["rms"] < facts["greatest_error"] < 0.5
    # Of the whole run: three rounds, each opened up to three times.
    one = derive("precise", silos=4, bound=2**15 - 1).leak(10**6)
    stated = {"bound": 9 * one, "values": 10**6, "sums": 3, "openings": 3}
    assert facts["advantage"] == pytest.approx(stated)
    assert json.loads(call("study", "check", QUICKSTART, "--json"))["ckks"] is None
    text = call("study", "check", QUICKSTART, *ckks, "--set", "aggregation.ckks=compact")
    assert "a sum of 4 cannot wrap, predicted rms error 1 units (at most 19)" in text
    assert "no statistical bound beyond the sums, whole run: 3 sums of 1,000,000 values" in text


def test_study_check_says_what_an_authority_could_do():
    plan = ["--set", "aggregation.scheme=ckks", "--set", "aggregation.key_model=authority"]
    facts = json.loads(call("study", "check", QUICKSTART, *plan, "--json"))
    joint = json.loads(call("study", "check", QUICKSTART, *plan[:2], "--json"))
    assert facts["ckks"]["key_model"] == "authority"
    # One flooding in place of one a silo: more of it fits, and says more.
    assert facts["ckks"]["flood_bits"] > joint["ckks"]["flood_bits"]
    assert facts["ckks"]["advantage"]["bound"] < joint["ckks"]["advantage"]["bound"]
    text = " ".join(call("study", "check", QUICKSTART, *plan).split())
    assert "3 silos that uploaded, by the authority (1 dropout(s) tolerated" in text
    assert "not named yet; holds the decryption key" in text
    assert "TOGETHER WITH THE SERVER IT CAN OPEN SINGLE UPDATES" in text
    assert "TOGETHER" not in call("study", "check", QUICKSTART, *plan[:2])


def test_study_show_round_trips(tmp_path):
    path = tmp_path / "copy.yaml"
    path.write_text(call("study", "show", QUICKSTART))
    first, second = (
        json.loads(call("study", "check", p, "--json")) for p in (QUICKSTART, str(path))
    )
    assert first["digest"] == second["digest"]


def test_the_schema_names_every_key():
    outline = call("study", "schema")
    for line in ("privacy:", "  epsilon: float", "  method: ", "rounds:", "required"):
        assert line in outline
    assert "Study" in json.loads(call("study", "schema", "--json"))["$defs"]


def test_a_passphrase_file_that_others_may_read_is_refused(tmp_path):
    """Adversary: another user of this machine."""
    words, out = tmp_path / "words", tmp_path / "a.json"
    words.write_text("correct horse battery staple\nand a second line")
    for mode in (0o644, 0o604, 0o666):
        words.chmod(mode)
        with pytest.raises(ConfigError, match=f"others may read .*{mode:04o}") as caught:
            call("identity", "new", "a", "--out", str(out), "--passphrase-file", str(words))
        assert "chmod 600" in caught.value.hint
        assert not out.exists()
    if os.geteuid() == 0:  # else there may be no second group to give it to
        words.chmod(0o640)
        os.chown(words, 0, 12345)
        with pytest.raises(ConfigError, match="others may read"):
            read_passphrase(words)
        os.chown(words, 0, 0)  # as systemd hands out its credentials
        assert read_passphrase(words) == "correct horse battery staple"
    words.chmod(0o400)
    assert read_passphrase(words) == "correct horse battery staple"


def test_identities_roster_and_signatures_from_the_command_line(tmp_path):
    words = tmp_path / "words"
    words.write_text("correct horse battery staple\n")
    words.chmod(0o600)
    lines = []
    for name, role in (("server", "server"), ("a", "silo"), ("b", "silo"), ("c", "silo")):
        out = str(tmp_path / f"{name}.json")
        call("identity", "new", name, "--out", out, "--passphrase-file", str(words))
        shown = json.loads(call("identity", "show", out, "--role", role, "--json"))
        assert shown["encrypted"]
        lines.append(shown["roster_line"])
    study = tmp_path / "study.yaml"
    text = Path(QUICKSTART).read_text().replace("count: 4", "count: 3")
    study.write_text(text + "\nroster:\n" + "".join(f"  {line}\n" for line in lines))
    for name in ("server", "a", "b"):
        identity = str(tmp_path / f"{name}.json")
        call("study", "sign", str(study), "--identity", identity, "--passphrase-file", str(words))
    with pytest.raises(ConfigError, match="not signed yet by c"):
        call("study", "verify", str(study))
    identity = str(tmp_path / "c.json")
    call("study", "sign", str(study), "--identity", identity, "--passphrase-file", str(words))
    assert json.loads(call("study", "verify", str(study), "--json"))["signed"]["c"]
    study.write_text(study.read_text().replace("rounds: 3", "rounds: 5"))
    with pytest.raises(ConfigError, match="another version"):
        call("study", "verify", str(study))


def test_the_authority_is_on_the_roster_and_signs_too(tmp_path):
    """Its key is in what every silo signs, so that no server can put its own in the place."""
    lines = []
    roles = {"server": "server", "auditor": "authority", "a": "silo", "b": "silo", "c": "silo"}
    for name, role in roles.items():
        out = str(tmp_path / f"{name}.json")
        call("identity", "new", name, "--out", out, "--no-passphrase")
        shown = json.loads(call("identity", "show", out, "--role", role, "--json"))
        lines.append(f"  {shown['roster_line']}\n")
    study, text = tmp_path / "study.yaml", Path(QUICKSTART).read_text()
    text = text.replace("count: 4", "count: 3") + "\nroster:\n" + "".join(lines)
    keyed = text.replace("scheme: masking", "scheme: ckks\n  key_model: authority")
    assert "key_model" in keyed
    for content, message in (
        (text, "1 participants have the role authority, the key model is threshold"),
        (keyed.replace(lines[1], ""), "0 participants have the role authority"),
        (keyed.replace("role: server", "role: authority"), "exactly one participant has the role"),
        (keyed.replace("name: a,", "name: authority,"), "a silo cannot be called authority"),
    ):
        study.write_text(content)
        with pytest.raises(ConfigError, match=message):
            call("study", "check", str(study))
    study.write_text(keyed)
    assert "authority         auditor; holds the decryption key" in call(
        "study", "check", str(study)
    )
    for name in roles:
        if name != "auditor":
            call("study", "sign", str(study), "--identity", str(tmp_path / f"{name}.json"))
    with pytest.raises(ConfigError, match="not signed yet by auditor"):
        call("study", "verify", str(study))
    call("study", "sign", str(study), "--identity", str(tmp_path / "auditor.json"))
    assert "signed   authority auditor" in call("study", "verify", str(study))


def test_an_error_is_one_line_and_exit_code_2(tmp_path):
    done = subprocess.run([COMMAND, "study", "check", "none.yaml"], capture_output=True, text=True)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("error: none.yaml: there is no such file — ")
    assert done.stderr.count("\n") == 1
    done = subprocess.run(
        [COMMAND, "study", "check", "none.yaml", "--json"], capture_output=True, text=True
    )
    assert done.returncode == 2
    told = json.loads(done.stdout)
    assert told["error"] == "ConfigError"
    assert told["again"] is False


@pytest.mark.parametrize(
    "words",
    [
        ["identity", "new", "a", "--no-passphrase", "--out", "{}/key.json"],
        pytest.param(
            ["simulate", QUICKSTART, "--out", "{}/run", "--no-baselines", "--workers", "0"],
            marks=pytest.mark.soak,
        ),
        ["consortium", "init", "--name", "net", "--server", "example.org:8002", "--out", "{}/ca"],
    ],
    ids=lambda words: words[0],
)
def test_a_full_disk_is_one_line_and_leaves_no_half_a_key(tmp_path, words):
    """Here: no file may have more than ten bytes."""
    prepare(default_cache(), silent)  # with an empty cache, making the models would tell of itself
    done = subprocess.run(
        [COMMAND, *(word.format(tmp_path) for word in words)],
        capture_output=True,
        text=True,
        env=os.environ | {"SECUREFEDCOLLM_PASSPHRASE": "eleven herons at noon"},
        preexec_fn=lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (10, 10)),
    )
    assert done.returncode == 2, done.stderr
    assert done.stderr.startswith("error: ")
    assert done.stderr.count("\n") == 1
    assert "File too large" in done.stderr or "disk I/O error" in done.stderr
    assert not (tmp_path / "key.json").exists()


def test_what_may_succeed_later_ends_with_the_code_for_it(tmp_path):
    """A supervisor starts the command again after 75 (EX_TEMPFAIL), and not after 2."""
    plain = {name: value for name, value in os.environ.items() if not name.startswith("PIP_")}
    done = subprocess.run(
        [COMMAND, "model", "prepare", "smollm2", "--out", tmp_path / "models", "--json"],
        capture_output=True,
        text=True,
        env={**plain, "PIP_NO_INDEX": "1", "PIP_CONFIG_FILE": os.devnull},
    )
    assert done.returncode == 75
    assert json.loads(done.stdout)["again"] is True
    assert done.stderr.startswith("error: pip could not download")


@pytest.mark.parametrize(("command", "code"), [("client", 0), ("status", -signal.SIGABRT)])
def test_a_role_that_has_finished_ends_with_code_0(command, code):
    """Whatever libraries do when the interpreter ends; another command is the control."""
    script = (
        "import atexit, os, sys\n"
        "from securefedcollm_cli.main import main\n"
        "atexit.register(os.abort)\n"
        f"sys.argv = ['securefedcollm', '-v', '{command}', '--help']\n"
        "main()\n"
    )
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert ended.returncode == code
    assert "Usage" in ended.stdout


@pytest.mark.parametrize(
    ("private", "shown"),
    [
        ({"accuracy": 0.6842, "margin": 0.0123, "sigma": 2.2}, ": set aside 68.4 ± 1.2 (%)"),
        ({"accuracy": 0.5, "margin": 0.0, "sigma": 0.0}, ": set aside 50.0 (%)"),
        ({"accuracy": None, "margin": None, "sigma": 40.2}, "drowned in noise of 40 records (%)"),
        ({"lost": "silo-2: cut off"}, ": set aside LOST: its sum cannot be opened (%)"),
    ],
)
def test_a_finished_round_shows_the_noised_accuracy_with_its_interval(private, shown):
    record = {"round": 1, "survivors": ["a", "b"], "evaluation": {}, "private": private}
    assert round_sentence(record, 3).endswith(shown)
