"""Define what a trace holds, and its columns on disk."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from nabla_trl.models.flops import Cost

FORMAT_VERSION = "2"
VERSION_KEY = b"nabla_trl.traces"  # in the metadata of a shard


@dataclass(frozen=True)
class Revision:
    """One proposal: branch off the incumbent at `position`, with `new_token` in place of `old_token`.

    Every revision of a round is proposed against the incumbent at the start of that round. A round accepts at most
    one revision. A method that proposes one branch at a time gives each its own round.

    Attributes:
        round: counted from 0.
        position: index of the token in the response.
        suffix: the proposed response from `position` on, which begins with `new_token`.
        cumulative_flops: what the problem had cost, in FLOPs, once this revision was scored.
    """

    round: int
    position: int
    old_token: int
    new_token: int
    suffix: tuple[int, ...]
    reward_before: float
    reward_after: float
    accepted: bool
    cumulative_flops: float


def replay_revisions(initial: Sequence[int], revisions: Iterable[Revision]) -> Iterator[tuple[Revision, list[int]]]:
    """Yield each revision of a chain with the response ids it was proposed against (the incumbent of its round)."""
    incumbent = base = list(initial)
    current_round: int | None = None
    for revision in revisions:
        if revision.round != current_round:
            base, current_round = incumbent, revision.round
        yield revision, base
        if revision.accepted:
            incumbent = base[: revision.position] + list(revision.suffix)


@dataclass
class Trace:
    """What one method made of one problem with one seed.

    The accepted revisions turn `initial_ids` into `response_ids`. A method without revisions stores the same ids in
    both. Rewards are NaN where a method uses none. A problem that failed has `error` set and is no sample.

    Attributes:
        initial_ids: token ids of the first response.
        response_ids: token ids of the last response.
        answer: found wherever the response put it (`nabla_trl.grading.extraction.extract_answer`), None without one.
        answer_strict: found only in the form that the task asks for, None where no form is asked for.
        match_result: value of the `MatchResult` of `answer`.
        stop_reason: why the search ended: "max_rounds", "max_rollouts", "max_flops", "patience", "exhausted",
            "single" (a method without rounds), …
        finished: whether the response ends with a stop token.
        predicted_gain: entry k is about the k-th incumbent. Its value t is the largest increase of the reward that the
            gradient predicts for another token at position t. The gradient at the last incumbents is not always
            computed, so there may be fewer entries than incumbents.
    """

    problem_id: str
    task: str
    method: str
    seed: int
    prompt: str
    response: str
    prompt_ids: list[int]
    initial_ids: list[int]
    response_ids: list[int]
    reward_initial: float
    reward: float
    answer: str | None
    gold: str | None
    correct: bool | None
    revisions: list[Revision]
    cost: Cost
    stop_reason: str
    finished: bool
    meta: dict[str, str]
    error: str | None = None
    predicted_gain: list[list[float]] = field(default_factory=list)
    answer_strict: str | None = None
    correct_strict: bool | None = None
    match_result: str | None = None

    @property
    def grading_reference(self) -> str | None:
        """What answers are checked against, as `Problem.grading_target`."""
        return self.meta.get("verifier") or self.gold

    def replay_revisions(self) -> Iterator[tuple[Revision, list[int]]]:
        """Yield each revision with the response ids it was proposed against (the incumbent of its round)."""
        return replay_revisions(self.initial_ids, self.revisions)

    def list_incumbents(self) -> list[tuple[list[int], float]]:
        """Return response ids and reward after 0, 1, 2, … accepted revisions."""
        incumbents = [(list(self.initial_ids), self.reward_initial)]
        for revision, base in self.replay_revisions():
            if revision.accepted:
                incumbents.append((base[: revision.position] + list(revision.suffix), revision.reward_after))
        return incumbents

    def list_incumbents_at(self, round_counts: Iterable[int]) -> list[tuple[list[int], float]]:
        """Return response ids and reward after each number of rounds. A search that ended keeps its last incumbent."""
        incumbents = self.list_incumbents()
        accepted_rounds = [revision.round for revision in self.revisions if revision.accepted]
        return [incumbents[bisect_left(accepted_rounds, count)] for count in round_counts]  # rounds count from 0

    def validate(self) -> None:
        """Refuse a record that contradicts itself. A trace with an `error` may lack its prompt and its rewards.

        Raises:
            ValueError: the contradiction.
        """
        if self.error is None and not self.prompt_ids:
            raise ValueError(f"{self.describe()}: empty prompt (no prompt ids)")
        rewards = (self.reward_initial, self.reward)
        has_no_rewards = all(map(math.isnan, rewards)) and not self.revisions
        if self.error is None and not has_no_rewards and not all(map(math.isfinite, rewards)):
            raise ValueError(f"{self.describe()}: rewards {rewards} are not finite, yet no error is recorded")
        accepted_rounds = [revision.round for revision in self.revisions if revision.accepted]
        rounds = [revision.round for revision in self.revisions]
        if len(set(accepted_rounds)) < len(accepted_rounds) or rounds != sorted(rounds):
            raise ValueError(f"{self.describe()}: rounds must not decrease and may accept one revision each")
        for revision, base in self.replay_revisions():
            self._check_revision(revision, base)
        incumbents = self.list_incumbents()
        if incumbents[-1][0] != list(self.response_ids):
            raise ValueError(f"{self.describe()}: accepted revisions do not turn initial_ids into response_ids")
        lengths = [len(ids) for ids, _ in incumbents]
        if [len(gains) for gains in self.predicted_gain] != lengths[: len(self.predicted_gain)]:
            raise ValueError(f"{self.describe()}: predicted_gain does not fit its incumbents of {lengths} tokens")

    def _check_revision(self, revision: Revision, base: list[int]) -> None:
        where = f"{self.describe()}: revision at position {revision.position} of round {revision.round}"
        if not 0 <= revision.position < len(base) or base[revision.position] != revision.old_token:
            raise ValueError(f"{where} does not fit the incumbent: token {revision.old_token} is not there")
        if not revision.suffix or revision.suffix[0] != revision.new_token:
            raise ValueError(f"{where}: the suffix does not begin with the new token {revision.new_token}")
        if revision.accepted and self.error is None and not math.isfinite(revision.reward_after):
            raise ValueError(f"{where} was accepted with reward {revision.reward_after}")

    def describe(self) -> str:
        """Name the trace in a message."""
        return f"trace {self.problem_id!r} (seed {self.seed}, {self.method})"


_TOKEN_IDS = pa.list_(pa.int32())
_REVISION = pa.struct(
    [
        ("round", pa.int32()),
        ("position", pa.int32()),
        ("old_token", pa.int32()),
        ("new_token", pa.int32()),
        ("suffix", _TOKEN_IDS),
        ("reward_before", pa.float64()),
        ("reward_after", pa.float64()),
        ("accepted", pa.bool_()),
        ("cumulative_flops", pa.float64()),
    ]
)
SCHEMA = pa.schema(
    [
        ("problem_id", pa.string()),
        ("task", pa.string()),
        ("method", pa.string()),
        ("seed", pa.int64()),
        ("prompt", pa.string()),
        ("response", pa.string()),
        ("prompt_ids", _TOKEN_IDS),
        ("initial_ids", _TOKEN_IDS),
        ("response_ids", _TOKEN_IDS),
        ("reward_initial", pa.float64()),
        ("reward", pa.float64()),
        ("answer", pa.string()),
        ("gold", pa.string()),
        ("correct", pa.bool_()),
        ("revisions", pa.list_(_REVISION)),
        ("flops", pa.float64()),
        ("seconds", pa.float64()),
        ("tokens", pa.string()),  # JSON
        ("stop_reason", pa.string()),
        ("finished", pa.bool_()),
        ("meta", pa.string()),  # JSON
        ("error", pa.string()),
        ("predicted_gain", pa.list_(pa.list_(pa.float32()))),
        ("answer_strict", pa.string()),
        ("correct_strict", pa.bool_()),
        ("match_result", pa.string()),
    ],
    metadata={VERSION_KEY: FORMAT_VERSION.encode()},
)
