"""An audit of our own runs, by the program, on the small search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_bge.advisor.audit.audit import AuditConfig, audit
from lightning_bge.advisor.audit.bge_run import OwnRun, audit_own
from lightning_bge.advisor.audit.console import describe_audit
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from tests.helpers.foreign_modules import Classifier, loader
from tests.helpers.small_search import make, write_files

DEFAULT = {"lr": 1e-3, "dropout": 0.1}


@pytest.fixture(scope="module")
def own(tmp_path_factory: pytest.TempPathFactory) -> OwnRun:
    folder = write_files(tmp_path_factory.mktemp("own"))
    build = make(folder).build

    def with_settings(settings: dict[str, Any]) -> Any:
        """Of the settings that an audit switches this search knows none: they stay as they are."""
        return build({**DEFAULT, **settings})

    return OwnRun(with_settings, StudyConfig(n_trials=20), Steps(2, 2), CompileConfig("never"))


def test_every_row_of_the_design_is_there_and_nothing_is_wrong(own: OwnRun) -> None:
    found = audit_own(own, AuditConfig(rounds=0))
    assert not found.alarms
    names = {row.name for row in found.rows}
    assert names >= {
        *("bf16 matrix products", "TF32", "fused optimizer", "cuDNN benchmark", "torch.compile", "attention kernel"),
        *("channels-last", "zero_grad(set_to_none=True)", "pinned memory", "persistent workers", "loader workers"),
        *("dynamic batch size", "effective batch", "out of memory", "pruning", "fold-level pruning", "warm encoder"),
        *("dropout", "padding", "data wait", "synchronisations", "last window of an epoch", "peak memory"),
    }
    assert found.row("attention kernel").in_effect == "packed (CPU)"
    assert found.row("padding").in_effect.startswith("0%")
    assert "2 of 2 steps" in found.row("out of memory").evidence


def test_gains_come_with_an_interval(own: OwnRun) -> None:
    found = audit_own(own, AuditConfig(rounds=2, seconds=30, compile_s=0))
    for name in ("padding", "fused optimizer", "loader workers"):
        gain = found.row(name).gain
        assert gain is not None
        assert gain.low <= gain.mid <= gain.high
        assert gain.kind == "measured"
    assert 0 <= found.peak["share"] < 1
    assert sum(found.parts.values()) == pytest.approx(found.step_ms, rel=0.3)


def test_the_report_can_be_written_and_read(own: OwnRun) -> None:
    found = audit_own(own, AuditConfig(rounds=0))
    content = json.loads(json.dumps(found.as_dict()))
    assert {"machine", "rows", "scorecard", "step", "peak", "next"} == set(content)
    text = describe_audit(found, width=100)
    assert all(row.name[:8] in text for row in found.rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "\x1b" in describe_audit(found, color=True, width=100)


def test_a_search_without_a_pruner_has_something_to_gain(own: OwnRun) -> None:
    hpo = StudyConfig(n_trials=200, pruner=PrunerConfig("none"))
    found = audit_own(OwnRun(own.build, hpo, Steps(5, 4), own.compile), AuditConfig(rounds=0))
    assert [row.name for row in found.alarms] == ["pruning"]
    assert "hpo.pruner: {name: asha}" in found.next


def test_there_is_no_row_of_a_wrong_name(own: OwnRun) -> None:
    with pytest.raises(KeyError, match="no row nonsense; there are: bf16"):
        audit_own(own, AuditConfig(rounds=0)).row("nonsense")


@pytest.mark.parametrize("name", ["rounds", "seconds", "compile_s"])
def test_negative_settings_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name}: expected 0 or more"):
        AuditConfig(**{name: -1})


def test_early_stopping_checkpoints_and_several_devices_of_a_project_are_left_out(tmp_path: Path) -> None:
    callbacks = [EarlyStopping("val_loss"), ModelCheckpoint(tmp_path)]
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "callbacks": callbacks, "max_time": "00:00:00:01"}
    found = audit(Classifier(), loader(), options, config=AuditConfig(rounds=0))
    assert found.row("effective batch").in_effect == "16 rows"
    assert not found.alarms
    assert not list(tmp_path.iterdir())


def test_weights_and_random_numbers_are_as_before(tmp_path: Path) -> None:
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.random.get_rng_state()
    audit(module, loader(), {"accelerator": "cpu", "max_epochs": 7}, config=AuditConfig(rounds=0))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
