"""Four bits a sample: IMA ADPCM (IMA, "Recommended Practices for Enhancing Digital Audio
Compatibility in Multimedia Systems", revision 3.00, 1992), many recordings at once.

A code is the difference to the last sample in eighths of a step, and the step follows the codes.
"""

from __future__ import annotations

from typing import Final

import numpy as np
import numpy.typing as npt

Samples = npt.NDArray[np.int16]
"""[N, T]."""
Codes = npt.NDArray[np.uint8]
"""[N, T / 2]: the earlier of two samples is in the lower half of a byte."""

# fmt: off
_STEPS: Final = np.array([
    7, 8, 9, 10, 11, 12, 13, 14, 16, 17, 19, 21, 23, 25, 28, 31, 34, 37, 41, 45, 50, 55, 60, 66,
    73, 80, 88, 97, 107, 118, 130, 143, 157, 173, 190, 209, 230, 253, 279, 307, 337, 371, 408,
    449, 494, 544, 598, 658, 724, 796, 876, 963, 1060, 1166, 1282, 1411, 1552, 1707, 1878, 2066,
    2272, 2499, 2749, 3024, 3327, 3660, 4026, 4428, 4871, 5358, 5894, 6484, 7132, 7845, 8630,
    9493, 10442, 11487, 12635, 13899, 15289, 16818, 18500, 20350, 22385, 24623, 27086, 29794,
    32767,
], dtype=np.int64)
# fmt: on
_CHANGES: Final = np.array([-1, -1, -1, -1, 2, 4, 6, 8] * 2, dtype=np.int64)


class _State:
    """The last sample and the step of every recording."""

    def __init__(self, count: int) -> None:
        self.last, self.index = np.zeros((2, count), dtype=np.int64)

    def after(self, code: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """The next sample, by its code."""
        step = _STEPS[self.index]
        moved = step >> 3
        for bit, part in ((4, step), (2, step >> 1), (1, step >> 2)):
            moved = moved + np.where(code & bit, part, 0)
        self.last = np.clip(self.last + np.where(code & 8, -moved, moved), -32768, 32767)
        self.index = np.clip(self.index + _CHANGES[code], 0, len(_STEPS) - 1)
        return self.last


def decoded(codes: Codes) -> Samples:
    """The samples of some recordings."""
    state = _State(len(codes))
    out = np.empty((len(codes), 2 * codes.shape[1]), dtype=np.int16)
    for t in range(out.shape[1]):
        out[:, t] = state.after((codes[:, t // 2] >> (4 * (t % 2)) & 15).astype(np.int64))
    return out


def encoded(samples: Samples) -> Codes:
    """The codes of some recordings of an even length."""
    state = _State(len(samples))
    out = np.zeros((len(samples), samples.shape[1] // 2), dtype=np.uint8)
    for t in range(samples.shape[1]):
        apart = samples[:, t] - state.last
        code = np.minimum(np.abs(apart) * 4 // _STEPS[state.index], 7) | np.where(apart < 0, 8, 0)
        state.after(code)
        out[:, t // 2] |= (code << (4 * (t % 2))).astype(np.uint8)
    return out
