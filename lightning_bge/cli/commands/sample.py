"""`lightning-bge sample FOLDER`: generated text pairs and a small model."""

from lightning_bge.cli.arguments import PlainParser
from lightning_bge.data.sample import write_sample
from lightning_bge.data.tables.readers import read_table
from lightning_bge.models.tiny_bert import build_tiny_bert
from lightning_bge.runtime.paths import check_folder
from lightning_bge.runtime.run_folder import create_run_dir


def run(args: list[str]) -> None:
    """Write `train.csv`, `test.csv` and `model/`."""
    parser = PlainParser(
        prog="lightning-bge sample", description="Write generated text pairs and a small BERT with its own tokenizer."
    )
    parser.add_argument("folder", help="The folder in which train.csv, test.csv and model/ are written.")
    parser.add_argument("--seed", type=int, default=0, help="Seed of the texts and of the model's weights.")
    chosen = parser.parse_args(args)
    check_folder("folder", chosen.folder, ("train.csv", "test.csv"), ("model",))
    folder = create_run_dir(chosen.folder)
    write_sample(folder, seed=chosen.seed)
    rows = read_table(folder / "train.csv", ("text", "criterion"))
    build_tiny_bert(folder / "model", [text for row in rows.texts for text in row], seed=chosen.seed)
    print(f"{folder}: train.csv, test.csv, model/")
