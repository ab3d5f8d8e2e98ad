"""Callbacks that can't work: refused by `fit` before anything is written, left out elsewhere."""

from __future__ import annotations

import csv
from collections.abc import Callable
from pathlib import Path

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_bge.cli.user_callbacks import check_callbacks
from lightning_bge.errors import ConfigError
from lightning_bge.models.metrics.config import MonitorConfig, check_monitor
from lightning_bge.models.metrics.logged import logged_names
from lightning_bge.runtime.callback_kinds import UNUSABLE

Run = Callable[..., tuple[int, str, str]]
ARGUMENTS = {
    "GradientAccumulationScheduler": "{scheduling: {0: 2}}",
    "ModelPruning": "{pruning_fn: l1_unstructured}",
    "StochasticWeightAveraging": "{swa_lrs: 0.01}",
}
NAMES = ["BackboneFinetuning" if kind.__name__ == "BaseFinetuning" else kind.__name__ for kind in UNUSABLE]


def option(name: str, arguments: str = "{}") -> str:
    return f"{{class_path: lightning.pytorch.callbacks.{name}, init_args: {arguments}}}"


@pytest.mark.parametrize("name", NAMES)
def test_fit_refuses_what_can_not_work_and_writes_nothing(
    run: Run, options: list[str], tmp_path: Path, name: str
) -> None:
    status, out, err = run("fit", *options, "--trainer.callbacks", f"[{option(name, ARGUMENTS.get(name, '{}'))}]")
    assert status == 2, out + err
    [line] = err.splitlines()
    assert line.startswith(f"lightning-bge: trainer.callbacks: {name} can't be used, as ")
    assert "Leave it out" in line
    assert not (tmp_path / "study").exists()


def test_a_study_leaves_them_out_with_a_line_for_each_kind(run: Run, search: list[str]) -> None:
    given = [option("LearningRateFinder"), option("ModelCheckpoint"), option("ModelCheckpoint", "{monitor: val_acc}")]
    status, out, err = run(*search, "--trainer.callbacks", f"[{', '.join(given)}]", "--hpo.refit", "false")
    assert status == 0, err
    assert err.count("LearningRateFinder is left out, as a schedule sets the learning rate") == 1
    assert err.count("ModelCheckpoint is left out, as hpo has no logger") == 1
    assert " 0 failed" in out


def test_known_names_are_those_that_a_run_logs(run: Run, options: list[str], tmp_path: Path) -> None:
    status, _, err = run("fit", *options, "--trainer.max_epochs", "1", "--monitor.metric", "mcc")
    assert status == 0, err
    with (tmp_path / "study" / "logs" / "version_0" / "metrics.csv").open(newline="") as file:
        logged = set(csv.DictReader(file).fieldnames or ())
    monitor = check_monitor(MonitorConfig(metric="mcc"), "binary")
    named = {name for name in logged_names("binary", monitor, grouped=True) if name != "train_loss_step"}
    assert named == {name for name in logged if name.startswith("val_") or name == "train_loss"}


@pytest.mark.parametrize(("kind", "arguments"), [("EarlyStopping", ""), ("ModelCheckpoint", ", mode: max")])
def test_fit_refuses_an_unknown_monitor(
    run: Run, options: list[str], tmp_path: Path, kind: str, arguments: str
) -> None:
    status, _, err = run(
        "fit", *options, "--trainer.callbacks", f"[{option(kind, f'{{monitor: val_acc{arguments}}}')}]"
    )
    assert status == 2, err
    assert f"{kind}.monitor is val_acc, which is not logged (did you mean val_accuracy?)" in err
    assert not (tmp_path / "study").exists()


class Own(Callback):
    """Of somebody else; it may log anything."""


def test_which_monitors_are_accepted() -> None:
    known = logged_names("regression", check_monitor(MonitorConfig(), "regression"), grouped=False)
    check_callbacks([EarlyStopping("val_spearman"), ModelCheckpoint(monitor="train_loss"), ModelCheckpoint()], known)
    check_callbacks([EarlyStopping("own_metric"), Own()], known)
    check_callbacks(None, known)
    for wrong in ("val_f1", "val_tuned_f1", "own_metric", "test_mse"):
        with pytest.raises(ConfigError, match=f"EarlyStopping.monitor is {wrong}, which is not logged"):
            check_callbacks(EarlyStopping(wrong), known)
