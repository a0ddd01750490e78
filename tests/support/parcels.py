"""Requests that the server of a study signs, and silos' inboxes that take them."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

from securefedcollm.federation.engines.link import SiloInbox, deliver
from securefedcollm.federation.engines.requests import Followed, Parcel, check_header, sign_request
from securefedcollm.primitives import SigningKey

SESSION = b"s" * 16
SERVER, STUDY = SigningKey(b"k" * 32), b"d" * 32


def signed(parcel: Parcel, frame: bytes, key: SigningKey = SERVER) -> bytes:
    return sign_request(key, STUDY, "silo-1", parcel, frame) + frame


def bring(link: Any, parcel: Parcel, frame: bytes, deadline: float, **more: Any) -> bytes:
    header = sign_request(SERVER, STUDY, "silo-1", parcel, frame)
    return deliver(link, parcel, frame, deadline, header=header, **more)


class Port:
    """Answers with the frame reversed, and counts."""

    def __init__(self, seconds: float = 0.0) -> None:
        self.frames: list[bytes] = []
        self.seconds = seconds

    def step(self, frame: bytes) -> bytes:
        self.frames.append(frame)
        time.sleep(self.seconds)
        return frame[::-1]


@contextlib.contextmanager
def inboxes(followed: Path) -> Iterator[Callable[..., SiloInbox]]:
    """Start inboxes that work in a thread each: ``start(port) -> inbox``. All are of one home.

    Args:
        followed: the file in which the silo notes which request it follows.
    """
    stop, threads = threading.Event(), list[threading.Thread]()

    def start(port: Any, limit: int = 1000) -> SiloInbox:
        check = partial(check_header, SERVER.public, STUDY, "silo-1")
        inbox = SiloInbox(port, limit, check, Followed(followed))
        threads.append(threading.Thread(target=inbox.serve, args=(stop.is_set,)))
        threads[-1].start()
        return inbox

    try:
        yield start
    finally:
        stop.set()
        for thread in threads:
            thread.join()


def soon() -> float:
    return time.monotonic() + 10
