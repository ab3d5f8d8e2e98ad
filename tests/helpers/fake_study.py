"""A study whose trials do no training, for processes that share it.

    python -m tests.helpers.fake_study RUN '{"sampler": {"name": "tpe"}, ...}'

prints `ready`, waits for a line, and runs the study: so several processes start at the same moment.
"""

from __future__ import annotations

import json
import math
import random
import sys
import time
from pathlib import Path
from typing import Any

import optuna
from optuna.trial import FrozenTrial

from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.trial_loop import Evaluate
from lightning_bge.hpo.scheduling.trial_queue import CHECKPOINTS
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.search_space import parse_space, suggest
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trial.checkpoint import save_trial
from lightning_bge.hpo.trials import PAUSED_AT, parameter_set_of
from lightning_bge.runtime.stop import StopRequest
from tests.helpers.study_run import run_study

STEPS = Steps(2, 4)
SPACE = {"x": {"low": 0.0, "high": 1.0}, "y": {"low": 0.0, "high": 1.0}}


def fake_config(**options: Any) -> StudyConfig:
    """The options of a study over two numbers, without a pruner; configs may be dicts."""
    kinds = {"sampler": SamplerConfig, "pruner": PrunerConfig}
    given = {"n_trials": 8, "space": SPACE, "pruner": {"name": "none"}, **options}
    return StudyConfig(**{name: kinds[name](**value) if name in kinds else value for name, value in given.items()})


def open_fake(run_dir: Path, config: StudyConfig, direction: Any = "maximize") -> optuna.Study:
    """Create or open the study."""
    run_dir.mkdir(exist_ok=True)
    place = study_storage(run_dir, config)
    with place.lock():
        return open_study(place, config, direction, STEPS, {"monitor.metric": "f1"}, {})


def run_fake(
    run_dir: Path,
    config: StudyConfig,
    objective: Evaluate | None = None,
    timeout: float = math.inf,
    request: StopRequest | None = None,
    direction: Any = "maximize",
) -> tuple[optuna.Study, list[FrozenTrial]]:
    """Run the study, with a line for each trial; returns it, and the trials that this process has ended."""
    mine: list[FrozenTrial] = []
    progress = Progress(config, "f1", STEPS.total)

    def report(study: optuna.Study, trial: FrozenTrial) -> None:
        mine.append(trial)
        progress(study, trial)

    study, space = open_fake(run_dir, config, direction), parse_space(config.space)
    run_study(
        study,
        objective or (lambda trial: value_of(suggest(trial, space))),
        config,
        run_dir,
        enqueued=config.enqueue,
        until=time.monotonic() + timeout,
        request=request,
        report=report,
    )
    return study, mine


def value_of(params: dict[str, Any]) -> float:
    """The score of a parameter set: higher near 0.7."""
    return -math.fsum((value - 0.7) ** 2 for value in params.values() if isinstance(value, int | float))


def learning_curve(run_dir: Path) -> Evaluate:
    """An objective that reports at each step, and pauses where the pruner says so; it repeats nothing it resumes."""

    def objective(trial: optuna.Trial) -> float:
        value = value_of(suggest(trial, parse_space(SPACE)))
        known = trial.study.get_trials(deepcopy=False)[trial.number]
        for step in range(len(known.intermediate_values) + 1, STEPS.total + 1):
            trial.report(value - 1 / step, step)
            if step < STEPS.total and trial.should_prune():
                trial.set_user_attr(PAUSED_AT, step)
                save_trial(run_dir / CHECKPOINTS / str(parameter_set_of(known)), step=step, folds=[], curve=[[]])
                raise optuna.TrialPruned
        return value

    return objective


def main() -> None:
    """Run it as one of several processes."""
    run_dir, config = Path(sys.argv[1]), fake_config(**json.loads(sys.argv[2]))
    asha = config.pruner.name == "asha"

    def slowly(trial: optuna.Trial) -> float:
        time.sleep(random.uniform(0, 0.1))
        return learning_curve(run_dir)(trial) if asha else value_of(suggest(trial, parse_space(config.space)))

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    print("ready", flush=True)
    sys.stdin.readline()
    _, mine = run_fake(run_dir, config, slowly)
    print(len(mine), flush=True)


if __name__ == "__main__":
    main()
