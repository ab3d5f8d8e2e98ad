"""Trials that are stopped on request: what they save, and that those which continue them equal uninterrupted ones."""

from __future__ import annotations

import signal
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from lightning.pytorch import Callback
from optuna.trial import FrozenTrial, TrialState
from safetensors.torch import load_file

from lightning_bge.errors import LocationError
from lightning_bge.hpo.config import PREDICTIONS, StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.scheduling.trial_queue import CHECKPOINTS
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.steps import Report, Steps
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trial.checkpoint import STATE, FoldResult, SavedTrial, save_trial
from lightning_bge.hpo.trial.kept_predictions import kept_file
from lightning_bge.hpo.trial.out_of_fold import predictions_file
from lightning_bge.hpo.trials import INTERRUPTED, PARAMETER_SET, REPORTS_BEFORE, RETRY_OF, attempts
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.runtime.locations import Location, file_sizes, local_copy
from lightning_bge.runtime.stop import StopRequest
from tests.helpers.memory_location import memory_location
from tests.helpers.small_search import SPACE, make, write_files
from tests.helpers.study_run import run_study

optuna.logging.set_verbosity(optuna.logging.WARNING)
PARAMS = {"lr": 3e-3, "dropout": 0.1}
BATCHES, VALIDATIONS = 12, 8  # of a trial: two folds of two epochs of three batches, validated twice


class Asked(StopRequest):
    """A request that a test makes."""

    signal = 0  # type: ignore[assignment]


class StopAt(Callback):
    """Asks for a stop in some of the batches, counted over all starts; keeps the weights of each fold."""

    def __init__(self, batches: Sequence[int], validations: Sequence[int] = ()) -> None:
        self.batches, self.validations, self.request = set(batches), set(validations), Asked()
        self.trained = self.validated = 0
        self.ends: list[dict[str, torch.Tensor]] = []

    def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
        self.trained += 1
        if self.trained in self.batches:
            self.request.signal = signal.SIGTERM  # type: ignore[misc]
        if self.trained % (BATCHES // 2) == 0:
            self.ends.append({name: tensor.clone() for name, tensor in pl_module.state_dict().items()})

    def on_validation_batch_end(self, *_: Any) -> None:
        self.validated += 1
        if self.validated in self.validations:
            self.request.signal = signal.SIGTERM  # type: ignore[misc]


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("stop"))


def run(
    files: Path,
    run_dir: Path,
    stops: Sequence[int] = (),
    validations: Sequence[int] = (),
    at: Location | None = None,
    between: Callable[[], Any] = lambda: None,
    **changes: Any,
) -> tuple[list[FrozenTrial], StopAt]:
    """A study of one parameter set, started again after each stop; and the weights at the end of each fold.

    Its files are `at` another place than the run folder, if there is one; `between` is called after each stop.
    """
    stop = StopAt(stops, validations)
    settings = {**folders(run_dir if at is None else at), "per_epoch": 2, **changes}
    study = optuna.create_study(direction="minimize", pruner=optuna.pruners.NopPruner(), study_name="s")
    config = StudyConfig(1, SPACE, pruner=PrunerConfig("none"), files=None if at is None else str(at))
    for start in range(BATCHES + 1):
        stop.request.signal = 0  # type: ignore[misc]
        objective = make(files, (stop,), request=stop.request, **settings)
        run_study(study, objective, config, run_dir, enqueued=[PARAMS], request=stop.request)
        assert len(study.trials) == start + 1
        if study.trials[-1].state == TrialState.COMPLETE:
            break
        between()
    return study.trials, stop


def folders(at: Location) -> dict[str, Location]:
    """Where trials leave their files, for `make`."""
    return {"oof_dir": at / "oof", "paused_dir": at / CHECKPOINTS, "predictions_dir": at / PREDICTIONS}


@pytest.fixture(scope="module")
def whole(files: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[FrozenTrial, StopAt, dict[str, torch.Tensor]]:
    run_dir = tmp_path_factory.mktemp("whole")
    [trial], stop = run(files, run_dir)
    assert (stop.trained, stop.validated) == (BATCHES, VALIDATIONS)
    return trial, stop, kept(run_dir, 0)


def kept(at: Location, number: int) -> dict[str, torch.Tensor]:
    """The out-of-fold predictions of a trial, and the logits of all validations of its parameter set."""
    logits_file = kept_file(at / PREDICTIONS, 0)
    with local_copy(logits_file) as logits, local_copy(predictions_file(at / "oof", number)) as predictions:
        return load_file(predictions) | {f"step {step}": one for step, one in load_file(logits).items()}


@pytest.mark.parametrize(
    ("stops", "validations"),
    [
        *(([batch], []) for batch in (1, 2, 3, 5, 6, 7, 9, 12)),
        ([2, 4, 8], []),
        (range(1, BATCHES + 1), []),
        *(([], [number]) for number in (1, 2, 4, 8)),
        ([], range(1, VALIDATIONS + 1)),
    ],
)
def test_a_trial_that_was_stopped_equals_an_uninterrupted_one_bit_for_bit(
    files: Path,
    tmp_path: Path,
    whole: tuple[FrozenTrial, StopAt, dict[str, torch.Tensor]],
    stops: Sequence[int],
    validations: Sequence[int],
) -> None:
    expected, uninterrupted, predictions = whole
    trials, stop = run(files, tmp_path, stops, validations)
    *stopped, last = trials
    assert len(stopped) == len(stops) + len(validations)
    assert (stop.trained, stop.validated) == (BATCHES, VALIDATIONS)  # nothing is done twice
    for number, trial in enumerate(stopped):
        assert (trial.state, trial.user_attrs[INTERRUPTED]) == (TrialState.FAIL, "SIGTERM")
        following = trials[number + 1]
        assert (following.user_attrs[RETRY_OF], following.user_attrs[PARAMETER_SET]) == (number, 0)
        # all of its reports are taken over
        assert following.user_attrs[REPORTS_BEFORE] == len(trial.intermediate_values)
        assert following.intermediate_values.items() >= trial.intermediate_values.items()
    assert last.state == TrialState.COMPLETE
    assert (last.value, last.params) == (expected.value, expected.params)
    assert last.intermediate_values == expected.intermediate_values
    for name in ("fold_scores", "fold_epochs"):
        assert last.user_attrs[name] == expected.user_attrs[name]
    steps = [report[0] for fold in last.user_attrs["curve"] for report in fold]
    assert steps == [report[0] for fold in expected.user_attrs["curve"] for report in fold]
    found = kept(tmp_path, last.number)
    assert found.keys() == predictions.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in predictions.items())
    for one, other in zip(stop.ends, uninterrupted.ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert not list((tmp_path / CHECKPOINTS).iterdir())


@pytest.mark.parametrize("stops", [[], [5], [2, 4, 8]])
def test_a_trial_whose_files_are_elsewhere_equals_one_with_files_in_the_run_folder_bit_for_bit(
    files: Path, tmp_path: Path, whole: tuple[FrozenTrial, StopAt, dict[str, torch.Tensor]], stops: Sequence[int]
) -> None:
    expected, uninterrupted, predictions = whole
    at = memory_location()
    (*_, last), stop = run(files, tmp_path, stops, at=at)
    assert (last.number, stop.trained) == (len(stops), BATCHES)
    assert (last.value, last.intermediate_values) == (expected.value, expected.intermediate_values)
    found = kept(at, last.number)
    assert found.keys() == predictions.keys()
    assert all(torch.equal(found[name], tensor) for name, tensor in predictions.items())
    for one, other in zip(stop.ends, uninterrupted.ends, strict=True):
        assert all(torch.equal(one[name], other[name]) for name in one)
    assert sorted(file_sizes(at)) == [f"oof/{last.number}.safetensors", "predictions/0.safetensors"]
    assert not {"oof", CHECKPOINTS, PREDICTIONS} & {path.name for path in tmp_path.iterdir()}


@pytest.mark.parametrize("gone", ["all", "weights"])
def test_a_trial_whose_files_have_vanished_elsewhere_is_trained_from_its_start(
    files: Path, tmp_path: Path, whole: tuple[FrozenTrial, StopAt, dict[str, torch.Tensor]], gone: str
) -> None:
    at = memory_location()

    def vanish() -> None:
        names = [name for name in file_sizes(at) if gone == "all" or name.endswith(".ckpt")]
        assert names
        for name in names:
            (at / name).unlink()

    (_, last), stop = run(files, tmp_path, [5], at=at, between=vanish)
    assert stop.trained == 5 + BATCHES
    assert last.user_attrs[REPORTS_BEFORE] == 0
    assert (last.value, last.intermediate_values) == (whole[0].value, whole[0].intermediate_values)


def test_a_location_that_fails_stops_the_process_and_the_trial_is_continued_from_what_is_there(
    files: Path,
    tmp_path: Path,
    whole: tuple[FrozenTrial, StopAt, dict[str, torch.Tensor]],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    at, names = memory_location(), list[str]()
    put = at.fs.put_file

    def fails_once(local: str, remote: str) -> None:
        names.append(remote)
        if len(names) == 4:  # the state of the second fold's begin: the predictions before it are written
            raise ConnectionError("the bucket does not answer")
        put(local, remote)

    monkeypatch.setattr(at.fs, "put_file", fails_once)
    study = optuna.create_study(direction="minimize", pruner=optuna.pruners.NopPruner(), study_name="s")
    config = StudyConfig(1, SPACE, pruner=PrunerConfig("none"), files=str(at))
    objective = make(files, per_epoch=2, **folders(at))
    with pytest.raises(LocationError, match=r"can't be written \(ConnectionError: the bucket does not answer\)"):
        run_study(study, objective, config, tmp_path, enqueued=[PARAMS])
    [stopped] = study.trials
    assert (stopped.state, "does not answer" in stopped.user_attrs[INTERRUPTED]) == (TrialState.FAIL, True)
    run_study(study, objective, config, tmp_path, enqueued=[PARAMS])
    last = study.trials[-1]
    assert last.user_attrs[REPORTS_BEFORE] == 4  # the first fold was saved
    assert (last.value, last.intermediate_values) == (whole[0].value, whole[0].intermediate_values)
    found = kept(at, last.number)
    assert all(torch.equal(found[name], tensor) for name, tensor in whole[2].items())


@pytest.mark.parametrize("stops", [[4], [7], [12]])
def test_the_last_epochs_score_and_early_stopping_survive_a_stop(
    files: Path, tmp_path: Path, stops: Sequence[int]
) -> None:
    monitor = MonitorConfig("loss", "last", patience=1)
    [expected], _ = run(files, tmp_path / "whole", monitor=monitor, epochs=4)
    *_, last = run(files, tmp_path / "stopped", stops, monitor=monitor, epochs=4)[0]
    assert last.number == 1
    assert (last.value, last.intermediate_values) == (expected.value, expected.intermediate_values)


def test_without_its_checkpoint_a_stopped_trial_is_trained_from_its_start(
    files: Path, tmp_path: Path, whole: tuple[FrozenTrial, StopAt, dict[str, torch.Tensor]]
) -> None:
    [_, last], stop = run(files, tmp_path, [5], paused_dir=None)
    assert stop.trained == 5 + BATCHES
    assert last.user_attrs[REPORTS_BEFORE] == 0
    assert (last.value, last.intermediate_values) == (whole[0].value, whole[0].intermediate_values)


@pytest.mark.parametrize("every", [4, 5])
def test_a_search_that_was_stopped_often_equals_an_uninterrupted_one(files: Path, tmp_path: Path, every: int) -> None:
    def search(run_dir: Path, stops: Sequence[int]) -> tuple[dict[int, tuple[Any, ...]], int]:
        """What became of each parameter set; and how many trials were stopped."""
        stop = StopAt(stops)
        config = StudyConfig(6, SPACE, pruner=PrunerConfig("asha", 2, 1), sampler=SamplerConfig("random"))
        study = open_study(study_storage(run_dir, config), config, "minimize", Steps(2, 2), {})
        objective = make(files, (stop,), request=stop.request, paused_dir=run_dir / CHECKPOINTS, n_trials=6)
        while not run_study(study, objective, config, run_dir, request=stop.request).is_finished():
            stop.request.signal = 0  # type: ignore[misc]
        names = ("paused_at", "fold_scores", "fold_epochs")
        found = {}
        for number, (*_, last) in enumerate(attempts(study.trials).values()):
            assert last.state in (TrialState.COMPLETE, TrialState.PRUNED)
            known = [last.user_attrs.get(name) for name in names]
            found[number] = (last.state, last.value, last.params, last.intermediate_values, known)
        return found, sum(INTERRUPTED in trial.user_attrs for trial in study.trials)

    expected, _ = search(tmp_path / "whole", [])
    assert {one[0] for one in expected.values()} == {TrialState.COMPLETE, TrialState.PRUNED}
    found, stopped = search(tmp_path / "stopped", range(every, 1000, every))
    assert found == expected
    assert stopped >= 3


# ---------------------------------------------------------------------- the files


def result(score: float, rows: int = 2) -> FoldResult:
    return FoldResult(score, 1, Predictions(torch.arange(rows), torch.ones(rows, 1)), rows)


def test_a_trial_between_two_folds_is_read_as_it_was_written(tmp_path: Path) -> None:
    curve = [[Report(1, 0.5, 1.0, 0.5, 1.0, 0.5)], [Report(2, 0.75, 1.0, 0.5, 1.0, 0.5)]]
    folder = tmp_path / CHECKPOINTS / "3"
    assert SavedTrial.load(folder) is None
    save_trial(folder, step=2, folds=[result(0.5), result(0.75)], curve=curve)
    found = SavedTrial.load(folder)
    assert found is not None
    assert (found.step, found.curve, found.fold) == (2, curve, None)
    assert [fold.score for fold in found.folds] == [0.5, 0.75]
    assert found.folds[0].predictions is not None
    assert found.folds[0].predictions.rows.tolist() == [0, 1]
    assert folder.stat().st_mode & 0o777 == folder.parent.stat().st_mode & 0o777 == 0o700


def test_saving_again_replaces_what_was_there_whole_or_not_at_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_trial(tmp_path, step=1, folds=[result(0.5)], curve=[[]])
    (tmp_path / "fold-0-step-3.ckpt").touch()  # weights to which an older state referred
    save_trial(tmp_path, step=2, folds=[result(0.6)], curve=[[]])
    assert [path.name for path in tmp_path.iterdir()] == [STATE]

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(torch, "save", full)
    with pytest.raises(OSError, match="No space left"):
        save_trial(tmp_path, step=3, folds=[result(0.7)], curve=[[]])
    found = SavedTrial.load(tmp_path)
    assert found is not None
    assert found.step == 2
    assert [path.name for path in tmp_path.iterdir()] == [STATE]


def test_a_fold_whose_weights_were_deleted_is_not_read(files: Path, tmp_path: Path) -> None:
    stop = StopAt([5])
    study = optuna.create_study(direction="minimize", pruner=optuna.pruners.NopPruner(), study_name="s")
    objective = make(files, (stop,), request=stop.request, paused_dir=tmp_path / CHECKPOINTS)
    run_study(study, objective, StudyConfig(1, SPACE), tmp_path, enqueued=[PARAMS], request=stop.request)
    folder = tmp_path / CHECKPOINTS / "0"
    found = SavedTrial.load(folder)
    assert found is not None
    assert (found.step, found.folds) == (1, [])
    assert found.fold is not None
    assert found.fold.checkpoint is not None
    assert sorted(path.name for path in folder.iterdir()) == sorted([STATE, found.fold.checkpoint.name])
    found.fold.checkpoint.unlink()
    assert SavedTrial.load(folder) is None


def test_predictions_that_were_deleted_meanwhile_are_missing_and_the_later_ones_are_right(
    files: Path, tmp_path: Path, whole: tuple[FrozenTrial, StopAt, dict[str, torch.Tensor]]
) -> None:
    stop, names = StopAt([5]), {"oof_dir": "oof", "paused_dir": CHECKPOINTS, "predictions_dir": PREDICTIONS}
    study = optuna.create_study(direction="minimize", pruner=optuna.pruners.NopPruner(), study_name="s")
    config = StudyConfig(1, SPACE, pruner=PrunerConfig("none"))
    for start in range(2):  # the limit on the disk may delete what is kept of a stopped trial
        stop.request.signal = 0  # type: ignore[misc]
        folders: dict[str, Any] = {option: tmp_path / name for option, name in names.items()}
        if start:
            kept_file(tmp_path / PREDICTIONS, 0).unlink()
        objective = make(files, (stop,), request=stop.request, per_epoch=2, **folders)
        run_study(study, objective, config, tmp_path, enqueued=[PARAMS], request=stop.request)
    assert study.trials[-1].state == TrialState.COMPLETE
    found, expected = kept(tmp_path, 1), whole[2]
    missing = expected.keys() - found.keys()
    assert missing == {"step 1", "step 2", "step 3"}
    assert all(torch.equal(found[name], expected[name]) for name in found)
