"""Several exported models of one task as one predictor, which averages their scores."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from lightning_bge.errors import ConfigError
from lightning_bge.models.checkpoint_head import Outputs
from lightning_bge.models.classifier import BGEClassifier
from lightning_bge.models.encoder import expand_home, load_classifier
from lightning_bge.models.metrics.predictions import Predictions, scores
from lightning_bge.models.output.export import replace_folder, save_tokenizer
from lightning_bge.models.output.inference import Text, TextPredictions, predict_texts, tokenizer_of
from lightning_bge.models.output.model_card import write_model_card
from lightning_bge.models.output.prediction_file import decide
from lightning_bge.runtime.model_config import HEAD, OWN_TYPE
from lightning_bge.runtime.run_folder import create_run_dir, read_json, write_json
from lightning_bge.types import ENSEMBLE_FILE, Schema, Task

SURE = 1e-12  # nearest that an averaged probability may be to 0 and 1, so that its logit is finite


class Ensemble:
    """Exported models whose scores are averaged: what a study with `hpo.ensemble` exports.

    ```python
    found = Ensemble("runs/hpo/model").predict([("a text", "another one")])
    print(found.scores, found.labels)
    ```

    Args:
        folder: the ensemble's folder.
        device: where the models compute; all of them are kept there.
        trust_remote_code: whether code that comes with the models may run.

    Attributes:
        schema: what the models read and predict, with the threshold of the averaged scores.
        nets: the models, in eval mode.

    Raises:
        ConfigError: the folder holds no ensemble, or a part of it is missing.
    """

    def __init__(self, folder: str | Path, device: str | torch.device = "cpu", trust_remote_code: bool = False) -> None:
        folder = expand_home(str(folder))
        members, schema = ensemble_members(folder), Schema.load(folder)
        if not members or schema is None:
            raise ConfigError(f"{folder}: expected a folder that a study with hpo.ensemble has exported")
        self.schema, self._tokenizer = schema, tokenizer_of(folder, None, trust_remote_code)
        nets = [
            load_classifier(str(member), Outputs(schema.task, schema.labels), trust_remote_code=trust_remote_code)
            for member in members
        ]
        for member, net in zip(members, nets, strict=True):
            if net.untrained:
                raise ConfigError(f"{member} {net.untrained}")
        self.nets = [net.eval().to(device) for net in nets]

    def predict(self, texts: Sequence[Text], max_tokens: int = 8192) -> TextPredictions:
        """The mean of the models' scores for texts, and the labels that follow from it.

        Args:
            texts: strings, or pairs of strings for models of two texts.
            max_tokens: the most tokens that are computed at once.

        Raises:
            DataError: there is no text, or one has the wrong form.
        """
        found = [predict_texts(net, self.schema, texts, self._tokenizer, max_tokens).scores for net in self.nets]
        score = torch.stack(found).mean(dim=0)
        return TextPredictions(score, None if self.schema.task == "regression" else decide(self.schema, score))


def ensemble_members(folder: str | Path) -> list[Path]:
    """The folders of an ensemble's models; empty where the folder holds no ensemble."""
    found = ensemble_record(folder)
    return [] if found is None else [Path(folder) / name for name in found["members"]]


def ensemble_record(folder: str | Path) -> dict[str, Any] | None:
    """What `write_ensemble` has recorded: `members` and `source`; None where the folder holds no ensemble."""
    return read_json(Path(folder, ENSEMBLE_FILE))


def average_predictions(task: Task, members: Sequence[Predictions]) -> Predictions:
    """Predictions of the same rows, whose scores are the mean of the members' scores."""
    first = members[0]
    if len(members) == 1:
        return first
    score = torch.stack([scores(task, one.logits).double() for one in members]).mean(dim=0)
    return replace(first, logits=_logits(task, score).float().reshape(first.logits.shape))


def _logits(task: Task, score: Tensor) -> Tensor:
    if task == "regression":
        return score
    return score.clamp_min(SURE).log() if task == "multiclass" else score.logit(eps=SURE)


def member_module(model: BGEClassifier, folder: Path) -> BGEClassifier:
    """A module with the arguments of `model` and the weights of an exported model."""
    own: dict[str, Any] = {"name_or_path": str(folder), "revision": None, "lora": {}, "frozen_layers": None}
    member = type(model)(**{**model.hparams, **own})
    member.monitored = model.monitored
    return member


def start_members(folder: Path, source: dict[str, Any]) -> None:
    """Make a folder for models that are trained one after the other; those of another source are deleted."""
    if (ensemble_record(folder) or {}).get("source") != source:
        if folder.exists():
            shutil.rmtree(folder)
        create_run_dir(folder)
        write_json(folder / ENSEMBLE_FILE, {"members": [], "source": source})


def write_ensemble(
    draft: Path,
    names: Sequence[str],
    folder: Path,
    *,
    schema: Schema,
    tokenizer: PreTrainedTokenizerBase,
    source: dict[str, Any],
) -> None:
    """Make a folder of exported models an ensemble, and give it its name; an older export is replaced.

    Args:
        draft: the folder, which is moved.
        names: of the models' folders in it.
        folder: where to.
        schema: of the models, with the threshold of the averaged scores.
        tokenizer: of the models.
        source: what the models were made of, as plain data.

    Raises:
        ConfigError: the folder holds something else than an exported model, which would be deleted.
    """
    save_tokenizer(tokenizer, schema, draft)
    schema.save(draft)
    config = json.loads((draft / names[0] / "config.json").read_text(encoding="utf-8"))
    peers, head_class = config["model_type"] != OWN_TYPE, config.get(HEAD, {}).get("class_path")
    write_model_card(draft, schema, members=len(names), peers=peers, head_class=head_class)
    write_json(draft / ENSEMBLE_FILE, {"members": list(names), "source": source})
    replace_folder(draft, folder)
