"""Each way in which a record is no pair has its reason."""

import math

import pytest

from easyrm.data import pairs
from easyrm.data.pairs import Dropped, check_pair, parse_pair
from easyrm.data.sources import Record
from easyrm.errors import InputError


def talk(answer, role="assistant"):
    return [{"role": "user", "content": "Why?"}, {"role": role, "content": answer}]


def record(value, error=None):
    return Record("some.jsonl", 7, value, error)


GOOD = {"chosen": talk("yes"), "rejected": talk("no")}


def test_a_prompt_that_stands_beside_bare_answers_is_not_lost():
    """TRL's form with an explicit prompt: answers alone would be trained on, and nobody would know."""
    bare = {side: [{"role": "assistant", "content": side}] for side in ("chosen", "rejected")}
    with pytest.raises(Dropped, match="malformed: its prompt stands beside chosen and rejected; put it in front"):
        parse_pair(record({**bare, "prompt": [{"role": "user", "content": "Why?"}]}))
    assert parse_pair(record(bare)) and parse_pair(record({**bare, "prompt": None}))


def test_a_good_pair():
    pair = parse_pair(record({**GOOD, "margin": 2, "id": "x", "subset": "s", "prompt": "ignored"}))
    assert pair[:5] == (GOOD["chosen"], GOOD["rejected"], 2.0, "x", "some.jsonl:7")
    assert check_pair(pair, drop_ties=True) is pair
    assert math.isnan(parse_pair(record({**GOOD, "margin": None})).margin)


@pytest.mark.parametrize(
    ("value", "reason", "detail"),
    [
        (None, "malformed", "not JSON: ..."),
        ([1], "malformed", "a list where an object should be"),
        ({"chosen": talk("yes")}, "malformed", "rejected is missing"),
        ({**GOOD, "chosen": "text"}, "malformed", "chosen is a str"),
        ({**GOOD, "chosen": ["text"]}, "malformed", "without a role and a content"),
        ({**GOOD, "chosen": talk(None)}, "malformed", "without a role and a content"),
        ({**GOOD, "chosen": [{"role": 3, "content": "x"}]}, "malformed", "without a role and a content"),
        ({**GOOD, "margin": "1"}, "malformed", "margin is '1'"),
        ({**GOOD, "margin": True}, "malformed", "margin is True"),
        ({**GOOD, "margin": math.nan}, "malformed", "margin is nan"),
        ({**GOOD, "margin": math.inf}, "malformed", "margin is inf"),
        ({**GOOD, "margin": 3.5e38}, "malformed", "margin is 3.5e+38, not a finite number of 32 bits"),
        ({**GOOD, "margin": -(10**400)}, "malformed", "margin is -1000"),
        ({**GOOD, "margin": [["deep"]]}, "malformed", "margin is [['deep']]"),
        ({**GOOD, "chosen": talk("half \ud83d of a pair")}, "malformed", "no Unicode text"),
        ({**GOOD, "rejected": []}, "empty", "rejected has no messages"),
        ({**GOOD, "rejected": talk(" \n")}, "empty", "without text"),
        ({**GOOD, "rejected": talk("no", "user")}, "not_ending_in_assistant", "ends in a message of the user"),
    ],
)
def test_reasons(value, reason, detail):
    with pytest.raises(Dropped) as dropped:
        parse_pair(record(value, "not JSON: ..." if value is None else None))
    assert dropped.value.reason == reason and reason in pairs.REASONS
    assert detail in dropped.value.detail


def test_a_role_that_is_long_is_cut_in_the_message():
    with pytest.raises(InputError) as stopped:
        parse_pair(record({**GOOD, "rejected": talk("no", "x\n" * 10**6)}))
    assert len(str(stopped.value)) < 200 and "\n" not in str(stopped.value)


def test_pairs_that_teach_nothing():
    same = parse_pair(record({"chosen": talk("yes"), "rejected": [{**m, "extra": 1} for m in talk("yes")]}))
    with pytest.raises(Dropped, match="identical"):
        check_pair(same, drop_ties=False)
    tie = parse_pair(record({**GOOD, "margin": 0.0}))
    assert check_pair(tie, drop_ties=False) is tie
    with pytest.raises(Dropped, match="tie"):
        check_pair(tie, drop_ties=True)


def test_an_unknown_role_is_the_users_to_mend():
    with pytest.raises(InputError, match=r"some.jsonl:7: rejected has the role 'tool'; the roles are system, user"):
        parse_pair(record({**GOOD, "rejected": talk("no", "tool")}))
