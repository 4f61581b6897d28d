"""What a trace holds, and its columns."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field

import pyarrow as pa

from nabla_trl.models.flops import Cost

FORMAT_VERSION = "1"
VERSION_KEY = b"nabla_trl.traces"  # of the metadata of a shard


@dataclass(frozen=True)
class Revision:
    """One proposal: branch off the incumbent at `position`, taking `new` instead of `old`.

    `position` indexes the response; `suffix` is the proposed response from there on, `new` first. Every
    revision of a round is proposed against the incumbent at the start of that round, and a round accepts one
    at most; a method that proposes one branch at a time makes each its own round. `flops` is what the problem
    had cost, cumulatively, once this revision was scored.
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
    """Each revision of a chain with the response ids it was proposed against (the incumbent of its round)."""
    incumbent = base = list(initial)
    current: int | None = None
    for revision in revisions:
        if revision.round != current:
            base, current = incumbent, revision.round
        yield revision, base
        if revision.accepted:
            incumbent = base[: revision.position] + list(revision.suffix)


@dataclass
class Trace:
    """What one method made of one problem with one seed.

    `initial_ids` is the first response, `response_ids` the one that was kept: the accepted revisions turn one
    into the other, and a method without revisions stores the same ids in both. Rewards are nan where a method
    uses none. `stop` says why it ended ("rounds", "budget", "patience", "exhausted", "single", ...);
    `finished`: the response ends with a stop token. A problem that failed has `error` set and is no sample.

    `pull[k][t]`: by how much the gradient at the k-th incumbent (`incumbents`) promised to raise the reward, at most,
    with another token at position t. There may be fewer of them than incumbents: the last one's gradient is not always
    taken, and a method without a gradient has none.

    `answer` is found wherever the response may have put it (`answers.extract_answer`), `answer_strict` only in the
    form that the task asks for (`answers.strict_answer`); both are None where there is none, the strict one also where
    no form is asked for. `verdict` is the `answers.Verdict` on `answer`.
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
        """What its answers are checked against, as `Problem.judge`."""
        return self.meta.get("verifier") or self.gold

    def replay_revisions(self) -> Iterator[tuple[Revision, list[int]]]:
        """Each revision with the response ids it was proposed against (the incumbent of its round)."""
        return replay_revisions(self.initial_ids, self.revisions)

    def list_incumbents(self) -> list[tuple[list[int], float]]:
        """Response ids and reward after 0, 1, 2, ... accepted revisions."""
        states = [(list(self.initial_ids), self.reward_initial)]
        for revision, base in self.replay_revisions():
            if revision.accepted:
                states.append((base[: revision.position] + list(revision.suffix), revision.reward_after))
        return states

    def validate(self) -> None:
        """Raise ValueError if the record contradicts itself.

        A trace with an `error` may lack its prompt and its rewards.
        """
        if self.error is None and not self.prompt_ids:
            raise ValueError(f"{self.describe()}: empty prompt (no prompt ids)")
        rewards = (self.reward_initial, self.reward)
        unrewarded = all(map(math.isnan, rewards)) and not self.revisions
        if self.error is None and not unrewarded and not all(map(math.isfinite, rewards)):
            raise ValueError(f"{self.describe()}: rewards {rewards} are not finite, yet no error is recorded")
        accepted = [revision.round for revision in self.revisions if revision.accepted]
        rounds = [revision.round for revision in self.revisions]
        if len(set(accepted)) < len(accepted) or rounds != sorted(rounds):
            raise ValueError(f"{self.describe()}: rounds must not decrease and may accept one revision each")
        for revision, base in self.replay_revisions():
            self._check_revision(revision, base)
        if self.list_incumbents()[-1][0] != list(self.response_ids):
            raise ValueError(f"{self.describe()}: accepted revisions do not turn initial_ids into response_ids")
        lengths = [len(ids) for ids, _ in self.list_incumbents()]
        if [len(one) for one in self.predicted_gain] != lengths[: len(self.predicted_gain)]:
            raise ValueError(f"{self.describe()}: the pull is not of its incumbents, which have {lengths} tokens")

    def _check_revision(self, revision: Revision, base: list[int]) -> None:
        where = f"{self.describe()}: revision at position {revision.position} of round {revision.round}"
        if not 0 <= revision.position < len(base) or base[revision.position] != revision.old_token:
            raise ValueError(f"{where} does not fit the incumbent: token {revision.old_token} is not there")
        if not revision.suffix or revision.suffix[0] != revision.new_token:
            raise ValueError(f"{where}: the suffix does not begin with the new token {revision.new_token}")
        if revision.accepted and self.error is None and not math.isfinite(revision.reward_after):
            raise ValueError(f"{where} was accepted with reward {revision.reward_after}")

    def describe(self) -> str:
        return f"trace {self.problem_id!r} (seed {self.seed}, {self.method})"


_TOKEN_IDS_TYPE = pa.list_(pa.int32())


_REVISION_TYPE = pa.struct(
    [
        ("round", pa.int32()),
        ("position", pa.int32()),
        ("old", pa.int32()),
        ("new", pa.int32()),
        ("suffix", _TOKEN_IDS_TYPE),
        ("reward_before", pa.float64()),
        ("reward_after", pa.float64()),
        ("accepted", pa.bool_()),
        ("flops", pa.float64()),
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
        ("prompt_ids", _TOKEN_IDS_TYPE),
        ("initial_ids", _TOKEN_IDS_TYPE),
        ("response_ids", _TOKEN_IDS_TYPE),
        ("reward_initial", pa.float64()),
        ("reward", pa.float64()),
        ("answer", pa.string()),
        ("gold", pa.string()),
        ("correct", pa.bool_()),
        ("revisions", pa.list_(_REVISION_TYPE)),
        ("flops", pa.float64()),
        ("seconds", pa.float64()),
        ("tokens", pa.string()),  # JSON
        ("stop", pa.string()),
        ("finished", pa.bool_()),
        ("meta", pa.string()),  # JSON
        ("error", pa.string()),
        ("pull", pa.list_(pa.list_(pa.float32()))),
        ("answer_strict", pa.string()),
        ("correct_strict", pa.bool_()),
        ("verdict", pa.string()),
    ],
    metadata={VERSION_KEY: FORMAT_VERSION.encode()},
)
