"""Result rows from what lm-eval writes with --output_path and --log_samples: results_*.json and samples_*.jsonl."""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from nabla_trl.evaluation.rows import Row
from nabla_trl.utils.files import read_json_file, read_jsonl_file
from nabla_trl.utils.formatting import format_error


def has_lm_eval_logs(folder: Path) -> bool:
    """Return whether a folder holds samples of lm-eval."""
    return folder.is_dir() and next(folder.rglob("samples_*.jsonl"), None) is not None


def read_lm_eval_rows(
    folder: Path, method: str = "", *, task: str = "", metric: str = "", filter_name: str = ""
) -> list[Row]:
    """Return one row per document of the latest run of a task.

    A log holds the costs of a whole task, so every row has their mean. The model `nabla` (`nabla_trl.lm_eval`) records
    FLOPs and seconds per answer. Of other models only the seconds of the whole run are known, model loading included,
    and only if the run had a single task. A cost that is not known is NaN.

    Args:
        method: name of the rows' method (default: the method of the model `nabla`, else the name of the folder).
        task: name of the task. It may be left out if the folder holds one.
        metric: a metric of the samples with values from 0 to 1 (default: the first one).
        filter_name: filter of lm-eval (default: the first one).

    Raises:
        ValueError: no samples, several tasks and none is named, or samples that cannot be read. The message says what
            there is to choose from.
    """
    path, task = _find_samples(folder, task)
    results_path = path.with_name(f"results_{_get_date(path)}.json")
    results = read_json_file(results_path) if results_path.exists() else {}
    samples = _read_samples(path, metric, filter_name)
    recorded = _get_object(_get_object(results, "config"), "nabla")
    flops, seconds = _get_mean_costs(results, recorded, task, len(samples))
    return [
        Row(
            method=method or str(recorded.get("method") or folder.name),
            task=task,
            problem=problem,
            seed=0,
            correct=correct,
            flops=flops,
            seconds=seconds,
        )
        for problem, correct in samples.items()
    ]


def _get_date(path: Path) -> str:
    return path.stem.rpartition("_")[2]


def _find_samples(folder: Path, task: str) -> tuple[Path, str]:
    """Return the latest samples of a task, and the task."""
    paths = sorted(folder.rglob("samples_*.jsonl"), key=_get_date)
    by_task = {path.stem.removeprefix("samples_").rpartition("_")[0]: path for path in paths}
    if not by_task:
        raise ValueError(f"{folder} has no samples: run lm_eval with --output_path and --log_samples")
    if not task and len(by_task) > 1:
        raise ValueError(f"{folder} holds {len(by_task)} tasks ({', '.join(sorted(by_task))}): name one")
    name = task or next(iter(by_task))
    if name not in by_task:
        raise ValueError(f"{folder} has no samples of task {name!r}: choose from {', '.join(sorted(by_task))}")
    return by_task[name], name


def _read_samples(path: Path, metric: str, filter_name: str) -> dict[str, float]:
    """Return document -> verdict. A document is named by its number and its hash, so that other data do not match."""
    verdicts: dict[str, float] = {}
    filters: set[str] = set()
    for number, sample in read_jsonl_file(path):
        where = f"{path}, line {number}"
        metrics = sample.get("metrics")
        if "doc_id" not in sample or not isinstance(metrics, list) or not metrics:
            raise ValueError(f"{where}: no sample of lm-eval, as it lacks doc_id or metrics")
        own_filter = str(sample.get("filter", "none"))
        filters.add(own_filter)
        filter_name = filter_name or own_filter
        if own_filter != filter_name:
            continue
        name = metric or str(metrics[0])
        value = sample.get(name)
        if not isinstance(value, bool | int | float) or not 0 <= value <= 1:
            raise ValueError(
                f"{where}: metric {name} is no number from 0 to 1 ({format_error(repr(value), 40)}); choose from "
                f"{', '.join(map(str, metrics))}"
            )
        document = f"{sample['doc_id']}/{str(sample.get('doc_hash', ''))[:12]}"
        if document in verdicts:
            raise ValueError(f"{where}: document {sample['doc_id']} stands twice")
        verdicts[document] = float(value)
    if not filters:
        raise ValueError(f"{path} holds no samples")
    if not verdicts:
        raise ValueError(f"{path} has no samples of filter {filter_name!r}: choose from {', '.join(sorted(filters))}")
    return verdicts


def _get_mean_costs(
    results: Mapping[str, Any], recorded: Mapping[str, Any], task: str, num_answers: int
) -> tuple[float, float]:
    """Return FLOPs and seconds per answer, NaN where they are not known."""
    if costs := _get_object(_get_object(recorded, "costs"), task):
        return _to_number(costs.get("flops_per_answer")), _to_number(costs.get("seconds_per_answer"))
    if len(_get_object(results, "results")) != 1:
        return math.nan, math.nan
    return math.nan, _to_number(results.get("total_evaluation_time_seconds")) / num_answers


def _get_object(values: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = values.get(key)
    return value if isinstance(value, Mapping) else {}


def _to_number(value: Any) -> float:
    """Return a number that may be written as text, as lm-eval does. NaN for anything else."""
    try:
        number = float(value)
    except (TypeError, ValueError):
        return math.nan
    return number if 0 <= number < math.inf else math.nan
