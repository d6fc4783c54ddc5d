"""Errors of a worker group. Each message says what was wrong and what would be right."""


class WorkerError(Exception):
    """Root of everything this folder raises on purpose."""


class ModelUnsupported(WorkerError):
    """The model folder holds an architecture or option that isn't served."""


class ModelFilesInvalid(WorkerError):
    """A file of the model folder is missing or doesn't fit the others."""


class AdapterTooLarge(WorkerError):
    """An adapter can't be loaded even when nothing else is in the pool: its bytes or its rank."""


class PoolFull(WorkerError):
    """The pool has no room now; something resident must be evicted first."""


class DeadlinePassed(WorkerError):
    """A request was not begun in the time that it gave."""

    def __init__(self, timeout_s: float | None):
        super().__init__(
            f"the request was not begun within its queue_timeout of {timeout_s or 0:g} s; "
            "try again later, or allow more time"
        )


class GrammarInvalid(WorkerError):
    """A grammar can't be compiled, or is larger than is allowed."""


class WireError(WorkerError):
    """A peer sent what the wire protocol doesn't allow; the connection is closed."""


class WireAuthError(WireError):
    """A peer doesn't hold the secret of this link."""


class GroupFailed(WorkerError):
    """A rank of the group ended or reported a failure; the group can't serve any more."""
