"""The model card of an export: its front matter, and its examples, which are run."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.ensemble import write_ensemble
from lightning_bge.models.output import model_card
from lightning_bge.tokenization import WindowConfig
from lightning_bge.types import Schema, Task
from tests.helpers.small_models import save_model, word_tokenizer

NAMES: dict[Task, tuple[str, ...]] = {
    "binary": ("no", "yes"),
    "multiclass": ("x", "y\n| `z`", ""),
    "multilabel": ("a", "b", "ä"),
    "regression": (),
}


def export(folder: Path, schema: Schema) -> tuple[BGEClassifier, Path]:
    module = BGEClassifier(save_model(folder / "start", outputs=schema.num_outputs), schema.task)
    module.set_schema(schema)
    module.configure_model()
    return module, module.export(folder / "secret-folder" / "model", word_tokenizer())


def read(folder: Path) -> tuple[dict[str, Any], str]:
    _, front, text = (folder / "README.md").read_text(encoding="utf-8").split("---\n", 2)
    return yaml.safe_load(front), text


def examples(text: str) -> dict[str, str]:
    return dict(re.findall(r"### ([a-z-]+)\n```python\n(.*?)\n```", text, flags=re.DOTALL))


@pytest.mark.parametrize("columns", [1, 2])
@pytest.mark.parametrize("task", NAMES)
def test_the_examples_run_and_agree(tmp_path: Path, task: Task, columns: int) -> None:
    schema = Schema(task, NAMES[task], ("text", "other | text")[:columns], 16)
    _, folder = export(tmp_path, schema)
    front, text = read(folder)
    peers = ["sentence-transformers", "cross-encoder"] * (columns == 2)
    assert front == {
        "library_name": "transformers",
        "pipeline_tag": "text-classification",
        "tags": ["lightning-bge", *peers, task],
    }
    assert str(tmp_path) not in text
    assert "secret-folder" not in text
    found = {}
    for name, code in examples(text).items():
        scope: dict[str, Any] = {}
        exec(code.replace("path/to/this/folder", str(folder)), scope)
        found[name] = torch.as_tensor(scope["found"].scores if "found" in scope else scope["scores"])
    assert found.keys() == {"lightning-bge", "transformers", *["sentence-transformers"] * (columns == 2)}
    for scores in found.values():
        torch.testing.assert_close(scores, found["transformers"], rtol=0, atol=1e-5)
    if columns == 1:
        assert "`CrossEncoder` reads pairs of texts" in text


def test_the_card_says_what_the_model_predicts(tmp_path: Path) -> None:
    _, text = read(export(tmp_path, Schema("binary", ("no", "yes"), ("a", "b"), 16, 0.25))[1])
    assert "`yes` is the positive one, `no` the negative one" in text
    assert "a probability of 0.25 or more counts as a yes" in text
    assert "Text columns: `a` and `b`, in this order." in text
    assert "Maximum length: 16 tokens" in text
    _, text = read(export(tmp_path / "more", Schema("multiclass", NAMES["multiclass"], ("a",), 16))[1])
    assert "in the order of the outputs: `x`, `y | 'z'`, `\"\"`." in text
    assert "Threshold" not in text


def test_the_card_says_what_becomes_of_longer_texts(tmp_path: Path) -> None:
    _, text = read(export(tmp_path, Schema("binary", ("no", "yes"), ("a",), 16))[1])
    assert "lightning-bge truncates longer ones" in text
    assert "truncate them in the same way" in text
    windows = WindowConfig(4, "max", max_windows=3)
    _, text = read(export(tmp_path / "windows", Schema("binary", ("no", "yes"), ("a", "b"), 16, windows=windows))[1])
    assert "windows of 16 tokens over the second text, with the whole first text in each; at most 3;" in text
    assert "share 4 tokens, and the logits are pooled by their maximum" in text
    assert "sentence-transformers know no windows and truncate" in text


def test_a_base_model_is_named_if_it_came_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    schema = Schema("binary", ("no", "yes"), ("a",), 16)
    downloaded = {"BAAI/bge-small-en-v1.5", "bert-base-uncased", "mine/model"}
    monkeypatch.setattr(
        model_card, "try_to_load_from_cache", lambda name, file: str(tmp_path) if name in downloaded else None
    )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine" / "model").mkdir(parents=True)
    expected = {
        **{"BAAI/bge-small-en-v1.5": True, "bert-base-uncased": True},
        # a folder here, and folders that are elsewhere
        **{"mine/model": False, "runs/model": False, "/srv/secret/model": False, "~/model": False, "a/b/c": False},
    }
    for name, named in expected.items():
        model_card.write_model_card(tmp_path, schema, name)
        front, text = read(tmp_path)
        assert front.get("base_model") == (name if named else None), name
        assert name not in text


def test_an_ensemble_has_a_card_too(tmp_path: Path) -> None:
    schema = Schema("binary", ("no", "yes"), ("a", "b"), 16)
    draft = tmp_path / "draft"
    for number in range(2):
        module, _ = export(tmp_path / str(number), schema)
        module.export(draft / f"fold-{number}", word_tokenizer())
    names, folder = ["fold-0", "fold-1"], tmp_path / "model"
    write_ensemble(draft, names, folder, schema=schema, tokenizer=word_tokenizer(), source={})
    front, text = read(folder)
    assert front["library_name"] == "lightning-bge"
    assert "The folder holds 2 models, whose scores are averaged" in text
    scope: dict[str, Any] = {}
    exec(examples(text)["lightning-bge"].replace("path/to/this/folder", str(folder)), scope)
    assert scope["found"].scores.shape == (1,)
