"""Values that both sides derive from the study, each on its own, and never from each other."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence

import msgspec

from securefedcollm.aggregation import (
    AUTHORITY_SUITES,
    CKKS_SUITES,
    SUITE,
    Authority,
    RingParameters,
    Roster,
    RoundHeader,
)
from securefedcollm.errors import ConfigError
from securefedcollm.primitives import sha256
from securefedcollm.privacy.adaptive_clip import AdaptiveClip
from securefedcollm.privacy.counting import Counting, CountSetting, calibrate_counting
from securefedcollm.privacy.events import EARLIER_KIND, SUM_KIND, SumKind
from securefedcollm.privacy.joint import JointSetting, JointStep, calibrate_joint
from securefedcollm.privacy.quantise import Quantiser
from securefedcollm.privacy.silo_unit import Setting, SiloUnit, calibrate_silo
from securefedcollm.study import Study, digest
from securefedcollm.study.config import Name

AUTHORITY = "authority"
"""The key holder's name in a simulation, and that of its evidence log in every study."""


def silo_names(study: Study) -> list[str]:
    """The silos' names: the roster's, or ``silo-1`` … for a simulation."""
    listed = sorted(p.name for p in study.roster if p.role == "silo")
    width = len(str(study.silos.count))
    return listed or [f"silo-{i + 1:0{width}d}" for i in range(study.silos.count)]


def check_names(study: Study, names: Sequence[str], where: str) -> None:
    """Refuse names that are not those of the study's silos.

    Args:
        where: the source of the names.

    Raises:
        ConfigError: with the fix.
    """
    listed = [p.name for p in study.roster if p.role == "silo"]
    what = hint = ""
    if len({*names}) < len(names):
        what, hint = "a silo is named twice", "name each once"
    elif len(names) != study.silos.count:
        what = f"{len(names)} silos are named, the study has {study.silos.count}"
        hint = f"name all, or set silos.count to {len(names)}"
    elif listed and {*listed} != {*names}:
        what, hint = "not the silos of the roster", f"they are {', '.join(sorted(listed))}"
    elif bad := next((name for name in names if not _is_name(name)), None):
        what, hint = f"{bad!r} is no name for a silo", "a to z, 0 to 9, . _ and -; not server"
    elif unknown := {*(study.aggregation.weights or names)} ^ {*names}:
        what = f"aggregation.weights are not of these silos: {', '.join(sorted(unknown))}"
        hint = "name the silos of the study there"
    if what:
        raise ConfigError(what, where=where, hint=hint)


def _is_name(name: str) -> bool:
    try:
        msgspec.convert(name, Name)
    except msgspec.ValidationError:
        return False
    return name not in {"server", AUTHORITY}


def authority_of(study: Study, key: bytes = b"") -> Authority | None:
    """The key holder, if there is one.

    Args:
        key: its Ed25519 public key where the study names no participants, as in a simulation.

    Raises:
        ConfigError: the study needs an authority and nothing says who it is.
    """
    if study.scheme != "ckks-authority":
        return None
    for participant in study.roster:
        if participant.role == "authority":
            return Authority(participant.name, bytes.fromhex(participant.key))
    if not key:
        raise ConfigError(
            "nobody is named as the authority that holds the key",
            where="roster",
            hint="list it with the role authority",
        )
    return Authority(AUTHORITY, key)


def run_key(study: Study) -> bytes:
    """The key under which a participant's journal pins its one run of a study."""
    return b"run:" + digest(study)


def run_scope(study: Study, run_id: bytes) -> bytes:
    """Names a run of a study in a participant's own state, 32 bytes."""
    return sha256(b"securefedcollm/run/v1\0", digest(study), run_id)


def round_of(study: Study, sum_: int) -> int:
    """The round that the secure sum number ``sum_`` of the run belongs to, both from 0."""
    return sum_ // (study.sums // study.rounds)


def ends_round(study: Study, sum_: int) -> bool:
    """Whether this sum ends the round. The server's phase follows it, or, where a validation is the
    round's last sum, the next round."""
    return round_of(study, sum_ + 1) > round_of(study, sum_)


def validates(study: Study, sum_: int) -> bool:
    """Whether this sum counts held-out records' answers, and is not one of tuning."""
    return study.validation is not None and ends_round(study, sum_)


def sums_to_an_end(study: Study) -> int:
    """The run may end after this many secure sums, or any multiple: all, or, with patience, those
    of a round. Silos then state what they have spent, in :func:`stating_sums` of them."""
    each = study.sums // study.rounds
    return each if study.keep and study.keep.patience else study.sums


def stated(study: Study) -> dict[str, int]:
    """:func:`sums_to_an_end` and :func:`stating_sums`, for a ledger that writes evidence."""
    return {"sums": sums_to_an_end(study), "stating": stating_sums(study)}


def stating_sums(study: Study) -> int:
    """How many sums before a possible end state what was spent: the last one of tuning, and the
    validation where there is one. They charge different records."""
    return 1 if study.validation is None else 2


def sum_name(study: Study, sum_: int) -> str:
    """The operator's name of the sum: ``round 2``, or ``round 2, step 7`` in joint DP-SGD, or
    ``round 2, validation``."""
    round_ = round_of(study, sum_)
    if validates(study, sum_):
        return f"round {round_ + 1}, validation"
    step = f", step {sum_ - round_ * (study.sums // study.rounds) + 1}" if study.joint else ""
    return f"round {round_ + 1}{step}"


def round_header(
    study: Study,
    *,
    roster: Roster,
    run_id: bytes,
    round_: int,
    attempt: int,
    model: bytes,
    values: int,
) -> RoundHeader:
    """The header that every message of this aggregation is bound to."""
    field = study.field
    return RoundHeader(
        study_digest=digest(study),
        run_id=run_id,
        round=round_,
        attempt=attempt,
        model_digest=model,
        parameters=RingParameters(
            values=values,
            bound=field.bound,
            field_bits=field.bits,
            silos=study.silos.count,
            min_silos=study.minimum,
            threshold=study.threshold,
            colluders=study.silos.colluders,
        ),
        roster_root=roster.root,
        suite=_suite(study),
    )


def _suite(study: Study) -> str:
    """What the header names the algorithms by, and their parameter set."""
    if study.graph is not None:
        return study.graph.suite
    if study.masked:
        return SUITE
    suites = AUTHORITY_SUITES if study.scheme == "ckks-authority" else CKKS_SUITES
    return suites[study.aggregation.ckks]


def quantiser(study: Study, values: int) -> Quantiser:
    """Float update [values] → integers within the study's field, and back."""
    return Quantiser(values=values, clip_norm=study.aggregation.clip_norm, bound=study.field.bound)


def weight_of(study: Study, silo: str) -> float:
    """What this silo's update is multiplied by, in (0, 1]: its weight, by the largest one's.

    All are public. A factor of at most 1 keeps the update within its clip norm, so that nothing
    about sensitivity changes.
    """
    weights = study.aggregation.weights
    return 1.0 if weights is None else weights[silo] / max(weights.values())


def weight_of_all(study: Study, survivors: Iterable[str]) -> float:
    """What the sum of the survivors' updates is divided by for their mean."""
    return math.fsum(weight_of(study, silo) for silo in survivors)


def adaptive_clip(study: Study) -> AdaptiveClip | None:
    """The clip norm before the first round, if it is one that adapts."""
    privacy = study.privacy
    if privacy is None or privacy.adaptive is None:
        return None
    start = privacy.clip_norm
    return AdaptiveClip(
        clip_norm=start,
        quantile=privacy.adaptive.quantile,
        learning_rate=privacy.adaptive.learning_rate,
        smallest=start * 1e-6,
        largest=start * 1e6,
    )


def silo_unit(
    study: Study,
    update_size: Callable[[int], int],
    round_: int,
    clip_norm: float | None = None,
    kind: SumKind = SUM_KIND,
) -> SiloUnit | None:
    """The mechanism of ``round_`` in a study whose privacy unit is the silo.

    Args:
        update_size: length of the update of a round; they alternate between two at most, and one
            noise multiplier serves all rounds.
        clip_norm: of this round, where it adapts; else the study's.
        kind: as what the run charges its sums.

    Returns:
        None for a study of another unit, whose updates :func:`quantiser` takes as they are.

    Raises:
        ConfigError: the study's field has no room for the noise.
    """
    privacy = study.privacy
    if privacy is None or privacy.unit != "silo":
        return None
    largest = max(update_size(r) for r in range(min(2, study.rounds)))
    counting = privacy.adaptive is not None
    size = largest + counting
    setting = Setting(
        *(
            size,
            study.field.bound,
            study.noise_shares(),
            study.silos.colluders,
            kind,
            _layered(study),
        )
    )
    noise = calibrate_silo(privacy.epsilon, privacy.delta, study.rounds, setting)
    return SiloUnit(
        setting._replace(values=update_size(round_)),
        noise,
        clip_norm or privacy.clip_norm,
        privacy.adaptive.count_noise if privacy.adaptive else None,
    )


def joint_step(study: Study, values: int, kind: SumKind = SUM_KIND) -> JointStep | None:
    """The mechanism of every step in joint DP-SGD, for gradients of ``values``; else None.

    Args:
        kind: as what the run charges its sums.

    Raises:
        ConfigError: the study's field has no room for the gradients and the noise.
    """
    privacy, setting = study.privacy, joint_setting(study, values, kind)
    if privacy is None or setting is None:
        return None
    noise = calibrate_joint(
        privacy.epsilon, privacy.delta, study.rounds * study.tuning_sums, setting
    )
    return JointStep(setting, noise, privacy.clip_norm)


def counting(study: Study, kind: SumKind = SUM_KIND) -> Counting:
    """The mechanism of every validation of a study that has them.

    Args:
        kind: as what the run charges its sums.

    Raises:
        ConfigError: the field has no room for the noise, or the noise that the study gives does not
            keep its ε.
    """
    privacy, setting = study.privacy, _count_setting(study, kind)
    assert study.validation is not None
    if privacy is None:
        return Counting(setting, None)
    least = calibrate_counting(privacy.epsilon, privacy.delta, study.rounds, setting)
    given = study.validation.noise_multiplier
    if given is not None and given < least:
        raise ConfigError(
            f"noise of {given:g} records on {study.rounds} rounds' counts costs more than the "
            f"study's ε = {privacy.epsilon:g}",
            where="validation.noise_multiplier",
            hint=f"at least {least:g}; leave it out for that",
        )
    return Counting(setting, given or least)


def _count_setting(study: Study, kind: SumKind) -> CountSetting:
    distributed = study.privacy is not None and study.privacy.noise == "distributed"
    return CountSetting(
        field_bound=study.field.bound,
        shares=study.noise_shares() if distributed else 1,
        colluders=study.silos.colluders if distributed else 0,
        kind=kind,
    )


def counting_named(study: Study, mechanism: str | None) -> Counting:
    """:func:`counting` of the kind whose mechanism a sum's header names, hex; else today's."""
    today = counting(study)
    if mechanism in {None, today.identity.hex()}:
        return today
    try:
        earlier = counting(study, EARLIER_KIND)
    except ConfigError:  # the study's own noise is enough for today's kind alone
        return today
    return earlier if earlier.identity.hex() == mechanism else today


def joint_setting(study: Study, values: int, kind: SumKind = SUM_KIND) -> JointSetting | None:
    """The study's setting of joint DP-SGD for gradients of ``values``; None in other studies."""
    local = study.local
    if not study.joint or local.sampling_rate is None:
        return None
    return JointSetting(
        values=values,
        field_bound=study.field.bound,
        least_survivors=study.noise_shares(),
        colluders=study.silos.colluders,
        sampling_rate=local.sampling_rate,
        batch_size=local.batch_size,
        kind=kind,
        silos=_layered(study),
    )


def _layered(study: Study) -> int:
    """Silos on the roster, if noise that a sum does not need is removed from it; else 0."""
    privacy = study.privacy
    return study.silos.count if privacy and privacy.excess_noise == "remove" else 0


def noises_sums(study: Study) -> bool:
    """Whether a run of the study adds noise to a secure sum, so that :data:`SumKind` matters."""
    privacy = study.privacy
    distributed = privacy is not None and privacy.noise == "distributed"
    return distributed or (privacy is not None and study.validation is not None)
