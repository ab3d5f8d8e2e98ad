"""`lightning-bge predict`: all rows in order, in every format, interrupted or not."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.ensemble import Ensemble
from lightning_bge.types import ENSEMBLE_FILE, Schema, Task
from tests.helpers.cli_processes import start, wait_for
from tests.helpers.paths import ROOT
from tests.helpers.small_models import WORDS, save_model, word_tokenizer

Run = Callable[..., tuple[int, str, str]]

SCHEMAS: dict[Task, Schema] = {
    "binary": Schema("binary", ("no", "yes"), ("text",), 16, threshold=0.5),
    "multiclass": Schema("multiclass", ("x", "y,z", "w"), ("text",), 16),
    "multilabel": Schema("multilabel", ("x", "y", "z"), ("text",), 16, threshold=0.4),
    "regression": Schema("regression", (), ("text",), 16),
}
TEXTS = [" ".join(WORDS[start : start + 1 + start % 7]) for start in range(20)]
TEXTS[3], TEXTS[11] = "", "  "
SCORED = [row for row, text in enumerate(TEXTS) if text.strip()]


def save(folder: Path, schema: Schema, seed: int = 0) -> str:
    save_model(folder, outputs=schema.num_outputs, seed=seed)
    schema.save(folder)
    return str(folder)


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save(tmp_path_factory.mktemp("model"), SCHEMAS["binary"])


@pytest.fixture(scope="module")
def rows_file(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Two rows without a text, equal ids, and columns whose names are taken."""
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["id", "text", "label", "note"])
        writer.writerows([7, text, row % 2, 'a "b",\r\nä'] for row, text in enumerate(TEXTS))
    return str(path)


def arguments(model: str, file: str, output: Path | str, *more: str) -> list[str]:
    names = ["predict", "--model.name_or_path", model, "--data.predict_file", file, "--output", str(output)]
    return [*names, "--trainer.precision", "32-true", "--trainer.accelerator", "cpu", *more]


@pytest.mark.parametrize("task", SCHEMAS)
def test_scores_are_those_of_the_model_in_the_order_of_the_rows(
    run: Run, rows_file: str, tmp_path: Path, task: Task
) -> None:
    schema, output = SCHEMAS[task], tmp_path / "new" / "found.csv"
    folder = save(tmp_path / "model", schema)
    status, out, err = run(*arguments(folder, rows_file, output))
    assert status == 0, err
    found = pd.read_csv(output, keep_default_na=False, dtype=str)
    names = ["score"] if task in ("binary", "regression") else [f"score:{name}" for name in schema.labels]
    own = ["row", *names, *([] if task == "regression" else ["label"]), "reason"]
    assert list(found) == [*own, "id", "input_label", "note"]
    assert found["row"].tolist() == [str(row) for row in range(20)]
    assert set(found["note"]) == {'a "b",\r\nä'}
    assert set(found["id"]) == {"7"}
    module = BGEClassifier(folder, task)
    expected = module.predict([TEXTS[row] for row in SCORED])
    scores = found.loc[SCORED, names].astype(float).to_numpy()
    assert scores == pytest.approx(expected.scores.reshape(len(SCORED), -1).numpy(), abs=1e-6)
    if expected.labels is not None:
        assert found.loc[SCORED, "label"].tolist() == expected.labels
    assert set(found.loc[SCORED, "reason"]) == {""}
    assert found.loc[[3, 11], "reason"].tolist() == ["empty text in column 'text'"] * 2
    assert set(found.loc[[3, 11], names].to_numpy().ravel()) == {""}
    lines = out.splitlines()
    assert lines[-2:] == [
        f"20 rows: {output}",
        "2 of 20 rows have no score; the column reason says why: empty text in column 'text' (2)",
    ]
    assert [path.name for path in output.parent.iterdir()] == ["found.csv"]


@pytest.mark.parametrize("name", ["a.tsv", "a.csv.gz", "a.jsonl", "a.parquet"])
def test_every_format_has_the_same_rows(run: Run, model: str, rows_file: str, tmp_path: Path, name: str) -> None:
    assert run(*arguments(model, rows_file, tmp_path / "a.csv"))[0] == 0
    expected = pd.read_csv(tmp_path / "a.csv", dtype={"id": str, "input_label": str})
    status, _, err = run(*arguments(model, rows_file, tmp_path / name))
    assert status == 0, err
    if name.endswith("l"):
        found = pd.read_json(tmp_path / name, lines=True, precise_float=True, dtype={"id": str, "input_label": str})
    elif name.endswith("parquet"):
        found = pd.read_parquet(tmp_path / name)
        assert found["score"].dtype == np.float32
    else:
        found = pd.read_csv(tmp_path / name, sep="\t" if "tsv" in name else ",", dtype={"id": str, "input_label": str})
    assert list(found) == list(expected)
    assert np.array_equal(np.float32(found["score"]), np.float32(expected["score"]), equal_nan=True)
    for column in ("row", "id", "input_label", "note"):
        assert found[column].tolist() == expected[column].tolist()
    for column in ("label", "reason"):
        assert found[column].fillna("").tolist() == expected[column].fillna("").tolist()


def test_types_of_parquet_are_kept_and_columns_chosen(run: Run, model: str, tmp_path: Path) -> None:
    types = {"n": pa.int16(), "when": pa.timestamp("ms"), "tags": pa.list_(pa.string()), "unused": pa.int8()}
    columns = {"n": [1, None], "when": [None, 5], "tags": [["a"], None], "unused": [1, 2]}
    table = pa.table({"text": TEXTS[:2], **{name: pa.array(columns[name], types[name]) for name in types}})
    pq.write_table(table, tmp_path / "in.parquet")
    output = tmp_path / "out.parquet"
    chosen = ("--keep", "[n, text, when, tags]")
    status, _, err = run(*arguments(model, str(tmp_path / "in.parquet"), output, *chosen))
    assert status == 0, err
    found = pq.read_table(output)
    assert found.schema.names == ["row", "score", "label", "reason", "n", "text", "when", "tags"]
    for name in ("n", "text", "when", "tags"):
        assert found[name].equals(table[name])


def test_several_files_and_fields_of_json(run: Run, model: str, tmp_path: Path) -> None:
    first, second = tmp_path / "a.jsonl", tmp_path / "b.jsonl"
    first.write_text(json.dumps({"text": "x", "id": 1, "more": {"a": [1]}}) + "\n")
    second.write_text(json.dumps({"text": None, "id": "2"}) + "\n" + json.dumps({"id": True, "text": "y"}) + "\n")
    output = tmp_path / "out.jsonl"
    status, _, err = run(*arguments(model, f"[{first}, {second}]", output, "--trainer.enable_progress_bar", "false"))
    assert status == 0, err
    rows = [json.loads(line) for line in output.read_text().splitlines()]
    assert [(row["row"], row["file"]) for row in rows] == [(0, str(first)), (0, str(second)), (1, str(second))]
    assert [(row["id"], row["more"]) for row in rows] == [(1, {"a": [1]}), ("2", None), (True, None)]
    assert [row["score"] is None for row in rows] == [False, True, False]


def test_pairs_and_ensembles(run: Run, tmp_path: Path) -> None:
    schema = Schema("multiclass", ("x", "y"), ("query", "passage"), 16)
    folder = tmp_path / "ensemble"
    for seed in range(2):
        save(folder / f"fold-{seed}", schema, seed=seed)
    word_tokenizer().save_pretrained(folder)
    schema.save(folder)
    content = {"schema_version": 1, "members": ["fold-0", "fold-1"], "source": {}}
    (folder / ENSEMBLE_FILE).write_text(json.dumps(content))
    lines = [{"query": query, "pos": [TEXTS[5]], "neg": [TEXTS[9], ""]} for query in (TEXTS[6], TEXTS[1])]
    path, output = tmp_path / "a.jsonl", tmp_path / "out.csv"
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    status, _, err = run(*arguments(str(folder), str(path), output, "--keep", "[query, label]"))
    assert status == 0, err
    found = pd.read_csv(output, keep_default_na=False)
    pairs = [(line["query"], text) for line in lines for text in (*line["pos"], *line["neg"]) if text]  # type: ignore[misc]
    expected = Ensemble(folder).predict(pairs)
    scored = found[found["reason"] == ""]
    assert list(scored["row"]) == [0, 1, 3, 4]
    assert scored[["score:x", "score:y"]].astype(float).to_numpy() == pytest.approx(expected.scores.numpy(), abs=1e-6)
    assert scored["label"].tolist() == expected.labels
    assert scored["query"].tolist() == [query for query, _ in pairs]
    assert found["input_label"].tolist() == [1, 0, 0] * 2


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--output", "x.txt"), "output: expected a name that ends in .csv"),
        (("--keep", "[no]"), "keep: data file"),
        (
            ("--trainer.limit_predict_batches", "0.5"),
            "trainer.limit_predict_batches=0.5: predict writes a row",
        ),
    ],
)
def test_what_is_refused_before_a_model_is_loaded(
    run: Run,
    model: str,
    rows_file: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    more: tuple[str, ...],
    message: str,
) -> None:
    monkeypatch.setattr("lightning_bge.models.predictor.Predictor.configure_model", None)
    status, _, err = run(*arguments(model, rows_file, tmp_path / "new" / "x.csv", *more))
    assert status == 2
    assert message in err.splitlines()[-1]
    assert not (tmp_path / "new").exists()


def test_a_malformed_last_row_is_found_first(run: Run, model: str, tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("id,text\n" + "1,x\n" * 50 + "1,x,y\n")
    status, _, err = run(*arguments(model, str(path), tmp_path / "x.csv"))
    assert status == 2
    assert "row 51 (line 52) has 3 fields" in err
    assert [path.name for path in tmp_path.iterdir()] == ["a.csv"]


@pytest.mark.parametrize(("mask", "expected"), [(0o022, 0o644), (0o077, 0o600)])
def test_permissions_and_links(run: Run, model: str, rows_file: str, tmp_path: Path, mask: int, expected: int) -> None:
    target, link = tmp_path / "real.csv", tmp_path / "link.csv"
    link.symlink_to(target)
    before = os.umask(mask)
    try:
        assert run(*arguments(model, rows_file, link))[0] == 0
    finally:
        os.umask(before)
    assert link.is_symlink()
    assert target.stat().st_mode & 0o777 == expected
    assert len(pd.read_csv(target)) == 20


def test_standard_output_and_pipes_have_the_rows_alone(run: Run, model: str, rows_file: str, tmp_path: Path) -> None:
    assert run(*arguments(model, rows_file, tmp_path / "a.csv"))[0] == 0
    expected = (tmp_path / "a.csv").read_bytes()
    command = [sys.executable, "-m", "lightning_bge.cli"]
    options: dict[str, Any] = {"capture_output": True, "check": False, "cwd": tmp_path}
    options["env"] = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*command, *arguments(model, rows_file, "/dev/stdout")], **options)
    assert done.returncode == 0, done.stderr
    assert done.stdout == expected
    assert b"20 rows: /dev/stdout" in done.stderr
    pipe, found = tmp_path / "pipe", list[bytes]()
    os.mkfifo(pipe)
    reader = threading.Thread(target=lambda: found.append(pipe.read_bytes()))
    reader.start()
    status, out, err = run(*arguments(model, rows_file, pipe))
    reader.join()
    assert status == 0, err
    assert (out, found) == ("", [expected])
    assert pipe.is_fifo()


@pytest.mark.slow
def test_an_interrupted_run_is_continued(run: Run, model: str, tmp_path: Path) -> None:
    """Killed by three signals, one after the other, and equal to the last byte to a run that was not."""
    path, output = tmp_path / "rows.csv", tmp_path / "out" / "found.csv"
    state = output.parent / ".found.csv.lightning_bge_draft.json"
    random = torch.Generator().manual_seed(0)
    words = torch.randint(len(WORDS), (60_000, 8), generator=random).tolist()
    texts = (" ".join(WORDS[word] for word in row) if number % 1000 else "" for number, row in enumerate(words))
    path.write_text("id,text\n" + "".join(f"{number},{text}\n" for number, text in enumerate(texts)))

    def pieces() -> int:
        return json.loads(state.read_text())["pieces"] if state.exists() else 0

    for number, status in ((signal.SIGTERM, 143), (signal.SIGINT, 130), (signal.SIGKILL, -9)):
        before = pieces()
        process = start(arguments(model, str(path), output))
        wait_for(lambda before=before: pieces() > before, process)  # type: ignore[misc]
        process.send_signal(number)
        text = process.communicate(timeout=60)[0]
        assert process.returncode == status, text
        assert ("same command continues" in text) == (number != signal.SIGKILL)
        assert pieces() > before
        assert not output.exists()
    done = pieces() * 4096
    assert done < 60_000
    status, _, err = run(*arguments(model, os.path.relpath(path), output))  # another name of the same file
    assert status == 0
    assert f"going on after {done:,} rows" in err
    assert [path.name for path in output.parent.iterdir()] == ["found.csv"]
    status, out, err = run(*arguments(model, str(path), tmp_path / "whole.csv"))
    assert status == 0, err
    assert output.read_bytes() == (tmp_path / "whole.csv").read_bytes()
    assert "60 of 60,000 rows have no score" in out
