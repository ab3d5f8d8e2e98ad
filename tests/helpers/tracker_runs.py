"""The runs in experiment trackers, read with the trackers' own readers, as plain data.

    python -m tests.helpers.tracker_runs mlflow URI
    python -m tests.helpers.tracker_runs wandb FOLDER
    python -m tests.helpers.tracker_runs tensorboard FOLDER

prints a JSON list of runs: name, status, tags, params, values, points (metric -> step -> value), files.
"""

from __future__ import annotations

import json
import struct
import sys
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path
from typing import Any

BLOCK, HEADER = 2**15, 7  # of LevelDB's log format, in which W&B writes offline runs; the file's own header has 7 too


def mlflow_runs(uri: str) -> list[dict[str, Any]]:
    """All runs of all experiments."""
    from mlflow import MlflowClient

    client = MlflowClient(uri)
    experiments = [one.experiment_id for one in client.search_experiments()]
    return [_mlflow_run(client, run) for run in client.search_runs(experiments, max_results=1000)]


def _mlflow_run(client: Any, run: Any) -> dict[str, Any]:
    history = {name: client.get_metric_history(run.info.run_id, name) for name in run.data.metrics}
    return {
        "id": run.info.run_id,
        "name": run.info.run_name,
        "status": run.info.status,
        "tags": run.data.tags,
        "params": run.data.params,
        "values": run.data.metrics,
        "points": {name: [[point.step, point.value] for point in points] for name, points in history.items()},
        "files": [file.path for file in client.list_artifacts(run.info.run_id)],
    }


def tensorboard_runs(folder: str) -> list[dict[str, Any]]:
    """A run for each folder of event files."""
    from tensorboard.backend.event_processing.event_multiplexer import EventMultiplexer
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    events = EventMultiplexer(size_guidance={"scalars": 0, "tensors": 0}).AddRunsFromDirectory(folder)
    events.Reload()
    runs = []
    for name, kinds in events.Runs().items():
        tags = {
            tag.removesuffix("/text_summary"): events.Tensors(name, tag)[-1].tensor_proto.string_val[0].decode()
            for tag in kinds["tensors"]
        }
        points = {tag: [[event.step, event.value] for event in events.Scalars(name, tag)] for tag in kinds["scalars"]}
        content = events.GetAccumulator(name).PluginTagToContent("hparams")
        start, end = (
            HParamsPluginData.FromString(content[f"_hparams_/session_{kind}_info"]) for kind in ("start", "end")
        )
        params = {key: value.number_value for key, value in start.session_start_info.hparams.items()}
        status = "FAILURE" if end.session_end_info.status == 2 else "SUCCESS"
        values = {tag: given[-1][1] for tag, given in points.items()}
        runs.append(
            {"id": name, "name": name, "status": status, "tags": tags, "params": params, "values": values}
            | {"points": points, "files": []}
        )
    return runs


def wandb_runs(folder: str) -> list[dict[str, Any]]:
    """A run for each folder of an offline run."""
    return [_wandb_run(path) for path in sorted(Path(folder).glob("offline-run-*/*.wandb"))]


def _wandb_run(path: Path) -> dict[str, Any]:
    from wandb.proto.wandb_internal_pb2 import Record

    found: dict[str, Any] = {"status": "RUNNING", "points": defaultdict(list)}
    config: dict[str, Any] = {}
    summary: dict[str, Any] = {}
    tags: list[str] = []
    for content in _records(path.read_bytes()):
        record = Record.FromString(content)
        kind = record.WhichOneof("record_type")
        if kind == "run":
            found |= {"id": record.run.run_id, "name": record.run.display_name, "group": record.run.run_group}
            tags = list(record.run.tags) or tags
            config |= {item.key: json.loads(item.value_json) for item in record.run.config.update}
        elif kind == "config":
            config |= {item.key: json.loads(item.value_json) for item in record.config.update}
        elif kind == "history":
            row = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            for name in row.keys() - {"trainer/global_step"}:
                if not name.startswith("_"):
                    found["points"][name].append([row["trainer/global_step"], row[name]])
        elif kind == "summary":
            summary |= {item.key: json.loads(item.value_json) for item in record.summary.update}
        elif kind == "exit":
            found["status"] = {0: "finished", 255: "killed"}.get(record.exit.exit_code, "failed")
    links = config.pop("trial", {})
    files = [str(file.relative_to(path.parent / "files")) for file in (path.parent / "files").iterdir()]
    return found | {"tags": links | {"tags": tags}, "params": config, "values": summary, "files": files}


def _records(data: bytes) -> Iterator[bytes]:
    """The records of LevelDB's log format: each in one or more chunks, none of which crosses a block."""
    at, whole = HEADER, b""
    while at + HEADER <= len(data):
        left = BLOCK - at % BLOCK
        if left < HEADER:
            at += left
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + HEADER])
        whole += data[at + HEADER : at + HEADER + length]
        at += HEADER + length
        if kind in (1, 4):  # the whole record, or its last chunk
            yield whole
            whole = b""


def main() -> None:
    """Print the runs."""
    readers = {"mlflow": mlflow_runs, "wandb": wandb_runs, "tensorboard": tensorboard_runs}
    print(json.dumps(readers[sys.argv[1]](sys.argv[2])))


if __name__ == "__main__":
    main()
