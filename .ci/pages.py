"""The pages of the site that follow from the code: `python .ci/pages.py DIRECTORY` writes them.

The Python interface (what `__all__` names; mkdocstrings fills it in), every command and option,
every error with its exit code, and the format of a bundle of evidence.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from types import ModuleType
from typing import Any

import msgspec
import securefedcollm_audits
import typer
from securefedcollm_cli.main import AGAIN, app

import securefedcollm
from securefedcollm import aggregation, errors, hf, retrieval
from securefedcollm.evidence import bundle, entries

_NO_BRACES = str.maketrans("", "", "{}")
_COMMON = {"--help", "--install-completion", "--show-completion"}


def api() -> str:
    """`securefedcollm.__all__`, and the Hugging Face door."""
    names = [name for name in securefedcollm.__all__ if name != "__version__"]
    return "\n".join(
        [
            "# Python: `securefedcollm`\n",
            "`import securefedcollm as sfc`. The names on this page are the public interface. They "
            "change only with a new minor version. Paths may be strings. `sfc.__version__` is the "
            "version.\n",
            *_members(securefedcollm, names),
            "## `securefedcollm.hf`\n",
            *(_member(f"{hf.__name__}.{name}") for name in _own_classes(hf)),
        ]
    )


def sums() -> str:
    """`securefedcollm.aggregation.__all__`."""
    return "\n".join(
        [
            "# Python: `securefedcollm.aggregation`\n",
            f"{inspect.getdoc(aggregation)}\n",
            "[The masking protocol](../protocol.md) and [CKKS](../ckks.md) say what crosses the "
            "wire. [Your own transport](../transport.md) has an example.\n",
            *_members(aggregation, aggregation.__all__),
        ]
    )


def questions() -> str:
    """`securefedcollm.retrieval.__all__`."""
    return "\n".join(
        [
            "# Python: `securefedcollm.retrieval`\n",
            "A silo answers a question that it cannot read. "
            "[Private retrieval](../retrieval.md) says who learns what, and has an example.\n",
            *_members(retrieval, retrieval.__all__),
        ]
    )


def auditing() -> str:
    """`securefedcollm_audits.__all__`."""
    return "\n".join(
        [
            "# Python: `securefedcollm_audits`\n",
            "`from securefedcollm_audits import verify`. The names on this page are public, as are "
            "those of `securefedcollm`. None of them imports torch or asks a network. "
            "[For auditors](../auditor.md) says which checks there are.\n",
            *_members(securefedcollm_audits, securefedcollm_audits.__all__),
        ]
    )


def _members(module: ModuleType, names: Sequence[str]) -> Iterator[str]:
    def kind(name: str) -> str:
        value = getattr(module, name)
        if isinstance(value, type):
            return "Errors" if issubclass(value, BaseException) else "Classes"
        return "Functions" if inspect.isfunction(value) else "Types and constants"

    for group in ("Functions", "Classes", "Errors", "Types and constants"):
        inside = [name for name in names if kind(name) == group]
        if inside:
            yield f"## {group}\n"
            yield from (_member(f"{module.__name__}.{name}") for name in inside)


def _member(path: str) -> str:
    lines = [f"::: {path}", "    options:", "      heading_level: 3"]
    if path == "securefedcollm.Study":  # its keys have a page of their own
        lines.append("      show_if_no_docstring: false")
    return "\n".join([*lines, ""])


def _own_classes(module: ModuleType) -> list[str]:
    found = inspect.getmembers(module, inspect.isclass)
    return [name for name, value in found if value.__module__ == module.__name__]


def commands() -> str:
    """Every command of the Typer app with its arguments and options."""
    root = typer.main.get_command(app)
    context = typer.Context(root, info_name="securefedcollm")
    lines = [
        "# Command line\n",
        f"{root.help}\n",
        "Every command has `--help`. [Errors and exit codes](errors.md) are the same for all.\n",
        *_options(root, context),
    ]
    for words, command in walk(root):
        lines.append(f"{'#' * min(3, 1 + len(words))} {' '.join(words)}\n")
        lines.append(f"{inspect.cleandoc(command.help or '')}\n")
        if not hasattr(command, "commands"):
            usage = " ".join([*words, *command.collect_usage_pieces(context)])
            lines.append(f"```text\nsecurefedcollm {usage.translate(_NO_BRACES)}\n```\n")
            lines += _options(command, context)
    return "\n".join(lines)


def walk(command: Any, words: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """(words, command) of every command below ``command``, groups before their members."""
    for name, found in getattr(command, "commands", {}).items():
        yield (*words, name), found
        yield from walk(found, (*words, name))


def _options(command: Any, context: Any) -> Iterator[str]:
    for parameter in command.get_params(context):
        record = parameter.get_help_record(context)
        if record is not None and not _COMMON & set(parameter.opts):
            yield f"`{record[0]}`\n:   {record[1]}\n"


def failures() -> str:
    """Every class of the error tree, with what the command line makes of it."""
    lines = [
        "# Errors and exit codes\n",
        "Every error that this project raises on purpose is a `SecureFedCoLLMError` with a `hint`: "
        "one line that says what to do next. The command line prints both and ends.\n",
        "| exit code | means |\n| --- | --- |",
        "| 0 | done; a verification holds |",
        "| 1 | `audit …`: a check failed, or an attack refuted a claim |",
        "| 2 | a person must mend something: an option, a file, a study |",
        f"| {AGAIN} | nothing to mend: the same command may succeed later |",
        "| 130 | interrupted; what was under way goes on when it is started again |\n",
        "With `--json` an error is an object with `error` (the class), `message`, `hint` and "
        "`again`.\n",
        "## The tree\n",
    ]
    for error in tree(errors.SecureFedCoLLMError):
        meaning = (inspect.getdoc(error) or "").split("\n\n")[0].replace("\n", " ")
        assert error.__base__ is not None
        code = AGAIN if error.again else 2
        lines.append(f"`{error.__name__}` is a `{error.__base__.__name__}`: exit code {code}")
        lines.append(f":   {meaning}\n")
    return "\n".join(lines)


def tree(error: type[errors.SecureFedCoLLMError]) -> Iterator[type[errors.SecureFedCoLLMError]]:
    """``error`` and all that `errors.py` derives from it, parents first."""
    yield error
    for child in error.__subclasses__():
        if child.__module__ == errors.__name__:
            yield from tree(child)


def evidence() -> str:
    """The files of a bundle, and every kind of entry in a log with its fields."""
    lines = [
        "# The format of the evidence\n",
        "[Evidence](../evidence.md) says what these entries prove. This page follows from the code "
        "that writes them.\n",
        "## A bundle\n",
        f"{_prose(bundle)}\n",
        "## An entry\n",
        f"{_prose(entries)}\n",
        *_fields(entries.Entry),
        "`what` is one of the following; `kind` says which.\n",
    ]
    for kind in entries.What.__args__:
        lines += [f"### {kind.__struct_config__.tag}\n", f"{_prose(kind)}\n", *_fields(kind)]
    lines.append("## Parts of entries\n")
    for part in (
        *(entries.Member, entries.Root, entries.Offer, entries.Ciphertexts, entries.Word),
        *(entries.Spent, entries.Answers, entries.Slip),
    ):
        name = part.__name__
        lines += [f"### {name} {{ #{name.lower()}-part }}\n", f"{_prose(part)}\n", *_fields(part)]
    return "\n".join(lines)


def _prose(thing: object) -> str:
    """The docstring as Markdown, in which a literal block needs no colons."""
    return (inspect.getdoc(thing) or "").replace("\n::\n", "")


def _fields(kind: type[msgspec.Struct]) -> Iterator[str]:
    info = msgspec.inspect.type_info(kind)
    assert isinstance(info, msgspec.inspect.StructType)
    if info.fields:
        yield "| field | type |\n| --- | --- |"
        yield from (f"| `{f.encode_name}` | {_words(f.type)} |" for f in info.fields)
        yield ""


_WORDS = {
    msgspec.inspect.AnyType: "anything",
    msgspec.inspect.BoolType: "true or false",
    msgspec.inspect.IntType: "whole number",
    msgspec.inspect.NoneType: "null",
    msgspec.inspect.StrType: "text",
}


def _words(kind: Any) -> str:
    """A type of msgspec's, as a reader of JSON knows it."""
    match kind:
        case msgspec.inspect.UnionType(types=types) if len(types) > 2:
            return "one of the kinds below"
        case msgspec.inspect.UnionType(types=types):
            return " or ".join(_words(one) for one in types)
        case msgspec.inspect.StructType(cls=found):
            return f"[{found.__name__}](#{found.__name__.lower()}-part)"
        case msgspec.inspect.StrType(pattern=str(pattern)):
            digits = re.fullmatch(r"\^\[0-9a-f\]\{(\d+)\}.*", pattern)
            shown = pattern.replace(r"(?!\n)", "").replace("|", "&#124;")
            return f"{digits[1]} hex digits" if digits else f"text, <code>{shown}</code>"
        case msgspec.inspect.StrType(max_length=int(most)):
            return f"text of at most {most} characters"
        case msgspec.inspect.ListType(item_type=item):
            return f"list of: {_words(item)}"
        case msgspec.inspect.TupleType(item_types=items):
            return f"list of {len(items)}: {', '.join(map(_words, items))}"
        case msgspec.inspect.DictType(key_type=key, value_type=value):
            return f"object: {_words(key)} → {_words(value)}"
        case msgspec.inspect.FloatType(ge=at_least, gt=above, lt=below):
            limits = (("at least", at_least), ("above", above), ("below", below))
            said = [f"{word} {limit:g}" for word, limit in limits if limit is not None]
            return " ".join(["number", " and ".join(said)]).strip()
    return _WORDS[type(kind)]


PAGES: dict[str, Callable[[], str]] = {
    "api.md": api,
    "aggregation.md": sums,
    "retrieval.md": questions,
    "auditing.md": auditing,
    "commands.md": commands,
    "errors.md": failures,
    "evidence.md": evidence,
}


if __name__ == "__main__":
    directory = Path(sys.argv[1])
    directory.mkdir(parents=True, exist_ok=True)
    for name, page in PAGES.items():
        (directory / name).write_text(page(), encoding="utf-8")
