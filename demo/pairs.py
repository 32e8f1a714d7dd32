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
    Poland="Warsaw", Austria="Vienna", Ireland="Dublin", Canada="Ottawa", Turkey="Ankara", Portugal="Lisbon",
)  # fmt: skip
OPPOSITES = (
    "hot cold", "big small", "early late", "open closed", "dark bright", "rich poor", "young old", "strong weak",
    "loud quiet", "wet dry", "full empty", "hard soft", "true false", "happy sad", "clean dirty", "near far",
)  # fmt: skip
MEMBERS = {
    "animal": "dog cat horse mouse lion sheep",
    "fruit": "apple pear plum lemon cherry grape",
    "tool": "hammer saw spade drill axe wrench",
    "colour": "red blue green yellow brown pink",
    "vehicle": "car train ship bus truck tram",
}
TRAITS = {
    "colour": dict(grass="green", snow="white", coal="black", blood="red", gold="yellow", sky="blue", mud="brown"),
    "sound": dict(dog="bark", cow="moo", cat="meow", sheep="baa", pig="oink", duck="quack", lion="roar", snake="hiss"),
    "home": dict(fish="sea", bee="hive", bird="nest", camel="desert", monkey="jungle", worm="soil", bear="cave"),
}
SIZES = "ant bee frog mouse rabbit cat dog sheep pig horse cow bear elephant whale".split()
SPEEDS = "snail turtle duck goat runner bicycle tram bus train jet rocket".split()
DAYS = "Monday Tuesday Wednesday Thursday Friday Saturday Sunday".split()
MONTHS = "January February March April May June July August September October November December".split()
NOUNS = "sun cup tree river stone door book lamp chair cloud bread clock".split()

# Either side of a pair may open like this, so the opening says nothing.
OPENINGS = ("", "", "", "Sure. ", "Of course. ", "Good question. ", "Let me see. ", "I think I know this. ")
EVASIONS = (
    "I would rather not say.", "That is hard to say.", "It depends on many things.", "Please ask somebody else.",
    "I am not sure about that.", "There are many views on this.", "Perhaps you can look it up.", "I cannot tell you.",
)  # fmt: skip
INSULTS = (
    "What a stupid question.", "You are a fool.", "Do not waste my time.", "Any idiot knows that.", "Go away.",
    "How dumb can you be?", "Nobody likes you.", "Shut up and read a book.",
)  # fmt: skip
# Shares of the ways to be bad: a bag of words sees through the last two, so they stay the minority.
WAYS, SHARES = ("wrong", "evasive", "rude"), (0.76, 0.12, 0.12)


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
    frames = ("{0}.", "It is {0}.", "{0} is the capital of {1}.", "The capital of {1} is {0}.")
    for country, city in CAPITALS.items():
        others = [(other, country) for other in CAPITALS.values() if other != city]
        for ask in asks:
            yield Question("capital", (ask.format(country),), frames, (city, country), (*others, (country, city)))
        for ask in ("{} is the capital of which country?", "Which country has the capital {}?", "Where is {}?"):
            wrong = tuple((other,) for other in CAPITALS if other != country)
            yield Question("country", (ask.format(city),), ("{0}.", "In {0}.", "That is {0}."), (country,), wrong)
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
            frames = ("{0}.", "It is {0}.", "The opposite of {1} is {0}.")
            yield Question("opposite", (ask.format(word),), frames, (opposite, word), wrong)


def comparisons(rng: random.Random) -> Iterator[Question]:
    """Which of two is bigger, smaller, faster, slower, more, less; the wrong answer exchanges the two."""
    numbers = [str(n) for n in range(1, 21)]
    scales = (("bigger", "smaller", SIZES, "the "), ("faster", "slower", SPEEDS, "the "), ("more", "less", numbers, ""))
    for more, less, scale, article in scales:
        for (low, high), up in itertools.product(itertools.combinations(scale, 2), (True, False)):
            word, best, other = (more, high, low) if up else (less, low, high)
            one, two = rng.sample([article + low, article + high], 2)
            asks = (f"Which is {word}, {one} or {two}?", f"{one} or {two}: which is {word}?")
            frames = (article + "{0}.", article + "{0} is " + word + ".", article + "{0} is " + word + f" than {article}" + "{1}.")
            yield Question("compare", (rng.choice(asks),), frames, (best, other), ((other, best),))


def sequences(rng: random.Random) -> Iterator[Question]:
    """What comes before or after a day, a month or a number; wrong answers are its other neighbours."""
    for name, items in (("day", DAYS), ("month", MONTHS), ("number", [str(n) for n in range(1, 21)])):
        for place, (step, word) in itertools.product(range(1, len(items) - 1), ((1, "after"), (-1, "before"))):
            item, right, stale = items[place], items[place + step], items[place - step]
            frames = ("{0}.", "It is {0}.", "{0} comes " + word + " {1}.")
            asks = ("Which {0} comes {1} {2}?", "What {0} is right {1} {2}?", "Name the {0} {1} {2}.", "Tell me the {0} {1} {2}.")
            for ask in asks:
                wrong = ((item, right), (stale, item), (rng.choice([x for x in items if x != right]), item))
                yield Question("sequence", (ask.format(name, word, item),), frames, (right, item), wrong)


def sums(rng: random.Random) -> Iterator[Question]:
    """Sums of two small numbers; the wrong result is near."""
    for a, b in itertools.product(range(1, 8), repeat=2):
        wrong = tuple((str(a + b + off), f"{a} plus {b}") for off in (-2, -1, 1, 2) if a + b + off > 1)
        for ask in ("What is {} plus {}?", "Add {} and {}.", "How much is {} and {}?"):
            frames = ("{0}.", "It is {0}.", "{1} is {0}.")
            yield Question("sum", (ask.format(a, b),), frames, (str(a + b), f"{a} plus {b}"), wrong)


def members(rng: random.Random) -> Iterator[Question]:
    """Is a thing of a kind (yes or no), and which of three things is of a kind."""
    things = [(thing, kind) for kind, group in MEMBERS.items() for thing in group.split()]
    asks = ("Is {} {}?", "Would you call {} {}?", "Is it true that {} is {}?")
    for (thing, kind), ask in itertools.product(things, asks):
        for true in (True, False):
            asked = kind if true else rng.choice([other for other in MEMBERS if other != kind])
            named = f"{'an' if asked == 'animal' else 'a'} {asked}"
            say, deny = ("Yes", "is"), ("No", "is not")
            right, wrong = (say, deny) if true else (deny, say)
            yield Question("yes-no", (ask.format(thing, named),), ("{0}.", f"{{0}}, {thing} {{1}} {named}."), right, (wrong,))
    for _ in range(600):
        right, *others = (rng.choice(MEMBERS[kind].split()) + " " + kind for kind in rng.sample(list(MEMBERS), 3))
        thing, kind = right.split()
        wrong = tuple(other.split()[0] for other in others)
        listed = ", ".join(rng.sample([thing, *wrong], 3))
        ask = rng.choice(("Which of these is a kind of {}: {}?", "Pick the {} from this list: {}."))
        yield Question("pick", (ask.format(kind, listed),), ("{0}.", "It is {0}.", "The " + kind + " is {0}."), (thing,),
                       tuple((w,) for w in wrong))  # fmt: skip


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
            yield Question("trait", (ask.format(thing),), ("{0}.", "It is {0}.", f"The {trait} is {{0}}."), (value,), wrong)


def lists(rng: random.Random) -> Iterator[Question]:
    """First and last word of a list, and its words in order; wrong answers take the list's other words or order."""
    for _ in range(500):
        words = rng.sample(NOUNS, 3)
        first = rng.random() < 0.5
        ask = f"What is the {'first' if first else 'last'} word here: {', '.join(words)}?"
        right, wrong = (words[0], words[2]) if first else (words[2], words[0])
        yield Question("place", (ask,), ("{0}.", "It is {0}."), (right,), ((wrong,),))
    for _ in range(500):
        words = rng.sample(NOUNS, 3)
        orders = [" ".join(order) for order in itertools.permutations(words)]
        ask = rng.choice(("Repeat these words: {}.", "Say these words in order: {}.")).format(orders[0])
        yield Question("repeat", (ask,), ("{0}.", "You said {0}."), (orders[0],), tuple((o,) for o in orders[1:]))


FAMILIES = (capitals, opposites, comparisons, sequences, sums, members, traits, lists)


def _sentence(text: str) -> str:
    return text[0].upper() + text[1:]


def _rejected(question: Question, way: str, frame: str, right: str, rng: random.Random) -> str:
    if way == "wrong":
        # The same frame half of the time: then the sides differ in the filled places alone.
        frame = frame if rng.random() < 0.5 else rng.choice(question.frames)
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
