"""How much of Keras's own architectures has a curvature block.

    python benchmarks/coverage.py

Builds every model of `keras.applications` without weights from elsewhere, and writes the share of
its trained weights under a curvature block, and what is left to the fallback, to docs/coverage.md.
"""

import gc
import inspect
import os
import sys
from collections.abc import Callable
from pathlib import Path

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")
ROOT = Path(__file__).parent.parent
sys.path[:0] = [str(ROOT)]

import keras  # noqa: E402

from keras_kfac import KFAC, Coverage  # noqa: E402

APPLICATIONS: dict[str, Callable[..., keras.Model]] = {
    name: thing
    for name, thing in vars(keras.applications).items()
    if inspect.isfunction(thing) and name[0].isupper()
}

HEADER = """# Coverage of keras.applications

Written by `benchmarks/coverage.py` (Keras {version}): for each architecture, as Keras builds it,
how many of its trained weights are under a curvature block, and which layers are left to the
fallback optimizer. "Full", "diagonal" and "coarser" say how many of them are in such blocks: full
or diagonal blocks of scales and offsets, Kronecker-factored blocks with a factor that is in blocks
for its size. "Pooled" says how many are in layers whose outputs are averaged over positions before
the loss: `weight_sharing="auto"` treats them by "reduce". "Memory" is what factors and inverses
take, in multiples of the weights.

| architecture | weights | covered | full | diagonal | coarser | pooled | memory | fallback |
|---|---|---|---|---|---|---|---|---|
"""


def coverage(name: str) -> Coverage:
    """What `coverage()` says of an architecture."""
    return KFAC(weight_sharing="auto").attach(APPLICATIONS[name](weights=None)).coverage()


def row(name: str, rows: Coverage) -> str:
    """A line of the table."""
    total = sum(r.weights for r in rows)

    def share(weights: int) -> str:
        percent = 100 * weights / total
        return f"{percent:.3g} %" if percent > 99 else f"{percent:.2g} %" if weights else ""

    blocks = {b: sum(r.weights for r in rows if r.block == b) for b in ("full", "diagonal")}
    reasons = {w: sum(r.weights for r in rows if w in r.reason) for w in ("is large", "reduce")}
    left = sorted({r.layer_type for r in rows if r.block == "fallback"})
    cells = [
        name,
        f"{total:,}",
        f"{100 * rows.fraction:.2f} %",
        share(blocks["full"]),
        share(blocks["diagonal"]),
        share(reasons["is large"]),
        share(reasons["reduce"]),
        f"{rows.memory / (4 * total):.1f}",
        ", ".join(f"`{layer}`" for layer in left),
    ]
    return f"| {' | '.join(cells)} |\n"


def main() -> None:
    """Writes the table."""
    text = HEADER.format(version=keras.__version__)
    for name in APPLICATIONS:
        text += row(name, coverage(name))
        print(text.splitlines()[-1], flush=True)
        keras.backend.clear_session()
        gc.collect()
    (ROOT / "docs" / "coverage.md").write_text(text)


if __name__ == "__main__":
    main()
