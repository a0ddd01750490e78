"""Landlock around FLARE's processes: the kit, Python and the system, and nothing else."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from securefedcollm.federation.engines.flare import sandbox

pytest.importorskip("nvflare")

# FLARE's process as the product starts it, but what becomes FLARE makes attempts instead.
START = """
import json, os, runpy, signal, socket, subprocess, sys, threading
from pathlib import Path
from securefedcollm.federation.engines.flare import child, sandbox
kit, *others = map(Path, sys.argv[1:])
def probe(*_, **__):
    print("ready", flush=True)
    found = {}
    for name, attempt in json.loads(sys.stdin.readline() or "{}").items():
        try:
            found[name] = eval(attempt) not in (False, None)
        except PermissionError:
            found[name] = False
    print(json.dumps(found), flush=True)
def run(*words):
    return subprocess.run(words, capture_output=True, text=True)
runpy.run_module = probe
"""
RUN = """
child.main(str(os.getppid()), "client", str(kit), "silo-1", "silo_1")
"""

try:
    VERSION = sandbox.version()
except OSError:
    VERSION = 0
walled = pytest.mark.skipif(not VERSION, reason="this kernel has no Landlock")


@pytest.fixture
def kit(tmp_path):
    """In a home, beside what is private."""
    kit = tmp_path / "home" / "kit"
    kit.mkdir(parents=True)
    (kit / "key").write_text("k")
    (kit.parent / "records.jsonl").write_text("patient 1")
    return kit


@contextlib.contextmanager
def start(kit: Path, *others: Path, before: str = "", **options):
    """Yields the process, which is ready to attempt."""
    process = subprocess.Popen(
        [sys.executable, "-c", START + before + RUN, *map(str, (kit, *others))],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        **options,
    )
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def works(process, attempts: dict[str, str]) -> list[str]:
    """Which of the attempts (name → expression) are allowed."""
    said, errors = process.communicate(json.dumps(attempts) + "\n", timeout=60)
    assert process.returncode == 0, errors
    return [name for name, worked in json.loads(said.splitlines()[-1]).items() if worked]


@walled
def test_a_confined_process_has_its_kit_and_nothing_of_its_users(kit):
    """Adversary: who has FLARE read or write a file, in whatever way."""
    private = kit.parent / "records.jsonl"
    with start(kit, private) as process:
        allowed = works(
            process,
            {
                "reads its kit": "(kit / 'key').read_bytes()",
                "writes its kit": "(kit / 'sub').mkdir() or (kit / 'sub' / 'log').write_text('x')",
                "imports": "__import__('nvflare.apis.workspace')",
                "reads records": "others[0].read_bytes()",
                "lists their folder": "list(others[0].parent.iterdir())",
                "writes beside them": "others[0].with_name('new').write_text('x')",
                "removes them": "others[0].unlink() or True",
                "empties them": f"{VERSION} > 2 and (os.truncate(others[0], 0) or True)",
                "writes to /tmp": "Path('/tmp/securefedcollm-sandbox-test').write_text('x')",
                "its child reads records": "run('cat', others[0]).returncode == 0",
            },
        )
    assert allowed == ["reads its kit", "writes its kit", "imports"]
    assert private.read_text() == "patient 1"


@walled
def test_the_wall_stands_around_every_thread(kit):
    """Adversary: whoever gets code into FLARE's process, and runs it in a thread of ours."""
    with start(kit) as process:
        assert process.stdout.readline() == "ready\n"
        threads = [p.read_text() for p in Path(f"/proc/{process.pid}/task").glob("*/status")]
    assert len(threads) > 1  # one ends the process with its parent
    assert all("NoNewPrivs:\t1" in status for status in threads), threads


@walled
def test_with_a_thread_that_the_wall_would_leave_out_nothing_starts(kit):
    before = "threading.Thread(target=threading.Event().wait, daemon=True).start()"
    with start(kit, before=before) as process:
        said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert "1 threads run already and would stay outside the wall" in errors
    assert "Traceback" not in errors


@walled
def test_what_is_linked_or_installed_elsewhere_can_be_read(kit, tmp_path):
    """systemd-resolved keeps the name servers' file in /run; `pip install --user` packages in a
    home; neither is under what the system's places hold."""
    resolved, packages = tmp_path / "run" / "resolve", tmp_path / "local" / "site-packages"
    for place in (resolved, packages):
        place.mkdir(parents=True)
    (resolved / "stub-resolv.conf").write_text("nameserver 127.0.0.53")
    (packages / "module.py").write_text("")
    (packages.parent / "private").write_text("")
    link = tmp_path / "resolv.conf"
    link.symlink_to(resolved / "stub-resolv.conf")
    before = f"sandbox._NAMES = Path({str(link)!r}); sys.path.append({str(packages)!r})"
    with start(kit, resolved, packages, before=before) as process:
        allowed = works(
            process,
            {
                "name servers": "(others[0] / 'stub-resolv.conf').read_text()",
                "a package": "(others[1] / 'module.py').read_bytes() == b''",
                "beside it": "(others[1].parent / 'private').read_bytes() == b''",
                "writes to them": "(others[1] / 'module.py').write_text('x')",
            },
        )
    assert allowed == ["name servers", "a package"]


@walled
def test_of_the_system_only_what_names_and_libraries_need(kit):
    """Adversary: who reads what others' processes are told, or uses root's rights inside."""
    with start(kit, Path("/proc") / str(os.getpid())) as process:
        allowed = works(
            process,
            {
                "names": "socket.getaddrinfo('localhost', 80)",
                "time": "Path('/etc/localtime').exists()",
                "random": "Path('/dev/urandom').open('rb').read(1)",
                "nothing": "Path('/dev/null').write_bytes(b'x')",
                "certificates": "__import__('ssl').create_default_context()",
                "starts a process": "run('true').returncode == 0",
                "sees its parent": "__import__('psutil').pid_exists(os.getppid())",
                "sees one that is gone": "__import__('psutil').pid_exists(2**22 + 1)",
                "what ours is told": "(others[0] / 'environ').read_bytes()",
                "how ours was called": "(others[0] / 'cmdline').read_bytes()",
                "who else runs": "list(Path('/proc').iterdir())",
                "settings": "list(Path('/etc').iterdir())",
                "passwords": "Path('/etc/shadow').read_bytes()",
                "devices": "list(Path('/dev').iterdir())",
                "root's rights": "os.chown(kit / 'key', 1, 1) or True",
                "a child's": "run('chown', '1', kit / 'key').returncode == 0",
            },
        )
    assert allowed == [
        *("names", "time", "random", "nothing", "certificates"),
        *("starts a process", "sees its parent"),
    ]


@pytest.mark.skipif(os.getuid() != 0, reason="only root has rights to lose")
def test_root_is_told_that_a_home_of_another_user_is_out_of_reach(kit):
    os.chown(kit, 1, 1)
    kit.chmod(0o700)
    with start(kit) as process:
        said, errors = process.communicate(timeout=60)
    assert (process.returncode, said) == (1, "")
    assert f"{kit}: out of reach for FLARE's processes" in errors
    assert "Traceback" not in errors


@pytest.mark.skipif(VERSION < 6, reason="Landlock knows of signals and sockets from version 6 on")
def test_no_signal_and_no_abstract_socket_leads_out(kit):
    """Adversary: who stops this user's other processes, or speaks to a service of theirs."""
    name = f"\0securefedcollm-{os.getpid()}"
    with socket.socket(socket.AF_UNIX) as service:
        service.bind(name)
        service.listen()
        with start(kit) as process:
            allowed = works(
                process,
                {
                    "signals to ours": "os.kill(os.getppid(), 0) or True",
                    "signals to its own": "os.kill(os.getpid(), 0) or True",
                    "sockets": f"socket.socket(socket.AF_UNIX).connect({name!r}) or True",
                },
            )
    assert allowed == ["signals to its own"]


def test_what_the_wall_lacks_is_said_in_the_log_and_to_the_operator(kit, monkeypatch):
    """An old kernel, one without Landlock, and one where a filter forbids it."""
    before = "sandbox._CREATE = 9999"  # no such system call
    with start(kit, before=before) as process:
        _, errors = process.communicate("{}\n", timeout=60)
    assert process.returncode == 0
    assert "no Landlock (Function not implemented): FLARE's processes may read" in errors
    monkeypatch.setattr(sandbox, "version", lambda: 2)
    assert "older than Linux 6.2" in sandbox.shortcoming()
    monkeypatch.setattr(sandbox, "version", lambda: 3)
    assert sandbox.shortcoming() == ""
