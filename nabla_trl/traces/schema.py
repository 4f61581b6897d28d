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
    old: int
    new: int
    suffix: tuple[int, ...]
    reward_before: float
    reward_after: float
    accepted: bool
    flops: float


def bases(initial: Sequence[int], revisions: Iterable[Revision]) -> Iterator[tuple[Revision, list[int]]]:
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
    stop: str
    finished: bool
    meta: dict[str, str]
    error: str | None = None
    pull: list[list[float]] = field(default_factory=list)
    answer_strict: str | None = None
    correct_strict: bool | None = None
    verdict: str | None = None

    @property
    def judge(self) -> str | None:
        """What its answers are checked against, as `Problem.judge`."""
        return self.meta.get("verifier") or self.gold

    def bases(self) -> Iterator[tuple[Revision, list[int]]]:
        """Each revision with the response ids it was proposed against (the incumbent of its round)."""
        return bases(self.initial_ids, self.revisions)

    def incumbents(self) -> list[tuple[list[int], float]]:
        """Response ids and reward after 0, 1, 2, ... accepted revisions."""
        states = [(list(self.initial_ids), self.reward_initial)]
        for revision, base in self.bases():
            if revision.accepted:
                states.append((base[: revision.position] + list(revision.suffix), revision.reward_after))
        return states

    def validate(self) -> None:
        """Raise ValueError if the record contradicts itself.

        A trace with an `error` may lack its prompt and its rewards.
        """
        if self.error is None and not self.prompt_ids:
            raise ValueError(f"{self._label()}: empty prompt (no prompt ids)")
        rewards = (self.reward_initial, self.reward)
        unrewarded = all(map(math.isnan, rewards)) and not self.revisions
        if self.error is None and not unrewarded and not all(map(math.isfinite, rewards)):
            raise ValueError(f"{self._label()}: rewards {rewards} are not finite, yet no error is recorded")
        accepted = [revision.round for revision in self.revisions if revision.accepted]
        rounds = [revision.round for revision in self.revisions]
        if len(set(accepted)) < len(accepted) or rounds != sorted(rounds):
            raise ValueError(f"{self._label()}: rounds must not decrease and may accept one revision each")
        for revision, base in self.bases():
            self._check_revision(revision, base)
        if self.incumbents()[-1][0] != list(self.response_ids):
            raise ValueError(f"{self._label()}: accepted revisions do not turn initial_ids into response_ids")
        lengths = [len(ids) for ids, _ in self.incumbents()]
        if [len(one) for one in self.pull] != lengths[: len(self.pull)]:
            raise ValueError(f"{self._label()}: the pull is not of its incumbents, which have {lengths} tokens")

    def _check_revision(self, revision: Revision, base: list[int]) -> None:
        where = f"{self._label()}: revision at position {revision.position} of round {revision.round}"
        if not 0 <= revision.position < len(base) or base[revision.position] != revision.old:
            raise ValueError(f"{where} does not fit the incumbent: token {revision.old} is not there")
        if not revision.suffix or revision.suffix[0] != revision.new:
            raise ValueError(f"{where}: the suffix does not begin with the new token {revision.new}")
        if revision.accepted and self.error is None and not math.isfinite(revision.reward_after):
            raise ValueError(f"{where} was accepted with reward {revision.reward_after}")

    def _label(self) -> str:
        return f"trace {self.problem_id!r} (seed {self.seed}, {self.method})"


_IDS = pa.list_(pa.int32())


_REVISION = pa.struct(
    [
        ("round", pa.int32()),
        ("position", pa.int32()),
        ("old", pa.int32()),
        ("new", pa.int32()),
        ("suffix", _IDS),
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
        ("prompt_ids", _IDS),
        ("initial_ids", _IDS),
        ("response_ids", _IDS),
        ("reward_initial", pa.float64()),
        ("reward", pa.float64()),
        ("answer", pa.string()),
        ("gold", pa.string()),
        ("correct", pa.bool_()),
        ("revisions", pa.list_(_REVISION)),
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
