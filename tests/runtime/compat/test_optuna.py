"""The private attributes of Optuna that this package reads are still there, and mean what it takes them for."""

from __future__ import annotations

import optuna
from optuna.storages import BaseStorage, InMemoryStorage

from lightning_bge.runtime.compat.optuna import storage_of, trial_id_of


def test_a_study_has_its_storage() -> None:
    storage = InMemoryStorage()
    study = optuna.create_study(storage=storage)
    assert hasattr(study, "_storage"), f"Study._storage is gone in Optuna {optuna.__version__}"
    assert storage_of(study) is storage
    assert isinstance(storage_of(study), BaseStorage)


def test_a_trial_has_the_number_by_which_its_storage_knows_it() -> None:
    storage = InMemoryStorage()
    optuna.create_study(storage=storage).ask()
    study = optuna.create_study(storage=storage)
    study.ask()
    [trial] = study.get_trials()
    assert hasattr(trial, "_trial_id"), f"FrozenTrial._trial_id is gone in Optuna {optuna.__version__}"
    assert trial.number == 0
    assert storage.get_trial(trial_id_of(trial)).number == 0
    assert trial_id_of(trial) != trial.number  # the other study has the first trial of the storage
    storage_of(study).set_trial_user_attr(trial_id_of(trial), "key", 1)
    assert study.get_trials()[0].user_attrs == {"key": 1}
