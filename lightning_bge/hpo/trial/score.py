"""What the score of a fold is."""

from __future__ import annotations

from typing import Literal, Protocol


class Monitor(Protocol):
    """The metric of a study, and which epoch's value is the score of a fold."""

    @property
    def name(self) -> str:
        """The metric's name in files and messages."""

    @property
    def logged(self) -> str:
        """The name under which a module logs it in validation."""

    @property
    def direction(self) -> Literal["maximize", "minimize"]:
        """As Optuna names them."""

    @property
    def objective(self) -> Literal["best", "last"]:
        """The score of a fold is the value of its best or of its last epoch."""

    @property
    def patience(self) -> int | None:
        """Stop after so many epochs without a better value; None: never stop early."""

    @property
    def min_delta(self) -> float:
        """A value counts as better for `patience` where it is better by more than this."""
