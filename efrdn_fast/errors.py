"""The two errors of our own; everything else is a built-in ValueError, TypeError or OSError."""

__all__ = ["BackendUnavailable", "BuildError"]


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class BuildError(RuntimeError):
    """The JIT build of `csrc/` failed; the message names what is missing and what to do."""
