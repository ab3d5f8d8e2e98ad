"""The examples run as they stand, on the generated sample."""

from __future__ import annotations

import ast
import importlib.util
import json
from pathlib import Path
from types import ModuleType

import pytest

from lightning_bge.data.sample import write_sample
from lightning_bge.data.tables.config import TableConfig
from lightning_bge.data.tables.readers import read_table
from lightning_bge.models.tiny_bert import build_tiny_bert
from tests.helpers.paths import EXAMPLES

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning"),
    pytest.mark.filterwarnings("ignore:.*smaller than the logging interval:UserWarning"),
]


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(name, EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def sample(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The current folder, with what `lightning-bge sample runs/sample` writes, but smaller."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("LIGHTNING_BGE_CACHE", str(tmp_path / "cache"))
    folder = tmp_path / "runs" / "sample"
    folder.mkdir(parents=True)
    write_sample(folder, posts=30, test_posts=10)
    rows = read_table(folder / "train.csv", ("text", "criterion"), config=TableConfig())
    texts = [text for row in rows.texts for text in row]
    build_tiny_bert(folder / "model", texts, vocab_size=300, hidden_size=16, layers=1, max_positions=128)
    return folder


def test_fit_from_python(sample: Path) -> None:
    found = load("fit_from_python").main(max_epochs=1)
    assert len(found.labels) == len(found.scores) == 1
    assert 0 <= float(found.scores[0]) <= 1


def test_tune_from_python(sample: Path) -> None:
    found = load("tune_from_python").main(n_trials=3)
    assert found.best_params.keys() == {"model.optimizer.lr", "data.batch_size"}
    assert len(found.trials) >= 3
    assert Path(found.model_dir, "model.safetensors").is_file()


def test_inference_from_an_export(sample: Path) -> None:
    load("lora").main(model_dir="runs/export", max_epochs=1)
    found = load("inference_from_an_export").main("runs/export")
    threshold = json.loads(Path("runs/export/lightning_bge.json").read_text())["threshold"]
    assert [decision for _, decision in found] == [score >= threshold for score, _ in found]


def test_lora(sample: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = load("lora").main(max_epochs=1)
    assert (folder / "model.safetensors").is_file()
    assert not list(folder.glob("adapter*"))  # the factors are merged into the weights
    trained, of = capsys.readouterr().out.split(" parameters were trained")[0].split("\n")[-1].split(" of ")
    assert int(trained.replace(",", "")) < int(of.replace(",", ""))


def test_every_example_says_how_to_run_it_and_is_run_by_a_test() -> None:
    tests = "".join(path.read_text() for path in Path(__file__).parent.glob("test_*.py"))
    for path in EXAMPLES.glob("*.py"):
        text = ast.get_docstring(ast.parse(path.read_text()))
        assert text is not None
        assert f"python examples/{path.name}" in text
        assert f'"{path.stem}"' in tests
