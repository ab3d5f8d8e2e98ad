"""FlagEmbedding's reranker on the pairs of `train_speed.py`, by a Python that has FlagEmbedding and nothing of ours.

`train_speed.py --flagembedding PYTHON` starts it: JSON on stdin (job, pairs, warmup_rows), a run as JSON on stdout.

FlagEmbedding trains groups: a query, a passage that answers it and others that don't; the loss is a cross-entropy over
the group. Pairs of premise and hypothesis make no such groups. So each pair is a group of its own: pairs, tokens,
forward, backward and optimizer step are those of the others, but the loss of a group of one is 0. That measures the
speed of its training loop, and nothing is learned.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from FlagEmbedding.abc.finetune.reranker import (
    AbsRerankerDataArguments,
    AbsRerankerModelArguments,
    AbsRerankerTrainingArguments,
)
from FlagEmbedding.finetune.reranker.encoder_only.base import EncoderOnlyRerankerRunner
from transformers import TrainerCallback


class Loop(TrainerCallback):
    """Seconds of the epochs."""

    def __init__(self) -> None:
        self.seconds = self.since = 0.0

    @staticmethod
    def now() -> float:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return time.perf_counter()

    def on_epoch_begin(self, *args: Any, **kwargs: Any) -> None:
        self.since = self.now()

    def on_epoch_end(self, *args: Any, **kwargs: Any) -> None:
        self.seconds += self.now() - self.since


def build(job: dict[str, Any], pairs: list[list[str]], folder: Path) -> Any:
    """FlagEmbedding's runner with its defaults, but for the job's settings."""
    file = folder / "train.jsonl"
    lines = [json.dumps({"query": a, "pos": [b], "neg": ["none"]}) for a, b in pairs]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")
    half = job["max_length"] // 2  # its limits are one of the query and one of the passage
    return EncoderOnlyRerankerRunner(
        model_args=AbsRerankerModelArguments(model_name_or_path=job["model"]),
        data_args=AbsRerankerDataArguments(
            train_data=[str(file)],
            cache_path=str(folder / "cache"),
            train_group_size=1,
            query_max_len=half,
            passage_max_len=half,
        ),
        training_args=AbsRerankerTrainingArguments(
            output_dir=str(folder / "out"),
            num_train_epochs=job["epochs"],
            per_device_train_batch_size=job["batch"],
            learning_rate=job["lr"],
            seed=job["seed"],
            save_strategy="no",
            report_to="none",
            disable_tqdm=True,
            use_cpu=job["device"] == "cpu",
        ),
    )


def train(job: dict[str, Any], pairs: list[list[str]]) -> dict[str, Any]:
    with tempfile.TemporaryDirectory() as folder:
        runner, loop = build(job, pairs, Path(folder)), Loop()
        lengths = [len(item["input_ids"]) for row in range(len(pairs)) for item in runner.train_dataset[row][0]]
        runner.trainer.add_callback(loop)
        since = loop.now()
        runner.trainer.train()
        call_seconds = loop.now() - since
    return {
        "loop_seconds": loop.seconds,
        "call_seconds": call_seconds,
        "sequences": len(lengths),
        "tokens": sum(lengths),
        "length_squares": sum(length * length for length in lengths),
        "samples_per_s": len(lengths) / loop.seconds,
        "tokens_per_s": sum(lengths) / loop.seconds,
        "dtype": "fp32",
        "config": {
            "groups": "each pair is a group of its own: the loss is 0, nothing is learned",
            "tokenizes": "in the loop",
            "versions": {name: version(name) for name in ("FlagEmbedding", "transformers", "torch")},
        },
        "threads": torch.get_num_threads(),
    }


def peak_memory_mib() -> float | None:
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    status = Path("/proc/self/status")
    if not status.is_file():
        return None
    return int(dict(line.split(":", 1) for line in status.read_text().splitlines())["VmHWM"].split()[0]) / 2**10


def main() -> None:
    given = json.load(sys.stdin)
    with contextlib.redirect_stdout(sys.stderr):
        if given["warmup_rows"]:
            train(given["job"], given["pairs"][: given["warmup_rows"]])
        run = {**train(given["job"], given["pairs"]), "peak_memory_mib": peak_memory_mib()}
    print(json.dumps(run))


if __name__ == "__main__":
    main()
