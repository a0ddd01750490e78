"""Where an index or a map may be written: never over what somebody wrote."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from securefedcollm.errors import ConfigError


def check_output(out: Path, inputs: Sequence[Path], magic: bytes) -> None:
    """Refuse to replace anything but an older file of the same format.

    Adversary: a slip of the hand, such as ``index build guide.md --out guide.md``. It would destroy
    the documents, a study or a key.

    Args:
        inputs: files that this command reads.
        magic: what every file of the format begins with.

    Raises:
        ConfigError: ``out`` is one of the inputs, or is there and no file of this format.
    """
    problem = ""
    try:
        if out.exists() and any(file.exists() and out.samefile(file) for file in inputs):
            problem = "is read by this command, and would be lost"
        elif out.exists() and not _begins(out, magic):
            problem = "is there already, and is no older file of this kind"
        elif "\0" in str(out):
            problem = "holds a character that no path has"
    except OSError as error:
        problem = f"cannot be read ({error.strerror})"
    if problem:
        raise ConfigError(problem, where=str(out), hint="choose another file with --out")


def _begins(file: Path, magic: bytes) -> bool:
    if not file.is_file():  # a directory, or a pipe, which would never end
        return False
    with file.open("rb") as content:
        return content.read(len(magic)) == magic
