from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer, BertConfig

from lightning_bge.data.tokens.tokenizer import effective_max_length, load_tokenizer, tokenizer_fingerprint
from lightning_bge.errors import ConfigError, DataError
from tests.helpers.small_texts import WORDS, build_tokenizer


def test_the_fingerprint_depends_on_content_alone(tmp_path: Path) -> None:
    tokenizer = build_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    for folder in ("a", "b"):
        tokenizer.save_pretrained(tmp_path / folder)
        assert tokenizer_fingerprint(AutoTokenizer.from_pretrained(tmp_path / folder)) == before
    tokenizer(["w1 w2"], truncation=True, max_length=3, padding="max_length")
    assert tokenizer_fingerprint(tokenizer) == before
    others = [
        build_tokenizer(do_lower_case=False),
        build_tokenizer(truncation_side="left"),
        build_tokenizer(model_input_names=["input_ids"]),
        build_tokenizer(additional_special_tokens=["[X]"]),
    ]
    assert len({before, *map(tokenizer_fingerprint, others)}) == 5


def test_a_tokenizer_is_loaded_or_the_error_says_what_to_do(tokenizer_dir: str, tmp_path: Path) -> None:
    assert len(load_tokenizer(tokenizer_dir)) == len(WORDS) + 6
    with pytest.raises(DataError, match="does not exist"):
        load_tokenizer(str(tmp_path / "none"))
    with pytest.raises(DataError, match=r"no usable tokenizer.*save_pretrained"):
        load_tokenizer(str(tmp_path))
    BertConfig(vocab_size=50).save_pretrained(tmp_path)
    with pytest.raises(DataError, match=r"holds no tokenizer.*save_pretrained"):
        load_tokenizer(str(tmp_path))
    with pytest.raises(ConfigError, match="empty"):
        load_tokenizer("")


def test_an_unknown_name_is_explained(monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **options: Any) -> None:
        raise OSError("We couldn't connect to 'https://huggingface.co'")

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", offline)
    with pytest.raises(DataError, match=r"'some/name' cannot be loaded: OSError: We couldn't connect.*spelling"):
        load_tokenizer("some/name")


def test_slow_tokenizer_is_refused(tokenizer_dir: str, monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow:
        vocab_files_names: dict[str, str] = {}  # noqa: RUF012
        is_fast = False

    monkeypatch.setattr(AutoTokenizer, "from_pretrained", lambda *args, **options: Slow())
    with pytest.raises(DataError, match="no fast version"):
        load_tokenizer(tokenizer_dir)


def test_effective_max_length(caplog: pytest.LogCaptureFixture) -> None:
    tokenizer = build_tokenizer(model_max_length=32)
    with caplog.at_level(logging.INFO):
        assert effective_max_length(tokenizer, 512, pair=True) == 32
    assert "lowered from 512 to 32" in caplog.text
    assert effective_max_length(build_tokenizer(), 512, pair=True) == 512
    with pytest.raises(ConfigError, match="at least 5"):
        effective_max_length(tokenizer, 4, pair=True)
    assert effective_max_length(tokenizer, 3, pair=False) == 3
