"""The distribution of targets of which `log(1 + y)` is normal."""

from typing import Any

import tensorflow as tf
import tensorflow_probability as tfp


class LogNormalLessOne(tfp.distributions.TransformedDistribution):
    """`y > -1` with `log(1 + y) ~ N(loc, scale²)`.

    Args:
        loc: Means of the logarithms.
        scale: Their standard deviations, positive.

    Example:
    >>> targets = LogNormalLessOne(0.0, 1.0)
    >>> float(targets.quantile(0.5)), round(float(targets.mean()), 2)  # √e - 1
    (0.0, 0.65)
    """

    def __init__(self, loc: Any, scale: Any, name: str = "LogNormalLessOne") -> None:
        parameters = dict(locals())
        super().__init__(
            tfp.distributions.Normal(loc, scale),
            tfp.bijectors.Expm1(),
            parameters=parameters,
            name=name,
        )

    @classmethod
    def _parameter_properties(cls, dtype: Any, num_classes: int | None = None) -> dict[str, Any]:
        return {name: tfp.util.ParameterProperties() for name in ("loc", "scale")}

    def _mean(self) -> tf.Tensor:
        return tf.math.expm1(self.distribution.mean() + 0.5 * self.distribution.variance())

    def _variance(self) -> tf.Tensor:
        variance = self.distribution.variance()
        return tf.math.expm1(variance) * tf.exp(2 * self.distribution.mean() + variance)
