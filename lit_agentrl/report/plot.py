"""The curves of a comparison as a picture: a panel for each axis, thin lines for seeds, a thick one for their mean."""

from __future__ import annotations

import importlib.util
import io
import math
from typing import TYPE_CHECKING, Any

from lit_agentrl.errors import missing_extra
from lit_agentrl.report.comparison import AXES, INFORMATION, AxisResult, Comparison
from lit_agentrl.report.sheets import is_share

if TYPE_CHECKING:
    from matplotlib.axes import Axes
    from matplotlib.figure import Figure

# Okabe and Ito's colours, told apart with any colour vision; without their yellow, too pale for a line on white.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#56B4E9", "#E69F00", "#000000")
STYLES = ("-", "--", "-.", ":")
LABELS = AXES | {"seconds": "training, seconds of wall clock", "prefilled_tokens": "prefilled tokens (information)"}
STYLE: dict[Any, Any] = {
    "font.size": 11,
    "svg.fonttype": "none",  # text stays text
    "svg.hashsalt": "lit-agentrl",  # the same picture is the same file
    "text.parse_math": False,  # a name may hold dollar signs
    "axes.spines.top": False,
    "axes.spines.right": False,
}


def check_installed() -> None:
    """Say before anything is run that no picture could be drawn.

    Raises:
        UserError: matplotlib is missing.
    """
    if importlib.util.find_spec("matplotlib") is None:
        raise missing_extra("matplotlib", "plot", "A picture of the curves (--no-plot goes without)")


def picture(comparison: Comparison, kind: str) -> bytes:
    """The picture as a "png" or "svg" file."""
    import matplotlib

    with matplotlib.rc_context(STYLE):
        figure = _figure(comparison)
        buffer = io.BytesIO()
        metadata = {"Date": None} if kind == "svg" else {}
        figure.savefig(buffer, format=kind, dpi=150, metadata=metadata)
    return buffer.getvalue()


def _figure(comparison: Comparison) -> Figure:
    from matplotlib.figure import Figure

    columns = 2 if len(comparison.axes) == 4 else len(comparison.axes)
    rows = math.ceil(len(comparison.axes) / columns)
    figure = Figure(figsize=(6.0 * columns, 4.0 * rows + 0.6), layout="constrained")
    panels = list(figure.subplots(rows, columns, squeeze=False, sharey=True).flat)
    for panel, axis in zip(panels, comparison.axes, strict=True):
        _panel(panel, axis, comparison)
    handles, labels = figure.axes[0].get_legend_handles_labels()
    figure.legend(handles, labels, loc="outside lower center", ncols=min(3, len(labels)), frameon=False)
    figure.suptitle(f"{comparison.name}: {comparison.metric} against what was spent", fontsize=13)
    return figure


def _panel(panel: Axes, axis: AxisResult, comparison: Comparison) -> None:
    is_percent = is_share(comparison.metric)
    scale = 100 if is_percent else 1
    for place, (arm, curves) in enumerate(axis.curves.items()):
        look: dict[str, Any] = {
            "color": COLOURS[place % len(COLOURS)],
            "linestyle": STYLES[place // len(COLOURS) % len(STYLES)],
        }
        for curve in curves:
            panel.plot(curve.spent, scale * curve.means, linewidth=0.9, alpha=0.4, **look)
        mean = axis.means[arm]
        name = f"{arm} (baseline)" if arm == comparison.baseline else arm
        count = f"mean of {len(curves)} seeds" if len(curves) > 1 else "one seed"
        panel.plot(mean.spent, scale * mean.means, linewidth=2.6, label=f"{name}, {count}", **look)
    panel.axvline(axis.budget, color="#888888", linewidth=1, linestyle=(0, (2, 3)))
    panel.annotate(
        "compared here", (axis.budget, 0.02), xycoords=("data", "axes fraction"), xytext=(-4, 0),
        textcoords="offset points", rotation=90, ha="right", va="bottom", fontsize=9, color="#555555",
    )  # fmt: skip
    panel.set_xlabel(LABELS[axis.axis], color="#666666" if axis.axis in INFORMATION else "black")
    panel.set_ylabel(f"{comparison.metric}, %" if is_percent else comparison.metric)
    panel.tick_params(labelleft=True)
    panel.grid(alpha=0.25, linewidth=0.6)
    panel.set_xlim(left=0)
    if axis.axis != "seconds":
        panel.xaxis.set_major_formatter(_engineering())


def _engineering() -> Any:
    """200000 as "200k"."""
    from matplotlib.ticker import EngFormatter

    return EngFormatter(sep="")
