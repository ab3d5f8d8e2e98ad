from __future__ import annotations

from pathlib import Path

import optuna
from optuna.trial import TrialState, create_trial

from lightning_bge.hpo.analysis.journal import load_study
from lightning_bge.hpo.analysis.time_left import time_left
from lightning_bge.hpo.forecast.eta import Eta
from tests.helpers.made_study import make_study, new_study
from tests.helpers.past_study import options_of

optuna.logging.set_verbosity(optuna.logging.WARNING)


def left(run_dir: Path) -> Eta | None:
    loaded = load_study(run_dir)
    assert loaded is not None
    return time_left(*loaded, options_of(run_dir))


def test_the_time_left_is_known_when_something_runs_and_something_has_ended(tmp_path: Path) -> None:
    eta = left(make_study(tmp_path / "running", 40, running=True))
    assert eta is not None
    assert 0 < eta.low <= eta.mid <= eta.high
    assert left(make_study(tmp_path / "ended", 10)) is None
    (tmp_path / "running" / "config.yaml").write_text("hpo: {}")
    assert left(tmp_path / "running") is None
    study = new_study(tmp_path / "first", 5)
    study.add_trial(create_trial(state=TrialState.RUNNING, user_attrs={"worker": {"host": "another"}}))
    assert left(tmp_path / "first") is None
