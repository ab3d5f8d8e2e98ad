"""How much each searched setting matters for the score, from the trials that ran to their end."""

from __future__ import annotations

import json
import random

import optuna
from optuna.distributions import BaseDistribution, json_to_distribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances

from lightning_bge.hpo.analysis.history import History

FEWEST = 10  # complete trials: with fewer the shares are mostly chance
MOST = 400  # of more a sample is taken: the forest takes seconds a thousand trials


def parameter_importance(history: History) -> tuple[dict[str, float], str]:
    """Each setting's share of the score's variance (fANOVA, Hutter et al. 2014), with a fixed seed.

    Args:
        history: the study.

    Returns:
        Dotted name -> share, the largest first, 1 in all; and a sentence on what they rest on. No shares where nothing
        can be said; the sentence then says why.
    """
    done = history.ranked
    if len(done) < FEWEST:
        return {}, f"Needs {FEWEST} trials that ran to their end; there {_are(len(done))} so far."
    if done[0].value == done[-1].value:
        return {}, f"All {len(done)} complete trials have the same score, so that no setting can be told to matter."
    spaces = {name: _distribution(spec) for name, spec in history.space.items()}
    drawn = {name for name in spaces if all(name in trial.params for trial in done)}
    sample = done if len(done) <= MOST else random.Random(0).sample(done, MOST)
    usable = {name: spaces[name] for name in sorted(drawn) if len({trial.params[name] for trial in sample}) > 1}
    if not usable:
        return {}, "No setting was drawn from several values in all complete trials."
    study = optuna.create_study(direction=history.direction)
    study.add_trials(
        optuna.trial.create_trial(
            value=trial.value, params={name: trial.params[name] for name in usable}, distributions=usable
        )
        for trial in sample
    )
    shares = get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))
    note = f"From {len(sample)} trials that ran to their end, which are the better ones where others were ended early."
    if left_out := sorted(set(spaces) - drawn):
        note += f" Left out, as not all of them drew it: {', '.join(left_out)}."
    return {name: float(share) for name, share in shares.items()}, note


def _are(count: int) -> str:
    return "is 1" if count == 1 else f"are {count}"


def _distribution(spec: dict[str, object]) -> BaseDistribution:
    return json_to_distribution(json.dumps({key: value for key, value in spec.items() if key != "when"}))
