"""What a study of a module that is not ours ends with: the best hyperparameters, and all trials."""

from pathlib import Path
from typing import Any

import optuna
from optuna.trial import TrialState

from lightning_bge.hpo.finish.seed_replicates import SeedReplicates
from lightning_bge.hpo.finish.summary import best_yaml, check_any_complete, study_summary, trials_table
from lightning_bge.hpo.progress import count, finished
from lightning_bge.hpo.ranking import ranked
from lightning_bge.hpo.trial.score import Monitor
from lightning_bge.hpo.trial.setup import Build
from lightning_bge.hpo.trials import ENDED
from lightning_bge.runtime.run_folder import write_json, write_text


def finish_module_study(
    study: optuna.Study,
    run_dir: Path,
    *,
    build: Build,
    monitor: Monitor,
    replicates: SeedReplicates | None,
    baseline: float | None,
) -> dict[str, Any]:
    """Write `best.yaml`, `trials.csv` and `summary.json`; return the summary. Nothing is trained or exported.

    Args:
        study: all its trials have ended.
        run_dir: the run's folder.
        build: makes fresh objects from parameters.
        monitor: the metric of the study.
        replicates: results of the seed replicates.
        baseline: the score of the configured options.

    Raises:
        StudyError: no trial ran to its end.
    """
    check_any_complete(study, run_dir)
    best = ranked(study)[0] if replicates is None else study.get_trials(deepcopy=False)[replicates.winner]
    write_text(run_dir / "trials.csv", trials_table(study))
    write_text(run_dir / "best.yaml", best_yaml(build(best.params), best, run_dir))
    summary = study_summary(study, best, monitor) | {
        "n_trials": finished(study),
        "n_runs": count(study, *ENDED, TrialState.FAIL),
        "seed_replicates": None if replicates is None else replicates.as_dict(),
        "baseline": baseline,
    }
    write_json(run_dir / "summary.json", summary)
    return summary
