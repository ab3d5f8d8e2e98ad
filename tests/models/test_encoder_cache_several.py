"""Several encoders within a limit: the same results as fresh loads, few loads, the least recently used dropped."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.core.optimizer import LightningOptimizer

from lightning_bge.errors import UserError
from lightning_bge.models import encoder_cache as module
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, load_classifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.memory_saving.oom_retry import OOMRetry
from lightning_bge.runtime.memory import Limit, cache_bytes, live_bytes, shrink_caches
from tests.helpers.short_training import train
from tests.helpers.small_models import cut_batch, random_sequences, small_model

PLENTY = 2**30
Folder = Callable[..., str]


@pytest.fixture
def folder(tmp_path: Path) -> Folder:
    def save(kind: str = "bert", name: str = "a", **changes: int) -> str:
        path = tmp_path / f"{kind}-{name}"
        if not path.exists():
            small_model(kind, outputs=3, dropout=0.2, seed=ord(name), **changes).save_pretrained(path)
        return str(path)

    return save


def assert_as_fresh(cache: EncoderCache, path: str, **options: object) -> None:
    expected = train(load_classifier(path, 1, **options))  # type: ignore[arg-type]
    for found, wanted in zip(train(cache.load(path, 1, **options)), expected, strict=True):  # type: ignore[arg-type]
        assert torch.equal(found, wanted)


@pytest.mark.parametrize("kinds", [("bert", "roberta"), ("modernbert", "bert"), ("deberta-v2", "xlm-roberta")])
def test_alternating_models_equal_fresh_loads_bit_for_bit_and_are_read_once(
    folder: Folder, kinds: tuple[str, str]
) -> None:
    cache = EncoderCache(PLENTY)
    for kind in (*kinds, *kinds, kinds[1], kinds[0]):
        assert_as_fresh(cache, folder(kind))
    assert cache.loads == 2


def test_dropout_seeds_lora_and_frozen_layers_change_between_models(folder: Folder) -> None:
    cache = EncoderCache(PLENTY)
    one, other = folder(name="a"), folder(name="b")
    assert_as_fresh(cache, one, dropout=0.4, seed=1)
    assert_as_fresh(cache, other, frozen_layers=1, gradient_checkpointing=True)
    assert_as_fresh(cache, one)  # another seed
    assert_as_fresh(cache, one, lora=LoRAConfig(2))
    assert_as_fresh(cache, other)
    assert cache.loads == 4
    assert_as_fresh(cache, one, lora=LoRAConfig(2))
    assert_as_fresh(cache, one, dropout=0.0)
    assert cache.loads == 4


def test_other_dropout_of_an_architecture_that_is_built_by_it_is_kept_beside(folder: Folder) -> None:
    cache = EncoderCache(PLENTY)
    path = folder("modernbert")
    for dropout in (0.1, 0.3, 0.1, None, 0.3):
        assert_as_fresh(cache, path, dropout=dropout)
    assert cache.loads == 2 + 2 + 1  # where dropout is set, it is read once more to find out how it is built


def test_by_default_only_the_one_in_use_is_entries(folder: Folder) -> None:
    cache = EncoderCache()
    first = weakref.ref(cache.load(folder(name="a"), 1))
    one = cache.nbytes
    cache.load(folder(name="b"), 1)
    assert first() is None
    assert cache.nbytes == one
    cache.load(folder(name="a"), 1)
    assert cache.loads == 3


def sizes(folder: Folder, path: str) -> tuple[int, int]:
    """Bytes of a waiting encoder, and of one in use."""
    cache = EncoderCache(PLENTY)
    cache.load(path, 1)
    used = cache.nbytes
    assert cache._entries[0].idle_size * 2 == pytest.approx(used, rel=0.02)  # but for buffers
    return cache._entries[0].idle_size, used


def test_the_least_recently_used_is_dropped_first_until_the_limit_holds(folder: Folder) -> None:
    idle, used = sizes(folder, folder(name="a"))
    cache = EncoderCache(used + 2 * idle)
    for name in "abc":
        cache.load(folder(name=name), 1)
        assert cache.nbytes <= cache.capacity
    assert cache.nbytes == cache.capacity
    cache.load(folder(name="a"), 1)  # now b is the oldest
    assert cache.loads == 3
    dropped = weakref.ref(cache._entries[0].net)
    cache.load(folder(name="d"), 1)
    assert dropped() is None
    assert cache.nbytes == cache.capacity
    for name in "acd":
        cache.load(folder(name=name), 1)
    assert cache.loads == 4
    cache.load(folder(name="b"), 1)
    assert cache.loads == 5


def test_one_byte_less_and_one_fewer_is_kept(folder: Folder) -> None:
    idle, used = sizes(folder, folder(name="a"))
    cache = EncoderCache(used + 2 * idle - 1)
    for name in "abca":
        cache.load(folder(name=name), 1)
    assert cache.loads == 4
    assert cache.nbytes == used + idle


def test_an_encoder_larger_than_the_limit_works_alone(folder: Folder) -> None:
    small, large = folder(name="a"), folder(name="b", hidden_size=64)
    idle, used = sizes(folder, small)
    cache = EncoderCache(used + idle)
    for path in (small, large, small):
        assert_as_fresh(cache, path)
        assert len(cache._entries) == 1
    assert cache.loads == 3


def test_no_second_encoder_is_there_while_one_is_read_that_does_not_fit_beside_it(
    folder: Folder, monkeypatch: pytest.MonkeyPatch
) -> None:
    idle, used = sizes(folder, folder(name="a"))
    cache, held = EncoderCache(used + idle - 1), []

    def load(*args: object, **options: object) -> TextClassifier:
        held.append(cache.nbytes)
        return load_classifier(*args, **options)  # type: ignore[arg-type]

    monkeypatch.setattr(module, "load_classifier", load)
    for name in "aba":
        cache.load(folder(name=name), 1)
    assert held == [0, 0, 0]


def test_a_waiting_encoder_holds_its_first_weights_alone_and_no_gradients(folder: Folder) -> None:
    idle, used = sizes(folder, folder(name="a"))
    gc.collect()
    cache, before = EncoderCache(PLENTY), live_bytes()
    net = cache.load(folder(name="a"), 1)
    net(cut_batch(random_sequences((3,), seed=1), torch.zeros(1), 3).micro[0]).sum().backward()
    cache.load(folder(name="b"), 1)
    del net
    gc.collect()
    assert cache.nbytes == idle + used
    assert live_bytes() - before - cache.nbytes <= 2**10


def test_compiled_layers_stay_compiled(folder: Folder) -> None:
    cache = EncoderCache(PLENTY)
    layer = cache.load(folder(name="a"), 1).model.base_model.encoder.layer[0]
    layer.compile(backend="eager")
    cache.load(folder(name="b"), 1)
    assert cache.load(folder(name="a"), 1).model.base_model.encoder.layer[0] is layer
    assert layer._compiled_call_impl is not None


def test_a_model_that_is_not_there_leaves_the_others(folder: Folder, tmp_path: Path) -> None:
    cache = EncoderCache(PLENTY)
    for name in "ab":
        cache.load(folder(name=name), 1)
    with pytest.raises(UserError, match="nowhere"):
        cache.load(str(tmp_path / "nowhere"), 1)
    loads = cache.loads
    assert_as_fresh(cache, folder(name="b"))
    assert_as_fresh(cache, folder(name="a"))
    assert cache.loads == loads


# ---------------------------------------------------------------------- memory


def test_waiting_ones_are_dropped_where_memory_runs_out(folder: Folder) -> None:
    cache = EncoderCache(PLENTY)
    for name in "ab":
        net = cache.load(folder(name=name), 1)
    idle, used = cache._entries[0].idle_size, cache._entries[1].size
    batch = cut_batch(random_sequences((9, 7), seed=1), torch.zeros(2), 2)
    retry, held = OOMRetry(), []

    def compute(cut: object) -> None:
        held.append(cache.nbytes)
        retry.at("forward", batch.micro[0])
        if len(held) == 1:
            raise MemoryError

    retry.run(compute, batch, net, source=None, training=True)
    assert held == [idle + used, used]
    assert cache.load(folder(name="b"), 1) is net
    cache.load(folder(name="a"), 1)
    assert cache.loads == 3


def test_they_are_dropped_in_the_optimizer_too(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    called = []
    monkeypatch.setattr("lightning_bge.runtime.oom.shrink_caches", lambda: called.append(True))
    model = BGEClassifier(folder())
    model.net = load_classifier(folder(), 1)
    model.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    optimizer = LightningOptimizer(torch.optim.AdamW(model.net.parameters()))
    failing = iter([MemoryError(), None])

    def step() -> None:
        if (error := next(failing)) is not None:
            raise error

    monkeypatch.setattr(optimizer, "step", step)
    monkeypatch.setattr(BGEClassifier, "global_step", 0)
    model._update(optimizer)
    assert called == [True]


def test_the_share_is_that_of_the_tightest_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    known = [Limit("a", 8 * 2**20, 0), Limit("b", 4 * 2**20, 0, stated=False)]

    def limits(device: torch.device, given: int | None) -> list[Limit]:
        assert device.type == "cpu"
        return known if given is None else [*known, Limit("given", given, 0)]

    monkeypatch.setattr(module, "limits", limits)
    assert EncoderCache(None).capacity == 2**20
    assert EncoderCache(None, granted=2**20).capacity == 2**18
    known.clear()
    assert EncoderCache(None).capacity == 0
    assert EncoderCache(7).capacity == 7


def test_of_what_is_free_at_most_half_is_taken(folder: Folder, monkeypatch: pytest.MonkeyPatch) -> None:
    idle, used = sizes(folder, folder(name="a"))
    total = 100 * used
    free = total
    monkeypatch.setattr(module, "limits", lambda *_: [Limit("a", total, total - free)])
    cache = EncoderCache(None)
    for name in "abc":
        cache.load(folder(name=name), 1)
    assert len(cache._entries) == 3
    free = 2 * (used + idle) - (2 * idle + used)  # as other processes hold the rest: there is room for one that waits
    cache.load(folder(name="a"), 1)
    assert len(cache._entries) == 2
    assert EncoderCache(PLENTY)._free_capacity() == PLENTY  # asked for


def test_what_may_yet_be_taken_is_known_as_long_as_it_lives(folder: Folder) -> None:
    gc.collect()
    before = cache_bytes()
    EncoderCache()
    cache = EncoderCache(PLENTY)
    assert cache_bytes() == (before[0] + PLENTY, before[1] + PLENTY)
    cache.load(folder(), 1)
    assert cache_bytes() == (before[0] + PLENTY - cache.nbytes, before[1] + PLENTY)
    shrink_caches()
    assert cache.nbytes > 0  # it is in use
    del cache
    gc.collect()
    assert cache_bytes() == before


@pytest.mark.gpu
def test_on_a_gpu_the_waiting_ones_wait_on_the_host(folder: Folder) -> None:
    device = torch.device("cuda")
    cache, expected = EncoderCache(PLENTY), {}
    for name in "ab":
        expected[name] = train(load_classifier(folder(name=name), 1).to(device))
    gc.collect()
    before = torch.cuda.memory_allocated()
    for name in "abab":
        found = train(cache.load(folder(name=name), 1).to(device))
        cache.load(folder(name=name), 1)  # as for the next fold: initial values go to the device, too
        for one, wanted in zip(found, expected[name], strict=True):
            assert torch.equal(one, wanted)
    del found, one
    gc.collect()
    assert cache.loads == 2
    assert cache._entries[0].on_host
    assert not cache._entries[1].on_host
    assert all(buffer.device.type == "cpu" for buffer in cache._entries[0].net.buffers())
    # one encoder's, rounded up to blocks
    assert torch.cuda.memory_allocated() - before <= 1.2 * cache._entries[1].nbytes + 2**21
