"""Modules that others wrote, unmodified, through `hpo`, `plan`, `audit`, `fit` and each callback.

    python examples/benchmarks/other_projects.py
    python examples/benchmarks/other_projects.py gluonts_deepar --trials 4 --epochs 3 --out found.json

Each project in `examples/projects` is a YAML file with a data module, or a function that builds module and data. A
study has eight trials, which are paused or pruned. It needs the packages of `examples/projects/requirements.txt`, in an
environment of their own beside that of this project: `make .venv-projects/.slow`.
"""

from __future__ import annotations

import argparse
import importlib
import json
import sys
import tempfile
import traceback
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path
from typing import Any

import optuna
import yaml
from jsonargparse import ArgumentParser
from lightning.pytorch import Callback, LightningDataModule, LightningModule

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT))  # an environment that sees the packages of another one does not see this project

from common import git_commit, hardware, markdown_table  # noqa: E402

from lightning_bge import audit, plan, tune  # noqa: E402
from lightning_bge.callbacks import (  # noqa: E402
    CompileConfig,
    CompileLayers,
    MemoryConfig,
    MicroBatchFinder,
    Throughput,
    TorchBackends,
    TrainMode,
)
from lightning_bge.cli.main import main as lightning_bge  # noqa: E402
from lightning_bge.hpo import FoldPruningCallback, OOMPruningCallback, prune_out_of_memory  # noqa: E402
from lightning_bge.runtime.compat.lightning import trainer_class  # noqa: E402
from lightning_bge.runtime.run_folder import write_json, write_text  # noqa: E402

HERE, DOCS = ROOT / "examples" / "projects", ROOT / "docs" / "benchmarks"
PACKAGES = {
    "pytorch_forecasting_nhits": ("pytorch-forecasting", "NHiTS"),
    "neuralforecast_nhits": ("neuralforecast", "NHITS"),
    "gluonts_deepar": ("gluonts", "DeepAR"),
    "chemprop_mpnn": ("chemprop", "MPNN"),
}
Built = tuple[Any, Any]


class Project:
    """A project: its module and data, and its study.

    Args:
        name: of the file in `examples/projects`.
    """

    def __init__(self, name: str) -> None:
        self.name, self.yaml = name, HERE / f"{name}.yaml"
        self.code = importlib.import_module(f"examples.projects.{name}")
        self.is_yaml = self.yaml.is_file()
        self.config = yaml.safe_load(self.yaml.read_text()) if self.is_yaml else {}
        self.metric = self.config["monitor"]["metric"] if self.is_yaml else self.code.OPTIONS["metric"]

    def objects(self) -> Built:
        """Its module and data module, with the first parameters."""
        if not self.is_yaml:
            return self.code.build({name: first(values) for name, values in self.code.SPACE.items()})  # type: ignore[no-any-return]
        parser = ArgumentParser()
        parser.add_subclass_arguments(LightningModule, "model")
        parser.add_subclass_arguments(LightningDataModule, "data")
        made = parser.instantiate_classes(parser.parse_object({name: self.config[name] for name in ("model", "data")}))
        return made.model, made.data

    def study(self, run_dir: Path, trials: int, epochs: int) -> dict[str, Any]:
        """The summary of a study."""
        if self.is_yaml:
            self.command("hpo", run_dir, "--hpo.n_trials", trials, "--trainer.max_epochs", epochs)
        else:
            trainer = {"accelerator": "cpu"}
            tune(
                *(self.code.build, self.code.SPACE),
                run_dir=run_dir,
                n_trials=trials,
                max_epochs=epochs,
                trainer=trainer,
                **self.code.OPTIONS,
            )
        found: dict[str, Any] = json.loads((run_dir / "summary.json").read_text())
        assert found["n_failed"] == 0, f"{found['n_failed']} trials have failed"
        assert (run_dir / "report.html").is_file(), "no report"
        return {name: found[name] for name in ("n_trials", "n_complete", "n_pruned", "best_value")}

    def hours(self, run_dir: Path, trials: int, epochs: int) -> dict[str, Any]:
        """The plan of that study."""
        if self.is_yaml:
            out = run_dir.with_suffix(".json")
            options = ("--hpo.n_trials", trials, "--trainer.max_epochs", epochs, "--seconds", 20, "--json", out)
            self.command("plan", run_dir, *options)
            found = json.loads(out.read_text())
        else:
            made = plan(
                *(self.code.build, self.code.SPACE),
                n_trials=trials,
                max_epochs=epochs,
                trainer={"accelerator": "cpu"},
                config={"seconds": 20},
                **self.code.OPTIONS,
            )
            found = made.as_dict()
        assert found["prediction"]["mid"] > 0
        return {"seconds": round(found["prediction"]["mid"], 1), "parameter_sets": len(found["calibration"]["trials"])}

    def audited(self, run_dir: Path) -> dict[str, Any]:
        """What an audit finds."""
        if self.is_yaml:
            self.command("audit", run_dir)
            found = json.loads((run_dir / "audit.json").read_text())
        else:
            found = audit(*self.objects(), {"accelerator": "cpu"}).as_dict()
        return {"rows": len(found["rows"]), "next": found["next"]}

    def trained(self, run_dir: Path) -> str:
        """Train once with `fit`, where the project has a YAML file."""
        if not self.is_yaml:
            return "by its class path alone"
        self.command("fit", run_dir, "--trainer.max_epochs", 2)
        return "works"

    def command(self, name: str, run_dir: Path, *options: Any) -> None:
        """Run a command of the command line."""
        given = [name, "-c", str(self.yaml), "--run_dir", str(run_dir), *map(str, options)]
        if name == "fit":
            given[2] = str(self._without_study(run_dir))
        try:
            lightning_bge(given)
        except SystemExit as stop:
            if stop.code:
                raise RuntimeError(f"lightning-bge {name} ended with {stop.code}") from stop

    def _without_study(self, run_dir: Path) -> Path:
        path = run_dir.with_suffix(".yaml")
        path.write_text(yaml.safe_dump({key: value for key, value in self.config.items() if key != "hpo"}))
        return path


def first(values: dict[str, Any]) -> Any:
    """The first value of a part of a search space."""
    return values["choices"][0] if "choices" in values else values["low"]


def callbacks_of(project: Project) -> dict[str, str]:
    """Each callback in a training of its own: `works`, or what went wrong."""

    def fit(*callbacks: Any, epochs: int = 2) -> Built:
        module, data = project.objects()
        silent = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
        trainer = trainer_class(module)(max_epochs=epochs, accelerator="cpu", callbacks=list(callbacks), **silent)
        trainer.fit(module, datamodule=data)
        return trainer, module

    def throughput() -> None:
        trainer, _ = fit(Throughput())
        assert "train_data_wait" in trainer.callback_metrics, "nothing is logged"

    def finder() -> None:
        found = MicroBatchFinder(MemoryConfig(limit_gb=4, cache=None))
        fit(found)
        assert found.reason

    def compiled() -> None:
        found = CompileLayers(CompileConfig("auto"))
        fit(found)
        assert found.reason

    def pruned() -> None:
        def objective(trial: optuna.Trial) -> float:
            report = FoldPruningCallback(trial, project.metric)
            trainer, _ = fit(report, epochs=3)
            return float(trainer.callback_metrics[project.metric])

        study = optuna.create_study(pruner=PruneSecond())
        study.optimize(objective, n_trials=2)
        assert [trial.state.name for trial in study.trials] == ["COMPLETE", "PRUNED"]
        assert len(study.trials[0].intermediate_values) == 3

    def out_of_memory() -> None:
        def objective(trial: optuna.Trial) -> float:
            with prune_out_of_memory(trial):
                trainer, _ = fit(OOMPruningCallback(trial), *([] if trial.number else [RunsOut()]))
                return float(trainer.callback_metrics[project.metric])

        study = optuna.create_study()
        study.optimize(objective, n_trials=2)
        assert [trial.state.name for trial in study.trials] == ["PRUNED", "COMPLETE"]

    kinds: dict[str, Callable[[], Any]] = {
        "FoldPruningCallback": pruned,
        "OOMPruningCallback": out_of_memory,
        "MicroBatchFinder": finder,
        "CompileLayers": compiled,
        "TorchBackends": lambda: fit(TorchBackends()),
        "Throughput": throughput,
        "TrainMode": lambda: fit(TrainMode()),
    }
    return {name: outcome(run) for name, run in kinds.items()}


class PruneSecond(optuna.pruners.BasePruner):
    """Prunes each trial but the first one, at its second report."""

    def prune(self, study: optuna.Study, trial: optuna.trial.FrozenTrial) -> bool:
        """Return whether to stop the trial."""
        return trial.number > 0 and len(trial.intermediate_values) > 1


class RunsOut(Callback):
    """Memory runs out in the first batch."""

    def on_train_batch_start(self, *_: Any) -> None:
        raise MemoryError("can't allocate memory")


def outcome(run: Callable[[], Any]) -> Any:
    """What a function returns, `works` for nothing, or the last line of its error."""
    try:
        found = run()
    except Exception as error:
        traceback.print_exc()
        return f"{type(error).__name__}: {' '.join(str(error).split())[:300]}"
    return "works" if found is None or isinstance(found, tuple) else found


def run_project(name: str, trials: int, epochs: int, place: Path) -> dict[str, Any]:
    """All that a project goes through."""
    project, folder = Project(name), place / name
    folder.mkdir()
    package, module = PACKAGES[name]
    found: dict[str, Any] = {"package": f"{package} {version(package)}", "module": module}
    steps: dict[str, Callable[[], Any]] = {
        "hpo": lambda: project.study(folder / "study", trials, epochs),
        "plan": lambda: project.hours(folder / "plan", trials, epochs),
        "audit": lambda: project.audited(folder / "audit"),
        "fit": lambda: project.trained(folder / "fit"),
        "callbacks": lambda: callbacks_of(project),
    }
    for step, run in steps.items():
        print(f"=== {name}: {step}", flush=True)
        found[step] = outcome(run)
    return found


def table(projects: dict[str, dict[str, Any]]) -> str:
    """A row for each project."""
    return markdown_table(["project", "`hpo`", "`plan`", "`audit`", "`fit`", "callbacks"], map(row, projects.values()))


def row(found: dict[str, Any]) -> list[str]:
    """What a project's row shows: figures, or errors."""
    study, hours, audited, callbacks = (found[name] for name in ("hpo", "plan", "audit", "callbacks"))
    if isinstance(study, dict):
        study = f"{study['n_trials']} trials: {study['n_complete']} complete, {study['n_pruned']} pruned"
    if isinstance(hours, dict):
        hours = f"{hours['seconds']} s, from {hours['parameter_sets']} parameter sets"
    if isinstance(audited, dict):
        audited = f"{audited['rows']} rows. {audited['next']}"
    if isinstance(callbacks, dict):
        wrong = [f"{name}: {text}" for name, text in callbacks.items() if text != "works"]
        callbacks = "; ".join(wrong) or f"all {len(callbacks)} work"
    return [f"{found['module']}, {found['package']}", study, hours, audited, found["fit"], callbacks]


def note(result: dict[str, Any]) -> str:
    """The note beside the JSON."""
    machine = result["hardware"]
    return f"""# Modules of other projects

{machine["cores"]} cores of an {machine["cpu"]} ({", ".join(machine["cpu_units"])}). `other_projects.py`,
[JSON](other_projects.json). The sources of the modules are unmodified; what was added is in
[examples/projects](../../examples/projects): a YAML file with a data module, or a function, of at most 30 lines.
Studies of {result["options"]["trials"]} trials with at most {result["options"]["epochs"]} epochs, which asha pauses.
The callbacks are {", ".join(next(iter(result["projects"].values()))["callbacks"])}, each in a training of its own.

{table(result["projects"])}"""


def main() -> None:
    """Run projects, print, and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("projects", nargs="*", metavar="PROJECT", default=list(PACKAGES), help=", ".join(PACKAGES))
    parser.add_argument("--trials", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=6)
    parser.add_argument("--out", type=Path, default=DOCS / "other_projects.json")
    chosen = parser.parse_args()
    warnings.simplefilter("ignore")  # of the packages
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    options = {"trials": chosen.trials, "epochs": chosen.epochs}
    result: dict[str, Any] = {"hardware": hardware(), "commit": git_commit(), "options": options, "projects": {}}
    with tempfile.TemporaryDirectory() as place:
        for name in chosen.projects or PACKAGES:
            result["projects"][name] = run_project(name, chosen.trials, chosen.epochs, Path(place))
    print(table(result["projects"]))
    write_json(chosen.out, result)
    write_text(chosen.out.with_suffix(".md"), note(result))


if __name__ == "__main__":
    main()
