"""The distributed discrete Gaussian: every silo adds a share of the noise that hides the sum.

Nobody is trusted with the whole noise. Each of n silos adds N_Z(0, σᵢ²) with σᵢ² = (zγC)²/h, where
h = least survivors − colluders is the number of honest shares that are certain to be in an opened
sum; whatever the server does, the honest noise has at least variance (zγC)². γC = ``bound``.

Adversary: the server and c silos, who know the sum and c shares. A silo that adds *no* noise is one
of the c. With more than c such silos the claim does not hold, and masks hide that they added none.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError, LocalProtocolError
from securefedcollm.privacy.discrete_gaussian import TAIL
from securefedcollm.privacy.events import (
    SUM_KIND,
    SUMS,
    DiscreteGaussian,
    LayeredGaussian,
    SumKind,
    layer_sigmas,
)
from securefedcollm.privacy.noise import LayeredNoise, Noise
from securefedcollm.privacy.quantise import Floats, Integers, Quantiser


class DistributedGaussian:
    """Clip, quantise and add this silo's share of the noise.

    Args:
        values: length d.
        clip_norm: C, per silo (``silo`` unit) or per record (joint DP-SGD).
        field_bound: largest |integer| that one silo may send (the ring's per-silo bound). The
            quantisation bound γC is the largest for which contributions and noise always fit.
        noise_multiplier: z: noise of the sum over C, against server + c silos at least survivors.
        least_survivors: fewest silos with which a sum is opened (the threshold or minimum).
        colluders: c.
        contributions: most units that one silo sums (the batch cap in joint DP-SGD).
        kind: of event that a sum is charged as.
        silos: on the roster, where surplus noise is removed from sums of more than
            ``least_survivors``; else 0.

    Raises:
        ConfigError: too few honest shares, or a field too narrow for the vector or the noise.
    """

    __slots__ = (
        "colluders",
        "contributions",
        "kind",
        "layers",
        "least_survivors",
        "noise_multiplier",
        "quantiser",
        "share_sigma",
        "silos",
    )

    def __init__(
        self,
        *,
        values: int,
        clip_norm: float,
        field_bound: int,
        noise_multiplier: float,
        least_survivors: int,
        colluders: int,
        contributions: int = 1,
        kind: SumKind = SUM_KIND,
        silos: int = 0,
    ) -> None:
        honest = least_survivors - colluders
        if honest < 1:
            raise ConfigError(
                f"no honest noise share is certain with {least_survivors} survivors and "
                f"{colluders} colluders",
                where="silos.minimum",
                hint="require more survivors",
            )
        per_share = noise_multiplier / math.sqrt(honest)
        most = silos or least_survivors
        relative = layer_sigmas(1.0, least_survivors, most, colluders) if silos else (1.0,)
        tail = TAIL * per_share * math.fsum(relative)
        bound = int(field_bound / (contributions + tail))
        if bound < 1:
            raise ConfigError(
                "the field is too narrow for this noise",
                where="aggregation.value_bits",
                hint="raise it",
            )
        self.noise_multiplier = noise_multiplier
        self.least_survivors = least_survivors
        self.colluders = colluders
        self.contributions = contributions
        self.kind = kind
        self.silos = silos
        try:
            self.quantiser = Quantiser(values, clip_norm, min(bound, 2**31 - 1))
            self.share_sigma = per_share * self.quantiser.bound
            self.layers = tuple(self.share_sigma * part for part in relative)
            """σ of every layer of a share; one, where no noise is removed."""
            self.event(least_survivors)  # refuses a share too coarse before anything is trained
        except ConfigError as error:
            if error.where not in {"bound", "share_sigma"}:
                raise
            raise ConfigError(
                f"the field is too narrow for {contributions} vector(s) of {values} values with "
                f"this noise ({error.message})",
                where="aggregation.value_bits",
                hint="raise it, or allow less noise with a larger privacy.epsilon",
            ) from None

    @property
    def largest(self) -> int:
        """No protected integer ever exceeds this; at most the ``field_bound`` given."""
        tails = sum(math.floor(TAIL * sigma) for sigma in self.layers)
        return self.contributions * self.quantiser.bound + tails

    def protect(self, vector: Floats, noise: Noise) -> npt.NDArray[np.int64]:
        """One unit's vector, clipped, quantised and noised, int64 [d]; ready for masking.

        Raises:
            TrainingError: a value is not finite.
        """
        return self._noised(self.quantiser.encode(vector).integers, noise)

    def protect_sum(self, rows: Iterable[Floats], noise: Noise) -> npt.NDArray[np.int64]:
        """Sum of units' vectors, each clipped and quantised by itself, plus one noise share.

        Raises:
            TrainingError: a value is not finite.
            ConfigError: more rows than ``contributions``.
        """
        return self._noised(self.quantiser.encode_sum(self._counted(rows)), noise)

    def _counted(self, rows: Iterable[Floats]) -> Iterator[Floats]:
        """One row in memory at a time: it may be as large as a model."""
        for number, row in enumerate(rows, start=1):
            if number > self.contributions:
                raise ConfigError(
                    f"{number} units in one sum, the field is made for {self.contributions}",
                    where="contributions",
                    hint="size it by batch_cap",
                )
            yield row

    def event(self, shares: int, *, count: int = 1, q: float = 1.0) -> DiscreteGaussian:
        """What ``count`` sums of ``shares`` silos release; ``least_survivors`` for the worst case.

        ``q``: Poisson rate of a unit, if its silo alone draws and knows the sample.
        """
        made = SUMS[self.kind](
            share_sigma=self.share_sigma,
            sensitivity=self.quantiser.bound,
            values=self.quantiser.values,
            shares=shares,
            colluders=self.colluders,
            count=count,
            q=q,
        )
        if not self.silos:
            return made
        design = {"design": self.colluders, "least": self.least_survivors, "most": self.silos}
        return LayeredGaussian(**{f: getattr(made, f) for f in made.__struct_fields__}, **design)

    def surplus(self, survivors: int) -> slice:
        """Which layers of every share a sum of so many silos does not need."""
        return slice(self.silos - survivors + 1, None) if self.silos else slice(0, 0)

    def without_surplus(
        self, total: Integers, survivors: int, keys: Sequence[Sequence[bytes]]
    ) -> npt.NDArray[np.int64]:
        """``total`` less the surplus layers of those silos who opened them, int64 [d].

        Args:
            total: the opened sum, int64 or int32 [d].
            keys: of every such silo, one key of 32 bytes a layer.

        Raises:
            LocalProtocolError: another number of keys than there are such layers.
        """
        left, sigmas = total.astype(np.int64), self.layers[self.surplus(survivors)]
        np.negative(left, out=left)  # the noise is added to it, in place
        if any(len(opened) != len(sigmas) for opened in keys):
            raise LocalProtocolError(f"{len(sigmas)} keys for layers of noise were expected")
        for layer, sigma in enumerate(sigmas):  # one table at a time
            for opened in keys:
                LayeredNoise(opened[layer : layer + 1]).add(left, (sigma,))
        return np.negative(left, out=left)

    def _noised(self, integers: npt.NDArray[np.int64], noise: Noise) -> npt.NDArray[np.int64]:
        if isinstance(noise, LayeredNoise):
            noise.add(integers, self.layers)
        else:
            for sigma in self.layers:
                noise.add_discrete_gaussian(integers, sigma)
        return integers


def mean_noise(values: int, z: float, silos: int, honest: int, summed: float) -> float:
    """‖noise‖₂/C of the mean, with all ``silos`` shares in it: z·√(n/h)·√d / ``summed``.

    ``summed``: number of unit contributions that the mean divides by.
    """
    return z * math.sqrt(silos / honest * values) / summed
