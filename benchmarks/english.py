"""Real English text that every installation has: four packages' documentation, each a silo's.

    python -m benchmarks.english DIR

Writes into DIR the files of a comparison by ``securefedcollm experiment pretrain-english``, and
prints what they are: counts, SHA-256 of the corpus, versions of the packages.

- A document is one docstring: its paragraphs of prose, without code, lists, tables and parameters.
  It is one row, so ε for a record is ε for a document. Sources are read, and nothing is imported.
- Each of four packages is a silo. The server's public text is Python's own documentation, and the
  docstrings of its standard library and of three more packages.
- Whole modules are held out for the test. A paragraph is kept once in all files together. A test
  document that has ten words in a row in common with any document that is trained on is left out.
- ``base/`` is a small Llama, trained here on the public text alone, with a tokenizer of that text.

``--dev`` writes another test file, of modules that otherwise are trained on, for choosing settings.
"""

from __future__ import annotations

import argparse
import ast
import hashlib
import importlib.util
import json
import re
import sys
import sysconfig
import warnings
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from benchmarks._machine import machine

SILOS: Final = ("networkx", "scipy", "sympy", "torch")
PUBLIC: Final = ("numpy", "pandas", "transformers")
"""Beside the standard library and ``pydoc_data.topics``."""
MOST: Final = 2000
"""Training documents of a silo; those of least hash."""
TESTED: Final = {"private": 150, "public": 500}
"""Test documents: of each silo, and of the server's sources."""
PER_MODULE: Final = 3
"""Test documents of one module at most: they resemble each other."""
PARTS: Final = 10
TEST_PARTS: Final = (0, 1)
DEV_PARTS: Final = (2,)
"""By the hash of a module's name."""
SHARED_WORDS: Final = 10

_LEFT_OUT: Final = (
    *("test", "tests", "testing", "conftest", "site-packages", "dist-packages", "pydoc_data"),
    *("idlelib", "tkinter", "turtledemo", "lib2to3", "distutils", "ensurepip"),
)
_COMMON: Final = (
    *("the", "of", "a", "is", "to", "and", "in", "that", "it", "for", "this", "be", "are"),
    *("as", "with", "or", "by", "an", "if", "not", "from", "on", "which", "can", "will", "when"),
)


@dataclass(frozen=True)
class Document:
    """``source``: a package, ``python`` or ``topics``. ``module``: its file, or the topic."""

    source: str
    module: str
    place: int
    paragraphs: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.paragraphs)

    @property
    def order(self) -> bytes:
        """A rank that depends on the document's name alone."""
        return _hash(f"{self.source}/{self.module}/{self.place}")

    @property
    def part(self) -> int:
        return _hash(f"{self.source}/{self.module}")[0] % PARTS


@dataclass(frozen=True)
class Corpus:
    """``silos``: training documents by silo; ``test``: by group, private or public."""

    silos: dict[str, list[Document]]
    public: list[Document]
    test: dict[str, list[Document]]


def prose(docstring: str) -> list[str]:
    """The paragraphs that are English sentences, without markup."""
    found = []
    for block in re.split(r"\n\s*\n", docstring):
        lines = block.split("\n")
        if any(line[:1] in " \t" or line.startswith(_MARKS) for line in lines if line):
            continue
        text = re.sub(r":[\w:]+:`~?([^`<]*)(<[^`]*>)?`", r"\1", " ".join(block.split()))
        text = re.sub(r"`+_*", "", text)
        words = text.split()
        plain = sum(letter.isalpha() or letter in " ,.'-" for letter in text)
        if (
            12 <= len(words) <= 200
            and text[0].isupper()
            and text.endswith(".")
            and plain >= 0.93 * len(text)
            and sum(word.lower() in _COMMON for word in words) >= 0.2 * len(words)
        ):
            found.append(text)
    return found


_MARKS: Final = (">>>", "...", "..", "-", "*", "+", "|", "#", "=", ":", "@", "$")


def documents(source: str, root: Path) -> Iterator[Document]:
    """Every docstring with prose in the ``.py`` files below ``root``, in the files' order."""
    for path in sorted(root.rglob("*.py"), key=lambda path: path.relative_to(root).as_posix()):
        module = path.relative_to(root)
        if {*_LEFT_OUT} & {*module.parts, module.stem}:
            continue
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # old escapes in other people's strings
                tree = ast.parse(path.read_bytes())
        except (SyntaxError, ValueError):
            continue
        for place, node in enumerate(_described(tree)):
            paragraphs = prose(ast.get_docstring(node) or "")
            if paragraphs:
                yield Document(source, module.as_posix(), place, tuple(paragraphs))


def topics() -> Iterator[Document]:
    """Python's reference, as ``help()`` shows it."""
    from pydoc_data.topics import topics as found

    for name in sorted(found):
        for place, paragraph in enumerate(prose(found[name])):
            yield Document("topics", name, place, (paragraph,))


def sources() -> list[Document]:
    """All documents of this installation."""
    found = [*topics(), *documents("python", Path(sysconfig.get_paths()["stdlib"]))]
    for package in (*PUBLIC, *SILOS):
        spec = importlib.util.find_spec(package)
        if spec is None or not spec.submodule_search_locations:
            raise SystemExit(f"{package} is not installed")
        found += documents(package, Path(spec.submodule_search_locations[0]))
    return found


def corpus(found: Iterable[Document], held_out: Sequence[int], unused: Sequence[int]) -> Corpus:
    """Training and test documents.

    Args:
        found: all documents.
        held_out: the parts that are tested on.
        unused: parts that nobody sees.
    """
    ranked = sorted(_distinct(found), key=lambda document: document.order)
    train: dict[str, list[Document]] = {name: [] for name in (*SILOS, "public")}
    held: dict[str, list[Document]] = {name: [] for name in train}
    for document in ranked:
        owner = document.source if document.source in SILOS else "public"
        if document.part in held_out:
            held[owner].append(document)
        elif document.part not in unused and (owner == "public" or len(train[owner]) < MOST):
            train[owner].append(document)
    seen = {run for part in train.values() for document in part for run in _runs(document.text)}
    tested = {
        owner: _few(document for document in part if not seen & _runs(document.text))
        for owner, part in held.items()
    }
    private = [d for name in SILOS for d in tested[name][: TESTED["private"]]]
    return Corpus(
        {name: train[name] for name in SILOS},
        train["public"],
        {"public": tested["public"][: TESTED["public"]], "private": private},
    )


def write(made: Corpus, directory: Path) -> str:
    """The files of the study; returns the SHA-256 of all of them."""
    directory.mkdir(parents=True, exist_ok=True)
    files = {name: [{"text": d.text} for d in part] for name, part in made.silos.items()}
    files["public"] = [{"text": d.text} for d in made.public]
    files["test"] = [
        {"text": d.text, "subject": group} for group, part in made.test.items() for d in part
    ]
    digest = hashlib.sha256()
    for name, rows in files.items():
        lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
        (directory / f"{name}.jsonl").write_text(lines, encoding="utf-8")
        digest.update(_hash(f"{name} {lines}"))
    return digest.hexdigest()


def _described(tree: ast.Module) -> Iterator[Any]:
    for node in ast.walk(tree):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield node


def _distinct(found: Iterable[Document]) -> Iterator[Document]:
    """Each paragraph once, whatever its letters' case and its numbers; empty documents go."""
    seen: set[str] = set()
    for document in found:
        kept = []
        for paragraph in document.paragraphs:
            key = " ".join(_words(paragraph))
            if key not in seen:
                seen.add(key)
                kept.append(paragraph)
        if kept:
            yield Document(document.source, document.module, document.place, tuple(kept))


def _few(found: Iterable[Document]) -> list[Document]:
    """Those of one module up to :data:`PER_MODULE`."""
    counts: dict[tuple[str, str], int] = {}
    kept = []
    for document in found:
        module = (document.source, document.module)
        counts[module] = counts.get(module, 0) + 1
        if counts[module] <= PER_MODULE:
            kept.append(document)
    return kept


def _words(text: str) -> list[str]:
    return re.findall(r"[a-z]+", text.lower())


def _runs(text: str) -> set[int]:
    """Every run of :data:`SHARED_WORDS` words, as numbers."""
    words = _words(text)
    return {
        hash(" ".join(words[i : i + SHARED_WORDS]))
        for i in range(max(1, len(words) - SHARED_WORDS + 1))
    }


def _hash(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("out", type=Path)
    parser.add_argument("--dev", action="store_true", help="test on training modules")
    parser.add_argument("--epochs", type=int, default=3, help="of the base model's training")
    parser.add_argument("--json", action="store_true")
    asked = parser.parse_args()
    from benchmarks.english_base import make

    held_out, unused = (DEV_PARTS, TEST_PARTS) if asked.dev else (TEST_PARTS, ())
    made = corpus(sources(), held_out, unused)
    digest = write(made, asked.out)
    print("training the base model on public text", file=sys.stderr, flush=True)
    losses = make([document.text for document in made.public], asked.out / "base", asked.epochs)
    counts = {name: len(part) for name, part in made.silos.items()}
    counts |= {"public": len(made.public)}
    counts |= {f"test, {group}": len(part) for group, part in made.test.items()}
    about = {"machine": machine(*PUBLIC, *SILOS, "tokenizers"), "documents": counts}
    found = about | {"sha256": digest, "base_losses": losses}
    if asked.json:
        print(json.dumps(found, indent=2))
        return
    for key, value in found.items():
        print(f"{key}: {value}")


if __name__ == "__main__":
    main()
