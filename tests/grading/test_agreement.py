"""Our verdicts are math-verify's own, from the whole response to the comparison, but where we mean to differ."""

import random
from collections.abc import Iterator
from decimal import Decimal

import pytest

from nabla_trl.grading import equivalence as answers
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult, match_without_worker, normalize_answer
from nabla_trl.grading.extraction import extract_answer

# (gold, response, right); responses as models write them to problems like those of the five benchmarks.
AGREED = [
    # GSM8K
    ("18", "16 - 3 - 4 = 9 eggs are left.\n9 * 2 = 18\n#### 18", True),
    ("18", "She makes 9 * 2 = $18 every day. The answer is $18.", True),
    ("18", r"So Janet makes $\boxed{18}$ dollars every day.", True),
    ("18", r"So Janet makes $\boxed{\$18}$ every day.", True),
    ("18", r"\[\boxed{18 \text{ dollars}}\]", True),
    ("18", r"Therefore the total is \boxed{18.00}.", True),
    ("18", r"In all she has $\boxed{17 + 1}$.", True),
    ("18", "She keeps 3 and sells 9, so she makes $19 a day.\n#### 19", False),
    ("1450000", r"He pays $\boxed{1,450,000}$.", True),
    ("1450000", r"He pays $\boxed{1{,}450{,}000}$.", True),
    ("1450000", r"He pays $\boxed{1450}$.", False),
    ("2.5", "Each gets 5 / 2 = 2.5 litres. The answer is 2.5.", True),
    ("2.5", r"Each gets $\boxed{\frac{5}{2}}$ litres.", True),
    ("25", r"The discount is $\boxed{25\%}$.", True),
    ("0.25", r"The discount is $\boxed{25\%}$.", True),
    ("26", r"The discount is $\boxed{25\%}$.", False),
    ("-7", r"It fell to $\boxed{-7}$ degrees.", True),
    ("-7", r"It fell to $\boxed{-7^\circ}$.", True),
    ("-7", r"It fell by $\boxed{7}$ degrees.", False),
    # MATH-500
    (r"\left( 2, \frac{\pi}{3} \right)", r"Hence $(r,\theta) = \boxed{\left(2,\frac{\pi}{3}\right)}$.", True),
    (r"\left( 2, \frac{\pi}{3} \right)", r"Hence $\boxed{(2, \pi/3)}$.", True),
    (r"\left( 2, \frac{\pi}{3} \right)", r"Hence $\boxed{\left(\frac{\pi}{3}, 2\right)}$.", False),
    ("q - 2p", r"The sum is $\boxed{q - 2p}$.", True),
    ("q - 2p", r"The sum is $\boxed{-2p+q}$.", True),
    ("q - 2p", r"The sum is $\boxed{2p - q}$.", False),
    (r"\frac{11}{4}", r"\[x = \boxed{\dfrac{11}{4}}\]", True),
    (r"\frac{11}{4}", r"so $\boxed{\tfrac{11}{4}}$", True),
    (r"\frac{11}{4}", r"so $\boxed{11/4}$", True),
    (r"\frac{11}{4}", r"so $\boxed{2.75}$", True),
    (r"\frac{11}{4}", r"so $\boxed{2\frac{3}{4}}$", True),
    (r"\frac{11}{4}", r"so $\boxed{2.7}$", False),
    (r"\frac{11}{4}", r"so $\boxed{\frac{4}{11}}$", False),
    (r"3\sqrt{7}", r"The distance is $\boxed{3\sqrt{7}}$.", True),
    (r"3\sqrt{7}", r"The distance is $\boxed{\sqrt{63}}$.", True),
    (r"3\sqrt{7}", r"The distance is $\boxed{7\sqrt{3}}$.", False),
    ("(-2,5]", r"All such $x$ are in $\boxed{(-2, 5]}$.", True),
    ("(-2,5]", r"All such $x$ are in $\boxed{\left(-2,5\right]}$.", True),
    ("(-2,5]", r"All such $x$ are in $\boxed{[-2,5]}$.", False),
    (r"(-\infty,1)\cup(4,\infty)", r"$\boxed{(-\infty, 1) \cup (4, +\infty)}$", True),
    ("1,-3", r"The roots are $x = \boxed{-3, 1}$.", True),
    ("1,-3", r"The roots are $\boxed{1}$ and $\boxed{-3}$.", True),
    ("1,-3", r"The roots are $\boxed{1 \text{ and } -3}$.", True),
    ("1,-3", r"The root is $\boxed{1}$.", False),
    ("1", r"Thus $\boxed{1}$ or $\boxed{-3}$.", False),
    (r"60^\circ", r"The angle is $\boxed{60^\circ}$.", True),
    (r"60^\circ", r"The angle is $\boxed{60}$ degrees.", True),
    (r"\text{Thursday}", r"It is a $\boxed{\text{Thursday}}$.", True),
    (r"\text{(C)}", r"The right choice is $\boxed{\text{(C)}}$.", True),
    (r"\text{(C)}", r"The right choice is $\boxed{C}$.", True),
    (r"\text{(C)}", r"The right choice is $\boxed{D}$.", False),
    (r"y = 2x - 5", r"The line is $\boxed{y = 2x - 5}$.", True),
    ("5", r"Hence $\boxed{x = 5}$.", True),
    (
        r"\begin{pmatrix} 1 & 2 \\ 0 & -1 \end{pmatrix}",
        r"$\boxed{\begin{pmatrix} 1 & 2 \\ 0 & -1 \end{pmatrix}}$",
        True,
    ),
    ("4 - 3i", r"The other root is $\boxed{4-3i}$.", True),
    ("12,\\!600", r"There are $\boxed{12600}$ ways.", True),
    # AMC, AIME
    ("142", "First I found $\\boxed{141}$.\n\nThat missed a case. The answer is $\\boxed{142}$.", True),
    ("25", r"Hence $m + n = 11 + 14 = \boxed{025}$.", True),
    ("25", "<think>Is it \\boxed{24}? No.</think>The final answer is $\\boxed{25}$.", True),
    ("204", "**Final Answer**\nThe final answer is \\boxed{204}", True),
    ("204", "Final Answer: The final answer is $204$. I hope it is correct.", True),
    ("204", r"So the answer is \(204\).", True),
    ("204", r"\[ \boxed{203} \]", False),
    ("204", "I cannot solve this, sorry.", False),
]

# (gold, response, ours, theirs, why)
ON_PURPOSE = [
    ("18", r"So $\boxed{18.}$", True, False, "a full stop in the box belongs to the sentence"),
    ("18", r"So \boxed{18 dollars}", True, False, "a word behind a number is its unit, not a product of letters"),
    (
        "7",
        r"So \boxed{8}, no: it is \boxed{7}.",
        True,
        False,
        "the last box counts, whatever was taken back before it",
    ),
    ("7", "so $b = 7$.\nSo the answer is $\\boxed{\\frac{1", False, True, "an answer that was cut off is none"),
    ("7", r"<think>So it is \boxed{7}", False, True, "thinking that never ended is no answer"),
    ("7", "#### 7\nThat is 2 more than 5.", True, False, "GSM8K's own mark counts before the last number"),
]


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker(num_workers=2, timeout=60) as one:
        yield one


def theirs(gold: str, response: str) -> bool:
    from math_verify import parse, verify

    known, read = (parse(text, parsing_timeout=None) for text in (f"${gold}$", response))
    return bool(verify(known, read, timeout_seconds=None))


def test_verdicts_are_those_of_math_verify_on_whole_responses(checker: AnswerChecker) -> None:
    ours = checker.check([(extract_answer(response), gold) for gold, response, _ in AGREED])
    found = [(gold, response, verdict.is_correct) for (gold, response, _), verdict in zip(AGREED, ours, strict=True)]
    assert found == AGREED
    assert [theirs(gold, response) for gold, response, _ in AGREED] == [right for *_, right in AGREED]


@pytest.mark.parametrize(("gold", "response", "ours", "other", "why"), ON_PURPOSE)
def test_verdicts_differ_where_we_mean_to(
    checker: AnswerChecker, gold: str, response: str, ours: bool, other: bool, why: str
) -> None:
    [verdict] = checker.check([(extract_answer(response), gold)])
    assert verdict.is_correct == ours, why
    assert theirs(gold, response) == other, why


def test_plain_numbers_have_the_verdicts_of_the_slow_path() -> None:
    draw = random.Random(0)

    def number() -> Decimal:
        digits = draw.choice([0, 0, 0, 1, 2, 4, 6])
        return Decimal(draw.randrange(-(10 ** draw.randrange(1, 9)), 10 ** draw.randrange(1, 9))).scaleb(-digits)

    def write(value: Decimal) -> str:
        plain = f"{value:f}"
        forms = [plain, f"{value:,f}", f"{plain}0" if "." in plain else f"{plain}.0", f"${plain}", f"{plain}."]
        forms += (
            [f"0{plain}", f"+{plain}", plain.removeprefix("0") or "0"] if value >= 0 else [plain.replace("-", "−")]
        )
        return draw.choice(forms)

    settled = rights = 0
    for _ in range(400):
        gold = number()
        near = draw.choice([gold, gold, gold + 1, -gold, gold * 10, gold + Decimal("0.0000005"), number()])
        pair = normalize_answer(write(near)), normalize_answer(write(gold))
        verdict = match_without_worker(*pair)
        if isinstance(verdict, MatchResult):
            settled, rights = settled + 1, rights + verdict.is_correct
            assert verdict.value == answers.match_answers(*pair), pair
    assert settled > 300 and 100 < rights < settled - 50
