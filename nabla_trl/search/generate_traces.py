"""Making a folder of traces: the search over many problems, graded and written as it goes, resumable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem, compute_content_hash
from nabla_trl.traces.build import grade_traces
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter, read_finished_meta
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.interrupts import finish_current_batch
from nabla_trl.utils.progress import ProgressDisplay

PROBLEM_HASH_KEY = "problem_hash"  # in a trace's meta


@dataclass
class TraceTotals:
    """What the traces written so far add up to. Rewards are sums over the traces without an error."""

    num_traces: int = 0
    num_errors: int = 0
    first_error: str = ""
    num_proposed: int = 0
    num_accepted: int = 0
    reward_before_sum: float = 0.0
    reward_after_sum: float = 0.0

    def add(self, trace: Trace) -> None:
        self.num_traces += 1
        self.num_proposed += len(trace.revisions)
        self.num_accepted += sum(revision.accepted for revision in trace.revisions)
        if trace.error is not None:
            self.num_errors += 1
            self.first_error = self.first_error or trace.error
        else:
            self.reward_before_sum += trace.reward_initial
            self.reward_after_sum += trace.reward

    def __str__(self) -> str:
        sound = max(self.num_traces - self.num_errors, 1)
        text = (
            f"{self.num_accepted} of {self.num_proposed} revisions accepted, "
            f"mean reward {self.reward_before_sum / sound:.2f} → {self.reward_after_sum / sound:.2f}"
        )
        return f"{text}, {self.num_errors} failed (the first: {self.first_error})" if self.num_errors else text


def find_unfinished_problems(problems: Sequence[Problem], folder: Path, seed: int) -> list[Problem]:
    """The problems without a trace of this seed in the folder.

    Raises:
        ValueError: a trace that is there is of another problem of the same id.
    """
    done = read_finished_meta(folder)
    for problem in problems:
        had = done.get((problem.id, seed), {}).get(PROBLEM_HASH_KEY)
        if had not in (None, compute_content_hash(problem)):
            raise ValueError(
                f"{folder} holds a trace of another problem {problem.id!r}: its text or answer has changed since, "
                "so use another --output_dir"
            )
    return [problem for problem in problems if (problem.id, seed) not in done]


def generate_traces(
    problems: Sequence[Problem],
    folder: Path,
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    seed: int,
    checker: AnswerChecker,
    rank: int = 0,
    show_progress: bool = True,
    num_done: int = 0,
) -> TraceTotals:
    """Refine a response to each problem and write graded traces, one shard per `config.batch_size` problems.

    A batch is on disk before the next begins, so that little is lost when the process ends early. `meta` holds the
    hash of the problem.

    Args:
        rank: number of this process; each needs its own.
        shown: show the progress on stderr.
        there: for the progress: traces that are there already.

    Raises:
        Stopped: it was asked for, and the batch in hand is on disk (`nabla_trl.utils.interrupts`).
        ValueError: as `solve` and `TraceWriter`.
        OSError: a shard that cannot be written.
    """
    tally, size = TraceTotals(), config.batch_size
    write_token_texts(folder, policy)
    with (
        TraceWriter(folder, rank=rank, chunk_size=size) as writer,
        ProgressDisplay(
            "traces", num_done + len(problems), num_done=num_done, show_progress=show_progress
        ) as progress,
    ):
        for begin in range(0, len(problems), size):
            batch = problems[begin : begin + size]
            with finish_current_batch(
                f"{len(batch)} problems", progress.format_position, progress.estimate_seconds(len(batch))
            ):
                made = grade_traces(run_search(batch, policy=policy, reward=reward, config=config, seed=seed), checker)
                for problem, trace in zip(batch, made, strict=True):
                    writer.add(replace(trace, meta=trace.meta | {PROBLEM_HASH_KEY: compute_content_hash(problem)}))
                    tally.add(trace)
                writer.flush()
                progress.add_items((trace.problem_id, trace.correct, trace.cost.flops) for trace in made)
    return tally


def write_token_texts(folder: Path, policy: Policy) -> None:
    """Write tokens.json: the text of every token, so that traces can be shown where there is no tokenizer.

    It holds {"tokenizer": hash, "special": [ids], "tokens": [text by id]}. Tokens are decoded behind a letter, as some
    tokenizers drop a space that a text begins with; one that is part of a character only is a replacement character.
    """
    path, tokenizer = folder / "tokens.json", policy.tokenizer
    if path.exists():
        return
    first = tokenizer.encode("a", add_special_tokens=False)
    start = tokenizer.decode(first)
    texts = [tokenizer.decode([*first, token]) for token in range(len(tokenizer))]
    tokens = [
        text[len(start) :] if text.startswith(start) else tokenizer.decode([token]) for token, text in enumerate(texts)
    ]
    table = {"tokenizer": policy.tokenizer_hash, "special": sorted(tokenizer.all_special_ids), "tokens": tokens}
    write_atomic(path, json.dumps(table))  # processes may write at once, all of them the same


def get_search_settings(config: SearchConfig) -> dict[str, str]:
    """The options of a search that can change a trace, for `claim_settings`."""
    return config.get_settings()
