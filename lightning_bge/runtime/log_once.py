"""Messages that a process logs once, however often what they are about is read: the trials of a study read it anew."""

import logging
from functools import lru_cache


@lru_cache(maxsize=4096)
def log_once(logger: logging.Logger, level: int, message: str) -> None:
    """Log a message that this process has not logged yet.

    Args:
        logger: of the module whose message it is.
        level: such as `logging.WARNING`.
        message: the whole text.
    """
    logger.log(level, message)
