"""Files that are read, tokenized and cut into batches piece by piece."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from transformers import AutoTokenizer

from lightning_bge.data.batches.config import BatchingConfig
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.data.pieces import Piece, PieceLoader, TextPieces
from lightning_bge.errors import DataError
from lightning_bge.types import Batch
from tests.helpers.small_models import WORDS, word_tokenizer


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("tokenizer")
    word_tokenizer().save_pretrained(folder)
    return str(folder)


def source(tokenizer: str, files: Any, columns: tuple[str, ...] | None = ("text",), **options: Any) -> Any:
    names = [str(file) for file in files] if isinstance(files, list) else str(files)
    data = TextDataModule(tokenizer, predict_file=names, text_columns=columns, max_length=12, **options)
    return data.predict_source()


def write_lines(path: Path, rows: list[dict[str, Any]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def test_rows_that_can_not_be_scored_have_a_reason(tokenizer: str, tmp_path: Path) -> None:
    values = ["good", "", None, ["a"], "x \ud800", 5, "  "]
    path = write_lines(
        tmp_path / "a.jsonl", [{"id": row, "text": value} for row, value in enumerate(values)] + [{"id": 7}]
    )
    (piece,) = TextPieces(source(tokenizer, path))
    half = "half a surrogate pair, which is no character in column 'text'"
    empty = "empty text in column 'text'"
    assert piece.reasons == [None, empty, empty, "no text but list in column 'text'", half, None, empty, empty]
    assert piece.texts == [("good",), *[("",)] * 4, ("5",), ("",), ("",)]
    assert piece.kept == {"id": list(range(8))}


def test_fields_that_a_row_lacks_are_missing_and_all_files_columns_are_kept(tokenizer: str, tmp_path: Path) -> None:
    first = write_lines(tmp_path / "a.jsonl", [{"text": "x", "a": 1}, {"text": "y", "b": [2]}])
    second = tmp_path / "b.csv"
    second.write_text("c,text\n3,z\n")
    found = TextPieces(source(tokenizer, [first, second]))
    assert found.columns == ["a", "b", "c"]
    pieces = list(found)
    assert [piece.file for piece in pieces] == [str(first), str(second)]
    assert pieces[0].kept == {"a": [1, None], "b": [None, [2]], "c": [None, None]}
    assert pieces[1].kept == {"a": [None], "b": [None], "c": ["3"]}


def test_columns_can_be_chosen(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text,id2\n1,x,2\n")
    chosen = source(tokenizer, path)
    assert next(iter(TextPieces(chosen, ["text", "id", "id"]))).kept == {"text": ["x"], "id": ["1"]}
    assert TextPieces(chosen, []).columns == []
    with pytest.raises(DataError, match=r"keep: data file .* has no column 'no'; its columns are 'id', 'text', 'id2'"):
        TextPieces(chosen, ["no"])
    path.write_text("id,text,id\n1,x,2\n")
    with pytest.raises(DataError, match=r"keep: data file .* has more than one column 'id'"):
        TextPieces(chosen)
    assert TextPieces(chosen, []).columns == []


def test_a_text_column_must_exist(tokenizer: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"other": "x"}])
    with pytest.raises(DataError, match="has no column 'text'"):
        TextPieces(source(tokenizer, path))


def test_pairs_of_flagembedding(tokenizer: str, tmp_path: Path) -> None:
    path = write_lines(tmp_path / "a.jsonl", [{"query": "q", "pos": ["p"], "neg": ["n", ""]}])
    (piece,) = TextPieces(source(tokenizer, path, None))
    assert piece.texts == [("q", "p"), ("q", "n"), ("", "")]
    assert piece.kept == {"label": [1, 0, 0]}


def test_types_of_parquet(tokenizer: str, tmp_path: Path) -> None:
    table = pa.table({"text": ["a"], "n": pa.array([1], pa.int16())})
    pq.write_table(table, tmp_path / "a.parquet")
    assert TextPieces(source(tokenizer, tmp_path / "a.parquet")).types == [{"n": pa.int16()}]


def loaded(tokenizer: str, path: Path, rows: int = 7, ranks: int = 1, first: int = 0, **options: Any) -> list[Any]:
    """The batches of each rank, and the pieces that they belong to."""
    found = []
    for rank in range(ranks):
        chosen = source(tokenizer, path, **options)
        loader = PieceLoader(TextPieces(chosen, rows=rows), chosen, BatchingConfig(max_tokens=20, eval_max_tokens=20))
        loader.rank, loader.ranks, loader.first = rank, ranks, first
        found.append((list(loader), list(loader.pending)))
    return found


def in_pieces(batches: list[Batch], counts: list[int]) -> Iterator[list[Batch]]:
    start = 0
    for count in counts:
        yield batches[start : start + count]
        start += count


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "rows.csv"
    texts = [" ".join(WORDS[: 1 + row * 5 % 9]) if row % 6 != 3 else "" for row in range(25)]
    path.write_text("".join(f"{row},{text}\n" for row, text in [("id", "text"), *enumerate(texts)]))
    return path


@pytest.mark.parametrize("ranks", [1, 3])
def test_each_row_is_in_one_batch_with_its_tokens(tokenizer: str, file: Path, ranks: int) -> None:
    plain, seen = AutoTokenizer.from_pretrained(tokenizer), dict[int, list[int]]()
    found = loaded(tokenizer, file, ranks=ranks)
    pieces: list[Piece] = [each.piece for each in found[0][1]]
    assert [len(piece) for piece in pieces] == [7, 7, 7, 4]
    assert len({tuple(each.batches for each in pending) for _, pending in found}) == 1  # as many on all ranks
    for batches, pending in found:
        for piece, own in zip(pieces, in_pieces(batches, [each.batches for each in pending]), strict=True):
            for micro in (micro for batch in own for micro in batch.micro):
                assert sum(micro.lengths) <= 20
                for row, ids in zip(micro.rows.tolist(), micro.input_ids.split(list(micro.lengths)), strict=True):
                    assert piece.first_row + row not in seen
                    seen[piece.first_row + row] = ids.tolist()
    lines = [line.split(",") for line in file.read_text().splitlines()[1:]]
    expected = {int(row): plain(text, truncation=True, max_length=12)["input_ids"] for row, text in lines if text}
    assert seen == expected


def test_pieces_that_are_done_are_left_out(tokenizer: str, file: Path) -> None:
    (batches, pending), *_ = loaded(tokenizer, file, first=2)
    assert [each.piece.first_row for each in pending] == [14, 21]
    (whole, all_pending), *_ = loaded(tokenizer, file)
    skipped = sum(each.batches for each in all_pending[:2])
    assert [batch.tokens for batch in batches] == [batch.tokens for batch in whole[skipped:]]
    (batches, pending), *_ = loaded(tokenizer, file, first=4)
    assert [batch.micro for batch in batches] == [()]
    assert pending == []


def test_a_piece_without_any_text_has_one_empty_batch(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n1,\n2,\n")
    ((batches, pending),) = loaded(tokenizer, path)
    assert [batch.micro for batch in batches] == [()]
    assert pending[0].batches == 1


def test_rows_without_a_token_have_a_reason(tokenizer: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bare, path = word_tokenizer(), tmp_path / "a.csv"
    bare.backend_tokenizer.post_processor = None  # no special tokens
    monkeypatch.setattr("lightning_bge.data.pieces.load_tokenizer", lambda *_: bare)
    path.write_text(f"id,text\n1,{WORDS[0]}\n2,\x01\n3,{WORDS[1]}\n")
    ((batches, pending),) = loaded(tokenizer, path)
    assert pending[0].piece.reasons == [None, "the tokenizer makes no token of it", None]
    assert sorted(row for batch in batches for micro in batch.micro for row in micro.rows.tolist()) == [0, 2]


def test_a_pair_without_room_for_windows_has_a_reason(tokenizer: str, tmp_path: Path) -> None:
    path, long = tmp_path / "a.csv", " ".join(WORDS[:11])
    path.write_text(f"a,b\n{WORDS[0]},{long}\n{long},{long}\n{WORDS[1]},{WORDS[2]}\n")
    ((batches, pending),) = loaded(tokenizer, path, columns=("a", "b"), windows={"stride": 2})
    reasons = pending[0].piece.reasons
    assert reasons[0] is None
    assert reasons[2] is None
    assert "the first text has 11 tokens" in reasons[1]
    rows = [(row, micro.windows) for batch in batches for micro in batch.micro for row in micro.rows.tolist()]
    assert sorted(row for row, _ in rows) == [0, 2]
    assert max(dict(rows)[0]) > 1


def test_truncation_is_counted(tokenizer: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text(f"id,text\n1,{' '.join(WORDS[:15])}\n2,{WORDS[0]}\n")
    chosen = source(tokenizer, path)
    loader = PieceLoader(TextPieces(chosen, rows=1), chosen, BatchingConfig())
    list(loader)
    assert "1 of 2 rows (50%) are truncated to 12 tokens" in str(loader.describe_truncation())
