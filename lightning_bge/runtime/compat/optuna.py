"""What this package needs of Optuna and Optuna does not offer in public."""

from optuna import Study, Trial
from optuna.storages import BaseStorage, RDBStorage, get_storage
from optuna.storages._heartbeat import BaseHeartbeat, is_heartbeat_enabled
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


def study_id_of(study: Study) -> int:
    """The number of a study in its storage."""
    return study._study_id


def trial_as_stored(study: Study, trial: Trial) -> FrozenTrial:
    """A trial as its storage has it now; `Study.get_trials` reads those of all other workers as well."""
    return study._storage.get_trial(trial._trial_id)


def cached_storage(database: RDBStorage) -> BaseStorage:
    """A database behind the cache of trials that `optuna.create_study` puts before it."""
    return get_storage(database)


def stale_trial_ids(storage: BaseStorage, study_id: int) -> set[int] | None:
    """The running trials of a study whose heartbeat is older than the grace period; None: it has no heartbeat."""
    if not is_heartbeat_enabled(storage):
        return None
    assert isinstance(storage, BaseHeartbeat)
    return set(storage._get_stale_trial_ids(study_id))


def record_heartbeat(storage: BaseStorage, trial_id: int) -> bool:
    """Record a sign of life of a trial; False: the storage has no heartbeat."""
    if not is_heartbeat_enabled(storage):
        return False
    assert isinstance(storage, BaseHeartbeat)
    storage.record_heartbeat(trial_id)
    return True
