"""An experiment of the objects in `small_search`, whose hyperparameters have dotted names."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import Namespace

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.hpo.text_experiment import TextExperiment
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.runtime.dotted_config import LINKS
from tests.helpers.small_search import SPACE, make, write_files

DOTTED_SPACE = {"model.optimizer.lr": SPACE["lr"], "model.dropout": SPACE["dropout"]}


def small_experiment(folder: Path, epochs: int) -> TextExperiment:
    """Two folds of 20 rows, in batches of 8."""
    build = make(write_files(folder), epochs=epochs).build
    config = Namespace({"model.optimizer.lr": 1e-3, "model.dropout": 0.1, "trainer.max_epochs": epochs})
    for source, target in LINKS:
        config[source] = config[target] = None

    def create(options: Namespace) -> TextTrialSetup:
        return build({"lr": options["model.optimizer.lr"], "dropout": options["model.dropout"]})

    return TextExperiment(
        config=config,
        create=create,
        validate=lambda _: None,
        plain=lambda options: dict(options.as_flat().__dict__),
        datamodule=create(config).datamodule,
        monitor=MonitorConfig("loss"),
        compile=CompileConfig(),
        memory=MemoryConfig(),
        run_dir=folder / "study",
    )
