"""Making a folder of traces: the search over many problems, graded and written as it goes, resumable."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import ReasonerConfig
from nabla_trl.search.loop import solve
from nabla_trl.tasks.problem import Problem, content_hash
from nabla_trl.traces.build import grade
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter, finished
from nabla_trl.utils.files import write_whole
from nabla_trl.utils.interrupts import in_hand
from nabla_trl.utils.progress import Progress

CONTENT = "problem_hash"  # in a trace's meta


@dataclass
class Tally:
    """What the traces written so far add up to. Rewards are sums over the traces without an error."""

    traces: int = 0
    errors: int = 0
    first_error: str = ""
    proposed: int = 0
    accepted: int = 0
    reward_before: float = 0.0
    reward_after: float = 0.0

    def add(self, trace: Trace) -> None:
        self.traces += 1
        self.proposed += len(trace.revisions)
        self.accepted += sum(revision.accepted for revision in trace.revisions)
        if trace.error is not None:
            self.errors += 1
            self.first_error = self.first_error or trace.error
        else:
            self.reward_before += trace.reward_initial
            self.reward_after += trace.reward

    def __str__(self) -> str:
        sound = max(self.traces - self.errors, 1)
        text = (
            f"{self.accepted} of {self.proposed} revisions accepted, "
            f"mean reward {self.reward_before / sound:.2f} → {self.reward_after / sound:.2f}"
        )
        return f"{text}, {self.errors} failed (the first: {self.first_error})" if self.errors else text


def unfinished(problems: Sequence[Problem], folder: Path, seed: int) -> list[Problem]:
    """The problems without a trace of this seed in the folder.

    Raises:
        ValueError: a trace that is there is of another problem of the same id.
    """
    done = finished(folder)
    for problem in problems:
        had = done.get((problem.id, seed), {}).get(CONTENT)
        if had not in (None, content_hash(problem)):
            raise ValueError(
                f"{folder} holds a trace of another problem {problem.id!r}: its text or answer has changed since, "
                "so use another --output_dir"
            )
    return [problem for problem in problems if (problem.id, seed) not in done]


def write_traces(
    problems: Sequence[Problem],
    folder: Path,
    *,
    policy: Policy,
    reward: Reward,
    config: ReasonerConfig,
    seed: int,
    checker: AnswerChecker,
    rank: int = 0,
    shown: bool = True,
    there: int = 0,
) -> Tally:
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
    tally, size = Tally(), config.batch_size
    write_tokens(folder, policy)
    with (
        TraceWriter(folder, rank=rank, chunk_size=size) as writer,
        Progress("traces", there + len(problems), there=there, shown=shown) as progress,
    ):
        for begin in range(0, len(problems), size):
            batch = problems[begin : begin + size]
            with in_hand(f"{len(batch)} problems", progress.position, progress.seconds_for(len(batch))):
                made = grade(solve(batch, policy=policy, reward=reward, config=config, seed=seed), checker)
                for problem, trace in zip(batch, made, strict=True):
                    writer.add(replace(trace, meta=trace.meta | {CONTENT: content_hash(problem)}))
                    tally.add(trace)
                writer.flush()
                progress.count((trace.problem_id, trace.correct, trace.cost.flops) for trace in made)
    return tally


def write_tokens(folder: Path, policy: Policy) -> None:
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
    write_whole(path, json.dumps(table))  # processes may write at once, all of them the same


def search_settings(config: ReasonerConfig) -> dict[str, str]:
    """The options of a search that can change a trace, for `claim_settings`."""
    return {name: str(value) for name, value in asdict(config).items() if name != "batch_size"}
