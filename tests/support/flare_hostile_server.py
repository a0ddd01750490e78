"""A server whose operator runs FLARE as it comes, and attacks.

Words: KIT LEAD VICTIM SECRET MARKER ANSWERS. ANSWERS gets one JSON line
[attack, return code, answer] each; the last attack is called "done".
"""

from __future__ import annotations

import io
import json
import runpy
import socket
import sys
import tempfile
import threading
import time
import traceback
import zipfile
from pathlib import Path

import nvflare.fuel.utils.log_utils  # noqa: F401 - before two threads import it at once

from securefedcollm.federation.engines.flare.job import APP

kit, lead, victim, secret, marker, answers = sys.argv[1:]
JOB = "11111111-2222-4333-8444-555555555555"
CLIENT_CONFIG = "config/config_fed_client.json"


def app(without: str = "", packing: int = zipfile.ZIP_DEFLATED, **more: bytes) -> bytes:
    """The app of an honest server, with files more, or others of the same name; and signed."""
    from nvflare.lighter.utils import load_private_key_file, sign_folders

    with tempfile.TemporaryDirectory() as scratch:
        for name, content in {**APP, **more}.items():
            if name == without:
                continue
            path = Path(scratch, name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(content)
        key = load_private_key_file(f"{lead}/startup/client.key")
        sign_folders(scratch, key, f"{lead}/startup/client.crt")
        buffer = io.BytesIO()
        with zipfile.ZipFile(buffer, "w", packing) as archive:
            for path in sorted(Path(scratch).rglob("*")):
                archive.write(path, path.relative_to(scratch))
    return buffer.getvalue()


def note(attack: str, code: object = "", answer: object = "") -> None:
    with Path(answers).open("a") as file:
        file.write(json.dumps([attack, str(code), str(answer)]) + "\n")


class Attacker:
    def __init__(self, core):
        self.core = core

    def ask(self, channel, topic, request, target=victim, timeout=4):
        reply = self.core.send_request(
            channel=channel, topic=topic, target=target, request=request, timeout=timeout
        )
        return reply.get_header("cn__return_code"), getattr(reply.payload, "body", reply.payload)

    def command(self, topic, body, job=JOB, **headers):
        from nvflare.private.admin_defs import Message
        from nvflare.private.defs import CellChannel, new_cell_message

        message = Message(topic, body)
        meta = {"job_id": job, "name": "x", "resource_spec": {}, "submitter_name": "lead"}
        message.set_headers({"job_id": job, "job_meta": meta, "app_name": "app", **headers})
        return self.ask(CellChannel.CLIENT_MAIN, topic, new_cell_message({}, message))

    def wait_for(self, what, *wanted):
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            try:
                code, answer = what()
                if code in wanted:
                    return code, answer
            except RuntimeError:  # not connected yet
                pass
            time.sleep(0.3)
        raise TimeoutError(f"{wanted} expected")

    def start(self):
        from nvflare.apis.fl_constant import ServerCommandKey
        from nvflare.apis.fl_context import FLContext
        from nvflare.private.scheduler_constants import ShareableHeader

        context = {ServerCommandKey.PEER_FL_CONTEXT: FLContext()}
        _, resources = self.command("scheduler.check_resource", {}, **context)
        token = ShareableHeader.RESOURCE_RESERVE_TOKEN
        return self.command("train.start_job", {}, **{token: resources.get_header(token)})


def attack() -> None:
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.private.fed.server.fed_server import FederatedServer

    FederatedServer._sync_client_jobs = lambda *_: []  # or it would have its unknown job ended
    while not (core := CoreCell.ALL_CELLS.get("server")) or not core.running:
        time.sleep(0.3)
    attacker = Attacker(core)
    attacker.wait_for(lambda: attacker.command("train.check_status", ""), "ok")
    commands(attacker)
    deployments(attacker)
    addresses(attacker)
    the_job_process(attacker)


def commands(attacker: Attacker) -> None:
    from nvflare.fuel.f3.message import Message

    note("shell", *attacker.command("sys.shell", f"cat {secret}"))
    for topic in ("config_vars", "stop_cell"):
        note(f"diagnosis {topic}", *attacker.ask("_net_manager", topic, Message({}, None)))
    for job in ("startup", "local", JOB.upper().replace("1", "A"), "../silo-2"):
        note(f"remove {job}", *attacker.command("train.delete_run", "", job=job))
        note(f"deploy {job}", *attacker.command("train.deploy", app(), job=job))


def deployments(attacker: Attacker) -> None:
    evil = f"open({marker!r}, 'w')\n".encode()
    include = f'loot {{ include file("{secret}") }}\ny = [1] ${{loot}}\n'.encode()
    other = APP[CLIENT_CONFIG].replace(b"SiloRelay", b"Popen")
    for name, body in {
        "code": app(**{"custom/sitecustomize.py": evil}),
        "hocon": app(**{"config/config_fed_client.conf": include}, without=CLIENT_CONFIG),
        "config": app(**{CLIENT_CONFIG: other}),
        "bomb": app(**{CLIENT_CONFIG: bytes(20 << 20)}),
        "large": app() + bytes(1 << 20),
        "lzma": app(packing=zipfile.ZIP_LZMA),
        "no zip": b"PK",
        "nothing": None,
    }.items():
        note(f"app {name}", *attacker.command("train.deploy", body))
    note("start nothing", *attacker.start())


def addresses(attacker: Attacker) -> None:
    """A message that names an address, from a cell that seems to be further away."""
    from nvflare.fuel.f3.cellnet.defs import MessageHeaderKey
    from nvflare.fuel.f3.message import Message

    core = attacker.core
    send = core._send_to_endpoint

    def forged(endpoint, message, *args, **kwargs):
        if message.get_header(MessageHeaderKey.CONN_URL):
            message.set_header(MessageHeaderKey.FROM_CELL, "elsewhere")
        return send(endpoint, message, *args, **kwargs)

    core._send_to_endpoint = forged
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        listener.listen()
        listener.settimeout(4)
        url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
        headers = {MessageHeaderKey.CONN_URL: url}
        attacker.ask("task", "echo", Message(headers, None))
        try:
            listener.accept()
            note("address", "connected")
        except TimeoutError:
            note("address", "nobody came")


def the_job_process(attacker: Attacker) -> None:
    """An honest job, and then commands to its process, some in the name of its parent."""
    from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
    from nvflare.fuel.f3.message import Message
    from nvflare.private.defs import new_cell_message

    note("honest app", *attacker.command("train.deploy", app()))
    note("honest start", *attacker.start())
    process = f"{victim}.{JOB}"
    core = attacker.core
    deadline = time.monotonic() + 40
    while process not in core.agents and time.monotonic() < deadline:
        time.sleep(0.2)
    note("job process", "there" if process in core.agents else "did not come")
    for topic in ("config_vars", "stop_cell"):
        asked = attacker.ask("_net_manager", topic, Message({}, None), target=process)
        note(f"job's diagnosis {topic}", *asked)
    channel, topic = CellChannel.CLIENT_COMMAND, "check_status"
    asked = attacker.ask(channel, topic, new_cell_message({}, {}), target=process)
    note("job's command", *asked)
    send = core._send_to_endpoint

    def as_parent(endpoint, message, *args, **kwargs):
        message.set_header(MessageHeaderKey.ORIGIN, victim)
        return send(endpoint, message, *args, **kwargs)

    core._send_to_endpoint = as_parent
    asked = attacker.ask(channel, topic, new_cell_message({}, {}), target=process)
    core._send_to_endpoint = send
    note("job's command as its parent", *asked)


def go() -> None:
    try:
        attack()
    except BaseException:
        note("failed", "", traceback.format_exc())
    note("done")


threading.Thread(target=go, daemon=True).start()
module = "nvflare.private.fed.app.server.server_train"
sys.argv = [module, "-m", kit, "-s", "fed_server.json", "--set", "secure_train=true"]
sys.argv += ["org=server", "config_folder="]
runpy.run_module(module, run_name="__main__", alter_sys=True)
