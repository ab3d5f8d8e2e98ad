"""`tune` with a function that makes modules of another project."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.distributions import CategoricalDistribution, FloatDistribution
from optuna.trial import TrialState

from lightning_bge.cli.main import main
from lightning_bge.errors import ConfigError
from lightning_bge.tuning import TuneResult, plan, tune
from tests.helpers.other_project import Folds, Net, Split

SPACE = {"lr": FloatDistribution(0.001, 0.1, log=True), "width": CategoricalDistribution([4, 8])}
PLACES = ("construction", "training_step", "backward", "optimizer", "validation_step", "checkpoint")


def build(params: dict[str, Any]) -> tuple[Any, Any]:
    return Net(**params), Folds()


def search(folder: Path, function: Callable[[dict[str, Any]], Any] = build, **options: Any) -> TuneResult:
    given: dict[str, Any] = {"n_trials": 4, "max_epochs": 2, "trainer": {"accelerator": "cpu"}}
    return tune(function, SPACE, run_dir=folder / "run", **{**given, **options})


def test_a_study_of_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    found = search(tmp_path, monitor={"objective": "last"}, seed_replicates=1)
    assert found.summary is not None
    assert found.summary["n_failed"] == 0
    assert set(found.best_params) == {"lr", "width"}
    assert found.model_dir is None
    assert "with seed 43" in capsys.readouterr().out
    before = [trial.params for trial in found.study.trials]
    again = search(tmp_path, n_trials=5, monitor={"objective": "last"}, seed_replicates=1)
    assert [trial.params for trial in again.study.trials][: len(before)] == before
    assert "width:" in (tmp_path / "run" / "best.yaml").read_text()
    assert (tmp_path / "run" / "report.html").is_file()


def test_the_package_pytorch_lightning(tmp_path: Path) -> None:
    pl = pytest.importorskip("pytorch_lightning", reason="newer versions of lightning bring it")

    class Twin(pl.LightningModule):  # type: ignore[misc,name-defined]
        def __init__(self, lr: float, width: int) -> None:
            super().__init__()
            self.net, self.lr = torch.nn.Linear(4, 1), lr

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            return torch.nn.functional.mse_loss(self.net(batch[0]), batch[1])

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            self.log("val_loss", self.training_step(batch, batch_idx))

        def configure_optimizers(self) -> Any:
            return torch.optim.SGD(self.parameters(), self.lr)

        def train_dataloader(self) -> Any:
            return Split().train_dataloader()

        def val_dataloader(self) -> Any:
            return Split().val_dataloader()

    found = search(tmp_path, lambda params: (Twin(**params), None))
    assert found.summary is not None
    assert found.summary["n_failed"] == 0
    assert importlib.import_module("pytorch_lightning").Trainer is not importlib.import_module("lightning").Trainer


class Fault(RuntimeError):
    """Is none of memory."""


def out_of_memory() -> None:
    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")


def failing(place: str, trials: list[int]) -> Callable[[dict[str, Any]], Any]:
    """A function whose second parameter set runs out of memory in one place."""
    seen: list[dict[str, Any]] = []

    class Failing(Net):
        fails = False

        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.fails and place == "training_step":
                out_of_memory()
            loss = super().training_step(batch, batch_idx)
            if self.fails and place == "backward":
                loss.register_hook(lambda grad: out_of_memory())
            return loss

        def validation_step(self, batch: Any, batch_idx: int) -> None:
            if self.fails and place == "validation_step":
                out_of_memory()
            super().validation_step(batch, batch_idx)

        def optimizer_step(self, *args: Any, **options: Any) -> None:
            super().optimizer_step(*args, **options)
            if self.fails and place == "optimizer":
                out_of_memory()

        def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
            if self.fails and place == "checkpoint":
                out_of_memory()

    def make(params: dict[str, Any]) -> tuple[Any, Any]:
        if params not in seen:
            seen.append(params)
        fails = len(seen) > 2 and params == seen[2]  # the first one is made to learn the number of folds
        if fails and place == "construction":
            out_of_memory()
        module = Failing(**params)
        module.fails = fails
        return module, Folds()

    return make


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory: pytest.TempPathFactory) -> TuneResult:
    return search(tmp_path_factory.mktemp("undisturbed"), sampler={"name": "random"})


@pytest.mark.parametrize("place", PLACES)
def test_out_of_memory_is_a_pruned_trial_and_leaves_the_others_as_they_are(
    place: str, undisturbed: TuneResult, tmp_path: Path
) -> None:
    found = search(tmp_path, failing(place, []), sampler={"name": "random"})
    failed = [trial for trial in found.study.trials if "oom_where" in trial.user_attrs]
    assert [trial.state for trial in failed] == [TrialState.PRUNED]
    values = {str(trial.params): trial.intermediate_values for trial in undisturbed.study.trials}
    others = [trial for trial in found.study.trials if trial not in failed]
    assert len(others) >= 3
    for trial in others:
        known = values[str(trial.params)]
        assert {step: value for step, value in trial.intermediate_values.items() if step in known}.items() <= (
            known.items()
        )


def test_other_errors_fail_the_trial(tmp_path: Path) -> None:
    def make(params: dict[str, Any]) -> tuple[Any, Any]:
        if params["width"] == 8:
            raise Fault("wrong width")
        return build(params)

    found = search(tmp_path, make, n_trials=3, sampler={"name": "random"})
    failed = [trial for trial in found.study.trials if trial.state == TrialState.FAIL]
    assert failed
    assert all(trial.params["width"] == 8 for trial in failed)
    assert "Fault: wrong width" in failed[0].user_attrs["error"]


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda run: tune(run_dir=run), "expected tune"),
        (lambda run: tune(3, SPACE, run_dir=run), "got int, dict"),
        (lambda run: tune(lambda params: Net(), SPACE, run_dir=run), "build: expected a module and a data module"),
        (lambda run: tune(build, SPACE, run_dir=run, metric="f1"), "mode: expected max or min for the metric f1"),
        (lambda run: tune(build, SPACE, run_dir=run, baseline=True), "baseline: expected false"),
        (lambda run: tune(build, SPACE, run_dir=run, compile={}), "compile: expected nothing"),
        (lambda run: tune(build, SPACE, run_dir=run, trainer={"fast_dev_run": True}), "a study needs whole epochs"),
        (lambda run: plan(build, SPACE, trainer={"fast_dev_run": True}), "a study needs whole epochs"),
        (lambda run: tune(build, SPACE, run_dir=run, ensemble=True, refit=True), "ensemble: expected false"),
    ],
)
def test_what_is_wrong_is_named(call: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=message):
        call(tmp_path / "run")
    assert not (tmp_path / "run" / "journal.log").exists()


def test_a_worker_can_not_join_a_function(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    search(tmp_path, n_trials=1)
    with pytest.raises(SystemExit):
        main(["worker", str(tmp_path / "run")])
    assert "Call tune in one more process" in capsys.readouterr().err
