"""Ways to save memory: what each one saves in training, and what it costs in speed.

    python examples/benchmarks/memory_saving.py

The contenders take turns (A B C A B C ...), each run in a fresh process. It loads weights, then memory is counted from
there: gradients, optimizer state and activations of full micro-batches, all sequences at `--max-length`, their token
ids drawn at random. After the warm-up steps, some more are timed, from the first forward pass to the last optimizer
step, with the device waited for at both ends. Number of threads: OMP_NUM_THREADS, the same for all. Give the machine
nothing else to do meanwhile.
"""

from __future__ import annotations

import os
import time
from argparse import ArgumentParser, Namespace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from common import add_shared_arguments, packaged_weights, print_table, write_record
from measures import Run, fresh, medians_of, model_shape, ratio_of, values_of, wait_for_device
from note import table, write_note

from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.optimizer import OptimizerConfig, build_optimizer, materialize_state
from lightning_bge.runtime.memory import process_bytes, release
from lightning_bge.runtime.nested_config import as_plain
from lightning_bge.types import MicroBatch

PLAIN = "all weights, all activations"
SIZES = (
    ("rounds", 3, "runs of each contender"),
    ("max-length", 512, "tokens of every sequence"),
    ("tokens", 8192, "of a micro-batch"),
    ("batch", 32, "sequences of an optimizer step"),
    ("warmup", 1, "steps before the clock starts"),
    ("steps", 3, "steps within the clock"),
    ("seed", 42, "of token ids and dropout"),
)
DEFINITIONS = """\
- **memory**: the peak above what was held once the weights were loaded: gradients, optimizer state, activations and
  what the libraries take for themselves. On a CPU the process's resident size (`VmHWM`, reset through
  `/proc/self/clear_refs` after `malloc_trim`); on a GPU `torch.cuda.max_memory_allocated`.
- **optimizer state, gradients**: MiB of the optimizer's tensors, and of the gradients of all trained parameters."""


def micro_batches(work: Namespace, vocabulary: int) -> list[MicroBatch]:
    """An effective batch: full micro-batches, the last one with what is left."""
    generator = torch.Generator().manual_seed(work.seed)
    size = max(work.tokens // work.max_length, 1)
    return [
        MicroBatch(
            input_ids=torch.randint(vocabulary, (count * work.max_length,), generator=generator),
            positions=torch.arange(work.max_length).repeat(count),
            cu_seqlens=torch.arange(count + 1, dtype=torch.int32) * work.max_length,
            lengths=(work.max_length,) * count,
            rows=torch.arange(count),
            labels=torch.randint(2, (count,), generator=generator).float(),
        ).to(work.device)
        for count in (min(size, work.batch - start) for start in range(0, work.batch, size))
    ]


def contenders(layers: int) -> dict[str, tuple[dict[str, Any], str]]:
    """Name -> arguments of the model, and optimizer; those whose package is missing are left out."""
    found = {
        PLAIN: ({}, "adamw"),
        "gradient checkpointing": ({"gradient_checkpointing": True}, "adamw"),
        "embeddings frozen": ({"frozen_layers": 0}, "adamw"),
        f"embeddings and {layers // 2} of {layers} layers frozen": ({"frozen_layers": layers // 2}, "adamw"),
    }
    if find_spec("peft"):
        found["LoRA of rank 8"] = ({"lora": LoRAConfig(r=8)}, "adamw")
    if find_spec("bitsandbytes"):
        found["8-bit AdamW"] = ({}, "adamw_8bit")
    return found


def run_contender(name: str, work: Namespace) -> Run:
    """One run: memory above the loaded weights, and samples/s; `work` is what `parse` gives."""
    options, optimizer_name = contenders(model_shape(work.model)["layers"])[name]
    net = load_classifier(work.model, 1, seed=work.seed, **options).to(work.device)
    batch = micro_batches(work, net.model.config.vocab_size)
    start = start_counting(work.device)
    optimizer = build_optimizer(net, OptimizerConfig(optimizer_name))  # type: ignore[arg-type]
    materialize_state(optimizer)
    torch.manual_seed(work.seed)
    since = 0.0
    for number in range(work.warmup + work.steps):
        if number == work.warmup:
            wait_for_device()
            since = time.perf_counter()
        for micro in batch:
            with torch.autocast(work.device, torch.bfloat16, enabled=work.precision == "bf16-mixed"):
                logits = net(micro)
            loss = F.binary_cross_entropy_with_logits(logits.squeeze(1), micro.labels, reduction="sum") / work.batch
            loss.backward()
        gradients = sum(p.grad.nbytes for p in net.parameters() if p.grad is not None)
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0, foreach=True)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
    wait_for_device()
    seconds = time.perf_counter() - since
    peak = torch.cuda.max_memory_allocated() if work.device == "cuda" else process_bytes()["VmHWM"]
    parts = [part for state in optimizer.state.values() for part in state.values() if torch.is_tensor(part)]
    return {
        "memory_mib": (peak - start) / 2**20,
        "state_mib": sum(part.nbytes for part in parts) / 2**20,
        "gradients_mib": gradients / 2**20,
        "seconds": seconds,
        "samples_per_s": work.batch * work.steps / seconds,
        "threads": torch.get_num_threads(),
        "config": {"model": as_plain(options), "optimizer": optimizer_name},
    }


def start_counting(device: str) -> int:
    """Give back what is free and forget the peak so far -> bytes that are held."""
    release()
    if device == "cuda":
        torch.cuda.reset_peak_memory_stats()
        return torch.cuda.memory_allocated()
    Path("/proc/self/clear_refs").write_text("5")
    return process_bytes()["VmRSS"]


FIELDS = ("memory_mib", "state_mib", "gradients_mib", "samples_per_s")


def summarize(runs: list[Run], names: list[str]) -> dict[str, Any]:
    """Medians of each contender, and memory and samples/s over those of `PLAIN`."""

    def ratio(name: str, field: str) -> dict[str, Any]:
        return ratio_of(values_of(runs, name, field), values_of(runs, PLAIN, field))

    ratios = {name: {field: ratio(name, field) for field in (FIELDS[0], FIELDS[-1])} for name in names[1:]}
    return {"medians": medians_of(runs, names, FIELDS), "ratios": ratios}


def rows_of(summary: dict[str, Any]) -> tuple[tuple[str, ...], list[tuple[Any, ...]]]:
    """Header and rows of the summary's table."""

    def over(name: str, field: str) -> str:
        if name == PLAIN:
            return "1"
        found = summary["ratios"][name][field]
        return f"{found['of_medians']:.2f} ({min(found['by_round']):.2f} to {max(found['by_round']):.2f})"

    rows = [
        (name, *(values[field] for field in FIELDS), over(name, "memory_mib"), over(name, "samples_per_s"))
        for name, values in summary["medians"].items()
    ]
    return ("median of the rounds", "memory, MiB", "optimizer state", "gradients", "samples/s", "memory", "speed"), rows


def parse(args: list[str] | None) -> Namespace:
    parser = ArgumentParser(description="What ways to save memory save and cost. Texts are made up: no --data.")
    add_shared_arguments(parser, "docs/benchmarks/memory_saving.json", lr=None)
    for name, default, text in SIZES:
        parser.add_argument(f"--{name}", type=int, default=default, help=f"{text} (default: {default})")
    parser.add_argument("--precision", choices=("bf16-mixed", "32-true"), default="bf16-mixed")
    given = parser.parse_args(args)
    given.model = given.model or packaged_weights()
    if given.device == "auto":
        given.device = "cuda" if torch.cuda.is_available() else "cpu"
    if given.device == "cpu" and not os.access("/proc/self/clear_refs", os.W_OK):
        raise SystemExit("peak memory on a CPU is read from Linux's /proc/self/clear_refs, which is not there")
    return given


def main(args: list[str] | None = None) -> None:
    work = parse(args)
    names = list(contenders(model_shape(work.model)["layers"]))
    runs: list[Run] = []
    for number in range(1, work.rounds + 1):
        for name in names:
            found = fresh(run_contender, name, work)
            runs.append({"contender": name, "round": number, **found})
            print(f"round {number}, {name}: {found['memory_mib']:.0f} MiB, {found['samples_per_s']:.2f} samples/s")
    summary = summarize(runs, names)
    print_table(*rows_of(summary))
    configs = {run["contender"]: run.pop("config") for run in runs}
    write_record(work.out, "memory_saving", work, {"contenders": configs, **summary, "runs": runs})
    about = (
        f"Optimizer steps over {work.batch} sequences of {work.max_length} tokens in micro-batches of {work.tokens} "
        f"tokens, {work.precision}, the dropout of the checkpoint; {work.rounds} rounds in turns, each run in a "
        f"fresh process: {work.warmup} untimed steps, then {work.steps} timed. Memory and speed on the right are "
        f"over those of `{PLAIN}`: of the medians, and from the lowest to the highest round."
    )
    note = write_note(work.out, "Saving memory", [about, table(*rows_of(summary)), DEFINITIONS])
    print(f"\n{work.out}\n{note}")


if __name__ == "__main__":
    main()
