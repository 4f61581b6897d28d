"""Search many problems batch by batch: grade their traces, and write each batch to disk before the next begins."""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.tasks.shards import list_run_folders
from nabla_trl.traces.build import grade_traces
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter, read_finished_meta
from nabla_trl.traces.summary import TraceTotals
from nabla_trl.traces.texts import TOKENS_FILE
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.interrupts import finish_current_batch
from nabla_trl.utils.progress import ProgressDisplay, report_metrics

PROBLEM_HASH_KEY = "problem_hash"  # key of a trace's `meta`


def find_unfinished_problems(problems: Sequence[Problem], folder: Path, seed: int) -> list[Problem]:
    """Return the problems that have no trace of this seed in the folder, or in a folder of a shard of the same run.

    Raises:
        ValueError: the folder holds a trace of a problem with the same id and another content.
    """
    meta_by_trace: dict[tuple[str, int], dict[str, str]] = {}
    for run_folder in list_run_folders(folder.parent):
        meta_by_trace |= read_finished_meta(run_folder / folder.name)
    for problem in problems:
        content_hash = meta_by_trace.get((problem.id, seed), {}).get(PROBLEM_HASH_KEY)
        if content_hash not in (None, compute_content_hash(problem)):
            raise ValueError(
                f"{folder} holds a trace of another problem {problem.id!r}: its text or answer has changed since, "
                "so use another --output_dir"
            )
    return [problem for problem in problems if (problem.id, seed) not in meta_by_trace]


def search_in_batches(
    problems: Sequence[Problem],
    store: Callable[[list[Trace]], None],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    seed: int,
    checker: AnswerChecker,
    show_progress: bool = True,
    num_done: int = 0,
) -> TraceTotals:
    """Search a response to each problem and store the graded traces, `config.batch_size` problems at a time.

    A batch is stored before the next one begins, so that an early end loses one batch at most. The `meta` of a trace
    holds the hash of its problem.

    Args:
        store: takes the traces of a batch.
        show_progress: show the progress on stderr.
        num_done: traces that exist already, for the progress.

    Raises:
        StoppedBySignal: a signal arrived, and the current batch is stored (see `utils.interrupts`).
        ValueError: as `run_search` and `store`.
        OSError: as `store`.
    """
    totals, size = TraceTotals(), config.batch_size
    warned: set[str] = set()
    with ProgressDisplay(
        "traces", num_done + len(problems), num_done=num_done, show_progress=show_progress
    ) as progress:
        for begin in range(0, len(problems), size):
            batch = problems[begin : begin + size]
            with finish_current_batch(
                f"{len(batch)} problems", progress.format_position, progress.estimate_seconds(len(batch))
            ):
                traces = grade_traces(
                    run_search(batch, policy=policy, reward=reward, config=config, seed=seed), checker
                )
                traces = [
                    replace(trace, meta=trace.meta | {PROBLEM_HASH_KEY: compute_content_hash(problem)})
                    for problem, trace in zip(batch, traces, strict=True)
                ]
                store(traces)
                for trace in traces:
                    totals.add(trace)
                progress.add_items((trace.problem_id, trace.correct, trace.cost.flops) for trace in traces)
            report_metrics("traces", totals.compute_metrics() | progress.compute_rate())
            for kind, text in totals.list_warnings(config.max_new_tokens).items():
                if kind not in warned:
                    progress.warn(text)
                    warned.add(kind)
    return totals


def search_to_folder(
    problems: Sequence[Problem], folder: Path, *, policy: Policy, config: SearchConfig, rank: int = 0, **options: Any
) -> TraceTotals:
    """Search a response to each problem and write the traces to a folder, one shard per batch.

    Args:
        rank: number of this process. Processes that write to the same folder need different numbers.
        options: further arguments of `search_in_batches`.

    Raises:
        StoppedBySignal, ValueError, OSError: as `search_in_batches` and `TraceWriter`.
    """
    write_token_texts(folder, policy)
    with TraceWriter(folder, rank=rank, chunk_size=config.batch_size) as writer:

        def store(traces: list[Trace]) -> None:
            for trace in traces:
                writer.add(trace)
            writer.flush()

        return search_in_batches(problems, store, policy=policy, config=config, **options)


def write_token_texts(folder: Path, policy: Policy) -> None:
    """Write tokens.json with the text of every token, so that a viewer needs no tokenizer.

    It holds {"tokenizer": hash, "special": [ids], "tokens": [text by id]}. A token that is only part of a character
    has the text of a replacement character.
    """
    path, tokenizer = folder / TOKENS_FILE, policy.tokenizer
    if path.exists():
        return
    # Tokens are decoded after a letter, because some tokenizers drop the space at the beginning of a text.
    letter_ids = tokenizer.encode("a", add_special_tokens=False)
    letter = tokenizer.decode(letter_ids)
    texts = [tokenizer.decode([*letter_ids, token]) for token in range(len(tokenizer))]
    tokens = [
        text[len(letter) :] if text.startswith(letter) else tokenizer.decode([token])
        for token, text in enumerate(texts)
    ]
    special = sorted({*tokenizer.all_special_ids} - policy.think_token_ids)
    table = {"tokenizer": policy.tokenizer_hash, "special": special, "tokens": tokens}
    write_atomic(path, json.dumps(table))  # several processes may write it, all of them the same text
