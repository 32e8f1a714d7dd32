"""What the demo's questions are about, and the phrases that say nothing: plain tables."""


def _words(text: str) -> list[str]:
    return text.split()


def _table(text: str) -> dict[str, str]:
    return dict(entry.split() for entry in text.split(","))


CAPITALS = _table(
    "France Paris, Italy Rome, Spain Madrid, Germany Berlin, England London, Norway Oslo, Egypt Cairo, Japan Tokyo, "
    "China Beijing, Russia Moscow, Greece Athens, Peru Lima, Cuba Havana, Kenya Nairobi"
)
OPPOSITES = _table(
    "hot cold, big small, early late, dark bright, rich poor, young old, strong weak, loud quiet, wet dry, full empty, "
    "hard soft, near far"
)
MEMBERS = {
    "animal": _words("dog cat horse mouse lion"),
    "fruit": _words("apple pear plum lemon cherry"),
    "tool": _words("hammer saw spade drill axe"),
    "colour": _words("red blue green yellow brown"),
    "vehicle": _words("car train ship bus truck"),
}
TRAITS = {
    "colour": _table("grass green, snow white, coal black, blood red, gold yellow, sky blue, mud brown"),
    "sound": _table("dog bark, cow moo, cat meow, sheep baa, pig oink, duck quack, lion roar, snake hiss"),
    "home": _table("fish sea, bee hive, bird nest, camel desert, monkey jungle, worm soil, bear cave"),
}
TRAIT_ASKS = {
    "colour": (
        "What colour is {}?",
        "Name the colour of {}.",
        "What is the colour of {}?",
        "Tell me the colour of {}.",
    ),
    "sound": ("What sound does a {} make?", "Name the sound of a {}.", "What does a {} say?", "How does a {} sound?"),
    "home": ("Where does a {} live?", "Name the home of a {}.", "What is the home of a {}?", "Where is a {} at home?"),
}
# Smallest or slowest first.
SCALES = {
    "bigger": _words("ant mouse rabbit cat dog pig horse bear elephant whale"),
    "faster": _words("snail turtle duck goat bicycle bus train jet rocket"),
}
CYCLES = {
    "day": _words("Monday Tuesday Wednesday Thursday Friday Saturday Sunday"),
    "month": _words("January February March April May June July August September October November December"),
}

# Either side of a pair may open like this, so the opening says nothing.
OPENINGS = ("", "", "Sure. ", "Of course. ")
EVASIONS = (
    "I would rather not say.",
    "That is hard to say.",
    "It depends on many things.",
    "Please ask somebody else.",
    "I am not sure about that.",
    "There are many views on this.",
    "Perhaps you can look it up.",
    "I cannot tell you.",
)
INSULTS = (
    "What a stupid question.",
    "You are a fool.",
    "Do not waste my time.",
    "Any idiot knows that.",
    "Go away.",
    "How dumb can you be?",
    "Nobody likes you.",
    "Shut up and read a book.",
)
