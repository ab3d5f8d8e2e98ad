"""The options of a study."""

import math
from dataclasses import dataclass, field
from typing import Any, Literal, get_args

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.ranking import CostName
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.storage.study_storage import PATIENCE, check_study_name
from lightning_bge.hpo.storage.url import parse_storage
from lightning_bge.hpo.storage.workers import WORKER_TIMEOUT
from lightning_bge.hpo.trackers.config import Trackers, parse_trackers
from lightning_bge.runtime.locations import check_location

PREDICTIONS = "predictions"  # folder in the run folder: the logits of all validations
BASELINE = "-baseline"  # suffix of the name of the study of the configured options
SEED_REPLICATES = "-seed-replicates"  # suffix of the name of the study of a study's seed replicates
OUTER_FOLDS = "outer_folds"  # folder in the run folder: the run folders of the inner studies, by number
BEST = 5  # trials whose out-of-fold predictions are kept, and which may have seed replicates
REPLICATED_FROM = 200  # trials of a study, from which on there are seed replicates by default: 10 are at most 5 %


# More than 10 fields: each is an option that users type as --hpo.NAME, and a group would lengthen every one of them.
@dataclass(frozen=True)
class StudyConfig:
    """The options of a study.

    Attributes:
        n_trials: how many parameter sets are tried in all, to their end or until they are pruned; failed ones do not
            count. Fewer where the search space has fewer: none is trained twice. A study continues when it is raised.
        space: the search space: dotted name of an option -> {low, high, log, step} or {choices: [...]}. With `when:
            {another.name: value or [values]}` it is drawn only in trials where that other hyperparameter, one with
            choices, has such a value; in the others it keeps its configured value. Several entries must all hold. What
            changes the meaning of the score can't be searched: folds, rows, labels, seeds, the loss that is the metric.
        enqueue: known good parameter sets, tried first and once in a study: a list of {dotted name: value, ...}. What
            one leaves out is drawn. Some may be added when a study is resumed. They count among its trials.
        pruner: which trials are ended early.
        sampler: how parameter sets are drawn.
        timeout: seconds after which this call starts no further trial, as Optuna's; null: no limit. With outer_folds
            each of the studies has an equal part of it, and what earlier ones have left.
        terminator: end the study when Optuna's `Terminator` expects to gain less from further trials than the error of
            cross-validation; it looks at complete trials, from the 20th on, and needs two folds or more.
        max_failures: the study ends with an error when more trials than this have failed. A trial that raises an error
            fails, and the study goes on: 10, so that a rare error does not end it, and one in each trial soon does.
            With outer_folds each inner study is counted by itself.
        max_worker_deaths: a parameter set whose process dies so many times in a row, with no report in between, fails.
        workers: processes that `lightning-bge hpo` starts on this machine. null: workers_per_device for each GPU; one
            without a GPU. On a CPU they share the cores. With --launcher ray, on the cluster; null: as many as its
            nodes have room for.
        workers_per_device: processes that share a GPU, and its memory.
        val_check_interval: the part of an epoch between two reports to the pruner, as the Trainer's: 1, or a part like
            0.5 or 0.25, which lets bad trials end earlier and costs as many more validations.
        seed_replicates: with how many other seeds each of the best five trials is trained at the end, to its last
            epoch, so that the winner, which has the best mean over its seeds, is not merely the luckiest. null: 2 where
            there are 200 trials or more, else 0.
        baseline: train the configured options once on all folds at the end, without a search, so that the summary can
            say what the search has gained. It takes as long as one trial that is not pruned.
        cost: what is minimised besides the score: train_seconds, of a trial's training, or predict_seconds, of
            validating 1,000 rows; null: nothing. With a cost nothing is pruned: set pruner.name to none. The summary
            lists the Pareto-optimal trials; the best trial is the one with the best score, as without a cost.
        refit: train with the best hyperparameters on all rows of data.train_file at the end, and export the model.
        refit_val_file: the refit trains on the rows of data.val_file too. Off, as no figure of the study is then of a
            model with these rows: neither the score, which was measured on them, nor the threshold.
        calibration: temperature: the exported model's logits are divided by one number, fitted on the best trial's
            out-of-fold predictions (Guo et al. 2017, arXiv:1706.04599), so that scores can be read as probabilities.
            It is built into the weights, and the threshold moves with it. null: off, as no decision changes by it.
        ensemble: export, instead of a refit, the models of the best trial's folds, each trained once more to the epoch
            that was scored there, as one predictor that averages their scores. It needs two folds or more. Off, as
            it takes as many times as long to predict as there are folds.
        predictions_gb: disk space for the predictions of all validations, in units of 2**30 bytes: what the corrected
            score of the winner is computed from. Beyond it those of the parameter sets that were trained least are
            deleted, the worst first, and the summary says how many. 1 holds 2,000 trials of 10,000 rows with 5 epochs.
        outer_folds: nested cross-validation with so many outer folds, 2 or more. For each of them a whole study is run
            on the rows outside of it, and its exported model is scored once on the rows of the outer fold; then the
            study on all rows gives the winner and the exported model. The score is not optimistic, and costs about
            (outer_folds + 1) times the hours. Not with data.val_file. null: none.
        files: where the processes of a study keep what they share: checkpoints of trials, predictions, tracebacks, and
            at the end the results. A folder that all of them mount, or a URL of fsspec such as s3://bucket/run or
            gs://bucket/run, for which its package (s3fs, gcsfs) has to be installed. Its keys and passwords come from
            the environment or from files, and are refused in the URL. null: the run folder.
        weights_only: checkpoints of trials are read with `torch.load(weights_only=True)`, which refuses all but tensors
            and plain data. Set it to false for a module of another project that adds other objects to its checkpoints,
            where nobody else can write into the run folder or `files`: such a file can do anything when it is read.
        encoder_cache_gb: memory for encoders that a study keeps so that each is read once: the one in use, and others
            in the host's memory, of which the least recently used is dropped first. In units of 2**30
            bytes; 0: the one in use alone. null: that too, unless model.name_or_path is searched; then a quarter of the
            host's memory, or of what the control group, RLIMIT_* or memory.limit_gb allow, as the other three are for a
            trial's gradients, optimizer and activations; and at most half of what is free, as other processes may
            search too.
        trackers: experiment trackers that have a run for each trial: a list of mlflow, wandb and tensorboard, or of
            mappings with options, such as {name: mlflow, tracking_uri: ..., experiment: ...} or {name: wandb,
            project: ..., entity: ..., mode: offline}. Otherwise the environment variables of the tracker count, such as
            MLFLOW_TRACKING_URI and WANDB_PROJECT; credentials come from there alone. They may be changed when a study
            is resumed.
        storage: where the study is kept, so that processes of several machines share it:
            postgresql+psycopg://user@host/database, mysql+pymysql://user@host/database, or grpc://host:port of
            `lightning-bge proxy`. Its password comes from the environment variable LIGHTNING_BGE_STORAGE_PASSWORD, or
            from the file that LIGHTNING_BGE_STORAGE_PASSWORD_FILE names. null: journal.log in the run folder.
        study_name: the name of the study in its storage. null: that of the run folder.
        storage_timeout: seconds for which a storage that does not answer is waited for before the process gives up.
        worker_timeout: seconds without a sign of life, after which a process on another machine counts as gone and its
            trial is continued by others. Processes of one machine know at once.

    Raises:
        ConfigError: a value is out of range, or a cost is set together with a pruner.
    """

    n_trials: int = 100
    space: dict[str, dict[str, Any]] = field(default_factory=dict)
    enqueue: list[dict[str, Any]] = field(default_factory=list)
    pruner: PrunerConfig = PrunerConfig()  # noqa: RUF009 - frozen
    sampler: SamplerConfig = SamplerConfig()  # noqa: RUF009 - frozen
    timeout: float | None = None
    terminator: bool = False
    max_failures: int = 10
    max_worker_deaths: int = 3
    workers: int | None = None
    workers_per_device: int = 1
    val_check_interval: float = 1.0
    seed_replicates: int | None = None
    baseline: bool = True
    cost: CostName | None = None
    refit: bool = True
    refit_val_file: bool = False
    calibration: Literal["temperature"] | None = None
    ensemble: bool = False
    predictions_gb: float = 1.0
    outer_folds: int | None = None
    files: str | None = None
    weights_only: bool = True
    encoder_cache_gb: float | None = None
    trackers: Trackers = field(default_factory=list)
    storage: str | None = None
    study_name: str | None = None
    storage_timeout: float = PATIENCE
    worker_timeout: float = WORKER_TIMEOUT

    def __post_init__(self) -> None:
        _check_types(self)
        if self.n_trials < 1:
            raise ConfigError(f"hpo.n_trials: expected 1 or more, got {self.n_trials}")
        if self.timeout is not None and self.timeout <= 0:
            raise ConfigError(f"hpo.timeout: expected more than 0 seconds or null, got {self.timeout}")
        if not 0 < self.val_check_interval <= 1 or abs(1 / self.val_check_interval - self.reports_per_epoch) > 1e-3:
            raise ConfigError(
                "hpo.val_check_interval: expected 1, or one part of an epoch like 0.5 or 0.25, "
                f"got {self.val_check_interval}"
            )
        if self.encoder_cache_gb is not None and not 0 <= self.encoder_cache_gb < math.inf:
            raise ConfigError(f"hpo.encoder_cache_gb: expected 0 or more, or null, got {self.encoder_cache_gb}")
        if self.files is not None:
            check_location("hpo.files", self.files)
        if not 0 <= self.predictions_gb < math.inf:
            raise ConfigError(f"hpo.predictions_gb: expected 0 or more, got {self.predictions_gb}")
        if self.seed_replicates is not None and self.seed_replicates < 0:
            raise ConfigError(f"hpo.seed_replicates: expected 0 or more, or null, got {self.seed_replicates}")
        if self.cost not in (None, *get_args(CostName)):
            raise ConfigError(f"hpo.cost: expected one of {', '.join(get_args(CostName))}, got {self.cost}")
        if self.calibration not in (None, "temperature"):
            raise ConfigError(f"hpo.calibration: expected temperature or null, got {self.calibration}")
        if self.ensemble and (self.refit_val_file or not self.refit):
            given = "hpo.refit_val_file true" if self.refit_val_file else "hpo.refit false"
            raise ConfigError(f"hpo.ensemble: expected false with {given}, got true. Leave one of them at its default")
        if self.refit_val_file and not self.refit:
            raise ConfigError("hpo.refit_val_file: expected false without a refit, got true. Set hpo.refit to true")
        least_values = {"max_failures": 0, "max_worker_deaths": 1, "workers": 1, "workers_per_device": 1}
        for name, least in (least_values | {"outer_folds": 2}).items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise ConfigError(f"hpo.{name}: expected {least} or more, got {value}")
        parse_trackers(self.trackers)
        if self.storage is not None:
            parse_storage(self.storage)
        if self.study_name is not None:
            check_study_name("hpo.study_name", self.study_name)
        for name, least_seconds in (("storage_timeout", 0.1), ("worker_timeout", 6.0)):
            if not least_seconds <= getattr(self, name) < math.inf:
                raise ConfigError(f"hpo.{name}: expected {least_seconds:g} or more, got {getattr(self, name)}")
        if self.cost is not None and self.terminator:
            raise ConfigError("hpo.terminator: not with hpo.cost, as it looks at one objective; set one of them alone")
        if self.cost is not None and self.pruner.name != "none":
            raise ConfigError(
                "hpo.cost: no trial can be pruned where a cost is minimised besides the score, but hpo.pruner.name is "
                f"{self.pruner.name}. Set hpo.pruner.name to none, or hpo.cost to null"
            )

    @property
    def n_seed_replicates(self) -> int:
        """Number of seed replicates of each of the best trials."""
        return 2 * (self.n_trials >= REPLICATED_FROM) if self.seed_replicates is None else self.seed_replicates

    @property
    def encoder_cache_bytes(self) -> int | None:
        """The limit of `EncoderCache`; None: its default share of the memory."""
        if self.encoder_cache_gb is not None:
            return round(self.encoder_cache_gb * 2**30)
        return None if "model.name_or_path" in self.space else 0

    @property
    def reports_per_epoch(self) -> int:
        """Reports in each epoch."""
        return round(1 / self.val_check_interval)


def _check_types(config: StudyConfig) -> None:
    """Raise `ConfigError` where a text or a number of seconds is none, as Python allows."""
    for name in ("files", "storage", "study_name"):
        value = getattr(config, name)
        if not isinstance(value, str | None):
            raise ConfigError(f"hpo.{name}: expected a string or null, got {type(value).__name__} {value!r}")
    for name in ("storage_timeout", "worker_timeout"):
        value = getattr(config, name)
        if isinstance(value, bool) or not isinstance(value, int | float):
            raise ConfigError(f"hpo.{name}: expected a number of seconds, got {type(value).__name__} {value!r}")
