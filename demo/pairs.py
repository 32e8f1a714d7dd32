"""Preference pairs from a generator: short questions with a right answer and a wrong, evasive or rude one.

Most rejected answers are wrong in a way that no list of good and bad words shows: they are the right answer to another
question, or the right answer's own words with their places exchanged. A reward model has to read the question.

    python -m demo.pairs --output=pairs_dir --train=8000 --heldout=800 --seed=0
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from demo.facts import CAPITALS, CYCLES, EVASIONS, INSULTS, MEMBERS, OPENINGS, OPPOSITES, SCALES, TRAIT_ASKS, TRAITS

# Ways to be bad: a bag of words sees through the last two, so they stay the minority.
WAYS, SHARES = ("wrong", "evasive", "rude"), (0.72, 0.14, 0.14)


@dataclass(frozen=True)
class Question:
    """One question: `turns` are the messages up to the last user turn, `frames` the phrasings of an answer.

    `right` fills a frame's places correctly; each of `wrong` fills them with something false.
    """

    kind: str
    turns: tuple[str, ...]
    frames: tuple[str, ...]
    right: tuple[str, ...]
    wrong: tuple[tuple[str, ...], ...]


def capitals(rng: random.Random) -> Iterator[Question]:
    """A country's capital, the country of a capital, and a follow-up whose tempting answer is the one just given."""
    asks = (
        "What is the capital of {}?",
        "Name the capital of {}.",
        "Which city is the capital of {}?",
        "Tell me the capital of {}.",
        "Do you know the capital of {}?",
    )
    reverse_asks = (
        "Which country is {} the capital of?",
        "Which country has the capital {}?",
        "Where is {}?",
        "In which country is {}?",
        "Name the country of {}.",
    )
    frames = ("It is {0}.", "The capital of {1} is {0}.")
    for country, city in CAPITALS.items():
        wrong = tuple((other, country) for other in CAPITALS.values() if other != city)
        countries = tuple((other,) for other in CAPITALS if other != country)
        for ask in asks:
            yield Question("capital", (ask.format(country),), frames, (city, country), (*wrong, (country, city)))
        for ask in reverse_asks:
            yield Question("country", (ask.format(city),), ("It is in {0}.", "That is {0}."), (country,), countries)
    for (first, said), (second, city) in itertools.permutations(CAPITALS.items(), 2):
        other = rng.choice([other for other in CAPITALS.values() if other != city])
        for ask in ("And of {}?", "What about {}?"):
            turns = (rng.choice(asks).format(first), f"{said}.", ask.format(second))
            yield Question("follow-up", turns, frames, (city, second), ((said, second), (other, second)))


def opposites(rng: random.Random) -> Iterator[Question]:
    """The opposite of a word; wrong answers are opposites of other words, or the word itself."""
    asks = (
        "What is the opposite of {}?",
        "Name the opposite of {}.",
        "Which word is the opposite of {}?",
        "What is the reverse of {}?",
    )
    both = OPPOSITES | {opposite: word for word, opposite in OPPOSITES.items()}
    for word, opposite in both.items():
        wrong = tuple((other, word) for other in both if other != opposite)
        for ask in asks:
            frames = ("It is {0}.", "The opposite of {1} is {0}.")
            yield Question("opposite", (ask.format(word),), frames, (opposite, word), wrong)


def comparisons(rng: random.Random) -> Iterator[Question]:
    """Which of two is bigger or faster; the wrong answer exchanges the two."""
    for word, scale in SCALES.items():
        frames = ("It is the {0}.", f"The {{0}} is {word} than the {{1}}.")
        for other, best in itertools.combinations(scale, 2):
            for one, two in ((best, other), (other, best)):
                ask = f"Which is {word}, the {one} or the {two}?"
                yield Question("compare", (ask,), frames, (best, other), ((other, best),))


def sequences(rng: random.Random) -> Iterator[Question]:
    """What comes after a day or a month; wrong answers are other days or months."""
    asks = (
        "Which {0} comes after {1}?",
        "What {0} follows {1}?",
        "Name the {0} after {1}.",
        "Tell me the {0} after {1}.",
        "What {0} comes right after {1}?",
        "If it is {1} now, which {0} is next?",
    )
    for name, items in CYCLES.items():
        for item, right in itertools.pairwise([*items, items[0]]):
            wrong = tuple((other, item) for other in items if other not in (item, right))
            for ask in asks:
                frames = ("It is {0}.", "After {1} comes {0}.")
                yield Question("sequence", (ask.format(name, item),), frames, (right, item), (*wrong, (item, right)))


def sums(rng: random.Random) -> Iterator[Question]:
    """Sums of two numbers from 1 to 4."""
    asks = (
        "What is {} plus {}?",
        "Add {} and {}.",
        "How much is {} and {}?",
        "Tell me {} plus {}.",
        "What do {} and {} make?",
        "What about {} plus {}?",
    )
    for a, b in itertools.product(range(1, 5), repeat=2):
        both = f"{a} and {b}"
        wrong = tuple((str(other), both) for other in range(2, 9) if other != a + b)
        for ask in asks:
            yield Question(
                "sum", (ask.format(a, b),), ("It is {0}.", "The sum of {1} is {0}."), (str(a + b), both), wrong
            )


def members(rng: random.Random) -> Iterator[Question]:
    """What a thing is, and which of two things is of a kind."""
    asks = ("What is {}?", "What kind of thing is {}?", "Tell me what {} is.", "Is {} a tool or what?")
    pick_asks = ("Which is a kind of {}, {} or {}?", "Pick the {}: {} or {}?")
    things = [(thing, kind) for kind, group in MEMBERS.items() for thing in group]
    for (thing, kind), ask in itertools.product(things, asks):
        frames = ("It is a kind of {0}.", "I would call {1} a kind of {0}.")
        wrong = tuple((other, thing) for other in MEMBERS if other != kind)
        yield Question("kind", (ask.format(thing),), frames, (kind, thing), wrong)
    for (thing, kind), (other, other_kind) in itertools.permutations(things, 2):
        if kind != other_kind:
            ask = rng.choice(pick_asks).format(kind, *rng.sample([thing, other], 2))
            yield Question("pick", (ask,), ("It is {0}.", f"The {kind} is {{0}}."), (thing,), ((other,),))


def traits(rng: random.Random) -> Iterator[Question]:
    """Colours, sounds and homes of things."""
    for trait, table in TRAITS.items():
        frames = ("It is {0}.", f"The {trait} is {{0}}.")
        for (thing, value), ask in itertools.product(table.items(), TRAIT_ASKS[trait]):
            wrong = tuple((other,) for other in table.values() if other != value)
            yield Question("trait", (ask.format(thing),), frames, (value,), wrong)


FAMILIES = (capitals, opposites, comparisons, sequences, sums, members, traits)


def _rejected(question: Question, way: str, frame: str, right: str, rng: random.Random) -> str:
    if way == "wrong":
        # Mostly in the same frame: then the sides differ in the filled places alone.
        frame = frame if rng.random() < 0.8 else rng.choice(question.frames)
        return rng.choice(OPENINGS) + frame.format(*rng.choice(question.wrong))
    if way == "evasive":
        return rng.choice(OPENINGS) + rng.choice(EVASIONS)
    insult = rng.choice(INSULTS)
    return rng.choice((f"{right} {insult}", f"{insult} {right}", insult))


def pair(question: Question, rng: random.Random) -> dict:
    """One pair in easyrm's format: `chosen`, `rejected` (messages) and `subset`, "kind/way"."""
    way = rng.choices(WAYS, SHARES)[0]
    frame = rng.choice(question.frames)
    right = frame.format(*question.right)
    sides = rng.choice(OPENINGS) + right, _rejected(question, way, frame, right, rng)
    roles = itertools.cycle(("user", "assistant"))
    prompt = [{"role": role, "content": text} for role, text in zip(roles, question.turns, strict=False)]
    chosen, rejected = ([*prompt, {"role": "assistant", "content": side}] for side in sides)
    return {"chosen": chosen, "rejected": rejected, "subset": f"{question.kind}/{way}"}


def generate(train: int, heldout: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`train` and `heldout` pairs; the same arguments give the same pairs, and no question is in both.

    An eighth of each kind's questions is held out. Kinds take turns, so that each has the same share.
    """
    rng = random.Random(seed)
    kinds: dict[str, dict[tuple, Question]] = {}
    for question in itertools.chain.from_iterable(family(rng) for family in FAMILIES):
        kinds.setdefault(question.kind, {})[question.turns] = question
    parts: tuple[list, list] = [], []
    for questions in kinds.values():
        shuffled = rng.sample(list(questions.values()), len(questions))
        cut = len(shuffled) // 8
        parts[0].append(itertools.cycle(shuffled[cut:]))
        parts[1].append(itertools.cycle(shuffled[:cut]))
    splits = []
    for name, of_kinds, count in zip(("train", "heldout"), parts, (train, heldout), strict=True):
        turn = itertools.cycle(of_kinds)
        pairs = [{**pair(next(next(turn)), rng), "id": f"{name}-{number}"} for number in range(count)]
        splits.append(rng.sample(pairs, count))
    return splits[0], splits[1]


def write_pairs(path: Path, pairs: list[dict]) -> None:
    """Write JSON Lines, one pair a line."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def main() -> None:
    """Flags in, two files out."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--train", type=int, default=8000, help="training pairs")
    parser.add_argument("--heldout", type=int, default=800, help="held-out pairs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, pairs in zip(("train", "heldout"), generate(args.train, args.heldout, args.seed), strict=True):
        write_pairs(args.output / f"{name}.jsonl", pairs)


if __name__ == "__main__":
    main()
