"""Runs in TensorBoard: a folder for each trial, below `tensorboard/` of the run folder."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning.pytorch.loggers import TensorBoardLogger

from lightning_bge.hpo.trackers.record import Points, TrialRecord, new_points
from lightning_bge.hpo.trackers.tracker import Known, Tracker, TrialRun
from lightning_bge.runtime.run_folder import create_run_dir

FOLDER = "tensorboard"  # in the run folder
STATE, TEXT = "state", "/text_summary"  # TensorBoard adds the latter to the name of a text
VALUES = ("value", "cost")


class TensorBoardRun(TrialRun):
    """The folder of a trial."""

    logger: TensorBoardLogger

    def flush(self) -> None:
        """Write to the disk what waits in memory."""
        self.logger.experiment.flush()

    def begin(self, record: TrialRecord) -> None:
        """The hyperparameters, and which trial it is."""
        self.logger.hparams.update(record.params)
        for summary in _hparams(record, None):
            self.logger.experiment.file_writer.add_summary(summary)
        self._write_texts(record)

    def end(self, record: TrialRecord) -> None:
        """The last points, the value, how the trial ended, and the state."""
        self.log(record)
        if record.values:
            self.logger.log_metrics(record.values, record.last_step)
        for summary in _hparams(record, record.state not in ("failed", "killed")):
            self.logger.experiment.file_writer.add_summary(summary)
        self._write_texts(record)
        self.logger.experiment.add_text(STATE, str(record.state))
        self.logger.finalize("success")

    def _write_texts(self, record: TrialRecord) -> None:
        for name, value in record.tags.items():
            self.logger.experiment.add_text(name, value)
        self.flush()


class TensorBoardTracker(Tracker):
    """The runs of a study in TensorBoard. It has no options."""

    name = "tensorboard"

    def open(self) -> None:
        """Make the folder."""
        create_run_dir(self.study.run_dir / FOLDER)

    def begin(self, record: TrialRecord) -> TensorBoardRun:
        """Make the trial's folder."""
        run = self._open_run(record)
        run.begin(record)
        return run

    def _open_run(self, record: TrialRecord, known: Points | None = None) -> TensorBoardRun:
        logger = TensorBoardLogger(self.study.run_dir / FOLDER, name="", version=record.name)
        return TensorBoardRun(record.key, logger, known)

    def known(self) -> dict[str, Known]:
        """Nothing by keys, which the folders have not: `complete` looks at each."""
        return {}

    def complete(self, record: TrialRecord) -> None:
        """Write what the trial's folder lacks."""
        folder = self.study.run_dir / FOLDER / record.name
        texts, points = _read(folder) if folder.is_dir() else ({}, {})
        known = {name: values for name, values in points.items() if name not in VALUES}
        if texts.get(STATE) == record.state and not new_points(record.points, known):
            return
        run = self._open_run(record, known)
        if "trial" not in texts:
            run.begin(record)
        run.end(record)

    def end_study(self, summary: Mapping[str, Any], report: Path | None) -> None:
        """Nothing: the folder of the runs is the study's, and the report is beside it."""


def _hparams(record: TrialRecord, succeeded: bool | None) -> tuple[Any, ...]:
    """What TensorBoard's HPARAMS page reads: at the beginning of a run (None), or at its end."""
    from tensorboard.plugins.hparams.api_pb2 import STATUS_FAILURE
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData
    from torch.utils.tensorboard.summary import hparams

    plain = {
        name: value if isinstance(value, bool | int | float | str) else str(value)
        for name, value in record.params.items()
    }
    experiment, start, end = hparams(plain, {"value": 0.0})
    if succeeded is None:
        return experiment, start
    if not succeeded:
        content = end.value[0].metadata.plugin_data
        data = HParamsPluginData.FromString(content.content)
        data.session_end_info.status = STATUS_FAILURE
        content.content = data.SerializeToString()
    return (end,)


def _read(folder: Path) -> tuple[dict[str, str], Points]:
    """The texts and the scalars of a folder; a file that a killed process has cut off is read as far as it goes."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder), size_guidance={"scalars": 0, "tensors": 0})
    events.Reload()
    tags = events.Tags()
    texts = {
        name.removesuffix(TEXT): events.Tensors(name)[-1].tensor_proto.string_val[0].decode()
        for name in tags["tensors"]
        if name.endswith(TEXT)
    }
    return texts, {name: {event.step: event.value for event in events.Scalars(name)} for name in tags["scalars"]}
