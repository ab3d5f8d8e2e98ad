"""What was found is kept by all that it depends on, and lowered."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_bge.callbacks.micro_batch import cache as cache_module
from lightning_bge.callbacks.micro_batch import finder as finder_module
from lightning_bge.callbacks.micro_batch.cache import FoundSize, MicroBatchSizes
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from lightning_bge.runtime.cache_dir import MICRO_BATCH_SIZES
from lightning_bge.runtime.memory import Limit
from tests.helpers.small_models import quiet_trainer
from tests.helpers.trial_steps import ALL, HELD, OPTIMIZERS, ROW, Foreign, Rows, Use, search, train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    pytest.mark.filterwarnings("ignore:Found . module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


def test_the_second_run_makes_no_trial_step(use: Use, tmp_path: Path) -> None:
    first, finder = search(use)
    assert finder.tried
    assert "as much as the limit is predicted to allow" in finder.reason
    used, total, limit = re.search(r"peak about (\S+) KiB of (\S+) KiB \((\w+)\)", finder.reason).groups()  # type: ignore[union-attr]
    assert (float(used), float(total)) == pytest.approx(((HELD + ROW * first.micro_batch_size) / 1024, 9.8), abs=0.06)
    assert limit == "RLIMIT_AS"
    for forget in (False, True):  # from this process, and from the file
        if forget:
            cache_module.forget()
        second, again = search(use)
        assert (second.set, second.made, again.tried, again.reason) == (first.set, [], [], finder.reason)
    [path] = (tmp_path / "cache" / MICRO_BATCH_SIZES).iterdir()
    assert path.stat().st_mode & 0o077 == 0


def test_what_a_step_takes_decides_what_is_found_again(use: Use) -> None:
    search(use)
    others: list[dict[str, Any]] = [
        {"total": 20_000},
        {"config": MemoryConfig(min_speedup=None, safety_margin=0.2)},
        {"module": Foreign(OPTIMIZERS["adamw"])},
        {"data": Rows(micro_batch_size_key={"max_length": 3})},
        {"data": Rows(step=3)},
        {"precision": "bf16-mixed"},
        {"gradient_clip_val": None},
    ]
    for changes in others:
        assert search(use, **changes)[0].made, changes
    larger, flagged, same = Foreign(), Foreign(), Foreign(lambda parameters: torch.optim.SGD(parameters, 0.3, 0.5))
    larger.head = nn.Linear(6, 2)
    flagged.body.gradient_checkpointing = True  # type: ignore[assignment]
    assert search(use, module=larger)[0].made
    assert search(use, module=flagged)[0].made
    same.body[2].p = 0.3  # rates change no memory, whether there is dropout does
    assert not search(use, module=same)[0].made
    same.body[2].p = 0.0
    assert search(use, module=same)[0].made


@pytest.mark.parametrize("stated", [False, True])
def test_what_others_hold_of_a_gpu_makes_another_key(stated: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    limit = Limit("the GPU's memory", 10_000, 0, stated=stated, raises=True)
    monkeypatch.setattr(finder_module, "limits", lambda *_: [limit])
    keys = []
    for share in (0, 3, 3):
        monkeypatch.setattr(finder_module, "others_share", lambda device, share=share: share)
        finder = MicroBatchFinder(ALL)
        finder._look_up(quiet_trainer(), Foreign(), Rows())
        keys.append(finder._key)
    assert keys[1] == keys[2]
    assert (keys[0] == keys[1]) == stated  # a limit that was set for this process is not shared


@pytest.mark.parametrize(("used", "share"), [(0, 0), (1, 0), (1.5, 1), (2, 1), (11, 1), (12, 2), (80, 8)])
def test_others_share_is_in_eighths(used: float, share: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Of 80 contexts, one of which this process needs itself."""
    context = finder_module.CONTEXT_BYTES
    monkeypatch.setattr(finder_module, "unreserved_use", lambda device: (int(used * context), 80 * context))
    assert finder_module.others_share(torch.device("cuda")) == share
    assert finder_module.others_share(torch.device("cpu")) == 0


def test_without_a_cache_only_this_process_remembers(use: Use, tmp_path: Path) -> None:
    config = MemoryConfig(min_speedup=None, cache=False)
    assert search(use, config=config)[0].made
    assert not search(use, config=config)[0].made
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "content", ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "micro_batch_size": ""}']
)
def test_a_damaged_file_is_replaced(use: Use, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    search(use, tmp_path)
    [path] = (tmp_path / MICRO_BATCH_SIZES).iterdir()
    path.write_text(content)
    cache_module.forget()
    assert search(use, tmp_path)[0].made
    assert caplog.text.count("can't be read") == 1
    cache_module.forget()
    assert not search(use, tmp_path)[0].made


def test_a_folder_that_cannot_be_written_is_said_once(
    use: Use, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    for _ in range(2):
        search(use, tmp_path / "file" / "cache")
    assert caplog.text.count("each process finds its own") == 1


@pytest.mark.parametrize("fails", [False, True])
def test_a_micro_batch_size_that_is_lowered_is_stored(use: Use, fails: bool) -> None:
    class Lowers(Callback):
        """As a callback or the module itself does it after an OOM."""

        def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
            if trainer.global_step == 3:
                trainer.datamodule.set_micro_batch_size(123)  # type: ignore[attr-defined]
                if fails:
                    raise torch.OutOfMemoryError("out of memory")

    data, finder = Rows(), MicroBatchFinder(ALL)
    use(data, 10_000)
    try:
        train(Foreign(), data, Lowers(), finder)
    except torch.OutOfMemoryError:
        assert fails
    assert finder.micro_batch_size == 123
    assert finder.reason.startswith("lowered from 8")
    finder.lower(200)  # no lower one
    assert finder.micro_batch_size == 123
    cache_module.forget()
    data, finder = search(use)
    assert (data.set, data.made) == ([123], [])
    # another process lowers it further
    [path] = finder._sizes.folder.iterdir()  # type: ignore[union-attr]
    path.write_text(json.dumps({**json.loads(path.read_text()), "micro_batch_size": 50}))
    assert search(use)[0].set == [50]


def test_a_larger_size_of_another_process_does_not_replace_a_lowered_one(tmp_path: Path) -> None:
    for found in (FoundSize(7, "found"), FoundSize(3, "lowered"), FoundSize(5, "found")):
        cache_module.forget()  # as in another process
        MicroBatchSizes(tmp_path).put("a", found)
    cache_module.forget()
    assert MicroBatchSizes(tmp_path).get("a") == FoundSize(3, "lowered")


def test_the_smallest_size_is_taken(tmp_path: Path) -> None:
    MicroBatchSizes(tmp_path).put("a", FoundSize(3, "found"))
    cache_module.forget()
    MicroBatchSizes(None).put("a", FoundSize(7, "found before"))
    assert MicroBatchSizes(tmp_path).get("a") == FoundSize(3, "found")
    assert MicroBatchSizes(tmp_path).get("b") is None
