"""The demo's pairs: reproducible, well-formed, split by question, and not to be solved by counting words."""

import itertools
import re

import numpy as np
import pytest

from demo.pairs import WAYS, generate, write_pairs
from easyrm.data.pairs import parse_pair
from easyrm.data.sources import read

SIDES = ("chosen", "rejected")


@pytest.fixture(scope="module")
def splits():
    return generate(4000, 1000, seed=0)


def question(pair):
    return tuple(message["content"] for message in pair["chosen"][:-1])


def words(text):
    return re.findall(r"\w+|[^\w\s]", text.lower())


def test_the_seed_decides(splits):
    assert generate(4000, 1000, seed=0) == splits
    assert generate(4000, 1000, seed=1) != splits


def test_no_heldout_question_is_trained_on(splits):
    train, heldout = ({question(pair) for pair in split} for split in splits)
    assert len(train) > 1000 and len(heldout) > 200
    assert not train & heldout


def test_pairs_are_what_easyrm_reads(splits, tmp_path):
    write_pairs(tmp_path / "pairs.jsonl", splits[1])
    records = list(read(str(tmp_path / "pairs.jsonl")))
    assert len(records) == len(splits[1])
    for record, pair in zip(records, splits[1], strict=True):
        parsed = parse_pair(record)  # raises for what training would drop
        assert parsed.chosen == pair["chosen"] and parsed.rejected == pair["rejected"]
        assert pair["chosen"][:-1] == pair["rejected"][:-1]
        roles = [message["role"] for message in pair["chosen"]]
        assert roles == ["user", "assistant"] * (len(roles) // 2)


def test_every_way_of_being_bad_and_mostly_wrong_answers(splits):
    ways = [pair["subset"].split("/")[1] for pair in splits[0]]
    assert set(ways) == set(WAYS)
    assert 0.68 < ways.count("wrong") / len(ways) < 0.76
    assert len({pair["subset"].split("/")[0] for pair in splits[0]}) >= 8


def test_no_right_answer_is_also_rejected(splits):
    """An answer that is chosen for a question is never the whole of a rejected answer to it."""
    chosen = {(question(pair), pair["chosen"][-1]["content"]) for split in splits for pair in split}
    rejected = {(question(pair), pair["rejected"][-1]["content"]) for split in splits for pair in split}
    assert not chosen & rejected


@pytest.mark.parametrize("unit", [1, 2])
def test_a_bag_of_words_does_not_solve_them(splits, unit):
    """Logistic regression on the difference of the sides' word (or word-pair) counts, the better of two penalties.

    The prompt is the same on both sides, so a bag of words over prompt and response has the same difference.
    """

    def bag(text):
        tokens = words(text)
        return [*tokens, *itertools.pairwise(tokens)] if unit == 2 else tokens

    vocabulary: dict = {}
    for pair in splits[0]:
        for side in SIDES:
            for word in bag(pair[side][-1]["content"]):
                vocabulary.setdefault(word, len(vocabulary))

    def differences(pairs):
        matrix = np.zeros((len(pairs), len(vocabulary)), np.float32)
        for row, pair in zip(matrix, pairs, strict=True):
            for side, sign in zip(SIDES, (1, -1), strict=True):
                for word in bag(pair[side][-1]["content"]):
                    if word in vocabulary:
                        row[vocabulary[word]] += sign
        return matrix

    train, heldout = map(differences, splits)
    accuracies = []
    for penalty in (3e-2, 3e-3):
        weights = np.zeros(len(vocabulary), np.float32)
        for _ in range(150):
            wrongness = 1 / (1 + np.exp(train @ weights))
            weights += 0.5 * (train.T @ wrongness / len(train) - penalty * weights)
        accuracies.append(np.mean(heldout @ weights > 0))
    # Evasive and rude answers are recognizable: a bag that did not learn those would prove nothing.
    assert 0.55 < max(accuracies) <= 0.75
