"""Building differentiable rewards from models, on disk or in memory, and refusing those that cannot be trusted."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoModelForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nabla_trl.compute import Meter, model_size
from nabla_trl.heads import LikelihoodTerm, ScoreTerm
from nabla_trl.kv import check_cacheable
from nabla_trl.models import (
    Policy,
    architecture,
    check_prompt,
    context_length,
    freeze_policy,
    load_model,
    load_tokenizer,
    prompt_ids,
    render,
    vocabulary_map,
)
from nabla_trl.rewards import Reward
from nabla_trl.tasks import Problem
from nabla_trl.terms import Encoded, Sample, Term

PREFIX = "logratio:"
_SENTINEL = "\x02response\x03"


def load_reward(
    spec: str, *, policy: Policy, dtype: str = "float32", device: str | None = None, batch_size: int = 256
) -> Reward:
    """Load a differentiable reward for a policy.

    Args:
        spec: a hub id or path of a sequence-classification model with one label; or "logratio:A" or
            "logratio:A,B" for log p_A(y|x) − log p_B(y|x) of two causal LMs (B defaults to the policy).

    Raises:
        ValueError: no such model, a random or multi-label head, a vocabulary that does not cover the policy's,
            non-finite scores, or a score that changes when embeddings are fed in place of ids.
    """
    if spec.startswith(PREFIX):
        reward = _load_logratio(spec, policy, dtype, device)
    else:
        reward = _load_scalar(spec, policy, dtype, device)
    reward.batch_size = batch_size
    check_reward(reward, policy)
    return reward


def log_ratio(policy: Policy, better: Policy, reference: Policy, name: str) -> Reward:
    """log p_better(y|x) − log p_reference(y|x), from models in memory.

    Raises:
        ValueError: vocabularies that cannot be matched, or without any of the policy's stop tokens.
    """
    terms: list[Term] = []
    for model, weight, label in ((better, 1.0, "reward"), (reference, -1.0, "reference")):
        mapping = vocabulary_map(
            policy.tokenizer,
            model.tokenizer,
            source_rows=policy.forbidden.shape[0],
            target_rows=model.model.get_input_embeddings().weight.shape[0],
        )
        terms.append(
            LikelihoodTerm(
                model.model,
                model_size(model.model, label),
                mapping=mapping,
                weight=weight,
                encode_prompt=_mapped_prompt(mapping, name),
            )
        )
    readable = torch.stack([term.mapping.cpu() >= 0 for term in terms]).all(0)
    stops = frozenset(index for index in policy.stop_ids if readable[index])
    if not stops:
        raise ValueError(f"{name} has none of the policy's stop tokens: it cannot tell how likely a response ends")
    return Reward(name, "log-ratio", terms, readable, stops, rival=better)


def scalar(policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Reward:
    """A sequence-classification model with one label as reward, from memory.

    Raises:
        ValueError: more than one label, or vocabularies that cannot be matched.
    """
    if model.config.num_labels != 1:
        raise ValueError(f"{name} has {model.config.num_labels} labels: a scalar reward needs exactly one")
    check_cacheable(model)
    model.eval().requires_grad_(False)
    mapping = vocabulary_map(
        policy.tokenizer,
        tokenizer,
        source_rows=policy.forbidden.shape[0],
        target_rows=model.get_input_embeddings().weight.shape[0],
    )
    term = ScoreTerm(
        model,
        model_size(model, "reward"),
        mapping=mapping,
        encode_prompt=_template_prompt(tokenizer, mapping, name, context_length(model)),
        tail=_template_tail(tokenizer),
        stop_ids=policy.stop_ids,
    )
    return Reward(name, "scalar", [term], mapping >= 0, policy.stop_ids)


def _load_scalar(name: str, policy: Policy, dtype: str, device: str | None) -> Reward:
    kind = architecture(name)
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"{name} is a causal LM ({kind}), not a reward model: use {PREFIX}{name} to reward its likelihood"
        )
    model = load_model(AutoModelForSequenceClassification, name, dtype=dtype, device=device)
    return scalar(policy, model, load_tokenizer(name), name)


def _load_logratio(spec: str, policy: Policy, dtype: str, device: str | None) -> Reward:
    names = [part.strip() for part in spec.removeprefix(PREFIX).split(",")]
    if not 1 <= len(names) <= 2 or not all(names):
        raise ValueError(f"{spec!r}: expected {PREFIX}BETTER or {PREFIX}BETTER,REFERENCE")
    loaded = []
    for name in names:
        model = load_model(AutoModelForCausalLM, name, dtype=dtype, device=device)
        loaded.append(freeze_policy(model, load_tokenizer(name), name))
    reference = loaded[1] if len(loaded) == 2 else policy
    return log_ratio(policy, loaded[0], reference, spec)


def _mapped_prompt(mapping: Tensor, name: str) -> Callable[[Problem, list[int]], list[int]]:
    table = mapping.tolist()

    def encode(problem: Problem, prompt: list[int]) -> list[int]:
        ids = [table[index] for index in prompt]
        if min(ids) < 0:
            raise ValueError(
                f"{problem.id}: {name} has no token for policy id {prompt[ids.index(min(ids))]} of the prompt"
            )
        return ids

    return encode


def _template_prompt(
    tokenizer: PreTrainedTokenizerBase, mapping: Tensor, name: str, context: int
) -> Callable[[Problem, list[int]], list[int]]:
    """The reward's own chat template; the policy's prompt, mapped, where it has none."""
    if tokenizer.chat_template is None:
        return _mapped_prompt(mapping, name)
    seen: dict[str, list[int]] = {}

    def encode(problem: Problem, prompt: list[int]) -> list[int]:
        key = repr(problem.chat())
        if key not in seen:
            ids = _opened_turn(tokenizer, problem)
            seen[key] = check_prompt(ids, problem, tokenizer, name=name, context=context)
        return seen[key]

    return encode


def _opened_turn(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> list[int]:
    """The chat up to where the assistant begins to speak."""
    if render(tokenizer, problem, problem.chat(), add_generation_prompt=True) != render(
        tokenizer, problem, problem.chat(), add_generation_prompt=False
    ):
        return prompt_ids(tokenizer, problem)
    # Templates of many reward models have no generation prompt: what opens the turn shows only in a whole turn.
    opening, _ = _around_response(tokenizer, problem)
    return list(tokenizer(opening, add_special_tokens=False)["input_ids"])


def _template_tail(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Ids that the reward's template writes after an assistant's words."""
    if tokenizer.chat_template is None:
        return []
    _, closing = _around_response(tokenizer, Problem(id="probe", question="x"))
    return list(tokenizer(closing, add_special_tokens=False)["input_ids"])


def _around_response(tokenizer: PreTrainedTokenizerBase, problem: Problem) -> tuple[str, str]:
    """What the template writes before and after the assistant's words."""
    turns = [*problem.chat(), {"role": "assistant", "content": _SENTINEL}]
    parts = render(tokenizer, problem, turns, add_generation_prompt=False).split(_SENTINEL)
    if len(parts) != 2:
        raise ValueError("the reward's chat template does not show the assistant's words once, unchanged")
    return parts[0], parts[1]


@torch.no_grad()
def check_reward(reward: Reward, policy: Policy) -> None:
    """Score a probe through ids, through embeddings and through the cache; refuse a reward on which they differ.

    Raises:
        ValueError: non-finite or differing values.
    """
    readable = torch.nonzero(reward.readable & ~policy.forbidden.cpu()).squeeze(1)
    special = {*policy.tokenizer.all_special_ids, *policy.stop_ids}
    body = [index for index in readable.tolist() if index not in special][:4]
    problem = Problem(id="probe", question=policy.decode(body))
    sample = Sample(problem, policy.encode(problem), [*body, min(reward.stop_ids)])
    for term in reward.terms:
        encoded = term.encode(sample)
        sequence = encoded.prompt + encoded.response + encoded.tail
        memo = term.prompt_memos([sample], Meter())[0]
        cached, _ = term.score([sample], [memo], [0], Meter())
        hard = _plain_value(term, encoded, torch.tensor([sequence], device=term.model.device), soft=False)
        soft = _plain_value(term, encoded, torch.tensor([sequence], device=term.model.device), soft=True)
        if not all(map(math.isfinite, (hard, soft, cached[0]))):
            raise ValueError(f"{reward.name} gives {hard} on a probe: its scores are not finite")
        tolerance = 1e-3 if term.model.dtype in (torch.float32, torch.float64) else 5e-2
        for label, value in (("embeddings", soft), ("the prefix cache", cached[0])):
            if abs(value - hard) > tolerance * max(1.0, abs(hard)):
                raise ValueError(f"{reward.name} scores a probe {hard:.4f} from ids but {value:.4f} through {label}")


def _plain_value(term: Term, encoded: Encoded, ids: Tensor, soft: bool) -> float:
    """A term's value by the model's own full forward, without any of our batching."""
    inputs = {"inputs_embeds": term.model.get_input_embeddings()(ids)} if soft else {"input_ids": ids}
    if isinstance(term, LikelihoodTerm):
        logp = term.model(**inputs).logits[0].float().log_softmax(-1)
        begin = len(encoded.prompt)
        targets = ids[0, begin:]
        return float(logp[begin - 1 : -1].gather(1, targets[:, None]).sum())
    hidden = term.model.base_model(**inputs).last_hidden_state
    return float(term.model.score(hidden[:, -1]))
