"""Run the search inside transformers' `model.generate(custom_generate=FOLDER, trust_remote_code=True, ...)`.

An exported folder holds a copy of `custom_generate/generate.py`, which imports this module. transformers calls
`generate` with the model, the caller's arguments, and its own optional arguments as None. A model or pipeline that was
loaded from the folder with `trust_remote_code=True` calls it in place of its own `generate`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, fields
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.models.loading import DTYPES, freeze_policy, load_tokenizer
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import check_prompt, render_chat_template, tokenize_prompt
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.reasoner import as_problem
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.renamed import describe_new_key

_QUESTION_SENTINEL = "\x02question\x03"
# Arguments of transformers' `generate` at the values that ask for nothing else than a search does.
_NEUTRAL_ARGUMENTS: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "synced_gpus": False,
    "use_cache": True,
}
# What chose this function, which a loaded model passes on.
_LOADING_ARGUMENTS = ("custom_generate", "trust_remote_code")
_SAMPLING_OPTIONS = ("temperature", "top_k", "top_p", "min_p", "max_new_tokens")


@dataclass
class FixedPromptsPolicy(Policy):
    """A policy with fixed prompt ids by problem id, instead of prompts from the chat template."""

    prompts: dict[str, list[int]] = field(default_factory=dict)

    def encode(self, problem: Problem) -> list[int]:
        """Return the prompt ids of a problem."""
        ids = self.prompts[problem.id]
        return check_prompt(ids, problem, self.tokenizer, name=self.name, context_length=self.context_length)


def generate(
    model: PreTrainedModel,
    inputs: Tensor | None = None,
    *,
    tokenizer: PreTrainedTokenizerBase | None = None,
    reward: str | Mapping[str, Any] | Reward | None = None,
    seed: int = 0,
    messages: Sequence[Any] | None = None,
    preset: str = "default",
    input_ids: Tensor | None = None,
    attention_mask: Tensor | None = None,
    **options: Any,
) -> Tensor:
    """Refine a response to every prompt, as `NablaReasoner.solve` does for question n of a list with the same seed.

    Args:
        model: a causal LM, with or without a PEFT adapter.
        inputs: [B, T] prompts, padded on the left or right. `input_ids` means the same and wins.
        tokenizer: tokenizer of the model. None loads that of the folder or repository that the model came
            from, unless it has an adapter beside its weights.
        reward: a name or mapping, which every call loads (`load_reward`), or a reward loaded for
            `freeze_policy(model, tokenizer, "policy")`.
        seed: random seed of the search.
        messages: question or chat of each row, for a reward that formats questions with its own chat template. None
            reads the question from the ids, which must be one user turn.
        preset: named set of search options.
        attention_mask: [B, T], 0 at padding. None derives it from the pad token, unless the pad token ends responses.
        options: options of `SearchConfig`, which win over the preset, and `do_sample` and `generation_config` of
            transformers. `do_sample=False` means temperature 0.

    Returns:
        [B, T + R] prompts and responses, padded on the right with the pad token, as `model.generate` does. R is the
        length of the longest response.

    Raises:
        ValueError: a missing or unsupported argument, a prompt that cannot be read, or a row whose search failed.
    """
    ids = inputs if input_ids is None else input_ids
    if tokenizer is None and model.name_or_path and not hasattr(model, "peft_config"):
        tokenizer = load_tokenizer(model.name_or_path)  # with an adapter that name is the base's
    if ids is None or tokenizer is None or reward is None:
        required = {"input_ids": ids, "tokenizer": tokenizer, "reward": reward}
        missing = ", ".join(name for name, value in required.items() if value is None)
        raise ValueError(f"custom generation by nabla_trl needs {missing}")
    config = SearchConfig.from_preset(preset, **_select_search_options(options))
    with _freeze_temporarily(model):
        # The name is not that of the base model, because a reward that names the base means it without an adapter.
        frozen = freeze_policy(model, tokenizer, f"{type(model).__name__} in memory")
        prompts = _remove_padding(ids, attention_mask, frozen)
        if messages is not None and len(messages) != len(prompts):
            raise ValueError(f"messages must hold a question or chat for each of {len(prompts)} rows: {len(messages)}")
        policy = FixedPromptsPolicy(**vars(frozen), prompts={f"question/{n}": row for n, row in enumerate(prompts)})
        problems = [_build_problem(policy, index, prompt, messages) for index, prompt in enumerate(prompts)]
        if not isinstance(reward, Reward):
            dtype = next((name for name, dtype in DTYPES.items() if dtype == model.dtype), "float32")
            reward = load_reward(reward, policy=frozen, dtype=dtype, device=str(model.device))
        traces = run_search(problems, policy=policy, reward=reward, config=config, seed=seed)
    failed = next((trace for trace in traces if trace.error is not None), None)
    if failed is not None:
        raise ValueError(f"{failed.problem_id}: {failed.error}")
    return _append_padded(ids, [trace.response_ids for trace in traces], _get_pad_token(tokenizer))


def _select_search_options(options: dict[str, Any]) -> dict[str, Any]:
    """Return the search options, without the arguments of transformers that ask for nothing else."""
    names = {option.name for option in fields(SearchConfig)}
    options = {
        name: value
        for name, value in options.items()
        if name in names or (value is not None and name not in _LOADING_ARGUMENTS)
    }
    if config := options.pop("generation_config", None):
        changed = config.to_diff_dict()
        options = {name: changed[name] for name in (*_SAMPLING_OPTIONS, "do_sample") if name in changed} | options
    if options.pop("do_sample", True) is False:
        options["temperature"] = 0.0  # transformers ignores a temperature without sampling, too
    for name, value in options.items():
        if name not in names and _NEUTRAL_ARGUMENTS.get(name) != value:
            hint = describe_new_key(name, names) or f": its options are {', '.join(sorted(names))}"
            raise ValueError(f"custom generation by nabla_trl does not take {name!r}{hint}")
    return {name: value for name, value in options.items() if name in names}


@contextmanager
def _freeze_temporarily(model: PreTrainedModel) -> Iterator[None]:
    """Restore the training mode and gradients of the model after a search has frozen it."""
    training, trainable = model.training, [weight for weight in model.parameters() if weight.requires_grad]
    try:
        with torch.inference_mode(False), torch.enable_grad():  # `model.generate` disables the gradients
            yield
    finally:
        model.train(training)
        for weight in trainable:
            weight.requires_grad_(True)


def _remove_padding(ids: Tensor, mask: Tensor | None, policy: Policy) -> list[list[int]]:
    pad = policy.tokenizer.pad_token_id
    if mask is None:
        mask = torch.ones_like(ids) if pad is None or pad in policy.stop_ids else (ids != pad).long()
    if ids.dim() != 2 or mask.shape != ids.shape:
        raise ValueError(
            f"input_ids and attention_mask must be [batch, length], not {list(ids.shape)} and {list(mask.shape)}"
        )
    return [row[row_mask.bool()].tolist() for row, row_mask in zip(ids, mask, strict=True)]


def _build_problem(policy: Policy, index: int, prompt: list[int], messages: Sequence[Any] | None) -> Problem:
    """Return the problem of a row, for rewards that read its question. The prompt ids stay unchanged."""
    if messages is not None:
        return as_problem(messages[index], index)
    return Problem(id=f"question/{index}", question=_extract_question(policy.tokenizer, prompt, index))


def _extract_question(tokenizer: PreTrainedTokenizerBase, prompt: list[int], index: int) -> str:
    """Return the text of the user turn in a prompt, or the whole prompt without a chat template."""
    if tokenizer.chat_template is None:
        return tokenizer.decode(prompt, skip_special_tokens=True).strip()
    sentinel = Problem(id="sentinel", question=_QUESTION_SENTINEL)
    template = render_chat_template(tokenizer, sentinel, sentinel.build_messages(), add_generation_prompt=True)
    before, _, after = template.partition(_QUESTION_SENTINEL)
    text = tokenizer.decode(prompt)
    question = text[len(before) : len(text) - len(after)]
    has_turns = any(token in question for token in tokenizer.all_special_tokens)  # the template writes them
    copy = Problem(id="sentinel", question=question)
    if has_turns or not question.strip() or tokenize_prompt(tokenizer, copy) != prompt:
        raise ValueError(
            f"row {index} of input_ids is not one user turn in the tokenizer's chat template: give messages=[...], "
            "the question or chat of every row"
        )
    return question


def _get_pad_token(tokenizer: PreTrainedTokenizerBase) -> int:
    pad = tokenizer.eos_token_id if tokenizer.pad_token_id is None else tokenizer.pad_token_id
    if pad is None:
        raise ValueError("the tokenizer has neither a padding nor an end token to pad responses with")
    return pad


def _append_padded(ids: Tensor, responses: Sequence[Sequence[int]], pad: int) -> Tensor:
    """Return [B, T + R] prompts and padded responses."""
    width = max(map(len, responses), default=0)
    rows = [[*response, *[pad] * (width - len(response))] for response in responses]
    return torch.cat((ids, torch.tensor(rows, dtype=ids.dtype, device=ids.device).reshape(len(ids), width)), dim=1)
