"""Errors that a user can fix. The command line prints their text without a traceback and exits with status 2."""

INTERRUPTED = 130  # a shell's exit status after Ctrl-C
PIPE_CLOSED = 141  # and after SIGPIPE: nobody reads standard output any more


def first_line(error: object) -> str:
    """What an error says in its first line; the name of its class where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


class UserError(Exception):
    """Its message says what was expected, what was given, and how to fix it."""


class ConfigError(UserError):
    """A setting is wrong, unknown, or does not go with another."""


class DataError(UserError):
    """A file, a column, a label or a split is not as the settings say."""


class StudyError(UserError):
    """A run folder holds something else than the command asks for."""


class LocationError(UserError):
    """A location of files, such as a bucket, can't be reached, or does not allow what is needed."""
