"""`plan`: the hours of a study from Python or a notebook, with the figures of `lightning-bge plan`."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Unpack

from lightning_bge.advisor.plan.config import GivenFigures, PlanConfig
from lightning_bge.advisor.plan.plan import Plan, make_plan
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.runtime.nested_config import as_config
from lightning_bge.templates import SpaceLike, StudyOptions, errors_of_arguments, quiet_libraries, study_of_templates


def plan(
    model: BGEClassifier,
    data: TextDataModule,
    space: SpaceLike,
    *,
    config: PlanConfig | Mapping[str, Any] = PlanConfig(),  # noqa: B008 - frozen
    run_dir: str | Path = "study",
    n_trials: int = 100,
    max_epochs: int = 3,
    metric: str | None = None,
    seed: int = 42,
    trainer: Mapping[str, Any] | None = None,
    **options: Unpack[StudyOptions],
) -> Plan:
    """Estimate the hours of `tune` with these arguments, from a short measurement on this machine.

    Nothing of the measurement is kept, and no study is begun.

    ```python
    print(plan(model, data, space, n_trials=500, config={"deadline": 24}))
    ```

    Args:
        model: the template of the model, as in `tune`.
        data: the template of the data module, as in `tune`.
        space: the search space, as in `tune`.
        config: options of the plan, or a dict of them, such as `{"seconds": 30, "deadline": 24}`, `{"workers": 4}` or
            `{"given": {"step_ms": 20}}`.
        run_dir: the folder of the planned study. Only its name is used, and the disk that it is on.
        n_trials: how many trials the study has in all.
        max_epochs: of each fold of each trial.
        metric: the metric that is optimized, as in `tune`.
        seed: of the model's head, of dropout and of the order of rows.
        trainer: further arguments of the trainer, such as `{"precision": "32-true"}`.
        **options: further options of the study, as in `tune`.

    Returns:
        The plan; `print` shows it as text.

    Raises:
        UserError: an argument or a file is wrong. The message names the argument.
        KeyboardInterrupt: the measurement was interrupted.
    """
    with errors_of_arguments("nothing is kept"), quiet_libraries():
        experiment, hpo = study_of_templates(
            *(model, data, space),
            run_dir=Path(run_dir),
            n_trials=n_trials,
            metric=metric,
            seed=seed,
            trainer={"max_epochs": max_epochs, **(trainer or {})},
            options=options,
        )
        if isinstance(config, Mapping) and "given" in config:
            config = {**config, "given": as_config(GivenFigures, config["given"], "config.given")}
        return make_plan(experiment, hpo, as_config(PlanConfig, config, "config"))
