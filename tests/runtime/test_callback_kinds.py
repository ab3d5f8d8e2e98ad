from __future__ import annotations

from typing import Any

import pytest
from lightning.pytorch import Callback
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, Timer

from lightning_bge.runtime.callback_kinds import (
    NEEDS_FIT,
    NEEDS_TRAINING,
    NOT_IN_TRIALS,
    OBSERVERS,
    acting_callbacks,
    callback_list,
    is_kind,
    without_kinds,
)


class Own(Callback):
    """A user's callback, which may do anything."""


class OwnCheckpoint(ModelCheckpoint):
    """A user's checkpoint."""


def test_one_callback_several_or_none_are_a_list() -> None:
    own = Own()
    assert callback_list(None) == []
    assert callback_list(own) == [own]
    assert callback_list([own]) == [own]


@pytest.mark.parametrize(
    ("callback", "in_study", "in_evaluation"),
    [
        (Own(), True, True),
        (Timer(), True, False),
        (EarlyStopping("a"), False, False),
        (ModelCheckpoint(), False, False),
        (OwnCheckpoint(), False, False),
    ],
)
def test_which_serve_where(callback: Callback, in_study: bool, in_evaluation: bool) -> None:
    assert without_kinds(callback, NEEDS_FIT) == [callback] * in_study
    assert without_kinds([callback], NEEDS_TRAINING) == [callback] * in_evaluation


@pytest.mark.parametrize("name", ["EarlyStopping", "ModelCheckpoint", "BatchSizeFinder", "Timer"])
def test_callbacks_of_the_package_pytorch_lightning_are_of_the_same_kinds(name: str) -> None:
    twin = pytest.importorskip("pytorch_lightning.callbacks", reason="newer versions of lightning bring it")
    callback = getattr(twin, name)(**({"monitor": "a"} if name == "EarlyStopping" else {}))
    assert not isinstance(callback, Callback)
    assert callback_list(callback) == [callback]
    assert without_kinds([callback], NOT_IN_TRIALS) == [callback] * (name == "Timer")
    assert is_kind(type(callback), NEEDS_TRAINING)
    assert not is_kind(type(callback), OBSERVERS) or name == "ModelCheckpoint"
    assert acting_callbacks({"class_path": f"pytorch_lightning.callbacks.{name}"}, NEEDS_TRAINING) == []


LIGHTNING = "lightning.pytorch.callbacks"


@pytest.mark.parametrize(
    ("option", "acts"),
    [
        ({"class_path": f"{LIGHTNING}.ModelCheckpoint"}, False),
        ({"class_path": f"{LIGHTNING}.TQDMProgressBar", "init_args": {"refresh_rate": 2}}, False),
        ({"class_path": f"{LIGHTNING}.Timer"}, True),
        ({"class_path": f"{LIGHTNING}.EarlyStopping"}, True),
        ({"class_path": f"{LIGHTNING}.StochasticWeightAveraging"}, True),
        ({"class_path": f"{__name__}.Own"}, True),
        ({"class_path": f"{__name__}.OwnCheckpoint"}, False),
        ({"class_path": "not.installed.Here"}, True),
        ({}, True),
        ("name", True),
    ],
)
def test_which_change_what_is_trained(option: Any, acts: bool) -> None:
    assert acting_callbacks([option], OBSERVERS) == [option] * acts
    assert acting_callbacks(None) == []
