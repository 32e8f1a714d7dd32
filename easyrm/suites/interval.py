"""How far a share that was counted on a few answers may lie from the true one."""

import math

_Z = 1.959963984540054  # the normal distribution holds 95 % within this many standard deviations


def wilson(correct: float, count: int) -> tuple[float, float]:
    """The 95 % Wilson score interval of a share of which `correct` in `count` were seen, both ends in [0, 1].

    `correct` may be a fraction, as where an answer earns a part of its credit. Without any count the share may be
    anything: (0, 1). Raises ValueError where `correct` is not in [0, count]. Source: Wilson, "Probable inference, the
    law of succession, and statistical inference" (1927).
    """
    if not 0 <= correct <= count:
        raise ValueError(f"{correct} correct of {count}")
    if count == 0:
        return 0.0, 1.0
    share, square = correct / count, _Z**2 / count
    middle = share + square / 2
    half = _Z * math.sqrt((share * (1 - share) + square / 4) / count)
    return max(0.0, (middle - half) / (1 + square)), min(1.0, (middle + half) / (1 + square))
