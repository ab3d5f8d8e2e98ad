"""The fold models of the best trial, exported as one predictor that averages their scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from lightning_bge.hpo.finish.refit import Winner, describe_schedule, describe_threshold
from lightning_bge.hpo.trial.outer_fold import save_if_outer_fold
from lightning_bge.models.ensemble import (
    average_predictions,
    ensemble_members,
    ensemble_record,
    member_module,
    start_members,
    write_ensemble,
)
from lightning_bge.models.metrics.compute import compute_metrics
from lightning_bge.models.output.prediction_file import write_predictions
from lightning_bge.runtime.memory import release

MEMBERS = "members"  # folder in the run folder: models that are trained, until all of them are


def export_ensemble(winner: Winner, run_dir: Path) -> dict[str, Any]:
    """Train a model on each fold's training rows, to the epoch that was scored there; export them; score the test file.

    A model that is trained is not trained again when the call is repeated after a stop.

    Args:
        winner: the best trial.
        run_dir: the run's folder.

    Returns:
        What it adds to the summary: `model_dir`, `ensemble`, and `test` where there is a test file.

    Raises:
        Stopped: as requested; the next call goes on with the model that was being trained.
    """
    folder, epochs = run_dir / "model", winner.trial.user_attrs["fold_epochs"]
    source = {"trial": winner.trial.number, "fold_epochs": epochs, "params": winner.params}
    source |= {"threshold": winner.schema.threshold, "temperature": winner.temperature}
    source = json.loads(json.dumps(source))
    try:
        if (ensemble_record(folder) or {}).get("source") != source:
            start_members(run_dir / MEMBERS, source)
            for fold, number in enumerate(epochs):
                _train_member(winner, run_dir / MEMBERS / _name(fold), fold, number)
            tokenizer, names = winner.build(winner.params).datamodule.new_tokenizer(), [*map(_name, range(len(epochs)))]
            write_ensemble(run_dir / MEMBERS, names, folder, schema=winner.schema, tokenizer=tokenizer, source=source)
        return {"model_dir": str(folder), "ensemble": _describe(winner)} | _test(winner, run_dir, folder)
    finally:
        release(host=False)


def _name(fold: int) -> str:
    return f"fold-{fold}"


def _train_member(winner: Winner, folder: Path, fold: int, epochs: int) -> None:
    if folder.is_dir():  # an export appears whole or not at all
        return
    setup = winner.build(winner.params)
    setup.datamodule.select_fold(fold)
    winner.fit(setup, epochs)
    setup.model.export(folder, setup.datamodule.new_tokenizer())


def _test(winner: Winner, run_dir: Path, folder: Path) -> dict[str, Any]:
    """Score the test file with the averaged scores; empty where there is none."""
    setup, found = winner.build(winner.params), []
    if not setup.datamodule.has_test_rows:
        return {}
    setup.datamodule.select_fold(None)  # weights of classes in the loss are those of all rows
    for member in ensemble_members(folder):
        module = member_module(setup.model, member)
        setup.make_trainer().test(module, datamodule=setup.datamodule, verbose=False)
        assert module.predictions is not None
        found.append(module.predictions)
    predictions = average_predictions(winner.schema.task, found)
    assert predictions.labels is not None
    assert module.loss is not None
    write_predictions(run_dir / "test.csv", winner.schema, predictions)
    monitored, loss = module.monitored, module.loss.cpu()
    metrics = compute_metrics(winner.schema, predictions, per_class=True, monitored=monitored)
    value = loss(predictions.logits, predictions.labels) / loss.normalizer(predictions.labels)
    save_if_outer_fold(run_dir, setup.datamodule, predictions, loss)
    return {"test": {**metrics, "loss": float(value)}}


def _describe(winner: Winner) -> dict[str, Any]:
    setup, members = winner.build(winner.params), []
    for fold, epochs in enumerate(winner.trial.user_attrs["fold_epochs"]):
        setup.datamodule.select_fold(fold)
        members.append({"folder": _name(fold), "rows": len(setup.datamodule.train_rows), "epochs": epochs})
    return {
        "members": members,
        "schedule": describe_schedule(setup, winner.epochs),
        **describe_threshold(winner, setup),
    }
