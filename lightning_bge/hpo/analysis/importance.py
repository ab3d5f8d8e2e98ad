"""The importance of each hyperparameter for the score, from the complete trials."""

import random
from typing import Literal

import optuna

from lightning_bge.hpo.analysis.history import History
from lightning_bge.hpo.space.search_space import parse_space

MIN_TRIALS = 10  # complete trials; with fewer the shares are mostly chance
MAX_TRIALS = 400  # of more trials a sample is taken: the random forest takes seconds per thousand trials


def parameter_importance(history: History) -> tuple[dict[str, float], str]:
    """The share of the score's variance that each hyperparameter explains (fANOVA, Hutter et al. 2014).

    The random forest has a fixed seed, so that the same study gives the same shares.

    Args:
        history: the study.

    Returns:
        Dotted name -> share, the largest first, 1 in total; and a sentence on what the shares are computed from. Where
        they cannot be computed the dict is empty, and the sentence gives the reason.
    """
    done = [(trial.params, trial.result.value) for trial in history.ranked if trial.result is not None]
    if len(done) < MIN_TRIALS:
        return {}, f"Importance needs {MIN_TRIALS} complete trials; the study has {len(done)}."
    if done[0][1] == done[-1][1]:
        return {}, f"All {len(done)} complete trials have the same score, so no importance can be computed."
    spaces = parse_space(history.space)
    drawn = {name for name in spaces if all(name in params for params, _ in done)}
    sample = done if len(done) <= MAX_TRIALS else random.Random(0).sample(done, MAX_TRIALS)
    usable = {name: spaces[name] for name in sorted(drawn) if len({params[name] for params, _ in sample}) > 1}
    if not usable:
        return {}, "No hyperparameter has several values in the complete trials."
    study = _quiet_study(history.goal.direction)
    study.add_trials(
        optuna.trial.create_trial(value=value, params={name: params[name] for name in usable}, distributions=usable)
        for params, value in sample
    )
    # imported here: scikit-learn takes half a second, and small studies do not need it
    from optuna.importance import FanovaImportanceEvaluator, get_param_importances

    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    note = f"Computed from {len(sample)} complete trials, which are the better ones where others were pruned."
    if left_out := sorted(set(spaces) - drawn):
        note += f" Left out, as some complete trials do not use them: {', '.join(left_out)}."
    return {name: float(share) for name, share in shares.items()}, note


def _quiet_study(direction: Literal["maximize", "minimize"]) -> optuna.Study:
    """A study in memory, without the log line that Optuna writes for each new study."""
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction=direction)
    finally:
        optuna.logging.set_verbosity(verbosity)
