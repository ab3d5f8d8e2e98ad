"""An audit as `audit.json` holds it, with a row of each verdict."""

from __future__ import annotations

from typing import Any


def row(name: str, verdict: str, group: str = "compute", **more: Any) -> dict[str, Any]:
    known = {"claimed": "on", "in_effect": "on", "evidence": "", "gain": None, "accuracy": "", "effort": ""}
    return {"group": group, "name": name, "verdict": verdict, **known, "advice": "", "yaml": "", **more}


GAIN = {"low": 0.31, "mid": 0.38, "high": 0.44, "kind": "measured", "text": "bf16 autocast against fp32, 5 rounds"}

AUDIT: dict[str, Any] = {
    "schema_version": 1,
    "machine": {"device": "cpu", "threads": 2, "torch": "2.13.0"},
    "rows": [
        row("bf16 matrix products", "lie", evidence="fp32 in 98.1 % of the products", gain=GAIN, in_effect="fp32 98 %",
            accuracy="fp32 weights stay", effort="one line", advice="set the precision",
            yaml="trainer.precision: bf16-mixed"),
        row("TF32", "not applicable", claimed="not said", in_effect="no CUDA device", evidence="TF32 is of CUDA"),
        row("dropout", "ok", evidence="24 of 24 dropout modules were in training mode"),
        row("cuDNN benchmark", "unknown", evidence="no optimizer step was seen to its end"),
        row("batch assembly", "off", group="data", claimed="2 workers", in_effect="2 workers", effort="one line",
            evidence="a batch takes 0.12 ms here, and 1.03 ms to be taken over", advice="assemble in this process",
            gain={"low": 0.01, "mid": 0.04, "high": 0.07, "kind": "predicted", "text": "from the measured wait"},
            yaml="data.batching.num_workers: 0"),
    ],
    "scorecard": [
        {"category": "compute", "score": 0.62, "now_ms": 148.2, "best_ms": 91.9, "why": "bf16 matrix products"},
        {"category": "data", "score": 0.96, "now_ms": 148.2, "best_ms": 142.3, "why": "batch assembly"},
        {"category": "search", "score": 0.27, "now_ms": 100.0, "best_ms": 27.0, "why": "pruning"},
    ],
    "step": {"total_ms": 148.2, "parts": {"matrix products": 93.5, "attention": 21.0, "host": 20.1, "other": 13.6}},
    "peak": {"dtype": "fp32", "peak_gflops": 185.0, "achieved_gflops": 96.2, "share": 0.52},
    "next": "Next: bf16 matrix products: set the precision; it brings 38 % of a step's time (31 % to 44 %, measured).",
}  # fmt: skip
