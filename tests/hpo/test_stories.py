"""Defects of real projects of this kind, and the traps of Optuna behind them: each once, as it happened, and mended."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import optuna
import pytest
import torch
from lightning.pytorch import Callback
from optuna.pruners import HyperbandPruner, MedianPruner
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.data import DataLoader

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.forecast.preview import forecast
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner, startup_trials
from lightning_bge.hpo.pruning.pruners import FoldEndPruner, StartupTrialsPruner
from lightning_bge.hpo.steps import Steps
from lightning_bge.models.classifier import BGEClassifier
from tests.helpers.curve_study import run
from tests.helpers.small_search import make, small_data, write_files

optuna.logging.set_verbosity(optuna.logging.WARNING)


# ---------------------------------------------------------------------- Hyperband pruned 0 of 94 trials


def test_hyperband_that_is_told_once_at_the_end_prunes_none_of_94_trials() -> None:
    """Rungs were set in folds (1..5), and the objective reported once, after the last fold, and asked then."""
    study = optuna.create_study(study_name="s", direction="maximize", pruner=HyperbandPruner(1, 5, 4))
    spent = 0
    for number in range(94):
        trial = study.ask()
        spent += 5  # folds, all trained before anything is known
        trial.report(-number, 0)
        assert not trial.should_prune()
        study.tell(trial, -number)
    assert spent == 94 * 5


def test_the_same_settings_are_refused_before_the_first_trial() -> None:
    with pytest.raises(ConfigError, match=r"could never prune with 94 trials of 1 steps.*Use more epochs or folds"):
        forecast(PrunerConfig("hyperband"), 94, Steps(1, 1))


def test_with_reports_over_folds_and_epochs_the_same_hyperband_prunes() -> None:
    steps = Steps(5, 2)
    curves = -np.arange(94.0)[:, None] + np.zeros((94, steps.total))
    pruned = run(build_pruner(PrunerConfig("hyperband", n_startup_trials=9), 94, steps), curves)
    assert sum(step is not None for step in pruned) > 75
    assert min(step for step in pruned if step) == forecast(PrunerConfig("hyperband"), 94, steps).first


# ---------------------------------------------------------------------- an effective batch of 57 instead of 64


class Steps64(Callback):
    """What each optimizer step saw."""

    def __init__(self) -> None:
        self.rows: list[list[int]] = []
        self.left: list[bool] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.rows.append([row for micro in batch.micro for row in micro.rows.tolist()])
        self.left.append(any(p.grad is not None for p in pl_module.parameters()))


def test_an_effective_batch_of_64_is_64_rows_and_the_last_window_is_stepped_and_cleared(tmp_path: Path) -> None:
    """`64 // 19` micro-batches of 19 made 57; the rest of an epoch was neither stepped nor cleared."""
    folder = write_files(tmp_path)
    head, *rows = (folder / "train.csv").read_text().splitlines()
    (folder / "train.csv").write_text("\n".join([head, *rows * 4]) + "\n")  # 160 rows, of which 128 to train on
    batching = BatchingConfig(max_tokens=100)  # a handful of rows: 50 is no multiple of them
    data = small_data(folder, batch_size=50, batching=batching)
    seen = Steps64()
    settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    trainer = pl.Trainer(**settings, accelerator="cpu", max_epochs=2, limit_val_batches=0, callbacks=[seen])
    trainer.fit(BGEClassifier(str(folder / "model")), datamodule=data)
    assert [len(rows) for rows in seen.rows] == [50, 50, 28] * 2
    assert trainer.global_step == 6
    for epoch in (seen.rows[:3], seen.rows[3:]):
        assert sorted(row for rows in epoch for row in rows) == sorted(set(data.train_rows.tolist()))
    assert not any(seen.left)  # nothing leaks into the next step or epoch


# ---------------------------------------------------------------------- every trial built and tokenized everything


def test_a_search_reads_its_model_and_tokenizes_its_texts_once_and_computes_no_padding(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_files(tmp_path)
    computed: list[int] = []

    class Tokens(Callback):
        def on_train_batch_start(self, trainer: Any, pl_module: Any, batch: Any, batch_idx: int) -> None:
            for micro in batch.micro:
                assert len(micro.input_ids) == sum(micro.lengths)  # every position is a token of some text
                computed.append(len(micro.input_ids))

    objective = make(folder, (Tokens(),))
    with caplog.at_level(logging.INFO):
        study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1))
        study.optimize(objective, n_trials=4)
    assert objective.encoder.loads == 1
    assert caplog.text.count("tokenizing 40 rows") == 1
    assert len(list((folder / "cache").rglob("*.arrow"))) == 1
    # 4 trials x 2 folds x 2 epochs of 20 rows, of at most 11 tokens each: nothing near 32, the limit
    assert sum(computed) < 4 * 2 * 2 * 20 * 12


# ---------------------------------------------------------------------- traps of the pruners


def test_trap_max_resource_auto_differs_between_workers() -> None:
    """Each process fixes its own maximum from the trials that it happens to see; ours is given as a number."""
    study = optuna.create_study(direction="maximize", study_name="s")
    pruners = [HyperbandPruner(max_resource="auto"), HyperbandPruner(max_resource="auto")]
    for pruner, steps in zip(pruners, (3, 27), strict=True):
        trial = study.ask()
        for step in range(1, steps + 1):
            trial.report(0.0, step)
        study.tell(trial, 0.0)
        running = study.ask()
        running.report(0.0, 0)
        pruner.prune(study, study.trials[-1])
    assert pruners[0]._n_brackets != pruners[1]._n_brackets
    ours = build_pruner(PrunerConfig("hyperband", fold_confidence=None), 20, Steps(3, 4))
    assert isinstance(ours, StartupTrialsPruner)
    assert ours.inner._max_resource == 12


def test_trap_the_bracket_depends_on_the_studys_name(tmp_path: Path) -> None:
    curves = -np.arange(30.0)[:, None] + np.zeros((30, 12))
    config = PrunerConfig("hyperband", n_startup_trials=0)
    one, again, other = (run(build_pruner(config, 30, Steps(1, 12)), curves, name) for name in ("a", "a", "b"))
    assert one == again
    assert one != other


class Score(pl.LightningModule):
    """Logs 0.1, 0.2, ... as its score."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch: Any, index: int) -> Any:
        return self.layer(batch).sum()

    def validation_step(self, batch: Any, index: int) -> None:
        self.log("val_score", torch.tensor(0.1 * (self.current_epoch + 1)))

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=0.0)


@pytest.mark.filterwarnings("ignore", "default:.*is overwritten")
def test_trap_optunas_own_callback_counts_the_first_fold_alone() -> None:
    study = optuna.create_study(direction="maximize", pruner=optuna.pruners.NopPruner())
    trial = study.ask()
    settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    for _ in range(3):
        callback = PyTorchLightningPruningCallback(trial, "val_score")
        trainer = pl.Trainer(**settings, accelerator="cpu", max_epochs=2, num_sanity_val_steps=0, callbacks=[callback])
        trainer.fit(Score(), DataLoader(torch.zeros(2, 1)), DataLoader(torch.zeros(1, 1)))
    assert list(study.trials[0].intermediate_values) == [0, 1]  # of 3 folds x 2 epochs


def test_trap_an_easy_first_fold_shields_a_bad_trial_from_the_median() -> None:
    good = [[0.9, 0.9, 0.85, 0.85, 0.84, 0.84]] * 6
    bad = [[0.95, 0.95, 0.6, 0.55, 0.5, 0.5]]  # best in the first fold, then far behind
    assert run(MedianPruner(n_startup_trials=0, n_warmup_steps=1), good + bad)[-1] is None
    # the differences between folds have a spread now
    spread = [[0.9, 0.9, 0.85, 0.85, 0.84, 0.83 + 0.002 * k] for k in range(6)]
    assert run(FoldEndPruner(None, 2, 3), spread + bad)[-1] in (2, 4)


def test_trap_a_fixed_number_of_startup_trials_eats_the_gain_of_a_small_study() -> None:
    fixed = forecast(PrunerConfig("median", n_startup_trials=30), 40, Steps(3, 4))
    scaled = forecast(PrunerConfig("median"), 40, Steps(3, 4))
    assert fixed.cost > 0.75
    assert scaled.cost < fixed.cost - 0.2
    assert [startup_trials(PrunerConfig("median"), n) for n in (40, 2000)] == [4, 30]


def test_trap_samplers_see_all_trials_whatever_the_bracket() -> None:
    """TPE's filter by bracket looks for Hyperband as the study's own pruner, and has no effect there either."""
    seen: list[int] = []

    class Counting(optuna.samplers.RandomSampler):
        def sample_independent(self, study: Any, *args: Any) -> Any:
            seen.append(len(study._get_trials(deepcopy=False, use_cache=True)))
            return super().sample_independent(study, *args)

    for pruner in (HyperbandPruner(1, 12, 4), build_pruner(PrunerConfig("hyperband"), 20, Steps(1, 12))):
        seen.clear()
        study = optuna.create_study(study_name="s", pruner=pruner, sampler=Counting(seed=0))
        for _ in range(6):
            trial = study.ask()
            trial.suggest_float("x", 0.0, 1.0)
            trial.report(0.0, 1)
            trial.should_prune()
            study.tell(trial, 0.0)
        assert seen == [1, 2, 3, 4, 5, 6]


def test_journal_keeps_curves_as_plain_data(tmp_path: Path) -> None:
    study = optuna.create_study(direction="minimize", sampler=optuna.samplers.RandomSampler(seed=1))
    study.optimize(make(write_files(tmp_path)), n_trials=1)
    curve = study.trials[0].user_attrs["curve"]
    assert json.loads(json.dumps(curve)) == [[list(report) for report in fold] for fold in curve]
