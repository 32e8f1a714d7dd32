"""Numbers and findings, in words for people."""

from typing import Any

from easyrm.reporting.load import Scores, number
from easyrm.reporting.statistics import Calibration, LengthBias

MISSING = "\u2013"  # en dash


def percent(share: float) -> str:
    """0.7412 -> 74.1 %."""
    return f"{100 * share:.1f} %".replace("-", "\u2212")


def count(value: Any) -> str:
    """1234 -> 1,234; what is no number is a dash."""
    known = number(value)
    return MISSING if known is None else f"{known:,.0f}"


def name(key: str) -> str:
    """chat_hard -> Chat hard."""
    return key.replace("_", " ").capitalize()


def interval(low: float, high: float) -> str:
    """The ends of an interval of a share: 71.9 to 76.3 %."""
    return f"{100 * low:.1f} to {100 * high:.1f} %"


def figure(name: str, value: float, *, share: bool) -> str:
    """A headline figure of an evaluation: shares in percent, margins signed, counts whole."""
    if share:
        return percent(value)
    return f"{value:,.0f}" if name != "margin" and value.is_integer() else signed(value, ".3f")


def signed(value: float, form: str) -> str:
    """With + or a true minus sign in front; 0 has neither."""
    text = f"{value:+{form}}".replace("-", "\u2212")
    return text[1:] if not any(digit in text for digit in "123456789") else text


def rate(value: float) -> str:
    """Something a second: three digits, or whole."""
    return f"{value:.3g}" if value < 1000 else f"{value:,.0f}"


def rewards_text(scores: Scores) -> str:
    """Means and spreads of the rewards of both sides."""
    sides = (
        f"{name} have a mean of {signed(values.mean(), '.2f')} and a standard deviation of {values.std():.2f}"
        for name, values in (("Chosen answers", scores.chosen), ("rejected ones", scores.rejected))
    )
    return ", ".join(sides) + "."


def calibration_texts(calibration: Calibration) -> list[str]:
    """What the figure says, and how it counts."""
    gap = calibration.predicted - calibration.observed
    verdict = "which is consistent with being calibrated on the whole"
    if not calibration.low <= calibration.predicted <= calibration.high:
        verdict = f"{'overconfident' if gap > 0 else 'underconfident'} by {100 * abs(gap):.1f} points"
    return [
        f"On average the model gives {percent(calibration.predicted)} to the answer that it favours; that one is the "
        f"chosen one in {percent(calibration.observed)} (95 % interval {interval(calibration.low, calibration.high)}): "
        f"{verdict}. Expected calibration error {100 * calibration.error:.1f} points.",
        "Predicted is sigmoid(|reward difference|), at least 50 %; bins hold equally many pairs; a tie predicts 50 % "
        "and counts half.",
    ]


def length_texts(bias: LengthBias) -> list[str]:
    """What the model makes of length: one plain sentence, then the numbers."""
    texts = []
    if bias.favoured and bias.chosen:
        texts.append(
            f"{_length_verdict(bias)} It favours the longer answer in {percent(bias.favoured[0])} of the "
            f"{bias.unequal:,} pairs of unequal length ({interval(*bias.favoured[1:])}); the longer one is the chosen "
            f"one in {percent(bias.chosen[0])} ({interval(*bias.chosen[1:])})."
        )
    else:
        texts.append("All pairs are of equal length, so nothing can be said about length bias.")
    texts.append(
        f"Reward and length correlate by {_correlation(bias.pearson)} (Pearson) and {_correlation(bias.spearman)} "
        f"(Spearman), reward difference and length difference by {_correlation(bias.difference_pearson)} (Pearson). "
        "Lengths are tokens of whole conversations; a tie in reward is wrong, and favours the longer by half."
    )
    return texts


def _length_verdict(bias: LengthBias) -> str:
    if bias.excess is None:
        return "One pair says nothing about length bias."
    mean, low, high = (100 * value for value in bias.excess)
    if low <= 0 <= high:
        return (
            "The model favours longer answers no more and no less than the labels do, as far as these pairs can tell."
        )
    more, ends = ("more", (low, high)) if mean > 0 else ("less", (-high, -low))
    what = (
        "length, or what goes with it, earns reward that the labels do not give" if mean > 0 else "length is held back"
    )
    return (
        f"The model favours longer answers {more} often than the labels do, by {abs(mean):.1f} points "
        f"(95 % interval {ends[0]:.1f} to {ends[1]:.1f}): {what}."
    )


def _correlation(value: float | None) -> str:
    return "an undefined value" if value is None else signed(value, ".2f")
