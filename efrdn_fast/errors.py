"""The errors of our own; everything else is a built-in ValueError, TypeError or OSError."""

__all__ = ["BackendUnavailable", "BuildError", "UsageError"]


class BackendUnavailable(RuntimeError):
    """A backend that was asked for by name cannot run here; the message says why."""


class BuildError(RuntimeError):
    """The JIT build of `csrc/` failed; the message names what is missing and what to do."""


class UsageError(ValueError):
    """Arguments that are wrong whatever the inputs hold: `efrdn` ends with status 2."""
