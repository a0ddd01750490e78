"""The one error tree.

::

    SecureFedCoLLMError
    ├── ConfigError            a study, a flag or a file that a person wrote needs mending
    │   └── DataError          a row of a data file does
    ├── ProtocolError          a message that does not fit the protocol
    │   ├── LocalProtocolError     our own side was driven wrongly: a bug here
    │   ├── RemoteProtocolError    a peer misbehaved; carries ``peer``
    │   └── QuorumError            too few silos are left to go on with
    ├── CryptoError            a signature, tag, key or commitment does not verify
    ├── BudgetExceeded         the release would spend more ε than is left; nothing was released
    ├── EvidenceError          a ledger, log or bundle is not what its owner wrote
    ├── TrainingError          training produced what must not be released (NaN, no change)
    ├── StateError             a file of a run cannot be read or written
    └── TransportError         an engine could not carry a frame

Every error carries a one-line ``hint`` that says what to do next. Messages hold names, sizes and
places, never values of private data or key material. Only the CLI turns an error into an exit code.

Adversary: whoever wrote the name, path or reason that a message quotes. Messages and hints are made
printable here (:mod:`securefedcollm.foreign`), whoever raises them.
"""

from __future__ import annotations

from securefedcollm.foreign import MOST_MESSAGE, printable


class SecureFedCoLLMError(Exception):
    """Base of every error this project raises on purpose.

    Args:
        message: what is wrong and where, in one line.
        hint: what the reader can do about it, in one line.

    Attributes:
        again: the same command may succeed later: others must come back, or the machine must have
            room again. Nothing that a person wrote is wrong.
    """

    again: bool = False

    def __init__(self, message: str, *, hint: str = "") -> None:
        self.message = printable(message, MOST_MESSAGE)
        self.hint = printable(hint, MOST_MESSAGE)
        super().__init__(self.message)
        if self.hint:
            self.add_note(self.hint)  # a traceback shows it below the message

    def __reduce__(self) -> tuple[object, ...]:
        # Errors cross process boundaries (the embedded engine's workers): keep the keyword state.
        return _rebuild, (type(self), self.__dict__, self.args)


def _rebuild(
    cls: type[SecureFedCoLLMError], state: dict[str, object], args: tuple[object, ...]
) -> SecureFedCoLLMError:
    error = cls.__new__(cls)
    error.args = args
    error.__dict__.update(state)
    return error


class ConfigError(SecureFedCoLLMError):
    """A study file, an option or a path that a person gave is wrong.

    Args:
        where: the key path (``privacy.epsilon``), option or file at fault.

    Attributes:
        problem: the message without ``where``.
    """

    def __init__(self, message: str, *, where: str = "", hint: str = "") -> None:
        super().__init__(f"{where}: {message}" if where else message, hint=hint)
        self.where = where
        self.problem = printable(message, MOST_MESSAGE)


class DataError(ConfigError):
    """A data file is missing, unreadable, or has a bad row (file, line, field)."""


class ProtocolError(SecureFedCoLLMError):
    """A message does not fit the protocol."""


class LocalProtocolError(ProtocolError):
    """This side was driven out of order or with impossible arguments: a bug in the caller."""


class RemoteProtocolError(ProtocolError):
    """A peer sent something that the protocol forbids.

    Args:
        peer: the name of the silo, or ``"server"``.
    """

    def __init__(self, message: str, *, peer: str, hint: str = "") -> None:
        super().__init__(f"{peer}: {message}", hint=hint)
        self.peer = peer


class QuorumError(ProtocolError):
    """Too few silos are left. Nothing was opened; the run can be continued when they are back."""

    again = True


class CryptoError(SecureFedCoLLMError):
    """A signature, authentication tag, public key or commitment does not verify."""


class BudgetExceeded(SecureFedCoLLMError):  # noqa: N818 - the established name for this refusal
    """A release would exceed the privacy budget. Nothing was released."""


class EvidenceError(SecureFedCoLLMError):
    """A ledger, log, checkpoint or bundle does not verify."""


class TrainingError(SecureFedCoLLMError):
    """Training produced something that must not leave the silo, or did nothing at all."""


class StateError(SecureFedCoLLMError):
    """A file of a run cannot be read or written."""


class TransportError(SecureFedCoLLMError):
    """An engine could not carry a frame to or from a peer."""

    again = True
