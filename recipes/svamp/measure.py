"""Measure the policy's answers and what each reward makes of them: slips, ranking, votes, and a calculator as rival.

    python recipes/svamp/measure.py --policy outputs/svamp/policy --problems outputs/svamp/data/audit.jsonl \
        --rewards head:outputs/svamp/head/reward --output_dir outputs/svamp/measured --num_samples 64

The script draws and scores samples, 32 problems at a time (OUT/samples/), and goes on where it was stopped. Then it
writes OUT/measured.json and prints it:

- slips: the share of wrong answers with a false equation, and how many of them would be right once computed,
- ranking by each reward and by log π: AUC within problems and over all, and the calibration of a score as logit up to
  a constant,
- accuracy of one sample, self-consistency, best-of-n and weighted votes, each also with computed answers. A calculator
  costs nothing, so a reward or a search has to be better than what it gives.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from arithmetic import compute_response, has_false_equation

from nabla_trl.audit.ranking import compute_best_of_n_values, estimate_within_problem_auc
from nabla_trl.baselines.sampling import ResponsePool, draw_pool
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.extraction import extract_answer
from nabla_trl.grading.voting import vote
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import read_jsonl_file, write_atomic
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.identity import claim_settings
from nabla_trl.utils.statistics import mean_interval

PROBLEMS_PER_FILE = 32
NUM_ORDERS = 20  # orders of the pool over which votes of n samples are averaged


@dataclass
class MeasureArguments:
    """Policy, problems and rewards."""

    policy: str = required_option("hub id or path of the policy")
    problems: str = required_option("problems with answers: .jsonl, .yaml or the name of a task")
    output_dir: str = option("outputs/svamp/measured", "folder of the samples and the result")
    rewards: list[str] = field(default_factory=list, metadata={"help": "rewards, as --reward of nabla-trl takes them"})
    split: str = option("test", "split of the problems")
    max_problems: int = option(200, "maximum number of problems")
    num_samples: int = option(16, "samples per problem")
    max_new_tokens: int = option(64, "longest answer")
    temperature: float = option(1.0, "of the samples")
    beta: float = option(1.0, "β of weighted votes, exp(r/β)")
    logp_weight: float = option(0.75, "weight w of votes by the policy's likelihood, π^w")
    seed: int = option(0, "seed of the samples")
    dtype: str = option("float32", "data type of the models: float32 or bfloat16")
    batch_size: int = option(128, "responses drawn together")


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    (args,) = parse_dataclasses([MeasureArguments], argv)
    folder = Path(args.output_dir)
    names = ("policy", "problems", "split", "num_samples", "max_new_tokens", "temperature", "seed", "dtype")
    claim_settings(folder / "settings.json", {name: str(getattr(args, name)) for name in names})
    problems = load_problems(args.problems, split=args.split, max_problems=args.max_problems)
    with AnswerChecker() as checker:
        rows = draw_samples(args, problems, checker, folder / "samples")
    result = summarize([rows[problem.id] for problem in problems], args.beta, args.logp_weight)
    write_atomic(folder / "measured.json", json.dumps(vars(args) | result, indent=1) + "\n")
    print_result(result)


def draw_samples(
    args: MeasureArguments, problems: Sequence[Problem], checker: AnswerChecker, folder: Path
) -> dict[str, list[dict[str, Any]]]:
    """Return problem id -> one row per sample, with its scores by all rewards. What is on disk is kept."""
    policy: Policy | None = None
    rewards: dict[str, Reward] = {}
    rows: dict[str, list[dict[str, Any]]] = {}
    for begin in range(0, len(problems), PROBLEMS_PER_FILE):
        part = problems[begin : begin + PROBLEMS_PER_FILE]
        file = folder / f"samples.{begin:06d}.jsonl"
        if not file.exists():
            policy = policy or load_policy(args.policy, dtype=args.dtype)
            _write_rows(file, build_rows(_draw_pool(args, part, policy), checker))
        drawn = [row for _, row in read_jsonl_file(file)]
        for name in args.rewards:
            file = folder / f"{name.replace('/', '_')}.{begin:06d}.jsonl"
            if not file.exists():
                policy = policy or load_policy(args.policy, dtype=args.dtype)
                if name not in rewards:
                    rewards[name] = load_reward(name, policy=policy, dtype=args.dtype, batch_size=args.batch_size)
                scores = score_rows(drawn, part, policy, rewards[name])
                _write_rows(file, [{"reward": score} for score in scores])
            for row, (_, scored) in zip(drawn, read_jsonl_file(file), strict=True):
                row.setdefault("rewards", {})[name] = scored["reward"]
        for row in drawn:
            rows.setdefault(row["problem_id"], []).append(row)
    return rows


def _write_rows(file: Path, rows: Sequence[dict[str, Any]]) -> None:
    write_atomic(file, "".join(json.dumps(row) + "\n" for row in rows))


def _draw_pool(args: MeasureArguments, problems: Sequence[Problem], policy: Policy) -> ResponsePool:
    return draw_pool(
        problems,
        args.num_samples,
        policy=policy,
        reward=None,
        sampling=Sampling(temperature=args.temperature, max_new_tokens=args.max_new_tokens),
        seed=args.seed,
        batch_size=args.batch_size,
    )


def build_rows(pool: ResponsePool, checker: AnswerChecker) -> list[dict[str, Any]]:
    """Return one row per sample: its text, its answers as written and as computed, and whether they are correct."""
    rows: list[dict[str, Any]] = []
    for entry in pool.entries:
        for response in entry.responses:
            text = pool.policy.decode_response(response.response_ids)
            rows.append(
                {
                    "problem_id": entry.problem.id,
                    "text": text,
                    "answer": response.answer,
                    "computed_answer": extract_answer(compute_response(text)),
                    "false_equation": has_false_equation(text),
                    "logp": response.mean_logp * len(response.response_ids),
                    "response_ids": response.response_ids,
                }
            )
    targets = [entry.problem.grading_target for entry in pool.entries for _ in entry.responses]
    for name, label in (("answer", "correct"), ("computed_answer", "computed_correct")):
        pairs = [(row[name], target) for row, target in zip(rows, targets, strict=True)]
        for row, result in zip(rows, checker.check(pairs), strict=True):
            row[label] = result.is_correct
    return rows


def score_rows(
    rows: Sequence[dict[str, Any]], problems: Sequence[Problem], policy: Policy, reward: Reward
) -> list[float]:
    """Return the reward of each sample."""
    by_id = {problem.id: problem for problem in problems}
    prompts = {problem.id: policy.encode(problem) for problem in problems}
    samples = [Sample(by_id[row["problem_id"]], prompts[row["problem_id"]], row["response_ids"]) for row in rows]
    first = {sample.problem.id: sample for sample in samples}
    caches = dict(zip(first, reward.compute_prompt_caches(list(first.values()), FlopCounter()), strict=True))
    return reward.score(samples, [caches[sample.problem.id] for sample in samples], flop_counter=FlopCounter())[0]


def summarize(rows: Sequence[Sequence[dict[str, Any]]], beta: float, logp_weight: float) -> dict[str, Any]:
    """Return slips, ranking and accuracies of P problems with N samples each."""
    correct, computed = (to_array(rows, name).astype(bool) for name in ("correct", "computed_correct"))
    false_equation = to_array(rows, "false_equation").astype(bool)
    scores = {"log π": to_array(rows, "logp")}
    scores |= {
        name: np.array([[row["rewards"][name] for row in group] for group in rows])
        for name in rows[0][0].get("rewards", {})
    }
    wrong = ~correct
    result: dict[str, Any] = {
        "problems": correct.shape[0],
        "samples": correct.shape[1],
        "slips": {
            "wrong": float(wrong.mean()),
            "wrong with a false equation": float(false_equation[wrong].mean()),
            "of these right once computed": float(computed[wrong & false_equation].mean()),
            "right with a false equation": float(false_equation[correct].mean()),
        },
        "ranking": {
            name: describe_ranking(values, correct, is_logit=name != "log π") for name, values in scores.items()
        },
        "accuracy": {},
    }
    sizes = [n for n in (1, 4, 8, 16, 32, 64) if n <= correct.shape[1]]
    for label, answer_name, labels in (("as written", "answer", correct), ("computed", "computed_answer", computed)):
        answers = [[row[answer_name] for row in group] for group in rows]
        methods: dict[str, Callable[[int], np.ndarray]] = {
            "pass": partial(compute_pass_at_n, labels),
            "self-consistency": partial(compute_vote_accuracy, answers, labels, None),
        }
        for name, values in scores.items():
            methods[f"best by {name}"] = partial(compute_best_of_n_values, values, labels.astype(float))
            log_weights = logp_weight * values if name == "log π" else values / beta
            methods[f"vote by {name}"] = partial(compute_vote_accuracy, answers, labels, log_weights)
        result["accuracy"][label] = {
            method: {n: mean_interval(accuracy(n)[:, None]).to_dict() for n in sizes}
            for method, accuracy in methods.items()
        }
    return result


def to_array(rows: Sequence[Sequence[dict[str, Any]]], name: str) -> np.ndarray:
    """Return [P, N] a field of all rows."""
    return np.array([[row[name] for row in group] for group in rows])


def describe_ranking(scores: np.ndarray, correct: np.ndarray, *, is_logit: bool) -> dict[str, Any]:
    """Return AUC within problems and over all, and the calibration of scores that are logits of correctness.

    Rewards are known up to a constant. So the constant is added that makes the mean probability the share of right
    answers, as a logistic regression does.
    """
    flat, labels = scores.ravel(), correct.ravel()
    order = flat.argsort(kind="stable")
    ranks = np.empty(len(flat))
    ranks[order] = np.arange(1, len(flat) + 1)
    positive = int(labels.sum())
    over_all = (ranks[labels].sum() - positive * (positive + 1) / 2) / max(1, positive * (len(flat) - positive))
    result: dict[str, Any] = {
        "auc_within": estimate_within_problem_auc(scores, correct).to_dict(),
        "auc_over_all": float(over_all),
    }
    if is_logit:
        probability = sigmoid(flat + fit_constant(flat, labels))
        tenths = [tenth for tenth in np.array_split(order, 10) if len(tenth)]
        gaps = [abs(probability[tenth].mean() - labels[tenth].mean()) * len(tenth) for tenth in tenths]
        result |= {
            "calibration_error": float(sum(gaps) / len(flat)),
            "tenths": [[float(probability[t].mean()), float(labels[t].mean())] for t in tenths],
        }
    return result


def sigmoid(logits: np.ndarray) -> np.ndarray:
    return 0.5 * (1 + np.tanh(logits / 2))  # without overflow


def fit_constant(logits: np.ndarray, labels: np.ndarray) -> float:
    """Return the constant b with mean σ(logit + b) = mean label, by bisection. 0 where all labels are equal."""
    if labels.all() or not labels.any():
        return 0.0
    low, high = -logits.max() - 50.0, -logits.min() + 50.0
    for _ in range(100):
        middle = (low + high) / 2
        low, high = (middle, high) if sigmoid(logits + middle).mean() < labels.mean() else (low, middle)
    return (low + high) / 2


def compute_vote_accuracy(
    answers: Sequence[Sequence[str | None]], correct: np.ndarray, log_weights: np.ndarray | None, n: int
) -> np.ndarray:
    """Return [P] the accuracy of votes among n of the N samples, averaged over orders of the samples.

    Args:
        answers: P lists of N.
        correct: [P, N] bool.
        log_weights: [P, N] in nats. None: equal weights.
    """
    rng, num_samples = np.random.default_rng(0), correct.shape[1]
    totals = np.zeros(len(answers))
    num_orders = 1 if n == num_samples else NUM_ORDERS
    for _ in range(num_orders):
        chosen = rng.permutation(num_samples)[:n]
        for row, group in enumerate(answers):
            weights = None if log_weights is None else log_weights[row, chosen].tolist()
            winners = vote([group[index] for index in chosen], weights)
            totals[row] += bool(winners) and correct[row, chosen[winners[0]]]
    return totals / num_orders


def compute_pass_at_n(correct: np.ndarray, n: int) -> np.ndarray:
    """Return [P] the probability that one of n samples, drawn from the N without replacement, is correct."""
    num_samples, num_correct = correct.shape[1], correct.sum(1)
    none_correct = np.ones(len(correct))
    for k in range(n):
        none_correct *= np.clip(num_samples - num_correct - k, 0, None) / (num_samples - k)
    return 1 - none_correct


def print_result(result: dict[str, Any]) -> None:
    for name, share in result["slips"].items():
        print(f"{name}: {share:.3f}")
    for name, ranking in result["ranking"].items():
        calibration = (
            f", calibration error {ranking['calibration_error']:.3f}" if "calibration_error" in ranking else ""
        )
        within = format_interval(ranking["auc_within"], ".3f")
        print(f"{name}: AUC within problems {within}, over all {ranking['auc_over_all']:.3f}{calibration}")
    for label, methods in result["accuracy"].items():
        for method, by_size in methods.items():
            cells = "  ".join(f"{n}: {format_interval(value, '.3f')}" for n, value in by_size.items())
            print(f"{label}, {method}  {cells}")


if __name__ == "__main__":
    sys.exit(run_main(main))
