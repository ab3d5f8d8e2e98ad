"""`tune` from Python: the trials of the command line, errors that name arguments, and a study that continues."""

from __future__ import annotations

import importlib.util
import json
import logging
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import optuna
import pytest
import yaml
from optuna.distributions import CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.trial import FrozenTrial, TrialState, create_trial
from transformers import AutoModelForSequenceClassification

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.errors import ConfigError, StudyError
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.space.search_space import parse_space, spec_of
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.runtime.locations import file_sizes
from lightning_bge.trainer import BGETrainer
from lightning_bge.tuning import TuneResult, tune
from tests.helpers.memory_location import memory_location
from tests.helpers.small_search import write_files

SPACE = {
    "model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True),
    "model.dropout": CategoricalDistribution([0.0, 0.1, 0.3]),
    "data.batch_size": CategoricalDistribution([4, 8]),
}
FAST = {"precision": "32-true", "accelerator": "cpu"}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("tune"))


@pytest.fixture
def model(files: Path) -> BGEClassifier:
    return BGEClassifier(str(files / "model"))


@pytest.fixture
def data(files: Path) -> TextDataModule:
    paths = {"train_file": str(files / "train.csv"), "cache_dir": str(files / "cache")}
    return TextDataModule(str(files / "model"), **paths, max_length=32, split={"folds": 2})  # type: ignore[arg-type]


def outcome(trials: list[FrozenTrial]) -> list[tuple[Any, ...]]:
    return [(t.number, t.state, t.params, t.values, t.intermediate_values) for t in trials]


def short(model: BGEClassifier, data: TextDataModule, folder: Path, **changes: Any) -> TuneResult:
    options: dict[str, Any] = {"n_trials": 2, "max_epochs": 1, "trainer": FAST, "refit": False, **changes}
    space = options.pop("space", {"model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True)})
    return tune(model, data, space, run_dir=folder, **options)


def test_a_metric_by_its_class(model: BGEClassifier, data: TextDataModule, tmp_path: Path) -> None:
    metric = {"class_path": "torchmetrics.HammingDistance", "init_args": {"threshold": 0.4}}
    found = short(model, data, tmp_path / "study", metric=metric, pruner={"name": "none"}, baseline=False)
    assert found.study.direction == optuna.study.StudyDirection.MINIMIZE
    assert found.summary is not None
    assert (found.summary["metric"], found.summary["metric_class"]) == ("hamming_distance", metric)
    assert found.best_value == pytest.approx(found.summary["best_value"])
    with pytest.raises(ConfigError, match=r"monitor\.metric: torchmetrics\.AUROC does not accept init_args"):
        short(model, data, tmp_path / "other", metric={"class_path": "torchmetrics.AUROC", "init_args": {"x": 1}})


def test_an_optimizer_by_its_class(files: Path, data: TextDataModule, tmp_path: Path) -> None:
    optimizer = {"class_path": "torch.optim.SGD", "init_args": {"lr": 0.1}}
    model = BGEClassifier(str(files / "model"), optimizer=optimizer)  # type: ignore[arg-type]
    space = {"model.optimizer.init_args.momentum": FloatDistribution(0.0, 0.9)}
    found = short(model, data, tmp_path / "study", space=space, pruner={"name": "none"})
    assert found.best_params.keys() == space.keys()
    with pytest.raises(ConfigError, match=r"does not accept .*Invalid momentum value"):
        short(model, data, tmp_path / "other", space=dict.fromkeys(space, FloatDistribution(-1.0, 0.9)))
    with pytest.raises(ConfigError, match=r"there is no option model\.optimizer\.arguments\.lr"):
        short(model, data, tmp_path / "other", space={"model.optimizer.arguments.lr": FloatDistribution(0.0, 0.9)})


def test_the_trials_and_the_model_are_those_of_the_command_line(
    run: Callable[..., tuple[int, str, str]], files: Path, model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    options: dict[str, Any] = {
        "run_dir": str(tmp_path / "command" / "study"),
        "seed_everything": 7,
        "model": {"name_or_path": str(files / "model")},
        "data": {
            **{"train_file": str(files / "train.csv"), "cache_dir": str(files / "cache")},
            **{"max_length": 32, "split": {"folds": 2}},
        },
        "trainer": {**FAST, "max_epochs": 2},
        "hpo": {
            "n_trials": 8,
            "space": {
                "model.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True},
                "model.dropout": {"choices": [0.0, 0.1, 0.3]},
                "data.batch_size": {"choices": [4, 8]},
            },
            "pruner": {"name": "asha", "reduction_factor": 2},
            "seed_replicates": 1,
        },
    }
    (tmp_path / "options.yaml").write_text(yaml.safe_dump(options, sort_keys=False))
    status, _, err = run("hpo", "-c", str(tmp_path / "options.yaml"))
    assert status == 0, err
    pruner = {"name": "asha", "reduction_factor": 2}
    folder = tmp_path / "python" / "study"
    found = tune(
        *(model, data, SPACE),
        **{"run_dir": folder, "n_trials": 8, "max_epochs": 2, "seed": 7, "trainer": FAST},  # type: ignore[arg-type]
        **{"pruner": pruner, "seed_replicates": 1},  # type: ignore[arg-type]
    )
    for name in ("study", "study-seed-replicates"):
        storages = [open_storage(tmp_path / place / "study" / "journal.log") for place in ("command", "python")]
        command, python = (optuna.load_study(study_name=name, storage=storage).trials for storage in storages)
        assert outcome(command) == outcome(python)
    assert {trial.state for trial in command} == {TrialState.COMPLETE}
    summaries = [
        json.loads((tmp_path / place / "study" / "summary.json").read_text()) for place in ("command", "python")
    ]
    for summary in summaries:
        del summary["wall_seconds"], summary["model_dir"]
    assert summaries[0] == summaries[1]
    assert found.summary is not None
    assert (found.best_value, found.best_params) == (found.summary["best_value"], found.summary["best_params"])
    assert found.model_dir == folder / "model"
    weights = [
        AutoModelForSequenceClassification.from_pretrained(tmp_path / place / "study" / "model").state_dict()
        for place in ("command", "python")
    ]
    assert all(weight.equal(weights[1][name]) for name, weight in weights[0].items())
    assert (folder / "report.html").is_file()
    # the command line trains with what was found, and shows the study
    best = yaml.safe_load((folder / "best.yaml").read_text())
    assert best["seed_everything"] == 7
    assert best["model"]["optimizer"]["lr"] == found.best_params["model.optimizer.lr"]
    status, _, err = run("fit", "-c", str(folder / "best.yaml"), "--trainer.max_epochs", "1")
    assert status == 0, err
    status, _out, err = run("status", str(folder))
    assert status == 0, err


def test_the_same_call_continues_and_another_study_is_refused(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    first = short(model, data, tmp_path, sampler={"name": "random"}, pruner={"name": "none"})
    before = outcome(first.study.trials)
    assert len(before) == 2
    again = short(model, data, tmp_path, sampler={"name": "random"}, pruner={"name": "none"})
    assert outcome(again.study.trials) == before
    more = short(model, data, tmp_path, sampler={"name": "random"}, pruner={"name": "none"}, n_trials=3)
    assert outcome(more.study.trials)[:2] == before
    assert len(more.study.trials) == 3
    assert more.model_dir is None
    with pytest.raises(StudyError, match=r"seed_everything: 42 in the folder, 1 requested\n.*Name another run_dir"):
        short(model, data, tmp_path, seed=1)


def test_another_machine_finds_the_results_where_the_files_are_and_refits_nothing(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    at, options = memory_location(), {"n_trials": 3, "max_epochs": 2, "refit": True, "seed_replicates": 1}
    folder, elsewhere, other = (tmp_path / name / "study" for name in ("one", "two", "three"))
    usual = short(model, data, folder, **options)
    found = short(model, data, elsewhere, files=str(at), **options)
    assert outcome(found.study.trials) == outcome(usual.study.trials)
    assert found.summary is not None
    for name, value in (usual.summary or {}).items():
        if name not in ("wall_seconds", "model_dir"):
            assert found.summary[name] == value, name
    names = ("summary.json", "best.yaml", "trials.csv", "oof.csv", "report.html", "run.json", "config.yaml")
    assert {*names, "model/model.safetensors", "files.id"} <= file_sizes(at).keys()
    assert file_sizes(elsewhere / "model") == file_sizes(at / "model")
    assert not {path.name for path in elsewhere.iterdir()} & {"oof", "predictions", "checkpoints", "files.id"}
    # the journal stands for a database, which all machines reach
    other.mkdir(parents=True)
    shutil.copy(elsewhere / "journal.log", other)
    monkeypatch.setattr(BGETrainer, "fit", pytest.fail)
    again = short(model, data, other, files=str(at), **options)
    assert again.summary == {"schema_version": 1, **found.summary, "model_dir": f"{at}/model"}
    assert again.model_dir == f"{at}/model"
    for name in ("best.yaml", "trials.csv", "oof.csv"):
        assert (other / name).read_text() == (elsewhere / name).read_text()
    assert not (other / "model").exists()
    published = {name: (at / name).read_text() for name in ("summary.json", "config.yaml")}
    assert json.loads(published["summary.json"])["model_dir"] == f"{at}/model"
    assert yaml.safe_load(published["config.yaml"])["hpo"]["files"] == str(at)
    with pytest.raises(StudyError, match=r"does not see the files.*Share the run folder, or set files to"):
        short(model, data, other, **options)


def test_a_changed_space_begins_another_study_with_the_trials_that_fit(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    first = short(model, data, tmp_path, pruner={"name": "none"})
    wider = {"model.optimizer.lr": FloatDistribution(1e-5, 1e-2, log=True)}
    more = short(model, data, tmp_path, pruner={"name": "none"}, space=wider, n_trials=3)
    assert outcome(more.study.trials)[:2] == outcome(first.study.trials)
    assert len(more.study.trials) == 3
    assert more.study.study_name == f"{first.study.study_name}-space-2"


def test_a_study_whose_trials_another_process_still_runs_has_no_summary_yet(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    study = short(model, data, tmp_path).study
    with Worker(tmp_path) as other:
        started = create_trial(
            state=TrialState.RUNNING,
            params={"model.optimizer.lr": 1e-3},
            distributions={"model.optimizer.lr": FloatDistribution(1e-4, 1e-2, log=True)},
            user_attrs={"worker": other.record},
        )
        study.add_trial(started)
        found = short(model, data, tmp_path, n_trials=3, timeout=1e-3)
        assert (found.summary, found.model_dir) == (None, None)
        assert found.best_value == study.trials[2].value  # a resumed trial, the only complete one
    ended = short(model, data, tmp_path, n_trials=3)
    assert ended.summary is not None
    assert ended.study.trials[3].state == TrialState.FAIL
    assert ended.study.trials[4].params == started.params  # the other process's trial is continued


def test_ctrl_c_raises_and_keeps_finished_trials(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fit, calls = BGETrainer.fit, []

    def interrupted(self: BGETrainer, *args: Any, **options: Any) -> None:
        calls.append(1)
        if len(calls) == 4:  # in the second fold of the second trial
            raise KeyboardInterrupt
        fit(self, *args, **options)

    monkeypatch.setattr(BGETrainer, "fit", interrupted)
    with pytest.raises(KeyboardInterrupt, match="the same call continues"):
        short(model, data, tmp_path, pruner=PrunerConfig("none"))
    trials = short(model, data, tmp_path, pruner=PrunerConfig("none")).study.trials
    assert [trial.state for trial in trials] == [TrialState.COMPLETE, TrialState.FAIL, TrialState.COMPLETE]
    assert trials[2].params == trials[1].params
    assert trials[2].user_attrs["reports_before"] == 1  # its first fold is not trained once more


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"n_trials": 0}, "^n_trials: expected 1 or more, got 0"),
        ({"timeout": -1}, "^timeout: expected more than 0 seconds or null, got -1"),
        (
            {"trials": 3},
            "^there is no argument trials; further options of a study are baseline, calibration, compile, cost, ",
        ),
        ({"trainer": {"epochs": 3}}, "^trainer: there is no argument epochs; known are accelerator,"),
        ({"trainer": {**FAST, "devices": 2}}, "^trainer: expected devices=1"),
        ({"space": {}}, "^space: expected at least one parameter"),
        ({"space": lambda trial: {}}, "^space: expected a dict from dotted names to distributions"),
        ({"space": {"model.optimizer.lr": 0.1}}, r"^space.model.optimizer.lr: expected a FloatDistribution"),
        ({"space": {"model.rate": FloatDistribution(0, 1)}}, "^space: there is no option model.rate"),
        ({"space": {"model.dropout": FloatDistribution(0, 2)}}, "dropout"),
        (
            {"space": {"model.seed": IntDistribution(0, 2)}},
            "^space: model.seed can't be searched: .*; seed_replicates trains",
        ),
        (
            {"space": {"data.split.folds": IntDistribution(2, 3)}},
            "^space: data.split.folds can't be searched: .*validated on",
        ),
        (
            {"metric": "loss", "space": {"model.loss.focal_gamma": FloatDistribution(0, 5)}},
            "^space: model.loss.focal_gamma",
        ),
        ({"metric": "rouge"}, "metric.* binary task has f1"),
        ({"pruner": {"kind": "none"}}, "^pruner has no key kind"),
        ({"sampler": {"name": "anneal"}}, "^sampler.name: expected one of tpe, random, grid, qmc, or the path"),
        ({"sampler": {"name": "grid"}}, "^sampler.name: grid needs .* model.optimizer.lr has no step"),
        ({"sampler": "random"}, "^sampler must be a SamplerConfig or a dict of its fields"),
        ({"terminator": True, "max_failures": -1}, "^max_failures: expected 0 or more, got -1"),
        ({"enqueue": [{"model.optimizer.lr": 1.0}]}, "^enqueue, parameter set 1: model.optimizer.lr: expected 0.0001"),
        ({"storage": "postgresql+psycopg://me:secret@h/d"}, "^storage: expected a URL without a password"),
        ({"worker_timeout": 1.0}, "^worker_timeout: expected 6 or more, got 1"),
        ({"storage_timeout": "x"}, "^storage_timeout: expected a number of seconds, got str 'x'"),
        ({"storage": 5}, "^storage: expected a string or null, got int 5"),
        ({"files": 5}, "^files: expected a string or null, got int 5"),
        ({"trackers": 5}, "^trackers: expected a list of mlflow, .*got int"),
        ({"max_epochs": 0}, "max_epochs: a study needs 1 or more, got 0"),
    ],
)
def test_mistakes_name_the_argument(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path, changes: dict[str, Any], says: str
) -> None:
    with pytest.raises(ConfigError, match=says) as caught:
        short(model, data, tmp_path / "run", **changes)
    assert "hpo." not in str(caught.value)
    assert not (tmp_path / "run" / "journal.log").exists()


def test_templates_have_to_be_a_model_and_a_data_module(model: BGEClassifier, data: TextDataModule) -> None:
    with pytest.raises(ConfigError, match=r"^model: expected a BGEClassifier, got 'BAAI/bge-small-en-v1.5'"):
        tune("BAAI/bge-small-en-v1.5", data, SPACE, run_dir="runs/none")  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=r"^data: expected a TextDataModule"):
        tune(model, model, SPACE, run_dir="runs/none")  # type: ignore[arg-type]


def test_conditions_and_yaml_forms_are_accepted_beside_distributions(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    space = {
        "model.loss.name": CategoricalDistribution(["bce", "focal"]),
        "model.loss.focal_gamma": {"low": 0.5, "high": 5.0, "when": {"model.loss.name": "focal"}},
    }
    enqueue = [{"model.loss.name": "bce"}, {"model.loss.name": "focal"}]
    found = short(model, data, tmp_path, space=space, enqueue=enqueue, pruner={"name": "none"})
    assert [set(trial.params) for trial in found.study.trials] == [{"model.loss.name"}, set(space)]


def test_a_callback_of_the_trainer_is_copied_for_each_trial(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    class Counter(pl.Callback):
        seen = 0  # of all copies
        own = 0

        def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
            self.own += 1
            Counter.seen += 1

    counter = Counter()
    short(model, data, tmp_path, trainer={**FAST, "callbacks": [counter]}, pruner={"name": "none"})
    assert (Counter.seen, counter.own) == (6, 0)  # two trials and the configured options, two folds each


def test_the_templates_and_the_loggers_are_as_before(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    logger = logging.getLogger("lightning.pytorch")
    before = (logger.level, optuna.logging.get_verbosity(), dict(model.hparams), dict(data.hparams))
    short(model, data, tmp_path)
    assert (logger.level, optuna.logging.get_verbosity(), dict(model.hparams), dict(data.hparams)) == before
    assert model.net is None
    assert data.schema is None


def test_trials_are_a_data_frame_or_an_error_that_names_pandas(
    model: BGEClassifier, data: TextDataModule, tmp_path: Path
) -> None:
    found = short(model, data, tmp_path)
    if importlib.util.find_spec("pandas") is None:
        with pytest.raises(ImportError, match=r"TuneResult.trials needs pandas: run `pip install pandas`"):
            _ = found.trials
    else:
        assert list(found.trials["number"]) == [trial.number for trial in found.study.trials]
        assert "params_model.optimizer.lr" in found.trials.columns


@pytest.mark.parametrize(
    "distribution",
    [
        FloatDistribution(1e-5, 3e-4, log=True),
        FloatDistribution(0, 1),
        FloatDistribution(0.0, 0.3, step=0.05),
        IntDistribution(1, 8),
        IntDistribution(1, 100, log=True),
        IntDistribution(16, 64, step=16),
        CategoricalDistribution([None, True, 1.5, "a"]),
    ],
)
def test_a_distribution_survives_the_form_of_yaml(distribution: Any) -> None:
    assert parse_space({"name": spec_of("name", distribution)})["name"] == distribution
