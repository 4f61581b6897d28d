"""The section "pass@k, maj@k and avg@n" of a report: `nabla_trl.evaluation.metrics` in words and a table."""

from __future__ import annotations

from collections.abc import Mapping

from nabla_trl.evaluation import metrics
from nabla_trl.report.summary import Summary
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.markdown import format_table

SAMPLES_HEADING = "pass@k, maj@k and avg@n"
SAMPLE_FIGURES = {"samples": "pass@k and maj@k"}
_METRICS_NOTE = (
    "pass@k: the chance that k independent samples hold a right answer, which nothing picks out; maj@k: that their "
    "commonest answer is right. Both are averaged over every choice of k of the n samples of a problem and seed "
    "(unbiased; Chen et al., arXiv 2107.03374). avg@n is the accuracy of one sample."
)


def build_samples_section(summary: Summary, images: Mapping[str, str]) -> list[str]:
    """The paragraphs under the heading; `images`: name -> Markdown of a figure that was drawn."""
    found = metrics.group_sample_metrics(summary)
    if not found:
        return ["Missing: no method samples_N was evaluated."]
    policies = [(policy, name) for policy in found for name in ("pass", "maj")]
    sizes = sorted({k for own in found.values() for k in own["pass"]})
    lines = [
        [
            k,
            *(
                format_interval(found[policy][name][k]) if k in found[policy][name] else "–"
                for policy, name in policies
            ),
        ]
        for k in sizes
    ]
    means = "; ".join(
        f"{policy} {format_interval(one)} (n = {n})" for policy, own in found.items() for n, one in own["avg"].items()
    )
    heads = [f"{name}@k, {policy}" for policy, name in policies]
    return [f"avg@n: {means}.", format_table(["k", *heads], lines), *images.values(), _METRICS_NOTE]
