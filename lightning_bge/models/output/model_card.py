"""The model card of an exported folder: `README.md`, as the Hugging Face hub expects it."""

import json
import re
from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import try_to_load_from_cache

from lightning_bge.types import Schema, Task

CARD_FILE = "README.md"
FOLDER = "path/to/this/folder"  # in the examples of the card
HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")

_TASKS: dict[Task, str] = {
    "binary": "binary classification: one logit, whose sigmoid is the probability of the positive label",
    "multiclass": "multi-class classification: a logit for each label, whose softmax gives their probabilities",
    "multilabel": "multi-label classification: a logit for each label, whose sigmoid is the label's probability",
    "regression": "regression: one value",
}
_SCORES: dict[Task, str] = {
    "binary": ".sigmoid().squeeze(-1)  # the probability of the positive label",
    "multiclass": ".softmax(-1)",
    "multilabel": ".sigmoid()",
    "regression": ".squeeze(-1)",
}


def write_model_card(
    folder: Path,
    schema: Schema,
    base_model: str | None = None,
    members: int = 0,
    peers: bool = True,
    head_class: str | None = None,
) -> None:
    """Write `README.md`: task, labels, limits, how to use the model, and what becomes of longer texts.

    It names no file or folder of this machine, and contains no text of the data.

    Args:
        folder: of the exported model.
        schema: what the model reads and predicts.
        base_model: what was fine-tuned, as the user named it; it is in the card if it came from the hub.
        members: number of models in the folder, for an ensemble, which only this package loads; 0: it is one model.
        peers: whether transformers and sentence-transformers can load the model.
        head_class: path of the class of its head; None: it is one of transformers.
    """
    front: dict[str, Any] = {"library_name": "transformers" if peers and not members else "lightning-bge"}
    if base_model is not None and _is_from_hub(base_model):
        front = {"base_model": base_model, **front}
    pairs = len(schema.text_columns) == 2
    tags = ["sentence-transformers", "cross-encoder"] * (pairs and peers and not members)
    front |= {"pipeline_tag": "text-classification", "tags": ["lightning-bge", *tags, schema.task]}
    head = yaml.safe_dump(front, sort_keys=False, allow_unicode=True)
    usage = [_ensemble(schema, members, peers)] if members else [_lightning_bge(schema)]
    if not members and peers:
        usage += [_transformers(schema), _sentence_transformers(schema)]
    elif not peers:
        usage.append("transformers and sentence-transformers can't load it, as they have no such pooling or head.")
    if head_class is not None:
        code = f"lightning_bge.models.allow_class({json.dumps(head_class)})"
        usage.append(f"Before that, call `{code}`, if you trust this class of its head.")
    parts = [
        _facts(schema),
        "## How to use it",
        *usage,
        "## Longer texts",
        _longer_texts(schema, bool(members) or not peers),
    ]
    title = "Text-pair model" if pairs else "Text model"
    content = f"---\n{head}---\n\n# {title}: {schema.task}\n\n" + "\n\n".join(parts) + "\n"
    (folder / CARD_FILE).write_text(content, encoding="utf-8")


def _is_from_hub(name: str) -> bool:
    """Whether a model's name is that of the hub, and not that of a folder: its configuration was downloaded."""
    if not HUB_NAME.fullmatch(name) or Path(name).exists():
        return False
    return isinstance(try_to_load_from_cache(name, "config.json"), str)


def _code(name: str) -> str:
    """A name of the user's as code, in one line."""
    text = " ".join(name.replace("`", "'").split())
    return f"`{text}`" if text else '`""`'


def _facts(schema: Schema) -> str:
    names = [_code(name) for name in schema.labels]
    lines = [f"- Task: {_TASKS[schema.task]}."]
    if schema.task == "binary":
        lines.append(f"- Labels: {names[1]} is the positive one, {names[0]} the negative one.")
    elif names:
        lines.append(f"- Labels, in the order of the outputs: {', '.join(names)}.")
    if schema.task in ("binary", "multilabel"):
        lines.append(f"- Threshold: a probability of {schema.threshold:.6g} or more counts as a yes.")
    columns = " and ".join(_code(name) for name in schema.text_columns)
    lines.append(f"- Text columns: {columns}{', in this order' if len(schema.text_columns) == 2 else ''}.")
    lines.append(f"- Maximum length: {schema.max_length} tokens, special tokens counted.")
    return "\n".join(lines)


def _texts(schema: Schema) -> str:
    return '[("a text", "another text")]' if len(schema.text_columns) == 2 else '["a text", "another text"]'


def _block(title: str, code: str) -> str:
    return f"### {title}\n```python\n{code}\n```"


def _lightning_bge(schema: Schema) -> str:
    code = (
        "from lightning_bge import BGEClassifier\n\n"
        f'model = BGEClassifier("{FOLDER}", task="{schema.task}")\n'
        f"found = model.predict({_texts(schema)})\nprint(found.scores, found.labels)"
    )
    return _block("lightning-bge", code)


def _ensemble(schema: Schema, members: int, peers: bool) -> str:
    code = (
        f'from lightning_bge.models import Ensemble\n\nmodel = Ensemble("{FOLDER}")\n'
        f"found = model.predict({_texts(schema)})\nprint(found.scores, found.labels)"
    )
    loaded = " transformers and sentence-transformers load the folders of the single models." * peers
    return f"The folder holds {members} models, whose scores are averaged.{loaded}\n\n{_block('lightning-bge', code)}"


def _transformers(schema: Schema) -> str:
    texts = '["a text"], ["another text"]' if len(schema.text_columns) == 2 else '["a text", "another text"]'
    code = (
        "import torch\nfrom transformers import AutoModelForSequenceClassification, AutoTokenizer\n\n"
        f'folder = "{FOLDER}"\n'
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        "model = AutoModelForSequenceClassification.from_pretrained(folder).eval()\n"
        f'encoded = tokenizer({texts}, truncation=True, padding=True, return_tensors="pt")\n'
        "with torch.no_grad():\n"
        f"    scores = model(**encoded).logits{_SCORES[schema.task]}\n"
        "print(scores)"
    )
    return _block("transformers", code)


def _sentence_transformers(schema: Schema) -> str:
    if len(schema.text_columns) == 1:
        text = "Its `CrossEncoder` reads pairs of texts, and this model reads single ones: use transformers."
        return f"### sentence-transformers\n{text}"
    softmax = ", apply_softmax=True" if schema.task == "multiclass" else ""
    code = (
        f'from sentence_transformers import CrossEncoder\n\nmodel = CrossEncoder("{FOLDER}")\n'
        f"scores = model.predict({_texts(schema)}{softmax})\nprint(scores)"
    )
    return _block("sentence-transformers", code)


def _longer_texts(schema: Schema, ensemble: bool) -> str:
    length, windows, pairs = schema.max_length, schema.windows, len(schema.text_columns) == 2
    both = ", both of a pair together," if pairs else ""
    fits = f"Texts of up to {length} tokens{both} have the same scores everywhere.\n"
    cut = "the longer text of a pair loses tokens first" if pairs else "the rest of the text is not read"
    if windows.stride is None:
        own = f"- lightning-bge truncates longer ones: {cut}."
        peers = "- transformers (with `truncation=True`) and sentence-transformers truncate them in the same way."
    else:
        over = "the second text, with the whole first text in each" if pairs else "the text"
        most = "" if windows.max_windows is None else f" at most {windows.max_windows};"
        own = (
            f"- lightning-bge computes windows of {length} tokens over {over};{most} neighbours share {windows.stride} "
            f"tokens, and the logits are pooled by their {'mean' if windows.pooling == 'mean' else 'maximum'}."
        )
        peers = (
            "- transformers (with `truncation=True`) and sentence-transformers know no windows and truncate: "
            f"{cut}. Their scores of longer texts differ."
        )
    return "\n".join([own] if ensemble else [fits, own, peers])
