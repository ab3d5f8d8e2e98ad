"""Train LoRA's factors instead of all weights, and export a model with the factors merged into its weights.

pip install 'lightning-bge[lora]'
lightning-bge sample runs/sample
python examples/lora.py
"""

from __future__ import annotations

from pathlib import Path

import lightning as L

from lightning_bge import BGEClassifier, TextDataModule


def main(
    model_name: str = "runs/sample/model",
    train_file: str = "runs/sample/train.csv",
    model_dir: str = "runs/lora/model",
    max_epochs: int = 3,
) -> Path:
    L.seed_everything(42)
    data = TextDataModule(model_name, train_file=train_file, text_columns=["text", "criterion"], group_column="post_id")
    # a LoRA run usually needs a higher learning rate than one that trains all weights
    model = BGEClassifier(model_name, lora={"r": 8, "alpha": 16}, optimizer={"lr": 1e-2})
    trainer = L.Trainer(max_epochs=max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    print(f"{trained:,} of {sum(p.numel() for p in model.parameters()):,} parameters were trained")
    return model.export(model_dir, data.new_tokenizer())


if __name__ == "__main__":
    print("exported model:", main())
