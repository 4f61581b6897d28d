"""Building differentiable rewards from models, on disk or in memory, and refusing those that cannot be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.gradient.likelihood import LikelihoodTerm
from nabla_trl.gradient.objectives import Encoded, Sample, Term
from nabla_trl.gradient.score import ProcessTerm, ScoreTerm
from nabla_trl.gradient.step_ends import BLANK_LINE, StepFinder
from nabla_trl.models.adapters import adapter_note, is_adapter, merge_adapter
from nabla_trl.models.flops import Meter, model_size
from nabla_trl.models.kv_cache import check_cacheable
from nabla_trl.models.loading import architecture, load_model, load_policy, load_tokenizer
from nabla_trl.models.policy import Policy, context_length
from nabla_trl.models.prompts import prompt_ids
from nabla_trl.models.vocabulary import vocabulary_map
from nabla_trl.rewards.prompts import mapped_prompt, template_prompt, template_tail
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import PREFIX, check_members, plan_reward
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.identity import same_model

SCORE_HEAD = "score.weight"


def load_reward(
    spec: str, *, policy: Policy, dtype: str = "float32", device: str | None = None, batch_size: int = 256
) -> Reward:
    """Load a differentiable reward for a policy.

    Args:
        spec: which reward, one of

            NAME: hub id or path of a sequence-classification model with one label, or a folder with a LoRA adapter
                of one, whose score head is the adapter's;
            FOLDER with a reward.json (`nabla_trl.rewards.spec.RewardCard`): a scalar reward, a process reward, an
                implicit one, r = β (log p_folder(y|x) − log p_reference(y|x)), or an ensemble;
            process:NAME or process@DELIMITER:NAME: the sum of the scalar reward NAME's score over the ends of steps
                and the end of the response; a step ends with the delimiter (a blank line), whose escapes
                `nabla_trl.gradient.step_ends.read_delimiter` tells;
            logratio:A[,B]: log p_A(y|x) − log p_B(y|x) of two causal LMs, or adapter folders of causal LMs (B: the
                policy). A model of the policy's name is the policy itself and is not loaded again;
            ensemble:A,B,… or ensemble@K:A,B,…: mean − K·std of two or more scalar rewards, or of process rewards with
                one delimiter (K: 1).

    Raises:
        ValueError: a malformed spec or reward.json, no such model, a random or multi-label head, an adapter that does
            not fit, a vocabulary that does not cover the policy's, a delimiter that no tokens write, non-finite
            scores, or a score that changes when embeddings are fed in place of ids.
    """
    plan = plan_reward(spec)
    if plan.kind == "ensemble":
        load = partial(load_reward, policy=policy, dtype=dtype, device=device)  # checks each under its own name
        reward = ensemble([load(name) for name in plan.models], plan.caution, spec)
    elif plan.kind == "log-ratio":
        better, *rest = [_load_causal(name, policy, dtype, device) for name in plan.models]
        reward = log_ratio(policy, better, rest[0] if rest else policy, spec, scale=plan.scale)
        check_reward(reward, policy)
    elif plan.kind == "process":
        model, tokenizer = _load_classifier(plan.models[0], dtype, device)
        reward = process(policy, model, tokenizer, spec, delimiter=plan.delimiter)
        check_reward(reward, policy, within=plan.delimiter)
    else:
        reward = scalar(policy, *_load_classifier(spec, dtype, device), spec)
        check_reward(reward, policy)
    reward.batch_size, reward.trust = batch_size, plan.trust
    reward.point = plan.point or reward.point
    reward.misled = plan.trust is not None and plan.point is None
    return reward


def log_ratio(policy: Policy, better: Policy, reference: Policy, name: str, *, scale: float = 1.0) -> Reward:
    """scale · (log p_better(y|x) − log p_reference(y|x)), from models in memory.

    Args:
        scale: β where `better` was tuned from `reference` under a KL penalty of strength β: then this is the reward
            that it was tuned for, up to a function of x (Rafailov et al., arXiv 2305.18290).

    Raises:
        ValueError: vocabularies that cannot be matched, or without any of the policy's stop tokens.
    """
    terms: list[Term] = []
    for model, weight, label in ((better, scale, "reward"), (reference, -scale, "reference")):
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
                encode_prompt=mapped_prompt(mapping, name),
            )
        )
    readable = torch.stack([term.mapping.cpu() >= 0 for term in terms]).all(0)
    stops = frozenset(index for index in policy.stop_ids if readable[index])
    if not stops:
        raise ValueError(f"{name} has none of the policy's stop tokens: it cannot tell how likely a response ends")
    return Reward(name, "log-ratio", terms, readable, stops, rival=better, point="direct")


def scalar(policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Reward:
    """A sequence-classification model with one label as reward, from memory.

    Raises:
        ValueError: more than one label, a head that is not finite, or vocabularies that cannot be matched.
    """
    term = ScoreTerm(**_frozen_parts(policy, model, tokenizer, name))
    return Reward(name, "scalar", [term], term.mapping.cpu() >= 0, policy.stop_ids)


def process(
    policy: Policy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    delimiter: str = BLANK_LINE,
) -> Reward:
    """The sum of a sequence classifier's score over the ends of steps, from memory (`nabla_trl.gradient.likelihood.ProcessTerm`).

    Raises:
        ValueError: as `scalar`; a delimiter that the policy cannot write, or that the reward cannot read from it.
    """
    steps = StepFinder(tokenizer, delimiter)
    term = ProcessTerm(**_frozen_parts(policy, model, tokenizer, name), steps=steps)
    written = policy.tokenizer(delimiter, add_special_tokens=False)["input_ids"]
    read = term.mapping[written].tolist()
    # Only the ids of both tell: a tokenizer may take what it does not know for <unk>, or leave it out.
    if policy.forbidden[written].any() or min(read, default=-1) < 0 or not steps.ends(read):
        raise ValueError(f"{name}: no step could end, as no tokens of {policy.name} write {delimiter!r}")
    return Reward(name, "process", [term], term.mapping.cpu() >= 0, policy.stop_ids)


def score_term(policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> ScoreTerm:
    """The score of a sequence classifier as a term; the model is left as it is, so that it can be trained.

    Raises:
        ValueError: vocabularies that cannot be matched, or a cache that cannot be cut.
    """
    return ScoreTerm(**_score_parts(policy, model, tokenizer, name))


def _frozen_parts(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> dict[str, Any]:
    """What a reward's term is made of; the model is frozen. Refuses more than one label, a head that is not finite."""
    if model.config.num_labels != 1:
        raise ValueError(f"{name} has {model.config.num_labels} labels: a scalar reward needs exactly one")
    model.eval().requires_grad_(False)
    parts = _score_parts(policy, model, tokenizer, name)
    if not all(weight.isfinite().all() for weight in model.score.parameters()):
        raise ValueError(f"{name} has a score head with weights that are not finite")
    return parts


def _score_parts(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> dict[str, Any]:
    """What a `ScoreTerm` is made of."""
    check_cacheable(model)
    mapping = vocabulary_map(
        policy.tokenizer,
        tokenizer,
        source_rows=policy.forbidden.shape[0],
        target_rows=model.get_input_embeddings().weight.shape[0],
    )
    return {
        "model": model,
        "size": model_size(model, "reward"),
        "mapping": mapping,
        "encode_prompt": template_prompt(tokenizer, mapping, name, context_length(model)),
        "tail": template_tail(tokenizer),
        "stop_ids": policy.stop_ids,
    }


def ensemble(members: Sequence[Reward], caution: float, name: str) -> Reward:
    """The lower confidence bound mean − caution · std of scalar rewards, or of process rewards, from memory.

    Raises:
        ValueError: fewer than two members, one twice, one of another kind or delimiter, or a caution below 0.
    """
    if len(members) < 2:
        raise ValueError(f"{name}: an ensemble needs at least two members")
    check_members(name, [(one.name, one.kind, one.delimiter) for one in members])
    if len({id(one) for one in members}) < len(members):
        raise ValueError(f"{name}: a member is there twice, and so would count twice")
    if not 0 <= caution < math.inf:
        raise ValueError(f"{name}: caution must be a number of at least 0, not {caution}")
    terms = [term for one in members for term in one.terms]
    readable = torch.stack([one.readable for one in members]).all(0)
    stops = frozenset.intersection(*(one.stop_ids for one in members))
    return Reward(name, "ensemble", terms, readable, stops, caution=caution)


def _load_classifier(name: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if is_adapter(name):
        return _load_adapted_classifier(name, dtype, device)
    kind = architecture(name)
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"{name} is a causal LM ({kind}), not a reward model: use {PREFIX}{name} to reward its likelihood"
        )
    model = load_model(AutoModelForSequenceClassification, name, dtype=dtype, device=device)
    return model, load_tokenizer(name)


def _load_adapted_classifier(
    folder: str, dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    note = adapter_note(folder)
    if note.task == "CAUSAL_LM":
        raise ValueError(
            f"{folder} is an adapter of a causal LM, not of a reward model: use {PREFIX}{folder} to reward its "
            "likelihood"
        )
    if note.task != "SEQ_CLS":
        raise ValueError(f"{folder} is an adapter for the task {note.task or 'None'}: a scalar reward needs SEQ_CLS")
    auto = AutoModelForSequenceClassification
    base = load_model(auto, note.base, dtype=dtype, device=device, supplied=SCORE_HEAD, num_labels=1)
    return merge_adapter(base, folder, head=SCORE_HEAD), load_tokenizer(folder)


def _load_causal(name: str, policy: Policy, dtype: str, device: str | None) -> Policy:
    """The policy itself where it has this name: its likelihood is known from drawing."""
    if same_model(name, policy.name):
        return policy
    return load_policy(name, dtype=dtype, device=device)  # it may be sampled from, and is then asked in its own way


@torch.no_grad()
def check_reward(reward: Reward, policy: Policy, *, within: str = "") -> None:
    """Score a probe through ids, through embeddings and through the cache; refuse a reward on which they differ.

    Args:
        within: a text that the probe holds, as the end of a step.

    Raises:
        ValueError: non-finite or differing values.
    """
    readable = torch.nonzero(reward.readable & ~policy.forbidden.cpu()).squeeze(1)
    special = {*policy.tokenizer.all_special_ids, *policy.stop_ids}
    body = [index for index in readable.tolist() if index not in special][:4]
    problem = Problem(id="probe", question=policy.decode(body))
    held = policy.tokenizer(within, add_special_tokens=False)["input_ids"] if within else []
    # Asked in the default way: worked examples belong to tasks.
    sample = Sample(
        problem, prompt_ids(policy.tokenizer, problem), [*body[:2], *held, *body[2:], min(reward.stop_ids)]
    )
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
    if isinstance(term, ScoreTerm):
        hidden = term.model.base_model(**inputs).last_hidden_state[0, len(encoded.prompt) - 1 :]
        return float(term.model.score(hidden[term.reads(encoded.response, len(encoded.tail))]).sum())
    logp = term.model(**inputs).logits[0].float().log_softmax(-1)
    begin = len(encoded.prompt)
    return float(logp[begin - 1 : -1].gather(1, ids[0, begin:, None]).sum())
