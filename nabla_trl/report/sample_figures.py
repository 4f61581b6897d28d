"""The figure of pass@k and maj@k against k, in the style of `nabla_trl.report.canvas`."""

from __future__ import annotations

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import FixedLocator, NullFormatter, ScalarFormatter

from nabla_trl.evaluation import metrics
from nabla_trl.evaluation.method import join_label
from nabla_trl.report.canvas import LabelPlacer, MethodStyle, create_figure_with_axes, get_style
from nabla_trl.report.summary import Summary

_LINE_STYLES = {"pass": "-", "maj": (0, (4, 2))}


def plot_samples(summary: Summary, subject: str) -> Figure | None:
    """pass@k (solid) and maj@k (dashed) of every policy; None where no samples were evaluated, or one alone."""
    found = {policy: own for policy, own in metrics.group_sample_metrics(summary).items() if len(own["pass"]) > 1}
    if not found:
        return None
    title = "What k samples hold (pass@k, solid), and what their vote finds (maj@k, dashed)"
    figure, axes = create_figure_with_axes(title, f"{subject}; bands: 95% bootstrap intervals over problems")
    axes.set_xscale("log", base=2)
    axes.set_xlabel("k, independent samples per problem (log scale)")
    axes.set_ylabel("share of held-out problems")
    drawn = []
    for policy, own in found.items():
        look = _get_policy_style(policy)
        for name, line in _LINE_STYLES.items():
            ks = list(own[name])
            low, value, high = np.array([[own[name][k][side] for side in ("low", "value", "high")] for k in ks]).T
            axes.fill_between(ks, low, high, color=look.color, alpha=0.12, lw=0)
            axes.plot(ks, value, ls=line, color=look.color, lw=1.5, **look.get_marker_options(5))
            drawn.append((f"{name}@k, {policy}", look.color, list(zip(ks, value, strict=True))))
    sizes = sorted({k for own in found.values() for k in own["pass"]})
    axes.xaxis.set_major_locator(FixedLocator(sizes))
    axes.xaxis.set_major_formatter(ScalarFormatter())
    axes.xaxis.set_minor_formatter(NullFormatter())
    axes.margins(x=0.15, y=0.1)
    named = LabelPlacer(figure, axes)
    for _, _, points in drawn:
        named.avoid_line(points)
    for text, colour, points in drawn:
        named.place_label(text, *points[-1], colour, size=8, weight="bold")
    return figure


def _get_policy_style(policy: str) -> MethodStyle:
    """The base policy looks as its best-of-N does, a trained one as its greedy decode."""
    return get_style("best_of_1" if policy == metrics.BASE_POLICY else join_label(policy, "greedy"))
