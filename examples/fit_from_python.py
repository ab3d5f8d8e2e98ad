"""Fine-tune an encoder with a plain Lightning Trainer, save it, and use the checkpoint in any other process.

lightning-bge sample runs/sample      # generated text pairs and a small model, so that nothing is downloaded
python examples/fit_from_python.py
"""

from __future__ import annotations

import lightning as L

from lightning_bge import BGEClassifier, TextDataModule
from lightning_bge.models.output.inference import TextPredictions


def main(
    model_name: str = "runs/sample/model", train_file: str = "runs/sample/train.csv", max_epochs: int = 3
) -> TextPredictions:
    L.seed_everything(42)
    data = TextDataModule(model_name, train_file=train_file, text_columns=["text", "criterion"], group_column="post_id")
    model = BGEClassifier(model_name, optimizer={"lr": 3e-3})
    trainer = L.Trainer(max_epochs=max_epochs, logger=False, enable_checkpointing=False)
    trainer.fit(model, datamodule=data)
    trainer.save_checkpoint("runs/fit_from_python.ckpt")

    restored = BGEClassifier.load_from_checkpoint("runs/fit_from_python.ckpt")
    return restored.predict([("the parcel came two weeks late", "complains about delivery")])


if __name__ == "__main__":
    print(main())
