"""The card of a data set of traces: what its columns mean, how it was made, what it cost, how to load it."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from huggingface_hub import DatasetCard, DatasetCardData

from nabla_trl.report.markdown import format_bullets, format_table
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.summary import TraceTotals
from nabla_trl.utils.formatting import format_si

TRACE_COLUMNS = {
    "problem_id": "id of the problem, unique within the task",
    "task": "name of the task",
    "method": "how the response was found: nabla is the search with the gradient, control the same without it",
    "seed": "random seed",
    "prompt": "the prompt as text, special tokens included",
    "response": "the last response as text",
    "prompt_ids": "token ids of the prompt",
    "initial_ids": "token ids of the first response",
    "response_ids": "token ids of the last response, which the accepted revisions make of the first one",
    "reward_initial": "reward of the first response",
    "reward": "reward of the last response",
    "answer": "final answer in the last response, null without one",
    "gold": "gold answer, null without one",
    "correct": "whether answer and gold answer agree, null if that is not known",
    "revisions": "proposals in their order: round, position, old_token, new_token, suffix (the response from the "
    "position on), reward_before, reward_after, accepted, cumulative_flops",
    "flops": "FLOPs of the search, rejected proposals and gradients included",
    "seconds": "its share of the wall seconds of its batches",
    "tokens": "JSON: tokens by model and kind of work",
    "stop_reason": "why the search ended",
    "finished": "whether the response has an end, and was not cut at the limit",
    "meta": "JSON: policy, reward, hash of the settings and of the tokenizer, versions",
    "error": "null, as problems that could not be run are left out",
    "predicted_gain": "per accepted response and position, the largest gain of the reward that the gradient predicts",
    "answer_strict": "the answer in the form that the task asks for alone",
    "correct_strict": "whether that answer is correct",
    "match_result": "how the answers were compared",
    "soft_targets": "per accepted response the refined distributions along it: `ids` (int32) and `logp` (float32, "
    "nats) as bytes of arrays [tokens, `top_k`]. Empty where none were recorded",
}
ROW_COLUMNS = {
    "sft": {
        "input_ids": "token ids of prompt and response",
        "labels": "the same, with -100 over the prompt, so that the loss is over the response alone",
    },
    "preference": {
        "prompt": "the prompt and the part of the response that both continuations share",
        "chosen": "the continuation with the higher reward",
        "rejected": "the continuation with the lower reward",
        "prompt_ids": "token ids of `prompt`",
        "chosen_ids": "token ids of `chosen`",
        "rejected_ids": "token ids of `rejected`",
    },
}
_LOAD_AND_TRAIN = {
    "sft": """from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

rows = load_dataset("{name}", "sft", split="train")
trainer = SFTTrainer(model="{policy}", train_dataset=rows, args=SFTConfig(output_dir="sft"))
trainer.train()""",
    "preference": """from datasets import load_dataset
from trl import DPOConfig, DPOTrainer

rows = load_dataset("{name}", "preference", split="train")
trainer = DPOTrainer(model="{policy}", train_dataset=rows, args=DPOConfig(output_dir="dpo"))
trainer.train()""",
}


@dataclass(frozen=True)
class TraceCardFacts:
    """What a card says that the traces do not.

    Attributes:
        name: id of the data set on the Hub, or its folder.
        license: key of a license on the Hub. None: not set.
        settings: of the run that made the traces.
        num_rows: rows by configuration: traces, sft and preference. Those that are left out are not there.
        left_out: why a configuration is left out, by its name.
        num_errors: problems that could not be run, whose traces are left out.
    """

    name: str
    license: str | None = None
    settings: Mapping[str, str] = field(default_factory=dict)
    num_rows: Mapping[str, int] = field(default_factory=dict)
    left_out: Mapping[str, str] = field(default_factory=dict)
    num_errors: int = 0


def build_trace_card(traces: Sequence[Trace], facts: TraceCardFacts) -> DatasetCard:
    """Return the card of a data set of these traces."""
    parts = [
        f"# {facts.name.rstrip('/').rpartition('/')[2]}",
        _write_description(traces, facts),
        "## Load it, and train on it",
        _write_usage(traces, facts),
        "## Figures",
        _write_figures(traces, facts),
        "## How it was made",
        _write_provenance(traces, facts),
        "## Columns",
        *_write_columns(facts),
        "## Limits",
        format_bullets(_list_limits(facts)),
    ]
    return DatasetCard(f"---\n{_build_metadata(facts).to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _build_metadata(facts: TraceCardFacts) -> DatasetCardData:
    count = facts.num_rows["traces"]
    bounds = ((1000, "n<1K"), (10_000, "1K<n<10K"), (100_000, "10K<n<100K"), (1_000_000, "100K<n<1M"))
    default = next(name for name in ("sft", "traces") if name in facts.num_rows)
    return DatasetCardData(
        license=facts.license,
        task_categories=["text-generation"],
        tags=["nabla-trl", "trl", "reasoning", "synthetic"],
        size_categories=[next((name for bound, name in bounds if count < bound), "n>1M")],
        configs=[
            {"config_name": name, "data_files": f"{name}/*.parquet"} | ({"default": True} if name == default else {})
            for name in facts.num_rows
        ],
    )


def _list_values(traces: Sequence[Trace], name: str) -> str:
    """Return the names of models or tasks that the traces were made with. Of a folder, its own name."""
    values = dict.fromkeys(trace.task if name == "task" else trace.meta.get(name, "") for trace in traces)
    return ", ".join(f"`{Path(value).name if Path(value).exists() else value}`" for value in values if value)


def _write_description(traces: Sequence[Trace], facts: TraceCardFacts) -> str:
    summary = (
        f"Reasoning traces of {_list_values(traces, 'policy')} on {_list_values(traces, 'task')}: answers that a "
        f"search has refined by the reward {_list_values(traces, 'reward')}, with every proposal and what became of "
        "it. Made by [nabla-trl](https://pypi.org/project/nabla-trl/)."
    )
    meanings = {
        "traces": "the search, one row per problem and seed",
        "sft": "the best finished response of each problem, for `trl.SFTTrainer`",
        "preference": "the better and the worse continuation of a prefix, one row per decided proposal, for "
        "`trl.DPOTrainer`",
    }
    rows = [[f"`{name}`", count, meanings[name]] for name, count in facts.num_rows.items()]
    missing = [f"There is no `{name}`: {reason}." for name, reason in facts.left_out.items()]
    return "\n\n".join([summary, format_table(["configuration", "rows", "what"], rows), *missing])


def _write_usage(traces: Sequence[Trace], facts: TraceCardFacts) -> str:
    policies = list(dict.fromkeys(trace.meta.get("policy", "") for trace in traces))
    is_public = len(policies) == 1 and policies[0] and not Path(policies[0]).exists()
    policy = policies[0] if is_public else "POLICY"
    blocks = [
        f"```python\n{text.format(name=facts.name, policy=policy)}\n```"
        for name, text in _LOAD_AND_TRAIN.items()
        if name in facts.num_rows
    ]
    note = "The rows hold token ids of the policy's tokenizer, so train a model with the same one."
    if not is_public:
        note += " `POLICY` is that model."
    is_local = Path(facts.name).is_absolute()
    folder = f'"{facts.name}' if is_local else f'snapshot_download("{facts.name}", repo_type="dataset") + "'
    replay = [
        "```python",
        *([] if is_local else ["from huggingface_hub import snapshot_download"]),
        "from nabla_trl import read_traces, to_sft_dataset",
        "",
        f'traces = read_traces({folder}/traces")',
        'rows = to_sft_dataset(traces, selection="improved")',
        "```",
    ]
    return "\n\n".join([note, *blocks, "The traces can be replayed, and give other rows:", "\n".join(replay)])


def _write_figures(traces: Sequence[Trace], facts: TraceCardFacts) -> str:
    totals = TraceTotals.of(traces)
    values = totals.compute_metrics()
    before, after = values["reward_before"], values["reward_after"]
    rows = [
        ["problems", str(len({(trace.task, trace.problem_id) for trace in traces}))],
        ["traces", str(totals.num_traces)],
        ["correct last responses", _format_share(values["accuracy"], f" of {totals.num_graded} that could be graded")],
        [
            "mean reward, first → last response",
            "–" if before is None or after is None else f"{before:.3g} → {after:.3g}",
        ],
        ["proposals accepted", _format_share(values["acceptance_rate"], f" of {totals.num_proposed}")],
        ["responses cut at the limit", _format_share(values["unfinished_rate"])],
        ["problems left out, as they could not be run", str(facts.num_errors)],
        ["cost of all traces", f"{format_si(totals.flops, 'FLOPs')}, {format_si(totals.seconds, 's')}"],
        ["cost per trace", format_si(totals.flops / totals.num_traces, "FLOPs")],
        *[[f"tokens, {name}", format_si(count)] for name, count in sorted(totals.tokens.items())],
    ]
    return format_table(["", "value"], rows)


def _format_share(share: float | None, of: str = "") -> str:
    return "–" if share is None else f"{100 * share:.1f}%{of}"


def _write_provenance(traces: Sequence[Trace], facts: TraceCardFacts) -> str:
    versions = {
        name.removeprefix("version/"): number for name, number in traces[0].meta.items() if name.startswith("version/")
    }
    lines = [
        f"Seeds: {', '.join(map(str, sorted({trace.seed for trace in traces})))}.",
        f"Versions: {', '.join(f'{name} {number}' for name, number in versions.items())}.",
    ]
    hashes = sorted({trace.meta.get("config_hash", "") for trace in traces} - {""})
    if not facts.settings:
        return format_bullets([*lines, f"Hash of the settings of the search: {', '.join(hashes)}."])
    settings = json.dumps(dict(facts.settings), indent=1, ensure_ascii=False)
    return format_bullets([*lines, "Settings:"]) + f"\n\n```json\n{settings}\n```"


def _write_columns(facts: TraceCardFacts) -> list[str]:
    parts = []
    for name in facts.num_rows:
        columns = TRACE_COLUMNS if name == "traces" else ROW_COLUMNS[name]
        parts += [
            f"### {name}",
            format_table(["column", "meaning"], [[f"`{key}`", text] for key, text in columns.items()]),
        ]
    return parts


def _list_limits(facts: TraceCardFacts) -> list[str]:
    license_note = (
        f"License: {facts.license}."
        if facts.license
        else "No license is set. Questions, policy and reward have licenses of their own, which decide what may be "
        "done with their outputs: set `license` at the top of this card."
    )
    return [
        "The responses follow the reward, its errors included. Compare rewards with correctness before training.",
        "Problems with a gold answer were graded by a program, which makes mistakes of its own.",
        "Evaluate on problems that are not in here.",
        license_note,
    ]
