"""The GPU suite in its tiny form on a CPU: that it runs, counts rightly and goes on; how fast is not asked here."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from dataclasses import replace
from functools import partial
from importlib import import_module
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.autograd import DeviceType
from transformers import AutoTokenizer, DataCollatorWithPadding

from lightning_bge.data.batches.samplers import EffectiveBatchSampler
from lightning_bge.types import MicroBatch
from tests.helpers.paths import BENCHMARKS

pytest.importorskip("accelerate", reason="transformers' Trainer needs accelerate")

# Warnings of the peers are not ours to mend.
pytestmark = pytest.mark.filterwarnings("default")

TINY = ["--tiny", "--device", "cpu"]


@pytest.fixture(scope="module")
def gpu() -> Iterator[SimpleNamespace]:
    """The suite's modules."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("CUDA_VISIBLE_DEVICES", os.environ.get("CUDA_VISIBLE_DEVICES", "0"))  # the script sets it
        patch.syspath_prepend(BENCHMARKS)
        names = ("suite", "parts", "contenders", "floor", "note", "memory")
        yield SimpleNamespace(**{name: import_module(f"gpu_{name}") for name in names})


@pytest.fixture(scope="module")
def record(gpu: SimpleNamespace, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = tmp_path_factory.mktemp("suite")
    torch.set_num_threads(1)
    gpu.suite.main([*TINY, "--out", str(folder / "out.json")])
    text = (folder / "out.json").read_text()
    assert str(folder) not in text
    return {**json.loads(text), "note": (folder / "out.md").read_text()}


@pytest.fixture
def bench(gpu: SimpleNamespace, tmp_path: Path) -> Any:
    return gpu.parts.Bench("cpu", tmp_path, gpu.parts.Limit(1, 2, 60.0), tiny=True)


def test_every_part_ran_or_says_why_not(gpu: SimpleNamespace, record: dict[str, Any], bench: Any) -> None:
    assert record["failed"] == []
    assert record["options"]["tiny"]
    assert record["weights"] == "random, seed 0"
    assert record["peak_flops_per_s"] > 0
    cuda = {part.name for part in gpu.suite.all_parts(bench) if part.cuda}
    every = {part.name for part in gpu.suite.all_parts(bench)}
    assert set(record["parts"]) == every - cuda
    assert cuda <= {entry["what"] for entry in record["skipped"]}
    assert all(entry["reason"] for entry in record["skipped"])
    for name in [*record["parts"], *(entry["what"] for entry in record["skipped"])]:
        assert name in record["note"]
    assert "No figure here says anything about speed" in record["note"]


def test_the_first_parts_fit_into_eight_minutes(gpu: SimpleNamespace, bench: Any) -> None:
    parts = gpu.suite.all_parts(replace(bench, tiny=False))
    minutes = gpu.suite.parse(["--tiny", "--device", "cpu"]).minutes
    first = gpu.suite.planned(parts, minutes)
    assert first == parts[: len(first)]
    assert sum(part.needs for part in first) + gpu.suite.PEAK_SECONDS <= minutes * 60 <= 480
    names = " ".join(part.name for part in first)
    for what in ("compare", "overhead", "switches", "attention", "compile", "bge-reranker-v2-m3", "long"):
        assert what in names
    assert gpu.suite.planned(parts, 1000) == parts
    assert gpu.suite.planned(parts, 1) == []


def test_figures_agree_with_one_another(record: dict[str, Any]) -> None:
    compared = [part for name, part in record["parts"].items() if name.startswith("compare")]
    assert len(compared) == 4
    for part in compared:
        batch = part["case"]["batch"]
        assert {"lightning-bge", "Trainer", "Trainer tuned, 1 micro-batches"} <= set(part["contenders"])
        for contender in part["contenders"].values():
            for run in contender["runs"]:
                assert run["steps"] == 2
                assert run["sequences"] == run["steps"] * batch
                assert run["tokens"] >= 8 * run["sequences"]
                assert run["samples_per_s"] * run["seconds"] == pytest.approx(run["sequences"])
                assert run["tokens_per_s"] * run["seconds"] == pytest.approx(run["tokens"])
                assert 0 < run["host_ms"] <= run["step_ms"] == pytest.approx(run["seconds"] / run["steps"] * 1e3)
        ours, peer = (part["contenders"][name]["median"]["samples_per_s"] for name in ("lightning-bge", "Trainer"))
        assert part["ratios"]["lightning-bge / Trainer"]["of_medians"] == pytest.approx(ours / peer)
        floor = part["floor"]
        pieces = [floor[name] for name in ("matmul_ms", "attention_ms", "optimizer_ms")]
        assert min(pieces) > 0
        assert floor["total_ms"] == pytest.approx(sum(pieces))
        step = part["contenders"]["lightning-bge"]["median"]["step_ms"]
        assert part["step_over_floor"] * floor["total_ms"] == pytest.approx(step)
        assert 0 < floor["matmul_flops"] < 1.1 * floor["model_flops"]


def test_switches_are_in_effect(record: dict[str, Any]) -> None:
    found = {
        name: part
        for name, part in record["parts"].items()
        if name.startswith(("switches", "micro-batch", "attention"))
    }
    switches, sizes, attention = found.values()
    configs = {name: contender["config"] for name, contender in switches["contenders"].items()}
    assert configs["lightning-bge"]["precision"] == "bf16-mixed"
    assert configs["lightning-bge"]["attention"] == "packed"
    assert configs["padded attention"]["attention"] != "packed"
    assert configs["fp32"]["precision"] == "32-true"
    assert configs["dropout 0"]["dropout"] == 0
    assert configs["foreach AdamW"]["fused"] is False
    assert len({contender["config"]["tokens"] for contender in sizes["contenders"].values()}) == 4
    errors = [entry["relative_error"] for entry in attention.values() if isinstance(entry, dict)]
    assert len(errors) == 3
    assert max(errors) < 0.02  # bf16 has 8 bits


def test_the_answer_of_the_micro_batch_finder_held(record: dict[str, Any]) -> None:
    [(name, part)] = [(name, part) for name, part in record["parts"].items() if name.startswith("memory")]
    assert name == "memory bge-base-en-v1.5"
    [entry] = part["limits"]
    assert entry["micro_batch_size"] >= 8 * 512
    assert entry["tries"] > 3
    assert entry["search_s"] > 0
    assert "RLIMIT_AS" in entry["reason"]
    assert (entry["runs"], entry["failed_runs"], entry["larger_failed"]) == (2, 0, True)
    assert re.search(r"\| 2 +\| 0 +\| True +\|", record["note"])


def test_each_limit_has_a_process_and_a_wrong_answer_is_a_failure(
    gpu: SimpleNamespace, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    tasks: list[Any] = []

    def run_alone(task: Any) -> dict[str, Any]:
        tasks.append(task)
        if len(tasks) == 4:
            raise RuntimeError("exit status 1: AttributeError")
        figures = {"micro_batch_size": 512, "search_s": 1.0, "runs": 20}
        return {**figures, "failed_runs": int(len(tasks) == 2), "larger_failed": len(tasks) != 3}

    monkeypatch.setattr(gpu.memory, "run_alone", run_alone)
    suite = suite_of(gpu, replace(bench, tiny=False, device="cpu"), 1.0)
    monkeypatch.setattr(type(bench), "model_folder", lambda self, model: "")
    found = gpu.memory.measure_memory(suite, "bge-reranker-v2-m3")
    assert [task.fraction for task in tasks] == [0.1, 0.15, 0.25, 0.5]
    assert {task.runs for task in tasks} == {20}
    assert len(found["limits"]) == 3
    assert [entry["what"][-4:] for entry in suite.failed] == [" 15%", " 25%", " 50%"]
    assert "1 of 20 steps ran out of memory; 2 times as many did not fit" in suite.failed[0]["error"]
    assert "0 of 20 steps ran out of memory; 2 times as many fitted too" in suite.failed[1]["error"]


def test_our_tokens_are_those_of_the_timed_batches(gpu: SimpleNamespace, record: dict[str, Any], bench: Any) -> None:
    case = bench.case("bge-base-en-v1.5", "rte", 256)
    lengths = bench.rows(case).lengths
    batches = list(EffectiveBatchSampler(np.arange(len(lengths)), case.batch, 42))
    timed = sum(int(lengths[rows].sum()) for rows in batches[1:])
    assert record["parts"][f"compare {case}"]["contenders"]["lightning-bge"]["runs"][0]["tokens"] == timed


def test_one_shape_repeats_one_batch(gpu: SimpleNamespace, bench: Any) -> None:
    case = bench.case("bge-base-en-v1.5", "rte", 32)
    batches = list(gpu.contenders.loader_of(bench, case, 8192, one_shape=True))
    assert len(batches) == 3
    assert {batch.micro[0].lengths for batch in batches} == {batches[0].micro[0].lengths}
    assert {batch.size for batch in batches} == {case.batch}


def test_the_peer_counts_what_its_collator_gets(gpu: SimpleNamespace, bench: Any) -> None:
    collator = DataCollatorWithPadding(gpu.parts.word_tokenizer(bench.shape("bge-base-en-v1.5")))
    clock = gpu.parts.Clock(gpu.parts.Limit(1, 1, 60.0))
    gpu.contenders.count_in(collator, clock, lambda feature: len(feature["input_ids"]))
    assert collator([{"input_ids": [5, 6, 7]}, {"input_ids": [5]}])["input_ids"].shape == (2, 3)
    assert isinstance(collator, DataCollatorWithPadding)
    assert clock.seen == [(2, 4, 10)]


def test_clock_and_utilisation_by_hand(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(100))
    monkeypatch.setattr(gpu.parts, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    clock = gpu.parts.Clock(gpu.parts.Limit(warmup=1, steps=2, seconds=60.0))  # second 0
    for lengths in ([9], [9], [3, 1], [2], [4], [5], [7, 7]):  # two a step; the last one was fetched ahead
        clock.saw(lengths)
    # second 1; 2: the warm-up has ended; 3: timing begins
    assert clock.step() is False
    assert clock.step() is False  # second 4
    assert clock.step() is True  # second 5 on the host, 6 on the device
    run = clock.result({"parameters": 10, "layers": 2, "hidden": 3}, peak=1000.0, accumulated=2)
    assert (run["steps"], run["sequences"], run["tokens"]) == (2, 5, 15)
    assert (run["warmup_seconds"], run["host_ms"], run["step_ms"]) == (2.0, 1000.0, 1500.0)
    squares = 3**2 + 1 + 2**2 + 4**2 + 5**2
    assert run["utilisation"] == pytest.approx((6 * 10 * 15 + 12 * 2 * 3 * squares) / 3.0 / 1000)


def test_clock_ends_when_its_seconds_are_over(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    ticks = iter(range(0, 1000, 10))
    monkeypatch.setattr(gpu.parts, "time", SimpleNamespace(perf_counter=lambda: float(next(ticks))))
    clock = gpu.parts.Clock(gpu.parts.Limit(warmup=1, steps=100, seconds=15.0))
    assert [clock.step() for _ in range(3)] == [False, False, True]


def test_a_run_that_ends_early_is_an_error(gpu: SimpleNamespace) -> None:
    clock = gpu.parts.Clock(gpu.parts.Limit(1, 5, 60.0))
    clock.step()
    with pytest.raises(RuntimeError, match="after 1 steps"):
        clock.result({}, 1.0)


def test_lengths_are_as_described(gpu: SimpleNamespace, bench: Any, tmp_path: Path) -> None:
    full = gpu.parts.Bench("cpu", tmp_path, bench.limit)
    rte, long = (full.draw_lengths(name, 20_000) for name in ("rte", "long"))
    assert (rte.min(), rte.max()) == (13, pytest.approx(289, abs=30))
    assert rte.mean() == pytest.approx(70.2, rel=0.02)  # of RTE's 2,490 training pairs
    assert rte.std() == pytest.approx(41.2, rel=0.05)
    assert (long.min() >= 8, long.max()) == (True, 512)
    assert np.median(long) == pytest.approx(128, rel=0.05)
    assert (rte == full.draw_lengths("rte", 20_000)).all()


@pytest.mark.parametrize("model", ["bge-base-en-v1.5", "bge-reranker-v2-m3"])
def test_a_peer_that_reads_text_gets_the_same_ids(gpu: SimpleNamespace, bench: Any, model: str) -> None:
    case = bench.case(model, "rte", 32)
    rows, texts = bench.rows(case), gpu.contenders.texts_of(bench, case)
    tokens = AutoTokenizer.from_pretrained(bench.model_folder(model))(texts["first"], texts["second"])
    assert np.concatenate(tokens["input_ids"]).tolist() == rows.input_ids.tolist()
    assert [len(ids) for ids in tokens["input_ids"]] == rows.lengths.tolist()
    if rows.token_type_ids is None:
        assert "token_type_ids" not in tokens
    else:
        assert np.concatenate(tokens["token_type_ids"]).tolist() == rows.token_type_ids.tolist()


@pytest.mark.parametrize(
    ("model", "parameters"),
    [
        ("bge-small-en-v1.5", 33.4),
        ("bge-base-en-v1.5", 109.5),
        ("bge-large-en-v1.5", 335.1),
        ("bge-reranker-v2-m3", 567.8),
    ],
)
def test_shapes_are_those_of_the_models(gpu: SimpleNamespace, model: str, parameters: float) -> None:
    """Millions of parameters, as the models' cards on the hub count them."""
    from transformers import AutoModelForSequenceClassification

    with torch.device("meta"):
        built = AutoModelForSequenceClassification.from_config(gpu.parts.MODELS[model].config())
    assert sum(p.numel() for p in built.parameters()) / 1e6 == pytest.approx(parameters, rel=0.003)


class Net(nn.Module):
    def __init__(self, use_second: bool = True) -> None:
        super().__init__()
        self.first, self.second, self.use_second = nn.Linear(8, 6), nn.Linear(6, 1), use_second

    def forward(self, micro: MicroBatch) -> torch.Tensor:
        hidden = self.first(torch.zeros(1, sum(micro.lengths), 8))
        with torch.autocast("cpu", enabled=False):
            pooled = hidden[0, : len(micro.lengths)].float()
            return self.second(pooled) if self.use_second else pooled


def micro_batch() -> MicroBatch:
    empty = torch.zeros(7, dtype=torch.int64)
    return MicroBatch(empty, empty, torch.tensor([0, 4, 7], dtype=torch.int32), (4, 3), empty[:2])


def test_the_floor_takes_the_shapes_of_the_calls_themselves(gpu: SimpleNamespace) -> None:
    calls = gpu.floor.linear_calls(Net(), micro_batch())
    assert calls == [(7, 8, 6, torch.bfloat16), (2, 6, 1, torch.float32)]
    assert gpu.floor.matmul_ms(calls, "cpu") > 0
    with pytest.raises(RuntimeError, match="only 1 of 2"):
        gpu.floor.linear_calls(Net(use_second=False), micro_batch())


def test_kernels_are_counted_once(gpu: SimpleNamespace) -> None:
    def event(key: str, device: DeviceType, annotation: bool, count: int, us: float) -> SimpleNamespace:
        times = {"self_device_time_total": us, "self_cpu_time_total": 1.0}
        return SimpleNamespace(key=key, device_type=device, is_user_annotation=annotation, count=count, **times)

    events = [
        event("gemm", DeviceType.CUDA, False, 4, 2000.0),
        event("add", DeviceType.CUDA, False, 2, 3000.0),
        event("Optimizer.step#AdamW.step", DeviceType.CUDA, True, 1, 9000.0),  # the span over kernels counted above
        event("aten::mm", DeviceType.CPU, False, 4, 2000.0),  # which launched them
    ]
    found = gpu.floor.kernels(SimpleNamespace(key_averages=lambda: events), "cuda")
    assert found == [("add", 2, 3.0), ("gemm", 4, 2.0)]


@pytest.mark.parametrize("first_only", [False, True])
def test_attention_alone_is_measured_for_all_and_for_first_tokens(
    gpu: SimpleNamespace, bench: Any, first_only: bool
) -> None:
    case = bench.case("bge-base-en-v1.5", "rte", 32)
    attend = gpu.floor.as_chosen
    assert gpu.floor.attention_ms(bench, case, micro_batch(), attend, 0.1, first_only) > 0


def suite_of(gpu: SimpleNamespace, bench: Any, minutes: float, now: Any = None) -> Any:
    return gpu.suite.Suite(bench, rounds=3, minutes=minutes, **({} if now is None else {"now": now}))


def test_without_time_everything_is_listed_as_skipped(
    gpu: SimpleNamespace, tmp_path: Path, bench: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "none.json"
    gpu.suite.main([*TINY, "--minutes", "0", "--out", str(out)])
    found = json.loads(out.read_text())
    names = [part.name for part in gpu.suite.all_parts(bench)]
    assert found["parts"] == {}
    assert [entry["what"] for entry in found["skipped"]] == names
    told = capsys.readouterr().out
    assert all(f"skipped: {name}: 0 s were left" in told or f"skipped: {name}: needs CUDA" in told for name in names)


def test_a_part_that_would_end_too_late_is_skipped_for_a_shorter_one(gpu: SimpleNamespace, tmp_path: Path) -> None:
    clock = [0.0]
    bench = gpu.parts.Bench("cpu", tmp_path, gpu.parts.Limit(1, 1, 1.0))

    def take(seconds: float, suite: Any) -> dict[str, Any]:
        clock[0] += seconds
        return {"took": seconds}

    suite = suite_of(gpu, bench, 1.0, lambda: clock[0])
    part = gpu.suite.Part
    parts = [part("a", 30, partial(take, 40.0)), part("b", 30, partial(take, 1.0)), part("c", 10, partial(take, 5.0))]
    saved: list[list[str]] = []
    gpu.suite.run_parts(suite, parts, lambda suite: saved.append(list(suite.parts)))
    assert suite.parts == {"a": {"took": 40.0, "seconds": 40.0}, "c": {"took": 5.0, "seconds": 5.0}}
    assert suite.skipped == [{"what": "b", "reason": "20 s were left, it needs about 30"}]
    assert saved == [["a"], ["a", "c"]]


def test_contenders_take_turns_and_one_that_fails_is_out(
    gpu: SimpleNamespace, bench: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    rates = {"ours": [30.0, 10.0, 20.0], "peer": [5.0, 10.0, 4.0]}
    order: list[str] = []

    def run(bench: Any, case: Any, train: str, peak: float) -> dict[str, Any]:
        order.append(train)
        if train == "broken":
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB\nmore")
        figures = dict.fromkeys(gpu.note.FIGURES, 1.0) | {"samples_per_s": rates[train].pop(0), "peak_gib": None}
        return {**figures, "config": {"name": train}}

    monkeypatch.setattr(gpu.suite, "run_once", run)
    suite = suite_of(gpu, bench, 1.0)
    found = suite.turns(bench.case("bge-base-en-v1.5", "rte", 32), {name: name for name in ("ours", "broken", "peer")})
    assert order == ["ours", "broken", "peer", "ours", "peer", "ours", "peer"]
    assert list(found["contenders"]) == ["ours", "peer"]
    assert found["contenders"]["ours"]["median"]["samples_per_s"] == 20
    assert found["contenders"]["ours"]["median"]["peak_gib"] is None
    assert found["contenders"]["peer"]["config"] == {"name": "peer"}
    assert found["ratios"] == {"ours / peer": {"of_medians": 4.0, "by_round": [6.0, 1.0, 5.0]}}
    assert [entry["what"] for entry in suite.failed] == ["bge-base-en-v1.5, rte, batch 4: broken"]
    assert suite.failed[0]["error"] == "OutOfMemoryError: CUDA out of memory. Tried to allocate 2 GiB"


def test_turns_end_when_the_time_is_over(gpu: SimpleNamespace, bench: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [0.0]

    def run(bench: Any, case: Any, train: str, peak: float) -> dict[str, Any]:
        clock[0] += 25.0
        return {**dict.fromkeys(gpu.note.FIGURES, 1.0), "config": {}}

    monkeypatch.setattr(gpu.suite, "run_once", run)
    suite = suite_of(gpu, bench, 1.0, lambda: clock[0])
    found = suite.turns(bench.case("bge-base-en-v1.5", "rte", 32), {"ours": "ours", "peer": "peer"})
    assert [len(entry["runs"]) for entry in found["contenders"].values()] == [2, 1]
    assert [entry["what"][-13:] for entry in suite.skipped] == ["peer, round 2", "ours, round 3", "peer, round 3"]


def test_a_failed_part_is_recorded_and_the_exit_tells(
    gpu: SimpleNamespace, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(suite: Any) -> dict[str, Any]:
        raise AttributeError("module 'torch' has no attribute 'new_thing'")

    part = gpu.suite.Part
    monkeypatch.setattr(gpu.suite, "all_parts", lambda bench: [part("bad", 0, broken), part("good", 0, lambda _: {})])
    out = tmp_path / "out.json"
    with pytest.raises(SystemExit, match="failed: bad"):
        gpu.suite.main([*TINY, "--out", str(out)])
    found = json.loads(out.read_text())
    assert list(found["parts"]) == ["good"]
    assert found["failed"] == [{"what": "bad", "error": "AttributeError: module 'torch' has no attribute 'new_thing'"}]
    assert "## Failed" in out.with_suffix(".md").read_text()


def test_waits_for_the_device_are_counted_by_place(gpu: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    import warnings

    modes: list[str] = []
    monkeypatch.setattr(torch.cuda, "set_sync_debug_mode", modes.append)
    with gpu.floor.Syncs() as syncs:
        for _ in range(3):
            warnings.warn_explicit("called a synchronizing CUDA operation", UserWarning, "/somewhere/step.py", 7)
        warnings.warn_explicit("something else", UserWarning, "/somewhere/step.py", 8)
    assert modes == ["warn", "default"]
    assert syncs.places == {"step.py:7": 3}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--device", "cpu"], "needs a GPU"),
        ([*TINY, "--rounds", "0"], "expected 1 or more"),
        ([*TINY, "--parts", "nothing"], "expected a word out of one of these names: compare"),
    ],
)
def test_wrong_options_are_told(gpu: SimpleNamespace, options: list[str], message: str) -> None:
    with pytest.raises(SystemExit, match=message):
        gpu.suite.main(options)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a GPU")
def test_no_gpu_is_told(gpu: SimpleNamespace) -> None:
    with pytest.raises(SystemExit, match="no CUDA device"):
        gpu.suite.main(["--device", "cuda"])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_on_a_gpu(gpu: SimpleNamespace, tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    words = ["compare", "overhead", "switches", "attention", "memory"]
    gpu.suite.main(["--tiny", "--device", "cuda", "--parts", *words, "--out", str(out)])
    found = json.loads(out.read_text())
    assert found["failed"] == []
    overheads = [part for name, part in found["parts"].items() if name.startswith("overhead")]
    assert all(part["kernels_per_step"] > 0 and part["device_busy_ms"] > 0 for part in overheads)
