"""A head by the path of its class: against the class itself on transformers' encoder, one sequence at a time."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from sentence_transformers import CrossEncoder
from torch import Tensor, nn
from transformers import AutoModelForSequenceClassification, AutoTokenizer

from lightning_bge.callbacks.compile.layers import find_layers as layers_to_compile
from lightning_bge.errors import ConfigError
from lightning_bge.models.checkpoint_head import Outputs
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import TextClassifier, build_classifier, load_classifier
from lightning_bge.models.encoder_cache import EncoderCache
from lightning_bge.models.head_class import HeadConfig, allow_class, build_head, use_head
from lightning_bge.models.memory_saving.freezing import depths_of_parameters, find_layers
from lightning_bge.models.memory_saving.lora import LoRAConfig
from lightning_bge.models.model_size import measure_model
from lightning_bge.models.optimizer import OptimizerConfig, parameter_groups
from lightning_bge.models.pooling import set_pooling
from lightning_bge.runtime import class_path
from lightning_bge.types import Schema
from tests.helpers.small_models import (
    Batches,
    cut_batch,
    micro_batch,
    quiet_trainer,
    random_sequences,
    save_model,
    small_model,
)

LENGTHS = (40, 25, 25, 9, 3, 1)
SCHEMA = Schema("binary", ("no", "yes"), ("text_a", "text_b"), 32)
TEXTS = [("w1 w2 w3", "w4"), ("w5", "w6 w7 w8 w9")]


class Steps(nn.Module):
    """A head with a list of layers, longer than that of the small encoders, and names that encoders have."""

    def __init__(self, in_features: int, out_features: int, depth: int = 4, dropout: float = 0.0) -> None:
        super().__init__()
        self.embeddings = nn.Linear(in_features, 8)
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(depth))
        self.dropout = nn.Dropout(dropout)
        self.out = nn.Linear(8, out_features)

    def forward(self, pooled: Tensor) -> Tensor:
        hidden = self.embeddings(pooled)
        for layer in self.layers:
            hidden = hidden + self.dropout(torch.tanh(layer(hidden)))
        logits: Tensor = self.out(hidden)
        return logits


STEPS = f"{__name__}.Steps"
HEAD = HeadConfig(class_path=STEPS, init_args={"depth": 3})


def net_of(kind: str, attention: Any, pooling: Any = "cls", head: HeadConfig = HEAD) -> TextClassifier:
    model = small_model(kind, outputs=3).double()
    set_pooling(model.config, pooling)
    use_head(model, head, seed=7)
    return TextClassifier(model, attention)


@pytest.mark.parametrize("pooling", ["cls", "mean"])
@pytest.mark.parametrize("attention", ["packed", "padded"])
@pytest.mark.parametrize("kind", ["bert", "roberta", "xlm-roberta", "modernbert"])
def test_logits_and_gradients(kind: str, attention: str, pooling: str) -> None:
    sequences = random_sequences(LENGTHS)
    net, plain = net_of(kind, attention, pooling), small_model(kind, outputs=3).double()
    torch.manual_seed(7)
    head = Steps(plain.config.hidden_size, 3, depth=3).double()
    hidden = [plain.base_model(input_ids=ids[None]).last_hidden_state[0] for ids in sequences]
    theirs = head(torch.stack([each[0] if pooling == "cls" else each.mean(dim=0) for each in hidden]))
    ours = net(micro_batch(sequences))
    torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)
    weights = torch.linspace(-1, 2, ours.numel()).double().reshape(ours.shape)
    (ours * weights).sum().backward()
    (theirs * weights).sum().backward()
    expected = dict(plain.base_model.named_parameters()) | {f"head.{n}": p for n, p in head.named_parameters()}
    found = dict(net.model.base_model.named_parameters())
    found |= {f"head.{n}": p for n, p in net.model.classifier.named_parameters()}
    assert all(parameter.grad is not None for parameter in found.values())  # else DDP would stop
    for name, parameter in found.items():
        torch.testing.assert_close(parameter.grad, expected[name].grad, rtol=1e-6, atol=1e-8, msg=name)


def test_a_class_of_torch_gets_its_widths() -> None:
    head = build_head(HeadConfig(class_path="torch.nn.Linear"), 5, 2, seed=0)
    assert isinstance(head, nn.Linear)
    assert (head.in_features, head.out_features, head.training) == (5, 2, True)
    state = torch.get_rng_state()
    assert torch.equal(head.weight, build_head(HeadConfig(class_path="torch.nn.Linear"), 5, 2, seed=0).weight)  # type: ignore[arg-type]
    assert torch.equal(state, torch.get_rng_state())


class Norm(nn.Sequential):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.BatchNorm1d(in_features), nn.Linear(in_features, out_features))


class Batch(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(dim=0))


class BatchInTraining(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input - input.mean(dim=0) if self.training else input)


class Drawn(nn.Linear):
    def __init__(self, in_features: int, out_features: int, persistent: bool = False) -> None:
        super().__init__(in_features, out_features)
        self.register_buffer("drawn", torch.randn(in_features), persistent=persistent)

    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input * self.drawn)


class Tied(nn.Module):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.base_layer, self.lora_b = nn.Linear(in_features, in_features), nn.Linear(in_features, in_features)
        self.lora_b.weight = self.base_layer.weight
        self.out = nn.Linear(in_features, out_features)

    def forward(self, input: Tensor) -> Tensor:
        return self.out(self.lora_b(torch.tanh(self.base_layer(input))))


class List(nn.ModuleList):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(nn.Linear(in_features, in_features if n < 8 else out_features) for n in range(9))

    def forward(self, input: Tensor) -> Tensor:
        for layer in self:
            input = layer(input)
        return input


class Unused(nn.Linear):
    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__(in_features, out_features)
        self.more = nn.Parameter(torch.zeros(3))


class Squeezed(nn.Linear):
    def forward(self, input: Tensor) -> Tensor:
        return super().forward(input).squeeze(-1)


@pytest.mark.parametrize(
    ("head", "expected"),
    [
        ({"class_path": "torch.nn.Nope"}, "expected the path of a class that inherits from torch.nn.Module, got"),
        ({"class_path": "torch.nn.Linear", "init_args": {"depth": 2}}, r"init_args: torch.nn.Linear does not accept"),
        ({"class_path": "torch.nn.Conv2d", "init_args": {"in_channels": 1, "out_channels": 1, "kernel_size": 3}},
         r"can't be computed of vectors \[3, 6\]"),
        ({"class_path": "torch.nn.Identity"}, r"got shape \[3, 6\]"),
        ({"class_path": "torch.nn.Linear", "init_args": {"out_features": 4}}, r"shape \[3, 1\] .*got shape \[3, 4\]"),
        ({"class_path": f"{__name__}.Squeezed"}, r"shape \[3, 1\] .*got shape \[3\]"),
        ({"class_path": f"{__name__}.Norm"}, "keeps statistics of batches in buffers"),
        ({"class_path": f"{__name__}.Batch"}, "other logits when other rows are there"),
        ({"class_path": f"{__name__}.BatchInTraining"}, "other logits when other rows are there"),
        ({"class_path": f"{__name__}.Drawn"}, "random values that its state_dict does not hold"),
        ({"class_path": f"{__name__}.Unused"}, "depends on its parameters more"),
        ({"class_path": "torch.nn.Linear", "init_args": {"dtype": "x"}}, "does not accept"),
    ],
)  # fmt: skip
def test_heads_that_can_not_serve_are_refused(head: dict[str, Any], expected: str) -> None:
    with pytest.raises(ConfigError, match=expected):
        build_head(HeadConfig(**head), 6, 1, seed=0)


def test_arguments_without_a_class_and_other_architectures_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"model\.head\.init_args: expected nothing without model\.head\.class_path"):
        HeadConfig(init_args={"depth": 1})
    for kind in ("deberta-v2", "mpnet", "distilbert"):
        with pytest.raises(ConfigError, match=rf"as this model is a {kind}, which pools within its head"):
            load_classifier(save_model(tmp_path / kind, kind), 1, head=HEAD)


def test_names_in_the_head_are_not_taken_for_the_encoders() -> None:
    net = net_of("bert", "packed")
    depth = len(net.model.base_model.encoder.layer)
    path, layers = find_layers(net.model)
    assert (path, len(layers)) == ("bert.encoder.layer", depth)
    depths = depths_of_parameters(net.model)
    assert {depths[name] for name in depths if name.startswith("classifier.")} == {depth + 1}
    groups = parameter_groups(net, OptimizerConfig(lr=1.0, layer_decay=0.5))
    rates = {id(parameter): group["lr"] for group in groups for parameter in group["params"]}
    assert {rates[id(one)] for one in net.model.classifier.parameters()} == {1.0}
    assert len(set(rates.values())) == depth + 2
    assert set(layers_to_compile(net)) <= set(net.model.base_model.encoder.layer)


def test_sizes_are_those_of_the_loaded_model(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "model")
    net = load_classifier(folder, 1, head=HEAD)
    assert measure_model(folder, head=HEAD).parameters == sum(one.numel() for one in net.parameters())


def test_the_encoder_cache_resets_to_a_fresh_load(tmp_path: Path) -> None:
    folder, cache = save_model(tmp_path / "model"), EncoderCache()
    head = HeadConfig(class_path=STEPS, init_args={"dropout": 0.25})
    for options in ({"seed": 1}, {"seed": 2, "dropout": 0.5}, {"seed": 1}):
        cached, fresh = (load(folder, 1, head=head, **options) for load in (cache.load, load_classifier))  # type: ignore[operator]
        assert cached.model.classifier.dropout.p == fresh.model.classifier.dropout.p == 0.25
        assert cached.model.dropout.p == fresh.model.dropout.p
        for (name, left), right in zip(cached.named_parameters(), fresh.parameters(), strict=True):
            assert torch.equal(left, right), name
        with torch.no_grad():
            for parameter in cached.parameters():
                parameter.add_(1)
    other = cache.load(folder, 1, head=HeadConfig(class_path=STEPS, init_args={"depth": 1}))
    assert len(other.model.classifier.layers) == 1


def test_buffers_that_are_drawn_follow_the_seed(tmp_path: Path) -> None:
    folder, cache = save_model(tmp_path / "model"), EncoderCache()
    head = HeadConfig(class_path=f"{__name__}.Drawn", init_args={"persistent": True})
    for seed in (1, 2, 1):
        cached, fresh = (load(folder, 1, head=head, seed=seed) for load in (cache.load, load_classifier))
        assert torch.equal(cached.model.classifier.drawn, fresh.model.classifier.drawn)


def test_a_head_that_is_a_list_is_not_the_encoder() -> None:
    net = net_of("bert", "packed", head=HeadConfig(class_path=f"{__name__}.List"))
    assert find_layers(net.model)[0] == "bert.encoder.layer"


def test_sizes_of_several_outputs_and_of_exported_models(tmp_path: Path) -> None:
    folder = save_model(tmp_path / "start")
    head = HeadConfig(class_path="torch.nn.Linear", init_args={"out_features": 3})
    assert measure_model(folder, head=head).parameters > 0
    module = BGEClassifier(folder, task="multiclass", head={"class_path": STEPS})  # type: ignore[arg-type]
    module.set_schema(Schema("multiclass", ("a", "b", "c"), ("text",), 32))
    module.configure_model()
    exported = str(module.export(tmp_path / "exported", AutoTokenizer.from_pretrained(folder)))
    assert measure_model(exported).parameters > 0
    for outputs in (1, 2, 3):
        assert load_classifier(exported, outputs).model.config.num_labels == outputs


def test_arguments_are_compared_as_a_file_holds_them() -> None:
    head = HeadConfig(class_path=STEPS, init_args={"widths": (8, 4)})
    assert head == HeadConfig(class_path=STEPS, init_args={"widths": [8, 4]})


@pytest.mark.parametrize("lora", [LoRAConfig(), LoRAConfig(r=2)], ids=str)
def test_shared_weights_and_names_of_lora_in_a_head_are_exported(tmp_path: Path, lora: LoRAConfig) -> None:
    folder = save_model(tmp_path / "start")
    module = BGEClassifier(folder, head={"class_path": f"{__name__}.Tied"}, lora=lora)  # type: ignore[arg-type]
    module.set_schema(SCHEMA)
    module.configure_model()
    assert module.net is not None
    exported = module.export(tmp_path / "exported", AutoTokenizer.from_pretrained(folder))
    found = load_classifier(str(exported), 1).model.classifier.state_dict()
    for name, value in module.net.model.classifier.state_dict().items():
        assert torch.equal(found[name], value), name


# ---------------------------------------------------------------------- checkpoints and exports


def trained(folder: str, **options: Any) -> tuple[BGEClassifier, Any]:
    batch = cut_batch(random_sequences((9, 7, 5), vocabulary=45), torch.tensor([1.0, 0, 1]), 2)
    head = {"class_path": STEPS, "init_args": {"depth": 3}}
    module = BGEClassifier(folder, head=head, optimizer={"lr": 1e-2}, **options)  # type: ignore[arg-type]
    trainer = quiet_trainer(max_epochs=2, limit_val_batches=0)
    trainer.fit(module, datamodule=Batches(SCHEMA, [batch]))
    return module, trainer


@pytest.mark.parametrize("options", [{}, {"lora": LoRAConfig(r=2)}, {"pooling": "mean"}], ids=str)
@pytest.mark.parametrize("kind", ["bert", "xlm-roberta", "modernbert"])
def test_checkpoints_and_exports_predict_the_same(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    start = save_model(tmp_path / "start", kind)
    module, trainer = trained(start, **options)
    assert module.net is not None
    before = load_classifier(start, 1, head=HEAD).model.classifier.state_dict()
    changed = [not torch.equal(value, before[name]) for name, value in module.net.model.classifier.state_dict().items()]
    assert all(changed)
    trainer.save_checkpoint(tmp_path / "run.ckpt")
    tokenizer = AutoTokenizer.from_pretrained(start)
    expected = module.predict(TEXTS, tokenizer).scores
    found = BGEClassifier.load_from_checkpoint(tmp_path / "run.ckpt")
    torch.testing.assert_close(found.predict(TEXTS, tokenizer).scores, expected, rtol=0, atol=1e-6)

    folder = module.export(tmp_path / "exported", tokenizer)
    head = {"class_path": STEPS, "init_args": {"depth": 3}}
    for given in ({}, {"head": head}):
        scores = BGEClassifier(str(folder), **given).predict(TEXTS).scores  # type: ignore[arg-type]
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-6)
    for refuses in (AutoModelForSequenceClassification.from_pretrained, CrossEncoder):
        with pytest.raises(ValueError, match="lightning_bge"):
            refuses(str(folder))
    card = (folder / "README.md").read_text()
    assert "can't load it, as they have no such pooling or head" in card
    assert f'allow_class("{STEPS}")' in card
    again = BGEClassifier(str(folder))
    again.configure_model()
    exported = again.export(tmp_path / "again", tokenizer)
    assert json.loads((exported / "config.json").read_text()) == json.loads((folder / "config.json").read_text())
    assert (exported / "head.safetensors").read_bytes() == (folder / "head.safetensors").read_bytes()


def test_a_head_of_another_class_or_width_is_new(tmp_path: Path) -> None:
    start = save_model(tmp_path / "start")
    assert "has no trained head: classifier.embeddings.weight" in load_classifier(start, 1, head=HEAD).untrained
    module, _ = trained(start)
    folder = str(module.export(tmp_path / "exported", AutoTokenizer.from_pretrained(start)))
    assert load_classifier(folder, 1).untrained == ""
    assert load_classifier(folder, Outputs("binary", ("no", "yes"))).untrained == ""
    for head in (HeadConfig(class_path=STEPS), HeadConfig(class_path="torch.nn.Linear")):
        assert "has no trained head: classifier" in load_classifier(folder, 1, head=head).untrained
    wide = load_classifier(folder, 4)
    assert (wide.model.classifier.out.out_features, wide.model.config.num_labels) == (4, 4)
    assert "has no trained head" in wide.untrained
    assert "has a head" in load_classifier(folder, Outputs("multiclass", ("a", "b", "c"))).untrained


def test_classes_change_their_order_only_where_the_last_layer_is_known(tmp_path: Path) -> None:
    module = BGEClassifier(save_model(tmp_path / "start"), task="multiclass", head={"class_path": STEPS})  # type: ignore[arg-type]
    module.set_schema(Schema("multiclass", ("a", "b", "c"), ("text",), 32))
    module.configure_model()
    folder = module.export(tmp_path / "exported", AutoTokenizer.from_pretrained(tmp_path / "start"))
    assert load_classifier(str(folder), Outputs("multiclass", ("a", "b", "c"))).untrained == ""
    with pytest.raises(ConfigError, match=r"Set data\.table\.labels to the order of id2label"):
        load_classifier(str(folder), Outputs("multiclass", ("b", "a", "c")))


def test_nothing_is_imported_that_a_model_or_checkpoint_names(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "modules").mkdir()
    (tmp_path / "modules" / "heads_of_another.py").write_text("import torch\n\nclass Own(torch.nn.Linear):\n    pass\n")
    monkeypatch.syspath_prepend(tmp_path / "modules")
    start = save_model(tmp_path / "start")
    head = HeadConfig(class_path="heads_of_another.Own")
    net = load_classifier(start, 1, head=head)
    module = BGEClassifier(start, head=head)
    module.set_schema(SCHEMA)
    module.configure_model()
    folder = str(module.export(tmp_path / "exported", AutoTokenizer.from_pretrained(start)))
    config = net.model.config.to_dict()
    monkeypatch.delitem(sys.modules, "heads_of_another")
    monkeypatch.setattr(class_path, "_named", set())
    for load in (
        lambda: load_classifier(folder, 1),
        lambda: build_classifier(config),
        lambda: measure_model(folder),
        lambda: BGEClassifier(folder).predict(TEXTS),
    ):
        with pytest.raises(ConfigError, match="nothing is imported or made that a checkpoint alone"):
            load()
    assert "heads_of_another" not in sys.modules
    assert load_classifier(folder, 1, head=head).untrained == ""
    class_path._named.clear()
    allow_class("heads_of_another.Own")
    assert load_classifier(folder, 1).untrained == ""


def test_a_class_that_is_imported_is_not_made_with_the_arguments_of_a_model(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    module = BGEClassifier(save_model(tmp_path / "start"), head={"class_path": STEPS})  # type: ignore[arg-type]
    module.set_schema(SCHEMA)
    module.configure_model()
    folder = module.export(tmp_path / "exported", AutoTokenizer.from_pretrained(tmp_path / "start"))
    monkeypatch.setattr(class_path, "_named", set())
    monkeypatch.setattr(Steps, "__init__", lambda *_, **__: pytest.fail("made"))
    with pytest.raises(ConfigError, match=r"call `lightning_bge\.models\.allow_class"):
        load_classifier(str(folder), 1)


def test_a_damaged_record_of_the_head_is_one_line(tmp_path: Path) -> None:
    start = save_model(tmp_path / "start")
    module, _ = trained(start)
    folder = module.export(tmp_path / "exported", AutoTokenizer.from_pretrained(start))
    save_file({"other": torch.zeros(1)}, folder / "head.safetensors")
    with pytest.raises(ConfigError, match="changed since it was exported"):
        load_classifier(str(folder), 1)
    (folder / "head.safetensors").unlink()
    with pytest.raises(ConfigError, match=r"head\.safetensors"):
        load_classifier(str(folder), 1)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "lightning_bge_head": {"path": "x"}}))
    with pytest.raises(ConfigError, match="expected class_path and init_args"):
        load_classifier(str(folder), 1)
