"""The benchmark scripts run end to end on a tiny model; how fast or how good is not asked here."""

from __future__ import annotations

import argparse
import csv
import json
import logging
import os
import random
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import optuna
import pytest
import torch
from sklearn.metrics import average_precision_score
from torch.utils.flop_counter import FlopCounterMode
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    BertModel,
    BertTokenizer,
    TrainerCallback,
    TrainingArguments,
)

from tests.helpers.paths import BENCHMARKS as FOLDER

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
    for part, count in (("train", 80), ("dev", 40)):
        pairs = [[text(), text(), entailment[i % 2]] for i in range(count)]
        write(f"rte/{part}.tsv", ["sentence1", "sentence2", "label"], pairs)
    for part in ("train", "dev"):
        judged = [[text(), text(), classes[i % 3]] for i in range(48)]
        write(f"sick/{part}.tsv", ["sentence_A", "sentence_B", "entailment_judgment"], judged)
        answers = [[f"{WORDS[i // 8]} {WORDS[i // 8 + 1]}", str(int(i % 8 < 2)), text()] for i in range(48)]
        write(f"trecqa/{part}.csv", ["qtext", "label", "atext"], answers)
    return str(folder)


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' folder can be imported from; no run gets a process of its own, which takes seconds to start."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))  # the scripts set it
    monkeypatch.syspath_prepend(FOLDER)
    import hpo_race
    import measures
    import train_speed

    for script in (hpo_race, train_speed):
        monkeypatch.setattr(script, "fresh", lambda function, *args: function(*args))
    monkeypatch.setattr(measures, "PEAK_SHAPES", {"cpu": ((64, 64, 64), (128, 64, 32))})


@pytest.fixture
def logging_kept() -> Iterator[None]:
    """`lightning-bge` sets up logging for its process; put the handlers back."""
    handlers = logging.getLogger().handlers[:]
    yield
    logging.getLogger().handlers[:] = handlers


def job_of(model: str, data: str, **changes: Any) -> Any:
    from common import Job

    shared = {"model": model, "train_file": str(Path(data, "rte", "train.tsv")), "task": "binary", "device": "cpu"}
    columns = {"text_columns": ("sentence1", "sentence2"), "label_column": "label"}
    return Job(**{**shared, **columns, "labels": ("not_entailment", "entailment"), "rows": 32, **changes})


def check_record(path: Path, benchmark: str, *folders: str) -> dict:
    """The record, after a look at what every record and the note beside it must hold."""
    note = path.with_suffix(".md").read_text()
    for text in (path.read_text(), note):
        assert not any(folder in text for folder in folders)
    record = json.loads(path.read_text())
    assert record["benchmark"] == benchmark
    assert record["hardware"]["cores"] >= 1
    assert record["versions"]["torch"]
    assert len(record["model"]["sha256"]) == 64
    assert record["hardware"]["cpu"] in note
    assert f"examples/benchmarks/{benchmark}.py --data FOLDER" in note
    return record


def test_train_speed(
    model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import train_speed

    out = tmp_path / "out" / "speed.json"
    options = ["--rows", "64", "--rounds", "1", "--warmup-steps", "0", "--device", "cpu", "--loss-curve", "3"]
    peers = train_speed.choose(argparse.Namespace(contenders=None, peers="trainer", flagembedding=None))
    assert peers == ["lightning-bge bf16", "lightning-bge fp32", "Trainer", "Trainer bf16"]
    names = [*peers, "textbook Lightning", "Trainer bf16 grouped 8x4", "Trainer bf16 grouped 16x2"]
    train_speed.main(["--model", model, "--data", data, "--out", str(out), *options, "--contenders", *names])
    record = check_record(out, "train_speed", model, data, str(tmp_path))
    assert [run["contender"] for run in record["runs"]] == names
    for run in record["runs"]:
        assert run["sequences"] == 64
        assert run["loop_seconds"] <= run["call_seconds"]
        assert run["length_squares"] == record["runs"][0]["length_squares"]
        assert run["dtype"] == ("bf16" if "bf16" in run["contender"] else "fp32")
        flops = 6 * record["shape"]["parameters"] * run["tokens"] + 12 * 1 * 16 * run["length_squares"]
        peak = record["peaks"][0][run["dtype"]]
        assert run["utilisation"] == pytest.approx(flops / run["loop_seconds"] / peak)
    assert record["contenders"]["Trainer"]["bf16"] is False
    tuned = record["contenders"]["Trainer bf16 grouped 8x4"]
    assert (tuned["per_device_train_batch_size"], tuned["gradient_accumulation_steps"]) == (8, 4)
    assert (tuned["train_sampling_strategy"], tuned["optim"]) == ("group_by_length", "adamw_torch_fused")
    assert record["contenders"]["lightning-bge bf16"]["attention"] == "packed"
    assert record["best_tuned"] in names[-2:]
    assert len(record["loss_curve"]["lightning-bge fp32"]) == 3
    assert record["loss_curve"]["within_limit"]
    for text in (capsys.readouterr().out, out.with_suffix(".md").read_text()):
        assert "lightning-bge bf16 / Trainer " in text
        assert "lightning-bge bf16 / best tuned Trainer" in text


def test_sentence_transformers_trains_on_the_same_tokens(model: str, data: str) -> None:
    pytest.importorskip("datasets", reason="sentence-transformers trains on a Dataset of the package datasets")
    pytest.importorskip("sentence_transformers")
    import train_speed

    job = job_of(model, data)
    ours = train_speed.run_contender("lightning-bge fp32", job, 0)
    for name, dtype in (("CrossEncoderTrainer", "fp32"), ("CrossEncoderTrainer bf16", "bf16")):
        run = train_speed.run_contender(name, job, 0)
        assert run["dtype"] == dtype
        assert run["config"]["bf16"] is (dtype == "bf16")
        assert all(run[same] == ours[same] for same in ("sequences", "tokens", "length_squares"))


def fake_run(rate: float, tokens: int = 1) -> dict:
    seconds = {"loop_seconds": 1 / rate, "call_seconds": 2 / rate, "dtype": "fp32", "peak_memory_mib": 10 * rate}
    work = {"sequences": 1, "tokens": tokens, "length_squares": 1, "threads": 1}
    return {"samples_per_s": rate, "tokens_per_s": rate, **work, **seconds}


def test_medians_ratios_and_turns(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import train_speed

    slow, fast = "Trainer bf16 grouped 4x8", "Trainer bf16 grouped 8x4"
    rates = {
        "lightning-bge bf16": [40.0, 10.0, 30.0],
        "lightning-bge fp32": [10.0, 10.0, 10.0],
        "Trainer": [8, 10, 5],
        slow: [99, 5, 5],
        fast: [20, 10, 10],
    }
    left = {name: list(values) for name, values in rates.items()}
    monkeypatch.setattr(train_speed, "one_run", lambda name, *rest: fake_run(left[name].pop(0)))
    runs, peaks = train_speed.measure(list(rates), job_of(model, data), 3, 0)
    assert [(run["round"], run["contender"]) for run in runs] == [(i, name) for i in (1, 2, 3) for name in rates]
    assert len(peaks) == 3
    found = train_speed.summarize(runs, list(rates))
    assert found["medians"]["lightning-bge bf16"]["samples_per_s"] == 30
    assert found["medians"]["lightning-bge bf16"]["peak_memory_mib"] == 300
    ratio = found["ratios"]["lightning-bge bf16 / Trainer"]
    assert ratio["by_round"] == [5, 1, 6]
    assert ratio["of_medians"] == ratio["of_median_calls"] == pytest.approx(30 / 8)
    assert found["best_tuned"] == fast
    assert found["ratios"]["lightning-bge bf16 / best tuned Trainer"]["by_round"] == [2, 1, 3]
    peers = ["Trainer", slow, fast, "best tuned Trainer"]
    assert set(found["ratios"]) == {f"lightning-bge {ours} / {peer}" for ours in ("bf16", "fp32") for peer in peers}


def test_one_run_in_a_fresh_process(model: str, data: str) -> None:
    import measures
    import train_speed
    from common import encode

    job = job_of(model, data)
    run = measures.fresh(train_speed.run_contender, "lightning-bge fp32", job, 8)
    lengths = [len(row["input_ids"]) for row in encode(job, job.read(job.train_file, 32))]
    assert run["sequences"] == 32
    assert run["tokens"] == sum(lengths)
    assert run["length_squares"] == sum(length**2 for length in lengths)
    assert run["peak_memory_mib"] > 50


def test_contenders_that_trained_on_different_tokens_are_refused(
    model: str, data: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    import train_speed

    tokens = iter((100, 99))
    monkeypatch.setattr(train_speed, "one_run", lambda *rest: fake_run(1.0, next(tokens)))
    with pytest.raises(RuntimeError, match="99 tokens"):
        train_speed.measure(["Trainer", "Trainer bf16"], job_of(model, data), 1, 0)


def test_contenders_that_cannot_run_are_told(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import hpo_race
    import train_speed

    shared = ["--model", model, "--data", data]
    with pytest.raises(SystemExit, match="--flagembedding PYTHON"):
        train_speed.parse([*shared, "--contenders", "FlagEmbedding"])
    for script in (train_speed, hpo_race):
        monkeypatch.setattr(script, "find_spec", lambda name: None)
        with pytest.raises(SystemExit, match=r"CrossEncoderTrainer.*needs sentence_transformers, datasets"):
            script.parse([*shared, "--contenders", "CrossEncoderTrainer"])
    chosen = train_speed.parse([*shared, "--peers", "all"]).contenders
    assert "textbook Lightning" in chosen
    assert not any("CrossEncoder" in name for name in [*chosen, *hpo_race.parse(shared).contenders])


def test_flagembedding_runs_in_its_own_interpreter(model: str, data: str, tmp_path: Path) -> None:
    import train_speed

    python = tmp_path / "python"
    python.write_text(f"#!/bin/sh\ncat > {tmp_path}/given.json; echo noise; echo '{json.dumps(fake_run(2.0))}'\n")
    python.chmod(0o700)
    run = train_speed.one_run("FlagEmbedding", job_of(model, data), 8, str(python))
    assert run["samples_per_s"] == 2
    given = json.loads((tmp_path / "given.json").read_text())
    assert (len(given["pairs"]), given["warmup_rows"]) == (32, 8)
    python.write_text("#!/bin/sh\ncat > /dev/null; echo no such module >&2; exit 1\n")
    with pytest.raises(RuntimeError, match="no such module"):
        train_speed.one_run("FlagEmbedding", job_of(model, data), 8, str(python))


def test_loss_curves_tell_right_from_wrong(model: str, data: str) -> None:
    import loss_curve

    job = job_of(model, data, rows=48, lr=1e-3)
    found = loss_curve.compare_losses(job, 5)  # 2 steps an epoch: stops within the third
    assert (found["epochs"], len(found["plain fp32 loop"])) == (3, 5)
    assert found["largest_difference"] < 1e-6
    ours, batches, _ = loss_curve.our_losses(replace(job, epochs=3), 5)
    assert ours == found["lightning-bge fp32"]
    wrong = loss_curve.plain_losses(replace(job, lr=1e-2), batches)
    assert max(abs(a - b) for a, b in zip(ours, wrong, strict=True)) > 1e-4


def test_gradients_of_the_weighted_loss_do_not_depend_on_the_micro_batches(
    model: str, data: str, tmp_path: Path
) -> None:
    from common import build_trainer, encode, weighted_loss

    class Gradients(TrainerCallback):
        def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            found.append(torch.cat([weights.grad.flatten() for weights in kwargs["model"].parameters()]))

    still = str(tmp_path / "still")
    BertTokenizer.from_pretrained(model).save_pretrained(still)
    BertModel.from_pretrained(model, hidden_dropout_prob=0.0, attention_probs_dropout_prob=0.0).save_pretrained(still)
    job = job_of(still, data, rows=60, positive_weight=3.0, lr=0.0)  # steps of 32 and 28 rows, from the same weights
    by_size = []
    for size in (32, 8):  # the last micro-batch of 8 has 4 rows
        found: list[torch.Tensor] = []
        cut = {"per_device_train_batch_size": size, "gradient_accumulation_steps": 32 // size, "max_grad_norm": 0.0}
        rows = encode(job, job.read(job.train_file, job.rows))
        build_trainer(job, rows, str(tmp_path / "out"), [Gradients()], **cut).train()
        by_size.append(torch.stack(found))
    assert len(by_size[0]) == 2
    assert by_size[0].abs().amax(1).min() > 1e-3
    torch.testing.assert_close(*by_size, rtol=0, atol=1e-6)
    logits, labels = torch.tensor([[0.5], [-1.0], [2.0]]), torch.tensor([1, 0, 0])
    plain = torch.nn.BCEWithLogitsLoss(pos_weight=torch.tensor(3.0))(logits[:, 0], labels.float())
    assert weighted_loss(3.0)(SimpleNamespace(logits=logits), labels) == pytest.approx(plain)


def test_flops_agree_with_torch_counter(tmp_path: Path) -> None:
    import measures

    sizes = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4}
    config = BertConfig(vocab_size=45, attn_implementation="eager", num_labels=1, **sizes)
    config.save_pretrained(tmp_path)
    net = BertForSequenceClassification(config)
    with FlopCounterMode(display=False) as counter:
        net(input_ids=torch.zeros(1, 96, dtype=torch.long)).logits.sum().backward()
    found = measures.model_flops(measures.model_shape(str(tmp_path)), 96, 96**2)
    assert found == pytest.approx(counter.get_total_flops(), rel=0.05)  # ours counts the head at every token


def test_peaks_are_measured() -> None:
    import measures

    assert set(measures.matmul_peak("cpu", repeats=1)) == {"bf16", "fp32"}
    block = b"x" * (64 << 20)
    resident = int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 2**20
    assert len(block) == 64 << 20
    assert measures.peak_memory_mib() >= resident - 1


# ---------------------------------------------------------------------- the race of searches


def race(model: str, data: str, out: Path, *options: str) -> dict:
    import hpo_race

    sizes = ["--rows", "64", "--val-rows", "20", "--trials", "2", "--rounds", "1", "--device", "cpu"]
    hpo_race.main(["--model", model, "--data", data, "--out", str(out), *sizes, *options])
    return check_record(out, "hpo_race", model, data, str(out.parent))


def check_search(run: dict, record: dict) -> None:
    assert [trial["params"] for trial in run["trials"]] == record["fixed_trials"]
    assert all(trial["state"] == "COMPLETE" for trial in run["trials"])
    assert run["best_value"] == max(trial["value"] for trial in run["trials"])
    assert (run["steps"], run["validations"]) == (2 * 2 * 2, 2 * 2)
    assert 0 < run["training_seconds"] + run["validation_seconds"] < run["wall_seconds"]
    inside = run["training_seconds"] + run["validation_seconds"]
    assert run["outside_seconds"] == pytest.approx(run["wall_seconds"] - inside)


@pytest.mark.slow
@pytest.mark.usefixtures("logging_kept")
def test_hpo_race(model: str, data: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import hpo_race

    names = ["lightning-bge", "Trainer", "Trainer tuned 8x4", "textbook Lightning"]
    out = tmp_path / "race.json"
    monkeypatch.setattr(hpo_race, "CAN_PRUNE", [names[0], names[-1]])  # the others take the same way
    record = race(model, data, out, "--contenders", *names, "--pruned")
    pruned = [f"{name}, pruned" for name in (names[0], names[-1])]
    assert [run["contender"] for run in record["runs"]] == [*names, *pruned]
    for run in record["runs"]:
        if run["contender"] != pruned[0]:
            check_search(run, record)  # so short a search prunes nothing
    [ours] = [run for run in record["runs"] if run["contender"] == pruned[0]]
    assert [trial["params"] for trial in ours["trials"]] == record["fixed_trials"]
    assert sorted(trial["state"] for trial in ours["trials"]) == ["COMPLETE", "PRUNED"]  # paused after an epoch
    assert (ours["pruned"], ours["steps"], ours["validations"]) == (1, 3 * 2, 3)
    assert set(record["ratios"]) == {
        *(f"lightning-bge / {peer}" for peer in names[1:]),
        *(f"lightning-bge, pruned / {peer}" for peer in pruned[1:]),
    }
    note = out.with_suffix(".md").read_text()
    assert "--pruned" in note
    assert str(record["fixed_trials"][0]["lr"]) in note


def test_race_of_sentence_transformers(model: str, data: str, tmp_path: Path) -> None:
    pytest.importorskip("datasets", reason="sentence-transformers trains on a Dataset of the package datasets")
    pytest.importorskip("sentence_transformers")
    record = race(model, data, tmp_path / "race.json", "--contenders", "CrossEncoderTrainer")
    check_search(record["runs"][0], record)


def test_pruned_trials_are_counted(model: str, data: str, monkeypatch: pytest.MonkeyPatch) -> None:
    import hpo_race

    class AllButTheFirst(optuna.pruners.BasePruner):
        def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
            return trial.number > 0

    monkeypatch.setattr(optuna.pruners, "MedianPruner", AllButTheFirst)
    job = job_of(model, data, rows=None, dev_file=str(Path(data, "rte", "dev.tsv")), epochs=2)
    trials = hpo_race.draw_trials(2, 0)
    for name in ("Trainer, pruned", "textbook Lightning, pruned"):
        run = hpo_race.run_contender(name, job, trials)
        assert [trial["state"] for trial in run["trials"]] == ["COMPLETE", "PRUNED"]
        assert (run["pruned"], run["steps"]) == (1, 2 * 3 + 3)  # 3 steps an epoch
        hpo_race.check_same(name, run, job, trials, 80)


def test_the_list_of_trials_is_fixed(data: str, tmp_path: Path) -> None:
    import hpo_race
    import searches

    trials = hpo_race.draw_trials(12, 42)
    assert trials == hpo_race.draw_trials(12, 42)
    assert trials[:3] == hpo_race.draw_trials(3, 42)
    assert trials != hpo_race.draw_trials(12, 43)
    for name, low, high, _ in hpo_race.SPACE:
        assert all(low <= trial[name] <= high for trial in trials)
    # the Trainer casts what a trial suggests to the type of its default: a whole number would make 0 of each share
    arguments = searches.trainer_arguments(searches.Race(job_of("", data), trials, str(tmp_path)))
    assert type(TrainingArguments(**arguments).warmup_steps) is float
    with pytest.raises(SystemExit, match="has 80 rows, 81"):
        hpo_race.head(Path(data, "rte", "train.tsv"), tmp_path / "few.tsv", 81)


def test_searches_of_other_work_are_refused(model: str, data: str) -> None:
    import hpo_race

    trials = hpo_race.draw_trials(2, 0)
    job = job_of(model, data, epochs=2)
    done = [{"number": i, "params": trial, "state": "COMPLETE"} for i, trial in enumerate(trials)]
    run = {"trials": done, "steps": 8, "pruned": 0}
    hpo_race.check_same("Trainer", run, job, trials, 64)
    for changes, told in (
        ({"trials": done[:1]}, "not"),
        ({"steps": 7}, "7 training steps, 8"),
        ({"trials": [done[0], {**done[1], "state": "FAIL"}]}, r"\[1\] did not finish"),
        ({"pruned": 1}, "1 were pruned"),
    ):
        with pytest.raises(RuntimeError, match=told):
            hpo_race.check_same("Trainer", {**run, **changes}, job, trials, 64)


def test_step_clock_counts_what_lies_inside(monkeypatch: pytest.MonkeyPatch) -> None:
    import measures

    now = iter((0.0, 2.0, 10.0, 13.0))
    monkeypatch.setattr(measures.time, "perf_counter", lambda: next(now))
    clock = measures.StepClock()
    clock.start()
    clock.stop_step()
    with clock.validating():
        pass
    assert (clock.training, clock.steps, clock.validation, clock.validations) == (2, 1, 3, 1)


# ---------------------------------------------------------------------- quality


def test_quality(model: str, data: str, tmp_path: Path) -> None:
    import quality

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


def test_ranking_metrics_agree_with_scikit_learn() -> None:
    import quality

    draw = random.Random(1)
    for _ in range(20):
        scores = [draw.random() for _ in range(12)]
        labels = [1, *(draw.randint(0, 1) for _ in range(11))]
        ranks = quality.rank_positives(scores, labels)
        precision = sum(found / rank for found, rank in enumerate(ranks, 1)) / len(ranks)
        assert precision == pytest.approx(average_precision_score(labels, scores))
    assert quality.rank_positives([0.5, 0.5, 0.9], [1, 0, 0]) == [3]  # a tie counts against the positive


def test_missing_data_is_told(model: str, tmp_path: Path) -> None:
    import hpo_race
    import quality
    import train_speed

    for script in (train_speed, quality, hpo_race):
        with pytest.raises(SystemExit, match="no folder"):
            script.main(["--model", model, "--data", str(tmp_path / "absent")])
