"""A generated sample of text pairs, to try everything without data of one's own.

Reviews of an online shop, each asked against some criteria: does the review meet the criterion? A review that complains
meets the criteria that its complaints are about; most of the criteria that it does not meet are asked of reviews without
that complaint. So what a review says in general already tells much, and reading it against the criterion tells the rest.
"""

from __future__ import annotations

import csv
from pathlib import Path

import numpy as np

# criterion -> sentences that are evidence for it
CRITERIA: dict[str, tuple[str, ...]] = {
    "complains about a late delivery": (
        "The parcel came two weeks late.",
        "I am still waiting, delivery was promised for Monday.",
        "Shipping was delayed again and again.",
        "It arrived long after the promised date.",
    ),
    "reports a damaged product": (
        "The screen was cracked when I opened the box.",
        "One leg arrived broken.",
        "The casing is scratched and a corner is broken off.",
        "It was damaged right out of the box.",
    ),
    "asks for a refund": (
        "I want my money back.",
        "Please refund the full amount.",
        "I have asked twice for a refund.",
        "Send me the money back or I will call my bank.",
    ),
    "criticises customer service": (
        "Support never answered my calls.",
        "The agent on the phone was rude.",
        "Nobody at the help desk cared about my calls.",
        "Support hung up on me and never answered.",
    ),
}
PRAISE = (
    "I love it and use it every day.",
    "Great value, my whole family enjoys it.",
    "Works perfectly since the first day.",
    "Lovely colour and a great finish.",
    "No trouble with delivery at all, great.",
    "I would happily buy it again.",
)
FILLER = (
    "I bought it for my sister's birthday in spring.",
    "It stands in the kitchen next to the window.",
    "My neighbour has the older model.",
    "We compared three shops before choosing this one.",
    "The manual has forty pages in six languages.",
    "It is a bit heavier than the picture suggests.",
    "I usually order on Sunday evenings.",
    "The box was blue and rather large.",
    "My old one lasted eight years.",
    "We have two cats and a small garden.",
)
LABEL_NOISE = 0.03  # share of labels that are flipped, as people err too


def write_sample(folder: str | Path, posts: int = 180, test_posts: int = 60, seed: int = 0) -> Path:
    """Write `train.csv` and `test.csv` with the columns `post_id, text, criterion, label`.

    Three rows a post, about a third of them yes (label 1). The number of sentences of a post is log-normal: most are
    short, a few have hundreds of words. The same seed gives the same files on every platform.

    Args:
        folder: where to; it is made if need be.
        posts: number of posts in the training file.
        test_posts: number of posts in the test file; they share none with the training file.
        seed: of everything that is drawn.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    random = np.random.Generator(np.random.PCG64(seed))
    for name, first, count in (("train.csv", 0, posts), ("test.csv", posts, test_posts)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["post_id", "text", "criterion", "label"])
            for number in range(first, first + count):
                writer.writerows(_post(f"p{number:04d}", random))
    return folder


def _post(post_id: str, random: np.random.Generator) -> list[tuple[str, str, str, int]]:
    names = list(CRITERIA)
    complaints = [] if random.random() < 0.5 else [names[i] for i in random.permutation(len(names))[: _some(random)]]
    length = int(np.clip(random.lognormal(mean=1.3, sigma=0.8), 2, 60))
    sentences = [_one(CRITERIA[criterion], random) for criterion in complaints]
    while len(sentences) < length:
        sentences.append(_one(FILLER if complaints or random.random() < 0.5 else PRAISE, random))
    text = " ".join(sentences[i] for i in random.permutation(len(sentences)))
    # what a review complains about is asked first, so that few questions to it are answered with no
    asked = [*complaints, *(names[i] for i in random.permutation(len(names)) if names[i] not in complaints)][:3]
    return [(post_id, text, name, int((name in complaints) != (random.random() < LABEL_NOISE))) for name in asked]


def _some(random: np.random.Generator) -> int:
    return int(random.integers(1, 4))


def _one(sentences: tuple[str, ...], random: np.random.Generator) -> str:
    return sentences[int(random.integers(len(sentences)))]
