"""The contenders of `hpo_race.py`: the same trials by lightning-bge, transformers, sentence-transformers, Lightning.

Each search is what its users write, in one process; beside it there are only a clock and the fixed list of trials,
which `enqueue_trial` puts into the study before it starts.
"""

from __future__ import annotations

import gc
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import lightning as L
import numpy as np
import optuna
import torch
import yaml
from common import Job, encode, training_arguments
from measures import StepClock, peak_memory_mib
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback
from peers import BATCH, TextbookClassifier, loader, textbook_trainer, tuned_options
from transformers import (
    AutoModelForSequenceClassification,
    AutoTokenizer,
    DataCollatorWithPadding,
    TrainerCallback,
    TrainingArguments,
)
from transformers import Trainer as TransformersTrainer

import lightning_bge.cli.main
from lightning_bge.hpo.storage.journal import JOURNAL, open_storage
from lightning_bge.hpo.trials import parameter_set_of

NAME = "race"
# What is searched: name, lowest, highest, logarithmic. Warm-up is a share of the steps.
SPACE = (("lr", 1e-5, 3e-4, True), ("weight_decay", 1e-4, 0.1, True), ("warmup", 0.0, 0.2, False))
OUR_NAMES = {"lr": "model.optimizer.lr", "weight_decay": "model.optimizer.weight_decay"}
OUR_NAMES["warmup"] = "model.schedule.warmup"
# the share of warm-up steps has to be a float from the start: the Trainer casts a trial's value to the default's type
TRAINER_NAMES = {"lr": "learning_rate", "weight_decay": "weight_decay", "warmup": "warmup_steps"}
SAME = {name: name for name, *_ in SPACE}

Trial = dict[str, float]
CLOCK = StepClock()  # of this process; what the command line makes of `searches.LightningSteps` reports here


@dataclass(frozen=True)
class Race:
    """What every contender does.

    Attributes:
        job: model, both files (whole), epochs, batch, seed.
        trials: the fixed list.
        folder: an empty one.
        pruned: whether trials may be stopped early.
    """

    job: Job
    trials: tuple[Trial, ...]
    folder: str
    pruned: bool = False

    def new_study(self, storage: optuna.storages.BaseStorage, names: dict[str, str]) -> dict[str, Any]:
        """A study whose queue holds the trials; the arguments by which `create_study` finds it again."""
        found: dict[str, Any] = {"storage": storage, "study_name": NAME, "load_if_exists": True}
        study = optuna.create_study(direction="maximize", **found)
        for trial in self.trials:
            study.enqueue_trial({names[name]: value for name, value in trial.items()})
        return found


class LightningSteps(L.Callback):
    """Drives the clock: a training step from its start to its end, a validation loop from its start to its end."""

    def on_train_batch_start(self, trainer: L.Trainer, *args: Any, **kwargs: Any) -> None:
        if trainer.global_step == 0:
            CLOCK.first_steps.append(time.time())
        CLOCK.start()

    def on_train_batch_end(self, *args: Any, **kwargs: Any) -> None:
        CLOCK.stop_step()

    def on_validation_start(self, trainer: L.Trainer, pl_module: Any) -> None:
        CLOCK.start()

    def on_validation_end(self, trainer: L.Trainer, pl_module: Any) -> None:
        if not trainer.sanity_checking:
            CLOCK.stop_validation()


class TransformersSteps(TrainerCallback):
    """As `LightningSteps`, for training; a step is a whole effective batch."""

    def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
        CLOCK.start()

    def on_step_end(self, *args: Any, **kwargs: Any) -> None:
        CLOCK.stop_step()


class TimedEvaluation:
    """As `LightningSteps`, for the validation of transformers' Trainer and of those made of it."""

    def evaluation_loop(self, *args: Any, **kwargs: Any) -> Any:
        with CLOCK.validating():
            return super().evaluation_loop(*args, **kwargs)  # type: ignore[misc]


class TimedTrainer(TimedEvaluation, TransformersTrainer):
    """The Trainer with its validation timed."""


def suggest(trial: optuna.Trial, names: dict[str, str]) -> Trial:
    """The trial's values, under their own names."""
    return {names[name]: trial.suggest_float(names[name], low, high, log=log) for name, low, high, log in SPACE}


# ---------------------------------------------------------------------- contenders: race -> the study when it has ended


def search_ours(race: Race) -> optuna.Study:
    """`lightning-bge hpo` as from a shell, with its defaults, but without what follows: the refit and the baseline."""
    job, run_dir = race.job, Path(race.folder, NAME)
    settings = {
        "run_dir": str(run_dir),
        "seed_everything": job.seed,
        "model": {"name_or_path": job.model, "task": job.task},
        "data": {
            "train_file": job.train_file,
            "val_file": job.dev_file,
            "text_columns": list(job.text_columns),
            "label_column": job.label_column,
            "max_length": job.max_length,
            "batch_size": job.batch,
            "cache_dir": str(Path(race.folder, "cache")),
            "table": {"labels": list(job.labels)},
        },
        "monitor": {"metric": "accuracy", "objective": "last"},
        "trainer": {
            "max_epochs": job.epochs,
            "accelerator": job.device,
            "callbacks": [{"class_path": "searches.LightningSteps"}],
        },
        "hpo": {
            "n_trials": len(race.trials),
            "space": {OUR_NAMES[name]: {"low": low, "high": high, "log": log} for name, low, high, log in SPACE},
            "refit": False,
            "baseline": False,
            **({} if race.pruned else {"pruner": {"name": "none"}}),
        },
    }
    run_dir.mkdir()
    storage = open_storage(run_dir / JOURNAL)
    race.new_study(storage, OUR_NAMES)
    config = Path(race.folder, "hpo.yaml")
    config.write_text(yaml.safe_dump(settings, sort_keys=False), encoding="utf-8")
    with patch.object(sys, "argv", ["lightning-bge", "hpo", "-c", str(config)]):
        lightning_bge.cli.main.main()
    return optuna.load_study(study_name=NAME, storage=storage)


def optuna_options(race: Race) -> dict[str, Any]:
    """What `hyperparameter_search` hands on to Optuna."""
    pruner = optuna.pruners.MedianPruner() if race.pruned else optuna.pruners.NopPruner()
    return {**race.new_study(optuna.storages.InMemoryStorage(), TRAINER_NAMES), "pruner": pruner}


def trainer_arguments(race: Race, **options: Any) -> dict[str, Any]:
    """Arguments of a search by a Trainer: validation each epoch, the shared settings, defaults else."""
    return training_arguments(race.job, race.folder, warmup_steps=0.0, eval_strategy="epoch", **options)


def run_search(race: Race, trainer: TransformersTrainer, metric: str) -> optuna.Study:
    found = optuna_options(race)
    trainer.hyperparameter_search(
        backend="optuna",
        direction="maximize",
        hp_space=lambda trial: suggest(trial, TRAINER_NAMES),
        compute_objective=lambda metrics: metrics[metric],
        n_trials=len(race.trials),
        **found,
    )
    return optuna.load_study(study_name=NAME, storage=found["storage"])


def search_trainer(race: Race, size: int | None = None) -> optuna.Study:
    """`Trainer.hyperparameter_search` as transformers' guide shows it.

    Args:
        race: what is searched.
        size: None: default arguments. Else tuned by hand, with so many rows in a micro-batch.
    """
    job = race.job
    tokenizer = AutoTokenizer.from_pretrained(job.model)
    assert job.dev_file is not None
    options = {} if size is None else tuned_options(size, job.batch)
    trainer = TimedTrainer(
        model_init=lambda: AutoModelForSequenceClassification.from_pretrained(job.model, num_labels=len(job.labels)),
        args=TrainingArguments(**trainer_arguments(race, **options)),
        train_dataset=encode(job, job.read(job.train_file)),
        eval_dataset=encode(job, job.read(job.dev_file)),
        processing_class=tokenizer,
        data_collator=DataCollatorWithPadding(tokenizer),
        compute_metrics=lambda found: {"accuracy": float(np.mean(found.predictions.argmax(-1) == found.label_ids))},
        callbacks=[TransformersSteps()],
    )
    return run_search(race, trainer, "eval_accuracy")


def search_cross_encoder(race: Race) -> optuna.Study:
    """`CrossEncoderTrainer.hyperparameter_search` as sentence-transformers' guide shows it, with its evaluator."""
    from datasets import Dataset
    from sentence_transformers.cross_encoder import (
        CrossEncoder,
        CrossEncoderTrainer,
        CrossEncoderTrainingArguments,
        losses,
    )
    from sentence_transformers.cross_encoder.evaluation import CrossEncoderClassificationEvaluator

    class TimedCrossEncoderTrainer(TimedEvaluation, CrossEncoderTrainer):
        """The trainer with its validation timed."""

    def columns(path: str) -> tuple[list[str], list[str], list[int]]:
        table = job.read(path)
        assert table.labels is not None
        first, second = zip(*table.texts, strict=True)
        return list(first), list(second), [job.labels.index(str(label)) for label in table.labels]

    job = race.job
    assert job.dev_file is not None
    first, second, labels = columns(job.train_file)
    rows = {"premise": first, "hypothesis": second, "label": [float(label) for label in labels]}
    first, second, labels = columns(job.dev_file)
    pairs = [list(pair) for pair in zip(first, second, strict=True)]
    trainer = TimedCrossEncoderTrainer(
        model_init=lambda: CrossEncoder(job.model, num_labels=1, max_length=job.max_length, device=job.device),
        args=CrossEncoderTrainingArguments(**trainer_arguments(race)),
        train_dataset=Dataset.from_dict(rows),
        loss=losses.BinaryCrossEntropyLoss,
        evaluator=CrossEncoderClassificationEvaluator(pairs, labels, name="dev"),
        callbacks=[TransformersSteps()],
    )
    return run_search(race, trainer, "eval_dev_accuracy")


def search_textbook(race: Race) -> optuna.Study:
    """Lightning with Optuna as the examples show it: every trial reads, tokenizes and loads for itself."""
    job = race.job

    def objective(trial: optuna.Trial) -> float:
        assert job.dev_file is not None
        L.seed_everything(job.seed, verbose=False)
        train, dev = (encode(job, job.read(path)) for path in (job.train_file, job.dev_file))
        module = TextbookClassifier(job.model, **suggest(trial, SAME))
        pruning = [PyTorchLightningPruningCallback(trial, monitor="val_accuracy")] if race.pruned else []
        trainer = textbook_trainer(job, [LightningSteps(), *pruning])
        trainer.fit(module, loader(job, train, shuffle=True), loader(job, dev, shuffle=False))
        return trainer.callback_metrics["val_accuracy"].item()

    pruner = optuna.pruners.MedianPruner() if race.pruned else optuna.pruners.NopPruner()
    study = optuna.create_study(**race.new_study(optuna.storages.InMemoryStorage(), SAME), pruner=pruner)
    study.optimize(objective, n_trials=len(race.trials))
    return study


OURS = "lightning-bge"
TUNED = {f"Trainer tuned {size}x{BATCH // size}": partial(search_trainer, size=size) for size in (8, 4, 16, 32)}
SEARCHES: dict[str, Callable[[Race], optuna.Study]] = {
    OURS: search_ours,
    "Trainer": search_trainer,
    **TUNED,
    "CrossEncoderTrainer": search_cross_encoder,
    "textbook Lightning": search_textbook,
}
NAMES = {OURS: OUR_NAMES, "textbook Lightning": SAME}


def import_all(name: str, job: Job) -> None:
    """Import what is imported on first use, and let torch start its threads: a step of transformers' model."""
    if name == "CrossEncoderTrainer":
        import datasets  # noqa: F401
        import sentence_transformers.cross_encoder.evaluation  # noqa: F401
    model = AutoModelForSequenceClassification.from_pretrained(job.model).to(job.device)
    tokens = AutoTokenizer.from_pretrained(job.model)("one", "two", return_tensors="pt").to(job.device)
    loss = model(**tokens).logits.sum()
    loss.backward()
    torch.optim.AdamW(model.parameters()).step()
    del model, tokens, loss
    gc.collect()


def describe_trials(study: optuna.Study, names: dict[str, str]) -> list[dict[str, Any]]:
    """Each trial's parameters under the shared names, how it ended, and its value; of one that was resumed its end."""
    latest = {parameter_set_of(trial): trial for trial in study.get_trials(deepcopy=False)}  # failed ones too
    return [
        {
            "number": point,
            "params": {name: trial.params[names[name]] for name in SAME},
            "state": trial.state.name,
            "value": trial.value,
            "last_report": trial.last_step,
        }
        for point, trial in latest.items()
    ]


def summary_of(study: optuna.Study, wall: float, trials: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """What is reported of one search."""
    inside = CLOCK.training + CLOCK.validation
    begun = [trial.datetime_start.timestamp() for trial in study.trials if trial.datetime_start]
    return {
        # only where the study keeps one process's trials in their order, and the clock sees a trial's first step
        "first_step_ms": [(first - start) * 1e3 for start, first in zip(begun, CLOCK.first_steps, strict=False)],
        "wall_seconds": wall,
        "training_seconds": CLOCK.training,
        "validation_seconds": CLOCK.validation,
        "outside_seconds": wall - inside,
        "outside_share": (wall - inside) / wall,
        "steps": CLOCK.steps,
        "validations": CLOCK.validations,
        "pruned": sum(trial["state"] == TrialState.PRUNED.name for trial in trials),
        "best_value": study.best_value,
        "trials": list(trials),
        "threads": torch.get_num_threads(),
        "peak_memory_mib": peak_memory_mib(),
    }
