"""The benchmark scripts run end to end on a tiny model; how fast or how good is not asked here."""

from __future__ import annotations

import csv
import json
import os
import random
from pathlib import Path
from types import ModuleType

import pytest
from sklearn.metrics import average_precision_score
from transformers import BertConfig, BertModel, BertTokenizer

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

# Warnings of transformers' Trainer are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

WORDS = [f"w{i}" for i in range(40)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("model")
    names = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *WORDS]
    BertTokenizer(vocab={name: number for number, name in enumerate(names)}).save_pretrained(folder)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    BertModel(BertConfig(vocab_size=len(names), **sizes)).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Small files with the names and columns of the real data sets."""
    folder = tmp_path_factory.mktemp("data")
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 12)))

    def write(name: str, header: list[str], rows: list[list[str]]) -> None:
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        with path.open("w", newline="") as file:
            csv.writer(file, delimiter="\t" if path.suffix == ".tsv" else ",").writerows([header, *rows])

    entailment, classes = ("entailment", "not_entailment"), ("CONTRADICTION", "ENTAILMENT", "NEUTRAL")
    pairs = [[text(), text(), entailment[i % 2]] for i in range(80)]
    write("rte/train.tsv", ["sentence1", "sentence2", "label"], pairs)
    for part in ("train", "dev"):
        judged = [[text(), text(), classes[i % 3]] for i in range(48)]
        write(f"sick/{part}.tsv", ["sentence_A", "sentence_B", "entailment_judgment"], judged)
        answers = [[f"{WORDS[i // 8]} {WORDS[i // 8 + 1]}", str(int(i % 8 < 2)), text()] for i in range(48)]
        write(f"trecqa/{part}.csv", ["qtext", "label", "atext"], answers)
    return str(folder)


@pytest.fixture
def scripts(monkeypatch: pytest.MonkeyPatch) -> tuple[ModuleType, ModuleType]:
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))  # the scripts set it
    monkeypatch.syspath_prepend(Path(__file__).parents[1] / "examples" / "benchmarks")
    import quality
    import train_speed

    return train_speed, quality


def check_record(path: Path, benchmark: str, *folders: str) -> dict:
    text = path.read_text()
    assert not any(folder in text for folder in folders)
    record = json.loads(text)
    assert record["benchmark"] == benchmark
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert len(record["model"]["sha256"]) == 64
    return record


def test_train_speed(
    scripts: tuple[ModuleType, ModuleType],
    model: str,
    data: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    train_speed, _ = scripts
    monkeypatch.setattr(train_speed, "in_fresh_process", train_speed.run_contender)  # processes take seconds to start
    out = tmp_path / "out" / "speed.json"
    options = ["--rows", "64", "--rounds", "1", "--warmup-steps", "1", "--device", "cpu"]
    train_speed.main(["--model", model, "--data", data, "--out", str(out), *options])
    record = check_record(out, "train_speed", model, data, str(tmp_path))
    names = ["lightning-bge bf16", "lightning-bge fp32", "Trainer", "Trainer bf16"]
    assert [run["contender"] for run in record["runs"]] == names
    assert all(run["sequences"] == 64 and run["loop_seconds"] <= run["call_seconds"] for run in record["runs"])
    assert record["contenders"]["Trainer"]["bf16"] is False
    assert record["contenders"]["lightning-bge bf16"]["attention"] == "packed"
    assert "lightning-bge bf16 / Trainer" in capsys.readouterr().out


def test_medians_ratios_and_turns(scripts: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    train_speed, _ = scripts
    rates = {"lightning-bge bf16": [40.0, 10.0, 30.0], "lightning-bge fp32": [10.0, 10.0, 10.0], "Trainer": [8, 10, 5]}
    left = {name: list(values) for name, values in rates.items()}

    def run(name: str, job: object, warmup_rows: int) -> dict:
        rate = left[name].pop(0)
        seconds = {"loop_seconds": 1 / rate, "call_seconds": 2 / rate}
        return {"samples_per_s": rate, "tokens_per_s": rate, "sequences": 1, "tokens": 1, "threads": 1, **seconds}

    monkeypatch.setattr(train_speed, "in_fresh_process", run)
    runs = train_speed.measure(list(rates), None, 3, 0)
    assert [(run["round"], run["contender"]) for run in runs] == [(i, name) for i in (1, 2, 3) for name in rates]
    found = train_speed.summarize(runs, list(rates))
    assert found["medians"]["lightning-bge bf16"]["samples_per_s"] == 30
    ratio = found["ratios"]["lightning-bge bf16 / Trainer"]
    assert ratio["by_round"] == [5, 1, 6]
    assert ratio["of_medians"] == ratio["of_median_calls"] == pytest.approx(30 / 8)
    assert set(found["ratios"]) == {"lightning-bge bf16 / Trainer", "lightning-bge fp32 / Trainer"}


def test_one_run_in_a_fresh_process(scripts: tuple[ModuleType, ModuleType], model: str, data: str) -> None:
    train_speed, _ = scripts
    job = train_speed.Job(
        model=model,
        train_file=str(Path(data, "rte", "train.tsv")),
        task="binary",
        text_columns=("sentence1", "sentence2"),
        label_column="label",
        labels=("not_entailment", "entailment"),
        device="cpu",
        rows=32,
    )
    run = train_speed.in_fresh_process("lightning-bge fp32", job, 0)
    assert run["sequences"] == 32
    assert run["tokens"] == sum(len(row["input_ids"]) for row in train_speed.encode(job, job.read(job.train_file, 32)))


def test_contenders_that_trained_on_different_tokens_are_refused(
    scripts: tuple[ModuleType, ModuleType], monkeypatch: pytest.MonkeyPatch
) -> None:
    train_speed, _ = scripts
    tokens = iter((100, 99))

    def run(name: str, job: object, warmup_rows: int) -> dict:
        return {"samples_per_s": 1.0, "sequences": 4, "tokens": next(tokens), "threads": 1}

    monkeypatch.setattr(train_speed, "in_fresh_process", run)
    with pytest.raises(RuntimeError, match="99 tokens"):
        train_speed.measure(["Trainer", "Trainer bf16"], None, 1, 0)


def test_quality(scripts: tuple[ModuleType, ModuleType], model: str, data: str, tmp_path: Path) -> None:
    _, quality = scripts
    out = tmp_path / "quality.json"
    options = ["--rows", "40", "--seeds", "1", "2", "--device", "cpu"]
    quality.main(["--model", model, "--data", data, "--out", str(out), *options])
    results = check_record(out, "quality", model, data, str(tmp_path))["results"]
    assert results["sick"]["majority"] == pytest.approx(1 / 3)
    for name, metrics in {"sick": {"accuracy"}, "trecqa": {"map", "mrr"}}.items():
        assert set(results[name]["metrics"]) == metrics
        for found in results[name]["metrics"].values():
            ours, peer, difference = (found[side]["values"] for side in ("lightning-bge", "Trainer", "difference"))
            assert len(ours) == len(peer) == 2
            assert all(0 < value <= 1 for value in ours + peer)
            assert difference == pytest.approx([a - b for a, b in zip(ours, peer, strict=True)])


def test_ranking_metrics_agree_with_scikit_learn(scripts: tuple[ModuleType, ModuleType]) -> None:
    _, quality = scripts
    draw = random.Random(1)
    for _ in range(20):
        scores = [draw.random() for _ in range(12)]
        labels = [1, *(draw.randint(0, 1) for _ in range(11))]
        ranks = quality.rank_positives(scores, labels)
        precision = sum(found / rank for found, rank in enumerate(ranks, 1)) / len(ranks)
        assert precision == pytest.approx(average_precision_score(labels, scores))
    assert quality.rank_positives([0.5, 0.5, 0.9], [1, 0, 0]) == [3]  # a tie counts against the positive


def test_missing_data_is_told(scripts: tuple[ModuleType, ModuleType], model: str, tmp_path: Path) -> None:
    for script in scripts:
        with pytest.raises(SystemExit, match="no folder"):
            script.main(["--model", model, "--data", str(tmp_path / "absent")])
