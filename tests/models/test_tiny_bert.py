"""The small BERT: same seed same files, a fast tokenizer for pairs, and attention that compares two texts."""

from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer, BertModel

from lightning_bge.models.encoder import load_classifier
from lightning_bge.models.tiny_bert import build_tiny_bert

TEXTS = [
    "The delivery was late.",
    "Please refund the kettle, it is broken!",
    "Your staff were friendly and the price is fair.",
    "I ordered the lamp on Monday for my sister's kitchen.",
    "late delivery",
    "high price",
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build_tiny_bert(tmp_path_factory.mktemp("parent") / "new" / "model", TEXTS, vocab_size=300)


def digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


def test_same_seed_same_bytes_in_another_process(folder: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from lightning_bge.models.tiny_bert import build_tiny_bert; "
        "build_tiny_bert(sys.argv[1], sys.argv[2:], vocab_size=300)"
    )
    environment = {**os.environ, "PYTHONHASHSEED": "7"}
    subprocess.run([sys.executable, "-c", code, str(tmp_path / "again"), *TEXTS], check=True, env=environment)
    assert digests(folder) == digests(tmp_path / "again")


def test_the_seed_is_of_the_weights_and_leaves_torchs_own_alone(folder: Path, tmp_path: Path) -> None:
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    build_tiny_bert(tmp_path, TEXTS, vocab_size=300, seed=1)
    assert torch.equal(torch.rand(4), expected)
    ours, theirs = digests(folder), digests(tmp_path)
    assert {name for name in ours if ours[name] != theirs[name]} == {"model.safetensors"}


def test_tokenizer_encodes_pairs(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.is_fast
    assert tokenizer.model_max_length == 512
    pair = tokenizer("The delivery was late.", "late delivery")
    tokens = tokenizer.convert_ids_to_tokens(pair["input_ids"])
    expected = ["[CLS]", "the", "delivery", "was", "late", ".", "[SEP]", "late", "delivery", "[SEP]"]
    assert tokens == expected
    assert pair["token_type_ids"] == [0] * 7 + [1] * 3
    assert pair["attention_mask"] == [1] * 10
    single = tokenizer("high price")
    assert tokenizer.convert_ids_to_tokens(single["input_ids"]) == ["[CLS]", "high", "price", "[SEP]"]


@pytest.mark.parametrize("text", TEXTS)
def test_tokenizer_round_trip(folder: Path, text: str) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.unk_token_id not in ids
    decoded = tokenizer.decode(ids, skip_special_tokens=True)
    assert "".join(decoded.split()) == "".join(text.lower().split())


def test_unknown_letters_become_unk(folder: Path) -> None:
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer.convert_ids_to_tokens(tokenizer("語")["input_ids"]) == ["[CLS]", "[UNK]", "[SEP]"]


def test_sizes_are_those_of_the_arguments(tmp_path: Path) -> None:
    build_tiny_bert(tmp_path, TEXTS, vocab_size=60, hidden_size=48, layers=3, heads=4, max_positions=40)
    model, tokenizer = AutoModel.from_pretrained(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    config = model.config
    assert (config.hidden_size, config.num_hidden_layers, config.num_attention_heads) == (48, 3, 4)
    assert config.max_position_embeddings == tokenizer.model_max_length == 40
    assert config.vocab_size == len(tokenizer)
    assert config.pad_token_id == tokenizer.pad_token_id
    assert len(tokenizer("late " * 100, truncation=True)["input_ids"]) == 40


def test_loads_through_the_auto_classes_with_all_weights(folder: Path) -> None:
    model, report = AutoModel.from_pretrained(folder, output_loading_info=True)
    assert isinstance(model, BertModel)
    assert model.dtype == torch.float32
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    saved = load_file(folder / "model.safetensors")
    assert all(torch.equal(value, saved[name]) for name, value in model.state_dict().items())
    _, report = AutoModelForSequenceClassification.from_pretrained(folder, num_labels=1, output_loading_info=True)
    assert set(report["missing_keys"]) == {"classifier.weight", "classifier.bias"}
    assert load_classifier(str(folder), 1).packed


def test_loads_in_sentence_transformers(folder: Path) -> None:
    from sentence_transformers import CrossEncoder

    scores = CrossEncoder(str(folder), num_labels=1, device="cpu").predict([("The price is high.", "high price")])
    assert scores.shape == (1,)


@pytest.mark.parametrize("heads", [1, 2, 4])
def test_layers_start_by_comparing_the_texts(tmp_path: Path, heads: int) -> None:
    build_tiny_bert(tmp_path, TEXTS, vocab_size=300, heads=heads)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path)
    model = AutoModel.from_pretrained(tmp_path, attn_implementation="eager").eval()
    pair = tokenizer("The delivery was late.", "late price", return_tensors="pt")
    with torch.no_grad():
        first, second = (layer[0].mean(dim=0) for layer in model(**pair, output_attentions=True).attentions)
    # [CLS] the delivery was late . [SEP] late price [SEP]
    late_here, late_there, price, second_text = 7, 4, 8, slice(7, 10)
    assert first[late_here, late_there] > 0.2
    assert first[late_here, [late_here, late_there]].sum() > 0.7
    assert first[price, :7].max() < 0.2  # no equal word in the first text
    assert second[0, second_text].sum() > 0.7


def test_a_comparison_is_linear_at_the_start(folder: Path) -> None:
    """Whether the second text's words stand in the first is linear in the first token's output before any training."""
    words = ["late", "delivery", "refund", "kettle", "broken", "staff", "friendly", "price", "fair", "lamp", "high"]
    generator = torch.Generator().manual_seed(0)
    tokenizer, model = AutoTokenizer.from_pretrained(folder), AutoModel.from_pretrained(folder).eval()
    pairs, labels = [], []
    for number in range(300):
        order = [words[i] for i in torch.randperm(len(words), generator=generator)]
        labels.append(number % 2)
        pairs.append((" ".join(order[:5]), " ".join(order[:2] if labels[-1] else order[5:7])))
    inputs = tokenizer([a for a, _ in pairs], [b for _, b in pairs], padding=True, return_tensors="pt")
    with torch.no_grad():
        features = model(**inputs).last_hidden_state[:, 0].numpy()
    from sklearn.linear_model import LogisticRegression

    probe = LogisticRegression(max_iter=2000).fit(features[:200], labels[:200])
    assert probe.score(features[200:], labels[200:]) > 0.9
