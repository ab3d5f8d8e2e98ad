"""The same audit twice, and three sleeps: do two audits order the savings alike, and do they find planted sleeps?

    python examples/benchmarks/audit_twice.py CONFIG --out docs/benchmarks/audit_twice.json [--time_limit 150 ...]

CONFIG is a YAML file as for `lightning-bge audit -c`; all further flags are those of the two audits. Each audit runs
the command in a process of its own. A pair of rows counts where the intervals of the two savings do not overlap in
either audit; the two audits are to agree on which is the larger. The sleeps are planted one at a time, in the data set,
in a callback between the batches, and in `training_step`; the time in the row is compared with that of the same row
without a sleep.
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

# the row that is to find a sleep -> the code that plants it
PLANTS = {
    "data wait": """
from lightning_bge.data.batches.micro_batches import EncodedDataset
inner = EncodedDataset.__getitem__
def slow(self, rows):
    time.sleep(SLEEP)
    return inner(self, rows)
EncodedDataset.__getitem__ = slow
""",
    "callbacks and loop": """
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
        arguments = ["audit", "-c", str(config), "--run_dir", folder, *flags]
        since = time.perf_counter()
        subprocess.run([sys.executable, "-c", code, *arguments], check=True, capture_output=True)
        found = json.loads((Path(folder) / "audit.json").read_text(encoding="utf-8"))
    return {"wall_seconds": time.perf_counter() - since, **found}


def savings(found: dict[str, Any]) -> dict[str, dict[str, float]]:
    """The measured savings of an audit by row."""
    by_row = {row["name"]: row["time_saved"] for row in found["rows"] if row["time_saved"]}
    return {name: saved for name, saved in by_row.items() if saved["kind"] == "measured"}


def compare(first: dict[str, Any], second: dict[str, Any]) -> dict[str, Any]:
    """Pairs of rows whose intervals do not overlap, in both audits: how many, and those that they order differently."""
    one, two = savings(first), savings(second)
    pairs, differ = 0, []
    for a, b in combinations(sorted(one.keys() & two.keys()), 2):
        if all(found[a]["high"] < found[b]["low"] or found[b]["high"] < found[a]["low"] for found in (one, two)):
            pairs += 1
            if (one[a]["mid"] < one[b]["mid"]) != (two[a]["mid"] < two[b]["mid"]):
                differ.append([a, b])
    return {"rows": sorted(one.keys() & two.keys()), "pairs": pairs, "differ": differ}


def milliseconds(found: dict[str, Any], name: str) -> float:
    """The time in a row."""
    [row] = [row for row in found["rows"] if row["name"] == name]
    return float(row["in_effect"].split()[0])


def note(record: dict[str, Any]) -> str:
    """The Markdown beside the JSON."""
    one, two = (savings(found) for found in record["audits"])

    def cell(saved: dict[str, float]) -> str:
        return f"{saved['mid']:.1%} ({saved['low']:.1%} to {saved['high']:.1%})"

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
        f"Time saved as a share of a step, with 95 % intervals. Of the {agreement['pairs']} pairs of rows whose "
        f"intervals do not overlap in either audit, the two audits order {len(agreement['differ'])} differently.\n\n"
        f"{markdown_table(['row', 'first audit', 'second audit'], rows)}\n\n"
        "Milliseconds a batch in the row with the sleep, less those without it:\n\n"
        f"{markdown_table(['row', 'planted, ms', 'found, ms', 'share'], planted)}\n"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("config", type=Path)
    parser.add_argument("--out", type=Path, required=True)
    chosen, flags = parser.parse_known_args()
    audits = [audit(chosen.config, "", *flags), audit(chosen.config, "", *flags)]
    planted = {}
    for name, code in PLANTS.items():
        found = milliseconds(audit(chosen.config, code, "--rounds", "0"), name)
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
