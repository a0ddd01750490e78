"""The sections of a study that say who takes part and what protects them."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from securefedcollm.aggregation.ckks.parameters import CkksSet
from securefedcollm.aggregation.header import MAX_COHORT, MIN_SILOS
from securefedcollm.study.kinds import Hex32, Name, Positive, Section, says


class Silos(Section, frozen=True):
    """Who takes part."""

    count: Annotated[
        Annotated[int, Meta(ge=MIN_SILOS, le=MAX_COHORT)],
        says("Number of silos. More than 128 need `aggregation.graph`."),
    ]
    minimum: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        says(
            "Fewest survivors with which a round's sum may be opened. Default: "
            "`aggregation.threshold`, or with `aggregation.graph` nine tenths of the silos if that "
            "is more. A server that lies can leave a few of them out of a sum on a graph, and "
            "noise is planned without those: `study check` says how many are left."
        ),
    ] = None
    colluders: Annotated[
        Annotated[int, Meta(ge=0)],
        says(
            "Number of silos that may work with the server without breaking any guarantee of this "
            "study."
        ),
    ] = 1


class Adaptive(Section, frozen=True):
    """A clip norm that follows the updates, for many silos (Andrew et al. 2021).

    Every round the silos also count, under the same noise, how many updates were not clipped, and
    the next round's clip norm C becomes C·exp(-``learning_rate``·(share not clipped -
    ``quantile``)).
    """

    quantile: Annotated[
        Annotated[float, Meta(gt=0, lt=1)],
        says("Fraction of the updates that should not be clipped."),
    ] = 0.5
    learning_rate: Annotated[Positive, says("How fast the clip norm follows.")] = 0.2
    count_noise: Annotated[
        Annotated[float, Meta(gt=1)],
        says(
            "Noise on the count, relative to the study's noise multiplier. At 10 the updates "
            "get half a percent more noise."
        ),
    ] = 10.0


class Privacy(Section, frozen=True):
    """The differential-privacy claim of the whole study, all rounds together.

    ``noise: local`` is DP-SGD inside each silo: (ε, δ) for one record, or subject, against
    everybody. ``noise: distributed`` with them is joint DP-SGD: every optimiser step is one secure
    sum of clipped gradients and noise shares. ``unit: silo`` with ``noise: distributed`` clips a
    silo's whole update and adds a share of discrete Gaussian noise to it. Distributed noise
    protects against the server and ``silos.colluders`` other silos. Neighbouring data sets differ
    by adding or removing one unit.
    """

    epsilon: Annotated[
        Positive, says("ε of the whole study, all rounds together: smaller is more private.")
    ]
    delta: Annotated[
        Annotated[float, Meta(gt=0, lt=1)],
        says("δ: roughly the probability that ε does not hold; below 1 / (number of records)."),
    ]
    unit: Annotated[
        Literal["record", "subject", "silo"],
        says(
            "What is protected: one `record`, all records of one `subject` (a patient, a client) "
            "in one silo, or a `silo`'s whole data set. With subjects `local.batch_size` counts "
            "subjects."
        ),
    ] = "record"
    subject: Annotated[
        Annotated[str, Meta(min_length=1)] | None,
        says("The column that names the subject of a record.", needed="`unit` is subject"),
    ] = None
    noise: Annotated[
        Literal["local", "distributed"],
        says(
            "Who adds the noise. `local`: each silo adds enough by itself; this protects "
            "against everybody. `distributed`: every silo adds a share; this protects against "
            "the server and `silos.colluders` other silos. Distributed noise for records or "
            "subjects is joint DP-SGD: one secure sum a step.",
            needed="`unit` is silo: distributed",
        ),
    ] = "local"
    clip_norm: Annotated[
        Positive,
        says(
            "L2 norm that bounds the contribution of one unit: per step, or per round for a "
            "silo (then it equals `aggregation.clip_norm`)."
        ),
    ] = 1.0
    adaptive: Annotated[
        Adaptive | None,
        says("Lets the clip norm of `unit: silo` follow the updates after the first round."),
    ] = None
    excess_noise: Annotated[
        Literal["keep", "remove"],
        says(
            "Distributed noise is enough for the fewest silos that a sum may have. If more take "
            "part there is too much of it. `remove`: silos open what the sum does not need, once a "
            "threshold of them has signed who is in it, and the server subtracts it. ε is then "
            "spent in full. Masking only."
        ),
    ] = "keep"


class Graph(Section, frozen=True):
    """Pairwise masks between neighbours only (Bell et al. 2020).

    Every silo draws its neighbours afresh in every attempt; nobody else chooses them.
    """

    neighbours: Annotated[
        Annotated[int, Meta(ge=3)] | None,
        says(
            "Silos that each silo draws, shares its secrets with and adds masks with. Default: the "
            "fewest that keep the bounds which `study check` prints."
        ),
    ] = None


class Aggregation(Section, frozen=True):
    """How the server learns the sum and nothing else."""

    clip_norm: Annotated[
        Positive,
        says(
            "L2 norm that bounds a silo's whole update. A larger update is scaled down, and "
            "its silo gets a warning. `study check --propose-clip` proposes a value. Joint "
            "DP-SGD sums gradients instead, which `privacy.clip_norm` bounds."
        ),
    ] = 1.0
    scheme: Annotated[
        Literal["masking", "ckks"],
        says(
            "`masking`: pairwise masks; silos may drop out at every step. `ckks`: homomorphic "
            "encryption. Under a threshold key every silo must stay until the sum is open, or "
            "the others repeat it."
        ),
    ] = "masking"
    ckks: Annotated[
        CkksSet,
        says(
            "`precise` gives exact sums at 20 bytes a value. `compact` takes 13 bytes, has an "
            "error that `study check` prints, and has much less flooding noise."
        ),
    ] = "precise"
    key_model: Annotated[
        Literal["threshold", "authority"],
        says(
            "Who holds the CKKS key. `threshold`: all silos make it and nobody holds it. "
            "`authority`: a participant with the role authority holds it and opens one sum a "
            "round, of `silos.minimum` silos or more; silos may drop out at every step. "
            "Together with the server it could open single updates."
        ),
    ] = "threshold"
    value_bits: Annotated[
        Annotated[int, Meta(ge=8)],
        says("Minimum precision of one coordinate within the clip norm, in bits."),
    ] = 16
    threshold: Annotated[
        Annotated[int, Meta(ge=2)] | None,
        says(
            "Silos that must take part in unmasking. Default: ⌊(count + colluders) / 2⌋ + 1, "
            "the smallest number for which a lying server cannot split the silos into two such "
            "groups."
        ),
    ] = None
    graph: Annotated[
        Graph | None,
        says(
            "Masks between neighbours in a random graph, for many silos. If left out, every silo "
            "shares with every other. Masking only."
        ),
    ] = None
    weights: Annotated[
        dict[Name, Positive] | None,
        says(
            "What each silo's update counts in the mean, such as its number of records: "
            "`{silo-1: 300, silo-2: 4000}`. Only the ratios matter. They are public: the server "
            "and all silos read and sign them. Left out, all count alike. Joint DP-SGD needs none: "
            "there every record counts alike."
        ),
    ] = None


class Participant(Section, frozen=True):
    """One line of the roster: an organisation."""

    name: Annotated[Name, says("The organisation's name.")]
    role: Annotated[Literal["server", "silo", "authority"], says("Its part in the study.")]
    key: Annotated[Hex32, says("Its Ed25519 public key (hex), from `securefedcollm identity`.")]


class Validation(Section, frozen=True):
    """A noised accuracy on the silos' own records, after every round.

    Every silo sets a part of its records aside for the whole study. They are never tuned on. After
    the server's phase of a round the silos answer them with the round's model, and one more secure
    sum opens two noised counts: right and wrong. What is set aside pays for these counts, what is
    tuned on pays for the updates, and each stays within the study's ε.
    """

    share: Annotated[
        Annotated[float, Meta(gt=0, le=0.5)],
        says(
            "Share of a silo's records, or subjects, that are set aside. Each is drawn by itself, "
            "with a secret of the silo."
        ),
    ] = 0.1
    noise_multiplier: Annotated[
        Positive | None,
        says(
            "Noise on each count, in records (or subjects). Default: the least with which what is "
            "set aside keeps the study's ε."
        ),
    ] = None
