"""A record as all tasks have it: a prompt, its choices and the right one."""

from __future__ import annotations

from dataclasses import dataclass, field, replace


@dataclass(frozen=True)
class Question:
    """One prompt and its choices; ``answer`` is None on an unlabelled public prompt.

    A choice is joined to the prompt by one space, so neither end carries it. ``group`` names the
    column of the result table (``general``, ``private``). ``subject`` says whose record it is,
    where that is the unit of privacy. ``content`` is a digest of the words of the row that this was
    read from, whatever the task makes of them, and ``row`` one of all text in it; empty where there
    was no row.
    """

    prompt: str
    choices: tuple[str, ...]
    answer: int | None
    group: str = ""
    subject: str | None = None
    content: bytes = field(default=b"", compare=False, repr=False)
    row: bytes = field(default=b"", compare=False, repr=False)

    def unlabelled(self) -> Question:
        """The question without its answer; a response is the answer itself, so it goes too."""
        alone = len(self.choices) == 1 and self.prompt
        return replace(self, answer=None, choices=() if alone else self.choices)
