"""Measure if the gradient of a reward finds the first wrong digit of an answer, and its repair.

    python recipes/svamp/gradient.py --policy outputs/svamp/policy --problems outputs/svamp/data/audit.jsonl \
        --measured outputs/svamp/measured --rewards power:1.75 outputs/svamp/implicit/reward

The answers are those that recipes/svamp/measure.py drew: one wrong answer with a false equation for each problem. The
first digit that a calculator writes otherwise is the wrong token, and the calculator's digit is its repair. Three
shares are printed for each reward and each point at which its gradient is taken:

- found: of all changes of one token to one of the policy's candidates, the one with the largest gain is at that token,
- repaired: at that token, the candidate with the largest gain is the right digit,
- both.

Beside them stand the least likely token and the position where the policy is most uncertain, which cost nothing.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np
import torch
from arithmetic import find_false_equation
from torch import Tensor

from nabla_trl.audit.first_errors import WrongResponse
from nabla_trl.audit.swaps import SampledResponse
from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import GradientPoint
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import find_token_columns
from nabla_trl.reward_training.data import add_draw_info
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import read_jsonl_file, write_atomic
from nabla_trl.utils.formatting import format_interval
from nabla_trl.utils.statistics import proportion_interval


@dataclass
class GradientArguments:
    """Policy, answers and rewards."""

    policy: str = required_option("hub id or path of the policy")
    problems: str = required_option("problems of the answers: .jsonl, .yaml or the name of a task")
    measured: str = required_option("folder that recipes/svamp/measure.py wrote")
    output_file: str = option("outputs/svamp/gradient.json", "file of the shares")
    rewards: list[str] = field(default_factory=list, metadata={"help": "rewards, as --reward of nabla-trl takes them"})
    gradient_at: list[str] = field(
        default_factory=lambda: ["direct", "hard"],
        metadata={"help": "where gradients are taken (--solver.gradient_at)"},
    )
    split: str = option("test", "split of the problems")
    max_answers: int = option(64, "wrong answers, one for each problem")
    top_k_candidates: int = option(16, "tokens of the policy considered at each position")
    batch_size: int = option(16, "answers read together")
    dtype: str = option("float32", "data type of the models: float32 or bfloat16")


@dataclass(frozen=True)
class WrongToken:
    """The first wrong digit of an answer.

    Attributes:
        position: of its token in the response.
        repair: the token of the right digit.
    """

    position: int
    repair: int


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    (args,) = parse_dataclasses([GradientArguments], argv)
    policy = load_policy(args.policy, dtype=args.dtype)
    problems = {problem.id: problem for problem in load_problems(args.problems, split=args.split)}
    samples, wrong_tokens = read_wrong_answers(args, policy, problems)
    samples = add_draw_info(policy, samples, args.top_k_candidates, args.batch_size)
    infos = [sample.draw_info for sample in samples if sample.draw_info is not None]
    responses = list(map(describe_wrong_response, samples, infos, wrong_tokens))
    result: dict[str, Any] = {
        "answers": len(samples),
        "chance": sum(1 / len(sample.response_ids) for sample in samples) / len(samples),
        "right token among the candidates": mean(response.is_repairable for response in responses),
        "largest entropy": mean(response.rank_error_by_entropy() == 0 for response in responses),
        "least likely token": mean(
            int(info.gather_response_logp(sample.response_ids).argmin()) == wrong.position
            for sample, info, wrong in zip(samples, infos, wrong_tokens, strict=True)
        ),
    }
    for name in args.rewards:
        reward = load_reward(name, policy=policy, dtype=args.dtype, batch_size=args.batch_size)
        for point in args.gradient_at:
            gains = compute_gains(reward, samples, infos, point)
            judged = list(map(judge, gains, responses))
            result[f"{name}, {point}"] = {
                share: proportion_interval(np.array(values, dtype=float)[:, None]).to_dict()
                for share, values in zip(("found", "repaired", "both"), zip(*judged, strict=True), strict=True)
            }
    write_atomic(Path(args.output_file), json.dumps(vars(args) | result, indent=1) + "\n")
    for name, value in result.items():
        shares = value.items() if isinstance(value, dict) else [("", value)]
        cells = [
            f"{share} {format_interval(share_value, '.3f')}" if share else f"{share_value:.3g}"
            for share, share_value in shares
        ]
        print(f"{name}: {', '.join(cells)}")


def read_wrong_answers(
    args: GradientArguments, policy: Policy, problems: dict[str, Problem]
) -> tuple[list[Sample], list[WrongToken]]:
    """Return one wrong answer for each problem that has one, with its first wrong token."""
    samples: dict[str, Sample] = {}
    wrong_tokens: list[WrongToken] = []
    for file in sorted(Path(args.measured, "samples").glob("samples.*.jsonl")):
        for _, row in read_jsonl_file(file):
            problem = problems.get(row["problem_id"])
            if problem is None or problem.id in samples or row["correct"] or len(samples) == args.max_answers:
                continue
            wrong = find_wrong_token(policy, row["response_ids"])
            if wrong is not None:
                samples[problem.id] = Sample(problem, policy.encode(problem), row["response_ids"])
                wrong_tokens.append(wrong)
    if not samples:
        raise ValueError(f"{args.measured} holds no wrong answer with a false equation to these problems")
    return list(samples.values()), wrong_tokens


def find_wrong_token(policy: Policy, response_ids: list[int]) -> WrongToken | None:
    """Return the first token that a calculator writes otherwise, or None if no single token repairs it."""
    text = policy.decode(response_ids)
    found = find_false_equation(text)
    if found is None or not found[1]:
        return None
    begin, value = found
    written, right = text[begin:] + "\0", value + "\n"
    offset = next(index for index, (a, b) in enumerate(zip(written, right, strict=False)) if a != b)
    ends = (len(policy.decode(response_ids[: position + 1])) for position in range(len(response_ids)))
    position = next(position for position, end in enumerate(ends) if end > begin + offset)
    repair = policy.tokenizer(right[offset], add_special_tokens=False)["input_ids"]
    return WrongToken(position, repair[0]) if len(repair) == 1 and repair[0] != response_ids[position] else None


def compute_gains(
    reward: Reward, samples: Sequence[Sample], infos: Sequence[DrawInfo], point: str
) -> Iterator[Tensor]:
    """Yield [T, K] the predicted gain of each candidate over the token of the response, per sample."""
    flops = FlopCounter()
    caches = reward.compute_prompt_caches(samples, flops)
    _, response_caches = reward.score(samples, caches, flop_counter=flops, return_caches=True)
    gradients = reward.compute_gradient(
        samples,
        caches,
        response_caches,
        [info.candidates for info in infos],
        flop_counter=flops,
        gradient_at=GradientPoint.parse(point),
    )
    for sample, info, gradient in zip(samples, infos, gradients, strict=True):
        columns = find_token_columns(info.candidates, sample.response_ids)[:, None]
        gains = gradient.float() - gradient.float().gather(1, columns)
        yield gains.scatter(1, columns, -torch.inf)


def describe_wrong_response(sample: Sample, info: DrawInfo, wrong: WrongToken) -> WrongResponse:
    """Return the answer as the audit of gradients judges it. Every candidate but the token itself may be proposed."""
    columns = find_token_columns(info.candidates, sample.response_ids)[:, None]
    allowed = torch.ones_like(info.candidates, dtype=torch.bool).scatter(1, columns, False)
    response = SampledResponse(sample, info, 0, finished=True, allowed_swaps=allowed, prompt_caches=[])
    return WrongResponse(0, response, wrong.position, info.candidates[wrong.position] == wrong.repair)


def judge(gains: Tensor, response: WrongResponse) -> list[bool]:
    """Return if the largest gain is at the wrong token, if it is the repair there, and both."""
    is_found = response.rank_error_by_swap(gains) == 0
    return [is_found, response.is_repaired_at_error(gains), response.is_repaired(gains)]


if __name__ == "__main__":
    sys.exit(run_main(main))
