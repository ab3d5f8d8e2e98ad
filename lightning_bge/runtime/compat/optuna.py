"""What this package needs of Optuna and Optuna does not offer in public."""

from optuna import Study, Trial
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


def running_trial(study: Study, template: FrozenTrial) -> Trial:
    """Begin a trial with all that is in a template, in one write of the storage; `Study.ask` needs several.

    So there is no moment at which a killed process leaves a trial behind that has no parameters, or no worker.
    """
    trial_id = study._storage.create_new_trial(study._study_id, template)
    return Trial(study, trial_id)
