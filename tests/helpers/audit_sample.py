"""An audit as `audit.json` holds it, with a row of each verdict."""

from __future__ import annotations

from typing import Any


def row(name: str, verdict: str, group: str = "compute", **more: Any) -> dict[str, Any]:
    known = {"requested": "on", "in_effect": "on", "evidence": "", "time_saved": None, "fix": None}
    return {"group": group, "name": name, "verdict": verdict, **known, **more}


def fix(text: str, yaml: str, accuracy: str = "") -> dict[str, str]:
    return {"text": text, "yaml": yaml, "accuracy": accuracy, "effort": "one line"}


SAVED = {"low": 0.31, "mid": 0.38, "high": 0.44, "kind": "measured", "text": "bf16 autocast against fp32, 5 rounds"}

AUDIT: dict[str, Any] = {
    "schema_version": 2,
    "machine": {"device": "cpu", "threads": 2, "torch": "2.13.0"},
    "rows": [
        row("bf16 matrix products", "mismatch", evidence="fp32 in 98.1 % of the products", in_effect="fp32 98 %",
            time_saved=SAVED, fix=fix("set the precision", "trainer.precision: bf16-mixed", "fp32 weights stay")),
        row("TF32", "not applicable", requested="not stated", in_effect="no CUDA device", evidence="needs CUDA"),
        row("dropout", "ok", evidence="24 of 24 dropout modules were in training mode"),
        row("cuDNN benchmark", "unknown", evidence="no optimizer step ended while it was observed"),
        row("loader workers", "improve", group="data", requested="2", in_effect="2",
            evidence="assembling a batch takes 0.12 ms, receiving it from a worker 1.03 ms",
            time_saved={"low": 0.01, "mid": 0.04, "high": 0.07, "kind": "predicted", "text": "from the measured wait"},
            fix=fix("assemble batches in the training process", "data.batching.num_workers: 0")),
    ],
    "scorecard": [
        {"category": "compute", "score": 0.62, "now_ms": 148.2, "best_ms": 91.9, "why": "bf16 matrix products"},
        {"category": "data", "score": 0.96, "now_ms": 148.2, "best_ms": 142.3, "why": "loader workers"},
        {"category": "search", "score": 0.27, "now_ms": 100.0, "best_ms": 27.0, "why": "pruning"},
    ],
    "step": {"total_ms": 148.2, "parts": {"matrix products": 93.5, "attention": 21.0, "host": 20.1, "other": 13.6}},
    "peak": {"dtype": "fp32", "peak_gflops": 185.0, "achieved_gflops": 96.2, "share": 0.52},
    "next": "Next: bf16 matrix products: set the precision. This saves 38 % of a step's time (31 % to 44 %, measured).",
}  # fmt: skip
