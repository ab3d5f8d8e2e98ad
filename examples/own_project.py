"""Our callbacks in a Lightning project that uses nothing else of ours: a plain module with a frozen-looking encoder.

python examples/own_project.py
"""

from __future__ import annotations

import lightning as L
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from lightning_bge.callbacks import Throughput, TrainMode, choose_precision

Example = dict[str, Tensor]


class OwnModule(L.LightningModule):
    """Somebody else's module. Its encoder came out of `from_pretrained`, so it is in eval mode."""

    def __init__(self) -> None:
        super().__init__()
        self.encoder = nn.Sequential(nn.Embedding(100, 16), nn.Dropout(0.1)).eval()
        self.head = nn.Linear(16, 1)

    def training_step(self, batch: Example, batch_idx: int) -> Tensor:
        mask = batch["attention_mask"].unsqueeze(-1)
        pooled = (self.encoder(batch["input_ids"]) * mask).sum(1) / mask.sum(1)
        return nn.functional.binary_cross_entropy_with_logits(self.head(pooled).squeeze(-1), batch["label"])

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=1e-3)


def rows(count: int) -> list[Example]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(1, 100, (count, 12), generator=generator)
    mask = torch.arange(12) < torch.randint(4, 13, (count, 1), generator=generator)
    return [{"input_ids": i, "attention_mask": m, "label": (i[0] > 50).float()} for i, m in zip(ids, mask, strict=True)]


def main() -> L.Trainer:
    precision, why = choose_precision()
    print(f"precision {precision} would pay here: {why}")
    trainer = L.Trainer(
        max_epochs=2,
        callbacks=[TrainMode(), Throughput()],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(OwnModule(), DataLoader(rows(256), batch_size=32))
    print(f"{trainer.callback_metrics['train_tokens_per_s']:.0f} real tokens per second")
    return trainer


if __name__ == "__main__":
    main()
