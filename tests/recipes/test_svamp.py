"""The parts of recipes/svamp that no model is needed for: data, arithmetic, and the tables of measured answers."""

from __future__ import annotations

import json
from pathlib import Path

import arithmetic
import gradient
import measure
import numpy as np
import prepare
import pytest
import torch
import worlds

from nabla_trl.cli.main import main
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.data import add_draw_info
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.registry import load_problems

PROBLEM = """<Problem ID="n{number}"><Body>{body} {number}.</Body><Question>How many?</Question>
<Solution-Type>Sum</Solution-Type><Answer>{answer}</Answer><Formula>{formula}</Formula></Problem>"""


@pytest.mark.parametrize(
    ("formula", "answer", "expected"),
    [
        ("7+2=9", "9", "7 + 2 = 9\n#### 9"),
        ("(6+2)*8=64", "64", "6 + 2 = 8\n8 * 8 = 64\n#### 64"),
        ("5-15+17=7", "7", "5 - 15 = -10\n-10 + 17 = 7\n#### 7"),
        ("3+5=8; 8/16=0.5", "0.5", "3 + 5 = 8\n8 / 16 = 0.5\n#### 0.5"),
        ("1.02+0.34=1.36", "1.36", "1.02 + 0.34 = 1.36\n#### 1.36"),
        ("1000*2=2000", "2,000", "1000 * 2 = 2000\n#### 2000"),
        ("7+2=8", "9", None),  # false
        ("7+2=9", "8", None),  # another answer
        ("1/3*3=1", "1", None),  # a number without a short form on the way
        ("221/7=31 r4", "31", None),
        ("LCM[2,3]=6", "6", None),
        ("2:3=14:21", "2", None),
        ("7/0=9", "9", None),
        ("7+=9", "9", None),
        ("9=9", "9", None),  # nothing is computed
        ("9**9=9", "9", None),
    ],
)
def test_a_formula_as_a_worked_answer(formula: str, answer: str, expected: str | None) -> None:
    assert prepare.write_solution(formula, answer) == expected


def test_the_files_of_the_data(tmp_path: Path) -> None:
    problems = [
        PROBLEM.format(number=n, body="a &amp; b", answer=f"{n} (apples)", formula=f"{n}-0={n}") for n in range(12)
    ]
    problems += [
        PROBLEM.format(number=99, body="c", answer="1:2", formula="1:2=2:4"),
        problems[3],
    ]  # no formula; again
    file = tmp_path / "ASDiv.xml"
    file.write_text(f"<M><ProblemSet>{''.join(problems)}</ProblemSet></M>")
    argv = ["--asdiv_file", str(file), "--output_dir", str(tmp_path / "data")]
    sizes = ["--num_sft_problems", "7", "--num_audit_problems", "3"]
    prepare.main([*argv, *sizes])
    sft, reward, audit = (
        {problem.id for problem in load_problems(str(tmp_path / "data" / f"{name}.jsonl"))}
        for name in ("sft", "reward", "audit")
    )
    assert (len(sft), len(reward), len(audit)) == (7, 9, 3) and sft < reward and not reward & audit
    [first, *_] = load_problems(str(tmp_path / "data" / "sft.jsonl"))
    assert (
        first.question.startswith("a & b ")
        and first.solution == f"{first.answer} - 0 = {first.answer}\n#### {first.answer}"
    )
    worlds.refused(
        lambda: prepare.main([*argv, "--num_sft_problems", "11", "--num_audit_problems", "3"]), "12 problems"
    )
    held_out = tmp_path / "svamp.jsonl"
    held_out.write_text(json.dumps({"question": first.question, "answer": "1"}))
    worlds.refused(lambda: prepare.main([*argv, *sizes, "--svamp", str(held_out)]), "trained on")


@pytest.mark.parametrize(
    ("response", "is_false", "computed"),
    [
        ("76 - 25 = 51\n#### 51", False, "76 - 25 = 51\n#### 51"),
        ("76 - 25 = 41\n#### 41", True, "76 - 25 = 51\n#### 51"),
        ("6 + 2 = 9\n9 * 8 = 72\n#### 72", True, "6 + 2 = 8\n8 * 8 = 64\n#### 64"),
        ("6 + 2 = 8\n8 * 8 = 64\n#### 46", False, "6 + 2 = 8\n8 * 8 = 64\n#### 46"),  # no result of an equation
        ("7 / 2 = 3\n#### 3", True, "7 / 2 = 3.5\n#### 3.5"),
        ("7 / 3 = 2\n#### 2", True, "7 / 3 = 2\n#### 2"),  # no short form
        ("7 / 0 = 2\n#### 2", False, "7 / 0 = 2\n#### 2"),
        ("apples = 2\n#### 2", False, "apples = 2\n#### 2"),
        ("012 + 1 = 13\n#### 13", False, "012 + 1 = 13\n#### 13"),
        ("9**9 = 3\n#### 3", False, "9**9 = 3\n#### 3"),
        ("4 - 9 = -6\n-6 - 1 = -7\n\\boxed{-7}", True, "4 - 9 = -5\n-5 - 1 = -6\n\\boxed{-6}"),
        ("9 - 6 = 2\n-6 - 2 = -8\n#### -8", True, "9 - 6 = 3\n-6 - 3 = -9\n#### -9"),  # 6 and −6 differ
        (f"{'1+' * 200}1 = 3", False, f"{'1+' * 200}1 = 3"),
        ("", False, ""),
    ],
)
def test_the_calculator(response: str, is_false: bool, computed: str) -> None:
    assert arithmetic.has_false_equation(response) == is_false
    assert arithmetic.compute_response(response) == computed


class CharacterPolicy:
    """Characters are tokens."""

    def decode(self, ids: list[int]) -> str:
        return "".join(map(chr, ids))

    def tokenizer(self, text: str, add_special_tokens: bool) -> dict[str, list[int]]:
        return {"input_ids": list(map(ord, text))}


@pytest.mark.parametrize(
    ("response", "position", "repair"),
    [
        ("6 + 2 = 8\n8 * 8 = 60\n#### 60", 19, "4"),
        ("12 + 3 = 1\n#### 1", 10, "5"),  # a digit is missing
        ("6 + 2 = 85\n#### 85", 9, "\n"),  # a digit is too many
        ("6 + 2 = 85", 9, "\n"),
        ("6 + 2 = 8\n#### 9", None, None),  # no false equation
        ("7 / 3 = 2\n#### 2", None, None),  # no short form
    ],
)
def test_the_first_wrong_token_and_its_repair(response: str, position: int | None, repair: str | None) -> None:
    wrong = gradient.find_wrong_token(CharacterPolicy(), list(map(ord, response)))
    assert wrong == (None if position is None else gradient.WrongToken(position, ord(repair)))


def test_gains_of_changes_are_relative_to_the_own_token(policy: Policy, logratio_reward: Reward) -> None:
    [problem] = load_problems("digit_chains", max_problems=1)
    [sample] = add_draw_info(policy, [worlds.sample(policy, problem, problem.solution)], 4, 8)
    info = sample.draw_info
    [gains] = gradient.compute_gains(logratio_reward, [sample], [info], "direct")
    is_own = info.candidates == torch.tensor(sample.response_ids)[:, None]
    assert gains.shape == info.candidates.shape and torch.equal(gains.isinf(), is_own)
    best = gains.flatten().argmax()
    position, column = divmod(int(best), gains.shape[1])
    repair = int(info.candidates[position, column])

    def judge(position: int, repair: int) -> list[bool]:
        wrong = gradient.WrongToken(position, repair)
        return gradient.judge(gains, gradient.describe_wrong_response(sample, info, wrong))

    assert judge(position, repair) == [True, True, True]
    assert judge(position, -1) == [True, False, False]
    assert judge((position + 1) % len(gains), -1) == [False, False, False]


def test_the_tables_of_measured_answers() -> None:
    """A problem whose majority is wrong, and one whose false equation a calculator repairs."""
    correct = np.array([[1, 0, 0, 0], [1, 1, 0, 0]], dtype=bool)
    answers = [["1", "2", "2", "3"], ["5", "5", "6", None]]
    rewards = np.array([[5.0, 1, 1, 0], [0.0, 1, 4, 0]])
    rows = [
        [
            {
                "answer": answers[p][n],
                "computed_answer": "5" if p else answers[p][n],
                "correct": bool(correct[p, n]),
                "computed_correct": bool(p or correct[p, n]),
                "false_equation": bool(p and n >= 2),
                "logp": -float(n),
                "rewards": {"r": float(rewards[p, n])},
            }
            for n in range(4)
        ]
        for p in range(2)
    ]
    result = measure.summarize(rows, beta=1.0, logp_weight=50.0)
    slips = result["slips"]
    assert (slips["wrong"], slips["wrong with a false equation"], slips["of these right once computed"]) == (
        5 / 8,
        0.4,
        1,
    )
    ranking = result["ranking"]
    assert ranking["r"]["auc_within"]["value"] == pytest.approx((3 + 0 + 0.5 + 0 + 1) / 7)
    assert ranking["log π"]["auc_within"]["value"] == 1 and "calibration_error" not in ranking["log π"]
    written, computed = result["accuracy"]["as written"], result["accuracy"]["computed"]

    def at(table: dict, method: str, n: int) -> float:
        return table[method][n]["value"]

    assert at(written, "pass", 1) == pytest.approx(3 / 8) and at(written, "pass", 4) == 1
    assert at(written, "self-consistency", 4) == 0.5 and at(computed, "self-consistency", 4) == 0.5
    assert at(written, "best by r", 4) == 0.5 and at(written, "best by log π", 4) == 1
    assert at(written, "vote by r", 4) == 0.5  # the first problem is won by its weight, the second lost by it
    assert at(computed, "vote by r", 4) == 1
    assert at(written, "vote by log π", 4) == at(written, "best by log π", 4)  # a large weight leaves one voter
    unweighted = measure.summarize(rows, beta=1.0, logp_weight=0.0)["accuracy"]["as written"]
    assert at(unweighted, "vote by log π", 4) == at(written, "self-consistency", 4)


def test_a_constant_does_not_change_the_calibration() -> None:
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 2, size=(50, 40))
    correct = rng.random(logits.shape) < 1 / (1 + np.exp(-logits))
    errors = [
        measure.describe_ranking(scores, correct, is_logit=True)["calibration_error"]
        for scores in (logits, logits - 7, 3 * logits)
    ]
    assert errors[0] < 0.03 and errors[1] == pytest.approx(errors[0], abs=1e-6) and errors[2] > 0.08
    assert measure.fit_constant(logits.ravel(), np.ones(2000, dtype=bool)) == 0


def test_the_comparison_has_options_that_exist(capsys: pytest.CaptureFixture[str]) -> None:
    """Models and data that are not there are all that is wrong with the configuration."""
    root = Path(__file__).parents[2]
    assert main(["eval", "--config", str(root / "recipes/svamp/eval.yaml"), "--dataset", "no-such.jsonl"]) == 2
    faults = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
    assert faults and not [line for line in faults if "unknown" in line]
