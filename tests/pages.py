"""A small made-up run for the tests of report.html: rows, facts, traces and their tokens, some of them hostile."""

from __future__ import annotations

import json
import random
from dataclasses import replace
from pathlib import Path

from nabla_trl.evaluation.method import Method
from nabla_trl.evaluation.rows import Row
from nabla_trl.models.flops import Cost
from nabla_trl.report.summary import Summary
from nabla_trl.report.text import write_report_files
from nabla_trl.traces.schema import Revision, Trace
from nabla_trl.traces.storage import EVAL_TRACES_DIR, TraceWriter

HOSTILE = "</script><script>window.broken = 1</script><img src=x onerror='window.broken = 2'> & \u2028 🙂 \x00"
TOKENS = [*"0123456789+-*=;,#", " the", "\n", "</script>", "<|end|>"]
END = TOKENS.index("<|end|>")
PROBLEMS = 24
# method -> problems it solves of the first so many, mean reward, FLOPs
WORLD = {
    "greedy": (10, -1.0, 4e6),
    "best_of_1": (10, -1.2, 4e6),
    "best_of_4": (15, 0.5, 24e6),
    "best_of_16": (18, 1.5, 96e6),
    "control@0.33": (13, 0.2, 31e6),
    "nabla@0.33": (19, 1.2, 31e6),
    "control": (15, 0.9, 61e6),
    "nabla": (21, 2.0, 61e6),
    "sft_greedy": (20, 1.0, 4e6),
    "sft_best_of_4": (21, 1.8, 24e6),
}
SAMPLES = {"best_of_1": 8, "sft_greedy": 4}  # methods beside which samples are made up, and how many
FACTS = {
    "title": f"Chains {HOSTILE}",
    "command": f"distill.py --title '{HOSTILE}'",
    "policy": "tiny-policy",
    "reward": "tiny-reward",
    "task": "digit_chains",
    "reward_kind": "scalar",
    "hardware": "Linux x86_64, 2 CPU cores, no GPU",
    "revisions": {"tiny-policy": "0123abcd"},
    "versions": {"torch": "2.13"},
    "seeds": [0],
    "problems": {f"p{n}": {"question": f"{n}+1 {HOSTILE}", "level": str(9 + n % 2)} for n in range(PROBLEMS)},
    "trained": [
        {"label": "sft", "method": "sft", "beta": 1.0, "tuning": "lora", "train_flops": 9.2e9, "train_seconds": 61.5}
    ],
    "audit": {"conclusion": "Sound.", "auc": 0.97, "best_of_n_accuracy": {2: {"value": 0.5, "low": 0.4, "high": 0.6}}},
    "show_targets": True,
    "notes": [HOSTILE],
}


def make_rows() -> list[Row]:
    rows = []
    for method, (solved, reward, flops) in WORLD.items():
        for number in range(PROBLEMS):
            search = method.startswith(("nabla", "control"))
            # greedy alone solves the last problem: there the base is right and the search is not
            right = number < solved or (number == PROBLEMS - 1 and method == "greedy")
            rows.append(
                Row(
                    method=method,
                    task="digit_chains",
                    problem=f"p{number}",
                    seed=0,
                    correct=right,
                    answer="7" if right else HOSTILE,
                    gold="7",
                    reward=reward + number % 3,
                    kl={"best_of_1": 0.0, "best_of_4": 0.64, "sft_best_of_4": 1.4}.get(method),
                    flops=flops,
                    seconds=flops / 1e9,
                    tokens={"policy/prefill": 9, "policy/decode": round(flops / 1e6), "reward/forward": 99},
                    revisions=3 * search,
                    accepted=int(search),
                    reward_by_round=[reward - 1, reward, reward + number % 3] if search else [reward],
                )
            )
    return rows + [sampled(row, size) for row in rows if (size := SAMPLES.get(row.method))]


def sampled(row: Row, size: int) -> Row:
    """As many samples as that in place of a row's own answer: one more wrong for every third problem."""
    wrong = int(row.problem[1:]) % 3
    samples = [["7", True] if row.correct and place >= wrong else [HOSTILE, False] for place in range(size)]
    method = Method("samples", n=size, policy=Method.parse(row.method).policy)
    return replace(row, method=str(method), answer=None, samples=samples, reward_by_round=[])


def encode(text: str) -> list[int]:
    """Characters as ids, then the end."""
    return [*(TOKENS.index(one) for one in text), END]


def make_trace(number: int, *, before: str = "3", after: str = "7") -> Trace:
    """`1+2=<before>;#<before>` to `1+2=<after>;#<after>`, in the second of three proposals."""
    first, wrong, last = (encode(f"1+2={one};#{one}") for one in (before, "5", after))
    first[-1:-1] = [TOKENS.index("</script>")]
    proposals = [(0, 4, wrong, -2.0, False), (1, 4, last, 1.0, True), (2, 6, last[:6] + wrong[6:], -3.0, False)]
    base, revisions = first, []
    for round_, position, ids, reward, accepted in proposals:
        at = -1.0 if base is first else 1.0
        suffix = tuple(ids[position:])
        revisions.append(Revision(round_, position, base[position], suffix[0], suffix, at, reward, accepted, 1e6))
        base = ids if accepted else base
    return Trace(
        problem_id=f"train/{number}",
        task="digit_chains",
        method="nabla",
        seed=0,
        prompt=f"1+2 {HOSTILE}",
        response="".join(TOKENS[one] for one in last[:-1]),
        prompt_ids=[1],
        initial_ids=first,
        response_ids=last,
        reward_initial=-1.0,
        reward=1.0,
        answer=after,
        gold="7",
        correct=after == "7",
        revisions=revisions,
        cost=Cost(3e6, 0.5, {"policy/decode": 30}),
        stop_reason="max_rounds",
        finished=True,
        meta={"tokenizer_hash": "ab12"},
        predicted_gain=[[0.0] * 4 + [8.0] + [1.0] * (len(first) - 5), [0.5] * len(last)],
    )


def make_traces() -> list[Trace]:
    """Three that were mended, one that was broken, one that was right all along."""
    mended = [make_trace(number) for number in range(3)]
    return [*mended, make_trace(3, before="7", after="2"), make_trace(4, before="7")]


def make_held_out() -> list[Trace]:
    """Of the search on the first two held-out problems, and one of another method, which nothing shows."""
    found = [replace(make_trace(number), problem_id=f"p{number}") for number in (0, 1, 2)]
    return [*found[:2], replace(found[2], method="control")]


def long_traces(count: int, length: int) -> list[Trace]:
    """Traces of so many tokens with three proposals; they share their lists, as only what is written counts."""
    draw = random.Random(0)
    ids = [draw.randrange(10**5) for _ in range(length)]
    revisions = []
    for round_, position in enumerate((length // 4, length // 2, 3 * length // 4)):
        suffix = (7, *ids[position + 1 :])
        revisions.append(Revision(round_, position, ids[position], 7, suffix, 0.0, -1.0, False, 1e6))
    plain = make_trace(0)
    fields = vars(plain) | {
        "initial_ids": ids,
        "response_ids": ids,
        "revisions": revisions,
        "predicted_gain": [[0.25] * length],
    }
    return [Trace(**(fields | {"problem_id": f"train/{number}"})) for number in range(count)]


def write_tokens(folder: Path, tokenizer: str = "ab12") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    table = {"tokenizer": tokenizer, "special": [END], "tokens": TOKENS}
    (folder / "tokens.json").write_text(json.dumps(table), encoding="utf-8")


def write_run(folder: Path) -> Summary:
    """Traces with their tokens, and the report of the rows."""
    write_tokens(folder / "traces")
    for name, traces in (("traces", make_traces()), (EVAL_TRACES_DIR, make_held_out())):
        with TraceWriter(folder / name) as writer:
            for trace in traces:
                writer.add(trace)
    return write_report_files(folder, make_rows(), FACTS)
