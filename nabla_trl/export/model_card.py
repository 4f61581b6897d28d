"""A shipped checkpoint's README.md: what its run measured, in the model hub's format. Every figure is computed."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from nabla_trl.evaluation.grids import ResultGrid, build_grids
from nabla_trl.export.checkpoint import Checkpoint
from nabla_trl.tasks.yaml_task import find_hub_task_config
from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import format_interval, format_si
from nabla_trl.utils.statistics import Interval, PairedDifference

UNKNOWN_LICENSE = "unknown"
# Not by `subfolder`: transformers sees the adapter beside it first, and looks for the folder in the base.
_MERGED_LOAD_COMMENT = '# or, from a copy of this repository: AutoModelForCausalLM.from_pretrained("COPY/merged")'


@dataclass(frozen=True)
class Provenance:
    """What a card says beyond the run's own files.

    Attributes:
        name: what to call the shipped model: a hub id, or the folder's name.
        base_revision: commit of the base; None where it is not known.
        licence: of the shipped model, a key of the hub's; None where it is not known.
        traces: hash of the traces that it was trained on (`checkpoints.traces_hash`); None where there were none.
        dtype: what logits were compared, and merged weights made, in.
        merged: the folder merged/ is there.
        moved: largest difference of a logit on the probes between the base and the trained model.
        differences: by what was loaded again, the largest difference of a logit from the trained model.
    """

    model_name: str
    base_revision: str | None
    license: str | None
    traces_hash: str | None
    dtype: str
    has_merged_model: bool
    max_logit_change: float
    logit_differences: Mapping[str, float]


def build_model_card(checkpoint: Checkpoint, provenance: Provenance) -> ModelCard:
    """The card of a checkpoint.

    Raises:
        ValueError: rows that are incomplete or repeated (`evaluation.grids.build_grids`).
    """
    grids = build_grids(checkpoint.select_comparable_rows())
    parts = [
        f"# {provenance.model_name}",
        _write_description(checkpoint, provenance),
        "## Measured",
        _write_results(checkpoint, grids),
        "## What it cost",
        _write_cost(checkpoint),
        "## How to load",
        _write_usage(checkpoint, provenance),
        "## Intended use and limits",
        _write_limits(checkpoint, grids),
        "## Where it comes from",
        _write_provenance(checkpoint, provenance),
    ]
    head = _build_metadata(checkpoint, provenance, grids)
    return ModelCard(f"---\n{head.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def find_base_license(base: str) -> str | None:
    """The licence of a model, as its card says that lies in its folder or the hub's cache; no request is made."""
    local = Path(base, "README.md")
    found = local if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
    if not isinstance(found, str | Path) or not Path(found).is_file():
        return None
    try:
        return ModelCard.load(found).data.license
    except ValueError:  # its metadata are not YAML: then it says nothing
        return None


def _build_metadata(checkpoint: Checkpoint, made: Provenance, grids: Mapping[str, ResultGrid]) -> ModelCardData:
    local = Path(checkpoint.base_policy).exists()
    trained_on = find_hub_task_config(checkpoint.run_config.get("dataset", ""))
    tags = ["nabla-trl", "custom_generate", checkpoint.method, *(["lora"] if checkpoint.is_adapter else [])]
    more: dict[str, Any] = {} if local else {"base_model_relation": "adapter" if checkpoint.is_adapter else "finetune"}
    return ModelCardData(
        base_model=None if local else checkpoint.base_policy,  # the hub takes ids only
        library_name="peft" if checkpoint.is_adapter else "transformers",
        pipeline_tag="text-generation",
        license=made.license or UNKNOWN_LICENSE,
        datasets=[trained_on.path] if trained_on else None,
        tags=tags,
        metrics=["accuracy"],
        model_name=made.model_name,
        eval_results=[
            _build_eval_result(checkpoint, method, grid)
            for method, grid in grids.items()
            if _is_row_of_checkpoint(checkpoint, method)
        ],
        **more,
    )


def _build_eval_result(checkpoint: Checkpoint, method: str, grid: ResultGrid) -> EvalResult:
    task = checkpoint.facts["task"]
    hub = find_hub_task_config(task)
    found = statistics.mean_interval(grid.columns["accuracy"])
    return EvalResult(
        task_type="text-generation",
        dataset_type=hub.path if hub else task,
        dataset_name=task,
        dataset_config=hub.config if hub else None,
        dataset_split=checkpoint.run_config.get("eval_split"),
        dataset_revision=hub.revision if hub else None,
        metric_type="accuracy",
        metric_value=round(found.value, 4),
        metric_name=f"accuracy of {method}",
        metric_args={
            "low": round(found.low, 4),
            "high": round(found.high, 4),
            "level": statistics.CONFIDENCE_LEVEL,
            "problems": found.num_problems,
            "seeds": found.num_seeds,
        },
    )


# --- the text -----------------------------------------------------------------------------------------


def _write_description(checkpoint: Checkpoint, made: Provenance) -> str:
    tuning = checkpoint.training["tuning"]
    kind = "A LoRA adapter" if checkpoint.is_adapter else "Full weights"
    version = made.base_revision or "revision not known"
    lines = [
        f"{kind} of `{checkpoint.base_policy}` ({version}), trained by {checkpoint.method} for the "
        f"{checkpoint.facts['reward_kind']} reward `{checkpoint.facts['reward']}`.",
        f"β, the price of a nat away from the base: {_format_beta(checkpoint)}.",
    ]
    if tuning == "qlora":
        lines.append(
            f"The base was in 4 bits while it was trained; it was measured on the whole weights, in {made.dtype}."
        )
    if made.has_merged_model:
        lines.append(f"`merged/` holds base and adapter as one model, merged in {made.dtype}.")
    return "\n".join(lines)


def _format_beta(checkpoint: Checkpoint) -> str:
    own, searched = checkpoint.training["beta"], checkpoint.run_config.get("beta")
    if own is not None:
        return f"{own:g}"
    return "none was set" if searched is None else f"{searched:g} in the search that made its traces, none in training"


def _write_results(checkpoint: Checkpoint, grids: Mapping[str, ResultGrid]) -> str:
    any_grid = next(iter(grids.values()))
    lines = [
        f"{len(any_grid.problems)} held-out problems of {checkpoint.facts['task']}; brackets are 95% bootstrap "
        "intervals over problems, FLOPs and seconds are per query. Bold: this model; the others are the base.",
        "",
        "| method | accuracy | reward | FLOPs | seconds | errors |",
        "| --- |" + " --- |" * 5,
    ]
    lines += [_write_table_row(checkpoint, method, grid) for method, grid in grids.items()]
    gap = _compute_greedy_gain(checkpoint, grids)
    if gap is not None:
        chance = f"p = {gap.p_value:.3f}" if gap.p_value >= 0.001 else "p < 0.001"
        lines += ["", f"Greedy, this model less the base: {format_interval(gap.to_dict(), '+.3f')}, {chance}."]
    return "\n".join(lines)


def _write_table_row(checkpoint: Checkpoint, method: str, grid: ResultGrid) -> str:
    name = f"**{method}**" if _is_row_of_checkpoint(checkpoint, method) else method
    reward = _compute_mean(grid, "reward")
    flops, seconds = _compute_mean(grid, "flops"), _compute_mean(grid, "seconds")
    accuracy = statistics.mean_interval(grid.columns["accuracy"])
    cells = [name, format_interval(accuracy.to_dict()), format_interval(reward.to_dict(), ".3g") if reward else "–"]
    cells += [
        format_si(flops.value) if flops else "–",
        format_si(seconds.value, "s") if seconds else "–",
        str(grid.num_errors),
    ]
    return f"| {' | '.join(cells)} |"


def _write_cost(checkpoint: Checkpoint) -> str:
    training = checkpoint.training
    named = {
        "FLOPs of training": format_si(training["flops"]),
        "FLOPs of the traces it was trained on": format_si(training["trace_flops"]) if training["traces"] else None,
        "seconds of training": f"{training['seconds']:.3g}",
        "rows, steps, tokens": ", ".join(str(training[name]) for name in ("rows", "steps", "tokens")),
    }
    lines = [f"- {label}: {text}" for label, text in named.items() if text is not None]
    if training["skipped"]:
        lines.append(f"- rows left out: {', '.join(f'{why} {n}' for why, n in training['skipped'].items())}")
    return "\n".join(lines)


def _write_usage(checkpoint: Checkpoint, made: Provenance) -> str:
    base, name, reward = checkpoint.base_policy, made.model_name, checkpoint.facts["reward"]
    merged = made.has_merged_model and Path(base).exists()  # whoever gets the folder has no such base
    plain, imports = [f'model = AutoModelForCausalLM.from_pretrained("{name}")'], []
    if merged:
        where = f'snapshot_download("{name}") + "/merged"' if "/" in name else f'"{name}/merged"'
        imports = ["from huggingface_hub import snapshot_download"] if "/" in name else []
        plain = [f"model = AutoModelForCausalLM.from_pretrained({where})"]
    elif checkpoint.is_adapter:
        imports = ["from peft import PeftModel"]
        plain = [
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")',
            *([_MERGED_LOAD_COMMENT] if made.has_merged_model else []),
        ]
    return "\n".join(
        [
            "```python",
            *imports,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            *plain,
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            "```",
            "",
            "Refined further at test time, with `nabla_trl` (the reward is not part of this repository):",
            "",
            "```python",
            "from nabla_trl import NablaReasoner",
            "",
            f'reasoner = NablaReasoner.from_pretrained("{name}", reward="{reward}")',
            'print(reasoner.solve("QUESTION").response)',
            "",
            "# the same from inside transformers, which runs custom_generate/generate.py",
            "inputs = tokenizer.apply_chat_template(",
            '    [[{"role": "user", "content": "QUESTION"}]], add_generation_prompt=True,',
            '    padding=True, padding_side="left", return_tensors="pt", return_dict=True,',
            ")",
            "ids = model.generate(",
            '    inputs["input_ids"], attention_mask=inputs["attention_mask"],',
            f'    custom_generate="{name}", trust_remote_code=True, tokenizer=tokenizer, reward="{reward}",',
            ")",
            "```",
        ]
    )


def _write_limits(checkpoint: Checkpoint, grids: Mapping[str, ResultGrid]) -> str:
    problems = len(next(iter(grids.values())).problems)
    lines = [
        f"For questions like those of {checkpoint.facts['task']}, in the tokenizer's own chat template.",
        f"Measured on {problems} of them and on nothing else: not on other tasks, languages, longer inputs, safety or "
        "bias. What the base does wrong elsewhere, this model may do too.",
        "It was trained towards a reward. A reward that is wrong somewhere is followed there as well: read accuracy "
        "and reward together above.",
    ]
    gap = _compute_greedy_gain(checkpoint, grids)
    if gap is not None and not (gap.low > 0 and gap.p_value < statistics.SIGNIFICANCE_LEVEL):
        side = "below" if gap.high < 0 and gap.p_value < statistics.SIGNIFICANCE_LEVEL else "not above"
        lines.append(f"**Its greedy accuracy is {side} the base's**, as far as these problems tell.")
    return "\n".join(f"- {line}" for line in lines)


def _write_provenance(checkpoint: Checkpoint, made: Provenance) -> str:
    versions = ", ".join(f"{name} {number}" for name, number in checkpoint.facts["versions"].items())
    differences = ", ".join(f"{what} {value:.2g}" for what, value in made.logit_differences.items())
    measured = checkpoint.facts["command"]
    licence = made.license or "not known: no card of the base was at hand; the terms of the base apply"
    lines = [
        f"Licence: {licence}.",
        f"Trained by: `{checkpoint.training['command']}` with the configuration in config.yaml.",
        *([f"Measured by: `{measured}`."] if measured != checkpoint.training["command"] else []),
        f"Traces: {f'sha256 {made.traces_hash}, over the shards in order' if made.traces_hash else 'none, it drew its own'}.",
        f"Loaded again from this folder and compared with the trained model in {made.dtype}: logits differ by at "
        f"most {differences}; training had moved them by {made.max_logit_change:.2g}.",
        f"Versions: {versions}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


# --- figures ------------------------------------------------------------------------------------------


def _is_row_of_checkpoint(checkpoint: Checkpoint, method: str) -> bool:
    return method.startswith(checkpoint.row_prefix)


def _compute_greedy_gain(checkpoint: Checkpoint, grids: Mapping[str, ResultGrid]) -> PairedDifference | None:
    """Greedy accuracy of the checkpoint less the base's, where both were run."""
    pair = (f"{checkpoint.row_prefix}greedy", "greedy")
    if not grids.keys() >= set(pair):
        return None
    own, base = (grids[method].get_problem_values("accuracy") for method in pair)
    return statistics.paired_difference(own, base)


def _compute_mean(grid: ResultGrid, metric: str) -> Interval | None:
    numbers = grid.columns[metric]
    return statistics.mean_interval(numbers) if any(map(math.isfinite, numbers.ravel())) else None
