"""Suites count answers as published.

The figures of RewardBench and RewardBench 2 are small cases worked out by hand and then recorded from rewardbench 0.1.4
itself: `calculate_scores_per_section`, `reroll_and_score_dataset` and `process_single_model`.
"""

import itertools
import json
import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from easyrm.errors import InputError
from easyrm.suites import pairs, rewardbench, rewardbench2, rm_bench
from easyrm.suites.interval import wilson
from easyrm.suites.item import Answer
from easyrm.suites.registry import SUITES


def pair(chosen, rejected, subset=""):
    return Answer(None, subset, (chosen,), (rejected,))


def shares(subset, right, wrong):
    return [pair(1.0, 0.0, subset)] * right + [pair(0.0, 1.0, subset)] * wrong


def prompts(cases, subset="Ties"):
    return [Answer(json.dumps(id), subset, chosen, rejected) for id, (chosen, rejected) in cases.items()]


rewards = st.integers(-3, 3).map(float)  # small, so that ties are common and arithmetic exact
several = st.lists(rewards, min_size=1, max_size=4).map(tuple)
sides = {
    "pairs": st.builds(Answer, st.none(), st.sampled_from(["", "a", "b"]), st.tuples(rewards), st.tuples(rewards)),
    "rewardbench": st.builds(
        Answer,
        st.none(),
        st.sampled_from([subset for section in rewardbench.SECTIONS.values() for subset in section]),
        st.tuples(rewards),
        st.tuples(rewards),
    ),
    "rewardbench2": st.one_of(
        st.builds(
            Answer,
            st.none(),
            st.sampled_from([s for s in rewardbench2.SUBSETS if s != "Ties"]),
            st.tuples(rewards),
            st.tuples(*[rewards] * 3),
        ),
        st.builds(
            Answer,
            st.builds('"{}:{}"'.format, st.sampled_from(["ref", "tied"]), st.integers(0, 5)),
            st.just("Ties"),
            several,
            several,
        ),
    ),
    "rm-bench": st.builds(
        Answer, st.none(), st.sampled_from(list(rm_bench.DOMAINS)), st.tuples(*[rewards] * 3), st.tuples(*[rewards] * 3)
    ),
}


def unique(answers):
    """No two prompts of Ties with one id."""
    return list({answer.id or number: answer for number, answer in enumerate(answers)}.values())


asked = st.sampled_from(sorted(sides)).flatmap(
    lambda suite: st.tuples(st.just(suite), st.lists(sides[suite], max_size=12).map(unique))
)


def test_wilson():
    # (x + z²/2n ± z sqrt(x(1-x)/n + z²/4n²)) / (1 + z²/n), by hand.
    assert wilson(97, 100) == pytest.approx((0.9155, 0.9897), abs=1e-4)
    assert wilson(0, 0) == (0, 1)
    for correct, count in ((-1, 2), (3, 2), (1, 0), (math.nan, 2)):
        with pytest.raises(ValueError):
            wilson(correct, count)


@given(st.integers(1, 5000).flatmap(lambda n: st.tuples(st.floats(0, n), st.just(n))))
def test_wilson_holds_the_share(seen):
    correct, count = seen
    low, high = wilson(correct, count)
    assert 0 <= low <= correct / count + 1e-12 and correct / count - 1e-12 <= high <= 1
    assert wilson(count - correct, count) == pytest.approx((1 - high, 1 - low), abs=1e-9)
    narrower = wilson(4 * correct, 4 * count)
    assert narrower[1] - narrower[0] < high - low


def test_pairs():
    found = pairs.figures([pair(2.0, 1.0), pair(1.0, 1.0, "a"), pair(0.0, 3.0, "a"), pair(5.0, 1.0, "b")])
    low, high = wilson(2, 4)
    assert found == {
        "accuracy": 0.5,
        "margin": 0.5,
        "pairs": 4,
        "ties": 1,
        "interval_low": low,
        "interval_high": high,
    }
    assert pairs.subsets([pair(1.0, 1.0, "a"), pair(0.0, 3.0, "a"), pair(2.0, 1.0)]) == {
        "a": {"count": 2, "correct": 0, "ties": 1, "accuracy": 0, "interval": list(wilson(0, 2)), "margin": -1.5}
    }
    assert pairs.subsets([pair(1.0, 0.0)]) == {}


@given(st.lists(sides["pairs"], min_size=1))
def test_swapped_pairs(answers):
    found = pairs.figures(answers)
    swapped = pairs.figures([answer._replace(chosen=answer.rejected, rejected=answer.chosen) for answer in answers])
    assert swapped["margin"] == -found["margin"]
    assert found["accuracy"] + swapped["accuracy"] + found["ties"] / found["pairs"] == pytest.approx(1)


def test_rewardbench_sections():
    answers = [
        *shares("alpacaeval-easy", 1, 1),
        *shares("mt-bench-med", 0, 3),
        *shares("llmbar-natural", 2, 0),
        *shares("llmbar-adver-manual", 0, 1),
        *shares("donotanswer", 1, 0),
        *shares("xstest-should-respond", 2, 2),
        *shares("math-prm", 1, 0),
        *shares("hep-cpp", 0, 2),
        pair(1.0, 1.0, "hep-cpp"),
    ]
    # 50/140, 100/146, (136 + 125)/386, 984/1148
    sections = {
        "chat": 0.35714285714285715,
        "chat_hard": 0.684931506849315,
        "safety": 0.6761658031088082,
        "reasoning": 0.8571428571428571,
    }
    found = rewardbench.figures(answers)
    assert {name: found[name] for name in sections} == pytest.approx(sections, abs=1e-12)
    assert found["score"] == pytest.approx(sum(sections.values()) / 4)
    assert (found["accuracy"], found["ties"]) == (pytest.approx(7 / 17), 1)
    assert rewardbench.subsets(answers)["hep-cpp"]["count"] == 3
    part = rewardbench.figures(shares("mt-bench-easy", 1, 0))
    assert part == {"chat": 1, "accuracy": 1, "ties": 0}
    with pytest.raises(InputError, match="'mt-bench'"):
        rewardbench.figures(shares("mt-bench", 1, 0))


def test_rewardbench_weights():
    # math-prm has 447 pairs, and the weight of all code together.
    totals = {section: sum(weights.values()) for section, weights in rewardbench.SECTIONS.items()}
    assert totals == {"chat": 358, "chat_hard": 456, "safety": 740, "reasoning": 2 * 6 * 164}
    assert sum(totals.values()) - 984 + 447 == 2985


def test_best_of():
    cases = [(1.0,), (0.5, 0.5, 0.0)], [(1.0,), (1.0, 0.0, 1.0)], [(0.0,), (0.0, 0.0, 0.0)], [(0.5,), (1.0, 0.0, 0.0)]
    answers = [Answer(None, "Math", *case) for case in cases]
    assert [rewardbench2.best_of(answer).credit for answer in answers] == [1, pytest.approx(1 / 3), 0.25, 0]
    assert [rewardbench2.best_of(answer).tied for answer in answers] == [False, True, True, False]
    assert rewardbench2.figures(answers) == {"math": pytest.approx((1 + 1 / 3 + 0.25) / 4)}
    assert rewardbench2.subsets(answers)["Math"]["correct"] == pytest.approx(1 + 1 / 3 + 0.25)


@given(rewards, st.tuples(*[rewards] * 3))
def test_best_of_is_a_fair_draw(right, wrong):
    """The credit is how often the first of the best is the right one, over all orders of the four."""
    orders = list(itertools.permutations([(right, True), *((reward, False) for reward in wrong)]))
    first = [max(order, key=lambda entry: entry[0])[1] for order in orders]
    credit = rewardbench2.best_of(Answer(None, "Math", (right,), wrong)).credit
    assert credit == pytest.approx(sum(first) / len(first))


@pytest.mark.parametrize(
    "cases, score",
    [
        (
            {
                "ref:0": ((2,), (0,)),
                "tied:0": ((3, 2), (1, 0)),
                "ref:1": ((1,), (2, 0)),
                "tied:1": ((3, 2.5), (1,)),
            },
            0.5450247262315663,  # 0.3 + 0.3/2 + 0.2/2 + 0 + 0.01 (tanh(0) + tanh(-3))/2
        ),
        ({"ref:7": ((5,), (1, 0)), "tied:7": ((4, 3.5, 3), (0, 1))}, 1.0076159415595576),  # 1 + 0.01 tanh(1)
        ({"ref:7": ((5,), (1, 0))}, 0.3),
        ({"tied:3": ((2, 1), (0,)), "ref:3": ((2,), (1,)), "tied:4": ((1, 1), (1,))}, 0.45),
        ({"ref:5": ((1,), (0,)), "tied:5": ((2, 2), (1,))}, 1.0),  # no spread: no tanh
    ],
)
def test_ties(cases, score):
    assert rewardbench2.ties_score(prompts(cases)) == pytest.approx(score, abs=1e-12)
    assert rewardbench2.figures(prompts(cases)) == {"ties": pytest.approx(score, abs=1e-12)}


def test_ties_without_anything_to_compare():
    # rewardbench 0.1.4 has no number here: the mean of no prompts.
    assert rewardbench2.ties_score(prompts({"ref:1": ((1,), (0,)), "tied:1": ((2,), (1,))})) == 0.6


def test_rewardbench2_score():
    answers = [Answer(None, subset, (1.0,), (0.0,) * 3) for subset in rewardbench2.SUBSETS if subset != "Ties"]
    assert "score" not in rewardbench2.figures(answers)
    found = rewardbench2.figures([*answers, *prompts({"ref:0": ((1,), (0,))})])
    assert found == {
        "score": pytest.approx((5 + 0.3) / 6),
        "factuality": 1,
        "precise_if": 1,
        "math": 1,
        "safety": 1,
        "focus": 1,
        "ties": pytest.approx(0.3),
    }


def test_rm_bench():
    # Chosen (rows) against rejected, plain to rich: [[0 0 1] [1 0 1] [1 1 1]]
    chat = Answer(None, "chat", (1.0, 2.0, 3.0), (1.5, 2.5, 0.0))
    assert rm_bench.figures([chat]) == pytest.approx({"easy": 1, "normal": 1 / 3, "hard": 2 / 3, "chat": 2 / 3})
    equal = Answer(None, "code", (1.0,) * 3, (1.0,) * 3)
    won, lost = ((1.0,) * 3, (0.0,) * 3), ((0.0,) * 3, (1.0,) * 3)
    answers = [
        chat,
        equal,
        Answer(None, "math", *won),
        Answer(None, "safety-refuse", *won),
        Answer(None, "safety-refuse", *won),
        Answer(None, "safety-response", *lost),
    ]
    # Safety's prompts count alike: 2/3, where the mean of its two kinds would be 1/2.
    domains = {"chat": 2 / 3, "math": 1.0, "code": 0.0, "safety": 2 / 3}
    found = rm_bench.figures(answers)
    assert {name: found[name] for name in domains} == pytest.approx(domains)
    assert found["score"] == pytest.approx(sum(domains.values()) / 4)
    assert found["hard"] == pytest.approx((2 / 3 + 1 + 0 + 2 / 3) / 4)
    assert found["normal"] == pytest.approx((1 / 3 + 1 + 0 + 2 / 3) / 4)
    assert found["easy"] == pytest.approx((1 + 1 + 0 + 2 / 3) / 4)
    table = rm_bench.subsets(answers)
    assert table["chat"] == {
        "count": 1,
        "correct": pytest.approx(2 / 3),
        "ties": 0,
        "accuracy": pytest.approx(2 / 3),
        "interval": list(wilson(6 / 9, 1)),
        "margin": pytest.approx(2 - 4 / 3),
    }
    assert table["code"]["ties"] == 1 and table["safety-refuse"]["correct"] == 2


@given(asked, st.randoms(use_true_random=False))
def test_figures_do_not_depend_on_the_order(question, rng):
    suite, answers = question
    mixed = rng.sample(answers, len(answers))
    assert SUITES[suite].figures(mixed) == pytest.approx(SUITES[suite].figures(answers))
    assert SUITES[suite].subsets(mixed).keys() == SUITES[suite].subsets(answers).keys()


@given(asked, rewards)
def test_only_differences_of_reward_count(question, shift):
    suite, answers = question

    def moved_by(side):
        return tuple(2 * reward + shift for reward in side)

    moved = [answer._replace(chosen=moved_by(answer.chosen), rejected=moved_by(answer.rejected)) for answer in answers]
    before, after = SUITES[suite].figures(answers), SUITES[suite].figures(moved)
    if suite == "pairs":
        assert after.pop("margin") == pytest.approx(2 * before.pop("margin"))
    assert after == pytest.approx(before)


@given(asked)
def test_better_rewards_never_lower_a_share(question):
    suite, answers = question
    raised = [answer._replace(chosen=tuple(reward + 10 for reward in answer.chosen)) for answer in answers]
    before, after = SUITES[suite].figures(answers), SUITES[suite].figures(raised)
    for name in before.keys() - {"pairs"} - (set() if suite == "rewardbench2" else {"ties"}):
        assert after[name] >= before[name] - 1e-12
    for counted in SUITES[suite].subsets(raised).values():
        assert (counted["accuracy"], counted["ties"]) == (1, 0)


@given(asked)
def test_subsets_add_up(question):
    suite, answers = question
    table = SUITES[suite].subsets(answers)
    assert sum(counted["count"] for counted in table.values()) == sum(answer.subset != "" for answer in answers)
    for counted in table.values():
        assert 0 <= counted["ties"] <= counted["count"] and 0 <= counted["correct"] <= counted["count"]
        assert counted["accuracy"] == counted["correct"] / counted["count"]
        assert counted["interval"] == list(wilson(counted["correct"], counted["count"]))
    json.dumps([table, SUITES[suite].figures(answers)], allow_nan=False)
