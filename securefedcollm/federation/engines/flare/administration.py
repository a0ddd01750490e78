"""The server's requests to FLARE: run a job, end it, and say who is connected."""

from __future__ import annotations

import contextlib
import io
import logging
import shutil
import tempfile
import threading
import time
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any, Final

from securefedcollm.errors import TransportError
from securefedcollm.federation.engines.flare.job import write_job
from securefedcollm.federation.engines.flare.kit import Kit
from securefedcollm.federation.engines.flare.processes import LARGEST_MESSAGE

log = logging.getLogger(__name__)

_ANSWER: Final = 60.0
"""Seconds within which FLARE's server answers, logins included."""


class Administration:
    """A session with FLARE's server that logs in again when it breaks. Thread-safe.

    Args:
        lead: the kit of whoever submits jobs.
        require_open: called before every try; raises if trying is useless.

    All methods raise TransportError if FLARE's server does not answer.
    """

    def __init__(self, lead: Kit, require_open: Callable[[], None]) -> None:
        self.lead = lead
        self._require_open = require_open
        self._session: Any = None
        self._asking = threading.RLock()

    def submit(self, silos: Collection[str]) -> str:
        """Submit a job for these silos; returns its id."""
        folder = Path(tempfile.mkdtemp(prefix="job-", dir=self.lead.workspace))
        try:
            write_job(folder, sorted(silos))
            return str(self._ask(lambda session: session.submit_job(str(folder))))
        finally:
            shutil.rmtree(folder, ignore_errors=True)

    def abort(self, job: str) -> None:
        """End a job that nobody else can end."""
        self._ask(lambda session: session.abort_job(job))

    def finished(self, job: str) -> bool:
        """Whether the job is over, so that its silos are free for another."""
        meta = self._ask(lambda session: session.get_job_meta(job))
        return str(meta.get("status", "")).startswith("FINISHED")

    def seen(self) -> dict[str, float]:
        """Silo → when its last heartbeat came, seconds since 1970."""
        info = self._ask(lambda session: session.get_system_info())
        return {client.name: float(client.last_connect_time) for client in info.client_info}

    def _ask(self, question: Callable[[Any], Any]) -> Any:
        from securefedcollm.federation.engines.flare.hardening import strip_session

        strip_session(LARGEST_MESSAGE)
        from nvflare.fuel.flare_api.flare_api import new_secure_session

        deadline = time.monotonic() + _ANSWER
        while True:
            self._require_open()
            try:
                with self._asking, contextlib.redirect_stdout(io.StringIO()):  # it greets the user
                    if self._session is None:
                        self._session = new_secure_session(
                            self.lead.name, str(self.lead.workspace), timeout=10
                        )
                    return question(self._session)
            except Exception as error:  # a dozen kinds, from sockets to FLARE's own
                self.close()
                if time.monotonic() > deadline:
                    raise TransportError(
                        f"FLARE's server does not answer ({str(error)[:160]})",
                        hint="see flare.log in the server's home",
                    ) from None
                log.info("FLARE's server does not answer yet: %s", error)
                time.sleep(0.5)

    def close(self) -> None:
        """Log out."""
        if self._session is not None:
            try:
                self._session.close()
            except Exception as error:
                log.debug("closing the FLARE session: %s", error)
            self._session = None
