"""`tune` and `plan`: a study and its hours from Python or a notebook, as by `lightning-bge hpo` and `plan`."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Unpack, overload

import optuna

from lightning_bge.advisor.plan.config import GivenFigures, PlanConfig
from lightning_bge.advisor.plan.plan import Plan, make_plan
from lightning_bge.advisor.report.report import write_report
from lightning_bge.build_study import BuildModule, study_of_function
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.experiment import Experiment
from lightning_bge.hpo.finish.published import publish_report
from lightning_bge.hpo.outer_folds import run_studies
from lightning_bge.hpo.ranking import ranked, score_of
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.tracked_study import attach_report
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.metrics.names import Metric
from lightning_bge.preflight import preflight, preflight_module
from lightning_bge.runtime.compat.lightning import is_module
from lightning_bge.runtime.nested_config import as_config
from lightning_bge.templates import SpaceLike, StudyOptions, errors_of_arguments, quiet_libraries, study_of_templates


@dataclass(frozen=True)
class TuneResult:
    """What `tune` has found.

    Attributes:
        study: Optuna's, with all trials.
        run_dir: the run's folder, with `report.html`, `best.yaml`, `trials.csv` and the other files of a study.
        summary: the content of `summary.json`; None while other processes still run trials of this study.
    """

    study: optuna.Study
    run_dir: Path
    summary: dict[str, Any] | None

    @property
    def best_params(self) -> dict[str, Any]:
        """The hyperparameters of the best trial, by dotted names."""
        return dict(self._best.params)

    @property
    def best_value(self) -> float:
        """The score of the best trial, the mean over the folds."""
        value = score_of(self._best)
        assert value is not None
        return value

    @property
    def model_dir(self) -> Path | str | None:
        """The folder of the exported model, or of the fold models with `ensemble`; None without a refit.

        A URL, as text, where another machine has exported it, and `files` is one.
        """
        folder: str | None = None if self.summary is None else self.summary["model_dir"]
        return folder if folder is None or "://" in folder else Path(folder)

    @property
    def trials(self) -> Any:
        """All trials as a pandas DataFrame, as Optuna's `trials_dataframe` makes it.

        Raises:
            ImportError: pandas is not installed.
        """
        try:
            return self.study.trials_dataframe()
        except ImportError as error:
            raise ImportError(
                "TuneResult.trials needs pandas: run `pip install pandas`, or use TuneResult.study.trials"
            ) from error

    @property
    def _best(self) -> optuna.trial.FrozenTrial:
        return ranked(self.study)[0] if self.summary is None else self.study.trials[self.summary["best_trial"]]


@overload
def tune(
    model: BGEClassifier,
    data: TextDataModule,
    space: SpaceLike,
    /,
    *,
    run_dir: str | Path,
    n_trials: int = ...,
    max_epochs: int = ...,
    metric: Metric | None = ...,
    seed: int = ...,
    trainer: Mapping[str, Any] | None = ...,
    **options: Unpack[StudyOptions],
) -> TuneResult: ...
@overload
def tune(
    build: BuildModule,
    space: SpaceLike,
    /,
    *,
    run_dir: str | Path,
    n_trials: int = ...,
    max_epochs: int = ...,
    metric: str | None = ...,
    seed: int = ...,
    trainer: Mapping[str, Any] | None = ...,
    **options: Unpack[StudyOptions],
) -> TuneResult: ...
def tune(
    *what: Any,
    run_dir: str | Path,
    n_trials: int = 100,
    max_epochs: int = 3,
    metric: Any = None,
    seed: int = 42,
    trainer: Mapping[str, Any] | None = None,
    **options: Unpack[StudyOptions],
) -> TuneResult:
    """Run a study with Optuna: `tune(model, data, space, ...)` of texts, `tune(build, space, ...)` of any module.

    `tune(model, data, space, run_dir=...)` refits the best hyperparameters on all training rows, and exports the model.
    Equal arguments and seeds give the trials of `lightning-bge hpo`. `model` and `data` are templates: each trial makes
    new objects from their `hparams`. As on the command line, the data module gets the tokenizer, task, revision and
    `trust_remote_code` of the model, and both get the `seed`.

    `tune(build, space, run_dir=...)` calls `build(params)` for each fold of each trial. It returns a LightningModule
    and its data module, or None where the module has loaders of its own, of `lightning.pytorch` or `pytorch_lightning`.
    The metric is what the module logs in validation. A data module with `num_folds` and `select_fold(k)` is trained
    fold by fold. All random number generators are seeded before each call. Nothing is refitted or exported.

    The same call continues an interrupted study, and one with a higher `n_trials` a finished one; several processes may
    call it at once with one `run_dir`.

    Args:
        what: `model`, the template of the model, `data`, that of the data module, with a `train_file`, and `space`; or
            `build` and `space`. The search space: name -> distribution of `optuna.distributions`, such as
            `{"model.optimizer.lr": FloatDistribution(1e-5, 3e-4, log=True)}`. Of templates, names begin with `model.`,
            `data.` or `trainer.`; a function gets them as they are. A dict like `{"low": 0.5, "high": 5.0, "when":
            {"model.loss.name": "focal"}}` is accepted as well, with conditions as in a YAML file.
        run_dir: the run's folder; it is created.
        n_trials: how many trials the study has in all.
        max_epochs: of each fold of each trial.
        metric: the metric that is optimized; None: the task's usual one, f1, or spearman for a regression; val_loss for
            a function. A metric of torchmetrics is given by its class, as a dict of `class_path` and `init_args`. For a
            function the name that its module logs; `monitor={"mode": "max"}` says that more is better.
        seed: of the model's head, of dropout and of the order of rows.
        trainer: further arguments of the trainer, such as `{"precision": "32-true"}`.
        **options: fields of `StudyConfig`, such as `pruner`, `timeout` or `refit`, and `monitor`, `compile` and
            `memory`. Those that are configs may be dicts of their fields, such as `pruner={"name": "none"}`.

    Returns:
        The study, and the best of it.

    Raises:
        UserError: an argument or a file is wrong, `run_dir` holds another study, or no trial ran to its end. The
            message names the argument.
        KeyboardInterrupt: the study was interrupted; finished trials are kept.
    """
    with errors_of_arguments("finished trials are kept: the same call continues the study"), quiet_libraries():
        experiment, hpo = _study_of("tune", what)(
            *what,
            run_dir=Path(run_dir),
            n_trials=n_trials,
            metric=metric,
            seed=seed,
            trainer={"max_epochs": max_epochs, **(trainer or {})},
            options=options,
        )
        _check("hpo", experiment, hpo)
        study, summary = run_studies(experiment, hpo)
        if summary is not None:
            report = write_report(Path(run_dir))
            publish_report(report, hpo.files)
            attach_report(study, hpo, Path(run_dir), summary, report)
            print(f"  {report.name:<14}the whole study on one page, for a browser")
        return TuneResult(study, Path(run_dir), summary)


def _check(command: Literal["hpo", "plan"], experiment: Experiment, hpo: StudyConfig) -> None:
    """Check what the command of that name checks, before anything is trained."""
    if isinstance(experiment, TextExperiment):
        preflight(command, experiment, hpo)
    else:
        preflight_module(command, experiment.run_dir, experiment.config["trainer"].as_dict(), hpo)


def _study_of(caller: str, what: tuple[Any, ...]) -> Callable[..., tuple[Experiment, StudyConfig]]:
    """The function that reads the arguments of `tune` or `plan`."""
    if len(what) == 3:
        return study_of_templates
    if len(what) == 2 and callable(what[0]) and not is_module(what[0]):
        return study_of_function
    raise ConfigError(
        f"{caller}: expected {caller}(model, data, space, ...) with a BGEClassifier and a TextDataModule, or "
        f"{caller}(build, space, ...) with a function, got {', '.join(type(one).__name__ for one in what) or 'nothing'}"
    )


@overload
def plan(
    model: BGEClassifier,
    data: TextDataModule,
    space: SpaceLike,
    /,
    *,
    config: PlanConfig | Mapping[str, Any] = ...,
    run_dir: str | Path = ...,
    n_trials: int = ...,
    max_epochs: int = ...,
    metric: Metric | None = ...,
    seed: int = ...,
    trainer: Mapping[str, Any] | None = ...,
    **options: Unpack[StudyOptions],
) -> Plan: ...
@overload
def plan(
    build: BuildModule,
    space: SpaceLike,
    /,
    *,
    config: PlanConfig | Mapping[str, Any] = ...,
    run_dir: str | Path = ...,
    n_trials: int = ...,
    max_epochs: int = ...,
    metric: str | None = ...,
    seed: int = ...,
    trainer: Mapping[str, Any] | None = ...,
    **options: Unpack[StudyOptions],
) -> Plan: ...
def plan(
    *what: Any,
    config: PlanConfig | Mapping[str, Any] = PlanConfig(),  # noqa: B008 - frozen
    run_dir: str | Path = "study",
    n_trials: int = 100,
    max_epochs: int = 3,
    metric: Any = None,
    seed: int = 42,
    trainer: Mapping[str, Any] | None = None,
    **options: Unpack[StudyOptions],
) -> Plan:
    """Estimate the hours of `tune` with these arguments, from a short measurement on this machine.

    Nothing of the measurement is kept, and no study is begun.

    ```python
    print(plan(model, data, space, n_trials=500, config={"deadline": 24}))
    ```

    Args:
        what: `model`, `data` and `space`, or `build` and `space`, as in `tune`.
        config: options of the plan, or a dict of them, such as `{"seconds": 30, "deadline": 24}`, `{"workers": 4}` or
            `{"given": {"step_ms": 20}}`.
        run_dir: the folder of the planned study. Only its name is used, and the disk that it is on.
        n_trials: how many trials the study has in all.
        max_epochs: of each fold of each trial.
        metric: the metric that is optimized, as in `tune`.
        seed: of the model's head, of dropout and of the order of rows.
        trainer: further arguments of the trainer, such as `{"precision": "32-true"}`.
        **options: further options of the study, as in `tune`.

    Returns:
        The plan; `print` shows it as text.

    Raises:
        UserError: an argument or a file is wrong. The message names the argument.
        KeyboardInterrupt: the measurement was interrupted.
    """
    with errors_of_arguments("nothing is kept"), quiet_libraries():
        experiment, hpo = _study_of("plan", what)(
            *what,
            run_dir=Path(run_dir),
            n_trials=n_trials,
            metric=metric,
            seed=seed,
            trainer={"max_epochs": max_epochs, **(trainer or {})},
            options=options,
        )
        if isinstance(config, Mapping) and "given" in config:
            config = {**config, "given": as_config(GivenFigures, config["given"], "config.given")}
        _check("plan", experiment, hpo)
        return make_plan(experiment, hpo, as_config(PlanConfig, config, "config"))
