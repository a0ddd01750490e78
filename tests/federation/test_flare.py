"""The FLARE engine between real processes over mutual TLS: kills, strangers, code, large frames."""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import socket
import subprocess
import sys
import threading
import time
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from msgspec import structs
from securefedcollm_audits.verification.verify import verify

from securefedcollm.aggregation import Roster
from securefedcollm.evidence.bundle import make_bundle
from securefedcollm.federation import roles
from securefedcollm.federation.charged import ChargedTraining
from securefedcollm.federation.coordinator import Coordinator
from securefedcollm.federation.engines.door import Door, Wire
from securefedcollm.federation.engines.embedded import EmbeddedEngine
from securefedcollm.federation.engines.flare.engine import FlareEngine, Kits
from securefedcollm.federation.engines.flare.job import APP
from securefedcollm.federation.engines.flare.kit import (
    installed,
)
from securefedcollm.federation.engines.flare.presence import Waits
from securefedcollm.federation.engines.flare.processes import (
    DOOR,
    FlareProcess,
    plain_environment,
)
from securefedcollm.federation.engines.link import SiloInbox, answer_calls
from securefedcollm.federation.engines.requests import Followed, check_header, sign_request
from securefedcollm.federation.runstore import RunStore
from securefedcollm.federation.silo import Seat, SiloSession
from securefedcollm.federation.silostore import SiloStore
from securefedcollm.federation.workload import silent
from securefedcollm.primitives import SigningKey
from securefedcollm.privacy.ledger import Ledger
from securefedcollm.study import load_study
from tests.support.arithmetic import (
    KEYS,
    ArithmeticServer,
    ArithmeticSilo,
    make_study,
    server_record,
    silo_record,
)
from tests.support.consortium import SILOS, evidence_holds, make_homes
from tests.support.members import write_signed

pytestmark = pytest.mark.timeout(600)

SUPPORT = Path(__file__).parents[1] / "support"
SERVER, STUDY = SigningKey(b"k" * 32), b"d" * 32


@pytest.fixture(scope="session")
def homes(tmp_path_factory):
    return make_homes(tmp_path_factory.mktemp("consortium"))


@pytest.fixture(scope="session")
def study_file(homes, tmp_path_factory):
    study = make_study(
        study="kills",
        rounds=4,
        silos={"count": 3, "colluders": 0},
        local={"steps": 5, "batch_size": 8, "learning_rate": 0.1},
    )
    return write_signed(study, homes, tmp_path_factory.mktemp("study") / "study.yaml")


@contextlib.contextmanager
def running(role: str, home: Path, study: Path, *when: int, **environment: str):
    output = (home / "driver.log").open("ab")
    process = subprocess.Popen(
        [sys.executable, "-m", "tests.support.flare_driver", role, home, study, *map(str, when)],
        stdout=output,
        stderr=output,
        env=os.environ | environment,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        output.close()


def died(process, home: Path) -> None:
    assert process.wait(120) == -9, (home / "driver.log").read_text()[-2000:]


def finished(process, home: Path) -> None:
    assert process.wait(150) == 0, (home / "driver.log").read_text()[-2000:]


@pytest.mark.soak
def test_a_run_survives_the_death_of_a_silo_and_of_the_server(homes, study_file, tmp_path):
    """Silo 3 is killed between upload and unmasking of round 2, the server in round 3."""
    study = load_study(study_file)
    with contextlib.ExitStack() as stack:

        def start(role, name, *when):
            return stack.enter_context(running(role, homes[name], study_file, *when))

        silos = {name: start("silo", name) for name in SILOS[:2]}
        mortal = start("silo", SILOS[2], 1)
        coordinator = start("server", "server", 2)
        died(mortal, homes[SILOS[2]])
        silos[SILOS[2]] = start("silo", SILOS[2])
        died(coordinator, homes["server"])
        finished(start("server", "server"), homes["server"])
        for name, process in silos.items():
            finished(process, homes[name])

    (run,) = (homes["server"] / "studies").iterdir()
    record = json.loads((run / "results.json").read_text())
    assert record["finished"]
    assert [r["survivors"] for r in record["rounds"]] == [list(SILOS)] * 4

    # What was lost cost neither work nor budget: one charge a round, and the same adapters as of a
    # run in which nothing happened.
    for name in SILOS:
        with Ledger(homes[name] / "ledger.sqlite", name) as ledger:
            entries = ledger.entries()
        assert [(e.key.round, e.key.attempt, e.state) for e in entries] == [
            (round_, 0, "settled") for round_ in range(4)
        ]
    calm = calm_run(study, tmp_path)
    np.testing.assert_array_equal(np.load(run / "adapters" / "slm" / "theta.npy"), calm)

    evidence_holds(homes, tmp_path)


def calm_run(study, directory) -> np.ndarray:
    """The same study in one process, and nothing happens: the final adapter."""
    study = structs.replace(study, roster=[])
    roster = Roster({name: KEYS[name].public for name in SILOS})

    def silo(name, progress):
        store, ledger = (
            SiloStore(directory / name),
            Ledger(directory / name / "ledger.sqlite", name),
        )
        return SiloSession(
            Seat(study, name, roster, KEYS[name]),
            ChargedTraining(study, name, ArithmeticSilo(name), store, ledger),
            silo_record(name),
        )

    workload = ArithmeticServer()
    Coordinator(
        study=study,
        roster=roster,
        engine=EmbeddedEngine(SILOS, silo, workers=0, progress=silent),
        workload=workload,
        store=RunStore(directory, study.digest, resume=False),
        evidence=server_record(directory),
    ).run()
    return workload.theta


# ---- one silo, without a study: what the carrier lets through ----


@contextlib.contextmanager
def attached(home: Path, name: str, port=None):
    """A silo's FLARE process with a door behind it; yields (process, inbox)."""
    kit = installed(home, name)
    check = partial(check_header, SERVER.public, STUDY, name)
    followed = Followed(home / "kit" / ".followed")
    inbox = SiloInbox(port or Echo(), 1 << 28, check, followed)
    worker_stop = threading.Event()
    worker = threading.Thread(target=inbox.serve, args=(worker_stop.is_set,))
    worker.start()
    try:
        with (
            Door(answer_calls(inbox)) as door,
            FlareProcess(
                "client", kit.workspace, name=kit.name, org=kit.org, env={DOOR: str(door.path)}
            ) as process,
        ):
            yield process
    finally:
        worker_stop.set()
        worker.join()


def said_by(program: str, words: list, directory: Path) -> dict[str, tuple[str, str]]:
    """What a hostile participant was answered: attack → return code, answer."""
    answers = directory / "answers"
    answers.touch()
    log = directory / "hostile.log"
    with log.open("wb") as output:
        attacker = subprocess.Popen(
            [sys.executable, SUPPORT / program, *map(str, words), answers],
            stdout=output,
            stderr=output,
            cwd=directory,
        )
    try:
        deadline = time.monotonic() + 150
        while '"done"' not in answers.read_text() and time.monotonic() < deadline:
            time.sleep(0.5)
    finally:
        attacker.kill()
        attacker.wait()
    lines = map(json.loads, answers.read_text().splitlines())
    said = {name: (code, text) for name, code, text in lines}
    assert "done" in said, log.read_text()[-2000:]
    assert "failed" not in said, said["failed"]
    return said


@pytest.mark.soak
def test_a_silo_that_comes_when_all_others_have_left_gets_the_adapter(tmp_path):
    """Silo 3 dies when it is to help to open the only sum; the other two are enough."""
    homes = make_homes(tmp_path)
    study = make_study(
        study="late",
        rounds=1,
        silos={"count": 3, "colluders": 0, "minimum": 2},
        local={"steps": 5, "batch_size": 8, "learning_rate": 0.1},
    )
    path = write_signed(study, homes, tmp_path / "study.yaml")
    with contextlib.ExitStack() as stack:

        def start(role, name, *when, **environment):
            made = running(role, homes[name], path, *when, **environment)
            return stack.enter_context(made)

        others = {name: start("silo", name) for name in SILOS[:2]}
        mortal = start("silo", SILOS[2], 0)
        server = start("server", "server", LINGER="300")
        died(mortal, homes[SILOS[2]])
        for name, process in others.items():
            finished(process, homes[name])
        (run,) = (homes[SILOS[2]] / "studies").glob("late-*")
        assert roles.newest_adapter(run) == 0  # the control
        assert server.poll() is None
        finished(start("silo", SILOS[2]), homes[SILOS[2]])
        finished(server, homes["server"])
    waited = f"for {SILOS[2]} to come back and fetch the last adapter"
    assert waited in (homes["server"] / "driver.log").read_text()
    adapters = set()
    for name in SILOS:
        (run,) = (homes[name] / "studies").glob("late-*")
        assert roles.newest_adapter(run) == 1
        adapters.add((run / roles.ADAPTER / "theta.npy").read_bytes())
        bundle = tmp_path / f"{name}.zip"
        bundle.write_bytes(make_bundle(run))
        assert verify(bundle).failed == []
    assert len(adapters) == 1


@pytest.mark.soak
def test_what_a_hostile_server_gets_from_a_silo(homes, tmp_path):
    """Its operator runs FLARE as it comes. (Before the tests with an engine: one port for both.)"""
    kit = homes["silo-1"] / "kit"
    secret, marker = tmp_path / "private.json", tmp_path / "it-ran"
    secret.write_text('{"record": "a private record"}')
    before = contents(kit, "startup", "local")
    words = [homes["server"] / "kit", homes["server"] / "lead", "silo-1", secret, marker]
    with attached(homes["silo-1"], "silo-1"):
        said = said_by("flare_hostile_server.py", words, tmp_path)

    assert "a private record" not in str(said)
    assert not marker.exists()
    assert contents(kit, "startup", "local") == before
    for name, (code, text) in said.items():
        if name.startswith(("app ", "deploy ")):
            assert "not the job of securefedcollm" in text, (name, code, text)
        if name.startswith("remove "):
            assert "Delete run folder" not in text, name
        if "diagnosis" in name:
            assert code == "process_exception", name  # nobody answers there
    assert said["start nothing"][1] == "no such job is deployed"
    assert said["address"][0] == "nobody came"
    assert said["job process"][0] == "there", said
    assert said["job's command"][0] == "unauthenticated"
    assert said["job's command as its parent"][0] == "timeout"
    # What runs is the silo's own copy, and the job before leaves nothing.
    (job,) = (path for path in kit.iterdir() if path.name.count("-") == 4)
    app = job / "app_silo-1"
    assert {str(p.relative_to(app)): p.read_bytes() for p in app.rglob("*") if p.is_file()} == APP


def contents(kit: Path, *folders: str) -> dict[Path, bytes]:
    return {
        path: path.read_bytes()
        for folder in folders
        for path in (kit / folder).rglob("*")
        if path.is_file()
    }


class Echo:
    def step(self, frame: bytes) -> bytes:
        return hashlib.sha256(frame).digest() + frame[:7]


@pytest.fixture(scope="session")
def engine(homes):
    """An honest server, for one silo at a time."""
    home = homes["server"]
    with FlareEngine(
        SILOS,
        kits=Kits(installed(home, "server"), installed(home, "server", lead=True)),
        waits=Waits(minimum=1, patience=60),
        sign=partial(sign_request, SERVER, STUDY),
        progress=silent,
    ) as engine:
        yield engine


def peak_memory(*words: str) -> int:
    """Largest resident size so far, in bytes, of the processes whose command has these words."""
    peak = 0
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        with contextlib.suppress(OSError):
            command = path.read_bytes().decode(errors="replace")
            if all(word in command for word in words):
                status = (path.parent / "status").read_text()
                peak = max(peak, int(status.split("VmHWM:")[1].split()[0]) * 1024)
    return peak


_ORPHAN = """
import os, signal, sys, time
from securefedcollm.federation.engines.flare.processes import end_with
late = sys.argv[1] == "late"
read, write = os.pipe()
if (parent := os.fork()) == 0:
    parent = os.getpid()
    if os.fork() == 0:
        while late and os.getppid() == parent:
            time.sleep(0.02)
        end_with(parent)
        os.write(write, b"asked,")
        time.sleep(4)
        os.write(write, b"alive")
        os._exit(0)
    if not late:
        time.sleep(1)
    os.kill(os.getpid(), signal.SIGKILL)
os.close(write)
os.waitpid(parent, 0)
said = b""
while more := os.read(read, 100):
    said += more
print(said.decode())
"""


@pytest.mark.parametrize(("when", "said"), [("soon", "asked,"), ("late", "")])
def test_a_process_ends_with_its_parent_even_if_that_has_ended_before_it_asked(when, said):
    words = [sys.executable, "-c", _ORPHAN, when]
    assert subprocess.run(words, capture_output=True, text=True, check=True).stdout.strip() == said


def test_what_flare_writes_is_bounded(tmp_path):
    """Adversary: who has FLARE log without end. (The process itself ends: this is no kit.)"""
    kit, large = tmp_path / "kit", 65 << 20
    kit.mkdir()
    for log in (tmp_path / "flare.log", kit / "audit.log"):
        with log.open("wb") as file:
            file.truncate(large)
    with FlareProcess("client", kit, name="silo-1", org="silo_1", env={}) as process:
        limits = ""
        while "268435456" not in limits and process.running:
            limits = Path(f"/proc/{process._process.pid}/limits").read_text()
        while not (kit / "audit.log.1").exists() and process.running:
            time.sleep(0.05)
    assert "268435456            268435456            bytes" in limits
    assert (tmp_path / "flare.log.1").stat().st_size == large
    assert (tmp_path / "flare.log").stat().st_size < 1 << 20
    assert (kit / "audit.log.1").stat().st_size == large
    assert not (kit / "audit.log").exists()


def test_what_flare_leaves_in_its_kit_is_not_touched_by_ours(tmp_path):
    """Adversary: FLARE's process, taken over. Ours is outside the wall, and starts it again."""
    kit, keys = tmp_path / "kit", tmp_path / "authorized_keys"
    (kit / "audit.log.1").mkdir(parents=True)
    with (kit / "audit.log").open("wb") as file:
        file.truncate(65 << 20)  # cannot be put aside
    (kit / "flare.log").symlink_to(keys)
    keys.write_text("ssh-ed25519 AAAA")
    keys.chmod(0o644)
    with FlareProcess("client", kit, name="silo-1", org="silo_1", env={}) as process:
        process._process.wait(60)
    assert (keys.read_text(), keys.stat().st_mode & 0o777) == ("ssh-ed25519 AAAA", 0o644)
    assert (tmp_path / "flare.log").stat().st_mode & 0o777 == 0o600


def test_flare_is_told_of_no_place_in_its_kit(tmp_path, monkeypatch):
    """Adversary: FLARE's process, taken over, which leaves code to be imported before the wall."""
    kit, here = tmp_path / "kit", str(Path(__file__).parents[2])
    kit.mkdir()
    (kit / "sitecustomize.py").write_text(f"open({str(tmp_path / 'it-ran')!r}, 'w')")
    monkeypatch.setenv("PYTHONPATH", f":{here}:.:{os.environ.get('PYTHONPATH', '')}")
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/lib;lib:")
    monkeypatch.setenv("TMPDIR", ".")
    with FlareProcess("client", kit, name="silo-1", org="silo_1", env={}) as process:
        process._process.wait(60)
    assert not (tmp_path / "it-ran").exists()
    told = plain_environment()
    assert told["LD_LIBRARY_PATH"] == "/opt/lib"
    assert all(place.startswith("/") for place in told["PYTHONPATH"].split(":"))
    assert "TMPDIR" not in told


@pytest.mark.soak
def test_what_crosses(homes, engine):
    """A 100 MB adapter, in pieces; the silo before a job, or without one, is not asked."""
    from nvflare.fuel.utils.fobs import lobs

    home = homes["silo-1"]
    frame = os.urandom(100_000_000)
    assert engine.exchange({}, 1) == {}
    with attached(home, "silo-1"):
        assert engine.exchange({"silo-1": b"small"}, 120) == {"silo-1": Echo().step(b"small")}
        before = peak_memory("job\0client\0", str(home))
        assert before > 0
        assert engine.exchange({"silo-1": frame}, 200) == {"silo-1": Echo().step(frame)}
        assert peak_memory("job\0client\0", str(home)) - before < 100_000_000
        engine._end_job()
    with pytest.raises(ValueError, match="brings a file"):  # stripped: the session is ours
        lobs.get_datum_dir()


@pytest.mark.soak
def test_what_a_hostile_silo_gets_from_another_and_from_the_server(homes, engine, tmp_path):
    """It runs FLARE as it comes; the server and the other silo are honest."""
    secret = tmp_path / "private.json"
    secret.write_text('{"record": "a private record"}')
    with attached(homes["silo-1"], "silo-1"):
        assert engine.rejoined({"silo-1"}, 1, 60.0)
        words = [homes["silo-3"] / "kit", "silo-3", "silo-1", secret]
        said = said_by("flare_hostile_silo.py", words, tmp_path)
        assert "a private record" not in str(said)
        assert said["config"][0] == said["stop"][0] == "process_exception"  # nobody answers there
        assert said["shell"][0] == said["shell as the server"][0] == "timeout"
        assert said["address to server"][0] == said["address to silo-1"][0] == "nobody came"
        assert "silo-1" in engine._connected()  # the server runs on
    log = (homes["server"] / "flare.log").read_text()
    assert "refused a message of 'silo-3' by way of 'silo-3' for 'silo-1'" in log
    assert "refused a message of 'server' by way of 'silo-3' for 'silo-1'" in log


@pytest.mark.soak
def test_a_stranger_with_a_certificate_of_another_authority_is_not_connected(engine, tmp_path):
    port = int(
        json.loads((engine._flare.lead.workspace / "startup/fed_admin.json").read_text())["admin"][
            "port"
        ]
    )
    home = make_homes(tmp_path, ["silo-2"], port=port)["silo-2"]
    with attached(home, "silo-2"):
        deadline = time.monotonic() + 30
        log = home / "flare.log"
        while "CERTIFICATE_VERIFY_FAILED" not in log.read_text() and time.monotonic() < deadline:
            time.sleep(0.3)
        assert "CERTIFICATE_VERIFY_FAILED" in log.read_text(), log.read_text()[-2000:]
        assert "silo-2" not in engine._connected()


@pytest.mark.parametrize("made_up", [object(), 1 << 70, "\ud800"])
def test_a_silos_answer_that_cannot_be_passed_on_is_an_error_and_the_next_is_heard(made_up):
    """Adversary: a silo, whose values FLARE decodes to more than what is plain."""
    from securefedcollm.federation.engines.flare.relay import _serve

    class Proxy:
        name = "silo-1"

        def __call__(self, timeout):
            return self

        def push(self, value):
            return ["ok", made_up if value == 1 else value]

    ours, its = map(Wire, socket.socketpair())
    ours.give_up_after(20)
    thread = threading.Thread(target=_serve, args=(its, Proxy()))
    thread.start()
    ours.send(["push", 1])
    assert ours.receive()[0] == "error"
    ours.send(["push", 2])
    assert ours.receive() == ["ok", 2]
    ours.close()
    thread.join(20)
    assert not thread.is_alive()


@pytest.mark.parametrize("how", ["client", "server", "session", "as-it-comes"])
def test_flares_encoding_neither_reads_nor_writes_a_file_and_names_stay(tmp_path, how):
    """Adversary: whoever sends a value that the other side sends back, a server that calls itself
    as this silo, and a silo that calls itself as the server. FLARE as it comes does what they want.
    """
    program = SUPPORT / "flare_encoding.py"
    done = subprocess.run(
        [sys.executable, str(program), str(tmp_path), how], stdout=subprocess.PIPE, check=True
    )
    found = json.loads(done.stdout.splitlines()[-1])
    if how == "as-it-comes":
        assert all(worked is True for worked in found.values()), found
        return
    assert "stands for a file" in found["reads_a_file"]
    assert "brings a file" in found["writes_a_file"]
    if how != "server":
        assert "calls itself 'silo-1'" in found["is_believed"]
    else:
        assert "calls itself ' server.1111" in found["is_believed_as_the_server"]
    assert [path.name for path in tmp_path.iterdir()] == ["records.jsonl"]
