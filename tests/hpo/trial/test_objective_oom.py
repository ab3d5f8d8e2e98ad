"""Memory runs out at every place of a trial, in every form: no study ends of it, and nothing else is swallowed."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import optuna
import pytest
import torch
from optuna.trial import TrialState
from torch._dynamo.exc import BackendCompilerFailed

from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.data.batches.micro_batches import EncodedDataset
from lightning_bge.data.tables.splits import SplitConfig
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.scheduling.trial_loop import MemoryKeptError
from lightning_bge.hpo.space.draw import SamplerConfig
from lightning_bge.hpo.space.search_space import parse_space
from lightning_bge.hpo.steps import Steps
from lightning_bge.hpo.trial.objective import Objective, TrialFiles
from lightning_bge.hpo.trial.text_setup import TextTrialSetup
from lightning_bge.hpo.trials import ERROR
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.metrics.config import MonitorConfig
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.memory import live_bytes
from lightning_bge.trainer import quiet_trainer
from tests.helpers.small_models import small_model
from tests.helpers.small_search import small_data, write_files
from tests.helpers.study_run import run_study

SPACE = {"lr": {"low": 1e-4, "high": 1e-2, "log": True}}
CUDA = "CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 15 GiB of which 1.00 GiB is free."
ERRORS: dict[str, Callable[[], Exception]] = {
    "OutOfMemoryError": lambda: torch.OutOfMemoryError(CUDA),
    "AcceleratorError": lambda: torch.AcceleratorError("CUDA error: out of memory"),
    "MemoryError": MemoryError,
    "cuBLAS": lambda: RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    "compiler": lambda: BackendCompilerFailed(lambda: None, torch.OutOfMemoryError(CUDA), None),
}
# torch.compile looks at the gradients of what is no leaf
pytestmark = pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
PLACES = ("forward", "backward", "optimizer", "validation", "data", "compile")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_files(tmp_path_factory.mktemp("oom"), dropout=0.0)


EAGER = CompileConfig("never")


def search(folder: Path, compiling: CompileConfig = EAGER, trials: int = 3) -> optuna.Study:
    def build(params: dict[str, Any]) -> TextTrialSetup:
        data = small_data(folder, split=SplitConfig(folds=2))
        data.setup("fit")
        model = BGEClassifier(str(folder / "model"), optimizer=OptimizerConfig(lr=params["lr"]))
        settings = {"max_epochs": 2, "precision": "32-true", "accelerator": "cpu"}
        return TextTrialSetup(model, data, lambda **more: quiet_trainer(settings, **more), dict)

    objective = Objective(
        build=build,
        space=parse_space(SPACE),
        monitor=MonitorConfig(metric="loss"),
        steps=Steps(2, 2),
        files=TrialFiles(folder / "oof"),
        n_trials=trials,
        compile=compiling,
    )
    study = optuna.create_study(direction="minimize", study_name="s")
    config = StudyConfig(n_trials=trials, space=SPACE, sampler=SamplerConfig("random", seed=1))
    run_study(study, objective, config, folder)
    return study


class Fault:
    """Raises from the `first` call of a trial on, `times` times."""

    def __init__(self, make: Callable[[], Exception], times: int, first: int = 3, trial: int = 1) -> None:
        self.make, self.left, self.first, self.trial = make, times, first, trial
        self.calls = 0
        self.armed = False

    def __call__(self) -> None:
        if self.armed:
            self.calls += 1
            if self.calls >= self.first and self.left:
                self.left -= 1
                raise self.make()


def inject(monkeypatch: pytest.MonkeyPatch, place: str, fault: Fault) -> CompileConfig:
    """Arm `fault` for its trial, at one place of the program as it is."""
    run = Objective._run

    def armed(self: Objective, trial: optuna.Trial, params: dict[str, Any]) -> float:
        fault.armed = trial.number == fault.trial
        return run(self, trial, params)

    monkeypatch.setattr(Objective, "_run", armed)

    def before(owner: type, name: str, when: Callable[[], bool] = lambda: True) -> None:
        original = getattr(owner, name)

        def wrapped(*args: Any, **kwargs: Any) -> Any:
            if when():
                fault()
            return original(*args, **kwargs)

        monkeypatch.setattr(owner, name, wrapped)

    if place == "forward":
        before(TextClassifier, "forward", torch.is_grad_enabled)
    elif place == "validation":
        before(TextClassifier, "forward", lambda: not torch.is_grad_enabled())
    elif place == "backward":
        before(BGEClassifier, "manual_backward")
    elif place == "optimizer":
        before(torch.optim.AdamW, "step")
    elif place == "data":
        before(EncodedDataset, "__getitem__")
    else:
        fault.first, fault.trial = 1, 0  # later trials would find the layers compiled

        def backend(graph: torch.fx.GraphModule, _: Any) -> Callable[..., Any]:
            fault()
            return graph.forward

        monkeypatch.setitem(torch._dynamo.backends.registry._COMPILER_FNS, "faulty", backend)
        monkeypatch.setitem(torch._dynamo.backends.registry._BACKENDS, "faulty", None)
        return CompileConfig("always", backend="faulty")
    return EAGER


@pytest.fixture(autouse=True)
def nothing_compiled() -> Iterator[None]:
    yield
    torch._dynamo.reset()


@pytest.fixture(scope="module")
def undisturbed(folder: Path) -> optuna.Study:
    return search(folder)


@pytest.mark.parametrize("place", PLACES[:4])
@pytest.mark.parametrize("kind", ERRORS)
def test_once_and_the_trial_goes_on_as_if_nothing_had_been(
    folder: Path, undisturbed: optuna.Study, monkeypatch: pytest.MonkeyPatch, place: str, kind: str
) -> None:
    fault = Fault(ERRORS[kind], times=1)
    study = search(folder, inject(monkeypatch, place, fault))
    assert fault.left == 0
    for trial, expected in zip(study.trials, undisturbed.trials, strict=True):
        assert trial.state == TrialState.COMPLETE
        for step, value in expected.intermediate_values.items():
            assert trial.intermediate_values[step] == pytest.approx(value, rel=1e-5)


@pytest.mark.parametrize("place", PLACES)
@pytest.mark.parametrize("kind", ERRORS)
def test_always_and_the_trial_is_pruned(folder: Path, monkeypatch: pytest.MonkeyPatch, place: str, kind: str) -> None:
    fault = Fault(ERRORS[kind], times=10**6)
    study = search(folder, inject(monkeypatch, place, fault), trials=fault.trial + 2)
    for trial in study.trials:
        assert trial.state == (TrialState.PRUNED if trial.number == fault.trial else TrialState.COMPLETE)
    attributes = study.trials[fault.trial].user_attrs
    assert attributes["oom_where"] in (("forward", "validation") if place == "compile" else (place,))
    if kind in ("OutOfMemoryError", "compiler"):
        assert (attributes["oom_requested"], attributes["oom_free"]) == (2 * 2**30, 2**30)
    assert "memory_kept" not in attributes


@pytest.mark.parametrize("place", PLACES)
def test_other_errors_end_the_trial_with_their_text_and_the_study_goes_on(
    folder: Path, monkeypatch: pytest.MonkeyPatch, place: str
) -> None:
    fault = Fault(lambda: RuntimeError("shape mismatch"), times=1)
    study = search(folder, inject(monkeypatch, place, fault))
    [failed] = [trial for trial in study.trials if trial.state == TrialState.FAIL]
    assert failed.number == fault.trial
    kind, says = ("BackendCompilerFailed", "") if place == "compile" else ("RuntimeError", "shape mismatch")
    assert failed.user_attrs[ERROR].startswith(f"{kind}: ")
    assert says in failed.user_attrs[ERROR]  # its first line
    assert [trial.state for trial in study.trials].count(TrialState.COMPLETE) == 3
    text = (folder / "failures" / f"s-trial-{fault.trial}.txt").read_text()
    assert "Traceback" in text
    assert "shape mismatch" in text


def test_live_bytes_are_as_before(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    held: list[int] = []
    call = Objective.__call__

    def watched(self: Objective, trial: optuna.Trial) -> float:
        before = live_bytes() - self.encoder.nbytes
        try:
            return call(self, trial)
        finally:
            held.append(live_bytes() - self.encoder.nbytes - before)

    monkeypatch.setattr(Objective, "__call__", watched)
    search(folder, inject(monkeypatch, "backward", Fault(ERRORS["MemoryError"], times=10**6)))
    assert held[1] == 0


def test_memory_that_is_kept_ends_the_process_but_not_the_study(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    leaked = []

    def leak() -> Exception:
        leaked.append(torch.ones(2**20))
        return MemoryError()

    inject(monkeypatch, "forward", Fault(leak, times=10**6))
    with pytest.raises(MemoryKeptError, match=r"trial 1 ran out of memory, and .* MiB of what it took are still held"):
        search(folder)


def test_an_encoder_read_in_the_failed_trial_is_dropped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    gc.unfreeze()  # as the search does at its end: `live_bytes` sees what is not frozen
    before = live_bytes()
    inject(monkeypatch, "forward", Fault(ERRORS["MemoryError"], times=10**6, trial=0))
    found: list[Objective] = []
    run = Objective._run

    def seen(self: Objective, trial: optuna.Trial, params: dict[str, Any]) -> float:
        found.append(self)
        return run(self, trial, params)

    monkeypatch.setattr(Objective, "_run", seen)
    search(folder, trials=1)
    assert found[0].encoder.loads == 1
    assert found[0].encoder.nbytes == 0
    assert live_bytes() - before <= 2**16


@pytest.mark.parametrize("name", ["a", "b", "c"])  # in use, waiting, read in the trial
def test_no_encoder_waits_after_a_trial_that_ran_out_of_memory(
    folder: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    paths = {}
    for number, each in enumerate("abc"):
        paths[each] = str(folder / each)
        small_model("bert", outputs=1, seed=number).save_pretrained(paths[each])
    warm = EncoderCache(2**30)
    for each in ("b", "a"):
        warm.load(paths[each], 1)
    used = warm.nbytes - warm._entries[0].nbytes

    def fail(self: Objective, trial: optuna.Trial, params: dict[str, Any]) -> float:
        warm.load(paths[name], 1)
        raise MemoryError

    monkeypatch.setattr(Objective, "_run", fail)
    objective = Objective(
        build=lambda _: pytest.fail("not built"),
        space=parse_space(SPACE),
        monitor=MonitorConfig(metric="loss"),
        steps=Steps(2, 2),
        encoder=warm,
    )
    study = optuna.create_study()
    study.optimize(objective, n_trials=1)
    assert study.trials[0].state == TrialState.PRUNED
    assert "memory_kept" not in study.trials[0].user_attrs
    assert warm.nbytes == (0 if name == "c" else used)
    assert warm.loads == 2 + (name == "c")
