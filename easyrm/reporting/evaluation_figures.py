"""The figures of one evaluation: rewards, calibration, accuracy by length and by subset."""

from collections.abc import Iterable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import MaxNLocator

from easyrm.reporting import drawing
from easyrm.reporting.drawing import BLUE, GREY, PERCENT, SMALL, VERMILION, Picture, draw
from easyrm.reporting.load import Evaluation, Scores, Subset, count_of
from easyrm.reporting.statistics import Bin, Calibration, LengthBias
from easyrm.reporting.words import signed


def rewards_figure(evaluation: Evaluation, scores: Scores) -> Picture:
    """Distributions of the rewards of chosen and of rejected answers."""

    def paint(axes: Axes) -> None:
        every = np.concatenate([scores.chosen, scores.rejected])
        low, high = float(every.min()), float(every.max())
        count = int(np.clip(np.sqrt(len(every)), 10, 40))
        edges = np.linspace(low, high, count + 1) if high > low else np.linspace(low - 0.5, low + 0.5, 3)
        for values, color, label in ((scores.chosen, BLUE, "chosen"), (scores.rejected, VERMILION, "rejected")):
            heights = np.histogram(values, edges)[0] / len(values)
            axes.stairs(heights, edges, fill=True, color=color, alpha=0.28)
            axes.stairs(
                heights, edges, color=color, linewidth=1.3, label=f"{label}, mean {signed(values.mean(), '.2f')}"
            )
            axes.axvline(values.mean(), color=color, linewidth=1.2, linestyle="--")
        axes.set_title("Rewards of chosen and rejected answers")
        axes.set_xlabel("reward (logits)")
        axes.set_ylabel("share of answers")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.xaxis.set_major_formatter(SMALL)
        drawing.legend(axes)

    return draw(
        f"{evaluation.name}-rewards",
        f"Rewards of {len(scores.chosen)} chosen and {len(scores.rejected)} rejected answers",
        paint,
    )


def calibration_figure(evaluation: Evaluation, calibration: Calibration) -> Picture:
    """Observed against predicted probability, bins of equal count."""

    def paint(axes: Axes) -> None:
        most = min(1.0, max(0.6, calibration.bins[-1].mean + 0.02))
        axes.plot([0.5, most], [0.5, most], color=GREY, linewidth=1.2, linestyle="--", label="perfectly calibrated")
        _points(axes, [one.mean for one in calibration.bins], calibration.bins, "observed, 95 % interval")
        axes.set_title("Calibration")
        axes.set_xlabel("predicted: the favoured answer is the chosen one")
        axes.set_ylabel("observed share")
        axes.xaxis.set_major_formatter(PERCENT)
        axes.yaxis.set_major_formatter(PERCENT)
        drawing.legend(axes)

    return draw(f"{evaluation.name}-calibration", f"Calibration in {count_of(len(calibration.bins), 'bin')}", paint)


def length_figure(evaluation: Evaluation, bias: LengthBias, accuracy: float) -> Picture:
    """Accuracy by how many tokens more the chosen answer has."""

    def paint(axes: Axes) -> None:
        axes.axhline(accuracy, color=GREY, linewidth=1.2, linestyle="--", label=f"all pairs {100 * accuracy:.1f} %")
        _points(axes, range(len(bias.bins)), bias.bins, "accuracy, 95 % interval")
        labels = [_range(one) for one in bias.bins]
        axes.set_xticks(range(len(labels)), labels, rotation=35, ha="right", rotation_mode="anchor", fontsize=8)
        axes.set_title("Accuracy by length")
        axes.set_xlabel("tokens of chosen minus tokens of rejected")
        axes.set_ylabel("pairs ranked as labelled")
        axes.yaxis.set_major_formatter(PERCENT)
        axes.margins(x=0.06)
        drawing.legend(axes)

    return draw(f"{evaluation.name}-length", "Accuracy by difference of length in tokens", paint)


def subsets_figure(evaluation: Evaluation, subsets: list[Subset], accuracy: float | None) -> Picture:
    """Accuracy of each subset, in the order given, as horizontal bars."""

    def paint(axes: Axes) -> None:
        rows = range(len(subsets))
        axes.barh(rows, [one.accuracy for one in subsets], color=BLUE, alpha=0.8, height=0.66)
        for row, one in zip(rows, subsets, strict=True):
            if one.interval:
                axes.plot(one.interval, [row, row], color="#12293c", linewidth=1.3, solid_capstyle="butt")
            axes.text(
                1.02, row, f"{100 * one.accuracy:.1f} %", transform=axes.get_yaxis_transform(), va="center", fontsize=8
            )
        axes.set_yticks(rows, [f"{drawing.shorten(one.name)} ({one.count:,})" for one in subsets], fontsize=8)
        axes.set_ylim(len(subsets) - 0.4, -0.6)
        axes.set_xlim(0, 1)
        if accuracy is not None:
            axes.axvline(accuracy, color=VERMILION, linewidth=1.2, linestyle="--", label=f"all {100 * accuracy:.1f} %")
        axes.set_title("Accuracy by subset (pairs), 95 % interval")
        axes.set_xlabel("accuracy")
        axes.xaxis.set_major_formatter(PERCENT)
        axes.grid(visible=False, axis="y")
        drawing.legend(axes)

    height = max(drawing.HEIGHT, 1.1 + 0.24 * len(subsets))
    return draw(f"{evaluation.name}-subsets", f"Accuracy of {count_of(len(subsets), 'subset')}", paint, height)


def _points(axes: Axes, at: Iterable[float], bins: list[Bin], label: str) -> None:
    shares = np.array([one.share for one in bins])
    below, above = shares - [one.low for one in bins], np.array([one.high for one in bins]) - shares
    axes.errorbar(at, shares, [np.maximum(below, 0), np.maximum(above, 0)], fmt="o", color=BLUE, label=label)
    axes.yaxis.set_major_locator(MaxNLocator(6))


def _range(one: Bin) -> str:
    ends = [signed(end, ",.0f") for end in (one.least, one.largest)]
    return ends[0] if ends[0] == ends[1] else f"{ends[0]} … {ends[1]}"
