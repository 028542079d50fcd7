"""The picture of the ratios: how many times faster than reference and stock PyTorch each operator is, beside its targets."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt


@dataclass(frozen=True)
class Bar:
    """One row: ratios of the others' time to the C++ kernel's, and the targets (must, aim) of the first."""

    label: str
    to_reference: float
    to_stock: float | None
    targets: tuple[float, float] | None


def draw_ratios(bars: Sequence[Bar], path: Path) -> None:
    """Write a picture with one row a bar, on a logarithmic axis."""
    plt.rcParams["svg.hashsalt"] = "safnet-ops"  # the same numbers give the same file
    figure, axes = plt.subplots(figsize=(9, 0.36 * len(bars) + 1.3))
    for row, bar in enumerate(bars):
        axes.barh(row - 0.19, bar.to_reference, 0.36, color="#2b6ca3", label="reference" if row == 0 else None)
        axes.annotate(f"{bar.to_reference:.1f}x", (bar.to_reference, row - 0.19), (3, 0), textcoords="offset points",
                      va="center", fontsize=7)  # fmt: skip
        if bar.to_stock is not None:
            axes.barh(row + 0.19, bar.to_stock, 0.36, color="#e0a030")
            axes.annotate(f"{bar.to_stock:.1f}x", (bar.to_stock, row + 0.19), (3, 0), textcoords="offset points",
                          va="center", fontsize=7)  # fmt: skip
        for target, style in zip(bar.targets or (), ("-", ":"), strict=False):
            axes.vlines(target, row - 0.42, row + 0.05, color="#b02020", linestyle=style)
    axes.barh([0], [0], color="#e0a030", label="stock PyTorch")
    axes.plot([], [], color="#b02020", label="must (to the reference)")
    axes.plot([], [], color="#b02020", linestyle=":", label="aim")
    axes.axvline(1, color="black", linewidth=0.8)
    axes.set_xscale("log")
    axes.set_xlim(left=0.5, right=max(max(bar.to_reference, bar.to_stock or 0) for bar in bars) * 1.6)
    ticks = [tick for tick in (0.5, 1, 2, 5, 10, 20, 50, 100, 200, 500) if tick <= axes.get_xlim()[1]]
    axes.set_xticks(ticks, [f"{tick:g}x" for tick in ticks])
    axes.minorticks_off()
    axes.set_yticks(range(len(bars)), [bar.label for bar in bars], fontsize=8)
    axes.invert_yaxis()
    axes.set_xlabel("time of the other / time of the C++ kernel")
    axes.legend(fontsize=8, loc="lower right")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.stem}.partial{path.suffix}")
    figure.savefig(partial, dpi=130, bbox_inches="tight", metadata={"Date": None} if path.suffix == ".svg" else None)
    plt.close(figure)
    partial.replace(path)
