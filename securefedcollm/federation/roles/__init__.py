"""The roles of a real run: server, silos and authority, each in a process and home of its own.

A participant's *home* holds what outlives a run::

    identity.json                its signing key
    kit/, lead/, request/        its start-up kit (:mod:`.engines.flare.kit`)
    flare.log                    output of FLARE's processes
    ledger.sqlite, ledger.key    a silo's privacy ledger, of all its studies, and its key
    studies/STUDY-DIGEST/        one directory per study, as ``audit bundle`` expects it

The process may be killed at any moment and started again with the same command.
"""

from securefedcollm.federation.roles.answering import AnswerTerms, RecordBooth, poll_from
from securefedcollm.federation.roles.asking import (
    ShelfTerms,
    ask_from,
    largest_call,
    open_shelf,
    question_port,
    question_relay,
)
from securefedcollm.federation.roles.authority import authority_session
from securefedcollm.federation.roles.frames import (
    LARGEST_TO_AUTHORITY,
    largest_frame,
    largest_reply,
)
from securefedcollm.federation.roles.member import (
    IDENTITY,
    LEDGER,
    Member,
    inbox_for,
    run_in,
    session_of,
    sign_for,
    take_part,
)
from securefedcollm.federation.roles.server import coordinate, not_told, server_questions
from securefedcollm.federation.roles.silo import (
    ADAPTER,
    PROOF,
    newest_adapter,
    require_begun_data,
    silo_session,
    silo_workload,
    trained_on,
    workload_of,
)

__all__ = [
    "ADAPTER",
    "IDENTITY",
    "LARGEST_TO_AUTHORITY",
    "LEDGER",
    "PROOF",
    "AnswerTerms",
    "Member",
    "RecordBooth",
    "ShelfTerms",
    "ask_from",
    "authority_session",
    "coordinate",
    "inbox_for",
    "largest_call",
    "largest_frame",
    "largest_reply",
    "newest_adapter",
    "not_told",
    "open_shelf",
    "poll_from",
    "question_port",
    "question_relay",
    "require_begun_data",
    "run_in",
    "server_questions",
    "session_of",
    "sign_for",
    "silo_session",
    "silo_workload",
    "take_part",
    "trained_on",
    "workload_of",
]
