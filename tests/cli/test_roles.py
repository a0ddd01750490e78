"""``consortium``, ``join``, ``client``, ``server``, ``status``: what a person types and reads."""

from __future__ import annotations

import json
import os
import shutil
import zipfile

import pytest
import yaml
from securefedcollm_cli import role_client
from securefedcollm_cli.main import app
from typer.testing import CliRunner

from securefedcollm.errors import (
    BudgetExceeded,
    ConfigError,
    CryptoError,
    DataError,
    SecureFedCoLLMError,
    StateError,
)
from securefedcollm.federation import roles
from securefedcollm.federation.cotuning import contents_of
from securefedcollm.federation.dealing import read_records
from securefedcollm.federation.engines.flare import kit as kit_module
from securefedcollm.federation.engines.flare.kit import installed
from securefedcollm.federation.engines.flare.papers import read_request
from securefedcollm.federation.files import make_directory
from securefedcollm.federation.samedata import pin_data
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.privacy.events import PoissonGaussian
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import load_study
from securefedcollm.tuning.splits import dataset_fingerprint
from tests.support.inputs import make_inputs
from tests.support.members import make_identities, write_signed

PASSPHRASE = {"SECUREFEDCOLLM_PASSPHRASE": "correct horse battery"}


def run(*words, **more):
    """The command's result; raises the error that it would report."""
    result = CliRunner().invoke(app, [str(w) for w in words], env=PASSPHRASE, **more)
    if isinstance(result.exception, SecureFedCoLLMError):
        raise result.exception
    assert result.exception is None or isinstance(result.exception, SystemExit), result.output
    return result


@pytest.fixture(scope="module")
def consortium(tmp_path_factory):
    directory = tmp_path_factory.mktemp("consortium") / "ca"
    out = run(
        "consortium", "init", "--name", "net", "--server", "localhost:8002", "--out", directory
    )
    assert "SHA256:" in out.stdout
    return directory


def test_the_authoritys_key_lies_encrypted_and_is_not_overwritten(consortium):
    files = {path.name: path.read_bytes() for path in consortium.iterdir()}
    assert set(files) == {"consortium.yaml", "rootCA.pem", "rootCA.key.sealed", "ca.json"}
    assert not any(b"PRIVATE KEY" in content for content in files.values())
    assert (consortium / "rootCA.key.sealed").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="exists already"):
        run(
            "consortium", "init", "--name", "net", "--server", "localhost:8002", "--out", consortium
        )


def test_the_authoritys_key_is_in_no_file_while_it_is_used(tmp_path, monkeypatch):
    """Adversary: a local user, or a backup, once the command was killed and nothing cleaned up."""
    called, original = [], kit_module.run_flare

    def then_killed(*words, cwd, **more):
        original(*words, cwd=cwd, **more)
        called.append(words[1])
        if words[1] in {"init", "approve"}:
            for path in (p for p in cwd.rglob("*") if p.is_file() and not p.is_symlink()):
                assert b"PRIVATE KEY" not in path.read_bytes(), path

    monkeypatch.setattr(kit_module, "run_flare", then_killed)
    ca, home = tmp_path / "ca", tmp_path / "home"
    ca.mkdir()  # all that a killed `init` leaves
    run("consortium", "init", "--name", "net", "--server", "localhost:8002", "--out", ca)
    join = ["join", ca / "consortium.yaml", "--name", "hospital-a", "--home", home, "--json"]
    (request,) = json.loads(run(*join).stdout)["requests"]
    run("consortium", "approve", "--yes", request, "--ca", ca)
    assert called == ["init", "request", "approve"]
    with zipfile.ZipFile(ca / "signed" / "hospital-a.signed.zip") as archive:
        assert "signed.json.sig" in archive.namelist()


@pytest.mark.parametrize(
    ("name", "server"),
    [
        ("Net!", "localhost:8002"),
        ("net", "localhost"),
        ("net", "a b:8002"),
        ("net", "host:99999"),
        ("net", "[2001:db8::1]:8002"),
        ("net", "host:٣"),
    ],
)
def test_names_and_addresses_that_cannot_be(tmp_path, name, server):
    with pytest.raises(ConfigError):
        run("consortium", "init", "--name", name, "--server", server, "--out", tmp_path / "ca")
    assert not (tmp_path / "ca").exists()


def test_a_silo_joins_in_two_steps(consortium, tmp_path):
    home, join = tmp_path / "home", ["join", consortium / "consortium.yaml", "--name", "hospital-a"]
    asked = json.loads(run(*join, "--home", home, "--json").stdout)
    (request,) = asked["requests"]
    assert "role: silo" in asked["roster_line"]
    with pytest.raises(ConfigError, match="a request already"):
        run(*join, "--home", home)
    with pytest.raises(ConfigError, match="no start-up kit is installed"):
        installed(home, "hospital-a")

    approve = [
        "consortium",
        "approve",
        "--yes",
        request,
        "--ca",
        consortium,
        "--out",
        tmp_path / "signed",
    ]
    result = CliRunner().invoke(
        app, [str(w) for w in approve], env={"SECUREFEDCOLLM_PASSPHRASE": "wrong horse"}
    )
    assert isinstance(result.exception, CryptoError)
    (signed,) = json.loads(run(*approve, "--json").stdout)["signed"]
    with pytest.raises(ConfigError, match="exists already"):
        run(*approve)

    profile = yaml.safe_load((consortium / "consortium.yaml").read_text())
    profile["fingerprint"] = "SHA256:" + ":".join(["00"] * 32)
    other = tmp_path / "other.yaml"
    other.write_text(yaml.safe_dump(profile))
    with pytest.raises(SecureFedCoLLMError, match="failed"):  # another authority's certificate
        run("join", other, "--name", "hospital-a", "--home", home, "--signed", signed)
    assert not (home / "kit").exists()

    run(*join, "--home", home, "--signed", signed)
    kit = installed(home, "hospital-a")
    resources = json.loads((kit.workspace / "local" / "resources.json").read_text())
    assert resources["class_list_enforcement_mode"] == "enforce"
    assert all("securefedcollm" in c or ".collab." in c for c in resources["class_allow_list"])
    assert not resources["allow_log_streaming"]
    rights = json.loads((kit.workspace / "local" / "authorization.json").read_text())["permissions"]
    assert {role["byoc"] for role in rights.values()} == {"none"}
    # Whoever follows FLARE's own readme would start a client that is not stripped.
    left = {path.name for path in kit.workspace.rglob("*") if path.is_file()}
    assert not {name for name in left if name.endswith(".sh") or "readme" in name.lower()}
    assert "fed_client.json" in left
    assert (kit.workspace / "startup" / "client.key").stat().st_mode & 0o077 == 0
    with pytest.raises(ConfigError, match="a kit already"):
        run(*join, "--home", home, "--signed", signed)

    # Adversary: FLARE's process, which may write in its kit.
    certificate = kit.workspace / "startup" / "client.crt"
    certificate.unlink()
    os.mkfifo(certificate)
    with pytest.raises(ConfigError, match="of another answer"):
        run(*join, "--home", home, "--signed", signed)


@pytest.mark.soak
def test_a_servers_two_kits_are_installed_together_or_not_at_all(consortium, tmp_path, monkeypatch):
    home, signed = tmp_path / "home", tmp_path / "signed"
    join = ["join", consortium / "consortium.yaml", "--name", "hub", "--role", "server"]
    join += ["--home", home, "--json"]
    requests = json.loads(run(*join).stdout)["requests"]
    run("consortium", "approve", "--yes", *requests, "--ca", consortium, "--out", signed)
    install = [*join, "--signed", signed / "localhost.signed.zip"]
    lead = signed / "lead@consortium.org.signed.zip"

    broken = tmp_path / lead.name
    with zipfile.ZipFile(broken, "w") as archive:
        archive.writestr("signed.json", "{}")
    with pytest.raises(StateError, match="FLARE's `package"):
        run(*install, "--signed", broken)
    assert not (home / "kit").exists()
    with monkeypatch.context() as patch:
        patch.setattr(kit_module, "run_flare", lambda *words, cwd: None)
        with pytest.raises(StateError, match="made 0 kits"):
            run(*install)

    run(*install)  # as if it had been killed after the first of the two
    before = (home / "kit").stat()
    again = json.loads(run(*install, "--signed", lead).stdout)["installed"]
    assert again == [str(home / "kit"), str(home / "lead")]
    assert (home / "kit").stat().st_ino == before.st_ino
    assert (home / "lead" / "startup" / "fed_admin.json").exists()
    assert not list(home.glob(".sfc-*"))
    (home / "kit" / "startup" / "server.crt").write_text("of an answer before this one")
    with pytest.raises(ConfigError, match="a kit already, of another answer"):
        run(*install, "--signed", lead)


def test_what_is_not_a_request_profile_or_answer_is_said_to_be_none(consortium, tmp_path):
    rubbish = tmp_path / "hospital-a.request.zip"
    rubbish.write_bytes(b"rubbish")
    with pytest.raises(ConfigError, match="no certificate request"):
        run("consortium", "approve", rubbish, "--ca", consortium)
    with pytest.raises(ConfigError, match="no consortium's profile"):
        run("join", rubbish, "--name", "hospital-a", "--home", tmp_path / "home")
    join = ["join", consortium / "consortium.yaml", "--home", tmp_path / "home"]
    with pytest.raises(ConfigError, match="answers no request"):
        run(*join, "--name", "hospital-a", "--signed", rubbish)
    with pytest.raises(ConfigError, match="cannot be a name"):
        run(*join, "--name", "a.b")


def test_a_profile_that_unfolds_is_no_profile(tmp_path):
    """Adversary: who passes it on. 10^10 pairs in 600 bytes."""
    lines = ["a0: &a0 {x: 1}"]
    lines += [f"a{i}: &a{i} {{<<: [{', '.join([f'*a{i - 1}'] * 10)}]}}" for i in range(1, 11)]
    profile = tmp_path / "consortium.yaml"
    profile.write_text("\n".join(lines))
    with pytest.raises(ConfigError, match=r"no consortium's profile .*unfold to too much"):
        run("join", profile, "--name", "hospital-a", "--home", tmp_path / "home")


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("fingerprint", ""),  # FLARE takes any authority's certificate then
        ("fingerprint", "--help"),
        ("fingerprint", "SHA256:" + ":".join(["00"] * 31)),
        ("name", "../../x"),
        ("name", "net\n"),
        ("host", "a b"),
        ("host", "--config"),
        ("port", -5),
        ("port", 70000),
        ("\x1b[2K", 1),
    ],
)
def test_a_profile_in_which_nothing_is_taken_on_trust(consortium, tmp_path, field, value):
    """Adversary: who passes the profile on."""
    profile = yaml.safe_load((consortium / "consortium.yaml").read_text())
    path = tmp_path / "consortium.yaml"
    path.write_text(yaml.safe_dump(profile | {field: value}))
    with pytest.raises(ConfigError) as caught:
        run("join", path, "--name", "hospital-a", "--home", tmp_path / "home", "--no-passphrase")
    assert str(path) in str(caught.value)
    assert "\x1b" not in str(caught.value)
    assert not (tmp_path / "home").exists()


REQUEST = {
    "project": "net",
    "name": "hospital-b",
    "org": "hospital_b",
    "kind": "site",
    "cert_role": None,
    "public_key_sha256": "a1" * 32,
}


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("public_key_sha256", "\x1b[2K\x1b[1Ahospital-a (silo or authority)"),
        ("public_key_sha256", "a1" * 33),
        ("org", "\x1b[1A"),
        ("org", "o" * 64),
        ("project", "net\n"),
        ("kind", "zzz"),
        ("kind", "zzz\x1b[2K"),
        ("kind", 3),
        ("cert_role", "none"),
        ("cert_role", "\x1b[2K"),
        ("name", "hospital-a"),
    ],
)
def test_a_request_shows_nothing_that_its_sender_made_up(tmp_path, field, value):
    """Adversary: who asks for a certificate, and has the operator's terminal show another name."""
    path = tmp_path / "hospital-b.request.zip"

    def write(fields):
        with zipfile.ZipFile(path, "w") as archive:
            archive.writestr("request.json", json.dumps(fields))

    write(REQUEST)
    sentence = read_request(path).sentence
    assert sentence == "hospital-b (silo or authority), of hospital_b, key a1a1a1a1a1a1a1a1…"
    write(REQUEST | {field: value})
    with pytest.raises(ConfigError) as caught:
        run("consortium", "approve", path, "--ca", tmp_path)
    assert "\x1b" not in str(caught.value)


@pytest.mark.parametrize("kind", ["server", "user"])
def test_a_request_for_more_than_a_participant_needs_is_not_signed(tmp_path, kind):
    name = "hospital-b@host" if kind == "server" else "hospital-b"
    path = tmp_path / f"{name}.request.zip"
    with zipfile.ZipFile(path, "w") as archive:
        role = "lead" if kind == "user" else None
        asked = REQUEST | {"kind": kind, "name": name, "cert_role": role}
        archive.writestr("request.json", json.dumps(asked))
    with pytest.raises(ConfigError, match="asks for") as caught:
        run("consortium", "approve", path, "--ca", tmp_path)
    assert "do not sign" in caught.value.hint


@pytest.mark.parametrize("name", ["server", "localhost"])
def test_a_silo_does_not_get_the_servers_name(consortium, tmp_path, name):
    """Adversary: a silo. FLARE tells who is the server by the name in its certificate."""
    home = tmp_path / "home"
    with pytest.raises(ConfigError, match="is the server's name"):
        run("join", consortium / "consortium.yaml", "--name", name, "--home", home)
    assert not home.exists()
    path = tmp_path / f"{name}.request.zip"
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("request.json", json.dumps(REQUEST | {"name": name}))
    with pytest.raises(ConfigError, match="is the server's name"):
        run("consortium", "approve", "--yes", path, "--ca", consortium)


def test_a_damaged_request_is_no_request(tmp_path):
    path = tmp_path / "hospital-b.request.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("request.json", json.dumps(REQUEST))
    raw = bytearray(path.read_bytes())
    raw[42:57] = b"\xff" * 15  # no block of DEFLATE
    path.write_bytes(raw)
    with pytest.raises(ConfigError, match="no certificate request"):
        read_request(path)


def test_a_passphrase_that_is_no_text_is_said_to_be_none(consortium, tmp_path):
    binary = tmp_path / "passphrase"
    binary.write_bytes(b"\xff\xfe\n")
    binary.chmod(0o600)
    words = ["join", consortium / "consortium.yaml", "--name", "a", "--home", tmp_path / "home"]
    with pytest.raises(ConfigError, match="no passphrase can be read") as caught:
        run(*words, "--passphrase-file", binary)
    assert caught.value.__cause__ is None


# ---- roles, before anything is sent ----


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    """(directory with models and data, homes, signed study)."""
    directory = tmp_path_factory.mktemp("study")
    names = ["silo-1", "silo-2", "silo-3", "silo-4"]
    homes = make_identities(directory / "homes", names)
    path = write_signed(load_study(make_inputs(directory)), homes, directory / "signed.yaml")
    run("study", "deal", path, "--data", directory, "--out", directory / "dealt")
    for kit in ("silo-1/kit", "server/kit", "server/lead"):  # never started here
        (directory / "homes" / kit / "startup").mkdir(parents=True)
    return directory, homes, path


def client(study, *more, data="dealt/silo-1.jsonl", silo="silo-1", **options):
    directory, homes, path = study
    words = ["client", path, "--data", directory / data, "--models", directory]
    return run(*words, "--home", homes[silo], *more, **options)


def test_an_operator_sees_what_it_agrees_to_and_may_decline(study):
    with pytest.raises(ConfigError, match="not agreed; nothing was sent"):
        client(study, "--json", input="n\n")
    result = CliRunner().invoke(
        app,
        [
            *("client", str(study[2]), "--data", str(study[0] / "dealt/silo-1.jsonl")),
            *("--models", str(study[0]), "--home", str(study[1]["silo-1"])),
        ],
        input="n\n",
    )
    for said in ("signed by all", "path:slm", "32 records", "ε = 8 (δ = 1e-05)", "0.000 of 8"):
        assert said in result.stderr
    assert isinstance(result.exception, ConfigError)


def test_records_that_cannot_pay_are_told_before_the_question_and_may_be_left_out(study):
    directory, homes, path = study
    data = "dealt/silo-4.jsonl"
    some = read_records(load_study(path), directory / data)[:10]
    with Ledger(homes["silo-4"] / "ledger.sqlite", "silo-4") as ledger:
        records = ledger.identify(contents_of(some))
        half = [PoissonGaussian(0.1, 1.0, 20)]
        ledger.reserve("some", "record", "run", 0, 0, half, (8.0, 1e-5), records=records)
    (homes["silo-4"] / "kit" / "startup").mkdir(parents=True)
    with pytest.raises(BudgetExceeded, match=r"10 of 32 records cannot pay: .* is left"):
        client(study, data=data, silo="silo-4")
    words = ["--records", "skip", "--json"]
    with pytest.raises(ConfigError, match="not agreed"):
        client(study, *words, data=data, silo="silo-4", input="n\n")
    words = ["client", path, "--data", directory / data, "--models", directory, "--records", "skip"]
    result = CliRunner().invoke(
        app, [*map(str, words), "--home", str(homes["silo-4"])], input="n\n"
    )
    assert "22 records, without 10 that cannot pay" in result.stderr


@pytest.mark.soak
def test_the_training_loss_is_of_the_records_that_take_part(study, tmp_path, monkeypatch):
    """With ``--records skip``: not of those whose budget is used up."""
    directory, _, path = study
    home, data = tmp_path / "silo-2", directory / "dealt/silo-2.jsonl"
    shutil.copytree(study[1]["silo-2"], home)
    (home / "kit" / "startup").mkdir(parents=True, exist_ok=True)
    monkeypatch.setattr(role_client, "serve", lambda *_, **more: None)  # no server ever asks
    words = ["client", path, "--data", data, "--models", directory, "--home", home, "--yes"]
    words += ["--records", "skip", "--training-loss", "--json"]

    def losses():
        said = [json.loads(line) for line in run(*words).stdout.splitlines()]
        shutil.rmtree(home / "studies")
        return [event["all"] for event in said if event["event"] == "training"]

    (whole,) = losses()
    assert whole["count"] == 32  # the control: all can pay
    lines, questions = data.read_text().splitlines(True), read_records(load_study(path), data)
    names = [content.words for content in contents_of(questions)]
    spent = set(names[1::3])  # some are there twice
    with Ledger(home / "ledger.sqlite", "silo-2") as ledger:
        records = ledger.identify(contents_of(questions[1::3]))
        half = [PoissonGaussian(0.1, 1.0, 20)]
        ledger.reserve("some", "record", "run", 0, 0, half, (8.0, 1e-5), records=records)
    (part,) = losses()
    kept = tmp_path / "kept.jsonl"
    kept.write_text("".join(line for line, n in zip(lines, names, strict=True) if n not in spent))
    evaluate = ["model", "evaluate", "--model", f"path:{directory / 'slm'}", "--test", kept]
    assert part == json.loads(run(*evaluate, "--json").stdout)["all"]
    assert part["count"] == 20
    assert part["gold_log_prob"] != whole["gold_log_prob"]


def test_a_budget_that_nothing_would_keep_to_is_refused(study):
    with pytest.raises(ConfigError, match="must be above 0"):
        client(study, "--yes", "--budget", "0")
    directory, homes, _ = study
    open_ = directory / "open.yaml"
    write_signed(load_study(directory / "tiny.yaml", ["privacy=none"]), homes, open_)
    with pytest.raises(ConfigError, match="accounts for no ε"):
        client((directory, homes, open_), "--yes", "--budget", "3")


def test_a_study_without_privacy_is_refused_where_a_budget_is_pinned(study):
    """Adversary: a study's author who leaves ``privacy`` out. --yes does not agree to that."""
    directory, homes, _ = study
    open_ = write_signed(
        load_study(directory / "tiny.yaml", ["privacy=none"]), homes, directory / "open-2.yaml"
    )
    bare, data = (directory, homes, open_), {"data": "dealt/silo-3.jsonl", "silo": "silo-3"}
    (homes["silo-3"] / "kit" / "startup").mkdir(parents=True, exist_ok=True)
    with pytest.raises(ConfigError, match="not agreed"):  # the control: nothing is pinned
        client(bare, "--json", input="n\n", **data)
    run("budget", "set", "--epsilon", "8", "--delta", "1e-5", "--home", homes["silo-3"])
    with pytest.raises(ConfigError, match="this study has no differential privacy") as caught:
        client(bare, "--yes", **data)
    assert "--without-privacy" in caught.value.hint
    words = ["client", open_, "--data", directory / data["data"], "--models", directory]
    words += ["--home", homes["silo-3"], "--without-privacy"]
    result = CliRunner().invoke(app, [*map(str, words)], input="n\n")
    assert "not agreed" in str(result.exception)
    assert "ε = 8 (δ = 1e-05) is pinned for every record; this study" in result.stderr


def test_bad_data_is_named_before_anything_is_sent(study):
    bad = study[0] / "bad.jsonl"
    bad.write_text('{"question": "colour of thing1", "choices": ["red"], "answer": 0}\n')
    with pytest.raises(ConfigError, match=r"bad.jsonl:1: field 'choices' has 1 entries"):
        client(study, "--yes", data="bad.jsonl")


def test_held_out_records_are_read_before_anything_is_agreed(study):
    """A file that cannot be measured is named; records that are trained on too are counted."""
    bad = study[0] / "bad-test.jsonl"
    bad.write_text('{"question": "colour of thing1", "choices": ["red", "blue"]}\n')
    with pytest.raises(DataError, match=r"bad-test.jsonl:1: field 'answer'"):
        client(study, "--yes", "--test", bad)
    words = ["client", study[2], "--data", study[0] / "dealt/silo-1.jsonl", "--models", study[0]]
    home = ["--home", study[1]["silo-1"]]
    for test, both in (("silo-1", 32), ("test", 0)):
        told = ["--test", study[0] / f"dealt/{test}.jsonl"]
        result = CliRunner().invoke(app, [str(w) for w in (*words, *home, *told)], input="n\n")
        assert isinstance(result.exception, ConfigError)
        flat = " ".join(result.stderr.split())
        assert (f"WARNING: {both} records of" in flat) == bool(both)


def test_a_client_that_is_started_again_with_other_records_is_refused(study):
    directory, homes, path = study
    (homes["silo-3"] / "kit" / "startup").mkdir(parents=True, exist_ok=True)
    agreed = load_study(path)
    dealt = directory / "dealt/silo-3.jsonl"
    with roles.take_part(agreed, path, homes["silo-3"], "silo", str) as member:
        store = SiloStore(make_directory(member.run / "silos" / "silo-3"))
        fingerprint = dataset_fingerprint(read_records(agreed, dealt))
        with Ledger(member.home / "ledger.sqlite", "silo-3") as ledger:
            pin_data(store, ledger, agreed, "silo-3", fingerprint)  # as the run's first round does
        store.close()
    with pytest.raises(ConfigError, match="not agreed"):  # the control
        client(study, data="dealt/silo-3.jsonl", silo="silo-3", input="n\n")
    changed = dealt.with_name("changed.jsonl")
    changed.write_text(dealt.read_text().replace("colour of", "colour for", 1))
    with pytest.raises(ConfigError, match=r"not the records that the run began with \(finger"):
        client(study, "--yes", data="dealt/changed.jsonl", silo="silo-3")


def test_both_roles_compute_where_they_are_told(study):
    """``meta`` is a device of torch on every machine, on which no value can be computed."""
    directory, homes, path = study
    with pytest.raises(ConfigError, match="cannot compute on 'meta'"):
        client(study, "--yes", "--device", "meta")
    words = ["server", path, "--home", homes["server"], "--models", directory]
    with pytest.raises(ConfigError, match="cannot compute on 'nowhere'"):
        run(*words, "--public", directory / "dealt/public.jsonl", "--device", "nowhere")


def test_a_home_without_a_kit_says_how_to_get_one(study):
    with pytest.raises(ConfigError, match="no start-up kit") as caught:
        client(study, "--yes", silo="silo-2", data="dealt/silo-2.jsonl")
    assert "securefedcollm join" in caught.value.hint


def test_the_server_needs_the_public_questions_of_a_study_on_files(study):
    directory, homes, path = study
    with pytest.raises(ConfigError, match="public questions"):
        run("server", path, "--home", homes["server"], "--models", directory)


def test_dealt_files_hold_what_simulate_deals(study):
    from securefedcollm.federation.dealing import deal
    from securefedcollm.tuning.data import read_questions

    directory, _, path = study
    dealt = deal(load_study(path), directory)
    for name, questions in (*dealt.silos.items(), ("test", dealt.test)):
        assert tuple(read_questions(directory / "dealt" / f"{name}.jsonl")) == questions
    public = read_questions(directory / "dealt" / "public.jsonl", labelled=False)
    assert tuple(public) == dealt.public


def test_status_of_an_empty_home(tmp_path):
    assert "no study has been run" in run("status", "--home", tmp_path).stdout
    assert json.loads(run("status", "--home", tmp_path, "--json").stdout) == []
