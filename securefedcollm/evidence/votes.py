"""Entries of an evidence log about questions to records."""

from __future__ import annotations

from typing import Annotated, Any

from msgspec import Meta

from securefedcollm.evidence.fields import Content, Count, Hex, Names, Signature, Slip, Who


class Polled(Content, frozen=True, tag="polled"):
    """Asker: a question to the silos' records is about to leave. ``poll``: what it signed, which
    has a random number and so confirms no guess of the question. ``header``: of the secure sum of
    the votes. ``values``: how many choices."""

    poll: Slip
    header: Hex
    values: Count


class Tallied(Content, frozen=True, tag="tallied"):
    """Asker: the opened sum of the votes, before it is used. ``agreements``: the survivors'
    signatures over ``lists``. ``sum`` = H(int64 little-endian)."""

    header: Hex
    delivery: Hex
    survivors: Names
    dropouts: Names
    lists: Hex
    agreements: Annotated[dict[Who, Signature], Meta(max_length=128)]
    sum: Hex


class Voting(Content, frozen=True, tag="voting", omit_defaults=True):
    """Silo: its masked votes on ``asker``'s question are about to leave, and are charged. The
    entry is the same whatever was retrieved, also if nothing was. ``events``: at worst. ``ledger``:
    the head of the ledger of answers, under the log's blind; ``prepaid``: of the silo's own ledger
    after the records had paid beforehand, likewise; older versions did not say it."""

    asker: Who
    poll: Slip
    header: Hex
    values: Count
    delivery: Hex
    events: list[dict[str, Any]]
    ledger: Hex
    prepaid: Hex | None = None


class Voted(Content, frozen=True, tag="voted"):
    """Silo: it agreed that exactly ``survivors`` are in the sum, and its shares for that are about
    to leave. ``events``: the charge with their noise."""

    header: Hex
    survivors: Names
    dropouts: Names
    lists: Hex
    events: list[dict[str, Any]]
    ledger: Hex
