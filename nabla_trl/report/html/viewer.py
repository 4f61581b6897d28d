"""Traces and rows as the files that the viewer of report.html reads: report_data/*.js, a small index and many pieces.

A page that is opened from the file system may load scripts but no data, so each file is a script that hands one value
to the function `nablaData`. The index lists everything that can be picked; what a problem came through lies in the
pieces, of about `PIECE` characters each, which are loaded once they are looked at. Texts are JSON with every `<`
escaped: none of them can end a script.
"""

from __future__ import annotations

import json
import math
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from nabla_trl.evaluation.method import get_main_search, list_methods
from nabla_trl.evaluation.rows import Row
from nabla_trl.grading.equivalence import MatchResult, match_without_worker, normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.report.summary import Summary
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import read_traces

DATA_FOLDER = "report_data"
CHUNK_CHARS = 400_000
MAX_TRACES = 5_000
PREDICTED_GAIN_LEVELS = 100
_MAX_SNIPPET_CHARS = 90  # characters of a question in the list
_UNGRADED_RESULTS = (MatchResult.NO_GOLD, MatchResult.BAD_GOLD)


@dataclass(frozen=True)
class TokenTable:
    """Texts of tokens by id, as `nabla_trl.search.generate_traces.write_tokens` leaves them beside traces; empty: none are there."""

    tokenizer_hash: str = ""
    special_ids: frozenset[int] = frozenset()
    texts: tuple[str, ...] = ()

    @classmethod
    def read(cls, folder: Path) -> TokenTable:
        """The table of a folder of traces; an empty one if there is none.

        Raises:
            ValueError: it is damaged.
        """
        path = folder / "tokens.json"
        if not path.exists():
            return cls()
        try:
            table = json.loads(path.read_text(encoding="utf-8"))
            return cls(table["tokenizer"], frozenset(table["special"]), tuple(table["tokens"]))
        except (ValueError, KeyError, TypeError) as error:
            raise ValueError(f"{path} is no table of tokens ({error}): delete it, and make traces again") from error

    def matches(self, trace: Trace) -> bool:
        """Whether they are those of the trace's tokenizer."""
        return bool(self.texts) and trace.meta.get("tokenizer_hash", self.tokenizer_hash) == self.tokenizer_hash

    def decode(self, ids: Iterable[int]) -> str:
        """Special tokens left out, and ids that have no text."""
        shown = (one for one in ids if one not in self.special_ids and 0 <= one < len(self.texts))
        return "".join(self.texts[one] for one in shown)


@dataclass
class ChunkWriter:
    """Writes values to files <name>-0000.js, <name>-0001.js, … of about `PIECE` characters."""

    folder: Path
    name: str
    num_files: int = 0
    _chunk: list[str] = field(default_factory=list)
    _chunk_chars: int = 0

    def add(self, value: Any) -> tuple[int, int]:
        """Take a value; returns the number of its file and its place there."""
        text = to_script_json(value)
        self._chunk.append(text)
        self._chunk_chars += len(text)
        place = self.num_files, len(self._chunk) - 1
        if self._chunk_chars > CHUNK_CHARS:
            self.flush()
        return place

    def flush(self) -> None:
        if self._chunk:
            _write_script(self.folder, f"{self.name}-{self.num_files:04d}", f"[{','.join(self._chunk)}]")
            self.num_files, self._chunk, self._chunk_chars = self.num_files + 1, [], 0


def to_script_json(value: Any) -> str:
    """Compact JSON that may stand in a script; numbers that are not finite become null.

    Raises:
        ValueError: a number that is not finite where the caller has not replaced it.
    """
    return json.dumps(value, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")


def write_viewer_data(
    folder: Path,
    traces: Iterable[Trace],
    eval_traces: Iterable[Trace],
    token_table: TokenTable,
    rows: Sequence[Row],
    facts: Mapping,
    summary: Summary,
) -> dict[str, int]:
    """Write `folder`/report_data anew; returns how many traces and held-out problems the viewer shows.

    Args:
        traces, held_out: of training and of held-out problems; read as written, at most `MOST_TRACES` of each.
    """
    draft, final = folder / f"{DATA_FOLDER}.tmp", folder / DATA_FOLDER
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    listed, used = _write_traces(draft, traces, token_table)
    places, more = _write_eval_traces(draft, eval_traces, token_table, _get_compared_methods(summary)[1])
    used |= more
    compared = _write_rows(draft, rows, facts, summary, places)
    texts = {str(one): token_table.texts[one] for one in sorted(used) if one < len(token_table.texts)}
    _write_script(draft, "tokens", to_script_json({"special": sorted(token_table.special_ids & used), "texts": texts}))
    _write_script(draft, "index", to_script_json({"traces": listed, "rows": compared}))
    shutil.rmtree(final, ignore_errors=True)
    draft.replace(final)
    return {"traces": len(listed), "rows": len(compared["items"])}


def iterate_traces(folder: Path) -> Iterator[Trace]:
    """The traces of a folder, shard by shard, so that they need not be in memory together.

    Raises:
        ValueError: as `read_traces`.
    """
    for shard in sorted(folder.glob("traces-*.parquet")):
        yield from read_traces(shard)


def _write_script(folder: Path, name: str, value: str) -> None:
    (folder / f"{name}.js").write_text(f'nablaData("{name}",{value})\n', encoding="utf-8")


# --- traces -------------------------------------------------------------------------------------------


def _write_traces(folder: Path, traces: Iterable[Trace], token_table: TokenTable) -> tuple[list[list], set[int]]:
    """The index of traces, and the ids that occur in those whose tokens have texts."""
    listed: list[list] = []
    pieces, used = ChunkWriter(folder, "traces"), set[int]()
    for trace in traces:
        if len(listed) == MAX_TRACES:
            break
        first = _grade_first_response(trace, token_table)
        place = pieces.add(_encode_trace(trace, first, token_table.matches(trace)))
        gain = _round_finite(trace.reward - trace.reward_initial)
        accepted = sum(revision.accepted for revision in trace.revisions)
        verdicts = _encode_correct(first[1]), _encode_correct(None if trace.error else trace.correct)
        name, question = f"{trace.problem_id} · seed {trace.seed}", _make_snippet(trace.prompt)
        listed.append([name, question, *verdicts, gain, len(trace.revisions), accepted, bool(trace.error), *place])
        used |= _collect_token_ids(trace, token_table)
    pieces.flush()
    return listed, used


def _write_eval_traces(
    folder: Path, traces: Iterable[Trace], token_table: TokenTable, method: str
) -> tuple[dict[tuple[str, int], tuple[int, int]], set[int]]:
    """Where the method's trace of each problem and seed lies, and the ids that occur in them."""
    pieces, used = ChunkWriter(folder, "held"), set[int]()
    places: dict[tuple[str, int], tuple[int, int]] = {}
    for trace in traces:
        if trace.method != method or (trace.problem_id, trace.seed) in places:
            continue
        if len(places) == MAX_TRACES:
            break
        places[trace.problem_id, trace.seed] = pieces.add(
            _encode_trace(trace, _grade_first_response(trace, token_table), token_table.matches(trace))
        )
        used |= _collect_token_ids(trace, token_table)
    pieces.flush()
    return places, used


def _collect_token_ids(trace: Trace, token_table: TokenTable) -> set[int]:
    """The ids in a trace, where they have texts."""
    if not token_table.matches(trace):
        return set()
    return set(trace.initial_ids).union(*(revision.suffix for revision in trace.revisions))


def _encode_trace(trace: Trace, first_result: tuple[str | None, bool | None], has_token_texts: bool) -> dict[str, Any]:
    revisions = [
        [one.round, one.position, one.suffix, _round_finite(one.reward_before), _round_finite(one.reward_after), one.accepted,
         one.cumulative_flops]
        for one in trace.revisions
    ]  # fmt: skip
    return {
        "id": trace.problem_id,
        "seed": trace.seed,
        "method": trace.method,
        "prompt": trace.prompt,
        "response": trace.response,
        "initial": trace.initial_ids,
        "rewards": [_round_finite(trace.reward_initial), _round_finite(trace.reward)],
        "answers": [first_result[0], trace.answer],
        "verdicts": [_encode_correct(first_result[1]), _encode_correct(trace.correct)],
        "gold": trace.gold,
        "revisions": revisions,
        "pull": _quantize_predicted_gain(trace.predicted_gain),
        "flops": trace.cost.flops,
        "seconds": trace.cost.seconds,
        "stop": trace.stop_reason,
        "finished": trace.finished,
        "error": trace.error,
        "texts": has_token_texts,
    }


def _quantize_predicted_gain(predicted_gain: Sequence[Sequence[float]]) -> dict[str, Any]:
    """The pull of each incumbent in whole steps of a `PULL_STEPS`-th of the largest, `top`."""
    arrays = [np.nan_to_num(np.asarray(own, dtype=np.float64), posinf=0.0) for own in predicted_gain]
    top = max((float(one.max()) for one in arrays if one.size), default=0.0)
    return {
        "top": top,
        "steps": [np.rint(one * (PREDICTED_GAIN_LEVELS / (top or 1.0))).astype(int).tolist() for one in arrays],
    }


def _grade_first_response(trace: Trace, token_table: TokenTable) -> tuple[str | None, bool | None]:
    """The first response's answer and whether it is right; None where that is not known without a checker."""
    if trace.initial_ids == trace.response_ids:
        return trace.answer, trace.correct
    if not token_table.matches(trace):
        return None, None
    answer = extract_answer(token_table.decode(trace.initial_ids))
    verdict = match_without_worker(answer, trace.grading_reference)
    if isinstance(verdict, MatchResult):
        return answer, None if verdict in _UNGRADED_RESULTS else verdict.is_correct
    same = answer is not None and trace.answer is not None
    return answer, trace.correct if same and normalize_answer(answer) == normalize_answer(trace.answer) else None


# --- held-out problems ----------------------------------------------------------------------------------


def _get_compared_methods(summary: Summary) -> tuple[str, str]:
    """What is compared: the base policy's greedy decode (else the first method) and the search (else the last)."""
    names = list_methods(summary)
    if not names:
        return "", ""
    return ("greedy" if "greedy" in names else names[0]), get_main_search(names) or names[-1]


def _write_rows(
    folder: Path,
    rows: Sequence[Row],
    facts: Mapping,
    summary: Summary,
    trace_locations: Mapping[tuple[str, int], tuple[int, int]],
) -> dict[str, Any]:
    """The index of held-out problems; `places`: of the traces of `ours`, by problem and seed."""
    names, (base, ours) = list_methods(summary), _get_compared_methods(summary)
    pieces, items = ChunkWriter(folder, "rows"), []
    by_problem: dict[str, list[Row]] = {}
    order = {name: number for number, name in enumerate(names)}
    for row in rows:
        if row.method in order:  # samples that nothing was chosen from are no answer
            by_problem.setdefault(row.problem, []).append(row)
    for problem, own in by_problem.items():
        known = (facts.get("problems") or {}).get(problem) or {"question": "", "level": None}
        own = sorted(own, key=lambda row: (order[row.method], row.seed))
        place = pieces.add(_encode_problem(problem, known, own))
        mine = {row.seed: row for row in own if row.method == ours}
        others = {row.seed: row for row in own if row.method == base}
        for seed, row in mine.items():
            other = others.get(seed) or next(iter(others.values()))  # a deterministic method has one seed
            verdicts = [_encode_correct(None if one.error else one.correct) for one in (other, row)]
            gain = None if row.reward is None or other.reward is None else _round_finite(row.reward - other.reward)
            name, error = f"{problem} · seed {seed}", bool(row.error)
            counts = row.revisions, row.accepted
            traced = trace_locations.get((problem, seed), (None, None))
            items.append([name, _make_snippet(known["question"]), *verdicts, gain, *counts, error, *place, *traced])
    pieces.flush()
    return {"base": base, "ours": ours, "items": items}


def _encode_problem(problem: str, problem_facts: Mapping, rows: Sequence[Row]) -> dict[str, Any]:
    return {
        "id": problem,
        "question": problem_facts["question"],
        "level": problem_facts["level"],
        "gold": rows[0].gold,
        "rows": [
            {
                "method": row.method,
                "seed": row.seed,
                "correct": _encode_correct(None if row.error else row.correct),
                "answer": row.answer,
                "reward": _round_finite(row.reward),
                "flops": row.flops,
                "seconds": row.seconds,
                "proposals": row.revisions,
                "accepted": row.accepted,
                "rounds": [_round_finite(one) for one in row.reward_by_round],
                "error": row.error,
            }
            for row in rows
        ],
    }


def _make_snippet(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_SNIPPET_CHARS else f"{text[:_MAX_SNIPPET_CHARS]}…"


def _encode_correct(correct: float | None) -> int | None:
    return None if correct is None else int(correct)


def _round_finite(value: float | None) -> float | None:
    return float(f"{value:.6g}") if value is not None and math.isfinite(value) else None
