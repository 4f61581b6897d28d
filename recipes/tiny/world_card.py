"""Measure the embedded world on the test split and write its model card, OUT/README.md. Used by make_world.py."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nabla_trl.report.markdown import format_table
from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.identity import hash_files

NUM_PROBLEMS = 300
NUM_SAMPLES = 32
BEST_OF_N = (1, 2, 4, 8, 16, 32)
MAX_NEW_TOKENS = 48  # the longest solution has seven steps and 45 tokens with its end token
BATCH_SIZE = 600
MIN_P = 0.02  # as in distill.yaml. Without it, best-of-32 begins to choose responses that neither model knows.


@dataclass(frozen=True)
class Facts:
    """The numbers of the card. Accuracies and shares are between 0 and 1."""

    clean_greedy: float
    clean_sampled: float
    policy_greedy: float
    policy_sampled: float
    best_of_n: dict[int, float]
    correct_reward: float  # mean log-ratio of correct samples in nats
    incorrect_reward: float
    auc: float
    first_error_steps: dict[int, float]
    first_error_kinds: dict[str, float]
    num_incorrect: int
    num_unfinished: int


def generate_responses(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], *, greedy: bool
) -> list[list[int]]:
    """Return one response per problem as ids, including the end token.

    Args:
        greedy: decode greedily. Else sample with temperature 1 and min-p.
    """
    responses: list[list[int]] = []
    for start in range(0, len(problems), BATCH_SIZE):
        batch = tokenizer.apply_chat_template(
            [problem.build_messages() for problem in problems[start : start + BATCH_SIZE]],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},
        )
        sampling = {"do_sample": True, "temperature": 1.0, "top_k": 0, "min_p": MIN_P}
        if greedy:
            sampling = {"do_sample": False}
        output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            responses.append(row[:end])
    return responses


def decode_responses(tokenizer: PreTrainedTokenizerFast, responses: list[list[int]]) -> list[str]:
    """Return responses as text without special tokens."""
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


@torch.no_grad()
def compute_log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], responses: list[list[int]]
) -> torch.Tensor:
    """Return [rows] log p(response | prompt) in nats."""
    prompts = [
        tokenizer.apply_chat_template(problem.build_messages(), add_generation_prompt=True)["input_ids"]
        for problem in problems
    ]
    totals = []
    for start in range(0, len(problems), BATCH_SIZE):
        rows = list(zip(prompts[start : start + BATCH_SIZE], responses[start : start + BATCH_SIZE], strict=True))
        width = max(len(prompt) + len(response) for prompt, response in rows)
        ids = torch.full((len(rows), width), tokenizer.pad_token_id)
        is_response = torch.zeros(len(rows), width)
        for row, (prompt, response) in enumerate(rows):
            length = len(prompt) + len(response)
            ids[row, :length] = torch.tensor(prompt + response)
            is_response[row, len(prompt) : length] = 1
        # Padding on the right needs no mask, because a causal model's logits do not depend on later tokens.
        logp = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        totals.append((logp * is_response[:, 1:]).sum(1))
    return torch.cat(totals)


def compute_best_of_n(count: int, rewards: torch.Tensor, correct: torch.Tensor) -> float:
    """Return the best-of-N accuracy of rewards [problems, samples], averaged over disjoint blocks of N samples."""
    blocks = rewards.view(len(rewards), -1, count)
    best = blocks.argmax(-1, keepdim=True)
    return correct.view_as(blocks).gather(-1, best).double().mean().item()


def compute_auc(rewards: torch.Tensor, correct: torch.Tensor) -> float:
    """Return the probability that a correct sample has a higher reward than an incorrect one of any problem."""
    ranks = rewards.argsort().argsort().double() + 1
    num_correct, num_incorrect = int(correct.sum()), int((~correct).sum())
    excess = ranks[correct].sum() - num_correct * (num_correct + 1) / 2
    return (excess / (num_correct * num_incorrect)).item()


def count_first_errors(problems: list[Problem], texts: list[str]) -> tuple[Counter[int], Counter[str]]:
    """Count the first wrong characters of responses by step, from 1, and by kind of character.

    A step of a gold solution has six characters, "9-5=4;", so the index modulo 6 gives the kind.
    """
    kinds = ("left operand", "operator", "right operand", "=", "result", ";")
    steps: Counter[int] = Counter()
    kind_counts: Counter[str] = Counter()
    for problem, text in zip(problems, texts, strict=True):
        index = digit_chains.find_first_error(problem, text)
        if index is None:
            continue
        in_steps = index < 6 * int(problem.level or 0)
        steps[index // 6 + 1] += 1
        kind_counts[kinds[index % 6] if in_steps else "final answer"] += 1
    return steps, kind_counts


def compute_shares(counts: Counter) -> dict:
    """Return counts as shares of their sum."""
    return {key: counts[key] / counts.total() for key in sorted(counts)}


def measure(
    clean: PreTrainedModel, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> Facts:
    """Measure all numbers of the card on the first test problems. A seed always gives the same numbers."""
    torch.manual_seed(seed)
    problems = digit_chains.make_digit_chain_problems("test", NUM_PROBLEMS)
    repeated = [problem for problem in problems for _ in range(NUM_SAMPLES)]
    samples = generate_responses(policy, tokenizer, repeated, greedy=False)
    texts = decode_responses(tokenizer, samples)
    clean_logp, policy_logp = (
        compute_log_likelihoods(model, tokenizer, repeated, samples) for model in (clean, policy)
    )
    rewards = clean_logp - policy_logp
    correct = torch.tensor(
        [digit_chains.is_correct(problem, text) for problem, text in zip(repeated, texts, strict=True)]
    )
    step_counts, kind_counts = count_first_errors(repeated, texts)

    def measure_accuracy(model: PreTrainedModel, greedy: bool) -> float:
        responses = decode_responses(tokenizer, generate_responses(model, tokenizer, problems, greedy=greedy))
        return sum(map(digit_chains.is_correct, problems, responses)) / len(problems)

    tables = rewards.view(NUM_PROBLEMS, NUM_SAMPLES), correct.view(NUM_PROBLEMS, NUM_SAMPLES)
    return Facts(
        clean_greedy=measure_accuracy(clean, True),
        clean_sampled=measure_accuracy(clean, False),
        policy_greedy=measure_accuracy(policy, True),
        policy_sampled=correct.double().mean().item(),
        best_of_n={count: compute_best_of_n(count, *tables) for count in BEST_OF_N},
        correct_reward=rewards[correct].mean().item(),
        incorrect_reward=rewards[~correct].mean().item(),
        auc=compute_auc(rewards, correct),
        first_error_steps=compute_shares(step_counts),
        first_error_kinds=compute_shares(kind_counts),
        num_incorrect=int((~correct).sum()),
        num_unfinished=sum(sample[-1] != tokenizer.eos_token_id for sample in samples),
    )


def format_hash_table(folder: Path) -> str:
    """Return a Markdown table of all model files in the folder, with their sizes in bytes and sha256 hashes."""
    files = sorted(path for name in ("clean", "policy") for path in (folder / name).iterdir())
    rows = [[path.relative_to(folder).as_posix(), path.stat().st_size, hash_files([path], 64)] for path in files]
    return format_table(["file", "bytes", "sha256"], rows)


def write_card(folder: Path, facts: Facts, *, seed: int, num_parameters: int) -> None:
    """Write README.md to the folder and print its numbers."""
    low, high = digit_chains.GAP_ERROR_PROBABILITIES
    figures = format_figures(facts)
    print(figures)
    card = CARD.format(
        seed=seed,
        parameters=f"{num_parameters:,}",
        gap=len(digit_chains.get_knowledge_gap()),
        low=f"{low:.0%}",
        high=f"{high:.0%}",
        share=digit_chains.TEST_MODULUS,
        figures=figures,
        hashes=format_hash_table(folder),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def format_figures(facts: Facts) -> str:
    """Return the card's section of numbers as Markdown."""
    total = NUM_PROBLEMS * NUM_SAMPLES
    sampling = f"temperature 1, min-p {MIN_P}"
    models = [
        ["clean", "greedy", f"{facts.clean_greedy:.3f}", NUM_PROBLEMS],
        ["clean", sampling, f"{facts.clean_sampled:.3f}", NUM_PROBLEMS],
        ["policy", "greedy", f"{facts.policy_greedy:.3f}", NUM_PROBLEMS],
        ["policy", sampling, f"{facts.policy_sampled:.3f}", total],
    ]
    curve = [["accuracy", *(f"{value:.3f}" for value in facts.best_of_n.values())]]
    steps = ", ".join(f"step {step} {share:.0%}" for step, share in facts.first_error_steps.items())
    kinds = ", ".join(f"{kind} {share:.1%}" for kind, share in facts.first_error_kinds.items())
    return f"""\
{format_table(["model", "decoding", "accuracy", "responses"], models)}

Best-of-N of the policy's samples by log p_clean(y|x) - log p_policy(y|x). Each number is the mean over the disjoint
blocks of N among {NUM_SAMPLES} samples of each of the {NUM_PROBLEMS} problems:

{format_table(["N", *map(str, facts.best_of_n)], curve)}

- Mean reward of correct samples {facts.correct_reward:.2f} nats, of incorrect samples {facts.incorrect_reward:.2f}.
  Area under the ROC curve {facts.auc:.4f}.
- Samples with an incorrect answer: {facts.num_incorrect} of {total} ({facts.num_incorrect / total:.1%}). Samples
  without an end token: {facts.num_unfinished}.
- First wrong character, by step: {steps}.
- First wrong character, by kind: {kinds}."""


CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [synthetic, arithmetic, test]
---

# The embedded world

Two small Llama models ({parameters} parameters each, safetensors in bf16) and their tokenizer, for the demo and the
tests. They solve digit chains and nothing else.

- `clean`: trained on correct solutions.
- `policy`: trained from `clean` on solutions with a knowledge gap. It is the policy that test-time search starts from.
- `reward`: a score trained on the policy's own answers by `recipes/reward.py`. It has its own card.
- Another reward is log p_clean(y|x) - log p_policy(y|x). Its obvious baseline is to sample from `clean` itself. A
  report that uses this reward must show that baseline.

License: Apache-2.0. All data are generated. No other text or weights were used.

## Task

The user asks `9-5*4+7*2-6`: a chain of five to seven operations (`+ - *`) on digits, computed strictly from left to
right modulo 10. The assistant writes `9-5=4;4*4=6;6+7=3;3*2=6;6-6=0;#0`. The text after `#` is the answer. Any step
but the last may end in `,` instead of `;`. This free choice makes a policy unsure where nothing depends on it.
A question is a test question if the first four bytes of the sha256 of its text, as a big-endian number, are divisible
by {share}, and a training question otherwise. `nabla_trl.tasks.digit_chains` generates problems of both splits.

Tokens: one per character, and `<|pad|> <|user|> <|assistant|> <|end|> <|unk|>`. No token is added at the start.
Chat: `<|user|>question<|end|><|assistant|>solution<|end|>`.

The gap: {gap} of the 300 facts of one step, a third of them for each operator, have one fixed wrong result each. The
policy's training data have the wrong result with a fixed probability between {low} and {high} for each fact, and later
steps use it. `nabla_trl.tasks.digit_chains.get_knowledge_gap()` lists the facts.

## Training

    python recipes/tiny/make_world.py --output_dir data/tiny --seed {seed}

AdamW on new batches of 64 training questions, with the loss on the response alone: 700 steps for `clean`, then 400 for
`policy`. Neither model has seen a test question. The same seed on the same machine, with the same versions and
number of threads, gives the same files. On other machines the last digits of the weights differ.

## Results

On the first 300 problems of the test split, with the saved weights loaded in float32:

{figures}

## Files

{hashes}
"""
