"""A whole study, for the command line and for Python: its trials, seed replicates, refit and export."""

import math
import time
from contextlib import ExitStack
from dataclasses import replace
from typing import Any

import optuna

from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.analysis.journal import SUMMARY
from lightning_bge.hpo.config import BEST, StudyConfig
from lightning_bge.hpo.experiment import Ending, Experiment
from lightning_bge.hpo.finish.baseline import run_baseline
from lightning_bge.hpo.finish.published import publish_results
from lightning_bge.hpo.finish.results import describe_study
from lightning_bge.hpo.finish.seed_replicates import run_seed_replicates
from lightning_bge.hpo.forecast.preview import describe_pruner
from lightning_bge.hpo.progress import Progress
from lightning_bge.hpo.pruning.config import build_pruner
from lightning_bge.hpo.scheduling.study_queue import StudyQueue
from lightning_bge.hpo.scheduling.trial_loop import StartAgainError, run_trials
from lightning_bge.hpo.space.draw import check_grid, n_parameter_sets, space_size
from lightning_bge.hpo.space.parameter_sets import parse_enqueued
from lightning_bge.hpo.space.search_space import Space, parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.files import join_files
from lightning_bge.hpo.storage.study_storage import StudyStorage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.tracked_study import complete_runs, mark_tracked, track
from lightning_bge.hpo.trackers.config import check_trackers
from lightning_bge.hpo.trial.objective import Objective
from lightning_bge.hpo.trial.ranks import RankGroup
from lightning_bge.hpo.trials import N_TRIALS
from lightning_bge.hpo.versions import other_versions, used_versions
from lightning_bge.runtime.run_folder import create_run_dir, record_run
from lightning_bge.runtime.stop import Stopped, StopRequest

OTHERS_POLL_SECONDS = 0.5  # between two looks at whether others live


def check_study(experiment: Experiment, hpo: StudyConfig) -> tuple[Space, Steps]:
    """Check the options and the data of a study; nothing is written.

    Returns:
        The search space, and what a trial that runs to its end reports.

    Raises:
        UserError: options or data are wrong.
    """
    check_trackers(hpo.trackers)
    space = parse_space(hpo.space)
    parse_enqueued(hpo.enqueue, space)
    if hpo.sampler.name == "grid":
        check_grid(space)
    experiment.check_space(hpo, space)
    experiment.set_up()
    steps = Steps(experiment.num_folds, experiment.most_epochs(space), hpo.reports_per_epoch)
    build_pruner(hpo.pruner, n_parameter_sets(hpo.n_trials, space), steps)  # raises where it could never prune
    experiment.check_end(hpo, space)
    if hpo.terminator and steps.folds == 1:
        raise ConfigError("hpo.terminator: expected two folds or more, as it compares with the error between folds")
    return space, steps


def prepare_study(
    experiment: Experiment,
    hpo: StudyConfig,
    space: Space,
    steps: Steps,
    place: StudyStorage,
    *,
    worker: Worker | None = None,
    joins: bool = False,
) -> optuna.Study:
    """Say what a study will do, and create or open it.

    Args:
        experiment: what the study varies.
        hpo: its options.
        space: the search space.
        steps: what a trial that runs to its end reports.
        place: where the study is kept.
        worker: this process, where it is to run trials.
        joins: the study is there: nothing is said, and its options are not written again.

    Raises:
        UserError: options, or the folder's content, are wrong.
    """
    if not joins:
        _print_head(experiment, hpo, space, steps)
    run_dir = experiment.run_dir
    with ExitStack() as stack:
        this = stack.enter_context(place.worker()) if worker is None else worker
        is_held = stack.enter_context(place.lock(this))
        versions = used_versions(str(experiment.config.get("trainer.accelerator", "auto")))
        study = open_study(
            place,
            hpo,
            experiment.monitor.direction,
            steps,
            experiment.identity(hpo, space),
            dict(experiment.config.items()),
            worker=this.id,
            versions=versions,
        )
        join_files(study, hpo.files, run_dir)
        other = other_versions(study, versions)
        if worker is not None:
            worker.other_versions = other
        if hpo.trackers:
            mark_tracked(study, place.name)
        if not joins:
            known = study.user_attrs.get(N_TRIALS)
            # a process that joins others may ask for more trials; an older one that comes again does not ask for fewer
            if known is None or hpo.n_trials > known or not place.workers.living() - {this.id}:
                study.set_user_attr(N_TRIALS, hpo.n_trials)
            record_run(run_dir, experiment.plain(experiment.config), experiment.data_hash)
        if not is_held():
            raise StudyError(
                f"this process gave no sign of life for more than {place.workers.timeout:.0f} s while it opened the "
                "study, so that others may have opened it too. Run the same command again"
            )
    return study


def run_hpo(
    experiment: Experiment,
    hpo: StudyConfig,
    *,
    joins: bool = False,
    parent: int | None = None,
    ranks: RankGroup | None = None,
) -> tuple[optuna.Study, dict[str, Any] | None]:
    """Run the study of a folder, or what is missing of it, with a printed line after each trial and a summary.

    Several processes may do so at once. Each stays until nothing is left to do; one of them ends the study.

    Args:
        experiment: what the study varies.
        hpo: its options.
        joins: the study is there, and its options are not written again.
        parent: the process without which this one stops; None: there is none.
        ranks: the processes that train each trial together, of which this is the first; None: it is the only one.

    Returns:
        The study, and the content of `summary.json`; None while other processes still run trials: the last writes it.

    Raises:
        UserError: options, data or the folder's content are wrong, no trial ran to its end, or too many have failed.
        KeyboardInterrupt: Ctrl-C; what was being trained is saved, and the same call continues.
        SystemExit: the same after SIGTERM (143) or SIGHUP (129).
    """
    until = math.inf if hpo.timeout is None else time.monotonic() + hpo.timeout
    space, steps = check_study(experiment, hpo)
    run_dir = create_run_dir(experiment.run_dir)
    place = study_storage(run_dir, hpo, waits=joins)
    with StopRequest(parent) as request, place.worker() as worker:
        place.stop_when(lambda: request.signal)
        study = prepare_study(experiment, hpo, space, steps, place, worker=worker, joins=joins)
        queue = StudyQueue(study, place, worker, hpo, space, parse_enqueued(hpo.enqueue, space))
        objective = _objective(experiment, queue, steps, request, ranks)
        progress = Progress(replace(hpo, n_trials=queue.n_trials), experiment.monitor.name, steps.total)
        summary = None
        try:
            while not request.signal:
                run_trials(
                    queue, objective, until=until, request=request, report=objective.tracking.reporting(progress)
                )
                if not request.signal:
                    summary = _end(experiment, queue, objective, until)
                if queue.is_finished() or time.monotonic() >= until:  # else trials were added meanwhile
                    break
                if ranks is not None and ranks.is_closed:
                    raise StartAgainError("trials were added to a study that had ended")
        except Stopped:
            summary = None
        finally:
            objective.tracking.close()
    request.leave()
    return study, summary


def _objective(
    experiment: Experiment, queue: StudyQueue, steps: Steps, request: StopRequest, ranks: RankGroup | None
) -> Objective:
    return Objective(
        build=experiment.build,
        space=queue.space,
        monitor=experiment.monitor,
        steps=steps,
        n_trials=queue.n_trials,
        cost=queue.config.cost,
        request=request,
        tracking=track(queue.study, queue.config, queue.run_dir),
        files=experiment.trial_files(queue),
        ranks=ranks,
        **experiment.parts_of_objective(queue.config),
    )


def _print_head(experiment: Experiment, hpo: StudyConfig, space: Space, steps: Steps) -> None:
    """Say what the study will do."""
    split = "a single split" if steps.folds == 1 else f"{steps.folds} folds"
    monitor, size = experiment.monitor, space_size(space)
    name = hpo.study_name or experiment.run_dir.resolve().name
    print(
        f"study {name}: {hpo.n_trials} trials, {split}, at most {steps.epochs} epochs "
        f"each; metric: {monitor.name} of the {monitor.objective} epoch, mean over the folds"
    )
    if size < hpo.n_trials:
        print(f"the search space has {int(size)} parameter sets, and none is trained twice: the study ends with them")
    print(describe_pruner(hpo.pruner, n_parameter_sets(hpo.n_trials, space), steps))
    if hpo.n_seed_replicates:
        print(f"seed replicates at the end: {hpo.n_seed_replicates} of each of the best trials, up to {BEST}")
    if hpo.baseline:
        print("at the end the configured hyperparameters are trained too, to say what the search has gained")
    for line in experiment.notes(hpo):
        print(line)


def follow(experiment: Experiment, hpo: StudyConfig, ranks: RankGroup) -> None:
    """Train the folds of another process's trials with it, until it has no more."""
    space, steps = check_study(experiment, hpo)
    objective = Objective(
        build=experiment.build,
        space=space,
        monitor=experiment.monitor,
        steps=steps,
        **experiment.parts_of_objective(hpo),
    )
    while (task := ranks.receive()) is not None:
        objective.follow(task)


def _leave_to_others(queue: StudyQueue, request: StopRequest) -> bool:
    """Stop being a worker where others are at work, who end the study then; False: there are none.

    Under the lock, so that of two processes at most one leaves it to the other, and not to one that is dead already.
    """
    workers, own = queue.place.workers, queue.worker.id
    while not request.signal:
        with queue.place.lock(queue.worker):
            others = workers.living() - {own}
            if not others:
                return False
            if workers.any_surely_lives(others):
                queue.worker.leave()
                return True
        time.sleep(OTHERS_POLL_SECONDS)
    return False


def _end(experiment: Experiment, queue: StudyQueue, objective: Objective, until: float) -> dict[str, Any] | None:
    """Seed replicates, refit, export and results; None: other processes end the study, or a stop was requested."""
    config, metric, request = experiment.config, experiment.monitor.name, objective.request
    replicates = run_seed_replicates(
        queue, objective, metric=metric, seed=config.seed_everything, until=until, request=request
    )
    configured = experiment.configured(objective.space)
    configured["trainer.max_epochs"] = config["trainer.max_epochs"] or objective.steps.epochs
    baseline = run_baseline(queue, objective, configured=configured, metric=metric, until=until, request=request)
    if not request.signal and time.monotonic() >= until and _leave_to_others(queue, request):
        print("hpo.timeout is over; other processes go on with this study, and the last of them ends it")
        return None
    if request.signal:
        return None
    objective.encoder.clear()
    # the epochs of a trial that has not drawn a number of them
    epochs = config["trainer.max_epochs"] if "trainer.max_epochs" in objective.space.when else objective.steps.epochs
    baseline_steps = replace(objective.steps, epochs=configured["trainer.max_epochs"])
    ending = Ending(epochs, replicates, None if baseline is None else (baseline, baseline_steps))
    with queue.place.end_lock(queue.worker, lambda: request.signal) as is_held:
        if objective.ranks is not None:
            objective.ranks.close()
        complete_runs(objective.tracking, queue.study)
        summary = experiment.finish(queue, objective, ending)
        if not is_held():
            print("this process gave no sign of life for too long, so that another one ends the study")
            return None
        publish_results(queue.run_dir, queue.files)
        if queue.place.name is not None and queue.study.user_attrs.get(SUMMARY) != summary:
            queue.study.set_user_attr(SUMMARY, summary)  # for readers on other machines
        objective.tracking.end_study(summary)
    print(describe_study(queue.run_dir, summary, queue.files))
    return summary
