"""The stage report: tables, figures and conclusions from the rows of an evaluation. Needs no models."""

from __future__ import annotations

from pathlib import Path

from nabla_trl.evaluation.results import load_results, store_results
from nabla_trl.pipeline.evaluation import EvaluationResult
from nabla_trl.report.summary import Summary
from nabla_trl.report.text import write_report_files


def write_report(
    source: EvaluationResult | str | Path,
    output_dir: str | Path | None = None,
    *,
    dollars_per_gpu_hour: float | None = None,
) -> Summary:
    """Write report.md, report.html, summary.json and plots/ of an evaluation.

    Args:
        source: the result of `evaluate`, or the folder of an evaluation.
        output_dir: where to write. None: to the folder of the evaluation.
        dollars_per_gpu_hour: price of an hour of the device, for costs in dollars. None: that of the evaluation, if it
            has one.

    Returns:
        The numbers of the report by name, as in summary.json.

    Raises:
        ValueError: the evaluation is in memory alone and there is no `output_dir`, a folder without results, or shards
            that lack rows.
    """
    if isinstance(source, EvaluationResult):
        folder = output_dir or source.output_dir
        if folder is None:
            raise ValueError("this evaluation is in memory alone: give write_report an output_dir")
        if source.missing:
            raise ValueError(f"rows are missing of {source.missing}: run these shards first")
        rows, facts = source.rows, source.facts
        if Path(folder) != source.output_dir:
            store_results(Path(folder), rows, facts)
    elif isinstance(source, str | Path):
        rows, facts = load_results(Path(source))
        folder = output_dir or source
    else:
        raise ValueError(f"expected the result of evaluate or the folder of one, not {type(source).__name__}")
    if dollars_per_gpu_hour is not None:
        facts = facts | {"dollars_per_gpu_hour": dollars_per_gpu_hour}
    return write_report_files(Path(folder), rows, facts)
