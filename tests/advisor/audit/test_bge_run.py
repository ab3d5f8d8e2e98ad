"""An audit of this package's own runs, on the small search."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from lightning_bge.advisor.audit.audit import audit
from lightning_bge.advisor.audit.bge_run import BGERun, audit_bge_run
from lightning_bge.advisor.audit.observation import PARTS
from lightning_bge.advisor.audit.output import describe_audit
from lightning_bge.advisor.audit.result import AUDIT_SCHEMA, AuditConfig
from lightning_bge.callbacks.compile.policy import CompileConfig
from lightning_bge.errors import ConfigError
from lightning_bge.hpo.config import StudyConfig
from lightning_bge.hpo.pruning.config import PrunerConfig
from lightning_bge.hpo.steps import Steps
from tests.helpers.foreign_modules import Classifier, loader
from tests.helpers.small_search import make, write_files

DEFAULT = {"lr": 1e-3, "dropout": 0.1}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> BGERun:
    folder = write_files(tmp_path_factory.mktemp("run"))
    build = make(folder).build

    def with_options(options: dict[str, Any]) -> Any:
        """This search has none of the options that an audit switches: they are ignored."""
        return build({**DEFAULT, **options})

    return BGERun(with_options, StudyConfig(n_trials=20), Steps(2, 2), CompileConfig("never"))


def test_every_optimization_has_a_row_and_none_is_an_alarm(run: BGERun) -> None:
    found = audit_bge_run(run, AuditConfig(rounds=0))
    assert not found.alarms
    names = {row.name for row in found.rows}
    assert names >= {
        *("bf16 matrix products", "TF32", "fused optimizer", "cuDNN benchmark", "torch.compile", "attention kernel"),
        *("channels-last", "zero_grad(set_to_none=True)", "pinned memory", "persistent workers", "loader workers"),
        *(
            "dynamic batch size",
            "effective batch",
            "out-of-memory retry",
            "pruning",
            "fold-level pruning",
        ),
        *("dropout", "padding", "data wait", "synchronization", "last batches of an epoch", "peak memory"),
    }
    assert found.row("attention kernel").in_effect == "packed (CPU)"
    assert found.row("padding").in_effect.startswith("0%")


def test_the_saving_of_packing_has_an_interval_and_the_step_has_all_parts(run: BGERun) -> None:
    found = audit_bge_run(run, AuditConfig(rounds=2, time_limit=30, compile_time_limit=0))
    saved = found.row("padding").time_saved
    assert saved is not None
    assert saved.low <= saved.mid <= saved.high
    assert saved.kind == "measured"
    assert found.peak["share"] > 0
    assert set(found.parts) == {*PARTS, "data wait", "callbacks and loop"}


def test_the_report_can_be_written_and_read(run: BGERun) -> None:
    found = audit_bge_run(run, AuditConfig(rounds=0))
    content = json.loads(json.dumps(found.as_dict()))
    assert {"schema_version", "machine", "rows", "scorecard", "step", "peak", "next"} == set(content)
    assert content["schema_version"] == AUDIT_SCHEMA
    text = describe_audit(found, width=100)
    assert all(row.name[:8] in text for row in found.rows)
    assert max(map(len, text.splitlines())) <= 100
    assert "\x1b" not in text
    assert "\x1b" in describe_audit(found, color=True, width=100)


def test_a_search_without_a_pruner_can_be_improved(run: BGERun) -> None:
    hpo = StudyConfig(n_trials=200, pruner=PrunerConfig("none"))
    found = audit_bge_run(BGERun(run.build, hpo, Steps(5, 4), run.compile), AuditConfig(rounds=0))
    assert [row.name for row in found.alarms] == ["pruning"]
    assert "hpo.pruner: {name: asha}" in found.next


def test_an_unknown_row_is_refused_with_a_list_of_all(run: BGERun) -> None:
    with pytest.raises(KeyError, match="no row nonsense; there are: bf16"):
        audit_bge_run(run, AuditConfig(rounds=0)).row("nonsense")


@pytest.mark.parametrize("name", ["rounds", "time_limit", "compile_time_limit"])
def test_negative_options_are_refused(name: str) -> None:
    with pytest.raises(ConfigError, match=f"{name} must be 0 or more"):
        AuditConfig(**{name: -1})


def test_early_stopping_checkpoints_and_several_devices_of_a_project_are_left_out(tmp_path: Path) -> None:
    callbacks = [EarlyStopping("val_loss"), ModelCheckpoint(tmp_path)]
    options = {"accelerator": "cpu", "devices": 2, "strategy": "ddp", "callbacks": callbacks, "max_time": "00:00:00:01"}
    found = audit(Classifier(), loader(), options, config=AuditConfig(rounds=0))
    assert found.row("effective batch").in_effect == "16 rows"
    assert not found.alarms
    assert not list(tmp_path.iterdir())


def test_weights_and_random_state_are_restored(tmp_path: Path) -> None:
    module = Classifier()
    before = {name: value.clone() for name, value in module.state_dict().items()}
    drawn = torch.random.get_rng_state()
    audit(module, loader(), {"accelerator": "cpu", "max_epochs": 7}, config=AuditConfig(rounds=0))
    assert torch.equal(torch.random.get_rng_state(), drawn)
    after = module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
