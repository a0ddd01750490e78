"""The authority's side: the party that holds the decryption key of a study, and opens its sums.

Adversary: the server, which chooses every frame that arrives here, together with up to c silos. The
authority believes only its own study, roster and keys. It never sees a vector: nobody sends it the
first polynomial of a ciphertext, and it gives the server a partial decryption, not the sum.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from typing import ClassVar, Final

from securefedcollm.aggregation import AuthoritySide, Roster, RoundHeader, authority_side
from securefedcollm.errors import ConfigError, RemoteProtocolError, SecureFedCoLLMError
from securefedcollm.federation.messages import (
    Aggregate,
    Aggregated,
    Ended,
    EndRun,
    MakeKey,
    Ready,
    Refused,
    Reply,
    decode_request,
    encode,
)
from securefedcollm.federation.plan import (
    AUTHORITY,
    authority_of,
    round_header,
    sum_name,
)
from securefedcollm.federation.records import AuthorityRecord
from securefedcollm.federation.silostore import OneRun, SiloStore
from securefedcollm.primitives import SigningKey
from securefedcollm.study import Study

log = logging.getLogger(__name__)

SERVER = "server"

KEY_LIFETIME: Final = 3600.0
"""Seconds from when keys are made until they are dropped, opened or not. Silos have trained by
then; two exchanges with them, of ten minutes at most, and the opening are left."""


class AuthoritySession:
    """The authority in one study. Implements :class:`securefedcollm.federation.engines.SiloPort`.

    Args:
        roster: the silos; that of the study, if the study has one.
        key: the authority's identity; the one that the study names, if it names one.
        store: its durable journal.
        now: seconds, of a clock that is never set back.

    Raises:
        ConfigError: roster or identity are not those of the study, or it needs no authority.
    """

    pace: ClassVar[None] = None
    """It has no records whose work takes time."""

    def __init__(
        self,
        *,
        study: Study,
        roster: Roster,
        key: SigningKey,
        store: SiloStore,
        evidence: AuthorityRecord,
        now: Callable[[], float] = time.monotonic,
    ) -> None:
        named = authority_of(study, key.public)
        if named is None:
            raise ConfigError(
                "no party holds a decryption key in this study",
                where="aggregation.key_model",
                hint="only a study with key_model: authority needs this role",
            )
        if named.key != key.public:
            raise ConfigError(
                f"the study's authority is {named.name}, with another key than this identity's",
                where="roster",
                hint="run with the identity that signed the study",
            )
        listed = study.silo_keys
        if listed and Roster(listed).root != roster.root:
            raise ConfigError(
                "the silos of this run are not those of the signed study",
                where="roster",
                hint="build the roster from the study",
            )
        self._study = study
        self._roster = roster
        self._key = key
        self._store = store
        self._run = OneRun(store, study)
        self._evidence = evidence
        self._side: AuthoritySide | None = None
        self._header: RoundHeader | None = None
        self._now = now
        self._expire: float | None = None

    @property
    def over(self) -> bool:
        """Whether the server has ended the run."""
        return self._run.over

    def step(self, frame: bytes) -> bytes:
        """Answer one request. Never raises for what the server sent."""
        self.drop_overdue()
        reply: Reply
        try:
            match decode_request(frame):
                case MakeKey() as request:
                    reply = self._begin(request)
                case Aggregate(frame=inner):
                    reply = Aggregated(memoryview(self._aggregate(inner)))
                case EndRun() as end:
                    reply = self._end(end)
                case _:
                    raise RemoteProtocolError("asked the authority for a silo's part", peer=SERVER)
        except SecureFedCoLLMError as error:
            log.warning("%s: %s", AUTHORITY, error)
            self._evidence.refused(error)
            self._drop()
            # Adversary: a server that learns from refusals. What follows from its own frame it may
            # read; paths and failures of this machine stay here.
            if isinstance(error, RemoteProtocolError):
                reply = Refused(type(error).__name__, error.message, error.hint)
            else:
                reply = Refused("Refused", "the authority cannot take part", "its log says why")
        return encode(reply)

    def drop_overdue(self) -> None:
        """Drop keys that are older than :data:`KEY_LIFETIME`. Call it every now and then.

        Adversary: a server that never ends an attempt, and some day gets hold of this process.
        """
        if self._expire is not None and self._now() >= self._expire:
            if self._side is not None:
                log.warning("%s: dropped keys that were not asked for in time", AUTHORITY)
            self._drop()

    def _drop(self) -> None:
        if self._side is not None:
            self._side.close()
        self._side = self._expire = None

    def _begin(self, request: MakeKey) -> Ready:
        """A fresh attempt; the key of the one before is gone."""
        self._drop()
        study, name = self._study, sum_name(self._study, request.round)
        if (len(request.run_id), len(request.model)) != (16, 32):
            raise RemoteProtocolError("a malformed request for a key", peer=SERVER)
        if not 0 <= request.round < study.sums:
            raise RemoteProtocolError(
                f"asked for {name} of a study of {study.rounds} rounds", peer=SERVER
            )
        self._evidence.check_journal(self._store, study.scheme)
        self._run.enter(request.run_id, request.round, *self._evidence.marks)
        header = round_header(
            study,
            roster=self._roster,
            run_id=request.run_id,
            round_=request.round,
            attempt=request.attempt,
            model=request.model,
            values=request.values,
        )
        self._evidence.attempt(header)
        self._side = authority_side(
            header=header, roster=self._roster, signing_key=self._key, journal=self._store
        )
        self._header = header
        return Ready()

    def _aggregate(self, frame: bytes) -> bytes:
        if self._side is None or self._header is None:
            raise RemoteProtocolError(
                "asked to decrypt before an attempt began, or after its keys were dropped",
                peer=SERVER,
                hint="start a new attempt",
            )
        if self._expire is None:  # the first frame makes the keys
            self._expire = self._now() + KEY_LIFETIME
        scheme = self._study.scheme
        self._evidence.check_journal(self._store, scheme)
        reply = self._side.handle(frame)
        self._evidence.said(self._header, self._side)  # durable before the reply leaves
        self._evidence.check_journal(self._store, scheme)  # put back meanwhile: no answer
        return reply

    def _end(self, end: EndRun) -> Ended:
        """No further attempt at this run, durably."""
        self._drop()
        self._run.end(end.run_id)
        return Ended()
