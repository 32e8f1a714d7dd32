"""The figures of training; where one cannot be drawn, a sentence that says why stands in its place."""

import numpy as np
from matplotlib.axes import Axes
from matplotlib.ticker import FuncFormatter

from easyrm.reporting import drawing, words
from easyrm.reporting.drawing import BLUE, COUNT, GREEN, GREY, PERCENT, SMALL, VERMILION, Picture, draw
from easyrm.reporting.load import Run, held_out, number
from easyrm.reporting.statistics import running_mean

Shown = Picture | str


def training_figures(run: Run) -> list[Shown]:
    """Loss, accuracy, learning rate, gradient norm and benchmark scores over steps."""
    return [_loss(run), _accuracy(run), _learning_rate(run), _gradient_norm(run), *_benchmarks(run)]


def speed_figures(run: Run) -> list[Shown]:
    """Pairs and tokens a second, and MFU, over steps."""
    return [
        _speed(run, "pairs_per_second", "pairs-per-second", "Pairs a second", "pairs/s", COUNT),
        _speed(run, "tokens_per_second", "tokens-per-second", "Tokens a second, without padding", "tokens/s", COUNT),
        _speed(run, "mfu", "mfu", "Model FLOPs utilisation (MFU)", "share of peak bf16 FLOP/s", PERCENT),
    ]


def _loss(run: Run) -> Shown:
    (steps, values), (held_steps, held) = run.series("loss"), run.series("eval/loss")
    if not len(steps) and not len(held):
        return "No loss was recorded."

    def paint(axes: Axes) -> None:
        _smoothed(axes, steps, values, "training")
        if len(held):
            axes.plot(held_steps, held, "o-", color=VERMILION, label="held-out")
        skipped = [line["step"] for line in run.lines if "skipped" in line]
        if skipped:
            where = axes.get_xaxis_transform()
            axes.plot(skipped, [0.03] * len(skipped), "|", color=GREY, markersize=9, transform=where, label="skipped")
        drawing.over_steps(axes, "Loss", "loss a pair (nats)", SMALL)
        drawing.legend(axes)

    return draw("loss", f"Training loss over {len(steps)} logged steps and {len(held)} held-out evaluations", paint)


def _accuracy(run: Run) -> Shown:
    (steps, values), held = run.series("accuracy"), held_out(run)
    if not len(steps) and not held:
        return "No accuracy was recorded."

    def paint(axes: Axes) -> None:
        _smoothed(axes, steps, values, "training")
        if held:
            at, shares, lows, highs = np.array(
                [(one.step, one.share, *(one.interval or (one.share,) * 2)) for one in held]
            ).T
            label = "held-out, 95 % interval" if any(one.interval for one in held) else "held-out"
            axes.errorbar(at, shares, [shares - lows, highs - shares], fmt="o-", color=VERMILION, label=label)
        axes.axhline(0.5, color=GREY, linewidth=1, linestyle=":")
        drawing.over_steps(axes, "Pairwise accuracy", "pairs ranked as labelled", PERCENT)
        drawing.legend(axes)

    return draw("accuracy", f"Accuracy over {len(steps)} logged steps and {len(held)} held-out evaluations", paint)


def _learning_rate(run: Run) -> Shown:
    steps, values = run.series("learning_rate")
    if not len(steps):
        return "No learning rate was recorded."

    def paint(axes: Axes) -> None:
        axes.plot(steps, values, marker=drawing.marker(len(steps)), color=BLUE)
        axes.set_ylim(bottom=0)
        drawing.over_steps(axes, "Learning rate", "learning rate", SMALL)

    return draw("learning-rate", f"Learning rate over steps, at most {values.max():.3g}", paint)


def _gradient_norm(run: Run) -> Shown:
    steps, values = run.series("grad_norm")
    if not len(steps):
        return "No gradient norm was recorded."
    clip = number(run.record["config"].get("optimizer", {}).get("clip_norm"))

    def paint(axes: Axes) -> None:
        _smoothed(axes, steps, values, "before clipping")
        if clip:
            axes.axhline(clip, color=VERMILION, linewidth=1.2, linestyle="--", label=f"clipped to {clip:g}")
        if values.min() > 0 and values.max() > 20 * values.min():
            axes.set_yscale("log")
        drawing.over_steps(axes, "Gradient norm", "global L2 norm", SMALL)
        drawing.legend(axes)

    return draw("gradient-norm", f"Gradient norm over steps, median {np.median(values):.3g}", paint)


def _benchmarks(run: Run) -> list[Shown]:
    keys = sorted({key for line in run.lines for key in line if key.startswith("eval/") and key.endswith("/score")})
    series = {key.split("/", 1)[1].removesuffix("/score"): run.series(key) for key in keys}
    if not any(len(steps) for steps, _ in series.values()):
        return []

    def paint(axes: Axes) -> None:
        for (name, (steps, values)), color in zip(series.items(), (BLUE, VERMILION, GREEN, GREY), strict=False):
            axes.plot(steps, values, "o-", color=color, label=drawing.shorten(name))
        drawing.over_steps(axes, "Benchmark scores", "score", PERCENT)
        drawing.legend(axes)

    return [draw("benchmarks", f"Scores over steps of {', '.join(series)}", paint)]


def _speed(run: Run, key: str, name: str, title: str, unit: str, form: FuncFormatter) -> Shown:
    steps, values = run.series(key)
    if not len(steps):
        return f"{title}: not recorded{', as for a chip whose peak is not known' if key == 'mfu' else ''}."
    median = float(np.median(values))
    shown = words.percent(median) if form is PERCENT else words.rate(median)

    def paint(axes: Axes) -> None:
        axes.plot(steps, values, marker=drawing.marker(len(steps)), color=BLUE, linewidth=1, alpha=0.75)
        axes.axhline(median, color=VERMILION, linewidth=1.2, linestyle="--", label=f"median {shown}")
        axes.set_ylim(bottom=0)
        drawing.over_steps(axes, title, unit, form)
        drawing.legend(axes)

    return draw(name, f"{title} over steps, median {shown}", paint)


def _smoothed(axes: Axes, steps: np.ndarray, values: np.ndarray, label: str) -> None:
    width = len(steps) // 30 * 2 + 1
    if width == 1:
        axes.plot(steps, values, marker=drawing.marker(len(steps)), color=BLUE, label=label if len(steps) else None)
        return
    axes.plot(steps, values, color=BLUE, linewidth=0.8, alpha=0.25)
    axes.plot(steps, running_mean(values, width), color=BLUE, label=f"{label}, mean of {width} logged steps")
