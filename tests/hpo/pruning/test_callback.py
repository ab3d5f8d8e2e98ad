import warnings

import lightning.pytorch as pl
import optuna
import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback
from torch.utils.data import DataLoader

from lightning_bge.errors import ConfigError
from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.hpo.pruning.config import PrunerConfig, build_pruner
from lightning_bge.hpo.pruning.pruners import StartupTrialsPruner
from lightning_bge.hpo.steps import Steps

optuna.logging.set_verbosity(optuna.logging.WARNING)
pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers",
    "ignore:`isinstance.treespec, LeafSpec:FutureWarning",  # Lightning 2.6 under torch 2.13
)


class Scripted(pl.LightningModule):
    """Logs a given value for each epoch."""

    def __init__(self, values):
        super().__init__()
        self.values = values
        self.layer = torch.nn.Linear(1, 1)

    def training_step(self, batch, index):
        return self.layer(batch).sum()

    def validation_step(self, batch, index):
        self.log("val_score", torch.tensor(self.values[self.current_epoch], dtype=torch.float64))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def fit(callback, values, epochs=None, **options):
    data = DataLoader(torch.zeros(2, 1))
    extra = options.pop("callbacks", [])
    trainer = pl.Trainer(
        max_epochs=epochs or len(values),
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[callback, *extra],
        **options,
    )
    trainer.fit(Scripted(values), data, data)
    return trainer


class Always(optuna.pruners.BasePruner):
    def prune(self, study, trial):
        return True


class Counting(optuna.pruners.BasePruner):
    def __init__(self):
        self.asked = []

    def prune(self, study, trial):
        self.asked.append(trial.last_step)
        return False


def ask(pruner=None, direction="maximize"):
    study = optuna.create_study(direction=direction, pruner=pruner or optuna.pruners.NopPruner())
    return study, study.ask()


def values_of(study):
    return study.trials[-1].intermediate_values


def run_folds(trial, folds, objective="best", direction="maximize", epochs=None, **options):
    earlier = []
    epochs = epochs or len(folds[0])
    for k, values in enumerate(folds):
        callback = FoldPruningCallback(trial, "val_score", k, len(folds), epochs, earlier, objective, direction)
        fit(callback, values, **options)
        earlier.append(callback.close_fold())
        assert callback.history == pytest.approx(values[: len(callback.history)])
        assert [report.value for report in callback.curve] == callback.history
        assert all(min(report[2:6]) >= 0 and report.train_seconds > 0 for report in callback.curve)
        assert {report.loss for report in callback.curve} == {None}  # the module logs none
    return earlier


@pytest.mark.parametrize(
    ("objective", "direction", "scores", "expected"),
    [
        ("best", "maximize", [0.6, 0.9], [0.2, 0.6, 0.6, 0.7, 0.75, 0.75]),
        ("last", "maximize", [0.4, 0.7], [0.2, 0.6, 0.4, 0.6, 0.65, 0.55]),
        ("best", "minimize", [0.2, 0.7], [0.2, 0.2, 0.2, 0.5, 0.5, 0.45]),
    ],
)
def test_running_mean_over_folds_at_consecutive_steps(objective, direction, scores, expected):
    pruner = Counting()
    study, trial = ask(pruner, direction)
    folds = [[0.2, 0.6, 0.4], [0.8, 0.9, 0.7]]
    assert run_folds(trial, folds, objective, direction) == pytest.approx(scores)
    assert list(values_of(study)) == [1, 2, 3, 4, 5, 6]
    assert list(values_of(study).values()) == pytest.approx(expected)
    assert pruner.asked == [1, 2, 3, 4, 5]  # not at the last, where nothing is left to save


def test_early_stopping_leaves_no_gap_and_asks_once():
    pruner = Counting()
    study, trial = ask(pruner)
    stop = EarlyStopping("val_score", patience=1, mode="max")
    callback = FoldPruningCallback(trial, "val_score", 0, 2, 6, [])
    fit(callback, [0.5, 0.7, 0.6, 0.9, 0.9, 0.9], callbacks=[stop])
    assert callback.close_fold() == pytest.approx(0.7)
    assert list(values_of(study).values()) == pytest.approx([0.5, 0.7, 0.7, 0.7, 0.7, 0.7])
    assert pruner.asked == [1, 2, 3, 6]


def test_closing_the_last_fold_never_asks():
    pruner = Counting()
    study, trial = ask(pruner)
    callback = FoldPruningCallback(trial, "val_score", 1, 2, 3, [0.5])
    fit(callback, [0.7], epochs=1)
    callback.close_fold()
    assert list(values_of(study)) == [4, 5, 6]
    assert pruner.asked == [4]


def test_pruned_in_fit():
    study, trial = ask(StartupTrialsPruner(Always(), 0))
    callback = FoldPruningCallback(trial, "val_score", 1, 3, 4, [0.5])
    with pytest.raises(optuna.TrialPruned, match="step 5 of 12"):
        fit(callback, [0.7, 0.7, 0.7, 0.7])
    attrs = study.trials[0].user_attrs
    assert (attrs["pruned_at"], attrs["fold"], attrs["epoch"]) == (5, 1, 0)


def test_pruned_when_closing_names_the_filled_report():
    study, trial = ask(Always())
    callback = FoldPruningCallback(trial, "val_score", 0, 2, 4, [])
    callback.history = [0.5, 0.6]
    with pytest.raises(optuna.TrialPruned, match="step 4 of 8"):
        callback.close_fold()
    attrs = study.trials[0].user_attrs
    assert (attrs["pruned_at"], attrs["fold"], attrs["epoch"]) == (4, 0, 1)


def test_the_last_report_of_all_is_never_pruned():
    study, trial = ask(Always())
    callback = FoldPruningCallback(trial, "val_score", 1, 2, 1, [0.5])
    fit(callback, [0.1])
    assert callback.close_fold() == pytest.approx(0.1)
    assert list(values_of(study)) == [2]


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_value_that_is_not_finite_prunes_the_trial_and_says_so(bad):
    study, trial = ask()
    callback = FoldPruningCallback(trial, "val_score", 0, 2, 3, [])
    with pytest.raises(optuna.TrialPruned, match="val_score is"):
        fit(callback, [0.5, bad, 0.5])
    study.tell(trial, state=TrialState.PRUNED)
    frozen = study.trials[0]
    assert frozen.user_attrs == {"nan": str(bad), "pruned_at": 2, "fold": 0, "epoch": 1}
    assert frozen.intermediate_values == pytest.approx({1: 0.5})
    assert frozen.value == pytest.approx(0.5)


def test_consecutive_reports_let_hyperband_prune_in_the_first_fold():
    study = optuna.create_study(
        study_name="s",
        direction="maximize",
        pruner=build_pruner(PrunerConfig("hyperband", n_startup_trials=1, reduction_factor=5), 10, Steps(2, 2)),
    )
    states = []
    for value in (0.9, 0.1, 0.1, 0.1):
        trial = study.ask()
        try:
            study.tell(trial, sum(run_folds(trial, [[value] * 2, [value] * 2])) / 2)
        except optuna.TrialPruned:
            study.tell(trial, state=TrialState.PRUNED)
        states.append(study.trials[-1].state)
    assert states == [TrialState.COMPLETE, *[TrialState.PRUNED] * 3]
    assert {t.last_step for t in study.trials[1:]} == {1}


def test_missing_metric_names_those_there_are():
    _, trial = ask()
    with pytest.raises(ConfigError, match=r"'val_f1' is not logged.*val_score"):
        fit(FoldPruningCallback(trial, "val_f1", 0, 1, 2, []), [0.5, 0.5])


def test_validation_outside_fit_and_the_sanity_check_report_nothing():
    study, trial = ask()
    callback = FoldPruningCallback(trial, "val_score", 0, 1, 2, [])
    trainer = fit(callback, [0.5, 0.6], num_sanity_val_steps=1)
    trainer.validate(Scripted([0.1] * 3), DataLoader(torch.zeros(2, 1)), verbose=False)
    assert list(values_of(study)) == [1, 2]


@pytest.mark.parametrize("options", [{"val_check_interval": 0.5}, {"check_val_every_n_epoch": 2}])
def test_validation_must_run_once_an_epoch(options):
    _, trial = ask()
    with pytest.raises(ConfigError, match="one validation after each of 4 epochs"):
        fit(FoldPruningCallback(trial, "val_score", 0, 1, 4, []), [0.5] * 4, **options)


def test_more_epochs_than_counted():
    _, trial = ask()
    with pytest.raises(ConfigError, match=r"max_epochs: expected at most epochs=2.*got 3"):
        fit(FoldPruningCallback(trial, "val_score", 0, 1, 2, []), [0.5] * 3)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ((2, 2, 1, [0.1, 0.2]), "fold < folds"),
        ((0, 2, 0, []), "epochs and per_epoch >= 1"),
        ((1, 2, 1, []), "scores of the 1 folds"),
        ((0, 2, 1, [], "mean"), "'best' or 'last'.*got 'mean'"),
        ((0, 2, 1, [], "best", "max"), "'maximize' or 'minimize'.*'max'"),
    ],
)
def test_contradicting_arguments(arguments, says):
    _, trial = ask()
    with pytest.raises(ConfigError, match=says):
        FoldPruningCallback(trial, "val_score", *arguments)


@pytest.mark.parametrize("arguments", [{"folds": 2}, {"per_epoch": 2}, {"pause": print}])
def test_folds_need_a_number_of_epochs(arguments):
    _, trial = ask()
    with pytest.raises(ConfigError, match="epochs: expected the most epochs of a fold with folds, per_epoch or pause"):
        FoldPruningCallback(trial, "val_score", **arguments)


@pytest.mark.parametrize("pruner", [Always, Counting])
@pytest.mark.parametrize("monitor", ["val_score", "val_f1"])
def test_without_epochs_it_does_what_the_class_that_it_extends_does(pruner, monitor):
    seen = []
    for kind in (PyTorchLightningPruningCallback, FoldPruningCallback):
        study = optuna.create_study(direction="maximize", pruner=pruner())

        def objective(trial, kind=kind):
            callback = kind(trial, monitor)
            fit(callback, [0.2, float("nan"), 0.1])
            callback.check_pruned()
            return 1.0

        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            study.optimize(objective, n_trials=2)
        texts = [str(one.message) for one in caught if "evaluation logs" in str(one.message)]
        trials = [(one.state, one.intermediate_values, one.user_attrs, one.system_attrs) for one in study.trials]
        seen.append((repr(trials), texts, getattr(study.pruner, "asked", None)))
    assert seen[0] == seen[1]
    assert seen[0][0].count("PRUNED") == (2 if (pruner, monitor) == (Always, "val_score") else 0)
    assert bool(seen[0][1]) == (monitor == "val_f1")


def test_without_epochs_there_is_no_score():
    _, trial = ask()
    with pytest.raises(ConfigError, match="epochs: a fold's score needs the most epochs of a fold, got None"):
        FoldPruningCallback(trial, "val_score").close_fold()


def test_objects_of_the_package_pytorch_lightning():
    twin = pytest.importorskip("pytorch_lightning", reason="newer versions of lightning bring it")

    class TwinModule(twin.LightningModule):
        def __init__(self):
            super().__init__()
            self.layer = torch.nn.Linear(1, 1)

        training_step, configure_optimizers = Scripted.training_step, Scripted.configure_optimizers

        def validation_step(self, batch, index):
            self.log("val_score", torch.tensor([0.2, 0.6, 0.4][self.current_epoch], dtype=torch.float64))

    pruner = Counting()
    study, trial = ask(pruner)
    callback = FoldPruningCallback(trial, "val_score", 0, 1, 3, [])
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    data = DataLoader(torch.zeros(2, 1))
    twin.Trainer(**off, max_epochs=3, accelerator="cpu", callbacks=[callback]).fit(TwinModule(), data, data)
    assert callback.close_fold() == pytest.approx(0.6)
    assert list(values_of(study).values()) == pytest.approx([0.2, 0.6, 0.6])
    assert pruner.asked == [1, 2]


def test_closing_without_a_validation():
    _, trial = ask()
    with pytest.raises(ConfigError, match="before a validation"):
        FoldPruningCallback(trial, "val_score", 0, 1, 2, []).close_fold()


class Batches(pl.LightningModule):
    """Logs the number of training batches so far as its score."""

    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
        self.batches = 0

    def training_step(self, batch, index):
        self.batches += 1
        return self.layer(batch).sum()

    def validation_step(self, batch, index):
        self.log("val_score", torch.tensor(float(self.batches), dtype=torch.float64))

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.0)


def train_batches(callback, batches, epochs, **options):
    settings = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    extra = options.pop("callbacks", [])
    trainer = pl.Trainer(**settings, max_epochs=epochs, accelerator="cpu", callbacks=[callback, *extra], **options)
    trainer.fit(Batches(), DataLoader(torch.zeros(batches, 1)), DataLoader(torch.zeros(1, 1)))


@pytest.mark.parametrize(
    ("batches", "per_epoch", "expected"),
    [
        (10, 2, [5, 10, 15, 20]),
        (10, 4, [3, 5, 8, 10, 13, 15, 18, 20]),
        (7, 3, [3, 5, 7, 10, 12, 14]),
        (4, 4, [1, 2, 3, 4, 5, 6, 7, 8]),
        (2, 4, [1, 1, 2, 2, 3, 3, 4, 4]),  # fewer batches than parts: one validation serves several
        (1, 3, [1, 1, 1, 2, 2, 2]),
        (9, 1, [9, 18]),
    ],
)
def test_parts_of_an_epoch_are_reported_after_their_share_of_the_batches(batches, per_epoch, expected):
    pruner = Counting()
    study, trial = ask(pruner)
    callback = FoldPruningCallback(trial, "val_score", 0, 2, 2, [], per_epoch=per_epoch)
    train_batches(callback, batches, 2)
    assert callback.close_fold() == 2 * batches
    assert list(values_of(study)) == list(range(1, 2 * per_epoch + 1))
    assert list(values_of(study).values()) == expected
    assert [report.value for report in callback.curve] == sorted(set(expected))
    assert [report.step for report in callback.curve] == pruner.asked


def test_early_stopping_counts_epochs_whatever_is_reported():
    stop = EarlyStopping("val_score", patience=2, mode="min")  # the score rises: worse and worse
    _, trial = ask()
    callback = FoldPruningCallback(trial, "val_score", 0, 1, 9, [], per_epoch=3, direction="minimize")
    train_batches(callback, 6, 9, callbacks=[stop])
    assert len(callback.history) == 3
    assert len(callback.curve) == 9


def test_a_score_within_an_epoch_counts_for_its_report_alone():
    study, trial = ask()
    callback = FoldPruningCallback(trial, "val_score", 0, 1, 2, [], per_epoch=2, direction="minimize")
    train_batches(callback, 4, 2)
    assert list(values_of(study).values()) == [2, 4, 4, 4]  # of the best whole epoch, or better within one
    assert callback.close_fold() == 4


def test_finer_reports_need_epochs_of_a_known_length():
    _, trial = ask()
    callback = FoldPruningCallback(trial, "val_score", 0, 1, 2, [], per_epoch=2)
    with pytest.raises(ConfigError, match=r"val_check_interval 1\.0, got 4 batches and 0\.5"):
        train_batches(callback, 4, 2, val_check_interval=0.5)
