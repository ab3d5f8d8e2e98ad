"""`fit` and `hpo` on a CUDA device, from the command line to the exported model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pandas as pd
import pytest
import torch
import yaml
from safetensors.torch import load_file

from lightning_bge.models.attention import packed as attention
from lightning_bge.models.classifier import BGEClassifier
from tests.helpers.cli_sample import write_sample_with_model
from tests.simulated_cuda.device import SimulatedDevice

pytestmark = pytest.mark.filterwarnings("ignore:GPU available but not used")


@pytest.fixture(scope="module")
def sample(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample_with_model(tmp_path_factory.mktemp("sample"))


def options(sample: Path, run_dir: Path, **changes: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "run_dir": str(run_dir),
        "model": {"name_or_path": str(sample / "model")},
        "data": {
            "train_file": str(sample / "train.csv"),
            "text_columns": ["text", "criterion"],
            "group_column": "post_id",
            "split": {"folds": 2},
        },
        "trainer": {"max_epochs": 2, "accelerator": "gpu", "devices": 1},
    }
    return {**given, **changes}


@pytest.mark.parametrize(
    ("capability", "dtype"), [((7, 5), torch.float16), ((8, 0), torch.bfloat16), ((9, 0), torch.bfloat16)]
)
def test_fit(
    run: Any,
    device: SimulatedDevice,
    sample: Path,
    tmp_path: Path,
    capability: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    device.capability = capability
    attention._in_use.clear()
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options(sample, tmp_path / "run")))
    status, _, err = run("fit", "-c", str(tmp_path / "fit.yaml"))
    assert status == 0, err
    assert {kind.dtype for kind, _ in attention.backends_in_use() if kind.device.type == "cuda"} == {dtype}
    assert device.attention
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert 0 <= json.loads((tmp_path / "run" / "summary.json").read_text())["validation"]["f1"] <= 1


def test_hpo(run: Any, device: SimulatedDevice, sample: Path, tmp_path: Path) -> None:
    before = torch.backends.cuda.matmul.fp32_precision
    hpo = {"n_trials": 4, "space": {"model.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}, "baseline": False}
    (tmp_path / "hpo.yaml").write_text(yaml.safe_dump(options(sample, tmp_path / "run", hpo=hpo)))
    held = device.allocated
    status, out, err = run("hpo", "-c", str(tmp_path / "hpo.yaml"))
    assert status == 0, err
    assert "4 of 4" in out or "4 trials" in out
    assert (tmp_path / "run" / "model" / "model.safetensors").is_file()
    assert device.allocated - held < 2**20
    assert torch.backends.cuda.matmul.fp32_precision == before


def test_predict_reads_pieces_into_pinned_memory(
    run: Any, device: SimulatedDevice, sample: Path, tmp_path: Path
) -> None:
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options(sample, tmp_path / "run")))
    status, _, err = run("fit", "-c", str(tmp_path / "fit.yaml"), "--data.test_file", str(sample / "test.csv"))
    assert status == 0, err
    command = ["predict", "-c", str(tmp_path / "fit.yaml"), "--model.name_or_path", str(tmp_path / "run" / "model")]
    out = tmp_path / "predicted.csv"
    status, _, err = run(*command, "--data.predict_file", str(sample / "test.csv"), "--output", str(out))
    assert status == 0, err
    found, expected = (pd.read_csv(path)["score"] for path in (out, tmp_path / "run" / "test.csv"))
    assert found.to_list() == pytest.approx(expected.to_list(), abs=2e-2)


@pytest.mark.parametrize("capability", [(7, 5), (9, 0)])
def test_audit(run: Any, device: SimulatedDevice, sample: Path, tmp_path: Path, capability: tuple[int, int]) -> None:
    device.capability = capability
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options(sample, tmp_path / "run")))
    pinned = () if capability == (9, 0) else ("--data.batching.pin_memory", "false")
    status, out, err = run("audit", "-c", str(tmp_path / "fit.yaml"), *pinned)
    assert status == 0, err
    assert "TF32" in out
    [row] = [line for line in out.splitlines() if "pinned memory" in line]
    assert ("100%" in row) == (capability == (9, 0))


def test_plan(run: Any, device: SimulatedDevice, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("NVIDIA_TF32_OVERRIDE", "0")
    hpo = {"n_trials": 4, "space": {"model.optimizer.lr": {"low": 1e-4, "high": 1e-2, "log": True}}}
    (tmp_path / "hpo.yaml").write_text(yaml.safe_dump(options(sample, tmp_path / "run", hpo=hpo)))
    status, out, err = run("plan", "-c", str(tmp_path / "hpo.yaml"))
    assert status == 0, err
    assert "fp32 matrices are multiplied in fp32" in out


def test_a_run_goes_on_after_an_interruption(
    run: Any, device: SimulatedDevice, sample: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["fit", "--model.dropout", "0.1", "--trainer.max_epochs", "3", "-c", str(tmp_path / "fit.yaml")]
    (tmp_path / "fit.yaml").write_text(yaml.safe_dump(options(sample, tmp_path / "whole")))
    assert run(*command)[0] == 0
    ended = BGEClassifier.on_train_epoch_end

    def interrupt(self: BGEClassifier) -> None:
        ended(self)
        if self.current_epoch == 1:
            raise KeyboardInterrupt

    again = [*command, "--run_dir", str(tmp_path / "run")]
    with monkeypatch.context() as patch:
        patch.setattr(BGEClassifier, "on_train_epoch_end", interrupt)
        status, _, err = run(*again)
        assert status == 130, err
    status, _, err = run(*again)
    assert status == 0, err
    whole, resumed = (load_file(tmp_path / name / "model" / "model.safetensors") for name in ("whole", "run"))
    assert all(torch.equal(whole[name], value) for name, value in resumed.items())
