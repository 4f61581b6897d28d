"""Tasks of lm-eval on rows of questions and answers, for tests that ask it to evaluate."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

TASK = """
task: {name}
dataset_path: json
dataset_kwargs: {{data_files: {{test: {file}}}}}
output_type: {kind}
test_split: test
metadata: {{version: 1.0}}
"""
GENERATION = """
doc_to_text: "{{question}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: UNTIL, do_sample: false, temperature: 0.0, max_gen_toks: 48}
metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]
"""
CHOICE = """
doc_to_text: "{{question}}="
target_delimiter: ""
doc_to_choice: ["3", "7"]
doc_to_target: TARGET
metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]
"""


def write_tasks(
    folder: Path, rows: Sequence[dict[str, Any]], generation: str, *, until: Sequence[str], target: str, more: str = ""
) -> None:
    """Write data.jsonl, a task of generated answers, and the task tiny_choice between two answers."""
    (folder / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    file = folder / "data.jsonl"
    text = TASK.format(name=generation, file=file, kind="generate_until") + GENERATION + more
    (folder / f"{generation}.yaml").write_text(text.replace("UNTIL", json.dumps(until)))
    text = TASK.format(name="tiny_choice", file=file, kind="multiple_choice") + CHOICE
    (folder / "tiny_choice.yaml").write_text(text.replace("TARGET", target))
