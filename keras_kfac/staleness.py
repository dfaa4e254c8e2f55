"""Update periods that follow how fast the curvature changes."""

import statistics
from collections.abc import Mapping

from keras_kfac import validation


class StalenessSchedule:
    """Refreshes the inverses more rarely while they change little, and more often when they do.

    For `KFACCallback(inverse_update_period=StalenessSchedule(), unit="step")`. A refresh tells how
    much the inverses have changed since the one before, `KFAC.staleness()`. If that is below `low`
    for the median layer the period doubles; above `high` it is halved. The period of the factors
    keeps its ratio to that of the inverses, as far as whole steps allow.

    Args:
        low: Relative change that is not worth a refresh, `> 0`.
        high: Relative change that asks for more refreshes, above `low`.
        shortest: The shortest period in steps, a positive int.
        longest: The longest.

    Raises:
        ValueError: For arguments out of range.

    Example:
    >>> schedule = StalenessSchedule(low=0.05, high=0.2)
    >>> schedule.next(20, {"dense": 0.01, "dense_1": 0.03})
    40
    >>> schedule.next(20, {"dense": 0.5, "dense_1": 0.3})
    10

    Source: Osawa et al. (2020), arXiv:2002.06015, section 6.2, adapts the intervals of the
    statistics in a similar way to how much these change.
    """

    def __init__(
        self, low: float = 0.1, high: float = 0.4, shortest: int = 5, longest: int = 200
    ) -> None:
        validation.check_staleness(low, high, shortest, longest)
        self.low = low
        self.high = high
        self.shortest = shortest
        self.longest = longest

    def next(self, period: int, staleness: Mapping[str, float]) -> int:
        """The next period of the inverses.

        Args:
            period: The present one.
            staleness: Relative changes in the last refresh by layer; empty if there was none.
        """
        if staleness:
            change = statistics.median(staleness.values())
            if change < self.low:
                period *= 2
            elif change > self.high:
                period //= 2
        return min(max(period, self.shortest), self.longest)
