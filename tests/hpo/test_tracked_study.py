"""By which key and name trackers know a study."""

from __future__ import annotations

from pathlib import Path

from lightning_bge.hpo.tracked_study import TRACKING_KEY, mark_tracked, track
from tests.helpers.fake_study import fake_config, open_fake


def test_a_study_keeps_its_key_with_another_search_space(tmp_path: Path) -> None:
    first = open_fake(tmp_path / "a", fake_config(space={"x": {"low": 0.0, "high": 1.0}}))
    mark_tracked(first, None)
    mark_tracked(first, None)
    second = open_fake(tmp_path / "a", fake_config(space={"x": {"low": 0.0, "high": 2.0}}))
    assert TRACKING_KEY not in second.user_attrs
    mark_tracked(second, None)
    other = open_fake(tmp_path / "b", fake_config())
    mark_tracked(other, None)
    assert second.user_attrs[TRACKING_KEY] == first.user_attrs[TRACKING_KEY] != other.user_attrs[TRACKING_KEY]


def test_names_are_those_of_the_folder_the_outer_fold_or_the_option(tmp_path: Path) -> None:
    (tmp_path / "run" / "outer_folds").mkdir(parents=True)
    config = fake_config(trackers=["tensorboard"])

    def name(folder: Path, **options: str) -> str:
        study = open_fake(folder, config)
        mark_tracked(study, None)
        found = track(study, fake_config(trackers=["tensorboard"], **options), folder).study
        assert found is not None
        return found.name

    assert name(tmp_path / "run") == "run"
    assert name(tmp_path / "run" / "outer_folds" / "1") == "run-outer-fold-1"
    assert name(tmp_path / "other", study_name="mine") == "mine"


def test_without_trackers_a_study_is_not_marked(tmp_path: Path) -> None:
    study = open_fake(tmp_path / "a", fake_config())
    assert track(study, fake_config(), tmp_path / "a").study is None
    assert TRACKING_KEY not in study.user_attrs
