"""Use an exported model without this package: transformers and sentence-transformers load its folder directly.

make hpo                              # writes runs/quickstart/model
pip install sentence-transformers
python examples/inference_from_an_export.py
"""

from __future__ import annotations

import json
from pathlib import Path

from sentence_transformers import CrossEncoder

PAIRS = [
    ("the parcel came two weeks late", "complains about delivery"),
    ("the lamp is bright and the price was fair", "complains about delivery"),
]


def main(model_dir: str = "runs/quickstart/model") -> list[tuple[float, bool]]:
    threshold = json.loads(Path(model_dir, "lightning_bge.json").read_text())["threshold"]
    scores = CrossEncoder(model_dir).predict(PAIRS).tolist()
    return [(score, score >= threshold) for score in scores]


if __name__ == "__main__":
    for pair, (score, decision) in zip(PAIRS, main(), strict=True):
        print(f"{score:.3f}  {'yes' if decision else 'no':<4}{pair}")
