"""The benchmark of claims runs end to end on a tiny model, and its switches really switch."""

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

PAGE = "# Claims\n\nby hand, above\n\n{begin}\nwhat was there\n{end}\n\nby hand, below\n"

pytestmark = pytest.mark.filterwarnings("default")  # transformers' Trainer is imported by the scripts' shared module
pytest.importorskip("accelerate", reason="the benchmarks' shared module imports transformers' Trainer")


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The scripts' folder can be imported from; graphs are made, but not compiled."""
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "")
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))
    import claims_sides

    monkeypatch.setattr(claims_sides, "BACKEND", "eager")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model, and a file like RTE's."""
    found, draw = tmp_path_factory.mktemp("claims"), random.Random(0)

    def text() -> str:
        return " ".join(draw.choices(WORDS, k=draw.randint(1, 9)))

    save_model(found / "model", outputs=2, dropout=0.1, max_position_embeddings=512)
    (found / "rte").mkdir()
    with (found / "rte" / "train.tsv").open("w", newline="") as file:
        rows = [(text(), text(), ("entailment", "not_entailment")[i % 2]) for i in range(60)]
        csv.writer(file, delimiter="\t").writerows([("sentence1", "sentence2", "label"), *rows])
    return found


def bench_of(folder: Path, cache: Path, pairs: int = 4, steps: int = 2) -> Any:
    from claims_sides import Bench
    from common import Job

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
    return Bench(job, str(cache), steps)


def test_from_the_command_line_to_the_page(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    import claims
    from claims_page import BEGIN, END

    monkeypatch.setattr(claims, "RECORDS", {"CPU": tmp_path / "not-this.json", "GPU": tmp_path / "not-there.json"})
    out, page = tmp_path / "claims.json", tmp_path / "claims.md"
    page.write_text(PAGE.format(begin=BEGIN, end=END))
    names = [name for name in claims.CLAIMS if name != "persistent"]  # whose workers take seconds to start
    sizes = ["--rounds", "1", "--steps", "1", "--pairs", "4", "--orders", "2", "--device", "cpu"]
    files = ["--model", str(folder / "model"), "--data", str(folder), "--out", str(out), "--page", str(page)]
    claims.main([*files, *sizes, "--only", ",".join([*names, "searches"])])

    record, text = json.loads(out.read_text()), page.read_text()
    assert record["hardware"]["cores"] >= 1
    assert len(record["model"]["sha256"]) == 64
    for written in (out.read_text(), text):
        assert str(tmp_path) not in written
        assert str(folder) not in written
    assert set(record["obstacles"]) == {"tf32", "pin", "cudnn"}
    assert [run["claim"] for run in record["runs"]] == [name for name in names if name not in record["obstacles"]]
    for run in record["runs"]:
        found = record["summary"][run["claim"]]
        assert found["times_as_fast"]["by_round"] == [run["without"] / run["with"]]
        assert f"| {found['without']:.3g} / {found['with']:.3g}" in text
    assert text.startswith("# Claims\n\nby hand, above\n\n<!--")
    assert text.endswith("-->\n\nby hand, below\n")
    assert "what was there" not in text
    assert "not measured: TF32 is for CUDA" in text
    assert text.count("not measured yet") == 1 + len(claims.CLAIMS)  # persistent, and the whole column of the GPU
    assert "examples/benchmarks/claims.py --data FOLDER" in text
    assert "torch.compile" in capsys.readouterr().out


def test_sides_take_turns_and_medians_are_compared(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import claims

    asked, seconds = [], {"without": iter((4.0, 9.0, 6.0)), "with": iter((2.0, 3.0, 6.0))}

    def side(name: str) -> Callable[[Any], float]:
        return lambda bench: asked.append(name) or next(seconds[name])

    row = claims.Claim("row", "2x", ("off", "on"), side("without"), side("with"))
    monkeypatch.setattr(claims, "CLAIMS", {"row": row})
    runs = claims.measure(["row"], bench_of(folder, tmp_path), 3)
    assert asked == ["without", "with", "with", "without", "without", "with"]
    found = claims.summarize(runs)["row"]
    assert (found["without"], found["with"]) == (6.0, 3.0)
    assert found["times_as_fast"] == {"of_medians": 2.0, "by_round": [2.0, 3.0, 1.0]}


def test_what_can_t_be_compiled_says_why(folder: Path, tmp_path: Path) -> None:
    import claims
    from claims_sides import try_compiling

    bench = bench_of(folder, tmp_path)
    assert try_compiling(bench) is None
    reason = try_compiling(replace(bench, compile_limit=1e-3), "reduce-overhead")  # another mode: not known yet
    assert "was not compiled within 1 ms" in str(reason)
    failing = claims.Claim("row", "2x", ("off", "on"), lambda b: 1.0, lambda b: 1.0, prepare=lambda b: "no compiler")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(claims, "CLAIMS", {"row": failing})
        assert claims.obstacles(["row"], bench) == {"row": "no compiler"}


def test_mistakes_are_told(folder: Path, tmp_path: Path) -> None:
    import claims
    from claims_page import write_page

    given = ["--model", str(folder / "model"), "--data", str(folder)]
    with pytest.raises(SystemExit, match="there is no claim speed; known: bf16, tf32"):
        claims.parse([*given, "--only", "bf16,speed", "--out", "some.json"])
    with pytest.raises(SystemExit, match="name another --out"):
        claims.parse([*given, "--only", "bf16"])
    (tmp_path / "page.md").write_text("# Claims\n")
    with pytest.raises(SystemExit, match="expected one line '<!-- measured"):
        write_page(tmp_path / "page.md", {}, {})


# ------------------------------------------------------------------ the switches


class Spy(Callback):
    """What a step finds."""

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        self.group = trainer.optimizers[0].param_groups[0]
        self.gradients = [p.grad for p in pl_module.parameters()]
        self.module, self.trainer, self.batch = pl_module, trainer, batch


def spied(bench: Any, **switches: Any) -> Spy:
    from claims_sides import Seconds, fit

    spy = Spy()
    assert fit(bench, Seconds(bench.warmup), [spy], **switches) > 0
    return spy


def test_the_default_side_is_the_product_s_own(folder: Path, tmp_path: Path) -> None:
    spy = spied(bench_of(folder, tmp_path), precision="32-true")
    assert spy.group["fused"] is True
    assert all(gradient is None for gradient in spy.gradients)
    assert spy.module.net.packed
    assert len(spy.batch.micro) == 1
    assert (spy.batch.size, spy.trainer.global_step) == (4, 3)
    assert spy.trainer.precision == "32-true"


def test_switches_switch(folder: Path, tmp_path: Path) -> None:
    from claims_sides import FOREACH, LOOP

    bench = bench_of(folder, tmp_path)
    for flags in (LOOP, FOREACH):
        group = spied(bench, adamw=flags).group
        assert {name: group[name] for name in flags} == flags
    gradients = spied(bench, fill_zeros=True).gradients
    assert all(gradient is not None and not gradient.any() for gradient in gradients)
    assert not spied(bench, attention="padded").module.net.packed
    assert len(spied(bench, batching={"max_tokens": 8}).batch.micro) > 1
    assert spied(bench, precision="bf16-mixed").trainer.precision == "bf16-mixed"


def test_all_implementations_of_the_optimizer_learn_the_same(folder: Path, tmp_path: Path) -> None:
    from claims_sides import FOREACH, LOOP

    bench = bench_of(folder, tmp_path)
    ends = [
        torch.cat([p.detach().flatten() for p in spied(bench, precision="32-true", **switches).module.parameters()])
        for switches in ({}, {"adamw": LOOP}, {"adamw": FOREACH}, {"fill_zeros": True})
    ]
    assert (ends[0] - torch.cat([p.detach().flatten() for p in load(folder).parameters()])).abs().max() > 1e-6
    for end in ends[1:]:
        torch.testing.assert_close(end, ends[0], rtol=0, atol=1e-6)


def load(folder: Path) -> torch.nn.Module:
    from lightning_bge.models.encoder import load_classifier

    return load_classifier(str(folder / "model"), 1)


def test_the_layers_are_compiled_where_they_shall_be(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import claims_sides

    seen: list[Any] = []
    monkeypatch.setattr(claims_sides, "CompileLayers", lambda config: seen.append(found := real(config)) or found)
    from lightning_bge.callbacks.compile.callback import CompileLayers as real

    for policy in ("never", "always"):
        claims_sides.compiled_step(bench_of(folder, tmp_path), policy)
    assert [callback.in_effect for callback in seen] == [False, True]


def test_workers_are_kept_or_not(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import claims_sides

    asked: list[dict[str, Any]] = []
    monkeypatch.setattr(claims_sides, "fit", lambda bench, clock, **switches: asked.append(switches) or 8.0)
    for kept in (False, True):
        assert claims_sides.worker_epoch(bench_of(folder, tmp_path), kept) == 4.0
    assert [one["batching"] for one in asked] == [
        {"num_workers": 1, "persistent_workers": kept} for kept in (False, True)
    ]
    assert all(one["epochs"] == 2 for one in asked)


# ------------------------------------------------------------------ searches


def test_replayed_searches_agree_with_the_table_of_pruners() -> None:
    import claims_hpo

    found = claims_hpo.replay(20, 7)
    table = json.loads((ROOT / "docs" / "benchmarks" / "pruner_replay.json").read_text())["table"]
    rows = {"Hyperband": "hyperband, not between folds", "`promote`": "promote"}
    for name, searches in found.items():
        theirs = next((row for start, row in rows.items() if name.startswith(start)), None)
        for search, values in searches.items():
            assert len(values["whole"]) == len(values["to_reach"]) == 20
            if theirs is not None:
                share = table[f"{search}, 1 report an epoch"][theirs]["in_all"]
                assert median(values["whole"]) == pytest.approx(1 / share, rel=0.1)


def test_fold_pruning_ends_trials_between_folds_alone() -> None:
    import claims_hpo

    from lightning_bge.hpo.forecast.replay import Recording

    search = Recording.load(claims_hpo.CURVES / "trecqa.json").coarser(1)
    fold = search.epochs
    for name, (_, policy) in claims_hpo.PRUNERS.items():
        reports = policy(search)(search, range(len(search.trials)), "order").reports
        assert min(reports) < search.n_reports
        assert all(count % fold == 0 for count in reports) is name.startswith("fold pruning")
