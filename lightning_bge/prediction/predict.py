"""Predict the rows of files of any size: read, tokenized, computed and written piece by piece."""

import logging
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, Trainer

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.encoded_file import Source, stamp, stamp_of_files
from lightning_bge.data.pieces import LoadedPiece, PieceLoader, TextPieces
from lightning_bge.data.tables.files import HUB
from lightning_bge.errors import DataError
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.distributed import gather
from lightning_bge.models.metrics.predictions import Predictions
from lightning_bge.models.predictor import Predictor
from lightning_bge.prediction.columns import ResultColumns
from lightning_bge.prediction.first_pass import check_rows
from lightning_bge.prediction.formats import Encoder, OutputFormat
from lightning_bge.prediction.progress import RowProgressBar
from lightning_bge.prediction.sink import DraftSink, Sink, StreamSink
from lightning_bge.runtime.output_file import is_stream
from lightning_bge.runtime.run_folder import hub_commit
from lightning_bge.types import Schema

log = logging.getLogger("lightning_bge")

SIGTERM = 128 + 15  # a shell's exit status after that signal
FORMAT_VERSION = 1  # raise it when the same options give other rows: drafts of earlier versions are not continued


def predict_files(
    trainer: Trainer, models: Sequence[BGEClassifier], data: TextDataModule, *, output: str, keep: Sequence[str] | None
) -> tuple[int, Counter[str]]:
    """Write the predictions of a file, or of several.

    A first pass checks all rows before a model is loaded. A run that was interrupted is continued by the next one with
    the same models, files and options.

    Args:
        trainer: computes; it may have several devices.
        models: one, or those of an ensemble.
        data: `predict_file`, and how it is read.
        output: the file, device or pipe to write.
        keep: columns of the input to carry over; None: all but the texts.

    Returns:
        The number of rows, and how many of them have no score, by the reason; on rank 0.

    Raises:
        UserError: the ending of the output, a file or a column is wrong; the message says what to do.
    """
    stream = is_stream(output)
    form = OutputFormat.of(output, stream)
    source = data.predict_source()
    assert data.schema is not None
    pieces = TextPieces(source, keep)
    found = check_rows(pieces, form)
    loader = PieceLoader(pieces, source, data.batching)
    schema = data.schema = replace(data.schema, max_length=loader.max_length)
    columns = ResultColumns(schema, pieces.columns, len(pieces.files) > 1)
    encoder = form.encoder(columns.names, columns.types(found.types) if form.kind == "parquet" else {})
    key = _key(trainer, models, source, schema) | {"format": vars(form), "columns": columns.names}
    # a single file may be moved; a data set on the hub has no other mark than its name and its rows
    named = [name for name in pieces.files if len(pieces.files) > 1 or name.startswith(HUB)]
    key |= {"keep": pieces.columns, "max_tokens": loader.limit, "files": named, "rows": found.rows}
    sink: Sink = StreamSink(output) if stream else DraftSink(output, form, key)
    writer = PredictionWriter(sink, loader, columns, encoder, found.rows)
    trainer.callbacks.append(writer)  # type: ignore[attr-defined]
    try:
        trainer.predict(Predictor(models, schema), dataloaders=loader, return_predictions=False)
        if trainer.is_global_zero:
            if stamp_of_files(source.files) != source.stamp or sink.rows != found.rows:
                raise DataError(f"data.predict_file: {source.files} was changed while it was read. Start again")
            sink.complete()
    finally:
        writer.close()
        trainer.callbacks.remove(writer)  # type: ignore[attr-defined]
    if (text := loader.describe_truncation()) is not None:
        log.warning("%s", text)
    return sink.rows, sink.reasons


class PredictionWriter(Callback):
    """Writes each piece when all of its batches have come back, and shows the progress.

    Args:
        sink: where to; only rank 0 uses it.
        loader: of the batches.
        columns: what is written.
        encoder: how it is written.
        total: rows in all files.
    """

    def __init__(self, sink: Sink, loader: PieceLoader, columns: ResultColumns, encoder: Encoder, total: int) -> None:
        self._sink, self._loader, self._columns, self._encoder, self._total = sink, loader, columns, encoder, total
        self._opened, self._done = False, 0
        self._bar: RowProgressBar | None = None

    def setup(self, trainer: Trainer, pl_module: Any, stage: str) -> None:
        """Open the output on rank 0, and go on behind the pieces that it holds, on all ranks."""
        if trainer.is_global_zero:
            self._sink.open(self._encoder.header)
            self._opened = True
        self._loader.first, self._done = trainer.strategy.broadcast((self._sink.pieces, self._sink.rows))
        self._loader.rank, self._loader.ranks = trainer.global_rank, trainer.world_size
        bar = trainer.progress_bar_callback
        if isinstance(bar, RowProgressBar):
            self._bar = bar
            bar.start(self._total, self._done)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        """Keep the outputs, and write their piece where they complete it."""
        if not self._loader.pending:  # the only batch of a run whose rows were all there
            return
        piece = self._loader.pending[0]
        if outputs:
            piece.found.append(Predictions(outputs["rows"], outputs["logits"]))
        piece.batches -= 1
        if not piece.batches:
            self._loader.pending.popleft()
            self._write(trainer, pl_module, piece)
            self._done += len(piece.piece)
        if self._bar is not None:
            here = sum(len(part.rows) for part in piece.found) if piece.batches else 0
            self._bar.move_to(min(self._done + here * trainer.world_size, self._total))
        if trainer.received_sigterm:
            if trainer.is_global_zero:
                kept = " Finished work is kept: the same command continues" * self._sink.is_kept
                print(f"lightning-bge: SIGTERM: stopped.{kept}", file=sys.stderr)
            raise SystemExit(SIGTERM)

    def _write(self, trainer: Trainer, predictor: Predictor, loaded: LoadedPiece) -> None:
        parts = loaded.found if trainer.world_size == 1 else gather(loaded.found)
        if not trainer.is_global_zero:
            return
        piece = loaded.piece
        found = predictor.combine(Predictions.collect(parts)) if parts else None
        data = self._encoder.encode(self._columns.values(piece, found))
        self._sink.append(data, len(piece), Counter(reason for reason in piece.reasons if reason is not None))

    def close(self) -> None:
        """Close the output and the bar, whether all is done or not."""
        if self._opened:
            self._sink.close()
        if self._bar is not None:
            self._bar.stop()


def describe_reasons(rows: int, reasons: Counter[str]) -> str:
    """One line on rows without a score."""
    count = sum(reasons.values())
    parts = ", ".join(f"{reason} ({number:,})" for reason, number in reasons.most_common(5))
    more = ", ..." * (len(reasons) > 5)
    return f"{count:,} of {rows:,} rows have no score; the column reason says why: {parts}{more}"


def _key(trainer: Trainer, models: Sequence[BGEClassifier], source: Source, schema: Schema) -> dict[str, Any]:
    """All that scores depend on, as plain data."""
    hparams = models[0].hparams
    return {
        "versions": [FORMAT_VERSION, version("torch"), version("transformers"), version("tokenizers")],
        "content": source.stamp,
        "table": vars(source.table),
        "texts": source.text_columns,
        "models": [_content(model.name_or_path, model.hparams["revision"]) for model in models],
        "tokenizer": [source.tokenizer.name, source.tokenizer.stamp],
        "schema": str(schema),
        "options": {name: hparams[name] for name in ("attention", "trust_remote_code")},
        "trainer": [str(trainer.precision), str(trainer.accelerator.__class__.__name__), trainer.world_size],
    }


def _content(name: str, revision: str | None) -> Any:
    """A folder's files with their sizes and times, or the commit of a model of the hub."""
    return stamp(name) if Path(name).expanduser().is_dir() else [name, hub_commit(name, revision)]
