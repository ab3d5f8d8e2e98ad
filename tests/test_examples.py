from __future__ import annotations

import importlib.util
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).parents[1] / "examples"


@pytest.mark.filterwarnings("ignore:.*does not have many workers:UserWarning")
@pytest.mark.filterwarnings("ignore:.*in eval mode:UserWarning")
def test_the_callbacks_work_in_a_project_that_uses_nothing_else_of_ours() -> None:
    spec = importlib.util.spec_from_file_location("own_project", EXAMPLES / "own_project.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    trainer = module.main()
    assert trainer.callback_metrics["train_tokens_per_s"] > 0
    [train_mode] = [callback for callback in trainer.callbacks if type(callback).__name__ == "TrainMode"]
    assert train_mode.switched == ["encoder", "encoder.0", "encoder.1"]
