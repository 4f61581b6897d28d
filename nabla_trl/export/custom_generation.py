"""The reasoner behind transformers' `model.generate(custom_generate=FOLDER, trust_remote_code=True, ...)`.

A shipped folder holds `custom_generate/generate.py`, a copy of the file of that name here, which imports this room.
transformers calls `generate` with the model, what the caller gave, and its own optional arguments as None.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.models.loading import DTYPES, freeze_policy
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import check_prompt, render_chat_template, tokenize_prompt
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.reasoner import as_problem
from nabla_trl.tasks.problem import Problem

_QUESTION_SENTINEL = "\x02question\x03"


@dataclass
class FixedPromptsPolicy(Policy):
    """A policy whose prompts are given as ids, by problem id; `Policy.encode` would write them by the template."""

    prompts: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, problem: Problem) -> list[int]:
        given = self.prompts[problem.id]
        return check_prompt(given, problem, self.tokenizer, name=self.name, context_length=self.context_length)


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: str | Reward | None = None,
    seed: int = 0,
    messages: Sequence[Any] | None = None,
    preset: str = "default",
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Refine a response to every prompt, as `NablaReasoner.solve` does: row n is its question n under the same seed.

    Args:
        model: a causal LM, a PEFT adapter on it included.
        inputs, input_ids: [B, T] prompts, padded on the left (or the right).
        attention_mask: [B, T], 0 where padding is; None: where the pad token is, unless it also ends responses.
        tokenizer: the model's.
        reward: its name, loaded anew at every call (`load_reward`); or a reward loaded for
            `freeze_policy(model, tokenizer, "policy")`.
        messages: per row the question or chat that its prompt was made from, for a reward that reads questions by a
            chat template of its own; None: it is read out of the ids, if they are one user turn.
        options: of `ReasonerConfig`, over the preset's.

    Returns:
        [B, T + longest response] prompts and responses, padded on the right by the pad token, as `model.generate`.

    Raises:
        ValueError: an argument that is missing or means nothing here, prompts that cannot be read, or a row that could
            not be run.
    """
    ids = inputs if input_ids is None else input_ids
    if ids is None or tokenizer is None or reward is None:
        needed = {"input_ids": ids, "tokenizer": tokenizer, "reward": reward}
        missing = ", ".join(name for name, given in needed.items() if given is None)
        raise ValueError(f"custom generation by nabla_trl needs {missing}")
    config = SearchConfig.from_preset(preset, **_select_search_options(options))
    with _freeze_temporarily(model):
        # Not under the model's own name: with an adapter on it, it is not what a reward means by that.
        frozen = freeze_policy(model, tokenizer, f"{type(model).__name__} in memory")
        prompts = _remove_padding(
            ids, _infer_attention_mask(ids, frozen) if attention_mask is None else attention_mask
        )
        if messages is not None and len(messages) != len(prompts):
            raise ValueError(f"messages must hold a question or chat for each of {len(prompts)} rows: {len(messages)}")
        policy = FixedPromptsPolicy(**vars(frozen), prompts={f"question/{n}": row for n, row in enumerate(prompts)})
        problems = [_build_problem(policy, index, prompt, messages) for index, prompt in enumerate(prompts)]
        if isinstance(reward, str):
            reward = load_reward(reward, policy=frozen, dtype=_get_dtype_name(model), device=str(model.device))
        traces = run_search(problems, policy=policy, reward=reward, config=config, seed=seed)
    failed = next((trace for trace in traces if trace.error is not None), None)
    if failed is not None:
        raise ValueError(f"{failed.problem_id}: {failed.error}")
    return _append_padded(ids, [trace.response_ids for trace in traces], _get_pad_token(tokenizer))


def _select_search_options(options: dict[str, Any]) -> dict[str, Any]:
    """What is left once transformers' own arguments that nobody gave are gone.

    Raises:
        ValueError: one that somebody gave.
    """
    known = {option.name for option in fields(SearchConfig)}
    given = {name: value for name, value in options.items() if name in known or value is not None}
    odd = sorted(set(given) - known)
    if odd:
        raise ValueError(
            f"custom generation by nabla_trl does not take {odd[0]!r}: its options are {', '.join(sorted(known))}"
        )
    return given


@contextmanager
def _freeze_temporarily(model: PreTrainedModel) -> Iterator[None]:
    """A search freezes the model; its caller gets it back as it was."""
    training, trained = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    try:
        with (
            torch.inference_mode(False),
            torch.enable_grad(),
        ):  # `model.generate` runs without; token gradients need it
            yield
    finally:
        model.train(training)
        for weight in trained:
            weight.requires_grad_(True)


def _infer_attention_mask(ids: Tensor, policy: Policy) -> Tensor:
    pad = policy.tokenizer.pad_token_id
    return torch.ones_like(ids) if pad is None or pad in policy.stop_ids else (ids != pad).long()


def _remove_padding(ids: Tensor, mask: Tensor) -> list[list[int]]:
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise ValueError(
            f"input_ids and attention_mask must be [batch, length], not {list(ids.shape)} and {list(mask.shape)}"
        )
    return [row[kept.bool()].tolist() for row, kept in zip(ids, mask, strict=True)]


def _build_problem(policy: Policy, index: int, prompt: list[int], messages: Sequence[Any] | None) -> Problem:
    """The question of row `index`, for rewards that read it; the prompt stays as it is."""
    if messages is not None:
        return as_problem(messages[index], index)
    return Problem(id=f"question/{index}", question=_extract_question(policy.tokenizer, prompt, index))


def _extract_question(tokenizer: PreTrainedTokenizerBase, prompt: list[int], index: int) -> str:
    """The words that a prompt asks: what stands in the template's place for one user turn; without a template all."""
    if tokenizer.chat_template is None:
        return tokenizer.decode(prompt, skip_special_tokens=True).strip()
    probe = Problem(id="probe", question=_QUESTION_SENTINEL)
    before, _, after = render_chat_template(
        tokenizer, probe, probe.build_messages(), add_generation_prompt=True
    ).partition(_QUESTION_SENTINEL)
    text = tokenizer.decode(prompt)
    question = text[len(before) : len(text) - len(after)]
    turns = any(token in question for token in tokenizer.all_special_tokens)  # which the template writes
    if turns or not question.strip() or tokenize_prompt(tokenizer, Problem(id="probe", question=question)) != prompt:
        raise ValueError(
            f"row {index} of input_ids is not one user turn in the tokenizer's chat template: give messages=[...], "
            "the question or chat of every row"
        )
    return question


def _get_dtype_name(model: PreTrainedModel) -> str:
    return next((name for name, dtype in DTYPES.items() if dtype == model.dtype), "float32")


def _get_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError("the tokenizer has neither a padding nor an end token: responses could not be padded")
    return pad


def _append_padded(ids: Tensor, responses: Sequence[Sequence[int]], pad: int) -> Tensor:
    """[B, T + R] long."""
    longest = max(map(len, responses), default=0)
    rows = [[*response, *[pad] * (longest - len(response))] for response in responses]
    return torch.cat((ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device).reshape(len(ids), longest)), dim=1)
