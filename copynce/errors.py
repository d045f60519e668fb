"""The errors that a user can mend: their message is for the user, and the command line prints it without a traceback.

Each has an exit status of its own, so that a script can tell what happened.
"""

from __future__ import annotations

from typing import ClassVar


class UserError(Exception):
    """An input, a setting or a machine that is not what the work needs; the message names it and the way out."""

    exit_status: ClassVar[int] = 2


class DataError(UserError, ValueError):
    """A problem in the user's data; the message names the file, what was expected and what was found."""


class ConfigError(UserError, ValueError):
    """A setting that is unknown, missing or out of its range; the message names it."""


class RunError(UserError, ValueError):
    """A run folder that is not what the command needs; the message names it."""


class WriteError(UserError, OSError):
    """A file that cannot be written; the message names it and what the system said."""


class ExportError(UserError, RuntimeError):
    """A program that does not compute what its model does, or that cannot be made; the message names the file."""


class TrainingError(UserError, RuntimeError):
    """A run that cannot go on because a loss or gradient is no number; the message names the step."""

    exit_status: ClassVar[int] = 3


class Stopped(UserError):
    """A run that was asked to stop (Ctrl-C, SIGTERM, SIGHUP, SIGUSR1) and has saved; the same command continues it."""

    exit_status: ClassVar[int] = 75  # EX_TEMPFAIL of sysexits.h: schedulers requeue on it
