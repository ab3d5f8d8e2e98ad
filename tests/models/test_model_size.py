from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from lightning_bge.errors import ConfigError
from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.model_size import measure_model
from lightning_bge.models.tiny_bert import build_tiny_bert


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("bert") / "model"
    build_tiny_bert(folder, ["some words of a text"], vocab_size=50, hidden_size=16, layers=2, max_positions=32)
    return folder


@pytest.mark.parametrize(
    "options", [{}, {"frozen_layers": 1}, {"lora": LoRAConfig(r=2)}], ids=["all", "frozen", "lora"]
)
def test_sizes_are_those_of_the_model_that_is_loaded(model: Path, options: dict) -> None:
    size, net = measure_model(str(model), **options), load_classifier(str(model), 1, **options)
    assert size.parameters == sum(one.numel() for one in net.parameters())
    assert size.trainable == sum(one.numel() for one in net.parameters() if one.requires_grad)


def test_bytes_are_those_of_the_files(model: Path, tmp_path: Path) -> None:
    size, net = measure_model(str(model)), load_classifier(str(model), 1)
    optimizer = torch.optim.AdamW(net.parameters())
    for one in net.parameters():
        one.grad = torch.zeros_like(one)
    optimizer.step()
    net.model.save_pretrained(tmp_path)
    torch.save({"model": net.state_dict(), "optimizer": optimizer.state_dict()}, tmp_path / "checkpoint")
    names = 30_000  # of the tensors
    assert size.exported <= (tmp_path / "model.safetensors").stat().st_size < size.exported + names
    assert size.checkpoint <= (tmp_path / "checkpoint").stat().st_size < size.checkpoint + 2 * names


def test_the_random_state_is_kept(model: Path) -> None:
    before = torch.get_rng_state()
    measure_model(str(model), lora=LoRAConfig(r=2))
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("config.json", None, "not a folder that transformers loads"),
        ("config.json", b"{", "not a valid JSON file"),
        ("model.safetensors", None, r"no file model.safetensors or pytorch_model.bin in it"),
        ("model.safetensors", b"abc", "header"),
        ("model.safetensors", b"cut", "MetadataIncompleteBuffer|incomplete"),
    ],
)
def test_missing_and_corrupt_files_are_found(
    model: Path, tmp_path: Path, name: str, content: bytes | None, message: str
) -> None:
    folder = tmp_path / "model"
    shutil.copytree(model, folder)
    whole = (folder / name).read_bytes()
    (folder / name).unlink()
    if content is not None:
        (folder / name).write_bytes(whole[:-10] if content == b"cut" else content)
    with pytest.raises(ConfigError, match=message):
        measure_model(str(folder))


def test_a_folder_that_does_not_exist_is_named(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=f"the folder {tmp_path}/gone does not exist"):
        measure_model(f"{tmp_path}/gone")
