"""Types that all packages share: the batches that `data` gives to `models`, and what a model predicts."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from itertools import accumulate, pairwise
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import Tensor

from lightning_bge.errors import ConfigError
from lightning_bge.tokenization import NO_WINDOWS, Pooling, WindowConfig

Task = Literal["binary", "multiclass", "multilabel", "regression"]
TASKS: tuple[str, ...] = get_args(Task)

SCHEMA_FILE = "lightning_bge.json"
SCHEMA_VERSION = 1
ENSEMBLE_FILE = "ensemble.json"  # beside the schema, in a folder of several exported models


@dataclass(frozen=True, slots=True)
class MicroBatch:
    """Sequences one after another, without padding: N rows, S sequences, T tokens in all, longest row first.

    A row is one sequence, so that S is N, unless there are windows: then its windows follow each other.

    Attributes:
        input_ids: int64 [T].
        positions: int64 [T], counted from 0 anew in each sequence.
        cu_seqlens: int32 [S + 1], where each sequence starts, and T at the end.
        lengths: S Python ints, known on the host, so that nothing waits for a kernel.
        token_type_ids: int64 [T], or None where the tokenizer makes none.
        labels: float32 [N] (binary, regression), int64 [N] (multi-class), float32 [N, L] (multi-label), or None.
        rows: int64 [N], the number of each row in its file; stays on the host.
        groups: int64 [N], a number for each group, or None; stays on the host.
        windows: number of sequences of each row, N Python ints; None: one each.
        pooling: how the logits of a row's windows become those of the row; no effect without windows.
    """

    input_ids: Tensor
    positions: Tensor
    cu_seqlens: Tensor
    lengths: tuple[int, ...]
    rows: Tensor
    token_type_ids: Tensor | None = None
    labels: Tensor | None = None
    groups: Tensor | None = None
    windows: tuple[int, ...] | None = None
    pooling: Pooling = "mean"

    @property
    def row_lengths(self) -> tuple[int, ...]:
        """Tokens of each row, all of its windows together: N Python ints."""
        if self.windows is None:
            return self.lengths
        ends = list(accumulate(self.lengths, initial=0))
        return tuple(ends[stop] - ends[start] for start, stop in pairwise(accumulate(self.windows, initial=0)))

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> MicroBatch:
        """A copy whose model inputs and labels are on `device`; None, the default, waits for it unless that is CUDA.

        Lightning moves plain tensors so too, but calls the `to` of a batch class with the device alone. Copies to a
        CUDA device are ordered before what uses them; elsewhere the host could read a value before it is copied.
        """
        queued = torch.device(device).type == "cuda" if non_blocking is None else non_blocking

        def move(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor.to(device, non_blocking=queued)

        return self._map(move)

    def pin_memory(self) -> MicroBatch:
        """A copy in page-locked memory; the DataLoader calls this if `pin_memory` is on."""
        return self._map(lambda tensor: None if tensor is None else tensor.pin_memory())

    def split(self, tokens: int) -> tuple[MicroBatch, ...]:
        """The same rows in micro-batches of at most `tokens` tokens, in order; a longer one is alone."""
        rows = self.row_lengths
        if sum(rows) <= tokens or len(rows) == 1:
            return (self,)
        starts, used = [0], 0
        for number, length in enumerate(rows):
            if used + length > tokens and number > starts[-1]:
                starts.append(number)
                used = 0
            used += length
        ends = list(accumulate(rows, initial=0))
        return tuple(self._part(start, end, ends[start], ends[end]) for start, end in pairwise([*starts, len(rows)]))

    def _part(self, start: int, end: int, first: int, last: int) -> MicroBatch:
        """Rows `start` to `end`, whose tokens are `first` to `last`."""
        windows = None if self.windows is None else self.windows[start:end]
        above = start if self.windows is None else sum(self.windows[:start])
        below = end if windows is None else above + sum(windows)

        def of_tokens(tensor: Tensor) -> Tensor:
            return tensor[first:last]

        def of_rows(tensor: Tensor | None) -> Tensor | None:
            return None if tensor is None else tensor[start:end]

        return replace(
            self,
            input_ids=of_tokens(self.input_ids),
            positions=of_tokens(self.positions),
            cu_seqlens=self.cu_seqlens[above : below + 1] - first,
            lengths=self.lengths[above:below],
            rows=self.rows[start:end],
            token_type_ids=None if self.token_type_ids is None else of_tokens(self.token_type_ids),
            labels=of_rows(self.labels),
            groups=of_rows(self.groups),
            windows=windows,
        )

    def _map(self, move) -> MicroBatch:  # type: ignore[no-untyped-def]
        names = ("input_ids", "positions", "cu_seqlens", "token_type_ids", "labels")
        return replace(self, **{name: move(getattr(self, name)) for name in names})


@dataclass(frozen=True, slots=True)
class Batch:
    """One effective batch: what one optimizer step sees, cut into micro-batches that fit into memory.

    Attributes:
        micro: the micro-batches; with several ranks those of this rank's shard, which may be empty.
        shard_tokens: tokens of each rank's shard; empty where there is one rank.
    """

    micro: tuple[MicroBatch, ...]
    shard_tokens: tuple[int, ...] = ()

    def split(self, tokens: int | None) -> Batch:
        """The same batch in micro-batches of at most `tokens` tokens; None: unchanged."""
        if tokens is None:
            return self
        return replace(self, micro=tuple(part for micro in self.micro for part in micro.split(tokens)))

    @property
    def size(self) -> int:
        """Number of rows."""
        return sum(len(m.rows) for m in self.micro)

    @property
    def tokens(self) -> int:
        """Number of real tokens."""
        return sum(sum(m.lengths) for m in self.micro)

    @property
    def labels(self) -> Tensor | None:
        """All labels, in the order of the micro-batches."""
        parts = [m.labels for m in self.micro if m.labels is not None]
        return torch.cat(parts) if parts else None

    def to(self, device: torch.device | str, non_blocking: bool | None = None) -> Batch:
        """A copy on `device`: see `MicroBatch.to`."""
        return replace(self, micro=tuple(m.to(device, non_blocking) for m in self.micro))

    def pin_memory(self) -> Batch:
        """A copy in page-locked memory."""
        return replace(self, micro=tuple(m.pin_memory() for m in self.micro))


@dataclass(frozen=True, slots=True)
class Schema:
    """What a model reads and predicts; stored as `lightning_bge.json` beside the exported weights.

    Attributes:
        task: binary, multiclass, multilabel or regression.
        labels: names in the order of the model's outputs; binary: (negative, positive); regression: ().
        text_columns: one or two column names.
        max_length: the longest sequence in tokens, special tokens counted.
        threshold: a binary or multi-label score at or above it counts as a yes.
        windows: what becomes of texts that are longer than `max_length`.
    """

    task: Task
    labels: tuple[str, ...]
    text_columns: tuple[str, ...]
    max_length: int
    threshold: float = 0.5
    windows: WindowConfig = NO_WINDOWS

    @property
    def positive_label(self) -> str | None:
        """The label that a score of 1 stands for; None unless the task is binary."""
        return self.labels[1] if self.task == "binary" else None

    @property
    def num_outputs(self) -> int:
        """Width of the model's last layer: 1 for binary and regression, else one for each label."""
        return 1 if self.task in ("binary", "regression") else len(self.labels)

    @classmethod
    def from_plain(cls, content: Mapping[str, Any]) -> Schema:
        """From a dict of the fields, in which tuples may be lists: as JSON and checkpoints hold it."""
        found = {**content, "labels": tuple(content["labels"]), "text_columns": tuple(content["text_columns"])}
        if "windows" in found:  # older folders have none
            found["windows"] = WindowConfig(**found["windows"])
        return cls(**found)

    def save(self, folder: str | Path) -> None:
        """Write the schema into an exported model's folder."""
        content = {"schema_version": SCHEMA_VERSION, **asdict(self)}
        Path(folder, SCHEMA_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")

    @classmethod
    def load(cls, folder: str | Path) -> Schema | None:
        """Read the schema of an exported model; None where the folder holds none (a plain encoder).

        Raises:
            ConfigError: the file is damaged, or was written by a newer version.
        """
        path = Path(folder, SCHEMA_FILE)
        if not path.is_file():
            return None
        try:
            content = dict(json.loads(path.read_text(encoding="utf-8")))
            version = content.pop("schema_version", None)
            if version == SCHEMA_VERSION:
                return cls.from_plain(content)
        except (ValueError, TypeError, KeyError, ConfigError) as error:
            reason = f"{error.__class__.__name__}: {error}"
            raise ConfigError(f"{path} is damaged ({reason}). Restore it, or export the model again") from error
        raise ConfigError(
            f"{path} has schema version {version}, this program reads {SCHEMA_VERSION}: update lightning-bge"
        )
