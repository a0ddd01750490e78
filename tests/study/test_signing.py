"""Identities and the signatures of a study."""

from __future__ import annotations

import base64
import json
import stat
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey

from securefedcollm.errors import ConfigError, CryptoError, StateError
from securefedcollm.study import load_study
from securefedcollm.study.identity import create_identity, open_identity, read_identity
from securefedcollm.study.signing import (
    PAYLOAD_TYPE,
    read_envelope,
    require_signed,
    sign_study,
    verify_signatures,
)

QUICKSTART = Path(__file__).parents[2] / "configs" / "quickstart.yaml"
WORDS = "correct horse battery"
NAMES = ["server", "north", "east", "south"]


def make(tmp_path, name, passphrase=None):
    path = tmp_path / f"{name}.json"
    return create_identity(name, path, passphrase), path


@pytest.fixture
def signed(tmp_path):
    """A study of a server and three silos, signed by all, and the parts to doctor it."""
    keys, roster = {}, []
    for name in NAMES:
        identity, path = make(tmp_path, name)
        keys[name] = open_identity(read_identity(path), None)
        role = "server" if name == "server" else "silo"
        roster.append(f"{{name: {name}, role: {role}, key: {identity.public}}}")
    study = load_study(QUICKSTART, [f"roster=[{', '.join(roster)}]", "silos.count=3"])
    path = tmp_path / "study.yaml.signatures.json"
    for name, key in keys.items():
        sign_study(study, name, key, path)
    return study, keys, path


def test_an_identity_round_trips_and_its_file_is_private(tmp_path):
    identity, path = make(tmp_path, "north", WORDS)
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    key = open_identity(read_identity(path), WORDS)
    assert key.public.hex() == identity.public
    secret = key.seed()
    assert secret not in path.read_bytes()
    assert secret.hex() not in path.read_text()
    assert secret.hex()[:12] not in repr(identity) + repr(key)


def test_a_wrong_passphrase_and_a_changed_file_do_not_open(tmp_path):
    _, path = make(tmp_path, "north", WORDS)
    with pytest.raises(CryptoError, match="north does not open"):
        open_identity(read_identity(path), "another one")
    with pytest.raises(ConfigError, match="encrypted"):
        open_identity(read_identity(path), None)
    content = json.loads(path.read_text())
    for name, value in (("name", "south"), ("public", "0" * 64), ("salt", "00" * 16)):
        path.write_text(json.dumps(content | {name: value}))
        with pytest.raises(CryptoError):
            open_identity(read_identity(path), WORDS)


def test_a_plain_key_must_be_the_one_that_the_file_names(tmp_path):
    _, path = make(tmp_path, "north")
    content = json.loads(path.read_text())
    path.write_text(json.dumps(content | {"key": "11" * 32}))
    with pytest.raises(CryptoError, match="holds another key than it names"):
        open_identity(read_identity(path), None)


@pytest.mark.parametrize("text", ["", "{}", "[]", '{"kind": "x"}', "\x00"])
def test_a_file_that_is_no_identity_is_refused_by_name(tmp_path, text):
    path = tmp_path / "x.json"
    path.write_text(text)
    path.chmod(0o600)
    with pytest.raises(ConfigError, match=r"x.json: is not an identity file"):
        read_identity(path)


def test_an_identity_that_others_may_read_is_refused(tmp_path):
    _, path = make(tmp_path, "north", WORDS)
    path.chmod(0o640)
    with pytest.raises(ConfigError, match=r"others may read it \(mode 0640\)"):
        read_identity(path)


def test_identities_are_never_overwritten_and_names_are_checked(tmp_path):
    make(tmp_path, "north")
    with pytest.raises(ConfigError, match="an identity exists already"):
        make(tmp_path, "north")
    with pytest.raises(ConfigError, match="no participant name"):
        create_identity("No Name", tmp_path / "y.json", None)
    with pytest.raises(ConfigError, match="fewer than 8"):
        make(tmp_path, "east", "short")
    with pytest.raises(StateError, match="cannot be written"):
        create_identity("east", tmp_path / "north.json" / "e.json", None)
    with pytest.raises(ConfigError, match="cannot be read"):
        read_identity(tmp_path / "none.json")


def test_a_study_signed_by_all_is_accepted(signed):
    study, _, path = signed
    assert verify_signatures(study, read_envelope(path, study)) == dict.fromkeys(NAMES, True)
    require_signed(study, path)


def test_other_tools_can_verify_the_envelope(signed):
    """DSSE v1 pre-authentication encoding, built here from its description."""
    study, _, path = signed
    envelope = json.loads(path.read_text())
    payload = base64.b64decode(envelope["payload"])
    kind = envelope["payloadType"].encode()
    assert kind.decode() == PAYLOAD_TYPE
    pae = b" ".join([b"DSSEv1", b"%d" % len(kind), kind, b"%d" % len(payload), payload])
    for signature in envelope["signatures"]:
        key = next(p.key for p in study.roster if p.name == signature["keyid"])
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(key)).verify(
            base64.b64decode(signature["sig"]), pae
        )


def test_a_missing_signature_is_named(signed):
    study, _, path = signed
    content = json.loads(path.read_text())
    content["signatures"] = [s for s in content["signatures"] if s["keyid"] != "east"]
    path.write_text(json.dumps(content))
    with pytest.raises(ConfigError, match="not signed yet by east"):
        require_signed(study, path)


def test_signatures_do_not_carry_over_to_a_changed_study(signed, tmp_path):
    study, _, path = signed
    changed = load_study(
        QUICKSTART,
        [
            "silos.count=3",
            "rounds=5",
            "roster=["
            + ", ".join(f"{{name: {p.name}, role: {p.role}, key: {p.key}}}" for p in study.roster)
            + "]",
        ],
    )
    with pytest.raises(ConfigError, match="another version of the study"):
        require_signed(changed, path)


def test_a_signature_under_another_name_is_refused(signed):
    """Adversary: a participant, or the courier, who signs for somebody else."""
    study, _, path = signed
    content = json.loads(path.read_text())
    by_name = {s["keyid"]: s for s in content["signatures"]}
    content["signatures"][0] = {"keyid": "north", "sig": by_name["south"]["sig"]}
    path.write_text(json.dumps(content))
    with pytest.raises(CryptoError, match="signature of north does not verify"):
        require_signed(study, path)
    content["signatures"][0] = {"keyid": "mallory", "sig": by_name["south"]["sig"]}
    path.write_text(json.dumps(content))
    with pytest.raises(CryptoError, match="'mallory', who is not on the roster"):
        require_signed(study, path)


def test_only_a_listed_participant_with_the_listed_key_signs(signed, tmp_path):
    study, keys, path = signed
    with pytest.raises(ConfigError, match="west is not on the roster"):
        sign_study(study, "west", keys["north"], path)
    with pytest.raises(ConfigError, match="another key for south"):
        sign_study(study, "south", keys["north"], path)
    with pytest.raises(ConfigError, match="names no participants"):
        verify_signatures(load_study(QUICKSTART), read_envelope(path, study))


@pytest.mark.parametrize("text", ["", "{}", '{"payloadType": "x"}'])
def test_a_broken_envelope_is_refused_by_name(signed, text):
    study, _, path = signed
    path.write_text(text)
    with pytest.raises(ConfigError, match="not a signature envelope"):
        require_signed(study, path)
    path.unlink()
    with pytest.raises(ConfigError, match="nobody has signed"):
        require_signed(study, path)
