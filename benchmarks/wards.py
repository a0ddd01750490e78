"""Make the spoken words of the built-in world: ``securefedcollm/tuning/wards.npz``.

``python -m benchmarks.wards`` needs the programs espeak-ng and flite (Debian's packages have these
names). Each speaker is one voice of one of them, at a pitch and speed of its own. The words are cut
out of their silence, brought to 8 kHz and coded with 4 bits a sample, as telephone lines carry
speech. It takes half a minute. Other versions of the programs speak a little differently.
"""

from __future__ import annotations

import argparse
import subprocess
import tempfile
import wave
from pathlib import Path
from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from scipy.signal import resample_poly

from securefedcollm.tuning.adpcm import encoded
from securefedcollm.tuning.wards import FAMILIES, FILE, LABELS, LINE_RATE, MOST_SPOKEN, SPEAKERS

_QUIET = 0.03  # of the loudest sample: what is below it at either end is cut off
_MARGIN = 0.01  # seconds that stay of it
_PEAK = 0.9


class Speaker(NamedTuple):
    """A voice: the words of the command that speaks ``text`` into ``file``."""

    command: tuple[str, ...]

    def words(self, text: str, file: str) -> list[str]:
        """The command line."""
        return [word.format(text=text, file=file) for word in self.command]


def espeak(voice: str, pitch: int, speed: int) -> Speaker:
    """A voice of espeak-ng; ``pitch`` from 0 to 99, ``speed`` in words a minute."""
    given = ("-v", voice, "-p", str(pitch), "-s", str(speed))
    return Speaker(("espeak-ng", *given, "-w", "{file}", "{text}"))


def flite(voice: str, pitch: int, stretch: float) -> Speaker:
    """A voice of flite; ``pitch`` in Hz, ``stretch`` of its durations."""
    given = ("--setf", f"int_f0_target_mean={pitch}", "--setf", f"duration_stretch={stretch}")
    return Speaker(("flite", "-voice", voice, *given, "-t", "{text}", "-o", "{file}"))


_ACCENTS = ("en-us", "en-gb", "en-gb-scotland", "en-gb-x-rp", "en-gb-x-gbclan", "en-029")
_TIMBRES = ("m1", "f2", "m3", "f4", "m5", "f5", "m7", "f1", "m2", "f3", "m8", "m4")


def general(number: int) -> Speaker:
    """The ordinary speaker ``number``: an accent and a timbre that no other has together."""
    accent = _ACCENTS[number % len(_ACCENTS)]
    timbre = _TIMBRES[(number + number // len(_TIMBRES)) % len(_TIMBRES)]
    return espeak(f"{accent}+{timbre}", 35 + 7 * number % 35, 150 + 13 * number % 45)


def foreign(family: int, number: int) -> Speaker:
    """The speaker ``number`` of a ward's own voices."""
    stretch = 1.0 + 0.06 * (number % 3)
    match FAMILIES[family]:
        case "slt":
            return flite("slt", 150 + 18 * number, stretch)
        case "kal":
            return flite("kal", 85 + 10 * number, stretch)
        case "awb":
            return flite("awb", 100 + 12 * number, stretch)
        case "rms":
            return flite("rms", 80 + 10 * number, stretch)
        case "whisper":
            voice = ("whisper", "whisperf")[number % 2]
            return espeak(f"{_ACCENTS[number]}+{voice}", 30 + 10 * number, 150 + 9 * number)
        case _:
            return espeak(f"{_ACCENTS[number]}+croak", 20 + 12 * number, 150 + 9 * number)


def spoken(speaker: Speaker, text: str, folder: Path) -> npt.NDArray[np.int16]:
    """One word, cut and scaled, at :data:`LINE_RATE`."""
    file = folder / "word.wav"
    subprocess.run(speaker.words(text, str(file)), check=True, capture_output=True)
    with wave.open(str(file)) as content:
        rate, raw = content.getframerate(), content.readframes(content.getnframes())
    sound = np.frombuffer(raw, dtype="<i2").astype(np.float64)
    loud = np.flatnonzero(np.abs(sound) > _QUIET * np.abs(sound).max())
    margin = int(_MARGIN * rate)
    sound = sound[max(0, loud[0] - margin) : loud[-1] + margin]
    if rate != LINE_RATE:
        sound = resample_poly(sound, LINE_RATE, rate)
    if len(sound) > MOST_SPOKEN:
        raise SystemExit(f"{text} by {speaker.command} takes {len(sound) / LINE_RATE:.2f} s")
    return np.round(sound * (_PEAK * 32767 / np.abs(sound).max())).astype(np.int16)


def main() -> None:
    """Speak all words of all speakers and write the file."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FILE)
    out = parser.parse_args().out
    sounds = []
    with tempfile.TemporaryDirectory() as folder:
        for family, number in SPEAKERS:
            voice = general(number) if family < 0 else foreign(family, number)
            sounds += [spoken(voice, label, Path(folder)) for label in LABELS]
    lengths = np.array([len(sound) for sound in sounds], dtype=np.uint16)
    rows = np.zeros((len(sounds), MOST_SPOKEN), dtype=np.int16)
    for row, sound in zip(rows, sounds, strict=True):
        row[: len(sound)] = sound
    codes = encoded(rows)
    np.savez(
        out,
        lengths=lengths,
        codes=np.concatenate([c[: (int(n) + 1) // 2] for c, n in zip(codes, lengths, strict=True)]),
    )
    print(
        f"{len(sounds)} words, {int(lengths.sum()) / LINE_RATE:.0f} s, {out.stat().st_size:,} bytes"
    )


if __name__ == "__main__":
    main()
