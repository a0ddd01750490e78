"""Records' votes on a question, summed over all silos with noise.

What one silo contributes is bounded in one of two ways (``docs/privacy.md``, "Answers of records",
has the proof):

* **Counted votes.** Each retrieved record has one vote for one choice. The silo sends
  min(votes, ``votes``) for every choice. One record more or less changes one count by 1 at most,
  and the minimum makes no difference larger: the sensitivity is one vote, the integer G.
* **A whole answer.** The silo sends one distribution over the choices, made with what was
  retrieved, or zero. One record may change all of it. Two points of the simplex lie √2 apart at
  most, so the sensitivity is ⌈√2·G⌉. In integers: 0 ≤ q and Σq² ≤ G², so ‖q − q′‖² ≤ 2·G².

Every silo adds a share of discrete Gaussian noise (:mod:`.distributed`). Only records that were
retrieved pay for the sum; :mod:`securefedcollm.federation.questions.voting` charges them.

Adversary: the asker, which chooses the question after it has seen the answers to earlier ones, and
``colluders`` silos.
"""

from __future__ import annotations

import math
import struct
from functools import lru_cache
from typing import Final, NamedTuple

import msgspec
import numpy as np
import numpy.typing as npt

from securefedcollm.errors import ConfigError
from securefedcollm.primitives import sha256
from securefedcollm.privacy.accounting import TIGHT_SHARE, calibrate_events
from securefedcollm.privacy.discrete_gaussian import TAIL
from securefedcollm.privacy.events import SMALLEST_SHARE, RoundedGaussian
from securefedcollm.privacy.noise import NoiseSource
from securefedcollm.privacy.quantise import Integers

MOST_CHOICES: Final = 64
_FINE: Final = 4096
"""Integers of a probability of 1 in a whole answer, where the field has room for so many."""


class VoteSetting(NamedTuple):
    """What fixes the mechanism, except its noise: the same at every participant."""

    field_bound: int
    """Largest absolute integer of one silo in the ring."""
    shares: int
    """Fewest silos with which a sum is opened."""
    colluders: int
    votes: int
    """The most votes of a silo that count for one choice; 1 for a whole answer."""
    whole: bool
    """Whether a silo sends one answer of its own, not the votes of records."""

    @property
    def honest(self) -> int:
        return self.shares - self.colluders


class Votes:
    """Protects one silo's votes on one question, and reads the sum of all.

    Args:
        noise_multiplier: z, noise of the sum over the sensitivity, against the asker and the
            colluders.
        choices: of the question.

    Raises:
        ConfigError: no honest share, or the field has no room for votes and noise; names the
            study's key.
    """

    __slots__ = ("_setting", "choices", "levels", "noise_multiplier", "sensitivity", "share_sigma")

    def __init__(self, setting: VoteSetting, noise_multiplier: float, choices: int) -> None:
        if setting.honest < 1:
            raise ConfigError(
                "no honest noise share is certain", where="silos.minimum", hint="raise it"
            )
        self._setting = setting
        self.choices = choices
        self.noise_multiplier = noise_multiplier
        per_share = noise_multiplier / math.sqrt(setting.honest)
        fine = 1
        if setting.whole:
            fine = min(_FINE, int(setting.field_bound / (2.0 + math.sqrt(2.0) * TAIL * per_share)))
        self.levels = max(fine, math.ceil(SMALLEST_SHARE / per_share))
        """G: integers of one vote."""
        self.sensitivity = math.isqrt(2 * self.levels**2) + 1 if setting.whole else self.levels
        self.share_sigma = per_share * self.sensitivity
        """σ of one silo's share, in integers."""
        largest = setting.votes * self.levels + math.floor(TAIL * self.share_sigma)
        if largest > setting.field_bound:
            raise ConfigError(
                f"the field has no room for {setting.votes} votes with this noise",
                where="aggregation.value_bits",
                hint="raise it, or lower retrieval.votes or retrieval.questions",
            )

    @property
    def identity(self) -> bytes:
        """32 bytes that two participants share exactly if they run the same mechanism."""
        return sha256(
            b"securefedcollm/votes/v1\0",
            struct.pack(">dQQQ", self.share_sigma, self.sensitivity, self.levels, self.choices),
            struct.pack(">Q?", self._setting.votes, self._setting.whole),
        )

    def exact(self, content: npt.NDArray[np.float64]) -> Integers:
        """A silo's integers before noise, int64 [choices].

        Args:
            content: votes for every choice; or the silo's distribution, or zeros. A value that is
                no number counts as 0.
        """
        if content.shape != (self.choices,):
            raise ValueError("one number for each choice was expected")
        most = float(self._setting.votes)
        known = np.clip(np.nan_to_num(content, nan=0.0, posinf=0.0, neginf=0.0), 0.0, most)
        if not self._setting.whole:
            return np.rint(known).astype(np.int64) * self.levels
        made = np.floor(known * self.levels).astype(np.int64)
        # Content of a norm above 1 is our own mistake; the integers have the last word.
        return made if int((made * made).sum()) <= self.levels**2 else np.zeros_like(made)

    def protect(self, content: npt.NDArray[np.float64], noise: NoiseSource) -> Integers:
        """This silo's noised integers, int64 [choices]; as :meth:`exact`, and its noise share."""
        made = self.exact(content) + noise.discrete_gaussian(self.share_sigma, self.choices)
        return made.astype(np.int64)

    def event(self, shares: int | None = None) -> RoundedGaussian:
        """What one question releases, with so many shares; by default with the fewest.

        Every question is charged as one with the most choices. Else questions with few of them
        would cost a little less than was prepaid for each, and a record could answer one more.
        """
        return RoundedGaussian(
            share_sigma=self.share_sigma,
            sensitivity=self.sensitivity,
            values=MOST_CHOICES,
            shares=self._setting.shares if shares is None else shares,
            colluders=self._setting.colluders,
        )

    def read(self, total: npt.NDArray[np.int64] | npt.NDArray[np.int32], survivors: int) -> Tally:
        """The votes in an opened sum of ``survivors`` silos."""
        votes = [int(value) / self.levels for value in total]
        return Tally(votes, self.share_sigma * math.sqrt(survivors) / self.levels, survivors)


class Tally(NamedTuple):
    """The votes of all silos, with noise."""

    votes: list[float]
    """For each choice; noise may make one negative."""
    sigma: float
    """Standard deviation of the noise on each, all silos' shares together."""
    survivors: int

    @property
    def choice(self) -> int:
        """The choice with most votes; of equal ones the first."""
        return int(np.argmax(self.votes))

    @property
    def doubt(self) -> float:
        """How often noise alone makes so large a lead of one choice over another that has as many.

        A one-sided p-value: Φ(−lead/(√2·σ)) for the lead over the second.
        """
        first, second, *_ = [*sorted(self.votes, reverse=True), 0.0]
        return mistaken(first - second, self.sigma)

    @property
    def distribution(self) -> npt.NDArray[np.float64]:
        """The votes as probabilities, [choices]: a softmax over the votes in units of their noise,
        so that noise alone gives nearly equal ones."""
        scaled = np.array(self.votes) / max(self.sigma, 1.0)
        raised = np.exp(scaled - scaled.max())
        shares: npt.NDArray[np.float64] = raised / raised.sum()
        return shares

    def mixed(self, prior: npt.ArrayLike, weight: float) -> npt.NDArray[np.float64]:
        """(1 - weight)·prior + weight·:attr:`distribution`, [choices].

        As a kNN language model mixes its own prediction with that of its neighbours (Khandelwal and
        others 2020, arXiv 1911.00172, equation 3). The asker does this with its own model, after
        the sum was opened, so it costs no privacy.

        Args:
            prior: a model's probabilities of the choices.
            weight: 0 to 1, chosen on other questions.
        """
        shares: npt.NDArray[np.float64] = (1.0 - weight) * np.asarray(prior)
        return shares + weight * self.distribution


def mistaken(lead: float, sigma: float) -> float:
    """Probability that noise of ``sigma`` on two counts reverses a lead of so many votes."""
    return 0.5 * math.erfc(lead / (2.0 * sigma)) if sigma else float(lead <= 0.0)


@lru_cache(maxsize=64)
def calibrate_votes(epsilon: float, delta: float, questions: int, setting: VoteSetting) -> float:
    """Smallest noise multiplier with which one record can answer ``questions`` within (ε, δ).

    Within the ledger's tight filter, as the noise of tuning. The same for every number of choices.

    Raises:
        ConfigError: no noise within this field reaches ε.
    """

    def at(z: float) -> tuple[RoundedGaussian, ...]:
        made = Votes(setting._replace(field_bound=2**61), z, MOST_CHOICES)
        return (msgspec.structs.replace(made.event(), count=questions),)

    return calibrate_events(at, epsilon, TIGHT_SHARE * delta)
