"""The benchmark of optimizations runs end to end on a tiny model, and its switches have an effect."""

from __future__ import annotations

import csv
import json
import random
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from statistics import median
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from tests.helpers.paths import ROOT
from tests.helpers.small_models import WORDS, save_model

PAGE = "# Optimizations\n\nby hand, above\n\n{begin}\nwhat was there\n{end}\n\nby hand, below\n"

pytestmark = pytest.mark.filterwarnings("default")  # transformers' Trainer is imported by the scripts' shared module
pytest.importorskip("accelerate", reason="the benchmarks' shared module imports transformers' Trainer")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' folder can be imported from; graphs are made, but not compiled."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import optimizations_training

    monkeypatch.setattr(optimizations_training, "BACKEND", "eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a file like RTE's."""
    found, draw = tmp_path_factory.mktemp("optimizations"), random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))

    save_model(found / "model", outputs=2, dropout=0.1, max_position_embeddings=512)
    (found / "rte").mkdir()
    with (found / "rte" / "train.tsv").open("w", newline="") as file:
        rows = [(text(), text(), ("entailment", "not_entailment")[i % 2]) for i in range(60)]
        csv.writer(file, delimiter="\t").writerows([("sentence1", "sentence2", "label"), *rows])
    return found


def short_training(folder: Path, cache: Path, pairs: int = 4, steps: int = 2) -> Any:
    from common import Job
    from optimizations_training import ShortTraining

    columns = {"text_columns": ("sentence1", "sentence2"), "label_column": "label"}
    job = Job(
        model=str(folder / "model"),
        train_file=str(folder / "rte" / "train.tsv"),
        task="binary",
        labels=("not_entailment", "entailment"),
        device="cpu",
        batch=pairs,
        rows=60,
        **columns,
    )
    return ShortTraining(job, str(cache), steps)


def test_from_the_command_line_to_the_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import optimizations
    from optimizations_page import BEGIN, END

    monkeypatch.setattr(
        optimizations, "RECORDS", {"CPU": tmp_path / "not-this.json", "GPU": tmp_path / "not-there.json"}
    )
    out, page = tmp_path / "optimizations.json", tmp_path / "optimizations.md"
    page.write_text(PAGE.format(begin=BEGIN, end=END))
    names = [
        name for name in optimizations.OPTIMIZATIONS if name != "persistent"
    ]  # whose workers take seconds to start
    sizes = ["--rounds", "1", "--steps", "1", "--pairs", "4", "--orders", "2", "--device", "cpu"]
    files = ["--model", str(folder / "model"), "--data", str(folder), "--out", str(out), "--page", str(page)]
    optimizations.main([*files, *sizes, "--only", ",".join([*names, "pruning"])])

    record, text = json.loads(out.read_text()), page.read_text()
    assert record["hardware"]["cores"] >= 1
    assert len(record["model"]["sha256"]) == 64
    for written in (out.read_text(), text):
        assert str(tmp_path) not in written
        assert str(folder) not in written
    assert set(record["not_measured"]) == {"tf32", "pin", "cudnn"}
    assert [run["optimization"] for run in record["runs"]] == [
        name for name in names if name not in record["not_measured"]
    ]
    for run in record["runs"]:
        found = record["summary"][run["optimization"]]
        assert found["times_as_fast"]["by_round"] == [run["without"] / run["with"]]
        assert f"| {found['without']:.3g} / {found['with']:.3g}" in text
    assert text.startswith("# Optimizations\n\nby hand, above\n\n<!--")
    assert text.endswith("-->\n\nby hand, below\n")
    assert "what was there" not in text
    assert "not measured: TF32 needs a CUDA device" in text
    assert text.count("not measured yet") == 1 + len(
        optimizations.OPTIMIZATIONS
    )  # persistent, and the whole column of the GPU
    assert "examples/benchmarks/optimizations.py --data FOLDER" in text
    assert "torch.compile" in capsys.readouterr().out


def test_sides_take_turns_and_medians_are_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optimizations

    asked, seconds = [], {"without": iter((4.0, 9.0, 6.0)), "with": iter((2.0, 3.0, 6.0))}

    def side(name: str) -> Callable[[Any], float]:
        return lambda training: asked.append(name) or next(seconds[name])

    row = optimizations.Optimization("row", "2x", ("off", "on"), side("without"), side("with"))
    monkeypatch.setattr(optimizations, "OPTIMIZATIONS", {"row": row})
    runs = optimizations.measure(["row"], short_training(folder, tmp_path), 3)
    assert asked == ["without", "with", "with", "without", "without", "with"]
    found = optimizations.summarize(runs)["row"]
    assert (found["without"], found["with"]) == (6.0, 3.0)
    assert found["times_as_fast"] == {"of_medians": 2.0, "by_round": [2.0, 3.0, 1.0]}


def test_a_failed_compilation_gives_its_reason(folder: Path, tmp_path: Path) -> None:
    import optimizations
    from optimizations_training import try_compiling

    training = short_training(folder, tmp_path)
    assert try_compiling(training) is None
    reason = try_compiling(replace(training, compile_limit=1e-3), "reduce-overhead")  # another mode: not known yet
    assert "was not compiled within 1 ms" in str(reason)
    failing = optimizations.Optimization(
        "row", "2x", ("off", "on"), lambda b: 1.0, lambda b: 1.0, prepare=lambda b: "no compiler"
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizations, "OPTIMIZATIONS", {"row": failing})
        assert optimizations.find_unavailable(["row"], training) == {"row": "no compiler"}


def test_wrong_options_are_refused(folder: Path, tmp_path: Path) -> None:
    import optimizations
    from optimizations_page import write_page

    given = ["--model", str(folder / "model"), "--data", str(folder)]
    with pytest.raises(SystemExit, match="unknown optimization speed; known: bf16, tf32"):
        optimizations.parse([*given, "--only", "bf16,speed", "--out", "some.json"])
    with pytest.raises(SystemExit, match="name another --out"):
        optimizations.parse([*given, "--only", "bf16"])
    (tmp_path / "page.md").write_text("# Optimizations\n")
    with pytest.raises(SystemExit, match="expected one line '<!-- measured"):
        write_page(tmp_path / "page.md", {}, {})


# ------------------------------------------------------------------ the switches


class Spy(Callback):
    """Records optimizer, gradients and batch at the end of a step."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.group = trainer.optimizers[0].param_groups[0]
        self.gradients = [p.grad for p in pl_module.parameters()]
        self.module, self.trainer, self.batch = pl_module, trainer, batch


def spied(training: Any, **switches: Any) -> Spy:
    from optimizations_training import Seconds, fit

    spy = Spy()
    assert fit(training, Seconds(training.warmup), [spy], **switches) > 0
    return spy


def test_the_default_side_is_the_product_s_own(folder: Path, tmp_path: Path) -> None:
    spy = spied(short_training(folder, tmp_path), precision="32-true")
    assert spy.group["fused"] is True
    assert all(gradient is None for gradient in spy.gradients)
    assert spy.module.net.packed
    assert len(spy.batch.micro) == 1
    assert (spy.batch.size, spy.trainer.global_step) == (4, 3)
    assert spy.trainer.precision == "32-true"


def test_each_switch_has_an_effect(folder: Path, tmp_path: Path) -> None:
    from optimizations_training import FOREACH, LOOP

    training = short_training(folder, tmp_path)
    for flags in (LOOP, FOREACH):
        group = spied(training, adamw=flags).group
        assert {name: group[name] for name in flags} == flags
    gradients = spied(training, fill_zeros=True).gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert not spied(training, attention="padded").module.net.packed
    assert len(spied(training, batching={"max_tokens": 8}).batch.micro) > 1
    assert spied(training, precision="bf16-mixed").trainer.precision == "bf16-mixed"


def test_all_implementations_of_the_optimizer_give_equal_weights(folder: Path, tmp_path: Path) -> None:
    from optimizations_training import FOREACH, LOOP

    training = short_training(folder, tmp_path)
    ends = [
        torch.cat([p.detach().flatten() for p in spied(training, precision="32-true", **switches).module.parameters()])
        for switches in ({}, {"adamw": LOOP}, {"adamw": FOREACH}, {"fill_zeros": True})
    ]
    assert (ends[0] - torch.cat([p.detach().flatten() for p in load(folder).parameters()])).abs().max() > 1e-6
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)


def load(folder: Path) -> torch.nn.Module:
    from lightning_bge.models.encoder import load_classifier

    return load_classifier(str(folder / "model"), 1)


def test_layers_are_compiled_by_policy_always_alone(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import optimizations_training

    seen: list[Any] = []
    monkeypatch.setattr(
        optimizations_training, "CompileLayers", lambda config: seen.append(found := real(config)) or found
    )
    from lightning_bge.callbacks.compile.callback import CompileLayers as real

    for policy in ("never", "always"):
        optimizations_training.compiled_step(short_training(folder, tmp_path), policy)
    assert [callback.in_effect for callback in seen] == [False, True]


def test_persistent_workers_are_switched(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import optimizations_training

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(
        optimizations_training, "fit", lambda training, clock, **switches: asked.append(switches) or 8.0
    )
    for kept in (False, True):
        assert optimizations_training.worker_epoch(short_training(folder, tmp_path), kept) == 4.0
    assert [one["batching"] for one in asked] == [
        {"num_workers": 1, "persistent_workers": kept} for kept in (False, True)
    ]
    assert all(one["epochs"] == 2 for one in asked)


# ------------------------------------------------------------------ pruning


def test_replayed_searches_agree_with_the_table_of_pruners() -> None:
    import optimizations_pruning

    found = optimizations_pruning.replay(20, 7)
    table = json.loads((ROOT / "docs" / "benchmarks" / "pruner_replay.json").read_text())["table"]
    rows = {"Hyperband": "hyperband, not between folds", "`asha`": "asha"}
    for name, studies in found.items():
        theirs = next((row for start, row in rows.items() if name.startswith(start)), None)
        for study, values in studies.items():
            assert len(values["whole"]) == len(values["to_reach"]) == 20
            if theirs is not None:
                share = table[f"{study}, 1 report an epoch"][theirs]["in_all"]
                assert median(values["whole"]) == pytest.approx(1 / share, rel=0.1)


def test_fold_pruning_ends_trials_between_folds_alone() -> None:
    import optimizations_pruning

    from lightning_bge.hpo.forecast.recording import Recording

    study = Recording.load(optimizations_pruning.CURVES / "trecqa.json").coarser(1)
    fold = study.epochs
    for name, (_, policy) in optimizations_pruning.PRUNERS.items():
        reports = policy(study)(study, range(len(study.trials)), "order").steps
        assert min(reports) < study.n_steps
        assert all(count % fold == 0 for count in reports) is name.startswith("fold pruning")
