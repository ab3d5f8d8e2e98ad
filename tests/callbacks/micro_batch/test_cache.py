"""What was found is kept by all that it depends on, and lowered."""

from __future__ import annotations

import json
import threading
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from torch import nn

from lightning_bge.callbacks.micro_batch import cache as cache_module
from lightning_bge.callbacks.micro_batch.cache import FILE, FoundSize, MicroBatchSizes
from lightning_bge.callbacks.micro_batch.config import MemoryConfig
from lightning_bge.callbacks.micro_batch.finder import MicroBatchFinder
from tests.helpers.trial_steps import ALL, HELD, OPTIMIZERS, ROW, Foreign, Rows, Use, search, train

pytestmark = [
    pytest.mark.usefixtures("forgetful"),
    pytest.mark.filterwarnings("ignore:Found . module.* in eval mode"),
    pytest.mark.filterwarnings("ignore:Trying to infer the `batch_size`"),
    pytest.mark.filterwarnings("ignore:It is recommended to use `self.log"),
]


def test_the_second_run_makes_no_trial_step(use: Use, tmp_path: Path) -> None:
    first, finder = search(use)
    assert not finder.describe()["from_cache"]
    for forget in (False, True):  # from this process, and from the file
        if forget:
            cache_module.forget()
        second, finder = search(use)
        assert (second.set, second.made) == (first.set, [])
        described = finder.describe()
        assert described["from_cache"]
        assert json.loads(json.dumps(described)) == described or not forget
        assert (described["limit"], described["limit_bytes"], described["safety_margin"]) == ("RLIMIT_AS", 10_000, 0.1)
        assert described["peak"] == HELD + ROW * first.micro_batch_size
        assert "as much as the limit is predicted to allow" in described["reason"]
    path = tmp_path / "cache" / FILE
    assert path.stat().st_mode & 0o077 == 0
    assert sorted(file.name for file in path.parent.iterdir()) == [FILE, f"{FILE}.lock"]


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


def test_without_a_cache_only_this_process_remembers(use: Use, tmp_path: Path) -> None:
    config = MemoryConfig(min_speedup=None, cache=False)
    assert search(use, config=config)[0].made
    assert not search(use, config=config)[0].made
    assert not (tmp_path / "cache").exists()


@pytest.mark.parametrize(
    "content",
    ["", "{", "[]", '{"schema_version": 1}', '{"schema_version": 1, "sizes": {"a": {"micro_batch_size": -1}}}'],
)
def test_a_damaged_file_is_put_aside(use: Use, tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture) -> None:
    tmp_path.joinpath(FILE).write_text(content)
    data, _ = search(use, tmp_path)
    assert data.made
    assert (tmp_path / "micro_batch_sizes.damaged").read_text() == content
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


def test_many_writers_lose_nothing(tmp_path: Path) -> None:
    def write(first: int) -> None:
        for number in range(first, first + 20):
            MicroBatchSizes(tmp_path).put(str(number), FoundSize(number + 1, ""))

    threads = [threading.Thread(target=write, args=(20 * number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    cache_module.forget()
    assert [MicroBatchSizes(tmp_path).get(str(number)) for number in (0, 19, 79)] == [
        FoundSize(number + 1, "") for number in (0, 19, 79)
    ]
    assert len(json.loads((tmp_path / FILE).read_text())["sizes"]) == 80


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
    entries = json.loads((finder._sizes.folder / FILE).read_text())["sizes"]  # type: ignore[operator]
    [(key, entry)] = entries.items()
    known = dict(cache_module._known)
    MicroBatchSizes(finder._sizes.folder).put(key, FoundSize(**{**entry, "micro_batch_size": 50}))
    cache_module._known.update(known)
    assert search(use)[0].set == [50]
