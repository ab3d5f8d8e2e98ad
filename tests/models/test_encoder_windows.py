"""Windows of long texts, against transformers' tokenizer and model, called a window at a time."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import pytest
import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.output.inference import encode_texts
from lightning_bge.models.pooling import pool_windows
from lightning_bge.tokenization import Pooling, WindowConfig
from lightning_bge.types import Batch, MicroBatch, Schema
from tests.helpers.small_models import quiet_trainer, save_model, word_tokenizer
from tests.helpers.small_texts import random_texts

LENGTH, STRIDE = 16, 3


@pytest.fixture(scope="module", params=["bert", "xlm-roberta"])
def folder(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"), request.param, outputs=3)


def rows_of(columns: int) -> list[tuple[str, ...]]:
    """Some fit, and some need up to 8 windows."""
    long = random_texts(12, seed=2, longest=60, columns=1)
    return (
        long
        if columns == 1
        else [(first, *last) for (first,), last in zip(random_texts(12, 0, 4, 1), long, strict=True)]
    )


def plain_logits(model: Any, tokenizer: Any, rows: list[tuple[str, ...]], pooling: str) -> Tensor:
    """One window at a time; rows that fit go through the tokenizer's ordinary call."""
    found = []
    for row in rows:
        options: dict[str, Any] = {"truncation": "only_second" if len(row) == 2 else True, "max_length": LENGTH}
        whole = tokenizer(*row, verbose=False)
        if len(whole["input_ids"]) <= LENGTH:
            found.append(model(**tokenizer(*row, return_tensors="pt")).logits[0])
            continue
        cut = tokenizer(*row, **options, stride=STRIDE, return_overflowing_tokens=True)
        names = [name for name in ("input_ids", "token_type_ids") if name in cut]
        logits = [
            model(**{name: torch.tensor([cut[name][number]]) for name in names}).logits[0]
            for number in range(len(cut["input_ids"]))
        ]
        found.append(torch.stack(logits).mean(0) if pooling == "mean" else torch.stack(logits).max(0).values)
    return torch.stack(found)


def gradients(model: torch.nn.Module, logits: Tensor) -> dict[str, Tensor]:
    model.zero_grad()
    weights = torch.linspace(-1, 2, logits.numel(), dtype=logits.dtype).reshape(logits.shape)
    (logits * weights).sum().backward()
    return {name: value.grad.clone() for name, value in model.named_parameters() if value.grad is not None}


@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_logits_and_gradients_are_those_of_a_window_at_a_time(
    folder: str, pooling: Pooling, columns: int, attention: Literal["packed", "padded"]
) -> None:
    rows, tokenizer = rows_of(columns), AutoTokenizer.from_pretrained(folder)
    schema = Schema("multiclass", ("a", "b", "c"), ("x", "y")[:columns], LENGTH, windows=WindowConfig(STRIDE, pooling))
    net = load_classifier(folder, 3, attention=attention).double()
    [*parts] = encode_texts(rows, tokenizer, schema, max_tokens=100)
    assert len(parts) > 2
    assert max(count for micro in parts for count in micro.windows or ()) > 4
    order = torch.cat([micro.rows for micro in parts])
    ours = torch.cat([net(micro) for micro in parts])[order.argsort()]

    model = AutoModelForSequenceClassification.from_pretrained(folder, dtype=torch.float64, attn_implementation="eager")
    theirs = plain_logits(model, tokenizer, rows, pooling)
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    found, expected = gradients(net.model, ours), gradients(model, theirs)
    assert found.keys() == expected.keys()
    whole = torch.stack([value.norm() for value in expected.values()]).norm()
    for name, value in expected.items():
        assert (found[name] - value).norm() <= 1e-9 * whole, name


@pytest.mark.parametrize("attention", ["packed", "padded"])
def test_a_split_micro_batch_gives_the_same_logits(tmp_path: Path, attention: Literal["packed", "padded"]) -> None:
    schema = Schema("multiclass", ("a", "b", "c"), ("x", "y"), LENGTH, windows=WindowConfig(STRIDE, "max"))
    net = load_classifier(save_model(tmp_path, outputs=3), 3, attention=attention).eval()
    [whole] = encode_texts(rows_of(2), word_tokenizer(), schema, max_tokens=10_000)
    parts = Batch((whole,)).split(90).micro
    assert len(parts) > 2
    assert all(sum(part.lengths) <= 90 or len(part.rows) == 1 for part in parts)
    assert [row for part in parts for row in part.rows.tolist()] == whole.rows.tolist()
    torch.testing.assert_close(torch.cat([net(part) for part in parts]), net(whole), rtol=1e-5, atol=1e-5)


def test_dummy_sequences_change_nothing(tmp_path: Path) -> None:
    schema = Schema("multiclass", ("a", "b", "c"), ("x",), LENGTH, windows=WindowConfig(STRIDE))
    net = load_classifier(save_model(tmp_path, outputs=3), 3).eval()
    [micro] = encode_texts(rows_of(1), word_tokenizer(), schema, max_tokens=10_000)
    expected = net(micro)
    net.token_bucket = 64
    torch.testing.assert_close(net(micro), expected, rtol=1e-5, atol=1e-5)


def test_pooled_logits_are_at_least_fp32() -> None:
    logits = torch.tensor([[1.0, 4.0], [2.0, 0.0], [5.0, 6.0]])
    for dtype, expected in ((torch.bfloat16, torch.float32), (torch.float64, torch.float64)):
        for pooling, values in (("mean", [[1.5, 2.0], [5.0, 6.0]]), ("max", [[2.0, 4.0], [5.0, 6.0]])):
            found = pool_windows(logits.to(dtype), (2, 1), pooling)  # type: ignore[arg-type]
            assert (found.dtype, found.tolist()) == (expected, values)
        assert pool_windows(logits.to(dtype), (1, 1, 1), "mean").tolist() == logits.tolist()


@pytest.mark.parametrize("pooling", ["mean", "max"])
def test_pooling_reads_no_value_on_the_host(pooling: Pooling) -> None:
    """On a GPU that would be to wait for it; tensors of the meta device have no values."""
    assert pool_windows(torch.empty(6, 3, device="meta"), (3, 1, 2), pooling).shape == (3, 3)


def test_predictions_and_export_keep_the_windows(tmp_path: Path) -> None:
    windows = WindowConfig(STRIDE, "max", max_windows=4)
    module = BGEClassifier(save_model(tmp_path / "start"))
    module.set_schema(Schema("binary", ("no", "yes"), ("x",), LENGTH, windows=windows))
    rows = [row[0] for row in rows_of(1)]
    found = module.predict(rows).scores
    for tokens in (1, 40, 100):
        torch.testing.assert_close(module.predict(rows, max_tokens=tokens).scores, found, rtol=1e-5, atol=1e-6)
    again = BGEClassifier(str(module.export(tmp_path / "exported", word_tokenizer())))
    torch.testing.assert_close(again.predict(rows).scores, found, rtol=0, atol=0)
    assert again.schema is not None
    assert again.schema.windows == windows
    module.set_schema(Schema("binary", ("no", "yes"), ("x",), LENGTH))
    truncated = module.predict(rows).scores
    fits = torch.tensor([len(text.split()) + 2 <= LENGTH for text in rows])
    assert 2 <= int(fits.sum()) <= 10
    torch.testing.assert_close(truncated[fits], found[fits], rtol=1e-5, atol=1e-6)
    assert float((truncated[~fits] - found[~fits]).abs().max()) > 1e-3


def test_a_checkpoint_keeps_the_windows(tmp_path: Path) -> None:
    lines = [f"{row[0]},{number % 2}" for number, row in enumerate(rows_of(1))]
    (tmp_path / "rows.csv").write_text("\n".join(["x,label", *lines]) + "\n")
    folder = save_model(tmp_path / "start")
    data = TextDataModule(
        folder,
        train_file=str(tmp_path / "rows.csv"),
        text_columns=("x",),
        max_length=LENGTH,
        cache_dir=str(tmp_path / "cache"),
        windows={"stride": STRIDE, "pooling": "max"},
    )
    module, trainer = BGEClassifier(folder), quiet_trainer()
    trainer.fit(module, datamodule=data)
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    loaded = BGEClassifier.load_from_checkpoint(tmp_path / "last.ckpt")
    assert loaded.schema is not None
    assert loaded.schema.windows == WindowConfig(STRIDE, "max")
    rows = [row[0] for row in rows_of(1)]
    torch.testing.assert_close(loaded.predict(rows).scores, module.predict(rows).scores, rtol=0, atol=0)


def test_without_windows_the_forward_pools_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net = load_classifier(save_model(tmp_path), 1)
    monkeypatch.setattr("lightning_bge.models.encoder.pool_windows", None)
    [micro] = encode_texts(rows_of(1), word_tokenizer(), Schema("binary", ("n", "y"), ("x",), LENGTH), 10_000)
    assert isinstance(micro, MicroBatch)
    assert micro.windows is None
    assert micro.row_lengths is micro.lengths
    assert net(micro).shape == (12, 1)
