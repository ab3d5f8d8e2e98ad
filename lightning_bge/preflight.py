"""What a command will need, checked in one pass before a model is loaded and before the first step."""

import logging
import shutil
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal, TypeVar

import numpy as np

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.tables.files import FILE_OPTIONS, expand_files
from lightning_bge.data.tables.labels import count_classes
from lightning_bge.errors import ConfigError, DataError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.storage.database import check_answers
from lightning_bge.hpo.storage.files import check_files, study_files
from lightning_bge.hpo.storage.url import parse_storage
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trackers.config import check_trackers
from lightning_bge.models.head_class import HeadConfig
from lightning_bge.models.losses import Loss, LossConfig
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.metrics.class_path import try_class
from lightning_bge.models.metrics.computable import check_computable
from lightning_bge.models.model_size import ModelSize, check_model, measure_model
from lightning_bge.models.optimizer import OptimizerConfig, ScheduleConfig
from lightning_bge.models.output.export import check_replaceable
from lightning_bge.models.tried_classes import ThreeLayers, try_classes
from lightning_bge.runtime.cache_dir import default_cache_dir
from lightning_bge.runtime.locations import RemotePath
from lightning_bge.runtime.paths import check_folder, check_output, nearest_folder
from lightning_bge.runtime.units import format_bytes
from lightning_bge.types import Schema

Command = Literal["fit", "hpo", "plan", "audit", "predict", "validate", "test"]

TRAINS = ("fit", "hpo", "plan", "audit")
KEEP_RUNS = ("fit", "hpo", "audit")  # they write into the run folder
# of a run folder
FOLDERS = ("checkpoints", "logs", "oof", "predictions", "outer_folds")
FILES = ("config.yaml", "run.json", "summary.json", "report.html", "audit.json", "audit.html", "journal.log")
PREDICTIONS = ("validation.csv", "test.csv", "oof.csv", "nested.csv", "trials.csv", "best.yaml")

log = logging.getLogger("lightning_bge")

T = TypeVar("T")


def preflight(
    command: Command,
    experiment: TextExperiment,
    hpo: StudyConfig | None = None,
    outputs: Mapping[str, str | None] | None = None,
) -> None:
    """Check all that a command will need; nothing is kept that is written, and no weights are read.

    The data are read and tokenized where the command trains, and the test file is read. What is slow comes last.

    Args:
        command: its name.
        experiment: its options, data module and run folder.
        hpo: the options of the study, for commands that have them.
        outputs: files that it writes besides the run folder: name of the option -> path, or None.

    Raises:
        UserError: something is wrong; the message names the option or the file, and the remedy.
    """
    data, trainer = experiment.datamodule, experiment.config["trainer"]
    _check_files_given(command, data)
    _check_paths(command, experiment, outputs or {})
    if command == "hpo" and hpo is not None:
        check_places(hpo)
    model = experiment.config["model"]
    check_model(model["name_or_path"], revision=model["revision"], trust_remote_code=model["trust_remote_code"])
    if command == "fit":
        _check_epochs(trainer)
    else:
        _check_limits(command, dry_run_options(trainer))
    if command in ("validate", "test"):
        _check_evaluated_rows(command, experiment)
    if command not in TRAINS:
        return
    sizes = _model_sizes(experiment, hpo)
    if command == "fit" and not dry_run_options(trainer):
        _check_room_of_fit(experiment.run_dir, sizes[0])
    if command == "hpo" and hpo is not None:
        _check_room_of_study(experiment, hpo, sizes)
    data.setup("fit")
    _check_rows(command, experiment)
    if command == "fit":
        _check_val_interval(trainer, data)
    searched = set(hpo.space) if command == "hpo" and hpo is not None and hpo.space else set()
    if searched.isdisjoint(("model.loss.name", "model.loss.class_path")):
        _check_loss(experiment)
    _check_optimizer(experiment)


def preflight_module(
    command: Command,
    run_dir: Path,
    trainer: Mapping[str, Any],
    hpo: StudyConfig | None = None,
    outputs: Mapping[str, str | None] | None = None,
) -> None:
    """As `preflight` for a module that is not ours, of whose data and model nothing is known: paths and places alone.

    Args:
        command: its name.
        run_dir: the run's folder.
        trainer: the options of the trainer.
        hpo: the options of the study, for commands that have them.
        outputs: files that it writes besides the run folder: name of the option -> path, or None.

    Raises:
        UserError: something is wrong; the message names the option or the file, and the remedy.
    """
    for option, path in (outputs or {}).items():
        if path is not None:
            check_output(option, path)
    if command in KEEP_RUNS:
        check_folder("run_dir", run_dir, FILES, FOLDERS)
    if command == "hpo" and hpo is not None:
        check_places(hpo)
    if trainer.get("fast_dev_run") and command in ("hpo", "plan"):
        _check_limits(command, "trainer.fast_dev_run")


def check_places(hpo: StudyConfig) -> None:
    """Check where a study is kept, shown, and where its files are: each answers, and can be written.

    Raises:
        UserError: one of them can't be used.
    """
    if hpo.storage is not None:
        check_answers(parse_storage(hpo.storage))
    check_trackers(hpo.trackers)
    if hpo.files is None:
        return
    if hpo.files.startswith("memory://"):
        raise ConfigError(
            f"hpo.files: expected a location that outlives this process, got {hpo.files}, its memory. Name a folder, "
            "or a URL like s3://bucket/folder"
        )
    check_files(hpo.files)


def dry_run_options(trainer: Mapping[str, Any]) -> str:
    """The first option of the trainer that makes a run a trial on parts of the data, as `name=value`; empty: none."""
    limits = ("limit_train_batches", "limit_val_batches", "limit_test_batches", "limit_predict_batches")
    values = {name: trainer[name] for name in ("fast_dev_run", "overfit_batches", *limits)}
    found = [(name, value) for name, value in values.items() if value and name not in limits]
    # 1 is one batch, and 1.0 are all
    found += [(name, values[name]) for name in limits if values[name] is not None and repr(values[name]) != "1.0"]
    return "".join(f"trainer.{name}={value}" for name, value in found[:1])


# ---------------------------------------------------------------------- paths


def _check_files_given(command: Command, data: TextDataModule) -> None:
    """Check that the files are named without which a command has nothing to do."""
    needed = {"test": "test_file", "predict": "predict_file"}.get(command, "train_file")
    if getattr(data, needed) is not None or (command == "validate" and data.val_file is not None):
        return
    if command != "test" or data.split.outer_fold is None:
        other = ", or data.val_file" if command == "validate" else ""
        raise ConfigError(f"data.{needed}: {command} needs a file, got null. Set it{other}")


def _check_paths(command: Command, experiment: TextExperiment, outputs: Mapping[str, str | None]) -> None:
    data, model = experiment.datamodule, str(experiment.config["model.name_or_path"])
    files = {name: getattr(data, name) for name in FILE_OPTIONS}
    inputs = {f"data.{name}": expand_files(value) for name, value in files.items() if value is not None}
    inputs["model.name_or_path"] = [model]
    for option, path in outputs.items():
        if path is not None:
            check_output(option, path, inputs)
    check_folder("data.cache_dir", data.cache_dir or default_cache_dir())
    if command not in KEEP_RUNS:
        return
    run_dir = experiment.run_dir.expanduser()
    check_folder("run_dir", run_dir, FILES, FOLDERS)
    if command == "audit":
        return
    for name in PREDICTIONS:
        check_output("run_dir", run_dir / name, inputs)
    exported = run_dir / "model"
    check_replaceable(exported)
    if exported.exists() and exported.resolve() == Path(model).expanduser().resolve():
        raise ConfigError(
            f"model.name_or_path: {model} is the folder that this run would replace. Copy it, or name another run_dir"
        )


# ---------------------------------------------------------------------- the trainer's options


def _check_limits(command: Command, limits: str) -> None:
    """Refuse options of a dry run where results of parts of the data would pass for those of all."""
    if limits and command in ("hpo", "plan"):
        raise ConfigError(
            f"{limits}: a study needs whole epochs, as scores of parts of the data can't be compared. Leave it out; "
            "for a quick trial lower hpo.n_trials and set data.table.max_rows"
        )
    if limits and command == "predict":
        raise ConfigError(f"{limits}: predict writes a row for each row of data.predict_file. Leave it out")
    if limits and command in ("validate", "test"):
        log.warning("%s: the scores are those of a part of the rows", limits)


def _check_epochs(trainer: Mapping[str, Any]) -> None:
    for name in ("max_epochs", "max_steps"):
        if trainer[name] == 0:
            raise ConfigError(f"trainer.{name}: expected 1 or more, got 0: nothing would be trained")
    every, epochs, steps = (trainer[name] for name in ("check_val_every_n_epoch", "max_epochs", "max_steps"))
    if (epochs is None or epochs < 0) and steps < 0:
        raise ConfigError(
            f"trainer.max_epochs: expected 1 or more, or trainer.max_steps, got {epochs}: the learning rate's schedule "
            "needs to know its length"
        )
    if every is not None and every < 1:
        raise ConfigError(f"trainer.check_val_every_n_epoch: expected 1 or more, or null, got {every}")
    if every is not None and epochs is not None and 0 < epochs < every:
        raise ConfigError(
            f"trainer.check_val_every_n_epoch: expected at most trainer.max_epochs={epochs}, got {every}: no epoch "
            "would be validated"
        )


def _check_val_interval(trainer: Mapping[str, Any], data: TextDataModule) -> None:
    interval, steps = trainer["val_check_interval"], -(-len(data.train_rows) // data.rows_per_step)
    if isinstance(interval, int) and trainer["check_val_every_n_epoch"] is not None and interval > steps:
        raise ConfigError(
            f"trainer.val_check_interval: expected at most the {steps} steps of an epoch, got {interval}. Lower it, or "
            "give a part of an epoch, such as 0.5"
        )


def _check_loss(experiment: TextExperiment) -> None:
    """Check that the loss goes with the task and its classes."""
    data, config = experiment.datamodule, experiment.config["model.loss"]
    assert data.schema is not None
    counts = None if data.class_counts is None else data.class_counts.tolist()
    Loss(_config(LossConfig, config), data.schema.task, data.schema.num_outputs, counts)


def _check_optimizer(experiment: TextExperiment) -> None:
    """Try an optimizer and a schedule that are named by their class."""
    options, data, trainer = experiment.config["model"], experiment.datamodule, experiment.config["trainer"]
    optimizer = _config(OptimizerConfig, options["optimizer"])
    schedule = _config(ScheduleConfig, options["schedule"])
    an_epoch, epochs = -(-len(data.train_rows) // data.batch_size), trainer["max_epochs"] or -1
    steps = an_epoch * epochs if epochs > 0 else trainer["max_steps"]
    total = steps if schedule.epochs is None else an_epoch * schedule.epochs
    # a bound on what is tried here: a module tries its own schedule over the exact number of its steps
    try_classes(ThreeLayers(), optimizer, schedule, total_steps=total, steps=min(steps, total))


def _config(kind: type[T], options: Any) -> T:
    """A config of a dataclass, which the options of the command line or of `tune` have as a namespace."""
    return options if isinstance(options, kind) else kind(**options.as_dict())


# ---------------------------------------------------------------------- the model, and room for it


def _model_sizes(experiment: TextExperiment, hpo: StudyConfig | None) -> list[ModelSize]:
    """Of each model that may be trained."""
    config, names = experiment.config["model"], [str(experiment.config["model.name_or_path"])]
    space = parse_space(hpo.space) if hpo is not None and hpo.space else {}
    if "model.name_or_path" in space:
        names = [str(name) for name in space["model.name_or_path"].choices]  # type: ignore[attr-defined]
    lora, head = config["lora"], _config(HeadConfig, config["head"])
    if any(name.startswith("model.head.") for name in space):
        head = HeadConfig()  # some of its arguments may come from the space; a trial tries its own
    return [
        measure_model(
            name,
            revision=config["revision"],
            trust_remote_code=config["trust_remote_code"],
            frozen_layers=config["frozen_layers"],
            lora=_config(LoRAConfig, lora),
            pooling=config["pooling"],
            head=head,
        )
        for name in names
    ]


def _check_room_of_fit(run_dir: Path, size: ModelSize) -> None:
    """For the checkpoints of the best, the last and a recent moment, and the exported model."""
    text = f"three checkpoints ({format_bytes(size.checkpoint)} each) and the exported model"
    _check_room(run_dir, 3 * size.checkpoint + size.exported, text)


def _check_room_of_study(experiment: TextExperiment, hpo: StudyConfig, sizes: list[ModelSize]) -> None:
    """For a checkpoint that is being replaced, and the exported models."""
    checkpoint, model = max(size.checkpoint for size in sizes), max(size.exported for size in sizes)
    models = (experiment.datamodule.num_folds if hpo.ensemble else 1) if hpo.refit else 0
    exported = f" and {models} exported model{'s' * (models > 1)}" * bool(models)
    run_dir, two = experiment.run_dir, f"two checkpoints of a trial ({format_bytes(checkpoint)} each)"
    files = study_files(hpo.files, run_dir)
    if files == run_dir:
        free = _check_room(run_dir, 2 * checkpoint + models * model, two + exported)
    else:
        _check_room(run_dir, models * model, "exported models")
        if isinstance(files, RemotePath):  # a checkpoint passes through a temporary file
            text = "checkpoints of trials, one at a time,"
            _check_room(Path(tempfile.gettempdir()), checkpoint, text, "TMPDIR")
            return
        free = _check_room(files, 2 * checkpoint, two, "hpo.files")
    limit = hpo.pruner.paused_gb
    room = free / 4 if limit is None else limit * 2**30
    if hpo.pruner.name == "asha" and limit != 0 and room < checkpoint:
        log.warning(
            "hpo.pruner.paused_gb: %s hold no checkpoint of a trial (%s): each paused trial that is resumed is trained "
            "from its start again. Free some space, or raise the limit",
            *(format_bytes(round(room)), format_bytes(checkpoint)),
        )


def _check_room(run_dir: Path, needed: int, text: str, option: str = "run_dir") -> int:
    """Free bytes for the folder of an option, what it holds already counted as free.

    Raises:
        ConfigError: they are fewer than are needed.
    """
    folder = nearest_folder(run_dir)
    held = [path for name in ("checkpoints", "model") for path in (run_dir.expanduser() / name).rglob("*")]
    free = shutil.disk_usage(folder).free + sum(path.stat().st_size for path in held if path.is_file())
    if free < needed:
        raise ConfigError(
            f"{option}: {text} need {format_bytes(needed)}, but {format_bytes(free)} are free in {folder}. Free some "
            f"space, or name a {option} on another disk"
        )
    return free


# ---------------------------------------------------------------------- rows


def _check_rows(command: Command, experiment: TextExperiment) -> None:
    """Check that the metric can be computed wherever it will be."""
    data, metric = experiment.datamodule, experiment.monitor.metric
    assert data.schema is not None
    assert metric is not None
    if isinstance(metric, dict):
        try_class(metric, data.schema)
    labels, groups = data.labels_and_groups("val")
    assert labels is not None
    folds = data.folds or (np.arange(len(labels)),)
    for k, rows in enumerate(folds):
        where = "data.val_file" if data.val_file is not None else f"validation rows of fold {k}"
        check_computable(data.schema, metric, labels[rows], None if groups is None else groups[rows], where)
    if data.val_file is not None:
        _warn_of_missing_classes(data.schema, labels)
    if command in ("fit", "hpo") and data.test_file is not None:
        tested, groups = data.labels_and_groups("test")
        assert tested is not None
        check_computable(data.schema, metric, tested, groups, "data.test_file")


def _check_evaluated_rows(command: Literal["validate", "test"], experiment: TextExperiment) -> None:
    """Read the rows, and warn where the metric can't be computed on them: the others are shown."""
    data, metric = experiment.datamodule, experiment.monitor.metric
    data.setup(command)
    labels, groups = data.labels_and_groups("val" if command == "validate" else "test")
    rows = data.outer_rows if command == "test" and data.test_file is None else slice(None)
    if command == "validate" and data.val_file is None and data.folds:
        rows = data.val_rows
    assert data.schema is not None
    assert labels is not None
    assert metric is not None
    try:
        where = f"the rows of {command}"
        check_computable(data.schema, metric, labels[rows], None if groups is None else groups[rows], where)
    except DataError as error:
        log.warning("%s", error)


def _warn_of_missing_classes(schema: Schema, labels: np.ndarray) -> None:
    """Say which classes have no rows in the validation file; folds are checked where they are made."""
    counts = count_classes(labels, schema)
    if counts is None or counts.all():
        return
    missing = [name for name, count in zip(schema.labels, counts, strict=True) if not count]
    shown = ", ".join(missing[:10]) + ", ..." * (len(missing) > 10)
    log.warning("data.val_file has no row of these classes, so that its scores say nothing of them: %s", shown)
