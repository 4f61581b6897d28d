"""The canvas of the figures where there is little to draw."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure

from nabla_trl.report.plots.canvas import format_si_axis


def test_costs_that_are_equal_up_to_rounding_have_an_axis() -> None:
    axes = Figure().subplots()
    axes.set_xscale("log")
    axes.plot([3.4e7, 3.4e7 * (1 + 1e-13)], [0.1, 0.2], "o")
    axes.margins(x=0.1)
    format_si_axis(axes.xaxis, "FLOPs")
    low, high = axes.get_xlim()
    assert low < 3e7 and high > 4e7
    assert np.isfinite(axes.transData.transform((3.4e7, 0.1))).all()
