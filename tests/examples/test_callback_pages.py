"""Each page on a callback has an example, which runs as it stands with a module and data of anybody."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import LightningDataModule, LightningModule
from optuna.trial import TrialState
from torch import Tensor, nn
from torch.utils.data import DataLoader

import lightning_bge.callbacks as package
from lightning_bge.callbacks.micro_batch import cache as cache_module
from tests.helpers.paths import ROOT

PAGES = ROOT / "docs" / "callbacks"
Names = dict[str, Any]


def samples(rows: int = 96) -> list[dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(0)
    return [{"x": torch.randn(6, generator=generator), "attention_mask": torch.ones(6)} for _ in range(rows)]


class YourModule(LightningModule):
    """A module of somebody who knows nothing of this package, with loaders of its own."""

    def __init__(self, batch_size: int = 4, lr: float = 0.1, width: int = 6) -> None:
        super().__init__()
        self.batch_size, self.lr = batch_size, lr
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(6, 6), nn.Dropout(0.1)) for _ in range(2)).eval()
        self.head = nn.Linear(6, width)

    def training_step(self, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        values = batch["x"]
        for layer in self.layers:
            values = layer(values)
        return self.head(values).square().mean()

    def validation_step(self, batch: dict[str, Tensor], batch_idx: int) -> None:
        loss = self.training_step(batch, batch_idx)
        self.log("val_loss", loss)
        self.log("val_f1", 1 / (1 + loss))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=self.lr)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), batch_size=self.batch_size)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


class YourData(LightningDataModule):
    """Data of one fold."""

    def __init__(self, fold: int = 0) -> None:
        super().__init__()
        self.fold = fold

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(samples(), batch_size=8)  # type: ignore[arg-type]

    val_dataloader = train_dataloader


def check_finder(names: Names, text: str) -> None:
    assert 64 % names["finder"].micro_batch_size == 0
    assert names["finder"].tried or names["finder"].reason.startswith("the peak of memory")
    assert "64 for each optimizer step: " in text


def check_compiled(names: Names, text: str) -> None:
    assert re.search(r"^(True compile on|False compile off): ", text, re.MULTILINE)


def check_backends(names: Names, text: str) -> None:
    assert len(names["backends"].report) == 4
    assert "SDPA kernels allowed: " in text


def check_throughput(names: Names, text: str) -> None:
    assert names["trainer"].callback_metrics["train_tokens_per_s"] > 0
    assert "tok/s" in text


def check_mode(names: Names, text: str) -> None:
    assert "7 modules were in eval mode" in text
    assert names["handler"].records == []


def check_study(names: Names, text: str) -> None:
    assert callable(names["objective"])


CHECKS: dict[str, Callable[[Names, str], None]] = {
    "micro_batch_finder": check_finder,
    "compile_layers": check_compiled,
    "torch_backends": check_backends,
    "throughput": check_throughput,
    "train_mode_and_oom": check_mode,
    "fold_pruning": check_study,
    "oom_pruning": check_study,
}


def test_every_callback_has_its_page_which_the_index_names() -> None:
    index = (PAGES / "README.md").read_text()
    assert {page.stem for page in PAGES.glob("*.md")} == {*CHECKS, "README"}
    assert all(f"({name}.md)" in index for name in CHECKS)
    callbacks = [name for name in package.__all__ if hasattr(getattr(package, name), "on_fit_start")]
    assert len(callbacks) > 5
    for name in [*callbacks, "FoldPruningCallback", "OOMPruningCallback"]:
        assert re.search(rf"^\| \[.*\b{name}\b", index, re.MULTILINE), name


def test_links_lead_to_files() -> None:
    for page in PAGES.glob("*.md"):
        for target in re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", page.read_text()):
            assert (page.parent / target).is_file(), f"{page.name}: {target}"


@pytest.mark.filterwarnings("ignore")  # what Lightning advises a small example
@pytest.mark.parametrize("name", CHECKS)
def test_the_example_of_the_page_runs(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    blocks = re.findall(r"```python\n(.*?)```", (PAGES / f"{name}.md").read_text(), re.DOTALL)
    assert len(blocks) == 1
    assert 5 <= len(blocks[0].splitlines()) <= 22
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("lightning_bge.callbacks.compile.callback._findings", {})
    cache_module.forget()
    studies: list[Any] = []
    import optuna

    def keep(*args: Any, **options: Any) -> Any:
        studies.append(make(*args, **options))
        return studies[-1]

    make = optuna.create_study
    monkeypatch.setattr(optuna, "create_study", keep)
    names: Names = {"YourModule": YourModule, "YourData": YourData}
    exec(blocks[0], names)
    CHECKS[name](names, "".join(capsys.readouterr()))
    assert len(studies) == name.endswith("_pruning")
    for study in studies:
        assert [trial.state for trial in study.trials] == [TrialState.COMPLETE] * 2
