"""Files that the rows of a data file name: read within their folder and within bounds."""

from __future__ import annotations

from pathlib import Path


class UnreadableError(ValueError):
    """A picture or recording that cannot be used, and why; without anything of its content."""


def read_file(folder: Path, name: str, most: int) -> bytes:
    """The content of the file ``name`` in or below ``folder``, and at most one byte over ``most``.

    Adversary: whoever wrote the name. It must not lead out of the folder.

    Raises:
        UnreadableError: it is not there, or elsewhere.
    """
    if not name.strip() or "\0" in name:
        raise UnreadableError("is no file name")
    try:
        root = folder.resolve()
        path = (root / name).resolve()
        if Path(name).is_absolute() or not path.is_relative_to(root):
            raise UnreadableError("is a path that leads out of the folder of the data file")
        if not path.is_file():
            raise UnreadableError("names a file that is not there")
        with path.open("rb") as file:
            return file.read(most + 1)
    except OSError as error:
        raise UnreadableError(f"names a file that cannot be read ({error.strerror})") from None
    except RuntimeError:  # links in a circle, in Python 3.12 and older
        raise UnreadableError("names a file that cannot be read (a link to itself)") from None
