"""The archive of a bundle: bytes ⇄ members, in one spelling, without unpacking anything.

Adversary of the reader: the maker of the file. Before a member is read, the archive's own lists say
how many there are and where: few, uncompressed, side by side, together no longer than the file.
"""

from __future__ import annotations

import io
import re
import struct
import zipfile
from collections.abc import Mapping
from typing import Final

MAX_MEMBERS: Final = 32_768
"""A log and its heads of each of 10,000 silos, and the signatures of some thousand sums."""
_PATH: Final = re.compile(r"^[a-z0-9][a-z0-9._-]{0,127}(/[a-z0-9][a-z0-9._-]{0,127})?\Z")
_END: Final = struct.Struct("<4s4H2LH")
"""End of the central directory, without a comment: what ends every bundle."""
_MAX_DIRECTORY: Final = MAX_MEMBERS * (46 + 256)
_LOCAL_HEADER: Final = 30


def zipped(members: Mapping[str, bytes]) -> bytes:
    """The one archive of these members."""
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w", zipfile.ZIP_STORED) as archive:
        for name in sorted(members):
            info = zipfile.ZipInfo(name, (1980, 1, 1, 0, 0, 0))
            info.create_system = 3
            info.external_attr = 0o644 << 16
            archive.writestr(info, members[name])
    return buffer.getvalue()


def unzipped(content: bytes) -> dict[str, bytes]:
    """The members of an archive made by :func:`zipped`.

    Raises:
        ValueError: it is no such archive; the text says why.
        Exception: zipfile raises a dozen kinds on garbage.
    """
    _check_end(content)
    members: dict[str, bytes] = {}
    with zipfile.ZipFile(io.BytesIO(content)) as archive:
        infos = archive.infolist()
        _check_places(infos, len(content))
        for info in infos:
            # Adversary: a path that climbs out, a member that hides another.
            if not _PATH.match(info.filename) or info.filename in members:
                raise ValueError("a member with an impossible or repeated name")
            members[info.filename] = archive.read(info)
    if zipped(members) != content:
        raise ValueError("bytes that belong to no member")
    return members


def _check_end(content: bytes) -> None:
    """Adversary: a directory of millions of members, which zipfile reads as a whole."""
    if len(content) < _END.size:
        raise ValueError("too short")
    mark, _, _, _, count, size, _, comment = _END.unpack(content[-_END.size :])
    if mark != b"PK\x05\x06" or comment or content[-42:-38] == b"PK\x06\x07":
        raise ValueError("it does not end as a bundle does")
    if count > MAX_MEMBERS or size > _MAX_DIRECTORY:
        raise ValueError(f"{count} members, {MAX_MEMBERS} are the most")


def _check_places(infos: list[zipfile.ZipInfo], length: int) -> None:
    """Adversary: members that inflate, or that share bytes: 4 MB of file, 4 GB of members."""
    if len(infos) > MAX_MEMBERS:
        raise ValueError(f"{len(infos)} members, {MAX_MEMBERS} are the most")
    end = 0
    for info in sorted(infos, key=lambda info: info.header_offset):
        if info.compress_type != zipfile.ZIP_STORED or info.file_size != info.compress_size:
            raise ValueError("a compressed member")
        if info.header_offset < end:
            raise ValueError("members that overlap")
        end = info.header_offset + _LOCAL_HEADER + info.file_size
    if end > length:
        raise ValueError("members larger than the file")
