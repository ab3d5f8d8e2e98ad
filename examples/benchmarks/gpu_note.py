"""The Markdown note of a GPU suite's record."""

from __future__ import annotations

from typing import Any

from common import markdown_table

# Of a contender, medians over its rounds.
FIGURES = (
    "step_ms",
    "host_ms",
    "samples_per_s",
    "tokens_per_s",
    "utilisation",
    "peak_gib",
    "warmup_seconds",
)

# Of a limit on memory.
LIMIT_FIGURES = (
    "fraction",
    "micro_batch_size",
    "search_s",
    "tries",
    "peak_gib",
    "runs",
    "failed_runs",
    "larger_failed",
)


def note_of(record: dict[str, Any]) -> str:
    """The note in Markdown, from the record alone."""
    hardware, versions = record["hardware"], record["versions"]
    lines = [
        "# Training speed on one GPU",
        "Written by `examples/benchmarks/gpu_suite.py` from the JSON beside this note; what is measured, and how: "
        "[gpu.md](gpu.md).",
        f"{record['written']}, {hardware['gpu'] or hardware['cpu']}, commit {record['git_commit']}, "
        + ", ".join(f"{name} {versions[name]}" for name in ("python", "torch", "lightning", "transformers"))
        + f". Weights: {record['weights']}. Measured peak of bf16 matrix products: "
        f"{record['peak_flops_per_s'] / 1e12:.4g} TFLOP/s. {record['seconds']:.0f} s in all.",
    ]
    if record["options"]["tiny"]:
        lines.append("**The tiny form: it shows that the suite runs. No figure here says anything about speed.**")
    for name, part in record["parts"].items():
        lines += [f"## {name}", *part_tables(part)]
    for title, listed in (("Left out", record["skipped"]), ("Failed", record["failed"])):
        if listed:
            lines += [f"## {title}", "\n".join(f"- {' - '.join(entry.values())}" for entry in listed)]
    return "\n\n".join(lines) + "\n"


def part_tables(part: dict[str, Any]) -> list[str]:
    """The tables of one part."""
    found = []
    if "contenders" in part:
        rows = [(name, *(short(entry["median"][f]) for f in FIGURES)) for name, entry in part["contenders"].items()]
        found.append(markdown_table(("median of the rounds", *FIGURES), rows))
    if part.get("limits"):
        rows = [tuple(short(entry[figure]) for figure in LIMIT_FIGURES) for entry in part["limits"]]
        found.append(markdown_table(LIMIT_FIGURES, rows))
    if part.get("ratios"):
        ratios = part["ratios"].items()
        rows = [
            (name, *(short(x) for x in (r["of_medians"], min(r["by_round"]), max(r["by_round"])))) for name, r in ratios
        ]
        found.append(markdown_table(("ratio of samples/s", "of medians", "lowest round", "highest round"), rows))
    plain = {
        **part.get("floor", {}),
        **{k: v for k, v in part.items() if isinstance(v, float | None) and k != "seconds"},
    }
    if plain:
        found.append(markdown_table(("figure", "value"), [(name, short(value)) for name, value in plain.items()]))
    for name, values in part.items():
        if isinstance(values, dict) and "relative_error" in values:
            found.append(f"{name}: " + ", ".join(f"{key} {short(value)}" for key, value in values.items()))
    if part.get("longest"):
        rows = [tuple(short(value).replace("|", "/") for value in entry.values()) for entry in part["longest"]]
        found.append(markdown_table(("kernel", "calls a step", "ms a step"), rows))
    if part.get("sync_places"):
        found.append("Waits at: " + ", ".join(f"{place} ({count})" for place, count in part["sync_places"].items()))
    return found


def short(value: Any) -> str:
    """A number with four significant digits."""
    return "-" if value is None else f"{value:.4g}" if isinstance(value, float) else str(value)
