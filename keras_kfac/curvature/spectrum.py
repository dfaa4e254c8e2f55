"""The spectra of curvature blocks, for those who study them."""

from typing import Any, NamedTuple

import numpy as np

# Curves of more points look the same.
_POINTS = 200


class LayerSpectrum(NamedTuple):
    """The eigenvalues of a block `A ⊗ G`: all products of one of `A` and one of `G`.

    Attributes:
        layer: Path of the layer.
        input_eigenvalues: Those of `A`, `[..., d_in]`. Leading axes are groups or blocks.
        output_eigenvalues: Those of `G`, `[..., d_out]`.
        damping: `λ` of the block, with the L2 regulariser of its kernel.
    """

    layer: str
    input_eigenvalues: np.ndarray
    output_eigenvalues: np.ndarray
    damping: float

    @property
    def trace(self) -> float:
        """Sum of the eigenvalues."""
        each = self.input_eigenvalues.sum(axis=-1) * self.output_eigenvalues.sum(axis=-1)
        return float(each.sum())

    @property
    def largest(self) -> float:
        """The largest eigenvalue."""
        each = self.input_eigenvalues.max(axis=-1) * self.output_eigenvalues.max(axis=-1)
        return float(each.max())

    @property
    def effective_dimension(self) -> float:
        """How many directions have more curvature than damping: `Σ s / (s + λ)`.

        Source: MacKay (1992), "Bayesian interpolation", section 4 (the number of well-determined
        parameters).
        """
        total = 0.0
        for column in np.moveaxis(self.output_eigenvalues, -1, 0):
            values = self.input_eigenvalues * column[..., np.newaxis]
            damped = values + self.damping
            total += float(np.divide(values, damped, np.zeros_like(values), where=damped > 0).sum())
        return total

    def quantiles(self, points: int = _POINTS) -> tuple[np.ndarray, np.ndarray]:
        """Eigenvalues from the largest to the smallest, evenly spaced among all.

        Args:
            points: So many of each factor's are combined.

        Returns:
            The share of the eigenvalues that are larger, in [0, 1], and eigenvalues.
        """
        a, g = (_some(v, points) for v in (self.input_eigenvalues, self.output_eigenvalues))
        values = np.sort((a[..., :, np.newaxis] * g[..., np.newaxis, :]).ravel())[::-1]
        kept = np.unique(np.linspace(0, len(values) - 1, points).round().astype(int))
        return kept / len(values), values[kept]


def _some(values: np.ndarray, points: int) -> np.ndarray:
    ordered = np.sort(values, axis=-1)
    kept = np.linspace(0, values.shape[-1] - 1, min(points, values.shape[-1])).round().astype(int)
    return ordered[..., kept]


class CurvatureSummary(list[LayerSpectrum]):
    """Spectra of all blocks, as `KFAC.curvature_summary()` returns them; prints as a table."""

    def __str__(self) -> str:
        header = ("layer", "trace", "largest", "damping", "above the damping")
        table: list[tuple[str, ...]] = [header]
        for row in self:
            numbers = (row.trace, row.largest, row.damping, row.effective_dimension)
            table.append((row.layer, *(f"{number:.3g}" for number in numbers)))
        widths = [max(len(line[column]) for line in table) for column in range(len(header))]
        lines = ["  ".join(c.ljust(width) for c, width in zip(line, widths)) for line in table]
        return "\n".join(line.rstrip() for line in lines)

    def plot(self, axes: Any = None) -> Any:
        """Draws the spectrum of each block, with its damping as a dotted line.

        Args:
            axes: Matplotlib's, to draw on; a new figure if there are none.

        Returns:
            The axes.

        Raises:
            ImportError: Without Matplotlib.
        """
        if axes is None:
            import matplotlib.pyplot as plt

            _, axes = plt.subplots()
        for row in self:
            share, values = row.quantiles()
            positive = values > 0
            (line,) = axes.semilogy(share[positive], values[positive], label=row.layer)
            axes.axhline(row.damping, color=line.get_color(), linestyle=":", linewidth=1)
        axes.set(xlabel="share of the directions", ylabel="eigenvalue of A ⊗ G, damping (dotted)")
        axes.legend()
        return axes
