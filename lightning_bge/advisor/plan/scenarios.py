"""What a change of the study would do to its hours, and which changes meet a deadline."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Literal

from lightning_bge.advisor.plan.calibrate import Calibration
from lightning_bge.advisor.plan.cost_model import HOUR
from lightning_bge.advisor.plan.predict import Priced, Study, predict
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.pruning.config import PrunerConfig, check_pruner

WHAT_IF_RUNS = 20
MOST_WORKERS = 64


@dataclass(frozen=True)
class WhatIf:
    """A change, and what the study then takes.

    Attributes:
        change: in words.
        setting: the flags that make it.
        low: hours, as in `Prediction`.
        mid: likewise.
        high: likewise.
    """

    change: str
    setting: str
    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Changes:
    """What other studies than the planned one would take.

    Attributes:
        study: what is planned.
        priced: what its points take.
        calibration: what was measured.
        part: of the rows that a single split validates on.
        cost: whether the search has a cost as well, beside which nothing can prune.
    """

    study: Study
    priced: Priced
    calibration: Calibration
    part: float
    cost: bool = False

    def usual(self) -> list[WhatIf]:
        """Those that are shown in any plan."""
        found = [self.pruner("none")] if self.study.pruner.name != "none" else [self.pruner("asha")]
        if self.study.steps.folds > 1:
            found.append(self.single_split())
        found.append(self.workers(2 * self.study.workers))
        if self.study.trials > 1:
            found.append(self.trials(self.study.trials // 2))
        return [one for one in found if one is not None]

    def meeting(self, deadline: float) -> list[WhatIf]:
        """Changes with which even the upper end of the range is in time; what costs the least quality first."""
        found: list[WhatIf | None] = [self._smallest(self.workers, self.study.workers + 1, MOST_WORKERS, deadline)]
        if self.study.pruner.name != "asha":
            found.append(self.pruner("asha"))
        found.append(self._largest(self.trials, 1, self.study.trials - 1, deadline))
        if self.study.steps.folds > 1:
            found.append(self.single_split())
        meet = [one for one in found if one is not None and one.high <= deadline]
        if not meet and self.study.steps.folds > 1:  # two at once
            split, flags = self._split()
            both = split._largest(split.trials, 1, self.study.trials - 1, deadline)
            if both is not None:
                change, setting = f"a single split and {both.change}", f"{flags} {both.setting}"
                meet = [replace(both, change=change, setting=setting)]
        return meet

    def pruner(self, name: Literal["asha", "none"]) -> WhatIf | None:
        """Another pruner; None: it could not prune, or not beside a cost."""
        config = PrunerConfig(name)
        if self.cost and name != "none":
            return None
        try:
            check_pruner(config, self.study.trials, self.study.steps)
        except ConfigError:
            return None
        text = "without pruning" if name == "none" else "with the pruner asha"
        return self._what_if(text, _switch(self.study.pruner, name), replace(self.study, pruner=config, survival=None))

    def single_split(self) -> WhatIf:
        """One split in place of folds: each trial is judged on fewer rows, and by luck more often."""
        split, flags = self._split()
        return split._what_if("a single split", flags, split.study)

    def _split(self) -> tuple[Changes, str]:
        """The changes of a study with a single split, without pruning where the pruner can't act on one; its flags."""
        folds, flags = self.study.steps.folds, "--data.split.folds 1"
        study = replace(self.study, steps=replace(self.study.steps, folds=1))
        try:
            check_pruner(study.pruner, study.trials, study.steps)
        except ConfigError:
            study, flags = replace(study, pruner=PrunerConfig("none")), f"{flags} {_switch(self.study.pruner, 'none')}"
        priced = self.priced.scaled((1 - self.part) * folds / (folds - 1), self.part * folds)
        return replace(self, study=study, priced=priced), flags

    def workers(self, count: int) -> WhatIf:
        """More processes, each on a device of its own."""
        return self._what_if(f"{count} workers", f"the command {count} times", replace(self.study, workers=count))

    def trials(self, count: int) -> WhatIf | None:
        """Fewer trials; None: the pruner could not prune then."""
        study = replace(self.study, trials=count)
        try:
            check_pruner(study.pruner, count, study.steps)
        except ConfigError:
            return None
        return self._what_if(f"{count:,} trials", f"--hpo.n_trials {count}", study)

    def _what_if(self, change: str, setting: str, study: Study) -> WhatIf:
        found = predict(study, self.priced, self.calibration, WHAT_IF_RUNS)
        return WhatIf(change, setting, found.low / HOUR, found.mid / HOUR, found.high / HOUR)

    def _smallest(self, make: Callable[[int], WhatIf | None], low: int, high: int, deadline: float) -> WhatIf | None:
        """The first of these numbers that is in time; None: none is."""
        found = None
        while low <= high:
            middle = (low + high) // 2
            one = make(middle)
            if one is not None and one.high <= deadline:
                found, high = one, middle - 1
            else:
                low = middle + 1
        return found

    def _largest(self, make: Callable[[int], WhatIf | None], low: int, high: int, deadline: float) -> WhatIf | None:
        """The last of these numbers that is in time; None: none is."""
        return self._smallest(lambda number: make(low + high - number), low, high, deadline)


def _switch(now: PrunerConfig, name: str) -> str:
    """The flags of a pruner as it is by default: with its name alone, options of the one now would stay."""
    flags = [f"--hpo.pruner.name {name}"]
    for option in fields(now):
        if option.name != "name" and getattr(now, option.name) != option.default:
            flags.append(f"--hpo.pruner.{option.name} {'null' if option.default is None else option.default}")
    return " ".join(flags)
