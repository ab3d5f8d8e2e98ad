"""The study of a run folder: created, continued, moved, and begun anew with a changed search space."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import optuna
import pytest
from optuna.distributions import FloatDistribution
from optuna.trial import TrialState

from lightning_bge.errors import StudyError
from lightning_bge.hpo.analysis.journal import TAKEN_OVER, load_study, study_names
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.storage.journal import open_storage
from lightning_bge.hpo.storage.workers import Worker
from lightning_bge.hpo.study import open_study, study_storage
from lightning_bge.hpo.trials import NOT_TRAINED, attempts, is_to_be_continued, key_of
from tests.helpers.fake_study import STEPS, fake_config, open_fake, run_fake, value_of

SETTINGS = {"monitor.metric": "f1", "model.name_or_path": "m"}
LR = {"low": 0.0, "high": 1.0}


def opened(folder: Path, configured: dict[str, Any] | None = None, **options: Any) -> optuna.Study:
    """The study of a space over lr alone, unless the options have another one."""
    config = fake_config(**{"space": {"lr": LR}, **options})
    folder.mkdir(exist_ok=True)
    return open_study(
        study_storage(folder, config), config, "maximize", STEPS, settings_of(config, configured), configured
    )


def settings_of(config: StudyConfig, configured: dict[str, Any] | None = None) -> dict[str, Any]:
    """As a run has them: without what each trial draws."""
    space = parse_space(config.space)
    always = {name for name in space if name not in space.when}
    return {**SETTINGS, **{name: value for name, value in (configured or {}).items() if name not in always}}


def tried(study: optuna.Study, *values: dict[str, Any]) -> None:
    """Complete trials with these values."""
    for given in values:
        study.enqueue_trial(given)
        trial = study.ask()
        for name in given:
            trial.suggest_float(name, 0.0, 1.0)
        study.tell(trial, value_of(given))


def test_other_options_are_named(tmp_path: Path) -> None:
    opened(tmp_path)
    config = fake_config(space={"lr": LR})
    place = study_storage(tmp_path, config)
    with pytest.raises(StudyError, match=r"model.name_or_path: m in the folder, other requested"):
        open_study(place, config, "maximize", STEPS, {**SETTINGS, "model.name_or_path": "other"})
    assert len(open_storage(tmp_path / "journal.log").get_all_studies()) == 1


def test_content_that_a_call_does_not_read_is_remembered_and_compared(tmp_path: Path) -> None:
    config = fake_config(space={"lr": LR})

    def resumed(**content: str) -> optuna.Study:
        options = SETTINGS | {f"{name} (content)": value for name, value in content.items()}
        return open_study(study_storage(tmp_path, config), config, "maximize", STEPS, options)

    resumed(train="a")
    resumed(train="a", test="b")
    assert resumed(train="a").user_attrs["settings"]["test (content)"] == "b"
    with pytest.raises(StudyError, match=r"test \(content\): b in the folder, c requested"):
        resumed(train="a", test="c")
    with pytest.raises(StudyError, match=r"train \(content\): a in the folder, b requested"):
        resumed(train="b", test="b")


@pytest.mark.parametrize("how", ["moved", "copied"])
def test_a_folder_of_another_name_goes_on_with_its_study(tmp_path: Path, how: str) -> None:
    study, _ = run_fake(tmp_path / "a", fake_config(n_trials=3))
    with Worker(tmp_path / "a") as worker:  # one trial was running, its process lives
        running = optuna.trial.create_trial(state=TrialState.RUNNING, user_attrs={"worker": worker.record})
        study._storage.create_new_trial(study._study_id, running)
        shutil.copytree(tmp_path / "a", tmp_path / "b") if how == "copied" else (tmp_path / "a").rename(tmp_path / "b")
        if how == "moved":
            assert Worker(tmp_path / "b").id != worker.id
    found, _ = run_fake(tmp_path / "b", fake_config(n_trials=5))
    assert found.study_name == "a"
    assert len(open_storage(tmp_path / "b" / "journal.log").get_all_studies()) == 1
    assert [trial.state.name for trial in found.trials].count("COMPLETE") == 5
    assert not [trial for trial in found.trials if trial.state == TrialState.RUNNING]
    assert len({key_of(trial.params) for trial in found.trials if trial.params}) == 5
    loaded = load_study(tmp_path / "b")
    assert loaded is not None
    assert loaded[0].study_name == "a"


def test_a_wider_space_takes_over_all_trials(tmp_path: Path) -> None:
    old = opened(tmp_path)
    tried(old, {"lr": 0.25}, {"lr": 0.75})
    new = opened(tmp_path, space={"lr": {"low": 0.0, "high": 2.0}})
    assert new.study_name != old.study_name
    assert [(trial.params, trial.value, trial.number) for trial in new.trials] == [
        (trial.params, trial.value, trial.number) for trial in old.trials
    ]
    assert [trial.distributions["lr"].high for trial in new.trials] == [2.0, 2.0]  # type: ignore[attr-defined]
    assert opened(tmp_path, space={"lr": {"low": 0.0, "high": 2.0}}).study_name == new.study_name
    loaded = load_study(tmp_path)
    assert loaded is not None
    assert loaded[0].study_name == new.study_name


def test_a_narrower_space_leaves_out_what_does_not_fit_and_keeps_the_numbers(tmp_path: Path) -> None:
    tried(opened(tmp_path), {"lr": 0.25}, {"lr": 0.75}, {"lr": 0.5})
    new = opened(tmp_path, space={"lr": {"low": 0.4, "high": 1.0}})
    assert [trial.state for trial in new.trials] == [TrialState.FAIL, TrialState.COMPLETE, TrialState.COMPLETE]
    assert "expected 0.4 to 1.0, got 0.25" in new.trials[0].user_attrs[NOT_TRAINED]
    assert list(attempts(new.trials)) == [1, 2]


def test_a_hyperparameter_that_is_added_or_removed_has_its_configured_value(tmp_path: Path) -> None:
    configured = {"lr": 0.1, "dropout": 0.5}
    tried(opened(tmp_path, configured), {"lr": 0.25}, {"lr": 0.75})
    both = {"lr": LR, "dropout": LR}
    new = opened(tmp_path, configured, space=both)
    assert [trial.params for trial in new.trials] == [{"lr": 0.25, "dropout": 0.5}, {"lr": 0.75, "dropout": 0.5}]
    tried(new, {"lr": 0.25, "dropout": 0.75})
    last = opened(tmp_path, {"lr": 0.25, "dropout": 0.5}, space={"dropout": LR})  # lr is no longer searched
    assert [(trial.state.name, trial.params) for trial in last.trials] == [
        ("COMPLETE", {"dropout": 0.5}),
        ("FAIL", {}),
        ("COMPLETE", {"dropout": 0.75}),
    ]
    assert last.trials[1].user_attrs[NOT_TRAINED] == "lr is 0.75"
    assert len(study_names(open_storage(tmp_path / "journal.log"))) == 3


def test_trials_that_report_at_other_steps_are_left_out(tmp_path: Path) -> None:
    tried(opened(tmp_path), {"lr": 0.25})
    config = fake_config(space={"lr": {"low": 0.0, "high": 2.0}})
    new = open_study(study_storage(tmp_path, config), config, "maximize", Steps(2, 5), SETTINGS)
    assert new.trials[0].user_attrs[NOT_TRAINED] == "it reports at other steps"


def test_a_space_that_is_changed_and_changed_back_has_all_its_trials(tmp_path: Path) -> None:
    first = opened(tmp_path)
    tried(first, {"lr": 0.25}, {"lr": 0.75})
    tried(opened(tmp_path, space={"lr": {"low": 0.4, "high": 1.0}}), {"lr": 0.5})
    back = opened(tmp_path, space={"lr": {"low": 0.0, "high": 1.0}})
    assert [(trial.params, trial.state) for trial in back.trials] == [
        ({"lr": value}, TrialState.COMPLETE) for value in (0.25, 0.75, 0.5)
    ]
    assert [trial.value for trial in back.trials[:2]] == [trial.value for trial in first.trials]
    assert list(attempts(back.trials)) == [0, 1, 2]


def test_a_change_of_the_space_that_was_interrupted_is_completed(tmp_path: Path) -> None:
    tried(opened(tmp_path), {"lr": 0.25}, {"lr": 0.75}, {"lr": 0.5})
    wider = {"lr": {"low": 0.0, "high": 2.0}}
    new = opened(tmp_path, space=wider)
    lines = (tmp_path / "journal.log").read_bytes().splitlines(keepends=True)
    done = next(number for number, line in enumerate(lines) if TAKEN_OVER.encode() in line and b"true" in line)
    records = [json.loads(line) for line in lines]
    begun = next(i for i, record in enumerate(records) if record.get("study_name") == new.study_name)
    for kept in range(begun + 1, done + 1):
        folder = tmp_path / str(kept)
        folder.mkdir()
        (folder / "journal.log").write_bytes(b"".join(lines[:kept]))
        found = opened(folder, space=wider)
        assert [trial.params for trial in found.trials] == [{"lr": 0.25}, {"lr": 0.75}, {"lr": 0.5}]
        assert found.user_attrs[TAKEN_OVER]


def test_a_trial_whose_process_was_killed_is_continued_in_the_changed_space(tmp_path: Path) -> None:
    study = opened(tmp_path)
    running = optuna.trial.create_trial(
        state=TrialState.RUNNING,
        params={"lr": 0.25},
        distributions={"lr": FloatDistribution(0.0, 1.0)},
        user_attrs={"worker": Worker(tmp_path).record},  # its lock was never taken
    )
    study.add_trial(running)
    new = opened(tmp_path, space={"lr": {"low": 0.0, "high": 2.0}})
    assert (new.trials[0].state, new.trials[0].params) == (TrialState.FAIL, {"lr": 0.25})
    assert is_to_be_continued(attempts(new.trials)[0])


@pytest.mark.parametrize(
    ("options", "difference"),
    [
        ({"space": {"lr": {"low": 0.0, "high": 2.0}}}, r"hpo.space.lr.high: 1.0 in the folder, 2.0 requested"),
        ({"sampler": {"name": "random"}}, "hpo.sampler.name: tpe in the folder, random requested"),
        ({"pruner": {"name": "median"}}, "hpo.pruner.name: none in the folder, median requested"),
    ],
)
def test_other_options_are_refused_while_another_process_is_at_work(
    tmp_path: Path, options: dict[str, Any], difference: str
) -> None:
    opened(tmp_path)
    with Worker(tmp_path):
        with pytest.raises(StudyError, match=difference):
            opened(tmp_path, **options)
        opened(tmp_path, n_trials=100)
    opened(tmp_path, **options)  # nobody is at work any more


def test_the_name_of_a_study_is_that_of_its_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert open_fake(Path(), fake_config()).study_name == "here"
