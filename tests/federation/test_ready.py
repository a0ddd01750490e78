"""What keeps a kit from working is said at once, by name."""

from __future__ import annotations

import datetime as dt
import json
import os
import socket
import time

import pytest
from cryptography import x509
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
from cryptography.hazmat.primitives.serialization import Encoding

from securefedcollm.errors import ConfigError
from securefedcollm.federation.engines.flare import ready
from securefedcollm.federation.engines.flare.kit import installed

NOW = dt.datetime.now(dt.UTC).replace(microsecond=0)
DAY = dt.timedelta(days=1)


def certificate(begin, end) -> bytes:
    key = Ed25519PrivateKey.generate()
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "silo-1")])
    made = x509.CertificateBuilder(name, name, key.public_key(), 1, begin, end)
    return made.sign(key, None).public_bytes(Encoding.PEM)


@pytest.fixture
def home(tmp_path):
    startup = tmp_path / "kit" / "startup"
    startup.mkdir(parents=True)
    for name in ("client.crt", "rootCA.pem"):
        (startup / name).write_bytes(certificate(NOW - DAY, NOW + 300 * DAY))
    return tmp_path


def test_a_kit_whose_certificates_are_valid_is_taken(home):
    assert installed(home, "silo-1").workspace == home / "kit"


@pytest.mark.parametrize(
    ("name", "hint"), [("client.crt", "join again"), ("rootCA.pem", "make a new authority")]
)
def test_an_expired_certificate_is_named_with_its_date(home, name, hint):
    path = home / "kit" / "startup" / name
    path.write_bytes(certificate(NOW - 800 * DAY, NOW - DAY))
    with pytest.raises(ConfigError, match=rf"{name}: .* expired on {NOW - DAY:%Y-%m-%d}") as caught:
        installed(home, "silo-1")
    assert hint in caught.value.hint


def test_a_certificate_of_the_future_points_to_the_clock(home):
    path = home / "kit" / "startup" / "client.crt"
    path.write_bytes(certificate(NOW + DAY, NOW + 300 * DAY))
    with pytest.raises(ConfigError, match=r"is valid from .* on, and it is") as caught:
        installed(home, "silo-1")
    assert "clock" in caught.value.hint


def test_a_pipe_in_place_of_a_certificate_is_not_waited_for(home):
    """Adversary: FLARE's process, which writes in the kit."""
    path = home / "kit" / "startup" / "client.crt"
    path.unlink()
    os.mkfifo(path)
    start = time.monotonic()
    installed(home, "silo-1")
    assert time.monotonic() - start < 5


def resources(home, place):
    path = home / "kit" / "local" / "resources.json"
    path.parent.mkdir(exist_ok=True)
    jobs = {"id": "job_manager", "args": {"uri_root": str(place / "jobs")}}
    path.write_text(json.dumps({"components": [{"id": "job_scheduler"}, jobs]}))


def test_a_servers_home_that_was_moved_is_named(home):
    resources(home, home / "kit")
    installed(home, "hub")  # the control
    moved = home.rename(home.with_name("elsewhere"))
    with pytest.raises(ConfigError, match=f"this kit was made for {home}/kit"):
        installed(moved, "hub")
    home.symlink_to(moved)  # by another name, but the same place
    installed(moved, "hub")
    installed(home, "hub")


def test_a_port_in_use_is_named(home):
    kit = home / "kit"
    with socket.socket() as other:
        other.bind(("0.0.0.0", 0))
        other.listen()
        port = other.getsockname()[1]
        tree = {"servers": [{"service": {"target": f"localhost:{port}"}}]}
        (kit / "startup" / "fed_server.json").write_text(json.dumps(tree))
        with pytest.raises(ConfigError, match=f"port {port} is in use by another process"):
            ready.require_free_port(kit, most=0.3)
    ready.require_free_port(kit)  # the control: it has gone


def test_a_kit_that_cannot_be_read_is_left_to_flare(home):
    (home / "kit" / "startup" / "fed_server.json").write_text("[")
    ready.require_free_port(home / "kit")
    (home / "kit" / "local").mkdir()
    (home / "kit" / "local" / "resources.json").write_text('{"components": 3}')
    installed(home, "hub")
