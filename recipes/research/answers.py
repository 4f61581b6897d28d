r"""Compare our grading with math-verify's, and time the comparison of plain numbers.

    python recipes/research/answers.py --data_dir FOLDER --max_shown_disagreements 5   # JSONL files with an "answer"
    python recipes/research/answers.py --num_comparisons 500000
    python recipes/research/answers.py --suite_dir FOLDER          # the folder tests/ of Math-Verify's source

Correct and incorrect responses are written for every gold answer, in the ways that models write them. Each is graded
twice: by `extract_answer` and the checker, and by math-verify with its defaults on the whole response,
`verify(parse("$gold$"), parse(response))`. Nothing of the data is stored.
"""

from __future__ import annotations

import importlib
import random
import re
import sys
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from nabla_trl.cli.parsing import parse_dataclasses, run_main
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult, match_answers, match_without_worker, normalize_answer
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option


@dataclass
class AnswersArguments:
    """What to compare."""

    data_dir: str | None = option(
        None,
        "Folder of JSONL files of problems with gold answers. Needed to compare the checker with math-verify "
        "(default: none).",
    )
    suite_dir: str | None = option(
        None,
        "Folder `tests` of Math-Verify's source. Its cases of gold answer, prediction and verdict are graded: as they "
        "stand, and with pure formulas in a box. The files are imported, so give only a folder that you trust "
        "(default: none).",
    )
    max_problems: int = option(250, "Maximum number of problems of each file.")
    max_shown_disagreements: int = option(
        0, "Maximum number of disagreements to print of each kind. Increase it to inspect them."
    )
    num_comparisons: int = option(0, "Number of comparisons of plain numbers to time. 0 skips the timing.")
    seed: int = option(0, "Random seed of the numbers.")
    num_workers: int = option(2, "Number of processes that run math-verify.")


# Where we differ from math-verify on purpose. The rules are in `nabla_trl/grading` and its tests.
INTENDED_DIFFERENCES = {
    "corrected at once": "the last box is the answer, even if only a comma parts it from one that is taken back",
    "boxed full stop": "a full stop in the box belongs to the sentence",
    "boxed units": "a number with a word behind it is a number with its unit, not a product of letters",
    "cut off": "an answer that was cut off is none, and no number is picked out of what came before it",
}


# --- responses ------------------------------------------------------------------------------------

_REASONING_TEXT = "We set up the equation with 3 unknowns and 12 cases.\nStep 1: $a = 4$, so $b = 7$.\n"


def write_responses(gold: str) -> Iterator[tuple[str, str]]:
    """Yield (kind, response) pairs for a gold answer: the same answer in many forms, and other answers."""
    for kind, answer in write_answer_variants(gold):
        yield f"boxed {kind}", f"{_REASONING_TEXT}Therefore, the answer is $\\boxed{{{answer}}}$."
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
    """Yield (kind, answer) pairs: the gold answer in other forms, and answers that differ from it."""
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
    """Return the parts of a plain list such as "1, -2". Other text has fewer than two parts."""
    has_brackets = re.search(r"[()\[\]{}\\]", gold)
    return [] if has_brackets or _is_number(gold) else [part.strip() for part in gold.split(",")]


def _is_number(text: str) -> bool:
    return re.fullmatch(r"-?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?", text) is not None


# --- agreement ------------------------------------------------------------------------------------


def verify_with_math_verify(gold: str, response: str) -> bool:
    """Grade a response with math-verify and its defaults."""
    from math_verify import parse, verify

    return bool(verify(parse(f"${gold}$"), parse(response)))


def measure_agreement(args: AnswersArguments) -> None:
    """Compare our grading with math-verify's on every file of the folder and print the results.

    Raises:
        ValueError: if the folder has no JSONL files.
    """
    files = sorted(Path(str(args.data_dir)).glob("*.jsonl"))
    if not files:
        raise ValueError(f"{args.data_dir} holds no .jsonl files")
    num_shown: Counter[tuple[str, bool]] = Counter()
    disagreements: Counter[tuple[str, str]] = Counter()
    num_responses: Counter[str] = Counter()
    num_correct: Counter[str] = Counter()
    total: Counter[str] = Counter()
    with AnswerChecker(args.num_workers, timeout=30) as checker:
        for file in files:
            problems = load_problems(str(file), max_problems=args.max_problems)
            golds = dict.fromkeys(problem.answer for problem in problems if problem.answer)
            cases = [(gold, kind, text) for gold in golds for kind, text in write_responses(gold)]
            results = checker.check([(extract_answer(text), gold) for gold, _, text in cases])
            num_agreeing = num_intended = 0
            for (gold, kind, text), result in zip(cases, results, strict=True):
                reference = verify_with_math_verify(gold, text)
                num_responses[kind] += 1
                num_correct[kind] += result.is_correct
                if result.is_correct == reference:
                    num_agreeing += 1
                    continue
                num_intended += kind in INTENDED_DIFFERENCES
                disagreements[kind, "ours" if result.is_correct else "theirs"] += 1
                num_shown[kind, reference] += 1
                if num_shown[kind, reference] <= args.max_shown_disagreements:
                    print(f"  {kind}: gold {gold!r}, ours {result.value}, theirs {reference}: {text[-90:]!r}")
            total.update(agreeing=num_agreeing, intended=num_intended, pairs=len(cases))
            print(f"{file.stem}: {len(golds)} golds, {_format_agreement(num_agreeing, num_intended, len(cases))}")
    print(f"all: {_format_agreement(total['agreeing'], total['intended'], total['pairs'])}")
    print("share that we call correct, by kind:")
    print(", ".join(f"{kind} {num_correct[kind] / count:.2f}" for kind, count in sorted(num_responses.items())))
    print("who calls correct what the other calls incorrect:")
    for (kind, who), count in disagreements.most_common():
        print(f"  {count:5d}  {who:6s}  {kind}: {INTENDED_DIFFERENCES.get(kind, 'NOT on purpose')}")


def _format_agreement(num_agreeing: int, num_intended: int, num_pairs: int) -> str:
    others = num_pairs - num_intended
    share = num_agreeing / others
    return (
        f"{num_pairs} results, {num_intended} differ on purpose; "
        f"{num_agreeing} of the other {others} agree ({share:.2%})"
    )


# --- the suite of Math-Verify ------------------------------------------------------------------------


def load_suite(folder: Path) -> list[tuple[str, str, str, bool]]:
    """Return (name, gold, prediction, whether it is right) of the parametrized tests in a folder.

    Raises:
        ValueError: if the folder has no such tests.
    """
    sys.path.insert(0, str(folder.resolve().parent))  # its files import each other as `tests.test_all`
    cases = []
    for file in sorted(folder.glob("test_*.py")):
        module = importlib.import_module(f"{folder.name}.{file.stem}")
        for test_name, test in vars(module).items():
            marks = [mark for mark in getattr(test, "pytestmark", []) if mark.name == "parametrize"]
            for mark in marks if test_name.startswith("test_") else []:
                names = [name.strip() for name in mark.args[0].split(",")]
                for index, values in enumerate(mark.args[1]):
                    case = dict(zip(names, values, strict=True)) if len(names) > 1 else {}
                    verdict = case.get("expected", case.get("result"))
                    if "gold" in case and "pred" in case and verdict is not None:
                        cases.append((f"{file.stem}:{test_name}:{index}", case["gold"], case["pred"], bool(verdict)))
    if not cases:
        raise ValueError(f"{folder} holds no tests with a gold answer, a prediction and a verdict")
    return cases


def box_pure_formula(prediction: str) -> str:
    """Put a prediction that is one formula between delimiters into a box. Return other predictions as they are."""
    text = prediction.strip()
    for left, right in (("$$", "$$"), ("$", "$"), (r"\[", r"\]"), (r"\(", r"\)")):
        inner = text[len(left) : -len(right)]
        if text.startswith(left) and text.endswith(right) and left not in inner and r"\boxed" not in inner:
            return rf"\boxed{{{inner}}}"
    return prediction


def measure_suite(args: AnswersArguments) -> None:
    """Grade the cases of Math-Verify's tests in both forms, and print where our verdict differs."""
    cases = load_suite(Path(str(args.suite_dir)))
    with AnswerChecker(args.num_workers, timeout=30) as checker:
        for form, write in (("as they stand", str), ("pure formulas in a box", box_pure_formula)):
            results = checker.check([(extract_answer(write(prediction)), gold) for _, gold, prediction, _ in cases])
            graded = list(zip(cases, results, strict=True))
            different = [(case, result) for case, result in graded if result.is_correct != case[3]]
            num_false = sum(result.is_correct for _, result in different)
            print(f"{form}: {len(cases) - len(different)} of {len(cases)} agree, {num_false} false right")
            for (name, gold, prediction, _), result in different:
                print(f"  {name}: gold {gold[-60:]!r}, ours {result.value}: {prediction[-60:]!r}")


# --- speed ----------------------------------------------------------------------------------------


def make_number_pairs(num_pairs: int, seed: int) -> list[tuple[str, str]]:
    """Return pairs of plain numbers as models write them. Half of the pairs are equal in value."""
    rng = random.Random(seed)

    def draw_number() -> float:
        return rng.choice([rng.randrange(-999, 100_000), round(rng.uniform(-999, 999), rng.randrange(1, 5))])

    def write(value: float) -> str:
        forms: list[Any] = [f"{value}", f"{value:,}"]
        forms += (
            [f"0{value}", f"{value}.0", f"+{value}", f"{value:,}."] if isinstance(value, int) and value >= 0 else []
        )
        return str(rng.choice(forms))

    pairs = []
    for _ in range(num_pairs):
        gold = draw_number()
        pairs.append((write(gold if rng.random() < 0.5 else draw_number()), write(gold)))
    return pairs


def measure_speed(args: AnswersArguments) -> None:
    """Time the checker on plain numbers, and compare a sample of its results with math-verify's."""
    pairs = make_number_pairs(args.num_comparisons, args.seed)
    with AnswerChecker() as checker:
        start = time.perf_counter()
        results = checker.check(pairs)
        seconds = time.perf_counter() - start
    num_correct = sum(result.is_correct for result in results)
    print(
        f"{len(pairs)} comparisons, {len(set(pairs))} of them distinct: {seconds:.1f} s in one process, "
        f"{num_correct} correct"
    )
    sample = random.Random(args.seed).sample(pairs, min(2000, len(pairs)))
    normalized = [(normalize_answer(predicted), normalize_answer(gold)) for predicted, gold in sample]
    fast = [(key, result) for key in normalized if isinstance(result := match_without_worker(*key), MatchResult)]
    num_different = sum(result.value != match_answers(*key) for key, result in fast)
    print(
        f"of a sample of {len(sample)}, {len(fast)} need no worker; "
        f"math-verify grades {num_different} of these differently"
    )


def main(argv: Sequence[str]) -> None:
    args: AnswersArguments = parse_dataclasses([AnswersArguments], argv)[0]
    if not (args.data_dir or args.suite_dir or args.num_comparisons):
        raise ValueError("give --data_dir FOLDER, --suite_dir FOLDER or --num_comparisons COUNT")
    if args.suite_dir:
        measure_suite(args)
    if args.data_dir:
        measure_agreement(args)
    if args.num_comparisons:
        measure_speed(args)


if __name__ == "__main__":
    sys.exit(run_main(main))
