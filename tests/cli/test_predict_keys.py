"""Which changes make `predict` start anew, in place of going on with what an interrupted run has left."""

from __future__ import annotations

import json
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import pytest

from lightning_bge.callbacks.torch_backends import choose_precision
from lightning_bge.data.pieces import TextPieces
from lightning_bge.prediction.predict import PredictionWriter
from lightning_bge.types import Schema
from tests.helpers.small_models import WORDS, save_model

Run = Callable[..., tuple[int, str, str]]
ROWS = 150  # two pieces
SCHEMA = Schema("binary", ("no", "yes"), ("text",), 16)


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lightning_bge.prediction.predict.TextPieces", partial(TextPieces, rows=100))


@pytest.fixture
def model(tmp_path: Path) -> Path:
    save_model(tmp_path / "model", outputs=1, seed=0)
    SCHEMA.save(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> None:
    """A data set on the hub whose splits have as many rows and the same columns."""

    def load_dataset(name: str, config: Any, *, split: str, revision: Any) -> datasets.Dataset:
        shift = len(split)
        texts = [f"{WORDS[(row + shift) % len(WORDS)]} {WORDS[(row * shift) % len(WORDS)]}" for row in range(ROWS)]
        return datasets.Dataset.from_dict({"text": texts, "id": list(range(ROWS))})

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)


@pytest.fixture
def begin(run: Run, model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., list[str]]:
    """Runs the command up to its first piece; returns its arguments."""
    write = PredictionWriter._write

    def call(file: str) -> list[str]:
        args = ["predict", "--model.name_or_path", str(model), "--data.predict_file", file]
        args += ["--output", str(tmp_path / "out.csv"), "--trainer.enable_progress_bar", "false"]

        def stop_after_one(self: PredictionWriter, *rest: Any) -> None:
            write(self, *rest)
            raise KeyboardInterrupt

        monkeypatch.setattr(PredictionWriter, "_write", stop_after_one)
        assert run(*args)[0] == 130
        monkeypatch.setattr(PredictionWriter, "_write", write)
        return args

    return call


def rows_file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    path.write_text("id,text\n" + "".join(f"{row},{WORDS[row % len(WORDS)]}\n" for row in range(ROWS)))
    return path


OTHER_PRECISION = {"32-true": "bf16-mixed", "bf16-mixed": "32-true"}[choose_precision()[0]]  # than that of `auto`


@pytest.mark.parametrize(
    "change",
    [
        (),
        ("--keep", "[]"),
        ("--data.max_length", "8"),
        ("--data.windows.stride", "2"),
        ("--trainer.precision", OTHER_PRECISION),
        ("--model.attention", "padded"),
        ("--data.table.quoting", "false"),
    ],
)
def test_options_that_change_rows_start_anew(
    begin: Callable[..., list[str]], run: Run, tmp_path: Path, change: tuple[str, ...]
) -> None:
    args = [*begin(str(rows_file(tmp_path))), *change]
    status, _, err = run(*args)
    assert status == 0, err
    assert ("going on after 100 rows" in err) == (not change)
    assert ("starting anew" in err) == bool(change)
    assert len((tmp_path / "out.csv").read_text().splitlines()) == ROWS + 1


def test_another_threshold_or_row_starts_anew(
    begin: Callable[..., list[str]], run: Run, tmp_path: Path, model: Path
) -> None:
    path = rows_file(tmp_path)
    args = begin(str(path))
    schema = json.loads((model / "lightning_bge.json").read_text()) | {"threshold": 0.9}
    (model / "lightning_bge.json").write_text(json.dumps(schema))
    assert "starting anew" in run(*args)[2]
    args = begin(str(path))
    path.write_text(path.read_text().replace("\n7,", "\n8,", 1))
    assert "starting anew" in run(*args)[2]


def test_another_split_of_a_data_set_on_the_hub_starts_anew(
    begin: Callable[..., list[str]], run: Run, tmp_path: Path, hub: None
) -> None:
    args = begin("hf://owner/name:train")
    status, _, err = run(*["hf://owner/name:test" if arg == "hf://owner/name:train" else arg for arg in args])
    assert status == 0, err
    assert "starting anew" in err
    mixed = (tmp_path / "out.csv").read_bytes()
    (tmp_path / "out.csv").unlink()
    status, _, err = run(*["hf://owner/name:test" if arg == "hf://owner/name:train" else arg for arg in args])
    assert (tmp_path / "out.csv").read_bytes() == mixed
    args = begin("hf://owner/name:train")
    assert "going on after 100 rows" in run(*args)[2]
