"""A tracking tool of the test's own."""

from __future__ import annotations

from tests.support.hostile import WORDS


class Memory:
    """A tracking tool that may lose the connection; what it holds outlives a run's process."""

    def __init__(self):
        self.rounds, self.opened, self.closed, self.broken = {}, 0, [], False

    def open(self):
        self.opened += 1
        self._look()
        return self

    def _look(self):
        if self.broken:
            raise ConnectionError(f"https://me:secret@host/{WORDS}")

    def newest(self):
        return max(self.rounds, default=0)

    def write(self, round_, numbers):
        self._look()
        assert round_ == self.newest() + 1
        self.rounds[round_] = dict(numbers)

    def close(self, finished):
        self.closed.append(finished)
