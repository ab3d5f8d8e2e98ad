"""The generated sample: same seed same files, grouped, long-tailed, and a signal that needs both texts."""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from scipy.sparse import csr_matrix, hstack
from sklearn.feature_extraction.text import CountVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.metrics import f1_score
from sklearn.model_selection import GroupKFold, cross_val_predict

from lightning_bge.data.sample import CRITERIA, CRITERIA_PER_POST, write_sample

Rows = list[dict[str, str]]


def read(path: Path) -> Rows:
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_sample(tmp_path_factory.mktemp("parent") / "new" / "sample")


@pytest.fixture(scope="module")
def train(folder: Path) -> Rows:
    return read(folder / "train.csv")


def test_columns_sizes_and_labels(folder: Path, train: Rows) -> None:
    test = read(folder / "test.csv")
    assert list(train[0]) == list(test[0]) == ["post_id", "text", "criterion", "label"]
    assert (len(train), len(test)) == (180 * CRITERIA_PER_POST, 70 * CRITERIA_PER_POST)
    for rows in (train, test):
        assert {row["label"] for row in rows} == {"0", "1"}
        assert 0.28 < np.mean([row["label"] == "1" for row in rows]) < 0.45
        assert {row["criterion"] for row in rows} == set(CRITERIA)


def test_same_seed_same_bytes(folder: Path, tmp_path: Path) -> None:
    same, other = write_sample(tmp_path / "same"), write_sample(tmp_path / "other", seed=1)
    for name in ("train.csv", "test.csv"):
        assert (folder / name).read_bytes() == (same / name).read_bytes()
        assert (folder / name).read_bytes() != (other / name).read_bytes()


def test_sizes_can_be_chosen(tmp_path: Path) -> None:
    write_sample(tmp_path, posts=4, test_posts=2)
    assert len(read(tmp_path / "train.csv")) == 4 * CRITERIA_PER_POST
    assert len(read(tmp_path / "test.csv")) == 2 * CRITERIA_PER_POST


def test_a_post_has_different_criteria_and_is_in_one_file(folder: Path, train: Rows) -> None:
    test = read(folder / "test.csv")
    assert not {row["post_id"] for row in train} & {row["post_id"] for row in test}
    by_post: dict[str, Rows] = {}
    for row in train + test:
        by_post.setdefault(row["post_id"], []).append(row)
    for rows in by_post.values():
        assert len({row["criterion"] for row in rows}) == len(rows) == CRITERIA_PER_POST
        assert len({row["text"] for row in rows}) == 1


def test_no_placeholder_is_left(train: Rows) -> None:
    assert not any("{" in row["text"] or "}" in row["text"] for row in train)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_lengths_have_a_long_tail(tmp_path: Path, seed: int) -> None:
    write_sample(tmp_path, posts=1000, test_posts=1, seed=seed)
    lengths = np.array([len(row["text"].split()) for row in read(tmp_path / "train.csv")[::CRITERIA_PER_POST]])
    assert 10 <= np.median(lengths) <= 30
    assert np.mean((lengths >= 8) & (lengths <= 60)) > 0.85
    assert np.percentile(lengths, 99) > 5 * np.median(lengths)
    assert 200 < lengths.max() < 600


def cross_validated_f1(features: csr_matrix, rows: Rows) -> float:
    labels = np.array([int(row["label"]) for row in rows])
    model = LogisticRegression(C=1.0, class_weight="balanced", max_iter=1000)
    groups = [row["post_id"] for row in rows]
    return float(f1_score(labels, cross_val_predict(model, features, labels, groups=groups, cv=GroupKFold(3))))


def test_the_label_needs_both_texts(train: Rows) -> None:
    words = CountVectorizer(binary=True).fit_transform([row["text"] for row in train])
    asked = CountVectorizer(analyzer=lambda text: [text]).fit_transform([row["criterion"] for row in train])
    crossed = hstack([words.multiply(asked[:, [number]]) for number in range(asked.shape[1])]).tocsr()
    both = cross_validated_f1(crossed, train)
    assert both > 0.75
    assert cross_validated_f1(words, train) < both - 0.2
    assert cross_validated_f1(asked, train) < both - 0.2
    assert cross_validated_f1(hstack([words, asked]).tocsr(), train) < both - 0.2  # seen side by side: not enough


def test_few_labels_are_wrong_and_some_posts_only_mention_a_criterion(tmp_path: Path) -> None:
    """Against a plain reading: a row is met if one of the criterion's sentences stands in the text, slots apart."""
    write_sample(tmp_path, posts=700, test_posts=1)
    rows = read(tmp_path / "train.csv")
    wrong = np.mean([met(row) != (row["label"] == "1") for row in rows])
    assert 0.015 < wrong < 0.05
    mentioned = [any(word in row["text"].lower() for word in row["criterion"].split()) for row in rows]
    unmet = [seen for seen, row in zip(mentioned, rows, strict=True) if not met(row)]
    assert 0.05 < np.mean(unmet) < 0.3


def met(row: dict[str, str]) -> bool:
    sentences = [sentence.split() for sentence in row["text"].replace("?", ".").split(".")]
    return any(matches(sentence, pattern) for sentence in sentences for pattern in CRITERIA[row["criterion"]][0])


def matches(sentence: list[str], pattern: str) -> bool:
    wanted = pattern.rstrip(".?").split()
    return len(wanted) == len(sentence) and all(
        want == word or want.startswith("{") for want, word in zip(wanted, sentence, strict=True)
    )


def test_no_post_has_the_text_of_another(tmp_path: Path) -> None:
    write_sample(tmp_path, seed=0)
    posts = pd.concat([pd.read_csv(tmp_path / name) for name in ("train.csv", "test.csv")]).drop_duplicates("post_id")
    assert not posts["text"].duplicated().any()
