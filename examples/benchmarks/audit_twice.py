"""Is an audit's order of gains reproducible, and does it find what was planted? The same audit twice, and three sleeps.

    python examples/benchmarks/audit_twice.py CONFIG --out docs/benchmarks/audit_twice.json [--seconds 150 ...]

CONFIG is a YAML file as `lightning-bge audit -c` takes it; all further flags are those of the two audits. Each audit is
the program's own, in a process of its own. A pair of rows counts where the intervals of the two gains do not overlap in
both audits; the two are to agree on which is the larger. The sleeps are planted one at a time, in the data set, in a
callback between the batches, and in `training_step`; what the row says is compared with what the same row says without
a sleep.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from itertools import combinations
from pathlib import Path
from typing import Any

from common import git_commit, hardware, markdown_table, versions

from lightning_bge.runtime.run_folder import write_json, write_text

# the row that has to find it, and the code that plants it
PLANTS = {
    "data wait": """
from lightning_bge.data.batches.micro_batches import EncodedDataset
inner = EncodedDataset.__getitem__
def slow(self, rows):
    time.sleep(SLEEP)
    return inner(self, rows)
EncodedDataset.__getitem__ = slow
""",
    "callbacks and the loop": """
from lightning_bge.callbacks import TorchBackends
def slow(self, *args):
    time.sleep(SLEEP)
TorchBackends.on_train_batch_end = slow
""",
    "host time within a step": """
from lightning_bge.models import BGEClassifier
inner = BGEClassifier.training_step
def slow(self, batch, batch_idx):
    time.sleep(SLEEP)
    return inner(self, batch, batch_idx)
BGEClassifier.training_step = slow
""",
}
SLEEP = 0.2


def audit(config: Path, plant: str = "", *flags: str) -> dict[str, Any]:
    """One audit, with its seconds."""
    with tempfile.TemporaryDirectory() as folder:
        code = f"import time\nSLEEP = {SLEEP}\n{plant}\nfrom lightning_bge.cli.main import main\nmain()"
        words = ["audit", "-c", str(config), "--run_dir", folder, *flags]
        since = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *words], check=True, capture_output=True)
        found = json.loads((Path(folder) / "audit.json").read_text(encoding="utf-8"))
    return {"wall_seconds": time.perf_counter() - since, **found}


def gains(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The measured gains of an audit by row."""
    return {row["name"]: row["gain"] for row in found["rows"] if (row["gain"] or {}).get("kind") == "measured"}


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Pairs of rows whose intervals do not overlap, in both audits: how many, and those that they order differently."""
    one, two = gains(first), gains(second)
    pairs, differ = 0, []
    for a, b in combinations(sorted(one.keys() & two.keys()), 2):
        if all(found[a]["high"] < found[b]["low"] or found[b]["high"] < found[a]["low"] for found in (one, two)):
            pairs += 1
            if (one[a]["mid"] < one[b]["mid"]) != (two[a]["mid"] < two[b]["mid"]):
                differ.append([a, b])
    return {"rows": sorted(one.keys() & two.keys()), "pairs": pairs, "differ": differ}


def milliseconds(found: dict[str, Any], name: str) -> float:
    """What a row about time says."""
    [row] = [row for row in found["rows"] if row["name"] == name]
    return float(row["in_effect"].split()[0])


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    one, two = (gains(found) for found in record["audits"])

    def cell(gain: dict[str, float]) -> str:
        return f"{gain['mid']:.1%} ({gain['low']:.1%} to {gain['high']:.1%})"

    rows = [[name, cell(one[name]), cell(two[name])] for name in record["agreement"]["rows"]]
    planted = [
        [
            name,
            f"{1000 * record['sleep_s']:.0f}",
            f"{p['found_ms']:.1f}",
            f"{p['found_ms'] / 1000 / record['sleep_s']:.1%}",
        ]
        for name, p in record["planted"].items()
    ]
    agreement, with_flags = record["agreement"], f", {' '.join(record['flags'])}" if record["flags"] else ""
    return (
        "# The same audit twice, and three planted sleeps\n\n"
        f"Written {record['written']} at commit {record['git_commit']} by `examples/benchmarks/audit_twice.py`, on "
        f"{record['hardware']['cpu']}, {record['hardware']['threads']} threads{with_flags}. The audits took "
        f"{' and '.join(format(found['wall_seconds'], '.0f') for found in record['audits'])} s.\n\n"
        f"Gains, shares of a step's time with their 95 % intervals. Of the {agreement['pairs']} pairs of rows whose "
        f"intervals do not overlap in either audit, the two order {len(agreement['differ'])} differently.\n\n"
        f"{markdown_table(['row', 'first audit', 'second audit'], rows)}\n\n"
        "Milliseconds a batch that the row says more than without the sleep:\n\n"
        f"{markdown_table(['row', 'planted, ms', 'found, ms', 'of it'], planted)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen, flags = parser.parse_known_args()
    audits = [audit(chosen.config, "", *flags), audit(chosen.config, "", *flags)]
    planted = {}
    for name, code in PLANTS.items():
        # else the loader would measure that batches take long to assemble, and let workers do it ahead of time
        found = milliseconds(audit(chosen.config, code, "--rounds", "0", "--data.batching.num_workers", "0"), name)
        planted[name] = {"found_ms": found - milliseconds(audits[0], name)}
    record = {
        "written": time.strftime("%Y-%m-%d"),
        "git_commit": git_commit(),
        "hardware": hardware(),
        "versions": versions(),
        "flags": flags,
        "sleep_s": SLEEP,
        "agreement": compare(*audits),
        "planted": planted,
        "audits": audits,
    }
    write_json(chosen.out, record)
    write_text(chosen.out.with_suffix(".md"), text := note(record))
    print(text)


if __name__ == "__main__":
    main()
