"""An Optuna user's script, with its pruning callback swapped for ours: the same values, and the seconds of each.

    python examples/benchmarks/optuna_script.py                # 3 rounds in turns; writes docs/benchmarks
    python examples/benchmarks/optuna_script.py --rounds 1 --trials 6 --out /tmp/replay.json

The script is what Optuna's documentation shows, with folds: a study, an objective, a plain LightningModule, and
`PyTorchLightningPruningCallback` in the trainer of each fold. Optuna takes the first report of a step only, so that its
pruner sees the first fold alone. The other script has `FoldPruningCallback` in its place, whose steps run on over the
folds, and one argument more. Sampler, seeds, pruner, folds and epochs are the same.

Each complete trial must have the same value in both: a callback that prunes changes nothing of what is trained.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from pathlib import Path
from typing import Any

import lightning as L
import optuna
import torch
from common import REPOSITORY, git_commit, hardware, markdown_table, versions
from optuna.trial import TrialState
from optuna_integration import PyTorchLightningPruningCallback
from sklearn.datasets import load_digits
from sklearn.model_selection import KFold
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bge.hpo.pruning.callback import FoldPruningCallback
from lightning_bge.runtime.run_folder import write_json, write_text

DOCS = REPOSITORY / "docs" / "benchmarks"
FOLDS, EPOCHS = 5, 6
QUIET: dict[str, Any] = {
    **dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False),
    "accelerator": "cpu",
    "num_sanity_val_steps": 0,
}


class Digits(L.LightningModule):
    """A small network for the digits of scikit-learn."""

    def __init__(self, width: int, lr: float, dropout: float) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Linear(64, width), nn.ReLU(), nn.Dropout(dropout), nn.Linear(width, 10))
        self.lr = lr

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_acc", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.lr)


def loaders(fold: int) -> tuple[DataLoader[Any], DataLoader[Any]]:
    """Training and validation rows of a fold."""
    rows, labels = load_digits(return_X_y=True)
    data = TensorDataset(torch.tensor(rows, dtype=torch.float32) / 16, torch.tensor(labels))
    train, val = list(KFold(FOLDS, shuffle=True, random_state=0).split(rows))[fold]
    return DataLoader(TensorDataset(*data[train]), 32, shuffle=True), DataLoader(TensorDataset(*data[val]), len(val))


def module_of(trial: optuna.Trial, fold: int) -> Digits:
    """The module of a fold of a trial."""
    params = {
        "width": trial.suggest_int("width", 8, 256, log=True),
        "lr": trial.suggest_float("lr", 1e-5, 1e-1, log=True),
        "dropout": trial.suggest_float("dropout", 0.0, 0.6),
    }
    L.seed_everything(fold, verbose=False)
    return Digits(**params)


def with_optunas(trial: optuna.Trial) -> float:
    """The objective as an Optuna user writes it."""
    scores = []
    for fold in range(FOLDS):
        module = module_of(trial, fold)
        callback = PyTorchLightningPruningCallback(trial, monitor="val_acc")
        trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[callback], **QUIET)
        trainer.fit(module, *loaders(fold))
        scores.append(trainer.callback_metrics["val_acc"].item())
    return sum(scores) / FOLDS


def with_ours(trial: optuna.Trial) -> float:
    """The same objective with the callback swapped."""
    scores: list[float] = []
    for fold in range(FOLDS):
        module = module_of(trial, fold)
        callback = FoldPruningCallback(
            trial, "val_acc", fold=fold, folds=FOLDS, epochs=EPOCHS, earlier=scores, objective="last"
        )
        trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[callback], **QUIET)
        trainer.fit(module, *loaders(fold))
        scores.append(callback.close_fold())
    return sum(scores) / FOLDS


OBJECTIVES = {"PyTorchLightningPruningCallback": with_optunas, "FoldPruningCallback": with_ours}


def measure(name: str, trials: int) -> dict[str, Any]:
    """Run a study; its seconds, and its trials."""
    study = optuna.create_study(
        direction="maximize",
        sampler=optuna.samplers.RandomSampler(seed=0),
        pruner=optuna.pruners.MedianPruner(n_startup_trials=5),
    )
    since = time.perf_counter()
    study.optimize(OBJECTIVES[name], n_trials=trials)
    seconds = time.perf_counter() - since
    complete = {trial.number: trial.value for trial in study.trials if trial.state == TrialState.COMPLETE}
    return {
        "seconds": round(seconds, 2),
        "best": study.best_value,
        "complete": complete,
        "epochs": sum(len(trial.intermediate_values) for trial in study.trials),
        "pruned": sum(trial.state == TrialState.PRUNED for trial in study.trials),
    }


def note(result: dict[str, Any]) -> str:
    """The record as a text."""
    rows = []
    for name, found in result["runs"].items():
        seconds = [one["seconds"] for one in found]
        first = found[0]
        rows.append(
            [
                f"`{name}`",
                f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})",
                first["pruned"],
                len(first["complete"]),
                f"{first['best']:.4f}",
            ]
        )
    head = ["callback", "seconds: median (lowest to highest)", "pruned", "complete", "best value"]
    ratios, options = result["ratios"], result["options"]
    part = f"{statistics.median(ratios):.2f} (median of the rounds; {min(ratios):.2f} to {max(ratios):.2f})"
    return f"""\
# An Optuna user's script with our pruning callback

{result["hardware"]["cpu"]}, one thread, {options["rounds"]} rounds in turns, {options["trials"]} trials, {FOLDS} folds
of {EPOCHS} epochs, `MedianPruner(n_startup_trials=5)`, `RandomSampler`; a network of two layers on the digits of
scikit-learn. The scripts differ in the callback alone.

{markdown_table(head, rows)}

Seconds with ours, as a part of those with Optuna's: {part}. The {result["common"]} trials that are complete in both
have the same values, bit for bit, and the best trial is the same. Optuna's pruner sees the first fold alone, as a step
is reported once; ours sees all of them.

Written by `examples/benchmarks/optuna_script.py`.
"""


def main() -> None:
    """Measure in turns, compare the values, and write the record."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--trials", type=int, default=40)
    parser.add_argument("--out", type=Path, default=DOCS / "optuna_script.json")
    chosen = parser.parse_args()
    torch.set_num_threads(1)
    optuna.logging.set_verbosity(optuna.logging.ERROR)
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")  # of workers of loaders, and of steps that Optuna has a report of already
    runs: dict[str, list[dict[str, Any]]] = {name: [] for name in OBJECTIVES}
    for _ in range(chosen.rounds):
        for name, found in runs.items():
            found.append(measure(name, chosen.trials))
            print(name, {key: value for key, value in found[-1].items() if key != "complete"}, flush=True)
    theirs, ours = runs.values()
    common = theirs[0]["complete"].keys() & ours[0]["complete"].keys()
    different = [number for number in common if theirs[0]["complete"][number] != ours[0]["complete"][number]]
    if different or theirs[0]["best"] != ours[0]["best"]:
        raise SystemExit(f"values differ in the trials {different}, best {theirs[0]['best']} and {ours[0]['best']}")
    result = {
        **{"hardware": hardware(), "versions": versions(), "commit": git_commit()},
        "options": {"rounds": chosen.rounds, "trials": chosen.trials},
        "runs": runs,
        "common": len(common),
        "ratios": [own["seconds"] / other["seconds"] for own, other in zip(ours, theirs, strict=True)],
    }
    write_json(chosen.out, result)
    write_text(chosen.out.with_suffix(".md"), note(result))


if __name__ == "__main__":
    main()
