"""The trials of a study, run one after another by one process."""

import gc
import logging
import traceback
from collections.abc import Callable, Sequence

import optuna
from optuna.exceptions import UpdateFinishedTrialError
from optuna.trial import FrozenTrial, TrialState

from lightning_bge.errors import StudyError, UserError
from lightning_bge.hpo.pruning.oom import KEPT
from lightning_bge.hpo.scheduling.trial_queue import TrialQueue
from lightning_bge.hpo.trials import ERROR, FAILURES, INTERRUPTED, WORKER_LOST
from lightning_bge.runtime.compat.optuna import trial_as_stored
from lightning_bge.runtime.locations import Location
from lightning_bge.runtime.run_folder import create_folder, write_text
from lightning_bge.runtime.stop import Stopped, StopRequest
from lightning_bge.runtime.units import format_bytes

log = logging.getLogger("lightning_bge")

Evaluate = Callable[[optuna.Trial], float | Sequence[float]]


def quiet_optuna() -> None:
    """Show Optuna's errors only: `Progress` prints a line for each trial."""
    optuna.logging.set_verbosity(optuna.logging.ERROR)


class StartAgainError(StudyError):
    """This process can run no further trial; a new one continues the study."""


class MemoryKeptError(StartAgainError):
    """Memory of a trial that ran out of it is still held."""


def run_trials(
    queue: TrialQueue,
    objective: Evaluate,
    *,
    until: float,
    request: StopRequest,
    report: Callable[[optuna.Study, FrozenTrial], None],
) -> None:
    """Run what is left of a study; several processes may do so at once on one folder.

    A trial that raises an error ends as FAIL, with the reason in the user attribute `error` and the traceback in
    `failures/`, and the next one begins. One that is stopped on request is to be continued.

    Args:
        queue: of the study.
        objective: trains a trial.
        until: `time.monotonic()` after which no trial begins.
        request: whether to stop.
        report: called after each trial.

    Raises:
        MemoryKeptError: a trial ran out of memory, and some of what it took is still held. The study has the trial. A
            new process can continue the study; this one would run out of memory earlier each time.
        StudyError: more trials have failed than `hpo.max_failures`.
        UserError: an option or a file is wrong.
        OSError: the disk is full, or the folder can't be written.
    """
    gc.collect()
    gc.freeze()  # else the objects of the libraries would be searched after each trial
    try:
        while (trial := queue.next(until, request)) is not None:
            ended = _run_trial(queue, objective, trial)
            report(queue.study, ended)
            kept = ended.user_attrs.get(KEPT)
            if kept is not None:
                raise MemoryKeptError(
                    f"trial {ended.number} ran out of memory, and {format_bytes(kept)} of what it took are still held. "
                    "Start the study in a new process, which continues it"
                )
            ranks = getattr(objective, "ranks", None)
            if ranks is not None and ranks.is_out_of_step:
                raise StartAgainError("the processes of the other devices are out of step after a failed trial")
    finally:
        gc.unfreeze()


def _run_trial(queue: TrialQueue, objective: Evaluate, trial: optuna.Trial) -> FrozenTrial:
    try:
        ended = _evaluate(queue, objective, trial)
    except UpdateFinishedTrialError:  # another process has ended it
        ended = trial_as_stored(queue.study, trial)
    if WORKER_LOST in ended.user_attrs:
        text = "trial %d was ended by another process, as this one gave no sign of life for too long"
        log.warning(text, trial.number)
    return ended


def _evaluate(queue: TrialQueue, objective: Evaluate, trial: optuna.Trial) -> FrozenTrial:
    """Train a trial, and end it as it ends; `UpdateFinishedTrialError` where another process has ended it."""
    study = queue.study
    try:
        values = objective(trial)
    except optuna.TrialPruned:
        return study.tell(trial, state=TrialState.PRUNED, skip_if_finished=True)
    except UpdateFinishedTrialError:
        raise
    except (Stopped, UserError, OSError, KeyboardInterrupt, SystemExit) as error:
        # an error of the user's, or of the disk: the trial is continued when it is corrected
        by_key = isinstance(error, SystemExit) and error.code == 1  # what Lightning's `fit` makes of Ctrl-C
        text = KeyboardInterrupt.__name__ if by_key else str(error) or type(error).__name__
        ended = _end(study, trial, INTERRUPTED, text)
        if not isinstance(error, Stopped):
            raise
        return ended
    except Exception as error:
        _write_failure(queue.files / FAILURES, study, trial, error)
        return _end(study, trial, ERROR, f"{type(error).__name__}: {error}")
    return study.tell(trial, values, skip_if_finished=True)


def _end(study: optuna.Study, trial: optuna.Trial, why: str, text: str) -> FrozenTrial:
    trial.set_user_attr(why, text.strip().splitlines()[0] if text.strip() else "unknown")
    return study.tell(trial, state=TrialState.FAIL, skip_if_finished=True)


def _write_failure(folder: Location, study: optuna.Study, trial: optuna.Trial, error: Exception) -> None:
    create_folder(folder)
    path = folder / f"{study.study_name}-trial-{trial.number}.txt"
    write_text(path, "".join([f"{trial.params}\n\n", *traceback.format_exception(error)]))
    log.warning("trial %d failed: %s: %s (%s)", trial.number, type(error).__name__, error, path)
