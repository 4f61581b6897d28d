"""Write the model card of an exported checkpoint, with the results of its run. Every number is computed."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData, try_to_load_from_cache

from nabla_trl.evaluation.grids import ResultGrid, build_grids
from nabla_trl.evaluation.metrics import estimate_sample_metrics
from nabla_trl.exporting.checkpoint import Checkpoint
from nabla_trl.tasks.yaml_task import find_hub_task_config
from nabla_trl.utils import statistics
from nabla_trl.utils.formatting import format_interval, format_si
from nabla_trl.utils.statistics import Interval, PairedDifference

UNKNOWN_LICENSE = "unknown"
# `subfolder` does not work here: transformers sees the adapter beside it first, and looks for the folder in the base.
_MERGED_LOAD_COMMENT = '# or, from a copy of this repository: AutoModelForCausalLM.from_pretrained("COPY/merged")'

_LOCAL_BASE_NOTE = (
    "The base of the adapter is the folder `{}`, and `adapter_config.json` names it. On another machine give the path "
    "of a copy of the base: set `base_model_name_or_path` there, or load the base and put the adapter on it."
)


@dataclass(frozen=True)
class Provenance:
    """Facts of a card that the files of the run do not contain.

    Attributes:
        model_name: a Hub id, or the name of the folder.
        base_revision: commit of the base model, None if it is not known.
        license: key of the license on the Hub, None if it is not known.
        traces_hash: hash of the traces that the checkpoint was trained on (`hash_traces`), None without traces.
        dtype: data type of the logit comparison and of merged weights.
        has_merged_model: the folder has merged/.
        max_logit_change: largest change of a logit by the training.
        logit_differences: largest difference of a logit from the trained model, by the way of loading.
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
    """Return the card of a checkpoint.

    Raises:
        ValueError: rows are missing or occur twice (see `evaluation.grids.build_grids`).
    """
    rows = [row for row in checkpoint.rows if not row.method.startswith(checkpoint.other_prefixes)]
    grids, sample_metrics = build_grids(rows), estimate_sample_metrics(rows)
    parts = [
        f"# {provenance.model_name}",
        _write_description(checkpoint, provenance),
        "## Results",
        _write_results(checkpoint, grids, sample_metrics),
        "## Training cost",
        _write_cost(checkpoint),
        "## How to load",
        _write_usage(checkpoint, provenance),
        "## Intended use and limits",
        _write_limits(checkpoint, grids),
        "## Provenance",
        _write_provenance(checkpoint, provenance),
    ]
    metadata = _build_metadata(checkpoint, provenance, grids)
    return ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n", ignore_metadata_errors=False)


def find_base_license(base: str) -> str | None:
    """Return the license of a model from its card in the model's folder or the Hub's cache, without a request."""
    path = Path(base, "README.md") if Path(base).is_dir() else try_to_load_from_cache(base, "README.md")
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return None
    try:
        return ModelCard.load(path).data.license
    except ValueError:  # the metadata are not YAML
        return None


def _build_metadata(checkpoint: Checkpoint, provenance: Provenance, grids: Mapping[str, ResultGrid]) -> ModelCardData:
    is_local = Path(checkpoint.base_policy).exists()
    train_task = find_hub_task_config(checkpoint.run_config.get("dataset", ""))
    tags = ["nabla-trl", "custom_generate", checkpoint.method, *(["lora"] if checkpoint.is_adapter else [])]
    relation = {"base_model_relation": "adapter" if checkpoint.is_adapter else "finetune"}
    return ModelCardData(
        base_model=None if is_local else checkpoint.base_policy,  # the Hub accepts ids only
        library_name="peft" if checkpoint.is_adapter else "transformers",
        pipeline_tag="text-generation",
        license=provenance.license or UNKNOWN_LICENSE,
        datasets=[train_task.path] if train_task else None,
        tags=tags,
        metrics=["accuracy"],
        model_name=provenance.model_name,
        eval_results=[
            _build_eval_result(checkpoint, method, grid)
            for method, grid in grids.items()
            if method.startswith(checkpoint.row_prefix)
        ],
        **({} if is_local else relation),
    )


def _build_eval_result(checkpoint: Checkpoint, method: str, grid: ResultGrid) -> EvalResult:
    task = checkpoint.facts["task"]
    hub_task = find_hub_task_config(task)
    accuracy = statistics.proportion_interval(grid.columns["accuracy"])
    return EvalResult(
        task_type="text-generation",
        dataset_type=hub_task.path if hub_task else task,
        dataset_name=task,
        dataset_config=hub_task.config if hub_task else None,
        dataset_split=checkpoint.run_config.get("eval_split"),
        dataset_revision=hub_task.revision if hub_task else None,
        metric_type="accuracy",
        metric_value=round(accuracy.value, 4),
        metric_name=f"accuracy of {method}",
        metric_args={
            "low": round(accuracy.low, 4),
            "high": round(accuracy.high, 4),
            "level": statistics.CONFIDENCE_LEVEL,
            "problems": accuracy.num_problems,
            "seeds": accuracy.num_seeds,
        },
    )


# --- the text -----------------------------------------------------------------------------------------


def _write_description(checkpoint: Checkpoint, provenance: Provenance) -> str:
    weights = "A LoRA adapter" if checkpoint.is_adapter else "Full weights"
    revision = provenance.base_revision or "revision not known"
    lines = [
        f"{weights} of `{checkpoint.base_policy}` ({revision}), trained by {checkpoint.method} for the "
        f"{checkpoint.facts['reward_kind']} reward `{checkpoint.facts['reward']}`.",
        f"KL coefficient β: {_format_beta(checkpoint)}.",
    ]
    if checkpoint.training["tuning"] == "qlora":
        lines.append(
            f"The base was quantized to 4 bits in training, and had full {provenance.dtype} weights in evaluation."
        )
    if provenance.has_merged_model:
        lines.append(f"`merged/` holds base and adapter as one model, merged in {provenance.dtype}.")
    return "\n".join(lines)


def _format_beta(checkpoint: Checkpoint) -> str:
    beta, search_beta = checkpoint.training["beta"], checkpoint.run_config.get("beta")
    if beta is not None:
        return f"{beta:g}"
    return "none was set" if search_beta is None else f"{search_beta:g} in the search for the traces, none in training"


def _write_results(
    checkpoint: Checkpoint, grids: Mapping[str, ResultGrid], sample_metrics: Mapping[str, Interval]
) -> str:
    lines = [
        f"{_count_problems(checkpoint)} held-out problems of {checkpoint.facts['task']}. {statistics.INTERVAL_NOTE} "
        "FLOPs and seconds are per query. This model is bold, the other rows are the base.",
        "",
        "| method | accuracy | reward | FLOPs | seconds | errors |",
        "| --- |" + " --- |" * 5,
    ]
    lines += [_write_table_row(checkpoint, method, grid) for method, grid in grids.items()]
    lines += _write_sample_table(checkpoint, sample_metrics)
    gap = _compute_greedy_gain(checkpoint, grids)
    if gap is not None:
        p_value = f"p = {gap.p_value:.3f}" if gap.p_value >= 0.001 else "p < 0.001"
        difference = format_interval(gap.to_dict(), "+.3f")
        lines += ["", f"Greedy accuracy of this model minus that of the base: {difference}, {p_value}."]
    return "\n".join(lines)


def _write_sample_table(checkpoint: Checkpoint, metrics: Mapping[str, Interval]) -> list[str]:
    """Return the lines of a table of independent samples: one sample, the share of problems solved, and votes."""
    averages = [re.fullmatch(r"avg@(\d+)\.(\w+)", name) for name in metrics]
    lines = []
    for match in filter(None, averages):
        n, label = match.groups()
        name = f"**{label}**" if checkpoint.row_prefix == f"{label}_" else label
        values = (metrics[f"{kind}@{n}.{label}"].to_dict() for kind in ("avg", "pass", "maj"))
        lines.append(f"| {name} | {n} | {' | '.join(map(format_interval, values))} |")
    header = ["", "| policy | samples n | one sample | pass@n | maj@n |", "| --- |" + " --- |" * 4]
    return header + lines if lines else []


def _count_problems(checkpoint: Checkpoint) -> int:
    return len({row.problem for row in checkpoint.rows})


def _write_table_row(checkpoint: Checkpoint, method: str, grid: ResultGrid) -> str:
    name = f"**{method}**" if method.startswith(checkpoint.row_prefix) else method
    reward, flops, seconds = map(grid.compute_mean, ("reward", "flops", "seconds"))
    accuracy = statistics.proportion_interval(grid.columns["accuracy"])
    cells = [name, format_interval(accuracy.to_dict()), format_interval(reward.to_dict(), ".3g") if reward else "–"]
    cells += [
        format_si(flops.value) if flops else "–",
        format_si(seconds.value, "s") if seconds else "–",
        str(grid.num_errors),
    ]
    return f"| {' | '.join(cells)} |"


def _write_cost(checkpoint: Checkpoint) -> str:
    training = checkpoint.training
    lines = [f"- FLOPs of training: {format_si(training['flops'])}"]
    if training["traces_hash"]:
        lines.append(f"- FLOPs of the training traces: {format_si(training['trace_flops'])}")
    lines += [
        f"- seconds of training: {training['seconds']:.3g}",
        f"- rows, steps, tokens: {training['rows']}, {training['steps']}, {training['tokens']}",
    ]
    if training["skipped"]:
        lines.append(f"- rows left out: {', '.join(f'{why} {n}' for why, n in training['skipped'].items())}")
    return "\n".join(lines)


def _write_usage(checkpoint: Checkpoint, provenance: Provenance) -> str:
    name, reward = provenance.model_name, checkpoint.facts["reward"]
    is_local = Path(checkpoint.base_policy).exists()
    base = os.path.abspath(checkpoint.base_policy) if is_local else checkpoint.base_policy
    note = [_LOCAL_BASE_NOTE.format(base), ""] if is_local and checkpoint.is_adapter else []
    load, imports = [f'model = AutoModelForCausalLM.from_pretrained("{name}")'], []
    if provenance.has_merged_model and is_local:  # the base exists on this machine only
        path = f'snapshot_download("{name}") + "/merged"' if "/" in name else f'"{name}/merged"'
        imports = ["from huggingface_hub import snapshot_download"] if "/" in name else []
        load = [f"model = AutoModelForCausalLM.from_pretrained({path})"]
    elif checkpoint.is_adapter:
        imports = ["from peft import PeftModel"]
        load = [
            f'model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained("{base}"), "{name}")',
            *([_MERGED_LOAD_COMMENT] if provenance.has_merged_model else []),
        ]
    return "\n".join(
        [
            *note,
            "```python",
            *imports,
            "from transformers import AutoModelForCausalLM, AutoTokenizer",
            "",
            *load,
            f'tokenizer = AutoTokenizer.from_pretrained("{name}")',
            "```",
            "",
            "Refine the answers further at test time with `nabla_trl`. The reward is not part of this repository.",
            "",
            "```python",
            "from nabla_trl import NablaReasoner",
            "",
            f'reasoner = NablaReasoner.from_pretrained("{name}", reward="{reward}")',
            'print(reasoner.solve("QUESTION").response)',
            "",
            "# the same with transformers, which runs custom_generate/generate.py",
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
    lines = [
        f"For questions like those of {checkpoint.facts['task']}, in the tokenizer's own chat template.",
        f"Measured on {_count_problems(checkpoint)} of them and on nothing else: not on other tasks, languages, "
        "longer inputs, safety or bias. This model may repeat other mistakes of the base.",
        "It was trained to increase a reward, so it also follows the reward's errors. Compare accuracy and reward "
        "above.",
    ]
    gap = _compute_greedy_gain(checkpoint, grids)
    if gap is not None and gap.side == "behind":
        lines.append("**Its greedy accuracy is below the base's** on these problems.")
    elif gap is not None and not gap.side:
        judgment = statistics.describe_difference(gap.low, gap.high, gap.p_value)
        lines.append(f"**Its greedy accuracy was not measured to be above the base's:** {judgment}.")
    return "\n".join(f"- {line}" for line in lines)


def _write_provenance(checkpoint: Checkpoint, provenance: Provenance) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in checkpoint.facts["versions"].items())
    differences = ", ".join(f"{way} {value:.2g}" for way, value in provenance.logit_differences.items())
    train_command, eval_command = checkpoint.training["command"], checkpoint.facts["command"]
    traces_hash = provenance.traces_hash
    traces = f"sha256 {traces_hash}, over the shards in order" if traces_hash else "none, it drew its own responses"
    lines = [
        f"License: {provenance.license or 'not known, so the terms of the base apply'}.",
        f"Trained by: `{train_command}` with the configuration in config.yaml.",
        *([f"Measured by: `{eval_command}`."] if eval_command != train_command else []),
        f"Traces: {traces}.",
        f"Loaded again from this folder and compared with the trained model in {provenance.dtype}: logits differ by "
        f"at most {differences}. Training changed them by {provenance.max_logit_change:.2g}.",
        f"Versions: {versions}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


# --- figures ------------------------------------------------------------------------------------------


def _compute_greedy_gain(checkpoint: Checkpoint, grids: Mapping[str, ResultGrid]) -> PairedDifference | None:
    """Return the greedy accuracy of the checkpoint minus that of the base, None if one of them was not run."""
    methods = (f"{checkpoint.row_prefix}greedy", "greedy")
    if not grids.keys() >= set(methods):
        return None
    trained, base = (grids[method] for method in methods)
    return trained.compute_difference("accuracy", base)
