"""A step that runs out of memory is repeated with less: which measures are taken, in which order, and who learns it."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest
import torch

from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.memory_saving.gradient_checkpointing import uses_gradient_checkpointing
from lightning_bge.models.memory_saving.oom_retry import OOMRetry
from lightning_bge.runtime.oom import OutOfMemoryError
from lightning_bge.types import Batch
from tests.helpers.small_models import cut_batch, random_sequences, save_model


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> str:
    return save_model(tmp_path_factory.mktemp("model"))


@pytest.fixture
def net(folder: str) -> TextClassifier:
    return load_classifier(folder, 1)


class Source:
    """What makes the batches."""

    def __init__(self, micro_batch_size: int = 100) -> None:
        self.micro_batch_size = micro_batch_size

    def set_micro_batch_size(self, size: int) -> None:
        self.micro_batch_size = size


class Device:
    """A step that runs out of memory where a micro-batch has more tokens than fit."""

    def __init__(self, retry: OOMRetry, most: int, where: str = "forward") -> None:
        self.retry, self.most, self.where = retry, most, where
        self.steps: list[list[int]] = []

    def __call__(self, batch: Batch) -> int:
        self.steps.append([])
        for micro in batch.micro:
            self.retry.at(self.where, micro)
            self.steps[-1].append(sum(micro.lengths))
            if sum(micro.lengths) > self.most:
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")
        return batch.size


def make_batch(lengths: list[int]) -> Batch:
    return cut_batch(random_sequences(lengths), torch.zeros(len(lengths)), 1)


LENGTHS = [20, 10, 10, 10, 10]


def test_micro_batches_are_halved_and_the_source_learns_it(net: TextClassifier) -> None:
    retry, source = OOMRetry(), Source()
    device = Device(retry, most=25)
    assert retry.run(device, make_batch(LENGTHS), net, source=source, training=True) == 5
    assert device.steps == [[60], [30], [20, 20, 20]]
    assert source.micro_batch_size == 20
    assert [record.where for record in retry.records] == ["forward"] * 2
    assert retry.records[0].requested == 2**30
    # a batch that was made before is split at once
    assert retry.run(device, make_batch(LENGTHS), net, source=source, training=True) == 5
    assert device.steps[-1] == [20, 20, 20]


def test_windows_of_a_row_stay_together(net: TextClassifier) -> None:
    [micro] = make_batch([10, 10, 5, 10, 4, 6]).micro
    retry, source = OOMRetry(), Source()
    device = Device(retry, most=27)
    batch = Batch((replace(micro, windows=(3, 2, 1), rows=torch.arange(3), labels=torch.zeros(3)),))
    # sorted: rows of 10 + 10 + 10, 6 + 5 and 4 tokens; the first does not fit, whatever the size
    with pytest.raises(OutOfMemoryError, match="one row of 30 tokens does not fit into memory"):
        retry.run(device, batch, net, source=source, training=True)
    assert device.steps == [[45], [30], [30]]
    device.most = 30
    assert retry.run(device, batch, net, source=source, training=True) == 3
    assert device.steps[-1] == [30, 15]
    assert source.micro_batch_size == 30


def test_batches_are_taken_as_they_come_before_any_failure(net: TextClassifier) -> None:
    retry, source = OOMRetry(), Source(micro_batch_size=20)
    device = Device(retry, most=1000)
    retry.run(device, make_batch(LENGTHS), net, source=source, training=True)
    assert device.steps == [[60]]


def test_a_source_is_never_given_a_larger_size(net: TextClassifier) -> None:
    retry, source = OOMRetry(), Source(micro_batch_size=22)
    retry.run(Device(retry, most=35), make_batch(LENGTHS), net, source=source, training=True)
    assert source.micro_batch_size == 22


def test_without_a_source_the_limit_holds_too(net: TextClassifier) -> None:
    retry = OOMRetry()
    device = Device(retry, most=25)
    for _ in range(2):
        retry.run(device, make_batch(LENGTHS), net, source=None, training=True)
    failures = len(retry.records)
    assert len(device.steps) == failures + 2
    retry.reset()
    retry.run(device, make_batch(LENGTHS), net, source=None, training=True)
    assert len(retry.records) == failures


def test_evaluation_has_a_limit_of_its_own(net: TextClassifier) -> None:
    retry, source = OOMRetry(), Source()
    device = Device(retry, most=25, where="validation")
    retry.run(device, make_batch(LENGTHS), net, source=source, training=False)
    assert retry.eval_size == 20
    assert source.micro_batch_size == 100
    assert {record.where for record in retry.records} == {"validation"}


def test_gradients_of_the_failed_step_are_dropped_in_training_alone(net: TextClassifier) -> None:
    parameter = next(net.parameters())
    for training in (False, True):
        parameter.grad = torch.ones_like(parameter)
        retry = OOMRetry()
        retry.run(Device(retry, most=25), make_batch(LENGTHS), net, source=None, training=training)
        assert (parameter.grad is None) == training


def test_one_sequence_switches_gradient_checkpointing_on_and_then_ends_the_run(
    net: TextClassifier, caplog: pytest.LogCaptureFixture
) -> None:
    retry = OOMRetry()
    with (
        caplog.at_level(logging.WARNING),
        pytest.raises(OutOfMemoryError, match="one row of 20 tokens does not fit into memory") as caught,
    ):
        retry.run(Device(retry, most=15), make_batch([20]), net, source=None, training=True)
    assert uses_gradient_checkpointing(net)
    assert retry.gradient_checkpointing
    assert "gradient checkpointing is on from now on" in caplog.text
    assert caught.value.oom is retry.records[-1]
    assert len(retry.records) == 2


@pytest.mark.parametrize(
    "error",
    [RuntimeError("shape mismatch"), RuntimeError("DataLoader worker (pid 7) is killed by signal: Killed. ")],
    ids=str,
)
def test_other_errors_are_raised_unchanged(net: TextClassifier, error: Exception) -> None:
    def fail(batch: Batch) -> None:
        raise error

    retry = OOMRetry()
    with pytest.raises(RuntimeError) as caught:
        retry.run(fail, make_batch(LENGTHS), net, source=None, training=True)
    assert caught.value is error
    assert retry.records == []


@pytest.mark.parametrize("failures", [0, 1])
def test_an_optimizer_step_is_repeated_once(failures: int) -> None:
    retry, left = OOMRetry(), [MemoryError()] * failures

    def update() -> None:
        if left:
            raise left.pop()

    retry.step(update, lambda: False)
    assert [record.where for record in retry.records] == ["optimizer"] * failures
    assert retry.where == "data"


@pytest.mark.parametrize(("changed", "records"), [(True, 1), (False, 2)])
def test_an_optimizer_step_that_cannot_be_repeated_ends_the_run(changed: bool, records: int) -> None:
    def update() -> None:
        raise MemoryError

    retry = OOMRetry()
    with pytest.raises(OutOfMemoryError) as caught:
        retry.step(update, lambda: changed)
    assert len(retry.records) == records
    assert ("continue from the last checkpoint" in str(caught.value)) == changed


def test_other_errors_of_an_optimizer_step_are_raised_unchanged() -> None:
    def update() -> None:
        raise ValueError("no such group")

    with pytest.raises(ValueError, match="no such group"):
        OOMRetry().step(update, lambda: False)
