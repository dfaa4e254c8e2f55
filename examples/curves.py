"""The CURVES images of the deep autoencoder benchmark, made from random smooth curves.

Hinton & Salakhutdinov (2006) drew each image as a curve through three randomly chosen points. Here
it is the quadratic Bezier curve of three points, so six numbers determine an image: a code layer of
six units can in principle be lossless.
"""

import numpy as np

MARGIN = 3.0  # pixels between a control point and the border, so that the pen stays inside
PEN = 0.7  # standard deviation of the pen's profile in pixels: a line about 1.7 pixels wide
CURVE_POINTS = 80  # less than a pixel apart on nearly all curves
CHUNK = 1000  # images drawn at a time, to bound memory


def control_points(count: int, seed: int, size: int = 28) -> np.ndarray:
    """Draws the three control points of each curve, uniformly and independently.

    Args:
        count: Number of curves.
        seed: Seed of the random generator.
        size: Width and height of the images in pixels.

    Returns:
        Array of shape `(count, 3, 2)`, in pixels.
    """
    return np.random.default_rng(seed).uniform(MARGIN, size - MARGIN, (count, 3, 2))


def draw(points: np.ndarray, size: int = 28) -> np.ndarray:
    """Draws quadratic Bezier curves with a soft pen.

    A pixel is the integral of a Gaussian pen along the curve. As a Gaussian is a product over the
    two axes, one matrix product for each image sums over the whole curve.

    Args:
        points: Control points of shape `(count, 3, 2)`.
        size: Width and height of the images in pixels.

    Returns:
        float32 array of shape `(count, size, size)` in [0, 1]; 1 is ink.
    """
    t = ((np.arange(CURVE_POINTS) + 0.5) / CURVE_POINTS)[:, None]
    start, middle, end = (points[:, i, None] for i in range(3))
    curve = (1 - t) ** 2 * start + 2 * t * (1 - t) * middle + t**2 * end
    velocity = 2 * (1 - t) * (middle - start) + 2 * t * (end - middle)
    # Weighted by arc length, fast and slow parts of a curve get the same ink: 1 on a long line.
    ink = np.linalg.norm(velocity, axis=-1) / (CURVE_POINTS * PEN * np.sqrt(2 * np.pi))
    pixels = np.arange(size) + 0.5
    profile = np.exp(-((curve[..., None] - pixels) ** 2) / (2 * PEN**2)).astype("float32")
    across, down = profile[:, :, 0], profile[:, :, 1]  # (count, CURVE_POINTS, size)
    images = np.swapaxes(down * ink[..., None].astype("float32"), 1, 2) @ across
    return np.minimum(images, 1.0)


def make_curves(count: int, seed: int, size: int = 28) -> np.ndarray:
    """Makes `count` images, the same for the same seed.

    Returns:
        float32 array of shape `(count, size, size)` in [0, 1].
    """
    points = control_points(count, seed, size)
    return np.concatenate([draw(points[i : i + CHUNK], size) for i in range(0, count, CHUNK)])
