"""How FLARE's parent process takes a job and starts the job's process: ours, or none.

FLARE unpacks what a server sent, then looks at it, then asks whether it was allowed; meanwhile it
can be started. This module unpacks nothing: it writes the app from our own copy.

Adversary: the server, which sends what it likes, twice at once if that helps.
"""

from __future__ import annotations

import json
import logging
import shutil
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, Final

from nvflare.apis.fl_constant import FLContextKey, RunProcessKey
from nvflare.apis.job_launcher_spec import JobProcessArgs
from nvflare.apis.workspace import Workspace
from nvflare.app_common.job_launcher.process_launcher import ProcessHandle, ProcessJobLauncher
from nvflare.private.admin_defs import error_reply, ok_reply
from nvflare.private.defs import RequestHeader
from nvflare.private.fed.client.scheduler_cmds import StartJobProcessor
from nvflare.private.fed.client.training_cmds import DeleteRunNumberProcessor, DeployProcessor
from nvflare.utils.job_launcher_utils import (
    get_client_job_args,
    get_credential_env,
    get_server_job_args,
)
from nvflare.utils.process_utils import spawn_process

from securefedcollm.federation.engines.flare.job import fault_of, is_job, write_app
from securefedcollm.federation.engines.flare.processes import job_command, job_environment

log = logging.getLogger(__name__)

_one_at_a_time = threading.Lock()
"""Held while a job is deployed, started or removed."""
_deployed: set[str] = set()
"""The job that this process deployed last. It did not write anything else that lies there."""
_ENDING: Final = 10.0
"""Seconds for the last job's process to be gone."""


def take_one_job() -> None:
    """At a silo: deploy and start our own app, whatever the server sent, and one job at a time."""
    DeployProcessor.process = _alone(_deploy)
    StartJobProcessor.process = _alone(_starting(StartJobProcessor.process))
    DeleteRunNumberProcessor.process = _alone(DeleteRunNumberProcessor.process)


def _alone(process: Callable[..., Any]) -> Callable[..., Any]:
    def answer(self: Any, request: Any, engine: Any) -> Any:
        with _one_at_a_time:
            return process(self, request, engine)

    return answer


def _deploy(_: Any, request: Any, engine: Any) -> Any:
    name = engine.get_client_name()
    workspace = Workspace(engine.args.workspace, site_name=name)
    job = request.get_header(RequestHeader.JOB_ID)
    if fault := fault_of(job, request.body):
        log.warning("refused a job of the server: %s", fault)
        return error_reply(f"not the job of securefedcollm: {fault}")
    if not _end_jobs(engine.client_executor):
        return error_reply("the last job's process does not end")
    for old in Path(workspace.root_dir).iterdir():
        if old.is_dir() and is_job(old.name):
            shutil.rmtree(old)
    write_app(Path(workspace.get_app_dir(job)))
    (Path(workspace.get_run_dir(job)) / "fl_app.txt").write_text("app")
    Path(workspace.get_job_meta_path(job)).write_text(json.dumps(_meta(job, name)))
    _deployed.clear()
    _deployed.add(job)
    return ok_reply(body=f"deployed app to {name}")


def _meta(job: str, name: str) -> dict[str, Any]:
    """What FLARE's process of a job must know of it; it passes nothing of the server's on."""
    return {"job_id": job, "resource_spec": {}, "job_clients": [{"name": name}]}


def _starting(process: Callable[..., Any]) -> Callable[..., Any]:
    def start(self: Any, request: Any, engine: Any) -> Any:
        job = request.get_header(RequestHeader.JOB_ID)
        if job not in _deployed:
            return error_reply("no such job is deployed")
        request.set_header(RequestHeader.JOB_META, _meta(job, engine.get_client_name()))
        request.body = {}
        return process(self, request, engine)

    return start


def _end_jobs(executor: Any) -> bool:
    """End what still runs, even if it is ours: another is to begin."""
    for process in list(executor.run_processes.values()):
        process[RunProcessKey.JOB_HANDLE].terminate()
    deadline = time.monotonic() + _ENDING
    while executor.run_processes:
        if time.monotonic() > deadline:
            return False
        time.sleep(0.1)
    return True


def launch_own(role: str, name: str) -> None:
    """Have FLARE start a job's process by way of :mod:`.processes`, stripped as this one is."""
    # A process dies with the thread that started it, so that one lives as long as this process.
    starter = ThreadPoolExecutor(1, thread_name_prefix="starter")

    def launch(_: Any, job_meta: Any, fl_ctx: Any) -> ProcessHandle:
        args = fl_ctx.get_prop(FLContextKey.JOB_PROCESS_ARGS)
        command = job_command(role, name, _words(role, args))
        env = {**job_environment(), **get_credential_env(args)}
        return ProcessHandle(process_adapter=starter.submit(spawn_process, command, env).result())

    ProcessJobLauncher.launch_job = launch


def _words(role: str, args: Any) -> list[str]:
    names = {"client": get_client_job_args, "server": get_server_job_args}[role]
    wanted = names(include_exe_module=False, include_set_options=False)
    words = [str(word) for name in wanted if name in args for word in args[name]]
    option, values = args[JobProcessArgs.OPTIONS]
    return [*words, option, *values.split()]
