"""Traces and rows as the files that the viewer of report.html reads: report_data/*.js, an index and many chunks.

A page that is opened from the file system may load scripts but no data. So each file is a script that passes one value
to the function `nablaData`. The index lists everything that can be selected. The details are in chunks of about
`CHUNK_CHARS` characters, which the page loads when they are needed. Texts are JSON with every `<` escaped, so that no
text can end a script.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np

from nabla_trl.evaluation.method import get_main_search, list_methods
from nabla_trl.evaluation.rows import Row
from nabla_trl.grading.equivalence import MatchResult, match_without_worker, normalize_answer
from nabla_trl.grading.extraction import extract_answer, has_open_think_block
from nabla_trl.grading.notation import THINK_OPENING
from nabla_trl.report.summary import Summary
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import read_traces
from nabla_trl.traces.texts import TokenTable
from nabla_trl.utils.formatting import finite_or_none

DATA_FOLDER = "report_data"
CHUNK_CHARS = 400_000
MAX_TRACES = 5_000
PREDICTED_GAIN_LEVELS = 100
_MAX_OPENING_CHARS = 40  # at the end of a prompt, in which a tag may open a thought
_MAX_SNIPPET_CHARS = 90  # characters of a question in the list
_UNGRADED_RESULTS = (MatchResult.NO_GOLD, MatchResult.BAD_GOLD)

Location = tuple[int, int]  # number of a chunk, and the index of a value in it


@dataclass
class ChunkWriter:
    """Writes values to files <name>-0000.js, <name>-0001.js, … of about `CHUNK_CHARS` characters."""

    folder: Path
    name: str
    num_files: int = 0
    _chunk: list[str] = field(default_factory=list)
    _chunk_chars: int = 0

    def add(self, value: Any) -> Location:
        text = to_script_json(value)
        self._chunk.append(text)
        self._chunk_chars += len(text)
        location = self.num_files, len(self._chunk) - 1
        if self._chunk_chars > CHUNK_CHARS:
            self.flush()
        return location

    def flush(self) -> None:
        if self._chunk:
            _write_script(self.folder, f"{self.name}-{self.num_files:04d}", f"[{','.join(self._chunk)}]")
            self.num_files, self._chunk, self._chunk_chars = self.num_files + 1, [], 0


def to_script_json(value: Any) -> str:
    """Return compact JSON that is safe inside a script.

    Raises:
        ValueError: A number is not finite.
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
    """Write `folder`/report_data anew. Returns the numbers of traces and of held-out problems that the viewer shows.

    Args:
        traces: Traces of training problems. They are read one by one, and at most `MAX_TRACES` of them.
        eval_traces: Traces of held-out problems, read in the same way.
    """
    draft, final = folder / f"{DATA_FOLDER}.tmp", folder / DATA_FOLDER
    shutil.rmtree(draft, ignore_errors=True)
    draft.mkdir(parents=True)
    used_ids: set[int] = set()
    trace_items = _write_traces(draft, traces, token_table, used_ids)
    locations = _write_eval_traces(draft, eval_traces, token_table, used_ids, _get_compared_methods(summary)[1])
    problems = _write_problems(draft, rows, facts, summary, locations)
    texts = {str(token): token_table.texts[token] for token in sorted(used_ids) if token < len(token_table.texts)}
    tokens = {"special_ids": sorted(token_table.special_ids & used_ids), "texts": texts}
    _write_script(draft, "tokens", to_script_json(tokens))
    _write_script(draft, "index", to_script_json({"traces": trace_items, "rows": problems}))
    shutil.rmtree(final, ignore_errors=True)
    draft.replace(final)
    return {"traces": len(trace_items), "rows": len(problems["items"])}


def iterate_traces(folder: Path) -> Iterator[Trace]:
    """Iterate over the traces of a folder, shard by shard, so that memory holds one shard at a time.

    Raises:
        ValueError: As `read_traces`.
    """
    for shard in sorted(folder.glob("traces-*.parquet")):
        yield from read_traces(shard)


def _write_script(folder: Path, name: str, value: str) -> None:
    (folder / f"{name}.js").write_text(f'nablaData("{name}",{value})\n', encoding="utf-8")


# --- traces -------------------------------------------------------------------------------------------


def _write_traces(
    folder: Path, traces: Iterable[Trace], token_table: TokenTable, used_ids: set[int]
) -> list[dict[str, Any]]:
    """Write traces and return their items of the index."""
    items: list[dict[str, Any]] = []
    chunks = ChunkWriter(folder, "traces")
    for trace in islice(traces, MAX_TRACES):
        encoded = _encode_trace(trace, token_table, used_ids)
        first, last = encoded["correct"]
        items.append(
            {
                "name": f"{trace.problem_id} · seed {trace.seed}",
                "question": _make_snippet(trace.prompt),
                "correct": [first, None if trace.error else last],
                "gain": _round_finite(trace.reward - trace.reward_initial),
                "proposals": len(trace.revisions),
                "error": bool(trace.error),
                "chunk": chunks.add(encoded),
            }
        )
    chunks.flush()
    return items


def _write_eval_traces(
    folder: Path, traces: Iterable[Trace], token_table: TokenTable, used_ids: set[int], method: str
) -> dict[tuple[str, int], Location]:
    """Write the method's traces and return where the trace of each problem and seed is."""
    locations: dict[tuple[str, int], Location] = {}
    chunks = ChunkWriter(folder, "eval_traces")
    for trace in traces:
        if len(locations) == MAX_TRACES:
            break
        key = trace.problem_id, trace.seed
        if trace.method == method and key not in locations:
            locations[key] = chunks.add(_encode_trace(trace, token_table, used_ids))
    chunks.flush()
    return locations


def _encode_trace(trace: Trace, token_table: TokenTable, used_ids: set[int]) -> dict[str, Any]:
    """Return what the viewer shows of a trace, and add the ids that need texts to `used_ids`."""
    has_token_texts = token_table.matches(trace)
    if has_token_texts:
        used_ids.update(trace.initial_ids, *(revision.suffix for revision in trace.revisions))
    first_answer, first_correct = _grade_first_response(trace, token_table)
    revisions = [
        [r.round, r.position, r.suffix, _round_finite(r.reward_before), _round_finite(r.reward_after), r.accepted,
         r.cumulative_flops]
        for r in trace.revisions
    ]  # fmt: skip
    return {
        "id": trace.problem_id,
        "seed": trace.seed,
        "method": trace.method,
        "prompt": trace.prompt,
        "response": trace.response,
        "initial_ids": trace.initial_ids,
        "rewards": [_round_finite(trace.reward_initial), _round_finite(trace.reward)],
        "answers": [first_answer, trace.answer],
        "correct": [_encode_correct(first_correct), _encode_correct(trace.correct)],
        "gold": trace.gold,
        "revisions": revisions,
        "predicted_gain": _quantize_predicted_gain(trace.predicted_gain),
        "flops": trace.cost.flops,
        "seconds": trace.cost.seconds,
        "stop_reason": trace.stop_reason,
        "finished": trace.finished,
        "error": trace.error,
        "has_token_texts": has_token_texts,
    }


def _quantize_predicted_gain(predicted_gain: Sequence[Sequence[float]]) -> dict[str, Any]:
    """Return the predicted gain of each incumbent in integer levels, `levels_per_max` of which are the largest one."""
    gains = [np.nan_to_num(np.asarray(gain, dtype=np.float64), posinf=0.0) for gain in predicted_gain]
    largest = max((float(gain.max()) for gain in gains if gain.size), default=0.0)
    levels = [np.rint(gain * (PREDICTED_GAIN_LEVELS / (largest or 1.0))).astype(int).tolist() for gain in gains]
    return {"max": largest, "levels_per_max": PREDICTED_GAIN_LEVELS, "levels": levels}


def _grade_first_response(trace: Trace, token_table: TokenTable) -> tuple[str | None, bool | None]:
    """Return the first response's answer and whether it is correct, None where a checker would be needed."""
    if trace.initial_ids == trace.response_ids:
        return trace.answer, trace.correct
    if not token_table.matches(trace):
        return None, None
    # The end of a prompt may begin a thought, as it does for the final response.
    opening = THINK_OPENING if has_open_think_block(trace.prompt[-_MAX_OPENING_CHARS:]) else ""
    answer = extract_answer(opening + token_table.decode(trace.initial_ids))
    result = match_without_worker(answer, trace.grading_reference)
    if isinstance(result, MatchResult):
        return answer, None if result in _UNGRADED_RESULTS else result.is_correct
    if answer is None or trace.answer is None or normalize_answer(answer) != normalize_answer(trace.answer):
        return answer, None
    return answer, trace.correct


# --- held-out problems ----------------------------------------------------------------------------------


def _get_compared_methods(summary: Summary) -> tuple[str, str]:
    """Return base greedy (else the first method) and the main search (else the last method)."""
    names = list_methods(summary)
    if not names:
        return "", ""
    return ("greedy" if "greedy" in names else names[0]), get_main_search(names) or names[-1]


def _write_problems(
    folder: Path,
    rows: Sequence[Row],
    facts: Mapping,
    summary: Summary,
    trace_locations: Mapping[tuple[str, int], Location],
) -> dict[str, Any]:
    """Write held-out problems with the rows of all methods, and return their index."""
    order = {name: number for number, name in enumerate(list_methods(summary))}
    base, search = _get_compared_methods(summary)
    chunks, items = ChunkWriter(folder, "rows"), []
    rows_by_problem: dict[str, list[Row]] = {}
    for row in rows:
        if row.method in order:  # rows of samples_N have no answer
            rows_by_problem.setdefault(row.problem, []).append(row)
    for problem, problem_rows in rows_by_problem.items():
        problem_rows.sort(key=lambda row: (order[row.method], row.seed))
        problem_facts = (facts.get("problems") or {}).get(problem) or {"question": "", "level": None}
        question, level, gold = problem_facts["question"], problem_facts["level"], problem_rows[0].gold
        encoded = {"id": problem, "question": question, "level": level, "gold": gold}
        location = chunks.add(encoded | {"rows": [_encode_row(row) for row in problem_rows]})
        base_rows = {row.seed: row for row in problem_rows if row.method == base}
        for row in problem_rows:
            if row.method != search:
                continue
            other = base_rows.get(row.seed) or next(iter(base_rows.values()))  # a deterministic method has one seed
            gain = None if row.reward is None or other.reward is None else _round_finite(row.reward - other.reward)
            items.append(
                {
                    "name": f"{problem} · seed {row.seed}",
                    "question": _make_snippet(question),
                    "correct": [_encode_row(other)["correct"], _encode_row(row)["correct"]],
                    "gain": gain,
                    "proposals": row.revisions,
                    "error": bool(row.error),
                    "chunk": location,
                    "trace": trace_locations.get((problem, row.seed)),
                }
            )
    chunks.flush()
    return {"base": base, "search": search, "items": items}


def _encode_row(row: Row) -> dict[str, Any]:
    return {
        "method": row.method,
        "seed": row.seed,
        "correct": _encode_correct(None if row.error else row.correct),
        "answer": row.answer,
        "reward": _round_finite(row.reward),
        "flops": finite_or_none(row.flops),
        "seconds": finite_or_none(row.seconds),
        "revisions": row.revisions,
        "accepted": row.accepted,
        "reward_by_round": [_round_finite(reward) for reward in row.reward_by_round],
        "error": row.error,
    }


def _make_snippet(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= _MAX_SNIPPET_CHARS else f"{text[:_MAX_SNIPPET_CHARS]}…"


def _encode_correct(correct: float | None) -> int | None:
    return None if correct is None else int(correct)


def _round_finite(value: float | None) -> float | None:
    finite = finite_or_none(value)
    return None if finite is None else float(f"{finite:.6g}")
