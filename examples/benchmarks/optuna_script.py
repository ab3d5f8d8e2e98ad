"""An Optuna user's script, with its pruning callback swapped for ours: the same values, and the seconds of each.

    python examples/benchmarks/optuna_script.py                # 3 rounds in turns; writes docs/benchmarks
    python examples/benchmarks/optuna_script.py --rounds 1 --trials 6 --out /tmp/replay.json

The script is what Optuna's documentation shows, with folds: a study, an objective, a plain LightningModule, and
`PyTorchLightningPruningCallback` in the trainer of each fold. Optuna takes the first report of a step only, so that its
pruner sees the first fold alone. The other script has `FoldPruningCallback` in its place, whose steps run on over the
folds, and one argument more. Sampler, seeds, pruner, folds and epochs are the same.

Each complete trial must have the same value in both: a callback that prunes changes nothing of what is trained. What
is saved depends on the pruner: one that compares values at the first epochs stops the same trials with both callbacks,
one that asks for more from those that were trained longer goes on asking in later folds with ours alone.
"""

from __future__ import annotations

import argparse
import logging
import statistics
import time
import warnings
from collections.abc import Callable
from functools import partial
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
        trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[callback, Epochs()], **QUIET)
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
        trainer = L.Trainer(max_epochs=EPOCHS, callbacks=[callback, Epochs()], **QUIET)
        trainer.fit(module, *loaders(fold))
        scores.append(callback.close_fold())
    return sum(scores) / FOLDS


OBJECTIVES = {"PyTorchLightningPruningCallback": with_optunas, "FoldPruningCallback": with_ours}
PRUNERS: dict[str, Callable[[], optuna.pruners.BasePruner]] = {
    "MedianPruner": partial(optuna.pruners.MedianPruner, n_startup_trials=5),
    "PercentilePruner": partial(optuna.pruners.PercentilePruner, 25.0, n_startup_trials=5),
    "SuccessiveHalvingPruner": optuna.pruners.SuccessiveHalvingPruner,
}


class Epochs(L.Callback):
    """Counts the epochs that are trained."""

    trained = 0

    def on_train_epoch_end(self, *_: Any) -> None:
        Epochs.trained += 1


def measure(pruner: str, name: str, trials: int) -> dict[str, Any]:
    """Run a study; its seconds, and its trials."""
    study = optuna.create_study(
        direction="maximize", sampler=optuna.samplers.RandomSampler(seed=0), pruner=PRUNERS[pruner]()
    )
    Epochs.trained, since = 0, time.perf_counter()
    study.optimize(OBJECTIVES[name], n_trials=trials)
    seconds = time.perf_counter() - since
    complete = {trial.number: trial.value for trial in study.trials if trial.state == TrialState.COMPLETE}
    return {
        "seconds": round(seconds, 2),
        "best": study.best_value,
        "complete": complete,
        "epochs": Epochs.trained,
        "pruned": sum(trial.state == TrialState.PRUNED for trial in study.trials),
    }


def compared(runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """The runs of both callbacks with a pruner, and the seconds of ours as a part of the other's."""
    theirs, ours = runs.values()
    common = theirs[0]["complete"].keys() & ours[0]["complete"].keys()
    different = [number for number in common if theirs[0]["complete"][number] != ours[0]["complete"][number]]
    if different:
        raise SystemExit(f"values differ in the trials {different}")
    ratios = [own["seconds"] / other["seconds"] for own, other in zip(ours, theirs, strict=True)]
    return {"runs": runs, "common": len(common), "ratios": ratios}


def note(result: dict[str, Any]) -> str:
    """The record as a text."""
    rows = []
    for pruner, found in result["pruners"].items():
        for name, runs in found["runs"].items():
            seconds, first = [one["seconds"] for one in runs], runs[0]
            part = "" if name != "FoldPruningCallback" else f"{statistics.median(found['ratios']):.2f}"
            times = f"{statistics.median(seconds):.1f} ({min(seconds):.1f} to {max(seconds):.1f})"
            state = [first["epochs"], first["pruned"], len(first["complete"]), f"{first['best']:.4f}"]
            rows.append([f"`{pruner}`", f"`{name}`", times, part, *state])
    head = ["pruner", "callback", "seconds: median (lowest to highest)", "part", "epochs", "pruned", "complete", "best"]
    options = result["options"]
    common = ", ".join(str(found["common"]) for found in result["pruners"].values())
    return f"""\
# An Optuna user's script with our pruning callback

{result["hardware"]["cpu"]}, one thread, {options["rounds"]} rounds in turns, {options["trials"]} trials, {FOLDS} folds
of {EPOCHS} epochs, `RandomSampler`; a network of two layers on the digits of scikit-learn. The scripts differ in the
callback alone.

{markdown_table(head, rows)}

`part`: seconds with ours, as a part of those with Optuna's (median of the rounds). The trials that are complete in
both ({common}) have the same values, bit for bit. Optuna's pruner sees the first fold alone, as a step is reported
once; ours sees all of them, so that what is saved depends on whether the pruner decides after the first fold at all.

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
    runs: dict[str, dict[str, list[Any]]] = {pruner: {name: [] for name in OBJECTIVES} for pruner in PRUNERS}
    for _ in range(chosen.rounds):
        for pruner, by_name in runs.items():
            for name, found in by_name.items():
                found.append(measure(pruner, name, chosen.trials))
                shown = {key: value for key, value in found[-1].items() if key != "complete"}
                print(pruner, name, shown, flush=True)
    result = {
        **{"hardware": hardware(), "versions": versions(), "commit": git_commit()},
        "options": {"rounds": chosen.rounds, "trials": chosen.trials},
        "pruners": {pruner: compared(by_name) for pruner, by_name in runs.items()},
    }
    write_json(chosen.out, result)
    write_text(chosen.out.with_suffix(".md"), note(result))


if __name__ == "__main__":
    main()
