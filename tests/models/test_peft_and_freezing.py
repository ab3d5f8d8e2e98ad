"""Memory savers: what they leave out, and that nothing else changes."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any
from weakref import WeakSet

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from safetensors.torch import load_file
from sentence_transformers import CrossEncoder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification

from lightning_bge.callbacks.compile.layers import find_layers
from lightning_bge.errors import ConfigError
from lightning_bge.models import peft_and_freezing as savers
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import PACKED_HEADS, TextClassifier, load_classifier
from lightning_bge.models.optimizer import OptimizerConfig, build_optimizer
from lightning_bge.models.peft_and_freezing import (
    SaversConfig,
    apply_savers,
    plain_weights,
    set_activation_checkpointing,
    switch_savers,
)
from lightning_bge.types import Schema
from tests.helpers.small_models import (
    Batches,
    cut_batch,
    micro_batch,
    quiet_trainer,
    random_sequences,
    save_model,
    small_model,
    word_tokenizer,
)

KINDS = ["bert", "xlm-roberta", "modernbert", "deberta-v2"]
LORA = SaversConfig(lora_rank=3)
# bytes that go from layer to layer for sequences of 9 and 5 tokens; DeBERTa's are padded
HIDDEN = {kind: 4 * 32 * (9 + (5 if kind in PACKED_HEADS else 9)) for kind in KINDS}


def make_net(kind: str, config: SaversConfig = SaversConfig(), dropout: float = 0.0, **changes: Any) -> TextClassifier:  # noqa: B008
    net = TextClassifier(small_model(kind, dropout=dropout, **changes)).train()
    apply_savers(net, config, seed=1)
    return net


def gradients(net: TextClassifier, bf16: bool = False) -> dict[str, Tensor]:
    """Of the parameters that got one; random numbers are the same each time."""
    torch.manual_seed(5)
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        for micro in cut_batch(random_sequences((9, 7, 5, 5, 3, 2)), torch.zeros(6), 2).micro:
            net(micro).float().square().sum().backward()
    found = {name: p.grad.clone() for name, p in net.named_parameters() if p.grad is not None}
    net.zero_grad()
    return found


class Kept:
    def __init__(self, where: str, tensor: Tensor) -> None:
        self.where, self.tensor = where, tensor


def saved_bytes(net: TextClassifier) -> dict[str, int]:
    """Embeddings, each layer, and what follows -> bytes of activations that are kept from there after a forward."""
    base = net.model.base_model
    layers = base.layers if hasattr(base, "layers") else base.encoder.layer
    stack = ["head"]
    parts = [("embeddings", base.embeddings), *((str(number), layer) for number, layer in enumerate(layers))]
    hooks = []
    for name, part in parts:
        hooks.append(part.register_forward_pre_hook(lambda *_, name=name: stack.append(name)))
        hooks.append(part.register_forward_hook(lambda *_: stack.pop() and None))

    held: WeakSet[Kept] = WeakSet()

    def keep(tensor: Tensor) -> Kept:
        kept = Kept(stack[-1], tensor)
        held.add(kept)
        return kept

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda kept: kept.tensor):
        logits = net(micro_batch(random_sequences((9, 5))))
    for hook in hooks:
        hook.remove()
    found = {name: 0 for name in [*(name for name, _ in parts), "head"]}
    for kept in held:
        if not isinstance(kept.tensor, nn.Parameter):
            found[kept.where] += kept.tensor.untyped_storage().nbytes()
    assert logits.requires_grad
    return found


def same(left: dict[str, Tensor], right: dict[str, Tensor]) -> bool:
    return left.keys() == right.keys() and all(torch.equal(value, right[name]) for name, value in left.items())


# ------------------------------------------------------------------ activation checkpointing


@pytest.mark.parametrize("bf16", [False, True])
@pytest.mark.parametrize("kind", [*KINDS, "distilbert"])
def test_recomputed_layers_have_the_same_gradients_with_dropout_on(kind: str, bf16: bool) -> None:
    net = make_net(kind, dropout=0.3)
    expected = gradients(net, bf16)
    calls: list[int] = []
    net.model.base_model.get_submodule(
        {"modernbert": "layers.1.mlp", "distilbert": "transformer.layer.1.ffn"}.get(kind, "encoder.layer.1.output")
    ).register_forward_pre_hook(lambda *_: calls.append(1))
    assert set_activation_checkpointing(net, True)
    assert same(gradients(net, bf16), expected)
    assert len(calls) == 2 * 2  # micro-batches, each forward and in the backward pass
    assert set_activation_checkpointing(net, False)
    assert same(gradients(net, bf16), expected)
    assert len(calls) == 2 * 2 + 2


@pytest.mark.parametrize("kind", KINDS)
def test_a_recomputed_layer_keeps_its_input_alone(kind: str) -> None:
    plain = saved_bytes(make_net(kind))
    layers = plain.keys() - {"embeddings", "head"}
    found = sum(saved_bytes(make_net(kind, SaversConfig(activation_checkpointing=True))).values())
    inputs = (found - plain["embeddings"] - plain["head"]) / len(layers)
    assert HIDDEN[kind] <= inputs < 2 * HIDDEN[kind]  # DeBERTa's layers have a mask too
    assert all(plain[name] > 10 * HIDDEN[kind] for name in layers - {"1"})  # BERT's last layer keeps little


def test_nothing_is_recomputed_in_evaluation() -> None:
    net = make_net("bert", SaversConfig(activation_checkpointing=True)).eval()
    assert gradients(net).keys() == dict(net.named_parameters()).keys()
    assert sum(saved_bytes(net).values()) == sum(saved_bytes(make_net("bert").eval()).values())


def test_architecture_that_cannot_be_recomputed() -> None:
    net = make_net("mpnet")
    assert not set_activation_checkpointing(net, True)
    switch_savers(net, SaversConfig())
    with pytest.raises(ConfigError, match=r"activation_checkpointing is true, but .* a mpnet: set it to false"):
        switch_savers(net, SaversConfig(activation_checkpointing=True))


def compile_layers(net: TextClassifier, backend: str) -> None:
    for layer in find_layers(net):
        layer.compile(dynamic=True, backend=backend)


@pytest.fixture
def dynamo(recwarn: pytest.WarningsRecorder) -> Iterator[None]:
    """torch.compile warns of its own deprecated calls, and asks tensors for gradients that they do not have."""
    warnings.simplefilter("ignore")
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("kind", ["bert", pytest.param("modernbert", marks=pytest.mark.slow)])
def test_compiled_layers_are_recomputed(kind: str) -> None:
    net = make_net(kind, SaversConfig(activation_checkpointing=True))
    expected = gradients(net)
    compile_layers(net, "aot_eager")
    torch.testing.assert_close(gradients(net), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.slow
@pytest.mark.usefixtures("dynamo")
@pytest.mark.parametrize("config", [SaversConfig(), LORA], ids=["plain", "lora"])
def test_layers_that_are_compiled_already_can_be_switched(config: SaversConfig) -> None:
    net = make_net("bert", config)
    expected = gradients(net)
    compile_layers(net, "aot_eager")
    for on in (False, True, False):
        set_activation_checkpointing(net, on)
        torch.testing.assert_close(gradients(net), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@pytest.mark.usefixtures("dynamo")
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.parametrize("kind", ["bert", "modernbert"])
def test_recomputed_layers_on_cuda(kind: str, compiled: bool) -> None:
    net = make_net(kind, dropout=0.0 if compiled else 0.3).cuda()
    micro = micro_batch(random_sequences((90, 70, 5))).to("cuda")

    def run() -> list[Tensor]:
        torch.manual_seed(5)
        with torch.autocast("cuda", torch.bfloat16):
            net(micro).square().sum().backward()
        found = [p.grad.clone() for p in net.parameters() if p.grad is not None]
        net.zero_grad()
        return found

    expected = run()
    set_activation_checkpointing(net, True)
    if compiled:
        compile_layers(net, "inductor")
    for found, wanted in zip(run(), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2 * float(wanted.abs().max()))


# ------------------------------------------------------------------ frozen layers


FROZEN = {
    ("bert", 0): ("bert.embeddings.",),
    ("bert", 1): ("bert.embeddings.", "bert.encoder.layer.0."),
    ("xlm-roberta", 2): ("roberta.",),
    ("modernbert", 3): ("model.embeddings.", "model.layers.0.", "model.layers.1.", "model.layers.2."),
    ("deberta-v2", 1): (
        "deberta.embeddings.",
        "deberta.encoder.rel_embeddings.",
        "deberta.encoder.LayerNorm.",
        "deberta.encoder.layer.0.",
    ),
    ("mpnet", 0): ("mpnet.embeddings.", "mpnet.encoder.relative_attention_bias."),
    ("distilbert", 1): ("distilbert.embeddings.", "distilbert.transformer.layer.0."),
}


@pytest.mark.parametrize(("kind", "layers"), FROZEN)
def test_frozen_parameters_have_no_gradient_and_no_optimizer_state(kind: str, layers: int) -> None:
    plain, net = make_net(kind), make_net(kind, SaversConfig(frozen_layers=layers))
    expected = gradients(plain)
    wanted = {name: value for name, value in expected.items() if not name[6:].startswith(FROZEN[kind, layers])}
    assert 0 < len(wanted) < len(expected)
    assert same(gradients(net), wanted)
    grouped = {id(p) for group in build_optimizer(net, OptimizerConfig()).param_groups for p in group["params"]}
    assert grouped == {id(p) for name, p in net.named_parameters() if not name[6:].startswith(FROZEN[kind, layers])}


@pytest.mark.parametrize("kind", ["bert", "modernbert", "deberta-v2"])
def test_nothing_is_kept_below_the_first_layer_that_trains(kind: str) -> None:
    plain, found = saved_bytes(make_net(kind)), saved_bytes(make_net(kind, SaversConfig(frozen_layers=1)))
    assert (found.pop("embeddings"), found.pop("0")) == (0, 0)
    assert min(plain.pop("embeddings"), plain.pop("0")) > 0
    assert found.keys() == plain.keys()
    assert all(0 < value <= plain[name] for name, value in found.items())
    recomputed = saved_bytes(make_net(kind, SaversConfig(activation_checkpointing=True, frozen_layers=1)))
    inputs = (sum(recomputed.values()) - plain["head"]) / (len(plain) - 1)
    assert HIDDEN[kind] <= inputs < 2 * HIDDEN[kind]


def test_more_frozen_layers_than_there_are() -> None:
    with pytest.raises(ConfigError, match="frozen_layers: expected at most 2, as this model has so many layers, got 3"):
        make_net("bert", SaversConfig(frozen_layers=3))


# ------------------------------------------------------------------ LoRA


def disturb(net: TextClassifier) -> None:
    """Factors and head as after some training."""
    with torch.no_grad():
        for parameter in net.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter), alpha=0.3)


@pytest.mark.parametrize("kind", KINDS)
def test_factors_start_at_nothing_and_train_with_the_head_alone(kind: str) -> None:
    plain, net = make_net(kind), make_net(kind, LORA)
    micro = micro_batch(random_sequences((9, 5)))
    assert torch.equal(net(micro), plain(micro))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    head = {name for name in trained if ".lora_" not in name}
    _, layers = savers._layers(plain)
    linear = [name for name, part in layers.named_modules() if isinstance(part, nn.Linear)]
    assert len(trained - head) == 2 * len(linear)
    words = ("classifier", "pooler", "head", "final_norm")
    assert head == {name for name in dict(plain.named_parameters()) if any(word in name for word in words)}
    disturb(net)
    got = gradients(net)
    assert got.keys() <= trained
    assert {name for name in trained if ".lora_" in name} <= got.keys()


@pytest.mark.parametrize("kind", KINDS)
def test_merged_weights_give_the_same_logits_and_leave_the_model_alone(kind: str) -> None:
    net = make_net(kind, SaversConfig(lora_rank=3, lora_alpha=4.5))
    disturb(net)
    net.eval()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    weights = plain_weights(net)
    assert same(net.state_dict(), before)
    other = make_net(kind, seed=9).eval()
    assert weights.keys() == other.model.state_dict().keys()
    other.model.load_state_dict(weights)
    micro = micro_batch(random_sequences((9, 5, 3)))
    torch.testing.assert_close(other(micro), net(micro), rtol=1e-5, atol=1e-5)
    assert not torch.allclose(make_net(kind).eval()(micro), net(micro), atol=1e-2)


def test_what_is_merged_is_the_product_times_alpha_over_rank() -> None:
    net = make_net("bert", SaversConfig(lora_rank=3, lora_alpha=4.5, lora_targets=["query", "attention.output.dense"]))
    disturb(net)
    state = net.model.state_dict()
    changed = {name for name, value in plain_weights(net).items() if name not in state}
    assert changed == {
        f"bert.encoder.layer.{layer}.attention.{part}.{tensor}"
        for layer in range(2)
        for part in ("self.query", "output.dense")
        for tensor in ("weight", "bias")
    }
    name = "bert.encoder.layer.1.attention.self.query"
    a, b = (state[f"{name}.lora_{factor}.default.weight"] for factor in "AB")
    expected = state[f"{name}.base_layer.weight"] + 1.5 * b @ a
    torch.testing.assert_close(plain_weights(net)[f"{name}.weight"], expected)


def test_without_lora_the_weights_are_the_state() -> None:
    net = make_net("bert")
    assert same(plain_weights(net), net.model.state_dict())


def test_factors_get_bf16_under_autocast_and_are_recomputed_alike() -> None:
    net = make_net("bert", LORA, dropout=0.3)
    disturb(net)
    seen = set()
    for name, module in net.named_modules():
        if name.endswith("self.query.lora_A.default"):
            module.register_forward_pre_hook(lambda _, given: seen.add(given[0].dtype))
    expected = gradients(net, bf16=True)
    assert seen == {torch.bfloat16}
    set_activation_checkpointing(net, True)
    assert same(gradients(net, bf16=True), expected)


def test_factors_come_from_the_seed(tmp_path: Path) -> None:
    folder = save_model(tmp_path)
    generator = torch.random.get_rng_state()

    def factors(seed: int) -> dict[str, Tensor]:
        net = load_classifier(folder, 1, seed=seed, savers=LORA)
        assert all(module.training for module in net.modules())
        return {name: value for name, value in net.state_dict().items() if "lora_A" in name}

    one = factors(1)
    assert same(factors(1), one)
    assert not any(torch.equal(value, one[name]) for name, value in factors(2).items())
    assert torch.equal(torch.random.get_rng_state(), generator)


def test_peft_is_missing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(savers, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install 'lightning-bge\[lora\]'"):
        make_net("bert", LORA)
    make_net("bert", SaversConfig(frozen_layers=0))


def test_targets_that_are_not_there() -> None:
    with pytest.raises(ConfigError, match="expected some of dense, key, query, value, or null, got Wqkv"):
        make_net("bert", SaversConfig(lora_rank=2, lora_targets=["query", "Wqkv"]))


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"frozen_layers": -1}, r"frozen_layers: expected 0 or more, or null, got -1"),
        ({"lora_rank": 0}, r"lora_rank: expected 1 or more, or null, got 0"),
        ({"lora_rank": 4, "lora_alpha": 0.0}, r"lora_alpha: expected more than 0, or null, got 0\.0"),
        ({"lora_rank": 4, "lora_targets": []}, r"lora_targets: expected names of linear layers, or null for all"),
        ({"lora_rank": 4, "frozen_layers": 0}, r"lora_rank is 4, .* frozen_layers is 0: set one of them to null"),
    ],
)
def test_settings_out_of_range(changes: dict[str, Any], told: str) -> None:
    with pytest.raises(ConfigError, match=f"model.savers.*{told}"):
        SaversConfig(**changes)


# ------------------------------------------------------------------ whole runs


class SaveFirstEpoch(Callback):
    def __init__(self, path: Path) -> None:
        self.path = path

    def on_train_epoch_end(self, trainer: Trainer, pl_module: Any) -> None:
        if trainer.current_epoch == 0:
            trainer.save_checkpoint(self.path)


Run = Callable[..., BGEClassifier]


@pytest.fixture
def run(tmp_path: Path) -> Run:
    """Two epochs of three steps, from the start or from a checkpoint, at times with one written after the first."""
    folder = save_model(tmp_path / "start", dropout=0.2)
    labels = torch.tensor([0.0, 1.0, 1.0, 0.0])
    batches = [cut_batch(random_sequences((9, 7, 5, 4), 45, seed), labels, 2) for seed in range(3)]

    def train(config: SaversConfig, checkpoint: Path | None = None, save: Path | None = None) -> BGEClassifier:
        module = BGEClassifier(folder, optimizer=OptimizerConfig(lr=1e-2), savers=config)
        callbacks = [] if save is None else [SaveFirstEpoch(save)]
        trainer = quiet_trainer(max_epochs=2, limit_val_batches=0, callbacks=callbacks)
        data = Batches(Schema("binary", ("no", "yes"), ("text",), 16), batches)
        trainer.fit(module, datamodule=data, ckpt_path=checkpoint, weights_only=True)
        assert trainer.global_step == 6
        return module

    return train


@pytest.mark.parametrize("config", [LORA, SaversConfig(frozen_layers=1)], ids=["lora", "frozen"])
def test_resumed_run_ends_with_the_same_weights(run: Run, tmp_path: Path, config: SaversConfig) -> None:
    whole = run(config, save=tmp_path / "first.ckpt").net.state_dict()
    assert same(run(config, tmp_path / "first.ckpt").net.state_dict(), whole)


def test_recomputing_changes_nothing_in_a_run(run: Run) -> None:
    found = run(SaversConfig(activation_checkpointing=True)).net.state_dict()
    assert same(found, run(SaversConfig()).net.state_dict())


def test_lora_trains_its_factors_and_is_exported_as_plain_weights(run: Run, tmp_path: Path) -> None:
    module = run(LORA)
    start = load_classifier(module.name_or_path, 1, savers=LORA).state_dict()
    for name, value in module.net.state_dict().items():
        # the key's bias does not change the softmax
        assert (
            torch.equal(value, start[name]) == (".lora_" not in name and not name.startswith("model.classifier"))
            or "pooler" in name
        )
    before = {name: value.clone() for name, value in module.net.state_dict().items()}
    folder = module.export(tmp_path / "exported", word_tokenizer())
    assert same(module.net.state_dict(), before)
    assert not [path.name for path in folder.iterdir() if "adapter" in path.name]
    assert "lora" not in (folder / "config.json").read_text()

    model = AutoModelForSequenceClassification.from_pretrained(folder).eval()
    assert load_file(folder / "model.safetensors").keys() == model.state_dict().keys()
    [ids] = random_sequences((9,), 45)
    ours = module.net.eval()(micro_batch([ids]))
    with torch.no_grad():
        torch.testing.assert_close(model(ids[None]).logits, ours, rtol=1e-5, atol=1e-5)
        theirs = CrossEncoder(str(folder), device="cpu").model(input_ids=ids[None]).logits
    torch.testing.assert_close(theirs, ours, rtol=1e-5, atol=1e-5)
