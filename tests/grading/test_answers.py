"""The answers room: what a response's final answer is, and whether it equals the gold one."""

import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult, match_without_worker, normalize_answer
from nabla_trl.grading.extraction import (
    detect_answer_format,
    extract_answer,
    extract_strict_answer,
    has_open_think_block,
)

# A comparison that misbehaves on demand. Workers import it in place of math-verify's.
STAND_IN = """
import os, signal, sys, time
from pathlib import Path

def match_answers(predicted, gold):
    with Path(__file__).with_name("pids").open("a") as pids:
        print(os.getpid(), file=pids)
    if predicted == "hang":
        time.sleep(600)
    if predicted == "exit":
        os._exit(3)
    if predicted == "fault":
        os.kill(os.getpid(), signal.SIGSEGV)
    if predicted == "noise":
        os.write(1, b"noise on standard output")
    if predicted == "imports":
        return "incorrect" if {"torch", "transformers", "numpy"} & set(sys.modules) else "correct"
    return "correct" if predicted == gold[::-1] else "incorrect"
"""


@pytest.fixture
def stand_in(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "stand_in.py"
    path.write_text(STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    return path


def pids_of(stand_in: Path) -> list[int]:
    return [int(line) for line in stand_in.with_name("pids").read_text().split()]


def alive(pid: int) -> bool:
    """Whether the process runs; a zombie, which nobody has reaped, counts as running."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def gone(pids: list[int], seconds: float) -> bool:
    """Whether none of the processes runs after so many seconds; a dead parent's zombies are init's."""
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        states = [Path(f"/proc/{pid}/stat") for pid in pids if alive(pid)]
        if all(" Z " in state.read_text() for state in states if state.exists()):
            return True
        time.sleep(0.05)
    return False


# ------------------------------------------------------------------ finding

RESPONSES = {
    # GSM8K
    "She makes 9 * 2 = $<<9*2=18>>18 every day at the farmer’s market.\n#### 18": "18",
    "In all 1,000 + 234 = 1,234 dollars.\n#### 1,234": "1,234",
    "#### 70000\n": "70000",
    "He lost money.\n#### -$12.50": "-12.50",
    "### Step 1: eggs\n16 - 3 = 13\n#### 2. Sell them\n13 * 2 = 26. So she makes $26 a day.": "26",
    "First #### 5 then, corrected, #### 7": "7",
    "#### 18 dollars per day": "18",
    "Is it so?\n#### yes": "yes",
    "Hence\n#### x^2 + 2x - 1": "x^2 + 2x - 1",
    "#### Step 4\nHence 12\n#### Step 5: add 7 to it all": "7",
    "Janet sells 9 eggs, so she makes $18 a day. The answer is $18.": "18",
    "**Answer:** 1,234.50 dollars": "1,234.50",
    "The answer is 18 because 9 * 2 = 18 and not 20.": "18",
    "The answer to the question is that Janet makes $18 every day.": "18",
    "The answer is 3 + 4 = 7.": "7",
    "### Final Answer\n\n**18 dollars**": "18",
    "The answer is -5": "-5",
    "The final answer is 50%.": "50%",
    "The final answer is 25 percent of it.": "25%",
    "The answer is 2ab + 3": "2ab + 3",
    "I think the answer is 4. Wait, no. The answer is 5!": "5",
    "Let me check the answer: it is 12. So she has 12 eggs left, 3 more than he.": "12",
    "So he pays $1,450,000.": "1,450,000",
    "The temperature fell to −7 degrees": "-7",
    "It is 10-5": "5",
    "He came 2nd of 17 in the 3rd race": "17",
    "CO2 rose by 3/4": "3/4",
    "共有18个。": "18",
    # MATH-500
    r"Thus $p - q$ it is: $\boxed{p - q}$.": "p - q",
    r"\[\boxed{\left( 3, \frac{\pi}{2} \right)}\]": r"\left( 3, \frac{\pi}{2} \right)",
    r"The set is $\boxed{\{1, 2\}}$": r"\{1, 2\}",
    r"$\boxed{\left\{ x \right.}$ then": r"\left\{ x \right.",
    r"First \boxed{3}. Correcting myself: \boxed{\frac{14}{3}}": r"\frac{14}{3}",
    r"So $x = \boxed{5}$. #### 7. The answer is 9": "5",
    r"\fbox{42}": "42",
    r"$\boxed 7$": "7",
    r"$\boxed{}$ and so the answer is 3": "3",
    r"\boxed{3} and then \boxed{}": "3",
    r"The roots are $\boxed{3}$ and $\boxed{\sqrt{5}}$.": r"3, \sqrt{5}",
    r"Hence \(\boxed{1}\), \(\boxed{2}\), or \(\boxed{3}\)": "1, 2, 3",
    r"\boxed{1} \text{ and } \boxed{2}": "1, 2",
    r"We found \boxed{4}, so it is \boxed{5} or \boxed{6}": "5, 6",
    r"We have 24 cases, so $\boxed{\frac{1": "24",
    r"First $\boxed{4}$, or rather $\boxed{\frac{1": "4",
    "Final Answer: The final answer is $\\frac{1}{2}$. I hope it is correct.": r"\frac{1}{2}",
    "Therefore, the answer is\n\\[ x^2 + 1 \\]": "x^2 + 1",
    "The answer is $x = 5$ for all such $y$.": "x = 5",
    "The answers are $3$ and $5$.": "$3$ and $5$",
    "The plane has an equation. Answer: 5x - 7y + 4 = 0": "5x - 7y + 4 = 0",
    r"The answer is 11,\! 111,\! 111.": r"11,\! 111,\! 111",
    "The answer is 3, 5 and 7.": "3, 5 and 7",
    r"The answer is \text{Evelyn}.": r"\text{Evelyn}",
    "The answer is (B)": "(B)",
    "The answer is Evelyn.": "Evelyn",
    r"The probability is $\frac{3}{4}$.": r"\frac{3}{4}",
    # AIME, AMC
    r"Hence $m + n = 73$, that is $\boxed{073}$.": "073",
    r"\textbf{(B)}\ 142 is right; the answer is $\boxed{142.0}$": "142.0",
    # the embedded world
    "9-5=4;4*4=6;6+2=8;#8": "8",
    "9-5=4;4*4=6;#6;6+2=8;#8": "8",
    "9 - 5 = 4 ; # 4": "4",
    "Behind door #3 there is nothing; 7 doors are left": "7",
    "# Problem 5\nx is 3": "3",
    # thinking
    "<think>it is \\boxed{3}</think>It is \\boxed{4}": "4",
    "so \\boxed{3}</think>The answer is 4": "4",
    "The answer is 4. <think>or is it \\boxed{5}": "4",
    "<Thinking>\n7\n</Thinking>\n8": "8",
}


@pytest.mark.parametrize(("response", "answer"), RESPONSES.items())
def test_extracts_from_realistic_responses(response: str, answer: str) -> None:
    assert extract_answer(response) == answer


@pytest.mark.parametrize(
    "text",
    ["", "  \n", "I do not know.", "<think>so 5, \\boxed{5}", "<think>5</think>", "\\boxed{}", "#", "The answer is"],
)
def test_no_answer_in_it(text: str) -> None:
    assert extract_answer(text) is None


@pytest.mark.parametrize("marker", [r"\boxed{{{}}}", "#### {}", "…;#{}", "The answer is {}.", "and so {}"])
def test_what_comes_before_the_last_answer_does_not_matter(marker: str) -> None:
    draw = random.Random(0)
    for _ in range(50):
        one, two = (str(draw.randrange(-999, 10_000)) for _ in range(2))
        before = f"Let 3 of 17 be.\n{marker.format(one)}\nBut {draw.randrange(99)}/7 is less.\n"
        assert extract_answer(before + marker.format(two)) == two
        assert extract_answer(f"<think>{before}</think>" + marker.format(two)) == two


def test_box_content_with_balanced_braces_is_kept_whole() -> None:
    draw = random.Random(0)

    def content(depth: int) -> str:
        parts = [draw.choice(["x", "1", r"\{", r"\}", r"\frac", "+", " y"]) for _ in range(3)]
        return "a" + "".join(parts) + (f"{{{content(depth - 1)}}}z" if depth else "z")

    for _ in range(200):
        inside = content(draw.randrange(4))
        assert extract_answer(rf"so $\boxed{{{inside}}}$, {{as}} said.") == inside


def test_extraction_stays_fast_on_endless_repetition() -> None:
    """Degenerate samples repeat a token up to the length limit; none of the patterns may blow up on them."""
    for piece in ["answer ", "####", "$", "\\boxed{", "1,", "{", "<think>", "the answer is ", " ", "\\(", "-", "1/"]:
        began = time.process_time()
        extract_answer(piece * (8192 // len(piece) + 1))
        assert time.process_time() - began < 5


STRICT = {
    ("boxed", r"so $\boxed{\frac{1}{2}}$, or \boxed{3}."): "3",
    ("boxed", r"\boxed{−3}"): "-3",
    ("boxed", r"\boxed{3} and \boxed{5}"): "5",
    ("boxed", r"It is \boxed{3}, that is \boxed{\frac{1"): "3",
    ("boxed", "The answer is 3.\n#### 3"): None,
    ("boxed", r"<think>\boxed{3}</think>The answer is 4."): None,
    ("boxed", r"\boxed{3}</think>So \boxed{4}"): "4",
    ("hashes", "5 + 13 = 18\n#### 18"): "18",
    ("hashes", "#### 5\nno:\n  #### $1,234.\nSo it is 7."): "$1,234",
    ("hashes", r"\boxed{18}, so #### 18"): None,
    ("hashes", "##### 18"): None,
    ("hashes", "####\n18"): None,
    ("hash", "9-5=4;4*4=6;#6"): "6",
    ("hash", "9-5=4;#4;4*4=6;#6"): "6",
    ("hash", "9-5=4;4*4=6"): None,
    ("hash", "9-5=4;#"): None,
}


@pytest.mark.parametrize(("asked", "answer"), STRICT.items())
def test_strict_answers_are_those_in_the_form_that_was_asked_for(asked: tuple[str, str], answer: str | None) -> None:
    form, text = asked
    assert extract_strict_answer(text, form) == answer


def test_an_instruction_tells_its_form() -> None:
    assert detect_answer_format(r"Put it within \boxed{}.") == "boxed"
    assert detect_answer_format("End with '#### n'.") == "hashes"
    assert detect_answer_format("As in problem #3, be brief.") is detect_answer_format("") is None


def test_a_text_may_end_inside_a_think_block() -> None:
    assert has_open_think_block("<|assistant|><think>\n") and has_open_think_block("<think></think><thinking>x")
    assert (
        not has_open_think_block("")
        and not has_open_think_block("<think>\n\n</think>\n\n")
        and not has_open_think_block("</think>")
    )


# ------------------------------------------------------------------ comparing

NUMBERS = [
    *("0", "-0", "5", "05", "+5", "-5", "−5", "5.0", ".5", "0.50", "-.5", "025", "25", "02,000", "2,000"),
    *("1,234", "1234.0", "$1,234.50", "+1,234", "1,234,567", "10,\\!080", "10080", "0.333333", "0.3333333"),
    *("0.3333334", "5.0000001", ".0000672", "9007199254740993", "9007199254740992", "1234567890123456.5"),
    *("1e3", "٣"),
]


def theirs(predicted: str, gold: str) -> bool:
    """The verdict of math-verify alone on two plain answers."""
    from math_verify import LatexExtractionConfig, parse, verify

    config = [LatexExtractionConfig()]
    read, known = (parse(f"${text}$", config, parsing_timeout=None) for text in (predicted, gold))
    return bool(verify(known, read, timeout_seconds=None))


def test_verdicts_of_numbers_are_those_of_math_verify_but_for_what_it_does_not_read() -> None:
    # Two digits of a tiny number are not the number. math-verify reads neither 1e3 nor the digits of other scripts.
    finer = {"1e3", "3", ".0000672"}
    settled = 0
    for predicted, gold in itertools.product(map(normalize_answer, NUMBERS), repeat=2):
        verdict = match_without_worker(predicted, gold)
        if isinstance(verdict, MatchResult):
            settled += 1
            if not finer & {predicted, gold}:
                assert verdict.is_correct == theirs(predicted, gold), (predicted, gold)
    assert settled > 0.9 * len(NUMBERS) ** 2
    for text in ["Evelyn", "due east", "yes", "information", "Winfrey"]:
        assert match_without_worker(text, text) is MatchResult.CORRECT
    assert isinstance(match_without_worker(r"\frac{1", r"\frac{1"), tuple)


RIGHT = [
    ("18", "She makes 9 * 2 = $<<9*2=18>>18 every day.\n#### 18"),
    ("1,080", "1080"),
    ("$1,080.00", "1,080"),
    ("18 dollars", "18"),
    (r"18\text{ dollars}", "18"),
    ("5", r"so $x = \boxed{5}$"),
    ("142", "142.0"),
    ("25", "025"),
    ("50%", "0.5"),
    ("1/2", r"\frac{1}{2}"),
    ("0.5", r"\dfrac12"),
    (r"\left(3, \tfrac{\pi}{2}\right)", r"\left( 3, \frac{\pi}{2} \right)"),
    ("q(-1)+p", "p - q"),
    ("Evelyn", r"\text{Evelyn}"),
    ("East", r"\text{east}"),
    ("C", r"\text{(C)}"),
    ("(C)", r"\text{(C)}"),
    ("90", r"90^\circ"),
    ("9i+6", "6+9i"),
    ("5", "x=5"),
    ("-2, 1", "1,-2"),
    ("$3$ and $5$", "3, 5"),
    ("7,5,3", "3, 5, 7"),
    (r"1+\sqrt{19}, 1-\sqrt{19}", r"1 \pm \sqrt{19}"),
    ("(3, 4]", "(3,4]"),
    ("(2,+\\infty)", r"(2,\infty)"),
    ("(6, 31, -1)", "(6,31,-1)"),
    ("ab+2a+5b+10", "(a+5)(b+2)"),
    (r"\begin{pmatrix}-1&0\\0&-1\end{pmatrix}", r"\begin{pmatrix} -1 & 0 \\ 0 & -1 \end{pmatrix}"),
    ("11,111,111,100", r"11,\! 111,\! 111,\! 100"),
    ("32348", r"\$32,\!348"),
]
WRONG = [
    ("19", "18"),
    ("18", "1,8"),
    ("1.5", "15"),
    ("-5", "5"),
    ("1/3", "0.333"),
    ("Paris", "pairs"),  # as products of letters they would be equal
    ("(4,3)", "(3,4)"),
    ("(3,4)", "(3,4]"),
    ("3, 5", "3, 5, 7"),
    ("3", "3, 5"),
    ("x+1", "y+1"),
    ("5 million", "5"),
    ("I do not know", "7"),
    (r"\frac{1", "1"),  # no number is picked out of what cannot be parsed
]


def test_realistic_answers_through_the_workers() -> None:
    with AnswerChecker(num_workers=2, timeout=30) as checker:
        verdicts = checker.check([*RIGHT, *WRONG])
    assert [pair for pair, verdict in zip(RIGHT, verdicts, strict=False) if not verdict.is_correct] == []
    wrong = verdicts[len(RIGHT) :]
    assert [pair for pair, verdict in zip(WRONG, wrong, strict=True) if verdict is not MatchResult.INCORRECT] == []
    assert checker.counts == {MatchResult.CORRECT: len(RIGHT), MatchResult.INCORRECT: len(WRONG)}


def test_golds_that_cannot_be_met_and_answers_that_are_missing() -> None:
    pairs = [
        ("5", None),
        (None, None),
        ("5", "  "),
        (None, "5"),
        ("", "5"),
        (" $$", "5"),
        (r"\frac{1", r"\frac{1"),
        ("5", r"\begin{broken 5"),
        ("5", r"so \boxed{5"),
        ("", "\\boxed{}"),
        (None, r"\frac{1"),
    ]
    with AnswerChecker(timeout=30) as checker:
        verdicts = checker.check(pairs)
        again = checker.check(pairs)
    no_gold, no_answer, bad_gold = MatchResult.NO_GOLD, MatchResult.NO_ANSWER, MatchResult.BAD_GOLD
    assert verdicts == [no_gold] * 3 + [no_answer] * 3 + [bad_gold] * 4 + [no_answer]
    assert again == verdicts
    assert checker.counts == {no_gold: 6, no_answer: 8, bad_gold: 8}
    assert [verdict for verdict in MatchResult if verdict.is_correct] == [MatchResult.CORRECT]


# ------------------------------------------------------------------ workers


def test_a_hung_or_crashed_worker_costs_one_pair(stand_in: Path) -> None:
    pairs = [
        ("hang", "gnah"),
        ("five", "evif"),
        ("exit", "tixe"),
        ("fault", "tluaf"),
        ("six", "xis"),
        ("six", "seven"),
    ]
    with AnswerChecker(num_workers=2, timeout=1, _matcher_module="stand_in") as checker:
        verdicts = checker.check([*pairs, ("hang", "gnah")])
        assert verdicts == ["timeout", "correct", "error", "error", "correct", "incorrect", "timeout"]
        assert checker.check([("noise", "esion"), ("imports", "")]) == [MatchResult.CORRECT, MatchResult.NO_GOLD]
        assert checker.check([("imports", "none")]) == [MatchResult.CORRECT]
        assert checker.counts[MatchResult.TIMEOUT] == checker.counts[MatchResult.ERROR] == 2
    pids = pids_of(stand_in)
    assert len(set(pids)) > 2  # some were replaced
    assert not any(alive(pid) for pid in pids)  # all reaped


def test_a_pair_that_timed_out_is_tried_again_and_a_settled_one_is_not(stand_in: Path) -> None:
    with AnswerChecker(timeout=0.5, _matcher_module="stand_in") as checker:
        checker.check([("hang", "nine"), ("one", "two")])
        asked = len(pids_of(stand_in))
        checker.check([("one", "two")] * 3)
        assert len(pids_of(stand_in)) == asked
        assert checker.check([("hang", "nine")]) == [MatchResult.TIMEOUT]
        assert len(pids_of(stand_in)) > asked


def test_an_explosive_expression_ends_and_the_next_pair_is_judged() -> None:
    with AnswerChecker(timeout=1) as checker:
        verdict, after = checker.check([("9^{9^{9^{9^{9}}}}", "5"), ("1/2", r"\frac{2}{4}")])
    assert verdict in (MatchResult.TIMEOUT, MatchResult.ERROR)
    assert after is MatchResult.CORRECT


def test_plain_numbers_start_no_worker_and_a_worker_that_cannot_start_is_a_clear_error() -> None:
    with AnswerChecker(_matcher_module="missing_matcher") as checker:
        assert checker.check([("1,234.0", "1234"), ("3", "4"), ("Evelyn", "Evelyn")])[0].is_correct
        with pytest.raises(RuntimeError, match="no worker for math-verify could be started: ModuleNotFoundError"):
            checker.check([("x+1", "1+x")])
        assert sum(checker.counts.values()) == 3


@pytest.mark.parametrize("arguments", [{"num_workers": 0}, {"timeout": 0}, {"timeout": float("nan")}])
def test_impossible_settings_are_refused(arguments: dict) -> None:
    with pytest.raises(ValueError, match="num_workers must be at least 1 and timeout above 0"):
        AnswerChecker(**arguments)


def test_works_from_threads(stand_in: Path) -> None:
    verdicts: dict[int, list[MatchResult]] = {}
    with AnswerChecker(num_workers=2, timeout=30, _matcher_module="stand_in") as checker:

        def work(number: int) -> None:
            verdicts[number] = checker.check([("five", "evif"), ("six", f"gold {number}"), ("7", "7.0")])

        threads = [threading.Thread(target=work, args=(number,)) for number in range(3)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert verdicts == {
        number: [MatchResult.CORRECT, MatchResult.INCORRECT, MatchResult.CORRECT] for number in range(3)
    }


@pytest.mark.parametrize("ending", ["interrupt", "kill idle", "kill hung"])
@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="tells zombies by /proc")
def test_no_orphans(stand_in: Path, ending: str) -> None:
    """Ctrl-C and kill -9 of the parent end the workers too, also from a script without a main guard."""
    last = "hang" if ending != "kill idle" else "five"
    script = f"""
import time
from nabla_trl.grading.checker import AnswerChecker
checker = AnswerChecker(2, {1 if ending == "kill hung" else 60}, _matcher_module="stand_in")
checker.check([("ready", "set")])
checker.check([({last!r}, "nine")])
time.sleep(60)
"""
    parent = subprocess.Popen(
        [sys.executable, "-c", script],
        start_new_session=True,
        stderr=subprocess.DEVNULL,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    try:
        asked = stand_in.with_name("pids")
        while not asked.exists() or len(pids_of(stand_in)) < 3:  # the warm-up, "ready", and the last one
            time.sleep(0.02)
            assert parent.poll() is None
        if ending == "interrupt":
            os.killpg(parent.pid, signal.SIGINT)  # as a terminal does: to every process of the group
            assert parent.wait(10) != 0
        else:
            parent.kill()
            parent.wait(10)
        assert gone(pids_of(stand_in), 10)
    finally:
        parent.kill()


def test_imports_neither_torch_nor_sympy() -> None:
    code = (
        "import sys, nabla_trl.grading.checker; sys.exit(bool({'torch', 'sympy', 'transformers'} & set(sys.modules)))"
    )
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    assert subprocess.run([sys.executable, "-c", code], env=env).returncode == 0


# ------------------------------------------------------------------ time

FRAGMENTS = [
    *(
        "'. '",
        ". ",
        "A. ",
        "1.",
        "1,",
        "1, ",
        "1 ",
        "1/",
        "-1",
        "1e5",
        "1:",
        "12:00 ",
        "March 4, ",
        "1st ",
        "50%",
        "5 cm ",
    ),
    *("<think>", "<think></think>", "<thinking>", "</think>", "answer ", "the answer is ", "Answer: ", "answer is 1 "),
    *("####", "#### 5 ", "#8", "\n#8", "$", "$$", "$x$ ", "$x$, ", "$ ", "\\(", "\\[", "\\(x\\), ", "\\]", "\\boxed{"),
    *(
        "\\boxed{1} and ",
        "\\boxed1",
        "{",
        "}",
        "(1,",
        "(1,2)",
        "\\{",
        "[",
        "*",
        "_",
        "= ",
        "x = 1, ",
        "a ",
        "aa ",
        " ",
    ),
    *(
        "\n",
        "\n\n",
        ": ",
        "\\",
        "\\\\",
        "\\frac{",
        "\\text{a}",
        "\\text{ and }",
        "1\\,000",
        "\\sqrt{",
        "^{",
        "x^2",
        "x<",
    ),
    *(
        "percent ",
        "½",
        "√(",
        "²",
        "°",
        "1\u202f000",
        "北",
        "and ",
        "is $x$ ",
        "1 000 ",
        "1{,}",
        "2x + ",
        "\\pi",
        "no ",
        "|",
    ),
]


def seconds_of(text: str) -> float:
    """The shortest of three times to read a text, and to compare what runs in the process of the caller."""
    fastest = float("inf")
    for _ in range(3):
        normalize_answer.cache_clear()
        began = time.process_time()
        match_without_worker(text, "x+1")
        match_without_worker(extract_answer(text), text)
        fastest = min(fastest, time.process_time() - began)
    return fastest


@pytest.mark.slow
@pytest.mark.parametrize("prefix", ["", "The answer is ", "\\boxed{", "$", "#### "])
def test_reading_an_answer_takes_linear_time(prefix: str) -> None:
    draw = random.Random(0)
    pairs = ["".join(draw.sample(FRAGMENTS, 2)) for _ in range(60)]
    quadratic = []
    for fragment in [*FRAGMENTS, *pairs]:
        short, long = (seconds_of(prefix + fragment * (size // len(fragment)) + " 7") for size in (8000, 32000))
        if long > 0.02 and long > 6 * short:
            quadratic.append((fragment, short, long))
    assert quadratic == []


BUSY_STAND_IN = """
from pathlib import Path

def match_answers(predicted, gold):
    with Path(__file__).with_name("asked").open("a") as asked:
        print(predicted, gold, file=asked)
    while "endless" in predicted + gold:
        pass
    return "correct" if predicted == gold[::-1] else "incorrect"
"""


def test_an_answer_that_takes_endless_time_is_not_paid_for_in_every_row(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "busy_stand_in.py").write_text(BUSY_STAND_IN)
    monkeypatch.syspath_prepend(tmp_path)
    checker = AnswerChecker(timeout=0.3, _matcher_module="busy_stand_in")
    for gold in [*range(12), *range(12)]:
        assert checker.check([("endless + 1", f"x + {gold}")]) == [MatchResult.TIMEOUT]
        checker.close()  # what is known outlives the workers
    for predicted in [*range(12), *range(12)]:
        assert checker.check([(f"x + {predicted}", "endless + 2")]) == [MatchResult.TIMEOUT]
    assert checker.check([("x + 1", "1 + x")]) == [MatchResult.CORRECT]
    assert checker.check([("x + 1", "y + x")]) == [MatchResult.INCORRECT]
    checker.close()
    asked = (tmp_path / "asked").read_text().splitlines()
    # Two time-outs of the answer and three of the gold answer, or twice as many where others take the processor.
    assert sum("endless + 1" in line for line in asked) <= 4
    assert sum("endless + 2" in line for line in asked) <= 6
    assert checker.counts[MatchResult.TIMEOUT] == 48


def test_checkers_of_a_process_share_what_they_know() -> None:
    with AnswerChecker(timeout=29) as one:
        assert one.check([("x+2", "2+x")]) == [MatchResult.CORRECT]
    other = AnswerChecker(timeout=29)
    other._workers = []  # none could be asked
    assert other.check([("x+2", "2+x")]) == [MatchResult.CORRECT]
