"""Define what a trace holds, and its columns on disk."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import MISSING, asdict, dataclass, field, fields
from functools import partial
from html import escape
from typing import Any

import numpy as np
import pyarrow as pa

from nabla_trl.models.flops import Cost
from nabla_trl.traces.texts import (
    TextChange,
    TextDecoder,
    compute_text_change,
    name_special_tokens,
    write_token_numbers,
)
from nabla_trl.utils.formatting import format_error, format_si, make_printable

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


@dataclass(frozen=True)
class TraceTexts:
    """Texts of a trace, for people.

    Attributes:
        initial: the first response.
        changes: what each revision changed, accepted or not.
    """

    initial: str
    changes: tuple[TextChange, ...]


@dataclass(frozen=True)
class SoftTargets:
    """Refined distributions of the next token along a response of T tokens: the k likeliest tokens at each position.

    All other tokens together have the rest of the probability. The arrays are stored as little-endian bytes, which
    take a fraction of the memory of lists.

    Attributes:
        top_k: k.
        ids: [T, k] int32 token ids.
        logp: [T, k] float32 log-probabilities in nats. -inf where there are fewer than k tokens.
    """

    top_k: int
    ids: bytes
    logp: bytes

    @classmethod
    def from_arrays(cls, ids: Any, logp: Any) -> SoftTargets:
        """Return the record of two arrays [T, k]."""
        ids_Tk, logp_Tk = np.asarray(ids, dtype="<i4"), np.asarray(logp, dtype="<f4")
        if ids_Tk.ndim != 2 or ids_Tk.shape != logp_Tk.shape:
            raise ValueError(f"soft targets need two arrays [T, k], not {ids_Tk.shape} and {logp_Tk.shape}")
        return cls(ids_Tk.shape[1], ids_Tk.tobytes(), logp_Tk.tobytes())

    def to_arrays(self) -> tuple[np.ndarray, np.ndarray]:
        """Return ids and log-probabilities, [T, k] each."""
        arrays = np.frombuffer(self.ids, dtype="<i4"), np.frombuffer(self.logp, dtype="<f4")
        ids, logp = (array.reshape(-1, self.top_k) for array in arrays)
        return ids, logp


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


@dataclass(repr=False)
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
        soft_targets: entry k is about the k-th incumbent: the refined distributions along it. Empty unless the search
            recorded them (`SearchConfig.soft_target_top_k`). There may be fewer entries than incumbents, as above.
        decoder: turns token ids into text, if the tokenizer or a table of its tokens is at hand. Not stored.
        texts: of a trace from `from_dict`. `get_texts` returns those of any trace.
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
    soft_targets: list[SoftTargets] = field(default_factory=list)
    decoder: TextDecoder | None = field(default=None, repr=False, compare=False)
    texts: TraceTexts | None = field(default=None, repr=False, compare=False)

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
        num_tokens = [len(targets.to_arrays()[0]) for targets in self.soft_targets]
        if num_tokens != lengths[: len(num_tokens)]:
            raise ValueError(f"{self.describe()}: soft_targets do not fit its incumbents of {lengths} tokens")

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

    # --- for people and programs --------------------------------------------------------------------------

    def get_texts(self) -> TraceTexts:
        """Return the first response and the changes of all revisions as text.

        Without a decoder a token is written as its number, such as ⟨17⟩.
        """
        if self.texts is not None and len(self.texts.changes) == len(self.revisions):
            return self.texts
        decode = self.decoder or write_token_numbers
        changes = tuple(compute_text_change(revision, base, decode) for revision, base in self.replay_revisions())
        return TraceTexts(decode(self.initial_ids), changes)

    def list_changes(self) -> list[tuple[Revision, TextChange, tuple[str, str]]]:
        """Return each revision with what it changed, and what stands for its tokens where they have no text."""
        return [
            (revision, change, name_special_tokens(revision, base))
            for (revision, base), change in zip(self.replay_revisions(), self.get_texts().changes, strict=True)
        ]

    def __repr__(self) -> str:
        """Return the trace as an answer that is refined: each accepted change, its reward, and the cost."""
        if self.error is not None:
            return f"{self.describe()}\n  question  {_shorten(self.prompt)}\n  error     {_shorten(self.error)}"
        lines = [
            self.describe(),
            f"  question  {_shorten(self.prompt)}",
            f"  first     {_shorten(self.get_texts().initial)}   reward {self.reward_initial:.3f}",
        ]
        for revision, change, names in self.list_changes():
            if revision.accepted:
                text = change.format_marked(names, _MAX_CONTEXT).replace("\n", "⏎")
                reward = f"{revision.reward_before:.3f} -> {revision.reward_after:.3f}"
                lines.append(f"  round {revision.round + 1:<4}{text}   reward {reward}")
        lines.append(f"  last      {_shorten(self.response)}   reward {self.reward:.3f}")
        return "\n".join([*lines, f"  {self._describe_outcome()}"])

    def _describe_outcome(self) -> str:
        """Return answer, cost and the end of the search in one line."""
        num_accepted = sum(revision.accepted for revision in self.revisions)
        words = {True: " (right)", False: " (wrong)", None: ""}
        parts = [
            f"answer {_shorten(self.answer or 'none found')}{words[self.correct]}",
            f"{num_accepted} of {len(self.revisions)} proposals accepted",
            f"{format_si(self.cost.flops, 'FLOPs')}, {format_si(self.cost.seconds, 's')}",
            f"ended by {self.stop_reason}" + ("" if self.finished else ", response cut off"),
        ]
        return "; ".join(parts)

    def _repr_html_(self) -> str:
        """Return the trace for a notebook: HTML with inline styles, without scripts. All texts are escaped."""

        def row(title: str, content: str, reward: str) -> str:
            cell = "padding:2px 10px 2px 0;vertical-align:top;text-align:left"
            return (
                f'<tr><th style="{cell};white-space:nowrap">{escape(title)}</th>'
                f'<td style="{cell};white-space:pre-wrap;font-family:monospace">{content}</td>'
                f'<td style="{cell};white-space:nowrap">{escape(reward)}</td></tr>'
            )

        def text(value: str) -> str:
            return escape(make_printable(value))

        rows = [row("question", text(self.prompt), "")]
        if self.error is not None:
            rows.append(row("error", text(self.error), ""))
        else:
            rows.append(row("first response", text(self.get_texts().initial), f"reward {self.reward_initial:.3f}"))
            for revision, change, names in self.list_changes():
                if revision.accepted:
                    reward = f"{revision.reward_before:.3f} → {revision.reward_after:.3f}"
                    rows.append(row(f"round {revision.round + 1}", change.format_html(names), reward))
            rows.append(row("last response", text(self.response), f"reward {self.reward:.3f}"))
        caption = f"<div>{escape(self._describe_outcome())}</div>" if self.error is None else ""
        return f"<div><b>{text(self.describe())}</b><table>{''.join(rows)}</table>{caption}</div>"

    def to_dict(self, *, infinite_as_none: bool = False) -> dict[str, Any]:
        """Return the trace as JSON values, with the texts of its responses and revisions.

        Args:
            infinite_as_none: write None for every number that is not finite, so that no text stands among numbers.
                False: None for NaN alone, and the texts "inf" and "-inf", which `from_dict` reads again.
        """
        to_json = partial(_to_json, infinite_as_none=infinite_as_none)
        texts = self.get_texts()
        revisions = [
            to_json(vars(revision))
            | {
                "old_text": change.old_token,
                "new_text": change.new_token,
                "suffix_text": change.new_token + change.suffix,
                "prefix_text": change.prefix,
            }
            for revision, change in zip(self.revisions, texts.changes, strict=True)
        ]
        values = {name: value for name, value in vars(self).items() if name not in _UNSTORED_FIELDS}
        targets = [dict(zip(_TARGET_KEYS, one.to_arrays(), strict=True)) for one in self.soft_targets]
        values["soft_targets"] = [{key: array.tolist() for key, array in one.items()} for one in targets]
        return to_json(values | {"cost": asdict(self.cost), "revisions": ()}) | {
            "initial": texts.initial,
            "revisions": revisions,
        }

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Trace:
        """Return the trace of an object that `to_dict` wrote.

        Raises:
            ValueError: unknown or missing keys, or a trace that contradicts itself.
        """
        values, names = dict(data), [one.name for one in fields(cls) if one.name not in _UNSTORED_FIELDS]
        initial = values.pop("initial", None)
        required = [one.name for one in fields(cls) if one.default is MISSING and one.default_factory is MISSING]
        mistakes = [f"unknown key {name!r}" for name in values if name not in names]
        mistakes += [f"{name!r} is missing" for name in required if name not in values]
        if mistakes:
            raise ValueError(f"this is no trace: {'; '.join(mistakes)}")
        try:
            revisions, changes = [], []
            for entry in values["revisions"]:
                entry = dict(entry)
                old, new, after, before = (entry.pop(name, None) for name in _TEXT_KEYS)
                revisions.append(
                    Revision(**_read_numbers(entry | {"suffix": tuple(entry["suffix"])}, _REVISION_NUMBERS))
                )
                if None not in (old, new, after, before):
                    changes.append(TextChange(before, old, new, after[len(new) :]))
            values = _read_numbers(values, ("reward_initial", "reward")) | {
                "revisions": revisions,
                "cost": Cost(**values["cost"]),
                "soft_targets": [
                    SoftTargets.from_arrays(*(one[key] for key in _TARGET_KEYS))
                    for one in values.get("soft_targets", ())
                ],
            }
        except (TypeError, KeyError, AttributeError, ValueError) as error:
            raise ValueError(f"this is no trace: {format_error(error)}") from error
        has_texts = initial is not None and len(changes) == len(revisions)
        trace = cls(**values, texts=TraceTexts(initial, tuple(changes)) if has_texts else None)
        trace.validate()
        return trace


_MAX_CONTEXT = 60  # characters before and after a change in `repr`
_MAX_REPR_CHARS = 160
_UNSTORED_FIELDS = ("decoder", "texts")
_TARGET_KEYS = ("ids", "logp")
_TEXT_KEYS = ("old_text", "new_text", "suffix_text", "prefix_text")
_REVISION_NUMBERS = ("reward_before", "reward_after", "cumulative_flops")
STORED_FIELDS = tuple(one.name for one in fields(Trace) if one.name not in _UNSTORED_FIELDS)


def _shorten(text: str) -> str:
    """Return a text on one line, with its middle left out if it is long."""
    text = make_printable(text).replace("\n", "⏎")
    half = _MAX_REPR_CHARS // 2
    return text if len(text) <= _MAX_REPR_CHARS else f"{text[:half]} … {text[-half:]}"


def _to_json(value: Any, infinite_as_none: bool) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return None if infinite_as_none or math.isnan(value) else str(value)
    if isinstance(value, Mapping):
        return {key: _to_json(item, infinite_as_none) for key, item in value.items()}
    return [_to_json(item, infinite_as_none) for item in value] if isinstance(value, list | tuple) else value


def _read_numbers(values: Mapping[str, Any], names: Iterable[str]) -> dict[str, Any]:
    """Return values with the numbers that are not finite as floats again."""
    numbers = {name: values[name] for name in names if name in values}
    return {**values, **{name: math.nan if number is None else float(number) for name, number in numbers.items()}}


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
# Columns that shards of earlier versions lack. They hold empty lists there.
ADDED_COLUMNS = ("soft_targets",)
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
        ("soft_targets", pa.list_(pa.struct([("top_k", pa.int32()), ("ids", pa.binary()), ("logp", pa.binary())]))),
    ],
    metadata={VERSION_KEY: FORMAT_VERSION.encode()},
)
