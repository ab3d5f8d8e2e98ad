"""From an exception to the message that the user sees."""

import errno

from lightning_bge.errors import UserError


def explain(error: Exception) -> str | None:
    """What the user can do about an error; None for a defect of the program, whose traceback is needed."""
    if isinstance(error, UserError):
        return str(error)
    if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
        return f"no space left on the disk ({error}). Finished work is kept: free some space and run this command again"
    if isinstance(error, OSError) and error.errno in (errno.EROFS, errno.EACCES, errno.EPERM) and error.filename:
        what = "written" if error.errno == errno.EROFS else "opened"
        return f"{error.filename} can't be {what} ({error.strerror}). Finished work is kept: correct it and start again"
    if isinstance(error, FileExistsError | NotADirectoryError | IsADirectoryError) and error.filename:
        return f"{error.filename} can't be used ({error.strerror}). Name another path, or move what is there"
    of_lightning = any(kind.__name__ == "MisconfigurationException" for kind in type(error).__mro__)
    if of_lightning or str(error).startswith("Early stopping conditioned on metric"):
        return describe_trainer_error(error)
    # torch is imported only here: a command that can run out of memory has imported it already
    from lightning_bge.models.memory_saving.oom_retry import REMEDIES
    from lightning_bge.runtime.oom import find_oom

    failed = find_oom(error)
    return None if failed is None else f"{failed}. Finished work is kept. To fix it, {REMEDIES}"


def describe_trainer_error(error: Exception) -> str:
    """One line on an error with which Lightning refuses arguments of its trainer or of a callback."""
    text = " ".join(str(error).split()).rstrip(".!")
    return f"trainer: {text}. Correct or leave out the option under `trainer` that it is about"
