"""Questions at a member's own machine, and how long letters are."""

from __future__ import annotations

import os
import queue

import numpy as np
import pytest

from securefedcollm.errors import ConfigError, TransportError
from securefedcollm.federation.engines import door as doors
from securefedcollm.federation.questions import letters as post
from securefedcollm.federation.questions.counter import (
    MOST_WAITING,
    Counter,
    ask_process,
    open_for_questions,
)
from securefedcollm.retrieval import Terms


def test_questions_of_this_machine_wait_their_turn():
    counter, query = Counter(), np.zeros(3)
    waiting = [counter.hand_in(query) for _ in range(MOST_WAITING)]
    with pytest.raises(TransportError, match="too many questions wait here"):
        counter.hand_in(query)
    waiting[0].cancel()  # whoever asked has gone
    handed = counter.next()
    assert handed is not None
    assert handed.result is waiting[1]


def test_terms_fix_how_long_letters_are():
    small, large = Terms(40, 8, 96, 3), Terms(2048, 96)
    for sizes in map(post.of_documents, (small, large)):
        kinds_ = ("question", "selection", "scores", "blocks")
        assert all(sizes.longest[kind] > 0 for kind in kinds_)
        assert sizes.largest(4) > 4 * sizes.longest["selection"]


def test_a_question_is_not_told_to_another_user(tmp_path, monkeypatch):
    """Adversary: another user of the machine, whose socket is where ours was before a reboot."""
    told: queue.Queue[object] = queue.Queue()
    with doors.Door(lambda wire: told.put(wire.receive())) as door:
        open_for_questions(tmp_path, door.path)
        with doors.knock(str(door.path)) as wire:
            wire.send(["ours"])
        assert told.get(timeout=10) == ["ours"]
        mine = os.getuid()
        monkeypatch.setattr(doors.os, "getuid", lambda: mine + 1)
        with pytest.raises(ConfigError, match="no process of this member is there to ask"):
            ask_process(tmp_path, np.zeros(6), 1.0)
        monkeypatch.undo()
    assert told.empty()
