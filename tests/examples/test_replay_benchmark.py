"""The replay of pruners and the recorded searches that it reads, shortened."""

from __future__ import annotations

import csv
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from optuna.pruners import NopPruner

from lightning_bge.hpo.forecast.preview import sample_curves
from lightning_bge.hpo.forecast.recording import Curve, Recording
from lightning_bge.hpo.forecast.replay import Replay, replay_pruned
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from tests.helpers.paths import ROOT

CURVES = ROOT / "docs" / "benchmarks" / "curves"


@pytest.fixture(autouse=True)
def scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "examples" / "benchmarks"))


def test_the_default_reaches_the_best_in_a_quarter_of_the_hours_on_each_recorded_search() -> None:
    import pruner_replay

    paths = sorted(CURVES.glob("*.json"))
    assert [path.stem for path in paths] == ["sample", "sick", "trecqa"]
    for path in paths:
        recording = Recording.load(path).coarser(1)
        assert len(recording.trials) >= 40
        found = pruner_replay.means(pruner_replay.run(recording, pruner_replay.describe(PrunerConfig()), 20, 7))
        assert found["to_reach"] <= 0.25
        assert found["reached"] == 1.0


def test_the_whole_table_on_simulated_curves(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import pruner_replay

    for name, seed in (("one", 0), ("two", 1)):
        recording = sample_curves(20, Steps(2, 3, 2), seed)
        Recording(name, *list(vars(recording).values())[1:7]).save(tmp_path / f"{name}.json")
    few = {name: make for name, make in pruner_replay.contenders().items() if "percentile" not in name}
    monkeypatch.setattr(pruner_replay, "contenders", lambda: few)
    monkeypatch.setattr(
        pruner_replay,
        "configs",
        lambda: [PrunerConfig(), PrunerConfig("median", patience=1), PrunerConfig("hyperband")],
    )

    class Here:
        """In this process: another one would not see what is patched."""

        def __init__(self, jobs: int) -> None:
            self.map = map

        def __enter__(self) -> Here:
            return self

        def __exit__(self, *args: object) -> None:
            pass

    monkeypatch.setattr(pruner_replay, "ProcessPoolExecutor", Here)
    out = tmp_path / "replay.json"
    record = pruner_replay.measure(sorted(tmp_path.glob("*.json")), Namespace(orders=2, seed=0, jobs=1))
    pruner_replay.write_notes(out, record)
    assert set(record["table"]) == {
        f"{name}, {n}" for name in ("one", "two") for n in ("1 report an epoch", "2 reports an epoch")
    }
    for rows in record["table"].values():
        assert rows["unpruned"]["in_all"] == pytest.approx(1.0)
        assert rows["oracle"]["to_reach"] <= rows["unpruned"]["to_reach"]
        assert rows["oracle"]["reached"] == 1.0
    text = out.with_suffix(".md").read_text()
    assert "Chosen with one search left out" in text
    assert "| asha" in text


def by_hand(values: list[list[float]], seconds: float = 1.0, direction: Any = "maximize") -> Recording:
    n = len(values[0])
    trials = tuple(
        Curve(number, {}, row[-1], tuple(row), (seconds,) * n, (0.0,) * n) for number, row in enumerate(values)
    )
    return Recording("hand", direction, 1, n, 1, {}, trials)


def test_figures_of_a_replay_by_hand() -> None:
    from replay_figures import mean_regret, oracle, regret, share_to_reach

    recording = by_hand([[0.5] * 2, [0.992] * 2, [1.0] * 2, [0.2] * 2])
    run = replay_pruned(recording, NopPruner(), [0, 1, 2, 3])
    assert run == Replay(8.0, ((2.0, 0.5), (4.0, 0.992), (6.0, 1.0), (8.0, 0.2)), (2, 2, 2, 2), (0, 1, 2, 3))
    assert share_to_reach(recording, run) == 0.5
    assert share_to_reach(recording, run, within=0.001) == 0.75
    assert [regret(recording, run, at) for at in (1, 2, 4, 9)] == pytest.approx([1.0, 0.5, 0.008, 0.0])
    assert mean_regret(recording, run) == pytest.approx((2 * 1.0 + 2 * 0.5 + 2 * 0.008) / 8)
    known = oracle(recording, [0, 1, 2, 3])
    assert known.steps == (2, 2, 2, 0)
    assert known.seconds == 6.0
    nothing = Replay(1.0, (), (1,), (0,))
    assert share_to_reach(recording, nothing) is None
    assert mean_regret(recording, nothing) == 1.0


@pytest.mark.parametrize("direction", ["maximize", "minimize"])
def test_the_mean_regret_is_the_integral_of_the_regret(direction: Any) -> None:
    from replay_figures import mean_regret, regret

    values = np.random.default_rng(0).uniform(0.5, 1.5, (12, 3)).tolist()
    recording = by_hand(values, 2.0, direction)
    run = replay_pruned(recording, NopPruner(), list(range(12)))
    at = (np.arange(7200) + 0.5) / 100
    assert mean_regret(recording, run) == pytest.approx(np.mean([regret(recording, run, x) for x in at]))


def test_rows_of_the_recorded_searches_are_drawn_with_a_fixed_seed(tmp_path: Path) -> None:
    import record_searches

    with (tmp_path / "trec.csv").open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["qtext", "label", "atext"])
        writer.writerows([f"q{n // 10}", int(n % 10 < 3), f"a{n}"] for n in range(40))
    drawn = []
    for target in (tmp_path / "one.csv", tmp_path / "two.csv"):
        record_searches.trecqa_rows(tmp_path / "trec.csv", target)
        with target.open(newline="") as file:
            drawn.append(list(csv.DictReader(file)))
    assert drawn[0] == drawn[1]
    assert len(drawn[0]) == 4 * 4  # 4 rows a question, 2 of them answers
    assert sum(row["label"] == "1" for row in drawn[0]) == 4 * 2
    (tmp_path / "sick.tsv").write_text("\n".join(["head", *(f"row {n}" for n in range(30))]) + "\n")
    record_searches.sick_rows(tmp_path / "sick.tsv", tmp_path / "few.tsv", 10)
    lines = (tmp_path / "few.tsv").read_text().splitlines()
    assert lines[0] == "head"
    assert len(lines) == 11
