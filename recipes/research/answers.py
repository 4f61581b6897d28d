r"""How our verdicts compare with math-verify's own, and how fast plain numbers are compared.

    python recipes/research/answers.py --data FOLDER --show 5      # FOLDER: JSONL files with an "answer" on each line
    python recipes/research/answers.py --speed 500000

Of every gold answer responses are written the ways that models write them, right and wrong; each is read and judged
twice: by `extract_answer` and the checker, and by math-verify with its defaults on the whole response,
`verify(parse("$gold$"), parse(response))`. Nothing of the data is stored.
"""

from __future__ import annotations

import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nabla_trl.cli.parsing import parse_dataclasses, run_main
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult, match_answers, match_without_worker, normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.tasks.registry import load_problems


@dataclass
class AnswersArguments:
    data_dir: str | None = field(
        default=None, metadata={"help": "folder of JSONL files of problems with gold answers"}
    )
    max_problems: int = field(default=250, metadata={"help": "problems of each file"})
    max_shown_disagreements: int = field(default=0, metadata={"help": "show so many disagreements of each kind"})
    num_comparisons: int = field(default=0, metadata={"help": "time so many comparisons of plain numbers"})
    seed: int = field(default=0, metadata={"help": "seed of the numbers"})
    num_workers: int = field(default=2, metadata={"help": "processes that run math-verify for the checker"})


# Where we differ from math-verify and mean to; `answers.py` and its tests hold the rules.
INTENDED_DIFFERENCES = {
    "corrected at once": "the last box is the answer, even if only a comma parts it from one that is taken back",
    "boxed full stop": "a full stop in the box belongs to the sentence",
    "boxed units": "a number with a word behind it is a number with its unit, not a product of letters",
    "cut off": "an answer that was cut off is none, and no number is picked out of what came before it",
}


# --- what a model writes of a gold answer ---------------------------------------------------------

_REASONING_TEXT = "We set up the equation with 3 unknowns and 12 cases.\nStep 1: $a = 4$, so $b = 7$.\n"


def write_responses(gold: str) -> Iterator[tuple[str, str]]:
    """(kind, response) pairs: the same answer in many writings, then others."""
    for kind, written in write_answer_variants(gold):
        yield f"boxed {kind}", f"{_REASONING_TEXT}Therefore, the answer is $\\boxed{{{written}}}$."
    yield "display", f"{_REASONING_TEXT}Hence\n\\[\n\\boxed{{{gold}}}\n\\]"
    yield "bare box", f"{_REASONING_TEXT}**Final Answer**\n\\boxed{{{gold}}}"
    yield (
        "corrected box",
        f"{_REASONING_TEXT}First I found $\\boxed{{123456}}$.\nWrong. The answer is $\\boxed{{{gold}}}$.",
    )
    yield "corrected at once", f"{_REASONING_TEXT}First \\boxed{{123456}}, no: the answer is \\boxed{{{gold}}}."
    yield "two boxes", f"{_REASONING_TEXT}Thus $\\boxed{{{gold}}}$ or $\\boxed{{123456}}$."
    if len(parts := _split_list_answer(gold)) > 1:
        boxes = " and ".join(f"$\\boxed{{{part}}}$" for part in parts)
        yield "a box for each part", f"{_REASONING_TEXT}The solutions are {boxes}."
    yield "thinking", f"<think>Perhaps \\boxed{{123456}}?</think>The answer is $\\boxed{{{gold}}}$."
    yield "final answer", f"{_REASONING_TEXT}Final Answer: The final answer is ${gold}$. I hope it is correct."
    yield "sentence", f"{_REASONING_TEXT}So the answer is ${gold}$."
    yield "parentheses", f"{_REASONING_TEXT}So the answer is \\({gold}\\)."
    if _is_number(gold):
        yield "hashes", f"{_REASONING_TEXT}4 + 7 = 11\n#### {gold}"
        yield "plain number", f"{_REASONING_TEXT}The answer is {gold}."
        yield "bold", f"{_REASONING_TEXT}**Answer: {gold}**"
        yield "dollars", f"{_REASONING_TEXT}She pays \\${gold} in all. The answer is ${gold}."
    yield "no answer", "I cannot solve this problem, sorry."
    yield "cut off", f"{_REASONING_TEXT}So the answer is $\\boxed{{\\frac{{1"


def write_answer_variants(gold: str) -> Iterator[tuple[str, str]]:
    """(kind, writing): the gold answer as other hands write it, and answers that are not it."""
    yield "as it is", gold
    yield "spaced", re.sub(r"([,=+])", r"\1 ", f" {gold} ")
    yield "text", rf"\text{{{gold}}}"
    yield "equation", f"x = {gold}"
    yield "full stop", f"{gold}."
    yield "degrees", rf"{gold}^\circ"
    if len(parts := _split_list_answer(gold)) > 1:
        yield "and", f"{', '.join(parts[:-1])} \\text{{ and }} {parts[-1]}"
        yield "or", f"{', '.join(parts[:-1])} or {parts[-1]}"
        yield "set", rf"\{{{gold}\}}"
        yield "other order", ", ".join(reversed(parts))
        yield "one part", parts[0]
    yield from _write_number_variants(gold) if _is_number(gold) else _write_formula_variants(gold)


def _write_formula_variants(gold: str) -> Iterator[tuple[str, str]]:
    yield "in parentheses", f"({gold})"
    yield "times", gold.replace(r"\cdot", r"\times")
    yield "plus infinity", gold.replace(r"\infty", r"+\infty").replace("-+", "-")
    yield "big", gold.replace("(", r"\big(").replace(")", r"\big)").replace(r"\left\big", r"\left")
    yield "thin spaces", gold.replace(",", r",\,")
    yield "newline", gold.replace(" ", "\n")
    yield "plus one", f"{gold} + 1"
    yield "negative", f"-{gold}" if not gold.startswith("-") else gold[1:]
    if "frac" in gold:
        yield "dfrac", gold.replace(r"\frac", r"\dfrac").replace(r"\d\d", r"\d")
        yield "slash", re.sub(r"\\d?frac\{([^{}]+)\}\{([^{}]+)\}", r"(\1)/(\2)", gold)
    if fraction := re.fullmatch(r"(-?)\\d?frac\{(\d+)\}\{(\d+)\}", gold):
        yield from _write_fraction_variants(fraction[1], int(fraction[2]), int(fraction[3]))
    if r"\left" in gold:
        yield "without left", gold.replace(r"\left", "").replace(r"\right", "")
    elif gold[:1] in "([" and gold[-1:] in ")]":
        yield "with left", rf"\left{gold[:-1]}\right{gold[-1]}"
        yield "reversed", f"{gold[0]}{','.join(reversed(gold[1:-1].split(',')))}{gold[-1]}"
        yield "other brackets", gold.translate(str.maketrans("()[]", "[]()"))


def _write_fraction_variants(sign: str, numerator: int, denominator: int) -> Iterator[tuple[str, str]]:
    yield "decimals", f"{sign}{numerator / denominator}"
    yield "three decimals", f"{sign}{numerator / denominator:.3f}"
    yield "expanded", rf"{sign}\frac{{{2 * numerator}}}{{{2 * denominator}}}"
    yield "bare frac", rf"{sign}\frac{numerator}{denominator}"
    yield "upside down", rf"{sign}\frac{{{denominator}}}{{{numerator}}}"


def _write_number_variants(gold: str) -> Iterator[tuple[str, str]]:
    value = gold.replace(",", "")
    yield "units in text", rf"{gold}\text{{ cm}}"
    yield "units", f"{gold} dollars"
    yield "square units", rf"{gold}\ \text{{cm}}^2"
    yield "currency", rf"\${gold}"
    yield "percent", rf"{gold}\%"
    yield "decimal", f"{value}.0" if "." not in value else f"{value}0"
    yield "half", rf"\frac{{{value}}}{{2}}"
    yield "wrong sign", value[1:] if value.startswith("-") else f"-{value}"
    yield "almost", f"{value}.1" if "." not in value else f"{value}1"
    if "." not in value:
        whole = int(value)
        yield "leading zero", f"0{value}" if whole >= 0 else value
        yield "one more", str(whole + 1)
        yield "commas", f"{whole:,}"
        yield "braced commas", f"{whole:,}".replace(",", "{,}")
        yield "as a sum", f"{whole - 1} + 1"
        yield "two answers", f"{value}, {whole + 1}"
        yield "range", f"{value}-{whole + 1}"


def _split_list_answer(gold: str) -> list[str]:
    """The parts of a plain list such as "1, -2"; fewer than two where it is none."""
    inside = re.search(r"[()\[\]{}\\]", gold)
    return [] if inside or _is_number(gold) else [part.strip() for part in gold.split(",")]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", text) is not None


# --- the two judges -------------------------------------------------------------------------------


def verify_with_math_verify(gold: str, response: str) -> bool:
    """math-verify's own verdict, with its defaults."""
    from math_verify import parse as read
    from math_verify import verify

    return bool(verify(read(f"${gold}$"), read(response)))


def measure_agreement(args: AnswersArguments) -> None:
    """Compare the two on every file of the folder and print a table.

    Raises:
        ValueError: the folder holds no such files.
    """
    files = sorted(Path(str(args.data_dir)).glob("*.jsonl"))
    if not files:
        raise ValueError(f"{args.data_dir} holds no .jsonl files")
    shown: Counter[tuple[str, bool]] = Counter()
    kinds: Counter[tuple[str, str]] = Counter()
    written: Counter[str] = Counter()
    right: Counter[str] = Counter()
    total: Counter[str] = Counter()
    with AnswerChecker(args.num_workers, timeout=30) as checker:
        for file in files:
            golds = dict.fromkeys(
                one.answer for one in load_problems(str(file), max_problems=args.max_problems) if one.answer
            )
            asked = [(gold, kind, text) for gold in golds for kind, text in write_responses(gold)]
            ours = checker.check([(extract_answer(text), gold) for gold, _, text in asked])
            same = meant = 0
            for (gold, kind, text), verdict in zip(asked, ours, strict=True):
                other = verify_with_math_verify(gold, text)
                same += verdict.is_correct == other
                meant += verdict.is_correct != other and kind in INTENDED_DIFFERENCES
                written[kind] += 1
                right[kind] += verdict.is_correct
                if verdict.is_correct != other:
                    kinds[kind, "ours" if verdict.is_correct else "theirs"] += 1
                    shown[kind, other] += 1
                    if shown[kind, other] <= args.max_shown_disagreements:
                        print(f"  {kind}: gold {gold!r}, ours {verdict.value}, theirs {other}: {text[-90:]!r}")
            total.update(same=same, meant=meant, pairs=len(asked))
            print(f"{file.stem}: {len(golds)} golds, {_format_agreement(same, meant, len(asked))}")
    print(f"all: {_format_agreement(total['same'], total['meant'], total['pairs'])}")
    print("share that we call right, by kind:")
    print(", ".join(f"{kind} {right[kind] / count:.2f}" for kind, count in sorted(written.items())))
    print("who calls right what the other calls wrong:")
    for (kind, who), count in kinds.most_common():
        print(f"  {count:5d}  {who:6s}  {kind}: {INTENDED_DIFFERENCES.get(kind, 'NOT on purpose')}")


def _format_agreement(num_agreeing: int, num_intended: int, num_pairs: int) -> str:
    share = num_agreeing / (num_pairs - num_intended)
    return f"{num_pairs} verdicts, {num_intended} differ on purpose; {num_agreeing} of the other {num_pairs - num_intended} agree ({share:.2%})"


# --- speed ----------------------------------------------------------------------------------------


def make_number_pairs(num_pairs: int, seed: int) -> list[tuple[str, str]]:
    """Pairs of plain numbers as models write them, half of them equal in value."""
    draw = random.Random(seed)

    def number() -> float:
        return draw.choice([draw.randrange(-999, 100_000), round(draw.uniform(-999, 999), draw.randrange(1, 5))])

    def write(value: float) -> str:
        forms: list[Any] = [f"{value}", f"{value:,}"]
        forms += (
            [f"0{value}", f"{value}.0", f"+{value}", f"{value:,}."] if isinstance(value, int) and value >= 0 else []
        )
        return str(draw.choice(forms))

    pairs = []
    for _ in range(num_pairs):
        gold = number()
        pairs.append((write(gold if draw.random() < 0.5 else number()), write(gold)))
    return pairs


def measure_speed(args: AnswersArguments) -> None:
    """Time the checker on plain numbers, and hold a sample of its verdicts against math-verify."""
    pairs = make_number_pairs(args.num_comparisons, args.seed)
    with AnswerChecker() as checker:
        began = time.perf_counter()
        verdicts = checker.check(pairs)
        seconds = time.perf_counter() - began
    right = sum(verdict.is_correct for verdict in verdicts)
    print(
        f"{len(pairs)} comparisons, {len(set(pairs))} of them distinct: {seconds:.1f} s in one process, {right} right"
    )
    sample = random.Random(args.seed).sample(pairs, min(2000, len(pairs)))
    settled = [(tuple(map(normalize_answer, pair)), match_without_worker(*pair)) for pair in sample]
    slow = [
        verdict
        for pair, verdict in settled
        if isinstance(verdict, MatchResult) and verdict.value != match_answers(*pair)
    ]
    fast = sum(isinstance(verdict, MatchResult) for _, verdict in settled)
    print(f"of {len(sample)} drawn from them {fast} need no worker; math-verify judges {len(slow)} of these otherwise")


def main(argv: Sequence[str]) -> None:
    args: AnswersArguments = parse_dataclasses([AnswersArguments], argv)[0]
    if not args.data_dir and not args.num_comparisons:
        raise ValueError("give --data FOLDER, --speed COUNT, or both")
    if args.data_dir:
        measure_agreement(args)
    if args.num_comparisons:
        measure_speed(args)


if __name__ == "__main__":
    sys.exit(run_main(main))
