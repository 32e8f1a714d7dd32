"""Preference pairs from a generator: short questions with a right answer and a wrong, evasive or rude one.

Most rejected answers are wrong in a way that no list of good and bad words shows: they are the right answer to another
question, or the right answer's own words with their places exchanged. A reward model has to read the question.

    python demo/pairs.py --output=pairs_dir --train=6000 --heldout=600 --seed=0
"""

import argparse
import itertools
import json
import random
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

CAPITALS = dict(
    France="Paris", Italy="Rome", Spain="Madrid", Germany="Berlin", England="London", Norway="Oslo", Egypt="Cairo",
    Japan="Tokyo", China="Beijing", Russia="Moscow", Greece="Athens", Peru="Lima", Cuba="Havana", Kenya="Nairobi",
)  # fmt: skip
OPPOSITES = (
    "hot cold", "big small", "early late", "dark bright", "rich poor", "young old", "strong weak", "loud quiet",
    "wet dry", "full empty", "hard soft", "near far",
)  # fmt: skip
MEMBERS = {
    "animal": "dog cat horse mouse lion",
    "fruit": "apple pear plum lemon cherry",
    "tool": "hammer saw spade drill axe",
    "colour": "red blue green yellow brown",
    "vehicle": "car train ship bus truck",
}
TRAITS = {
    "colour": dict(grass="green", snow="white", coal="black", blood="red", gold="yellow", sky="blue", mud="brown"),
    "sound": dict(dog="bark", cow="moo", cat="meow", sheep="baa", pig="oink", duck="quack", lion="roar", snake="hiss"),
    "home": dict(fish="sea", bee="hive", bird="nest", camel="desert", monkey="jungle", worm="soil", bear="cave"),
}
SIZES = "ant mouse rabbit cat dog pig horse bear elephant whale".split()
SPEEDS = "snail turtle duck goat bicycle bus train jet rocket".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NOUNS = "sun cup tree river stone door book lamp chair cloud bread clock".split()

# Either side of a pair may open like this, so the opening says nothing.
OPENINGS = ("", "", "Sure. ", "Of course. ")
EVASIONS = (
    "I would rather not say.", "That is hard to say.", "It depends on many things.", "Please ask somebody else.",
    "I am not sure about that.", "There are many views on this.", "Perhaps you can look it up.", "I cannot tell you.",
)  # fmt: skip
INSULTS = (
    "What a stupid question.", "You are a fool.", "Do not waste my time.", "Any idiot knows that.", "Go away.",
    "How dumb can you be?", "Nobody likes you.", "Shut up and read a book.",
)  # fmt: skip
# Shares of the ways to be bad: a bag of words sees through the last two, so they stay the minority.
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
    asks = ("What is the capital of {}?", "Name the capital of {}.", "Which city is the capital of {}?",
            "Tell me the capital of {}.", "{} has which capital?")  # fmt: skip
    frames = ("It is {0}.", "{0} is the capital of {1}.", "The capital of {1} is {0}.")
    for country, city in CAPITALS.items():
        others = [(other, country) for other in CAPITALS.values() if other != city]
        for ask in asks:
            yield Question("capital", (ask.format(country),), frames, (city, country), (*others, (country, city)))
        for ask in ("{} is the capital of which country?", "Which country has the capital {}?", "Where is {}?",
                    "In which country is {}?", "Name the country of {}."):
            wrong = tuple((other,) for other in CAPITALS if other != country)
            yield Question("country", (ask.format(city),), ("It is in {0}.", "That is {0}."), (country,), wrong)
    for first, second in itertools.permutations(CAPITALS, 2):
        for ask in ("And of {}?", "What about {}?"):
            turns = (rng.choice(asks).format(first), f"{CAPITALS[first]}.", ask.format(second))
            wrong = ((CAPITALS[first], second), (rng.choice([c for c in CAPITALS.values() if c != CAPITALS[second]]), second))
            yield Question("follow-up", turns, frames, (CAPITALS[second], second), wrong)


def opposites(rng: random.Random) -> Iterator[Question]:
    """The opposite of a word; wrong answers are opposites of other words, or the word itself."""
    asks = ("What is the opposite of {}?", "Name the opposite of {}.", "{} is the opposite of what?", "Not {} but what?")
    both = [tuple(pair.split()) for pair in OPPOSITES]
    both += [(b, a) for a, b in both]
    for word, opposite in both:
        wrong = tuple((other, word) for other, _ in both if other != opposite)
        for ask in asks:
            frames = ("It is {0}.", "The opposite of {1} is {0}.")
            yield Question("opposite", (ask.format(word),), frames, (opposite, word), wrong)


def comparisons(rng: random.Random) -> Iterator[Question]:
    """Which of two is bigger or faster; the wrong answer exchanges the two."""
    for word, scale in (("bigger", SIZES), ("faster", SPEEDS)):
        for other, best in itertools.combinations(scale, 2):
            for one, two in ((best, other), (other, best)):
                frames = ("It is the {0}.", "The {0} is " + word + " than the {1}.")
                yield Question("compare", (f"Which is {word}, the {one} or the {two}?",), frames, (best, other), ((other, best),))


def sequences(rng: random.Random) -> Iterator[Question]:
    """What comes after a day or a month; wrong answers are other days or months."""
    asks = ("Which {0} comes after {1}?", "What {0} follows {1}?", "Name the {0} after {1}.", "Tell me the {0} after {1}.",
            "After {1} comes which {0}?", "If it is {1} now, which {0} is next?")  # fmt: skip
    for name, items in (("day", DAYS), ("month", MONTHS)):
        for item, right in itertools.pairwise([*items, items[0]]):
            wrong = tuple((other, item) for other in items if other not in (item, right))
            for ask in asks:
                frames = ("It is {0}.", "{0} comes after {1}.")
                yield Question("sequence", (ask.format(name, item),), frames, (right, item), (*wrong, (item, right)))


def sums(rng: random.Random) -> Iterator[Question]:
    """Sums of two small numbers."""
    for a, b in itertools.product(range(1, 5), repeat=2):
        wrong = tuple((str(other), f"{a} plus {b}") for other in range(2, 9) if other != a + b)
        for ask in ("What is {} plus {}?", "Add {} and {}.", "How much is {} and {}?", "Tell me {} plus {}.", "{} and {} make what?", "{} plus {}?"):
            frames = ("It is {0}.", "{1} is {0}.")
            yield Question("sum", (ask.format(a, b),), frames, (str(a + b), f"{a} plus {b}"), wrong)


def members(rng: random.Random) -> Iterator[Question]:
    """What a thing is, and which of two things is of a kind."""
    asks = ("What is {}?", "What kind of thing is {}?", "Tell me what {} is.", "Is {} a tool or what?")
    for kind, group in MEMBERS.items():
        for thing, ask in itertools.product(group.split(), asks):
            wrong = tuple((other, thing) for other in MEMBERS if other != kind)
            yield Question("kind", (ask.format(thing),), ("It is a kind of {0}.", "{1} is a kind of {0}."), (kind, thing), wrong)
        for thing in group.split():
            for other_kind in MEMBERS:
                if other_kind == kind:
                    continue
                for other in MEMBERS[other_kind].split():
                    one, two = rng.sample([thing, other], 2)
                    ask = rng.choice(("Which is a kind of {}, {} or {}?", "Pick the {}: {} or {}?"))
                    yield Question("pick", (ask.format(kind, one, two),), ("It is {0}.", "The " + kind + " is {0}."), (thing,), ((other,),))


def traits(rng: random.Random) -> Iterator[Question]:
    """Colours, sounds and homes of things."""
    asks = {
        "colour": ("What colour is {}?", "Name the colour of {}.", "{} has which colour?", "Tell me the colour of {}."),
        "sound": ("What sound does a {} make?", "Name the sound of a {}.", "What does a {} say?", "How does a {} sound?"),
        "home": ("Where does a {} live?", "Name the home of a {}.", "What is the home of a {}?", "Where is a {} at home?"),
    }
    for trait, table in TRAITS.items():
        for (thing, value), ask in itertools.product(table.items(), asks[trait]):
            wrong = tuple((other,) for other in table.values() if other != value)
            yield Question("trait", (ask.format(thing),), ("It is {0}.", f"The {trait} is {{0}}."), (value,), wrong)


def lists(rng: random.Random) -> Iterator[Question]:
    """First and last word of a list, and its words in order; wrong answers take the list's other words or order."""
    for _ in range(500):
        words = rng.sample(NOUNS, 3)
        first = rng.random() < 0.5
        ask = f"What is the {'first' if first else 'last'} word here: {', '.join(words)}?"
        right, wrong = (words[0], words[2]) if first else (words[2], words[0])
        yield Question("place", (ask,), ("It is {0}.", "The word is {0}."), (right,), ((wrong,),))
    for _ in range(500):
        words = rng.sample(NOUNS, 3)
        orders = [" ".join(order) for order in itertools.permutations(words)]
        ask = rng.choice(("Repeat these words: {}.", "Say these words in order: {}.")).format(orders[0])
        yield Question("repeat", (ask,), ("The words are {0}.", "You said {0}."), (orders[0],), tuple((o,) for o in orders[1:]))


FAMILIES = (capitals, opposites, comparisons, sequences, sums, members, traits)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _rejected(question: Question, way: str, frame: str, right: str, rng: random.Random) -> str:
    if way == "wrong":
        # The same frame half of the time: then the sides differ in the filled places alone.
        frame = frame if rng.random() < 0.8 else rng.choice(question.frames)
        return _sentence(rng.choice(OPENINGS) + _sentence(frame.format(*rng.choice(question.wrong))))
    if way == "evasive":
        return rng.choice(OPENINGS) + rng.choice(EVASIONS)
    return rng.choice((f"{right} {rng.choice(INSULTS)}", f"{rng.choice(INSULTS)} {right}", rng.choice(INSULTS)))


def pair(question: Question, rng: random.Random) -> dict:
    """One pair in easyrm's format: `chosen`, `rejected` (messages) and `subset`, "kind/way"."""
    way = rng.choices(WAYS, SHARES)[0]
    frame = rng.choice(question.frames)
    right = _sentence(frame.format(*question.right))
    sides = rng.choice(OPENINGS) + right, _rejected(question, way, frame, right, rng)
    prompt = [
        {"role": ("user", "assistant")[turn % 2], "content": _sentence(text)} for turn, text in enumerate(question.turns)
    ]
    chosen, rejected = ([*prompt, {"role": "assistant", "content": side}] for side in sides)
    return {"chosen": chosen, "rejected": rejected, "subset": f"{question.kind}/{way}"}


def generate(train: int, heldout: int, seed: int) -> tuple[list[dict], list[dict]]:
    """`train` and `heldout` pairs; the same arguments give the same pairs, and no question is on both sides.

    An eighth of each kind's questions is held out. Kinds take turns, so that each has the same share.
    """
    rng = random.Random(seed)
    kinds: dict[str, dict[tuple, Question]] = {}
    for family in FAMILIES:
        for question in family(rng):
            kinds.setdefault(question.kind, {})[question.turns] = question
    parts: tuple[list, list] = [], []
    for questions in kinds.values():
        shuffled = rng.sample(list(questions.values()), len(questions))
        cut = len(shuffled) // 8
        parts[0].append(itertools.cycle(shuffled[cut:]))
        parts[1].append(itertools.cycle(shuffled[:cut]))
    splits = []
    for name, wheels, count in zip(("train", "heldout"), parts, (train, heldout), strict=True):
        turn = itertools.cycle(wheels)
        pairs = [{**pair(next(next(turn)), rng), "id": f"{name}-{number}"} for number in range(count)]
        splits.append(rng.sample(pairs, count))
    return splits[0], splits[1]


def write_pairs(path: Path, pairs: list[dict]) -> None:
    """Write JSON Lines, one pair a line."""
    path.write_text("".join(json.dumps(pair) + "\n" for pair in pairs), encoding="utf-8")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, required=True, help="folder for train.jsonl and heldout.jsonl")
    parser.add_argument("--train", type=int, default=6000, help="training pairs")
    parser.add_argument("--heldout", type=int, default=600, help="held-out pairs")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    args.output.mkdir(parents=True, exist_ok=True)
    for name, pairs in zip(("train", "heldout"), generate(args.train, args.heldout, args.seed), strict=True):
        write_pairs(args.output / f"{name}.jsonl", pairs)


if __name__ == "__main__":
    main()
