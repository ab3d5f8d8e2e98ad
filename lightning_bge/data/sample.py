"""A generated sample of text pairs, to try everything without own data.

The posts are messages to a shop. Each is paired with some criteria, such as `late delivery`: does it meet them? A post
meets a criterion if one of its sentences is evidence for that criterion, whatever else it says. So a model has to read
both: the post alone says little, and the criterion alone nothing. Some posts only mention a criterion's words (`The
delivery was quick.`), and a few labels are wrong, as people err too.
"""

import csv
from pathlib import Path
from random import Random

# criterion -> sentences that meet it, and sentences that share a word with it but do not
CRITERIA: dict[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "late delivery": (
        (
            "The delivery was late.",
            "The delivery came {n} days late.",
            "This is the second late delivery.",
            "The {item} arrived {n} days late.",
            "Because of the late delivery my {person} had no present.",
            "I am still waiting for the delivery.",
        ),
        ("The delivery was quick.", "The delivery came on {day}.", "There was no trouble with delivery."),
    ),
    "refund wanted": (
        (
            "I wanted a refund on {day}.",
            "A full refund is wanted.",
            "Please refund the {item}.",
            "I have wanted a refund for {n} weeks.",
            "When do I get the refund I wanted?",
        ),
        ("I always wanted a {item}.", "No refund is needed."),
    ),
    "broken part": (
        (
            "One part was broken.",
            "The broken part is the {part}.",
            "A part of the {item} is broken.",
            "The {part} is broken.",
            "Please send a new part for the broken one.",
        ),
        ("Each part fits well.", "Nothing was broken."),
    ),
    "friendly staff": (
        (
            "Your staff were friendly.",
            "The staff on the phone were very friendly.",
            "A friendly member of staff sorted it out.",
            "The friendly staff helped my {person}.",
            "The lady on the phone was friendly.",
        ),
        ("I asked your staff on {day}.", "The staff did not know the {item}."),
    ),
    "high price": (
        (
            "The price is too high.",
            "For a {item} the price is high.",
            "That is a high price for a {item}.",
            "I find the price very high.",
            "It costs {n} times the price elsewhere.",
        ),
        ("The price is fair.", "The {item} hangs high on the wall."),
    ),
}
FILLER = (
    "I ordered the {item} on {day}.",
    "It is for the {room}.",
    "My {person} has the same {item}.",
    "I bought it as a present for my {person}.",
    "The colour goes well with the {room}.",
    "We have used it every day since {day}.",
    "It stands in the {room} next to the {item}.",
    "I also looked at a {item} on your site.",
    "The box took {n} minutes to open.",
    "My {person} put it together on {day}.",
    "We moved house {n} weeks ago.",
    "My old {item} lasted {n} years.",
    "I have been a customer for {n} years.",
    "The {part} is a little smaller than in the picture.",
    "It makes a quiet sound when you turn it on.",
    "You can reach me on {day} after {n}.",
    "There were {n} of us in the {room} when it came.",
    "The website shows a different {part}.",
    "Thank you for reading this.",
)
SLOTS = {
    "item": ("kettle", "lamp", "chair", "radio", "toaster", "backpack", "blender", "heater", "clock", "mirror"),
    "part": ("lid", "handle", "cover", "base", "switch", "frame"),
    "room": ("kitchen", "office", "bedroom", "hallway"),
    "person": ("sister", "brother", "mother", "neighbour", "friend", "son"),
    "day": ("Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"),
    "n": ("two", "three", "four", "five", "six", "nine", "ten"),
}
CRITERIA_PER_POST = 3  # criteria that a post is paired with
MET = 0.35  # share of the criteria that a post meets
MENTIONED = 0.15  # share of the other criteria that it mentions
LABEL_NOISE = 0.03  # share of the labels that are flipped


def write_sample(folder: str | Path, posts: int = 180, test_posts: int = 70, seed: int = 0) -> Path:
    """Write `train.csv` and `test.csv` with the columns `post_id, text, criterion, label`.

    Three rows a post, a good third of them met (label 1). The number of words of a post is log-normal: most have 10 to
    60, a few have hundreds. The same seed gives the same files on every platform.

    Args:
        folder: where to write; it is created if it does not exist.
        posts: number of posts in the training file. The default keeps a whole search on two cores under two minutes.
        test_posts: number of posts in the test file; they share none with the training file.
        seed: of everything that is drawn.

    Returns:
        The folder.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    rng = Random(seed)
    texts: set[str] = set()
    for name, first, count in (("train.csv", 0, posts), ("test.csv", posts, test_posts)):
        with (folder / name).open("w", newline="", encoding="utf-8") as file:
            writer = csv.writer(file)
            writer.writerow(["post_id", "text", "criterion", "label"])
            for number in range(first, first + count):
                writer.writerows(_rows(f"p{number:04d}", rng, texts))
    return folder


def _rows(post_id: str, rng: Random, texts: set[str]) -> list[tuple[str, str, str, int]]:
    """The rows of a post, whose text is none of `texts`, and is added to them."""
    met = {criterion for criterion in CRITERIA if rng.random() < MET}
    chosen = rng.sample(list(CRITERIA), CRITERIA_PER_POST)
    text = _text(met, rng)
    while text in texts:
        text += f" {_fill(FILLER[0], Random(f'{post_id} {len(text)}'))}"  # not from rng: the other posts stay the same
    texts.add(text)
    return [(post_id, text, name, int((name in met) != (rng.random() < LABEL_NOISE))) for name in chosen]


def _text(met: set[str], rng: Random) -> str:
    sentences = []
    for criterion, (evidence, mentions) in CRITERIA.items():
        if criterion in met:
            sentences.append(_fill(rng.choice(evidence), rng))
        elif rng.random() < MENTIONED:
            sentences.append(_fill(rng.choice(mentions), rng))
    words = min(500, max(8, rng.lognormvariate(1.9, 1.4)))
    while sum(len(sentence.split()) for sentence in sentences) < words:
        sentences.append(_fill(rng.choice(FILLER), rng))
    rng.shuffle(sentences)
    return " ".join(sentences)


def _fill(sentence: str, rng: Random) -> str:
    return sentence.format_map({slot: rng.choice(words) for slot, words in SLOTS.items()})
