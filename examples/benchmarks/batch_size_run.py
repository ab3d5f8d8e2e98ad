"""One run of `batch_size_finder.py`: find a batch size under a limit on the address space, then train with it.

    python examples/benchmarks/batch_size_run.py ours mlp 200

It prints a line of JSON. The modules are plain torch, with a validation every epoch.
"""

from __future__ import annotations

import json
import resource
import sys
import time
import warnings
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import BatchSizeFinder
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from lightning_bge.callbacks import MemoryConfig, MicroBatchFinder
from lightning_bge.runtime.memory import process_bytes
from lightning_bge.runtime.oom import find_oom

FINDERS = ("ours", "lightning")
WARM_UP = 0.1  # of the rows, before the clock starts
CLASSES = 10


class Transformer(nn.Module):
    """Two encoder layers over tokens, and a classifier of their mean."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Embedding(1000, 128)
        layer = nn.TransformerEncoderLayer(128, 4, 256, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(128, CLASSES)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.head(self.encoder(self.embedding(tokens)).mean(1))


class Kind(NamedTuple):
    """A module to train: rows of its data, rows of an effective batch, and the shape of a sample."""

    rows: int
    batch_size: int
    shape: tuple[int, ...]


KINDS = {
    "mlp": Kind(32768, 4096, (512,)),
    "cnn": Kind(2048, 1024, (3, 32, 32)),
    "transformer": Kind(2048, 1024, (64,)),
}


def make_net(kind: str) -> nn.Module:
    if kind == "mlp":
        hidden = [part for _ in range(3) for part in (nn.Linear(512, 512), nn.GELU())]
        return nn.Sequential(*hidden, nn.Linear(512, CLASSES))
    if kind == "cnn":
        body = [nn.Conv2d(3, 16, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
        return nn.Sequential(*body, nn.MaxPool2d(2), nn.Flatten(), nn.Linear(32 * 8 * 8, CLASSES))
    return Transformer()


class Plain(LightningModule):
    """An ordinary module with an attribute `batch_size`, and random data."""

    def __init__(self, kind: str, share: float = 1.0) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.net, (rows, self.batch_size, shape) = make_net(kind), KINDS[kind]
        self.rows = max(int(rows * share), 64)
        random = torch.randint(1000, (self.rows, *shape)) if kind == "transformer" else torch.randn(self.rows, *shape)
        self.data = TensorDataset(random, torch.randint(CLASSES, (self.rows,)))

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch: list[Tensor], batch_idx: int) -> None:
        self.log("val_loss", self.training_step(batch, batch_idx))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.data, batch_size=self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(torch.utils.data.Subset(self.data, range(self.rows // 8)), batch_size=self.batch_size)


class Clock(Callback):
    """Samples a second of the epoch's batches, from the end of the batch that completes the warm-up on."""

    def __init__(self) -> None:
        self.seen = self.timed = self.batch_size = self.effective = 0
        self.since = self.seconds = 0.0

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count the batch."""
        now = time.perf_counter()
        self.batch_size = max(self.batch_size, len(batch[0]))  # the epoch may have fewer rows than was set
        self.effective = pl_module.batch_size * trainer.accumulate_grad_batches
        self.seen += len(batch[0])
        if self.since:
            self.timed, self.seconds = self.timed + len(batch[0]), now - self.since
        elif self.seen >= WARM_UP * pl_module.rows:
            self.since = now


def run(finder: str, kind: str, room: int, share: float = 1.0) -> dict[str, Any]:
    """Find and train an epoch.

    Args:
        finder: of `FINDERS`.
        kind: of `KINDS`.
        room: MiB of address space above what the process has when module and data are there.
        share: of the data.
    """
    warnings.filterwarnings("ignore")
    module, clock = Plain(kind, share), Clock()
    asked = module.batch_size
    ours = MicroBatchFinder(MemoryConfig(cache=False))
    off = dict.fromkeys(("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"), False)
    callback = ours if finder == "ours" else BatchSizeFinder(max_val=asked)
    if finder != "ours":
        module.batch_size = 2
    trainer = Trainer(**off, accelerator="cpu", max_epochs=1, callbacks=[callback, clock], num_sanity_val_steps=0)
    size = process_bytes()["VmSize"] + room * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (size, size))
    begin, end = time.perf_counter(), "finished"
    try:
        trainer.fit(module)
    except Exception as error:
        end = "out of memory" if find_oom(error) else f"{type(error).__name__}: {error}"[:200]
    return {
        "finder": finder,
        "module": kind,
        "room_mib": room,
        "end": end,
        "batch_size": clock.batch_size,
        "effective_batch": clock.effective,
        "reason": ours.reason if finder == "ours" else "",
        "samples_per_s": clock.timed / clock.seconds if end == "finished" and clock.seconds else None,
        "seconds": time.perf_counter() - begin,
    }


def main() -> None:
    finder, kind, room, *share = sys.argv[1:]
    print(json.dumps(run(finder, kind, int(room), *map(float, share))))


if __name__ == "__main__":
    main()
