"""Search many problems batch by batch: grade their traces, and write each batch to disk before the next begins.

The searches of a batch may share a budget of FLOPs (`run_search_with_shared_budget`). Then rounds go to problems whose
highest reward is low among those of all problems. A chain that no longer rises makes way for a new one.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from nabla_trl.engine.allocation import PILOT_RESPONSES, allocate, estimate_reward_gains
from nabla_trl.engine.engine import Engine
from nabla_trl.engine.scheduler import check_distinct_ids
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.limits import past_limits
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import NO_BUDGET, SearchConfig, SharedBudget
from nabla_trl.search.loop import Search, check_gradient, run_search
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
    budget: SharedBudget = NO_BUDGET,
    show_progress: bool = True,
    num_done: int = 0,
) -> TraceTotals:
    """Search a response to each problem and store the graded traces, a batch at a time.

    A batch has `config.batch_size` problems, or those that share a budget. It is stored before the next one begins, so
    that an early end loses one batch at most. The `meta` of a trace holds the hash of its problem.

    Args:
        store: takes the traces of a batch.
        show_progress: show the progress on stderr.
        num_done: traces that exist already, for the progress.

    Raises:
        StoppedBySignal: a signal arrived, and the current batch is stored (see `utils.interrupts`).
        ValueError: as `run_search` and `store`.
        OSError: as `store`.
    """
    totals, size = TraceTotals(), budget.problems_per_budget if budget.shared_flops else config.batch_size
    shared: dict[str, Any] = {"policy": policy, "reward": reward, "config": config, "seed": seed}

    def search(batch: Sequence[Problem]) -> list[Trace]:
        if budget.shared_flops:
            return run_search_with_shared_budget(batch, max_flops=budget.shared_flops * len(batch), **shared)
        return run_search(batch, **shared)

    warned: set[str] = set()
    with ProgressDisplay(
        "traces", num_done + len(problems), num_done=num_done, show_progress=show_progress
    ) as progress:
        for begin in range(0, len(problems), size):
            batch = problems[begin : begin + size]
            with finish_current_batch(
                f"{len(batch)} problems", progress.format_position, progress.estimate_seconds(len(batch))
            ):
                traces = [
                    replace(trace, meta=trace.meta | {PROBLEM_HASH_KEY: compute_content_hash(problem)})
                    for problem, trace in zip(batch, grade_traces(search(batch), checker), strict=True)
                ]
                store(traces)
                for trace in traces:
                    totals.add(trace)
                progress.add_items((trace.problem_id, trace.correct, trace.cost.flops) for trace in traces)
            report_metrics("traces", totals.compute_metrics() | progress.compute_rate())
            warnings = totals.list_warnings(config.max_new_tokens)
            if budget.shared_flops:  # how many rounds a search has is known only now
                num_rounds = max((revision.round + 1 for trace in traces for revision in trace.revisions), default=1)
                warnings["rounds"] = past_limits(reward.validated_limits, num_rounds, by_budget=True) or ""
            for kind, text in warnings.items():
                if text and kind not in warned:
                    progress.warn(text)
                    warned.add(kind)
    return totals


def search_to_folder(
    problems: Sequence[Problem],
    folder: Path,
    *,
    policy: Policy,
    config: SearchConfig,
    budget: SharedBudget = NO_BUDGET,
    rank: int = 0,
    **options: Any,
) -> TraceTotals:
    """Search a response to each problem and write the traces to a folder, one file per batch.

    Args:
        rank: number of this process. Processes that write to the same folder need different numbers.
        options: further arguments of `search_in_batches`.

    Raises:
        StoppedBySignal, ValueError, OSError: as `search_in_batches` and `TraceWriter`.
    """
    write_token_texts(folder, policy)
    with TraceWriter(folder, rank=rank, chunk_size=max(config.batch_size, budget.block_size)) as writer:

        def store(traces: list[Trace]) -> None:
            for trace in traces:
                writer.add(trace)
            writer.flush()

        return search_in_batches(problems, store, policy=policy, config=config, budget=budget, **options)


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


# --- one budget for many problems ----------------------------------------------------------------------


def run_search_with_shared_budget(
    problems: Sequence[Problem],
    *,
    policy: Policy,
    reward: Reward,
    config: SearchConfig,
    max_flops: float,
    seed: int = 0,
    pilot: int = PILOT_RESPONSES,
) -> list[Trace]:
    """Return one trace per problem. The searches share one budget, which alone ends them.

    A problem alone has nobody to share with, so its search spends the whole budget.

    Args:
        config: how a search goes on. Its limits do not apply (see `SearchConfig.with_shared_budget`).
        max_flops: total FLOPs of all problems. First responses of a problem stay within an even share of them.
        pilot: the first response and the rounds that each problem gets at least, together.

    Raises:
        ValueError: two problems have the same id, the solver needs a gradient and the reward is a function, or a
            configuration that cannot have a budget of FLOPs.
    """
    check_distinct_ids(problems)
    check_gradient(reward, config)
    config = config.with_shared_budget(max_flops)
    if len(problems) == 1:
        return run_search(problems, policy=policy, reward=reward, config=config, seed=seed)
    engine = Engine(policy, reward, num_slots=config.batch_size)
    share = max_flops / max(1, len(problems))  # first responses are drawn before any search is known to need more
    searches = [Search(problem, engine, config, seed, start_flops=share) for problem in problems]
    by_id = {search.problem.id: search for search in searches}
    num_rounds, has_ended = np.zeros(len(searches), dtype=int), np.zeros(len(searches), dtype=bool)
    rewards: list[list[float]] = [[] for _ in searches]

    def draw(counts: np.ndarray) -> None:
        for round_number in range(counts.max(initial=0)):
            chosen = np.flatnonzero((counts > round_number) & ~has_ended)
            goes_on = engine.run_problems(
                [problems[number] for number in chosen],
                lambda problem: by_id[problem.id].advance(),
                max_concurrent=config.batch_size,
            )
            num_rounds[chosen] += np.array(goes_on, dtype=bool)
            has_ended[chosen] = ~np.array(goes_on, dtype=bool)
            for number in chosen:
                rewards[number] = _list_rewards(searches[number])

    def count() -> tuple[np.ndarray, np.ndarray]:
        return num_rounds.copy(), np.array([search.count_flops() for search in searches])

    def estimate_gains() -> np.ndarray:
        return np.where(has_ended, 0.0, estimate_reward_gains(rewards, 1 / config.reward_weight))

    allocate(draw, count, estimate_gains, max_flops=max_flops, pilot=pilot)
    for chain in (chain for search in searches for chain in search.chains if not chain.stop_reason):
        chain.stop_reason = "max_flops"
    return [search.build_trace() for search in searches]


def _list_rewards(search: Search) -> list[float]:
    """Return the rewards of the first responses of a search's chains, and of all its proposals."""
    return [
        reward
        for chain in search.chains
        for reward in (chain.initial.reward, *(revision.reward_after for revision in chain.revisions))
    ]
