"""Wrong files, options and paths through the program: one short message that names what is wrong and what to do.

No traceback, no success, nothing written.
"""

from __future__ import annotations

import gzip
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from lightning_bge.types import Schema

Run = Callable[..., tuple[int, str, str]]
GOOD = "text,label\n" + "".join(f"{'good' if row % 2 else 'bad'} thing {row},{row % 2}\n" for row in range(20))
SPACE = '{"model.optimizer.lr": {"low": 1.0e-4, "high": 1.0e-2, "log": true}}'


def gz(text: str) -> bytes:
    return gzip.compress(text.encode())


def parquet(**columns: object) -> bytes:
    sink = pa.BufferOutputStream()
    pq.write_table(pa.table(columns), sink)
    return sink.getvalue().to_pybytes()


def lines(*rows: object) -> str:
    return "\n".join(map(json.dumps, rows)) + "\n"


def with_label(row: int, label: str) -> str:
    """The good file with another label in one row, counted from 1."""
    found = GOOD.splitlines()
    found[row] = f"{found[row].rpartition(',')[0]},{label}"
    return "\n".join(found) + "\n"


# ---------------------------------------------------------------- files: name, content, further options, message

FILES: dict[str, tuple[str, str | bytes, tuple[str, ...], str]] = {
    "empty": ("x.csv", "", (), r"x\.csv is empty"),
    "blank lines alone": ("x.csv", "\n\n\n", (), r"x\.csv is empty: its first line must name the columns"),
    "header alone": ("x.csv", "text,label\n", (), r"x\.csv has a header but no rows"),
    "no header": ("x.csv", "a,0\nb,1\n", (), r"no column 'text', 'label'; its columns are 'a', '0'.*first line must"),
    "other case": ("x.csv", GOOD.replace("text", "Text"), (), r"no column 'text' \(did you mean 'Text'\?\)"),
    "blank before a name": ("x.csv", GOOD.replace("text", " text"), (), r"no column 'text' \(did you mean ' text'\?\)"),
    "column twice": ("x.csv", "text,text,label\na,b,0\n", (), r"more than one column 'text': rename"),
    "short row": ("x.csv", GOOD + "a\n", (), r"row 21 \(line 22\) has 1 fields, expected 2.*Correct the row"),
    "long row": ("x.csv", GOOD + "a, b,1\n", (), r"row 21 \(line 22\) has 3 fields"),
    "open quote": ("x.csv", GOOD + '"a,1\n', (), r"line 22 has a quote that is not closed.*data\.table\.quoting"),
    "text behind a quote": ("x.csv", GOOD + '"a" b,1\n', (), r"line 22 .*text behind a closed one"),
    "swallowed rows": (
        "x.csv",
        GOOD + '"a,1\nb,0\nc",1\n',
        (),
        r"line 22 .* line 24 closes holds what seem to be 2 more rows",
    ),
    "stray quotes": ("x.csv", GOOD + '"a,1\nb,0\n"c,1\n', (), r"line 22 .*line 24"),
    "escaped quotes": ("x.csv", GOOD + '"a \\"b\\"",1\n', (), r"line 22.*data\.table\.escape"),
    "latin": ("x.csv", GOOD.encode() + b"caf\xe9,1\n", (), r"line 22 is not valid UTF-8; as cp1252: 'café,1'"),
    "latin header": ("x.csv", b"t\xe9xt,label\na,1\n", (), r"line 1 is not valid UTF-8"),
    "binary": ("x.csv", bytes(range(256)) * 8, (), r"x\.csv: line \d+ is not valid UTF-8.*data\.table\.encoding"),
    "wrong encoding": ("x.csv", GOOD.encode() + b"\x81\x82,1\n", ("--data.table.encoding", "cp1252"), r"CP1252"),
    "utf-16 cut short": ("x.csv", GOOD.encode("utf-16")[:-1], (), r"not valid UTF-16|label is missing|fields"),
    "empty text": ("x.csv", GOOD + ",1\n", (), r"column 'text' has empty text in 1 of 21 rows \(data row 21"),
    "blank text": ("x.csv", GOOD + "  ,1\n", (), r"column 'text' has empty text in 1 of 21 rows"),
    "missing label": ("x.csv", GOOD + "a,\n", (), r"label is missing in 1 of 21 rows \(data row 21.*fill in or drop"),
    "one class": ("x.csv", "text,label\na,1\nb,1\n", (), r"one class only, '1'"),
    "three classes": ("x.csv", with_label(3, "2"), (), r"binary needs two labels.*3.*multiclass"),
    "one row of a class": ("x.csv", "text,label\na,1\nb,0\nc,0\nd,0\ne,0\n", (), r"class '1' is in 1 row, too few"),
    "few rows": ("x.csv", "text,label\na,1\nb,0\n", ("--data.split.folds", "5"), r"2 rows cannot be split into 5"),
    "regression of words": ("x.csv", GOOD + "a,high\n", ("--model.task", "regression"), r"row 21.*has 'high'"),
    "regression with nan": ("x.csv", GOOD + "a,nan\n", ("--model.task", "regression"), r"finite number in every row"),
    "regression with infinity": ("x.csv", GOOD + "a,inf\n", ("--model.task", "regression"), r"finite number"),
    "regression with a comma": ("x.csv", GOOD + 'a,"1,5"\n', ("--model.task", "regression"), r"has '1,5'"),
    "constant regression": ("x.csv", "text,label\na,1\nb,1\n", ("--model.task", "regression"), r"nothing to learn"),
    "lists in binary": ("x.jsonl", lines(*[{"text": "a", "label": ["x"]}] * 5), (), r"hold a list.*multilabel"),
    "lists as text in multiclass": (
        *("x.csv", "text,label\na,\"['x', 'y']\"\nb,\"['y']\"\n", ("--model.task", "multiclass")),
        r"holds? a list of labels: set the task to multilabel",
    ),
    "another separator": (
        *("x.csv", "text,label\na,x;y\nb,x\nc,y\n", ("--model.task", "multilabel")),
        r"between ';'. Set data\.table\.label_separator",
    ),
    "a list of numpy": (
        *("x.csv", "text,label\na,['x' 'y']\nb,['y']\n", ("--model.task", "multilabel")),
        r"seems to be a list, but not one",
    ),
    "zeros and ones": (
        *("x.csv", 'text,label\na,"[1, 0, 1]"\nb,"[0, 0, 1]"\n', ("--model.task", "multilabel")),
        r"for each label whether it applies",
    ),
    "a column of words": (
        *("x.csv", "text,x,y\na,1,0\nb,maybe,1\n", ("--model.task", "multilabel", "--data.label_column", "[x, y]")),
        r"column 'x' must hold 1 or 0.*row 2.*'maybe'",
    ),
    "columns of a binary task": ("x.csv", GOOD, ("--data.label_column", "[label, text]"), r"label_column"),
    "unknown label names": (
        "x.csv",
        GOOD,
        ("--data.table.labels", "[no, yes]"),
        r"label '0' .*known labels 'no', 'yes'",
    ),
    "a label name twice": ("x.csv", GOOD, ("--data.table.labels", "[1, 1.0]"), r"data\.table\.labels"),
    "three label names": ("x.csv", GOOD, ("--data.table.labels", "[0, 1, 2]"), r"data\.table\.labels.*two"),
    "a group is missing": (
        *("x.csv", "text,label,g\na,1,p\nb,0,\nc,1,q\n", ("--data.group_column", "g")),
        r"column 'g' has an empty value in 1 of 3",
    ),
    "one group": (
        *("x.csv", "text,label,g\n" + "a,1,p\nb,0,p\n" * 5, ("--data.group_column", "g")),
        r"1 group cannot be split",
    ),
    "not json": ("x.jsonl", "text: a\n", (), r"line 1 is not valid JSON"),
    "json of a number": ("x.jsonl", "1\n", (), r"line 1 must hold one JSON object"),
    "json without a field": ("x.jsonl", lines({"text": "a", "label": 1}, {"text": "b"}), (), r"line 2 has no 'label'"),
    "json with a field twice": ("x.jsonl", '{"text": "a", "text": "b", "label": 1}\n', (), r"field 'text' twice"),
    "json with an object": ("x.jsonl", lines({"text": {"a": 1}, "label": 1}), (), r"no text but dict"),
    "json with a missing text": ("x.jsonl", lines({"text": None, "label": 1}), (), r"empty text"),
    "json with half a pair": ("x.jsonl", '{"text": "\\udc00", "label": 1}\n', (), r"half a surrogate pair"),
    "json by columns": ("x.json", '{"text": ["a"], "label": [1]}', (), r"x\.json.*no text but list|array of objects"),
    "json within an object": ("x.json", '{"data":\n[{"text": "a", "label": 1}]}', (), r"An array of objects"),
    "an array cut short": ("x.json", '[{"text": "a", "label": 1}', (), r"x\.json: is not valid JSON"),
    "an array of texts": ("x.json", '["a", "b"]', (), r"row 1 must hold one JSON object"),
    "an empty array": ("x.json", "[]", (), r"has no rows"),
    "texts of a query, then none": (
        *("x.jsonl", lines({"query": "q", "pos": ["p"]}, {"query": "q"}), ()),
        r"line 2 must hold a query and its texts",
    ),
    "no parquet": ("x.parquet", "text,label\n", (), r"can't be read as Parquet"),
    "parquet cut short": ("x.parquet", parquet(text=["a"] * 99, label=[1] * 99)[:-20], (), r"can't be read as Parquet"),
    "parquet of bytes": ("x.parquet", parquet(text=[b"a", b"b"], label=[0, 1]), (), r"no text but bytes"),
    "parquet without the column": ("x.parquet", parquet(a=["a"], label=[1]), (), r"no column 'text'"),
    "parquet with null labels": ("x.parquet", parquet(text=["a", "b"], label=[1, None]), (), r"label is missing in 1"),
    "parquet without rows": (
        "x.parquet",
        parquet(text=pa.array([], "string"), label=[]),
        (),
        r"has a header but no rows",
    ),
    "no gzip": ("x.csv.gz", GOOD, (), r"x\.csv\.gz can't be read"),
    "gzip cut short": ("x.csv.gz", gz(GOOD * 50)[:-10], (), r"x\.csv\.gz can't be read"),
    "empty gzip": ("x.csv.gz", "", (), r"x\.csv\.gz is empty"),
    "unknown ending": ("x.xlsx", GOOD, (), r"unknown ending.*data\.table\.format"),
    "no ending": ("x", GOOD, (), r"unknown ending"),
    "another format": ("x.csv", GOOD, ("--data.table.format", "jsonl"), r"line 1 is not valid JSON"),
    "another delimiter": ("x.csv", GOOD, ("--data.table.delimiter", ";"), r"no column 'text', 'label'.*semicolon"),
    "two delimiters": ("x.csv", "text::label\na::1\n", (), r"no column 'text'"),
}

# ---------------------------------------------------------------- options of fit: arguments, message

OPTIONS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown option": (("--data.train_fil", "x.csv"), r"--?data\.train_fil\b"),
    "unknown group": (("--dta.train_file", "x.csv"), r"dta\.train_file"),
    "stray word": (("word",), r"word"),
    "no value": (("--data.max_length",), r"data\.max_length"),
    "batch size of words": (("--data.batch_size", "many"), r"data\.batch_size.*whole number.*many"),
    "batch size of zero": (("--data.batch_size", "0"), r"batch_size.*0"),
    "batch size of half": (("--data.batch_size", "1.5"), r"data\.batch_size.*1\.5"),
    "length below zero": (("--data.max_length", "-3"), r"max_length.*-3"),
    "length of one": (("--data.max_length", "1"), r"max_length must be at least"),
    "no text column": (("--data.text_columns", "[]"), r"text_columns.*one or two different"),
    "three text columns": (("--data.text_columns", "[text, label, text]"), r"text_columns.*one or two different"),
    "unknown text column": (("--data.text_columns", "txet"), r"no column 'txet' \(did you mean 'text'\?\)"),
    "unknown label column": (("--data.label_column", "lable"), r"no column 'lable' \(did you mean 'label'\?\)"),
    "unknown group column": (("--data.group_column", "grp"), r"no column 'grp'"),
    "missing file": (("--data.train_file", "no.csv"), r"data\.train_file: no\.csv does not exist"),
    "missing second file": (("--data.train_file", "[good.csv, no.csv]"), r"no\.csv does not exist"),
    "pattern of nothing": (("--data.train_file", "no*.csv"), r"no\*\.csv"),
    "a file twice": (("--data.train_file", "[good.csv, g*.csv]"), r"good\.csv is named twice"),
    "folder as a file": (("--data.train_file", "S"), r"S is a folder"),
    "hub name": (("--data.train_file", "hf://glue"), r"hf://owner/name"),
    "missing validation file": (("--data.val_file", "no.csv"), r"data\.val_file: no\.csv"),
    "missing test file": (("--data.test_file", "no.csv"), r"data\.test_file: no\.csv"),
    "validation file and folds": (
        ("--data.val_file", "good.csv", "--data.split.folds", "3"),
        r"val_file and split\.folds",
    ),
    "fold out of range": (("--data.split.folds", "3", "--data.split.fold", "3"), r"data\.split\.fold.*3"),
    "folds below one": (("--data.split.folds", "0"), r"data\.split\.folds.*0"),
    "fraction of one": (("--data.split.val_fraction", "1.0"), r"val_fraction.*1\.0"),
    "fraction of nothing": (("--data.split.val_fraction", "0"), r"val_fraction"),
    "seed below zero": (("--data.split.seed", "-1"), r"data\.split\.seed"),
    "more folds than rows": (("--data.split.folds", "99"), r"99"),
    "no rows": (("--data.table.max_rows", "0"), r"data\.table\.max_rows"),
    "format": (("--data.table.format", "xml"), r"data\.table\.format.*xml"),
    "encoding": (("--data.table.encoding", "utf9"), r"data\.table\.encoding.*utf9"),
    "delimiter of two": (("--data.table.delimiter", "::"), r"data\.table\.delimiter.*::"),
    "quote as delimiter": (("--data.table.delimiter", '"'), r"data\.table\.delimiter"),
    "quoting": (("--data.table.quoting", "maybe"), r"data\.table\.quoting.*maybe"),
    "no separator": (("--data.table.label_separator", ""), r"label_separator"),
    "micro-batch": (("--data.batching.max_tokens", "-1"), r"max_tokens"),
    "micro-batch word": (("--data.batching.max_tokens", "much"), r"max_tokens"),
    "workers below zero": (("--data.batching.num_workers", "-1"), r"num_workers"),
    "balanced regression": (
        *(("--data.batching.balanced", "true", "--model.task", "regression"),),
        r"balanced needs classes",
    ),
    "task": (("--model.task", "ranking"), r"task.*ranking"),
    "attention": (("--model.attention", "flash"), r"attention.*flash"),
    "dropout above one": (("--model.dropout", "1.5"), r"dropout.*1\.5"),
    "frozen layers below zero": (("--model.frozen_layers", "-1"), r"frozen_layers"),
    "more frozen layers than layers": (("--model.frozen_layers", "99"), r"frozen_layers.*99"),
    "lora rank": (("--model.lora.r", "0"), r"lora\.r"),
    "lora and frozen layers": (("--model.lora.r", "4", "--model.frozen_layers", "0"), r"exclude each other"),
    "learning rate below zero": (("--model.optimizer.lr", "-1"), r"lr"),
    "learning rate word": (("--model.optimizer.lr", "fast"), r"model\.optimizer\.lr.*fast"),
    "optimizer": (("--model.optimizer.name", "adam"), r"optimizer\.name.*adam"),
    "schedule": (("--model.schedule.name", "step"), r"schedule\.name.*step"),
    "warm-up below zero": (("--model.schedule.warmup", "-1"), r"warmup"),
    "loss": (("--model.loss.name", "hinge"), r"loss.*hinge"),
    "focal regression": (("--model.loss.name", "focal", "--model.task", "regression"), r"loss|focal"),
    "smoothing": (("--model.loss.label_smoothing", "2"), r"label_smoothing"),
    "missing model": (("--model.name_or_path", "./no"), r"\./no|no does not exist"),
    "model that is a file": (("--model.name_or_path", "good.csv"), r"good\.csv"),
    "empty model folder": (("--model.name_or_path", "empty"), r"empty"),
    "model without weights": (("--model.name_or_path", "no_weights"), r"no_weights"),
    "model with broken weights": (("--model.name_or_path", "broken_weights"), r"broken_weights"),
    "model with broken configuration": (("--model.name_or_path", "broken_config"), r"broken_config"),
    "model without a tokenizer": (("--model.name_or_path", "no_tokenizer"), r"no_tokenizer"),
    "metric": (("--monitor.metric", "f7"), r"monitor\.metric.*f7"),
    "metric of another task": (("--monitor.metric", "spearman"), r"monitor\.metric.*spearman"),
    "metric without groups": (("--monitor.metric", "map"), r"map ranks.*data\.group_column"),
    "objective": (("--monitor.objective", "mean"), r"monitor\.objective.*mean"),
    "patience": (("--monitor.patience", "0"), r"monitor\.patience.*0"),
    "threshold": (("--monitor.threshold", "0.7"), r"monitor\.threshold"),
    "compile policy": (("--compile.policy", "maybe"), r"compile\.policy.*maybe"),
    "memory limit": (("--memory.limit_gb", "-1"), r"memory\.limit_gb"),
    "precision": (("--trainer.precision", "16-mixed"), r"precision.*16-mixed"),
    "precision word": (("--trainer.precision", "half"), r"precision.*half"),
    "accelerator": (("--trainer.accelerator", "cuda"), r"(?i)cuda|accelerator"),
    "accelerator word": (("--trainer.accelerator", "quantum"), r"quantum"),
    "devices": (("--trainer.devices", "-5"), r"devices"),
    "strategy": (("--trainer.strategy", "fsdp"), r"strategy.*fsdp"),
    "epochs of nothing": (("--trainer.max_epochs", "0"), r"max_epochs"),
    "endless epochs": (("--trainer.max_epochs", "-1"), r"max_epochs"),
    "epochs of words": (("--trainer.max_epochs", "three"), r"trainer\.max_epochs.*three"),
    "clipping": (
        ("--trainer.gradient_clip_val", "0.5", "--model.optimizer.max_grad_norm", "null"),
        r"trainer\.gradient_clip_val.*model\.optimizer\.max_grad_norm",
    ),
    "clipping by value": (
        ("--trainer.gradient_clip_val", "0.5", "--trainer.gradient_clip_algorithm", "value"),
        r"trainer\.gradient_clip_algorithm: expected norm",
    ),
    "accumulation": (
        ("--trainer.accumulate_grad_batches", "0"),
        r"accumulate_grad_batches: expected 1 or more",
    ),
    "callback": (("--trainer.callbacks", "Nothing"), r"callbacks.*Nothing"),
    "seed": (("--seed_everything", "word"), r"seed_everything.*word"),
    "run folder that is a file": (("--run_dir", "good.csv"), r"good\.csv"),
    "run folder below a file": (("--run_dir", "good.csv/run"), r"good\.csv"),
    "missing configuration": (("-c", "no.yaml"), r"no\.yaml does not exist"),
    "configuration that is no YAML": (("-c", "no_yaml.yaml"), r"no_yaml\.yaml"),
    "configuration of a list": (("-c", "list.yaml"), r"list\.yaml"),
    "configuration with an unknown key": (("-c", "unknown.yaml"), r"batchsize"),
    "configuration with a wrong type": (("-c", "type.yaml"), r"batch_size"),
    "configuration of another command": (("-c", "hpo.yaml"), r"hpo\.yaml.*hpo"),
}

# ---------------------------------------------------------------- other commands: command and arguments, message

BASE = ("--model.name_or_path", "S/model", "--data.max_length", "32", "--data.train_file", "good.csv")
FIT = (*BASE, "--data.text_columns", "text", "--trainer.max_epochs", "1", "--run_dir", "run")
HPO = ("hpo", *FIT, "--hpo.space", SPACE, "--hpo.n_trials", "2")
PREDICT = ("predict", "--data.predict_file", "good.csv", "--data.text_columns", "text", "--model.name_or_path")

COMMANDS: dict[str, tuple[tuple[str, ...], str]] = {
    "unknown command": (("train",), r"train"),
    "hpo without a space": (("hpo", *FIT), r"hpo\.space"),
    "space that is a file": ((*HPO, "--hpo.space", "space.yaml"), r"hpo\.space"),
    "space of an unknown option": ((*HPO, "--hpo.space", '{"model.rate": {"low": 1, "high": 2}}'), r"model\.rate"),
    "space with swapped bounds": ((*HPO, "--hpo.space", '{"model.optimizer.lr": {"low": 2, "high": 1}}'), r"bounds"),
    "space with half a bound": ((*HPO, "--hpo.space", '{"model.optimizer.lr": {"low": 2}}'), r"model\.optimizer\.lr"),
    "space with a wrong key": (
        (*HPO, "--hpo.space", '{"model.optimizer.lr": {"min": 1, "max": 2}}'),
        r"model\.optimizer\.lr",
    ),
    "space of nothing": ((*HPO, "--hpo.space", '{"data.batch_size": {"choices": []}}'), r"data\.batch_size"),
    "space with the metric": (
        (*HPO, "--hpo.space", '{"monitor.metric": {"choices": ["f1", "loss"]}}'),
        r"monitor\.metric",
    ),
    "space with a log of zero": (
        (*HPO, "--hpo.space", '{"model.optimizer.lr": {"low": 0, "high": 1, "log": true}}'),
        r"model\.optimizer\.lr",
    ),
    "no trials": ((*HPO, "--hpo.n_trials", "0"), r"n_trials"),
    "no time": ((*HPO, "--hpo.timeout", "-1"), r"timeout"),
    "unknown sampler": ((*HPO, "--hpo.sampler.name", "best"), r"sampler.*best"),
    "unknown pruner": ((*HPO, "--hpo.pruner.name", "best"), r"pruner.*best"),
    "no workers": ((*HPO, "--hpo.workers", "0"), r"workers"),
    "option with a typing error": ((*HPO, "--hpo.trails", "3"), r"hpo\.trails"),
    "test file of another form": (
        (*HPO, "--data.test_file", "other_column.csv"),
        r"other_column\.csv.*no column 'label'",
    ),
    "test file with another label": ((*HPO, "--data.test_file", "other_label.csv"), r"other_label\.csv.*'7'"),
    "dry run of a study": ((*HPO, "--trainer.fast_dev_run", "true"), r"fast_dev_run"),
    "batches of a study": ((*HPO, "--trainer.limit_train_batches", "2"), r"limit_train_batches"),
    "fit with a test file of another form": (
        ("fit", *FIT, "--data.test_file", "other_column.csv"),
        r"other_column\.csv",
    ),
    "fit with a test file of another label": (("fit", *FIT, "--data.test_file", "other_label.csv"), r"'7'"),
    "fit with an empty test file": (("fit", *FIT, "--data.test_file", "empty.csv"), r"empty\.csv"),
    "fit with a broken test file": (("fit", *FIT, "--data.test_file", "quote.csv"), r"quote\.csv.*line 3"),
    "predict without a file": (("predict", "--model.name_or_path", "S/model"), r"data\.predict_file"),
    "predict with a plain encoder": ((*PREDICT, "S/model"), r"S/model"),
    "predict without the column": (
        (*PREDICT, "trained", "--data.text_columns", "txet"),
        r"no column 'txet' \(did you mean 'text'",
    ),
    "predict into a folder": ((*PREDICT, "S/model", "--output", "."), r"output: expected a file, got the folder"),
    "predict below a file": ((*PREDICT, "S/model", "--output", "good.csv/x.csv"), r"good\.csv"),
    "predict over its input": ((*PREDICT, "S/model", "--output", "good.csv"), r"good\.csv"),
    "predict of an unknown format": ((*PREDICT, "S/model", "--output", "x.xlsx"), r"xlsx"),
    "predict with a missing model": ((*PREDICT, "./no"), r"\./no|model folder no\b|folder no does not exist"),
    "test without a file": (("test", "--model.name_or_path", "S/model"), r"data\.test_file|test_file"),
    "test with a plain encoder": (
        ("test", "--model.name_or_path", "S/model", "--data.test_file", "good.csv", "--data.text_columns", "text"),
        r"S/model",
    ),
    "validate without a file": (
        ("validate", "--model.name_or_path", "S/model"),
        r"data\.train_file: validate needs a file.*data\.val_file",
    ),
    "status of nothing": (("status", "no"), r"no\b"),
    "status of a file": (("status", "good.csv"), r"good\.csv"),
    "status of an empty folder": (("status", "empty"), r"empty"),
    "status without a folder": (("status",), r"run"),
    "status with no seconds": (("status", "empty", "--watch", "0"), r"--watch"),
    "report of nothing": (("report", "no"), r"no\b"),
    "report of a file": (("report", "good.csv"), r"good\.csv"),
    "report of an empty folder": (("report", "empty"), r"empty"),
    "worker of nothing": (("worker", "no"), r"no\b"),
    "worker of an empty folder": (("worker", "empty"), r"empty"),
    "worker with a share of nothing": (("worker", "empty", "--share", "0"), r"empty|--share"),
    "sample into a file": (("sample", "good.csv"), r"good\.csv"),
    "sample with a word as a seed": (("sample", "new", "--seed", "x"), r"--seed.*x"),
    "plan without a space": (("plan", *FIT), r"hpo\.space"),
    "plan into a folder": (("plan", *HPO[1:], "--json", "empty"), r"empty"),
    "plan below a file": (("plan", *HPO[1:], "--json", "good.csv/x.json"), r"good\.csv"),
    "audit into a folder": (("audit", *FIT, "--json", "empty"), r"empty"),
    "audit without a file": (("audit", "--model.name_or_path", "S/model", "--run_dir", "run"), r"train_file"),
}


@dataclass
class Mistake:
    args: tuple[str, ...]
    message: str
    files: dict[str, str | bytes] = field(default_factory=dict)


def mistakes() -> dict[str, Mistake]:
    found = {}
    for name, (file, content, options, message) in FILES.items():
        found[f"file: {name}"] = Mistake(("fit", *FIT, *options, "--data.train_file", file), message, {file: content})
    for name, (args, message) in OPTIONS.items():
        found[f"option: {name}"] = Mistake(("fit", *FIT, *args), message)
    for name, (args, message) in COMMANDS.items():
        found[f"command: {name}"] = Mistake(args, message)
    return found


MISTAKES = mistakes()


@pytest.fixture
def place(sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with a sample and some wrong files, which is the current one."""
    folder = tmp_path / "place"
    folder.mkdir()
    shutil.copytree(sample, folder / "S")
    (folder / "empty").mkdir()
    texts = {
        "good.csv": GOOD,
        "empty.csv": "",
        "other_column.csv": GOOD.replace("label", "lbl"),
        "other_label.csv": with_label(2, "7"),
        "quote.csv": 'text,label\na,1\n"b,0\n',
        "no_yaml.yaml": "data: [\n",
        "list.yaml": "- 1\n- 2\n",
        "unknown.yaml": "data:\n  batchsize: 3\n",
        "type.yaml": "data:\n  batch_size: many\n",
        "hpo.yaml": "hpo:\n  n_trials: 3\n",
        "space.yaml": SPACE,
    }
    for name, text in texts.items():
        (folder / name).write_text(text)
    shutil.copytree(folder / "S" / "model", folder / "trained")
    Schema("binary", ("0", "1"), ("text",), 32).save(folder / "trained")
    for name in ("no_weights", "broken_weights", "broken_config", "no_tokenizer"):
        shutil.copytree(folder / "S" / "model", folder / name)
    (folder / "no_weights" / "model.safetensors").unlink()
    (folder / "broken_weights" / "model.safetensors").write_bytes(b"\0" * 100)
    (folder / "broken_config" / "config.json").write_text('{"model_type": ')
    for path in (folder / "no_tokenizer").glob("*token*"):
        path.unlink()
    (folder / "no_tokenizer" / "vocab.txt").unlink(missing_ok=True)
    monkeypatch.chdir(folder)
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    return folder


def listing(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in sorted(folder.rglob("*"))}


def check(mistake: Mistake, place: Path, call: Callable[..., tuple[int, str, str]]) -> None:
    for file, content in mistake.files.items():
        (place / file).write_bytes(content.encode() if isinstance(content, str) else content)
    before = listing(place)
    status, out, err = call(*mistake.args)
    text = err[err.index("lightning-bge: ") :] if "lightning-bge: " in err else ""
    assert (status, "Traceback" in out + err) == (2, False), err[-3000:]
    assert 1 <= len(text.strip().splitlines()) <= 3, err
    assert len(text) < 1000
    assert re.search(mistake.message, text, re.DOTALL), text
    assert listing(place) == before


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_has_a_short_message_and_leaves_nothing(name: str, run: Run, place: Path) -> None:
    check(MISTAKES[name], place, run)


@pytest.mark.slow
@pytest.mark.parametrize("name", list(MISTAKES)[::9])
def test_the_same_in_a_process_of_its_own(name: str, place: Path) -> None:
    def call(*args: str) -> tuple[int, str, str]:
        # beside this interpreter: the program that is installed
        program = Path(sys.executable).with_name("lightning-bge")
        found = subprocess.run([program, *args], capture_output=True, text=True, check=False, timeout=120)
        return found.returncode, found.stdout, found.stderr

    check(MISTAKES[name], place, call)


def test_there_are_enough() -> None:
    assert len(MISTAKES) >= 150
