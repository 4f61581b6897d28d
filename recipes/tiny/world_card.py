"""Measure the embedded world on the test split and write its card (OUT/README.md); used by make_world.py."""

from __future__ import annotations

import hashlib
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem

PROBLEMS = 300
SAMPLES = 32
BEST_OF = (1, 2, 4, 8, 16, 32)
MAX_NEW_TOKENS = 48  # the longest solution, seven steps, has 45 tokens with its end
BATCH = 600
MIN_P = 0.02  # as in distill.yaml: without it, best-of-32 begins to pick responses that neither model knows


@dataclass(frozen=True)
class Facts:
    """What the card says; accuracies and shares are between 0 and 1."""

    clean_greedy: float
    clean_sampled: float
    policy_greedy: float
    policy_sampled: float
    best_of: dict[int, float]
    reward_right: float  # mean log-ratio of right samples, nats
    reward_wrong: float
    auc: float
    first_error_step: dict[int, float]
    first_error_place: dict[str, float]
    wrong: int
    unfinished: int


def respond(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, problems: list[Problem], *, greedy: bool
) -> list[list[int]]:
    """One response per problem, as ids up to and with the end token; sampled (temperature 1, min-p) unless greedy."""
    responses: list[list[int]] = []
    for start in range(0, len(problems), BATCH):
        batch = tokenizer.apply_chat_template(
            [problem.build_messages() for problem in problems[start : start + BATCH]],
            add_generation_prompt=True,
            padding=True,
            return_dict=True,
            return_tensors="pt",
            tokenizer_kwargs={"padding_side": "left"},
        )
        sampled = {"do_sample": True, "temperature": 1.0, "top_k": 0, "min_p": MIN_P}
        sampling = {"do_sample": False} if greedy else sampled
        output = model.generate(**batch, max_new_tokens=MAX_NEW_TOKENS, **sampling)
        for row in output[:, batch["input_ids"].shape[1] :].tolist():
            end = row.index(tokenizer.eos_token_id) + 1 if tokenizer.eos_token_id in row else len(row)
            responses.append(row[:end])
    return responses


def texts(tokenizer: PreTrainedTokenizerFast, responses: list[list[int]]) -> list[str]:
    """Responses as text without special tokens."""
    return tokenizer.batch_decode(responses, skip_special_tokens=True)


def accuracy(problems: list[Problem], written: list[str]) -> float:
    """Share of responses whose final answer is right."""
    return sum(map(digit_chains.is_correct, problems, written)) / len(problems)


@torch.no_grad()
def log_likelihoods(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerFast,
    problems: list[Problem],
    responses: list[list[int]],
) -> torch.Tensor:
    """log p(response | prompt) of each row, in nats, summed over its tokens; shape (rows,)."""
    prompts = [
        tokenizer.apply_chat_template(p.build_messages(), add_generation_prompt=True)["input_ids"] for p in problems
    ]
    totals = []
    for start in range(0, len(problems), BATCH):
        pairs = list(zip(prompts[start : start + BATCH], responses[start : start + BATCH], strict=True))
        width = max(len(prompt) + len(response) for prompt, response in pairs)
        ids = torch.full((len(pairs), width), tokenizer.pad_token_id)
        scored = torch.zeros(len(pairs), width)
        for row, (prompt, response) in enumerate(pairs):
            length = len(prompt) + len(response)
            ids[row, :length] = torch.tensor(prompt + response)
            scored[row, len(prompt) : length] = 1
        # Padded on the right: a causal model's scores do not depend on what follows, so no mask is needed.
        steps = model(input_ids=ids).logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None]).squeeze(-1)
        totals.append((steps * scored[:, 1:]).sum(1))
    return torch.cat(totals)


def best_of(count: int, rewards: torch.Tensor, right: torch.Tensor) -> float:
    """Best-of-`count` accuracy from problems × samples tensors: the mean over disjoint blocks of `count` samples."""
    blocks = rewards.view(len(rewards), -1, count)
    chosen = blocks.argmax(-1, keepdim=True)
    return right.view_as(blocks).gather(-1, chosen).double().mean().item()


def auc(rewards: torch.Tensor, right: torch.Tensor) -> float:
    """Probability that a right sample has a higher reward than a wrong one, over all problems together."""
    ranks = rewards.argsort().argsort().double() + 1
    positives, negatives = int(right.sum()), int((~right).sum())
    return ((ranks[right].sum() - positives * (positives + 1) / 2) / (positives * negatives)).item()


def first_errors(problems: list[Problem], written: list[str]) -> tuple[Counter[int], Counter[str]]:
    """Where responses first depart from the gold solution: by step (from 1) and by kind of character.

    A gold step is six characters long, "9-5=4;", so the index modulo 6 tells the kind.
    """
    kinds = ("left operand", "operator", "right operand", "=", "result", ";")
    steps: Counter[int] = Counter()
    places: Counter[str] = Counter()
    for problem, text in zip(problems, written, strict=True):
        index = digit_chains.find_first_error(problem, text)
        if index is None:
            continue
        in_steps = index < 6 * int(problem.level or 0)
        steps[index // 6 + 1] += 1
        places[kinds[index % 6] if in_steps else "final answer"] += 1
    return steps, places


def shares(counts: Counter) -> dict:
    """Counts as shares of their sum, by key."""
    return {key: counts[key] / counts.total() for key in sorted(counts)}


def measure(
    clean: PreTrainedModel, policy: PreTrainedModel, tokenizer: PreTrainedTokenizerFast, *, seed: int
) -> Facts:
    """Every figure of the card, on the first 300 test problems; deterministic for a seed."""
    torch.manual_seed(seed)
    problems = digit_chains.make_digit_chain_problems("test", PROBLEMS)
    many = [problem for problem in problems for _ in range(SAMPLES)]
    samples = respond(policy, tokenizer, many, greedy=False)
    written = texts(tokenizer, samples)
    rewards = log_likelihoods(clean, tokenizer, many, samples) - log_likelihoods(policy, tokenizer, many, samples)
    right = torch.tensor([digit_chains.is_correct(problem, text) for problem, text in zip(many, written, strict=True)])
    steps, places = first_errors(many, written)

    def scored(model: PreTrainedModel, greedy: bool) -> float:
        return accuracy(problems, texts(tokenizer, respond(model, tokenizer, problems, greedy=greedy)))

    grid = rewards.view(PROBLEMS, SAMPLES), right.view(PROBLEMS, SAMPLES)
    return Facts(
        clean_greedy=scored(clean, True),
        clean_sampled=scored(clean, False),
        policy_greedy=scored(policy, True),
        policy_sampled=right.double().mean().item(),
        best_of={count: best_of(count, *grid) for count in BEST_OF},
        reward_right=rewards[right].mean().item(),
        reward_wrong=rewards[~right].mean().item(),
        auc=auc(rewards, right),
        first_error_step=shares(steps),
        first_error_place=shares(places),
        wrong=int((~right).sum()),
        unfinished=sum(sample[-1] != tokenizer.eos_token_id for sample in samples),
    )


def hash_table(folder: Path) -> str:
    """Markdown table of every model file under the folder, with its size in bytes and its sha256."""
    files = sorted(path for name in ("clean", "policy") for path in (folder / name).iterdir())
    rows = [f"| {path.relative_to(folder).as_posix()} | {path.stat().st_size} | {_sha256(path)} |" for path in files]
    return "\n".join(["| file | bytes | sha256 |", "| --- | --- | --- |", *rows])


def write_card(folder: Path, facts: Facts, *, seed: int, parameters: int) -> None:
    """Write README.md into the folder and print its figures."""
    low, high = digit_chains.GAP_ERROR_PROBABILITIES
    figures = _figures(facts)
    print(figures)
    card = CARD.format(
        seed=seed,
        parameters=f"{parameters:,}",
        gap=len(digit_chains.get_knowledge_gap()),
        low=f"{low:.0%}",
        high=f"{high:.0%}",
        share=digit_chains.TEST_MODULUS,
        figures=figures,
        hashes=hash_table(folder),
    )
    (folder / "README.md").write_text(card, encoding="utf-8")


def _sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def _figures(facts: Facts) -> str:
    curve = " | ".join(f"{value:.3f}" for value in facts.best_of.values())
    steps = ", ".join(f"step {step} {share:.0%}" for step, share in facts.first_error_step.items())
    places = ", ".join(f"{place} {share:.1%}" for place, share in facts.first_error_place.items())
    total = PROBLEMS * SAMPLES
    return f"""\
| model | decoding | accuracy | responses |
| --- | --- | --- | --- |
| clean | greedy | {facts.clean_greedy:.3f} | {PROBLEMS} |
| clean | temperature 1, min-p {MIN_P} | {facts.clean_sampled:.3f} | {PROBLEMS} |
| policy | greedy | {facts.policy_greedy:.3f} | {PROBLEMS} |
| policy | temperature 1, min-p {MIN_P} | {facts.policy_sampled:.3f} | {total} |

Best-of-N of the policy's samples by log p_clean(y|x) - log p_policy(y|x); each figure is the mean
over the disjoint blocks of N among {SAMPLES} samples of each of the {PROBLEMS} problems:

| N | {" | ".join(map(str, facts.best_of))} |
| --- |{" --- |" * len(facts.best_of)}
| accuracy | {curve} |

- Mean reward of right samples {facts.reward_right:.2f} nats, of wrong samples {facts.reward_wrong:.2f}; area under the
  ROC curve {facts.auc:.4f}.
- Samples with a wrong answer: {facts.wrong} of {total} ({facts.wrong / total:.1%}); samples without an end token:
  {facts.unfinished}.
- First wrong character, by step: {steps}.
- First wrong character, by kind: {places}."""


CARD = """\
---
license: apache-2.0
library_name: transformers
tags: [synthetic, arithmetic, test]
---

# The embedded world

Two small Llama models ({parameters} parameters each, safetensors in bf16) and their tokenizer, for the demo and the
tests. They work digit chains and are good for nothing else.

- `clean`: trained on right solutions.
- `policy`: trained on from `clean` on solutions with a knowledge gap. It is what test-time search starts from.
- `reward`: a score trained on the policy's own answers by `recipes/reward.py`, with a card of its own; made apart.
- Another reward: log p_clean(y|x) - log p_policy(y|x). Its obvious rival is to sample from `clean` itself, and a
  report that uses it must show that beside it.

Licence Apache-2.0. All data are procedural: no outside text or weights went in.

## Task

The user asks `9-5*4+7*2-6`: a chain of five to seven operations (`+ - *`) on digits, worked strictly from left to
right modulo 10. The assistant writes `9-5=4;4*4=6;6+7=3;3*2=6;6-6=0;#0`; what follows `#` is the answer. Any step
but the last may end in `,` instead of `;`: a free choice, so that a policy is often unsure where nothing is at stake.
A question is a test question if the first four bytes of the sha256 of its text, as a big-endian number, divide by
{share}, and a train question otherwise. `nabla_trl.tasks.digit_chains` makes problems of both.

Tokens: one per character, and `<|pad|> <|user|> <|assistant|> <|end|> <|unk|>`. No token is added at the start.
Chat: `<|user|>question<|end|><|assistant|>solution<|end|>`.

The gap: {gap} of the 300 single-step facts, a third of them for each operator, have one fixed wrong result each,
which the policy's training data holds with a probability between {low} and {high}, fixed for each fact; later steps
go on from it. `nabla_trl.tasks.digit_chains.knowledge_gap()` lists them.

## How it was made

    python recipes/tiny/make_world.py --out data/tiny --seed {seed}

AdamW on fresh batches of 64 train questions, loss on the response alone: 700 steps for `clean`, then 400 for
`policy`. Neither model has seen a test question. The same seed on the same machine, with the same versions and
number of threads, gives the same files; elsewhere the weights differ in the last digits.

## Measured

On the first 300 problems of the test split, with the saved weights loaded in float32:

{figures}

## Files

{hashes}
"""
