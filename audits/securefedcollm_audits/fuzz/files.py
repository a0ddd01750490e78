"""Fuzz targets for files that people receive: studies, bundles, records, pictures, recordings.

Adversary: the maker of the file. Whatever it holds, reading it ends in a result or in one of this
project's errors, of one printable line, within :data:`SECONDS` and :data:`BYTES`.
"""

from __future__ import annotations

import json
import resource
import signal
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from securefedcollm.errors import ConfigError, SecureFedCoLLMError
from securefedcollm_audits.fuzz import seeds as seeds

if TYPE_CHECKING:
    from securefedcollm.tuning.media import Medium

SECONDS: Final = 5.0
"""Limit on this process's time for one input, after a first one."""
BYTES: Final = 1 << 30
"""Limit on the memory that one input may add to this process."""
_MOST: Final = 6
"""Alterations of one input."""
LONGEST: Final = 96
"""Bytes of an input."""

_WORDS: Final = (
    *(b"[" * 200, b"{a: " * 200, b'{"a":' * 200, b"]", b"}", b"&a [*a]", b"*a", b"<<: *a\n", b"? "),
    *(b".inf", b"-.nan", b"1e999", b"1e308", b"1e-320", b"-1", b"0", b"9" * 400, b"9" * 5000),
    *(
        b"9007199254740993",
        b"9007199254740991",
        b"1000000000",
        b"0x" + b"f" * 400,
        b"null",
        b"true",
    ),
    *(b"\xff", b"\x00", b"\xed\xa0\x80", b'"\\ud800"', b"\\ud800", b"\x1b[2J", b"\xe2\x80\xae"),
    *(
        b"2024-13-99",
        b"!!binary aGk=",
        b"!!bool x",
        b"!!python/name:os",
        b"\r",
        b"\n",
        b"\t",
        b": ",
    ),
    *(b'"', b"'", b",", b"# ", b"--- ", b"%YAML 9\n", b"a" * 5000, b"- " * 200, b"[red]", b"\\n"),
)
_VALUES: Final[tuple[Any, ...]] = (
    *(-1, 0, 1, 2**31, 2**53 - 1, 2**53, 10**9, -0.0, 1e-308, 1e-12, 0.5, 1.0, 1e12, 1e300),
    *("", "a", "a\n", "\x1b[2J[/red]\u202e", "ab" * 32, "ab" * 16, "silo-1", "x" * 5000, None),
    *(True, False, [], {}, [[]], ["a"] * 200, {"a": 1}, ["silo-1"] * 129),
)


class SlowError(BaseException):
    """An input took too long; no ``except Exception`` swallows it."""


class FoundError(Exception):
    """Reading a file did something that it must never do."""


class Dice:
    """Choices by an input's bytes; zeros after its end."""

    def __init__(self, script: bytes) -> None:
        self._bytes = iter(script)
        self.length = len(script)

    def below(self, limit: int) -> int:
        """A number from 0 to ``limit`` - 1."""
        value = 0
        for _ in range(1 if limit <= 256 else 3):
            value = value << 8 | next(self._bytes, 0)
        return value % limit

    def one_of(self, things: Any) -> Any:
        """One of a sequence."""
        return things[self.below(len(things))]


def study(script: bytes) -> str:
    """A study file. A study that is read has a digest, and survives a write and a read."""
    from securefedcollm.study import dump_study, load_study

    dice = Dice(script)
    if dice.below(2):
        text = json.dumps(_grafted(json.loads(json.dumps(seeds.STUDY)), dice)).encode()
    else:
        text = altered(seeds.study_text().encode(), dice)
    with on_disk("study.yaml", text) as path:
        try:
            read = load_study(path)
        except ConfigError as error:
            return harmless(error)
        path.write_text(dump_study(read), encoding="utf-8")
        if load_study(path).digest != read.digest:
            raise FoundError("a study is read back as another")
        _ = read.ring, read.field, read.quorum, read.sums
    return "read"


def bundle(script: bytes) -> str:
    """A bundle: its archive altered, or its members, or one value of them and all hashes mended."""
    from securefedcollm.evidence.bundle import pack

    dice = Dice(script)
    kind = dice.below(4)
    if kind == 0:
        content = altered(seeds.bundle(), dice)
    else:
        members = seeds.bundle_members()
        name = dice.one_of(sorted(members))
        if kind == 1:
            members[name] = altered(members[name], dice)
        else:
            for _ in range(1 + dice.below(3)):
                members[name] = _mended(members[name], dice)
                name = dice.one_of(sorted(members))
        content = pack(members)
    with on_disk("evidence.zip", content) as path:
        return _looked_at(path)


def _looked_at(path: Path) -> str:
    from securefedcollm_audits.report.page import to_html
    from securefedcollm_audits.report.report import make_report
    from securefedcollm_audits.verification import table
    from securefedcollm_audits.verification.merge import merge
    from securefedcollm_audits.verification.verify import verify

    verdict = verify(path)
    shown = table.text(verdict)
    try:
        report, case = make_report(path)
        shown += to_html(report, case)
    except SecureFedCoLLMError as error:
        harmless(error)
    honest = path.with_name("honest.zip")
    honest.write_bytes(seeds.bundle())
    try:
        merge([honest, path])
    except SecureFedCoLLMError as error:
        harmless(error)
    if wrong := {c for c in shown if not c.isprintable() and c != "\n"}:
        raise FoundError(f"what the bundle says reaches a person as {sorted(wrong)}")
    return "archive" if len(verdict.results) == 1 else "checked"


def _mended(member: bytes, dice: Dice) -> bytes:
    """One value of a canonical JSON text, or of one of its lines, exchanged."""
    from securefedcollm.evidence.entries import canonical

    lines = member.split(b"\n")
    at = dice.below(max(1, len(lines) - 1))
    try:
        lines[at] = canonical(_grafted(json.loads(lines[at]), dice))
    except ValueError:  # a value that canonical JSON cannot carry
        return member
    return b"\n".join(lines)


def data(script: bytes) -> str:
    """A file of records, for every kind of task and in every format."""
    from securefedcollm.tuning.data import inspect_rows, read_questions
    from securefedcollm.tuning.media import MEDIA

    dice = Dice(script)
    kind, suffix = dice.one_of(tuple(seeds.ROWS)), dice.one_of((".jsonl", ".csv", ".parquet"))
    content = altered(seeds.records(kind, suffix), dice)
    options: dict[str, Any] = {"kind": kind, "labels": ["no", "yes"] if "class" in kind else []}
    if dice.below(4) == 0:
        options["owner"] = "subject"
    if kind in MEDIA and suffix == ".jsonl" and dice.below(4) == 1:
        content = seeds.crowded(kind, dice.below(1 << 19)) + content
    with on_disk(f"rows{suffix}", content) as path:
        try:
            for _, row in inspect_rows(path, **options):
                if isinstance(row, ConfigError):
                    harmless(row)
            questions = read_questions(path, labelled=bool(dice.below(2)), **options)
        except ConfigError as error:
            return harmless(error)
    for question in questions:
        "".join((question.prompt, *question.choices, question.group)).encode()
    return "read"


def picture(script: bytes) -> str:
    """An image file in each format that is read."""
    from securefedcollm.tuning.media import PICTURE
    from securefedcollm.tuning.pictures import FORMATS

    dice = Dice(script)
    return _signal(altered(seeds.picture(dice.one_of(FORMATS)), dice), PICTURE)


def sound(script: bytes) -> str:
    """A WAV file in both forms that are read."""
    from securefedcollm.tuning.media import SOUND

    dice = Dice(script)
    return _signal(altered(seeds.sound(bool(dice.below(2))), dice), SOUND)


def _signal(content: bytes, medium: Medium) -> str:
    """One that is read is also known, and looked at or listened to."""
    from securefedcollm.tuning.attached import UnreadableError

    try:
        found = medium.content(content)
        medium.digest(found)
    except UnreadableError as error:
        if not str(error).isprintable():
            raise FoundError(f"what a {medium.noun} says reaches a person") from error
        return "refused"
    medium.empty(found)
    return "read"


TARGETS: Final[dict[str, Callable[[bytes], str]]] = {
    "study": study,
    "bundle": bundle,
    "data": data,
    "picture": picture,
    "sound": sound,
}


def bounded(target: Callable[[bytes], str], seconds: float, script: bytes) -> str:
    """Play one input within the bounds.

    Raises:
        FoundError, SlowError, Exception: what was found.
    """
    started, before = time.process_time(), _peak()

    def stop(*_: object) -> None:
        raise SlowError(f"over {seconds:g} s")

    previous = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, seconds)
    try:
        ended = target(script)
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0.0)
        signal.signal(signal.SIGPROF, previous)
    if time.process_time() - started > seconds:  # in code that no signal stops
        raise SlowError(f"over {seconds:g} s")
    if _peak() - before > BYTES:
        raise FoundError(f"over {BYTES >> 20} MiB of memory")
    return ended


def _peak() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def harmless(error: SecureFedCoLLMError) -> str:
    """The class of an error of one printable line.

    Raises:
        FoundError: it is none.
    """
    for text in (str(error), error.hint):
        if not text.isprintable() or not str(error):
            raise FoundError(f"an error that is not one printable line: {text!r}")
    return type(error).__name__


@contextmanager
def on_disk(name: str, content: bytes) -> Iterator[Path]:
    """A file that is there for a while."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / name
        path.write_bytes(content)
        yield path


def altered(content: bytes, dice: Dice) -> bytes:
    """A few cuts, copies, flips and words from :data:`_WORDS`."""
    for _ in range(1 + dice.below(_MOST)):
        at = dice.below(len(content) + 1)
        end = min(len(content), at + dice.below(64))
        word = dice.one_of(_WORDS)
        match dice.below(8):
            case 0:
                content = content[:at] + content[end:]
            case 1:
                content = content[:at] + content[at:end] * dice.below(200) + content[end:]
            case 2:
                flipped = bytes([(content[at] if at < len(content) else 0) ^ (1 << dice.below(8))])
                content = content[:at] + flipped + content[at + 1 :]
            case 3:
                content = content[:at] + content[dice.below(len(content) + 1) :]
            case 4:
                content = content[:at] + word * dice.below(200) + content[end:]
            case 5:  # the value of a line
                line = content.rfind(b": ", 0, at) + 2
                stop = content.find(b"\n", line)
                content = content[:line] + word + content[stop:]
            case _:
                content = content[:at] + word + content[end:]
    return content


def _grafted(tree: Any, dice: Dice) -> Any:
    """Plain values with one of them, or a key, exchanged for one of :data:`_VALUES`."""
    value, node = dice.one_of(_VALUES), tree
    if value == {} and isinstance(tree, dict):
        value = {"a": [[[[{}]]]]}
    while isinstance(node, dict | list) and node:
        keys = sorted(node) if isinstance(node, dict) else range(len(node))
        key = dice.one_of(keys)
        child = node[key]
        if isinstance(child, dict | list) and child and dice.below(8):
            node = child
            continue
        alike = [other for other in _VALUES if type(other) is type(child)]
        if alike and dice.below(4):
            value = dice.one_of(alike)
        if isinstance(node, dict) and dice.below(16) == 1:
            node[str(value)[:60]] = node.pop(key)
        else:
            node[key] = value
        break
    return tree
