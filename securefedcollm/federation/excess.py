"""Removing noise that a sum does not need: who signs what, and when a silo opens its layers.

Shares of noise are made for the fewest silos that a sum may have. Where more take part, each can
open a part of its share, and the server subtracts it (XNoise of "Dordis", EuroSys 2024, without
secret sharing: noise that nobody opens just stays).

Adversary: the server, which would have layers opened for a large sum while it also opens a smaller
one with the same shares in it. A silo signs the one list of survivors that it has opened in a
round, which is for good by the journal. It opens layers only against such statements of a threshold
of silos. Two lists with a threshold of statements each would need an honest silo that signed both
(2t > n + c). So no other sum of this round is ever opened, in any attempt, and in this one s - c
honest shares keep all the noise that is promised.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress

from securefedcollm.aggregation import Roster
from securefedcollm.aggregation.header import names_digest
from securefedcollm.errors import CryptoError, RemoteProtocolError
from securefedcollm.federation.messages import Surplus
from securefedcollm.primitives import SigningKey, verify
from securefedcollm.privacy.distributed import DistributedGaussian
from securefedcollm.privacy.joint import JointStep
from securefedcollm.privacy.silo_unit import SiloUnit

_CONTEXT = b"securefedcollm/v1/opened-sum"


def layered(unit: object) -> DistributedGaussian | None:
    """What noises a sum in layers; None if its noise stays whole."""
    if isinstance(unit, JointStep | SiloUnit) and unit.mechanism.silos:
        return unit.mechanism
    return None


def _signed(scope: bytes, sum_: int, survivors: Sequence[str]) -> bytes:
    """68 bytes. ``scope``: of the run, 32 bytes, which holds the study's digest."""
    return scope + sum_.to_bytes(4, "big") + names_digest(survivors)


def state_opened(key: SigningKey, scope: bytes, sum_: int, survivors: Sequence[str]) -> bytes:
    """This silo's statement that it opened this sum of these silos, 64 bytes.

    To be called only after the journal has this list for the round, for good.
    """
    return key.sign(_CONTEXT, _signed(scope, sum_, survivors))


def stated(
    statements: Mapping[str, bytes],
    roster: Roster,
    scope: bytes,
    sum_: int,
    survivors: Sequence[str],
) -> dict[str, bytes]:
    """Those of the ``statements`` (silo → :func:`state_opened`) that a survivor made of this very
    sum."""
    content, found = _signed(scope, sum_, survivors), {}
    for name in survivors:
        if name in statements:
            with suppress(CryptoError):
                verify(roster.key(roster.index(name)), _CONTEXT, content, statements[name])
                found[name] = statements[name]
    return found


def check_opened(
    asked: Surplus, roster: Roster, scope: bytes, survivors: Sequence[str], threshold: int
) -> None:
    """A threshold of the ``survivors`` of the sum that this silo opened state that they did, too.

    Raises:
        RemoteProtocolError: fewer do, or the server means another sum.
    """
    if tuple(asked.survivors) != tuple(survivors):
        raise RemoteProtocolError("asks for noise of another sum than was opened", peer="server")
    found = stated(asked.statements, roster, scope, asked.round, survivors)
    if len(found) < threshold:
        raise RemoteProtocolError(
            f"shows {len(found)} statements that this sum was opened; {threshold} are needed",
            peer="server",
            hint="the noise stays in this sum; if it happens again, report the server",
        )
