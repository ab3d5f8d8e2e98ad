"""The finder in another project, and in this one: what it finds, and that it changes nothing else."""

from __future__ import annotations

import logging
import os
import random
import warnings
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from torch import Tensor

from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch import probe as probe_module
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.data.datamodule import TextDataModule
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.optimizer import OptimizerConfig
from lightning_bge.runtime.memory import LARGEST_HEAP, Limit
from lightning_bge.types import MicroBatch
from tests.helpers.rank_processes import run_ranks
from tests.helpers.small_models import quiet_trainer, save_model
from tests.helpers.trial_steps import (
    ALL,
    OPTIMIZERS,
    FakeMeter,
    Foreign,
    Losses,
    Rows,
    Use,
    assert_same,
    everything,
    search,
    train,
)

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    pytest.mark.filterwarnings("ignore:Found . module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


@pytest.mark.parametrize("manual", [False, True])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_after_the_search_is_the_same_bit_for_bit(name: str, manual: bool, use: Use) -> None:
    found = []
    for finders in ([], [MicroBatchFinder(ALL)]):
        seed_everything(3)
        module, data, losses = Foreign(OPTIMIZERS[name], manual), Rows(), Losses()
        use(data, 10_000)
        clip = {"gradient_clip_val": None if manual else 1.0}
        trainer = train(module, data, *finders, losses, **clip)
        found.append((everything(module, trainer), losses.seen, module.losses, module.counts, module.mean))
        if finders:
            assert len(data.made) > 10  # it did search
            assert 0.9 * 970 / 1.05 - 2 < data.micro_batch_size <= 0.9 * 970
    assert_same(*found)


@pytest.mark.parametrize("where", ["training", "validation", "source"])
def test_an_error_comes_out_and_everything_is_put_back(where: str, use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    states: list[Any] = []

    class Before(Callback):
        def on_train_start(self, trainer: Trainer, pl_module: Any) -> None:
            states.append(everything(pl_module, trainer))
            states[-1]["modes"] = [part.training for part in pl_module.modules()]
            states[-1]["more"] = (list(pl_module.losses), dict(pl_module.counts), pl_module.mean.clone())
            states[-1]["weights"] = {k: v.clone() for k, v in pl_module.state_dict().items()}
            states[-1]["random"] = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())  # type: ignore[union-attr]

        def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
            self.on_train_start(trainer, pl_module)

    module, data, before = Foreign(), Rows(), Before()
    use(data, 10_000)

    def broken(*_: Any) -> Any:
        if len(data.made) < 9:
            return original(*_)
        raise RuntimeError("shape mismatch")

    owner, name = {
        "training": (module, "training_step"),
        "validation": (module, "validation_step"),
        "source": (data, "worst_case_batch"),
    }[where]
    original = getattr(owner, name)
    monkeypatch.setattr(owner, name, broken)
    with pytest.raises(RuntimeError, match="shape mismatch"):
        train(module, data, before, MicroBatchFinder(ALL))
    assert len(data.made) >= 8
    assert_same(*states)
    assert not module.trying
    assert all(parameter.grad is None for parameter in module.parameters())


def test_other_callbacks_and_loggers_see_nothing_of_it(use: Use) -> None:
    calls: list[str] = []

    class Watch(Callback):
        def on_before_backward(self, trainer: Trainer, pl_module: LightningModule, loss: Tensor) -> None:
            calls.append("backward")

        def on_before_zero_grad(self, *_: Any) -> None:
            calls.append("zero")

    class Talks(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trying:
                self.log("never", 1.0, on_step=True)
                self.logger.experiment.add_scalar("never", 1)  # type: ignore[union-attr]
            return super().training_step(batch, batch_idx)

    from lightning.pytorch.loggers import CSVLogger

    class Log(CSVLogger):
        def __init__(self) -> None:
            super().__init__("nowhere")
            self.names: set[str] = set()

        def log_metrics(self, metrics: dict[str, Any], step: int | None = None) -> None:  # type: ignore[override]
            self.names |= set(metrics)

        def save(self) -> None:
            pass

        def log_hyperparams(self, *_: Any) -> None:  # type: ignore[override]
            pass

    data, logger = Rows(), Log()
    use(data, 10_000)
    trainer = train(Talks(), data, MicroBatchFinder(ALL), Watch(), logger=logger, log_every_n_steps=1)
    assert calls.count("backward") == 12
    assert "never" not in logger.names
    assert "val" in logger.names
    assert trainer.logger is logger


def test_the_optimizers_state_exists_in_trial_steps_and_gradients_do(use: Use) -> None:
    seen: list[tuple[int, int]] = []

    class Watched(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trying:
                [optimizer] = self.trainer.optimizers
                grads = sum(parameter.grad is not None for parameter in self.parameters())
                seen.append((len(optimizer.state), grads))
            return super().training_step(batch, batch_idx)

    data = Rows()
    use(data, 10_000)
    train(Watched(OPTIMIZERS["adamw"]), data, MicroBatchFinder(ALL))
    trainable = 6
    assert seen[:2] == [(0, 0), (trainable, 0)]
    assert set(seen[2:]) == {(trainable, trainable)}


def test_a_module_that_changes_its_weights_itself_is_put_back_too(use: Use) -> None:
    class Clamps(Foreign):
        def training_step(self, batch: Any, batch_idx: int) -> Any:
            if self.trying:
                self.head.weight.data.mul_(0.5)  # no version counter sees it
                self.head.requires_grad_(False)
            return super().training_step(batch, batch_idx)

    weights = []

    class Start(Callback):
        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            weights.append(pl_module.head.weight.detach().clone())

    data, module = Rows(), Clamps()
    before = module.head.weight.detach().clone()
    use(data, 10_000)
    train(module, data, MicroBatchFinder(ALL), Start())
    assert torch.equal(weights[0], before)
    assert module.head.weight.requires_grad


def test_without_a_stated_limit_enough_is_taken(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, "lightning_bge")
    for _ in range(2):
        data, finder = Rows(), MicroBatchFinder()
        use(data, None)
        train(Foreign(), data, finder)
        assert (data.set, data.made) == ([8192], [])
    [record] = [record for record in caplog.records if record.name == finder_module.__name__]
    assert record.message.startswith("micro-batch size 8,192: no limit on memory is stated")
    assert finder.tried == []


def test_where_memory_cannot_be_measured_enough_is_taken(use: Use, monkeypatch: pytest.MonkeyPatch) -> None:
    data, finder = Rows(), MicroBatchFinder(MemoryConfig(default_size=77))
    use(data, 10_000)
    monkeypatch.setattr(finder_module, "make_meter", lambda *_, **__: "no meter here")
    train(Foreign(), data, finder)
    assert (data.set, finder.reason) == ([77], "no meter here")
    trainer: Any = SimpleNamespace(strategy=quiet_trainer().strategy)
    assert "mps" in probe_module.make_meter(trainer, torch.device("mps"))  # type: ignore[operator]
    monkeypatch.setattr(probe_module, "_CLEAR_REFS", Path("/nowhere/clear_refs"))
    assert "can't be measured" in probe_module.make_meter(trainer, torch.device("cpu"))  # type: ignore[operator]
    trainer.strategy = object()
    assert probe_module.make_meter(trainer, torch.device("cpu")) == "a step can't be tried alone under object"


def test_a_number_of_the_users_is_left_alone(use: Use) -> None:
    data, finder = Rows(auto_micro_batch_size=False), MicroBatchFinder()
    use(data, 10_000)
    train(Foreign(), data, finder)
    assert (data.set, finder.micro_batch_size) == ([], None)


def test_the_module_may_be_the_batch_source_and_none_is_said(use: Use, caplog: pytest.LogCaptureFixture) -> None:
    rows = Rows()

    class Makes(Foreign):
        micro_batch_size_step = 2
        micro_batch_size = 4

        def worst_case_batch(self, size: int, train: bool) -> Tensor:
            return rows.worst_case_batch(size, train)

        def set_micro_batch_size(self, size: int) -> None:
            rows.set_micro_batch_size(size)

    use(rows, 10_000)
    loader = rows.train_dataloader()
    quiet_trainer(callbacks=[MicroBatchFinder(ALL)]).fit(Makes(), loader, loader)
    assert rows.set == [pytest.approx(0.9 * 970, rel=0.05)]
    finder = MicroBatchFinder(ALL)
    for _ in range(2):
        quiet_trainer(callbacks=[finder]).fit(Foreign(), loader, loader)
    assert finder.reason.startswith("no micro-batch size: neither data module nor module is a batch source")
    assert caplog.text.count("no micro-batch size") == 1


def test_all_ranks_take_the_smallest(use: Use, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def smaller(tensor: Tensor, op: Any) -> None:
        assert op == torch.distributed.ReduceOp.MIN
        tensor.clamp_(max=99)

    torch.distributed.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    try:
        assert search(use)[0].set == [pytest.approx(0.9 * 970, rel=0.05)]
        monkeypatch.setattr(torch.distributed, "all_reduce", smaller)
        for total in (10_000, 20_000):  # known, and new
            assert search(use, total=total)[0].set == [99]
        assert search(use, total=20_000)[0].made == []
        settings: list[int | None] = []
        monkeypatch.setattr(finder_module, "limit_malloc", lambda largest=None: settings.append(largest))
        monkeypatch.setattr(finder_module, "choose_heap", lambda probe, search, answer, **_: (answer, LARGEST_HEAP))
        search(use, total=30_000)
        assert settings[-2:] == [99, None]  # in training and after it
    finally:
        torch.distributed.destroy_process_group()


def on_two_ranks(folder: str) -> tuple[Any, ...]:
    """A foreign module under plain DDP; on rank 1 less fits."""
    rank = int(os.environ["RANK"])
    module, data, finder = Foreign(), Rows(), MicroBatchFinder(ALL, cache_dir=folder)
    module.largest = 400 if rank else 1000
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(finder_module, "limits", lambda *_: [Limit("RLIMIT_AS", 10**6, 0, raises=True)])
        patch.setattr(finder_module, "make_meter", lambda *_, **__: FakeMeter(data))
        warnings.filterwarnings("ignore")
        train(module, data, finder, devices=2, strategy="ddp")
    assert isinstance(finder.micro_batch_size, int)
    return data.set, len(data.made), [parameter.tolist() for parameter in module.parameters()]


def test_ranks_search_on_their_own_and_agree(tmp_path: Path) -> None:
    first, second = run_ranks(on_two_ranks, str(tmp_path))
    assert first[0] == second[0]
    assert 0.9 * 200 / 1.05 - 2 <= first[0][0] <= 0.9 * 200
    assert first[1] != second[1]  # they made as many trial steps as each needed
    assert first[2] == second[2]


def test_our_module_trains_the_same_after_the_search(tmp_path: Path, use: Use) -> None:
    folder = save_model(tmp_path / "model", dropout=0.1)
    lines = [f"w{row % 7} w{row % 5} w{row % 3}\tw{row % 11}\t{'yes' if row % 3 else 'no'}" for row in range(24)]
    (tmp_path / "train.tsv").write_text("text_a\ttext_b\tlabel\n" + "\n".join(lines) + "\n")
    found = []

    def load(*args: Any, **options: Any) -> TextClassifier:
        net = load_classifier(*args, **options)
        net.register_forward_pre_hook(refuse)
        return net

    def refuse(net: Any, inputs: tuple[MicroBatch]) -> None:
        if sum(inputs[0].lengths) > 2 * 1970:
            raise torch.OutOfMemoryError("CUDA out of memory")

    for finders in ([], [MicroBatchFinder(ALL)]):
        data = TextDataModule(
            folder, train_file=str(tmp_path / "train.tsv"), max_length=16, batch_size=4, cache_dir=str(tmp_path / "c"),
        )  # fmt: skip
        data.setup("fit")
        made, make = [16], data.worst_case_batch
        data.worst_case_batch = lambda size, train, make=make, made=made: (  # type: ignore[method-assign, misc]
            made.append(size),
            make(size, train),
        )[1]
        counted = Rows()
        counted.made = made
        use(counted, 20_000)
        module, losses = BGEClassifier(folder, optimizer=OptimizerConfig(lr=1e-3)), Losses()
        module.load_encoder_with(load)
        seed_everything(5)
        trainer = train(module, data, *finders, losses, gradient_clip_val=None)
        found.append((everything(module, trainer), losses.seen))
        if finders:
            assert len(made) > 5
            assert data.micro_batch_size % 16 == 0
            assert data.micro_batch_size == pytest.approx(0.9 * 1970, rel=0.06)
            assert module.oom_retry.records == []
    assert_same(*found)
