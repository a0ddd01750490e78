"""A secure sum of vectors, by itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError


def secure_sum(
    vectors: Mapping[str, npt.ArrayLike],
    *,
    clip_norm: float | None = None,
    bound: int | None = None,
    colluders: int = 0,
) -> npt.NDArray[Any]:
    """The sum of several parties' vectors, by a round of masked secure aggregation in this process.

    Every party's keys, masks and signatures are real; only the network is missing. So this is for
    trials: see ``docs/protocol.md`` for the roles that exchange bytes between organisations.
    A sum has no differential privacy.

    Args:
        vectors: name → vector, all of one length d, of at least three parties. Integers, or floats
            with ``clip_norm``.
        clip_norm: L2 norm that every float vector is clipped to. A vector of this norm becomes
            2^30 steps, so each value is rounded by at most clip_norm · 2^-31 or so.
        bound: of integers: all satisfy abs(q) ≤ bound. It is public. Default: the largest absolute
            value there is, which the parties must then agree to tell.
        colluders: parties that may work with the server and learn no more than the sum.

    Returns:
        int64 [d], exact; or float64 [d], where ``clip_norm`` is given.

    Raises:
        ConfigError: too few parties, several lengths, floats without ``clip_norm``, or a value
            beyond ``bound``.
        TrainingError: a float is not finite.
    """
    from securefedcollm.aggregation.inmemory import sum_of
    from securefedcollm.privacy.quantise import Quantiser

    given = _checked(vectors, floats=clip_norm is not None)
    if clip_norm is not None:
        length = max(map(len, given.values()), default=1)
        made = Quantiser(length, clip_norm, bound or 2**30)
        whole = {n: made.encode(v.astype(np.float64)).integers for n, v in given.items()}
        total = sum_of(whole, made.bound, colluders).sum.astype(np.int64, copy=False)
        return total.astype(np.float64) / made.scale
    greatest = max((max(int(v.max()), -int(v.min())) for v in given.values()), default=1)
    if bound is not None and greatest > bound:
        raise ConfigError(
            f"{greatest} is beyond the bound {bound}",
            where="bound",
            hint="a bound is agreed before anybody sees the vectors; choose it large enough",
        )
    whole = {name: vector.astype(np.int64) for name, vector in given.items()}
    return sum_of(whole, bound or max(1, greatest), colluders).sum.astype(np.int64, copy=False)


def _checked(vectors: Mapping[str, npt.ArrayLike], *, floats: bool) -> dict[str, npt.NDArray[Any]]:
    """The vectors as arrays of one length, of floats or of integers.

    Raises:
        ConfigError: they are not.
    """
    given = {name: np.asarray(vector) for name, vector in vectors.items()}
    shapes = sorted({vector.shape for vector in given.values()})
    if len(shapes) > 1:
        raise ConfigError(
            f"of several shapes: {', '.join(map(str, shapes))}",
            where="vectors",
            hint="every party's vector has the same length",
        )
    for name, vector in given.items():
        if vector.ndim != 1 or not len(vector) or vector.dtype.kind not in "iuf":
            raise ConfigError(
                f"{vector.dtype} {list(vector.shape)}",
                where=f"vectors[{name!r}]",
                hint="one-dimensional, with at least one number",
            )
        if floats != (vector.dtype.kind == "f"):
            raise ConfigError(
                "floats need clip_norm, integers have none",
                where=f"vectors[{name!r}]",
                hint="clip_norm=C clips every vector to L2 norm C",
            )
    return given
