"""What this package needs of Optuna and Optuna does not offer in public."""

from optuna import Study
from optuna.storages import BaseStorage
from optuna.trial import FrozenTrial


def storage_of(study: Study) -> BaseStorage:
    """The storage of a study.

    A trial can be ended through it whatever `study.tell` would check, and a second study opened beside the first.
    """
    return study._storage


def trial_id_of(trial: FrozenTrial) -> int:
    """The number by which the storage knows a trial; `trial.number` counts within one study."""
    return trial._trial_id
