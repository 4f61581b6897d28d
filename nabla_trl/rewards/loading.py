"""Building differentiable rewards from models, on disk or in memory, and refusing those that cannot be trusted."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel, PreTrainedTokenizerBase

from nabla_trl.gradient.likelihood import LikelihoodObjective
from nabla_trl.gradient.objectives import EncodedSample, Objective, Sample
from nabla_trl.gradient.score import ProcessObjective, ScoreObjective
from nabla_trl.gradient.step_ends import BLANK_LINE, StepFinder
from nabla_trl.models.flops import FlopCounter, measure_model_size
from nabla_trl.models.kv_cache import check_croppable_cache
from nabla_trl.models.loading import (
    is_adapter,
    load_architecture,
    load_model,
    load_policy,
    load_tokenizer,
    map_vocabulary,
    merge_adapter,
    read_adapter_info,
)
from nabla_trl.models.policy import Policy, get_context_length
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.rewards.prompts import get_turn_end_ids, make_mapped_prompt_encoder, make_template_prompt_encoder
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import LOG_RATIO_PREFIX, check_ensemble_members, parse_reward_spec
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.identity import is_same_model

SCORE_HEAD_WEIGHT = "score.weight"


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
    plan = parse_reward_spec(spec)
    if plan.kind == "ensemble":
        load = partial(load_reward, policy=policy, dtype=dtype, device=device)  # checks each under its own name
        reward = build_ensemble_reward([load(name) for name in plan.model_names], plan.uncertainty_penalty, spec)
    elif plan.kind == "log-ratio":
        better, *rest = [_load_causal_lm(name, policy, dtype, device) for name in plan.model_names]
        reward = build_log_ratio_reward(policy, better, rest[0] if rest else policy, spec, scale=plan.scale)
        check_reward(reward, policy)
    elif plan.kind == "process":
        model, tokenizer = _load_classifier(plan.model_names[0], dtype, device)
        reward = build_process_reward(policy, model, tokenizer, spec, step_delimiter=plan.step_delimiter)
        check_reward(reward, policy, step_delimiter=plan.step_delimiter)
    else:
        reward = build_scalar_reward(policy, *_load_classifier(spec, dtype, device), spec)
        check_reward(reward, policy)
    reward.batch_size, reward.validated_limits = batch_size, plan.validated_limits
    reward.gradient_at = plan.gradient_at or reward.gradient_at
    reward.gradient_unhelpful = plan.validated_limits is not None and plan.gradient_at is None
    return reward


def build_log_ratio_reward(
    policy: Policy, preferred_model: Policy, reference_model: Policy, name: str, *, scale: float = 1.0
) -> Reward:
    """scale · (log p_better(y|x) − log p_reference(y|x)), from models in memory.

    Args:
        scale: β where `better` was tuned from `reference` under a KL penalty of strength β: then this is the reward
            that it was tuned for, up to a function of x (Rafailov et al., arXiv 2305.18290).

    Raises:
        ValueError: vocabularies that cannot be matched, or without any of the policy's stop tokens.
    """
    terms: list[Objective] = []
    for model, weight, label in ((preferred_model, scale, "reward"), (reference_model, -scale, "reference")):
        mapping = map_vocabulary(
            policy.tokenizer,
            model.tokenizer,
            num_source_rows=policy.forbidden_mask.shape[0],
            num_target_rows=model.model.get_input_embeddings().weight.shape[0],
        )
        terms.append(
            LikelihoodObjective(
                model.model,
                measure_model_size(model.model, label),
                vocab_map=mapping,
                weight=weight,
                encode_prompt=make_mapped_prompt_encoder(mapping, name),
            )
        )
    readable = torch.stack([term.vocab_map.cpu() >= 0 for term in terms]).all(0)
    stops = frozenset(index for index in policy.stop_ids if readable[index])
    if not stops:
        raise ValueError(f"{name} has none of the policy's stop tokens: it cannot tell how likely a response ends")
    return Reward(name, "log-ratio", terms, readable, stops, preferred_model=preferred_model, gradient_at="direct")


def build_scalar_reward(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> Reward:
    """A sequence-classification model with one label as reward, from memory.

    Raises:
        ValueError: more than one label, a head that is not finite, or vocabularies that cannot be matched.
    """
    term = ScoreObjective(**_prepare_frozen_objective_args(policy, model, tokenizer, name))
    return Reward(name, "scalar", [term], term.vocab_map.cpu() >= 0, policy.stop_ids)


def build_process_reward(
    policy: Policy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    step_delimiter: str = BLANK_LINE,
) -> Reward:
    """The sum of a sequence classifier's score over the ends of steps, from memory (`nabla_trl.gradient.likelihood.ProcessTerm`).

    Raises:
        ValueError: as `scalar`; a delimiter that the policy cannot write, or that the reward cannot read from it.
    """
    steps = StepFinder(tokenizer, step_delimiter)
    term = ProcessObjective(**_prepare_frozen_objective_args(policy, model, tokenizer, name), step_finder=steps)
    written = policy.tokenizer(step_delimiter, add_special_tokens=False)["input_ids"]
    read = term.vocab_map[written].tolist()
    # Only the ids of both tell: a tokenizer may take what it does not know for <unk>, or leave it out.
    if policy.forbidden_mask[written].any() or min(read, default=-1) < 0 or not steps.find_step_ends(read):
        raise ValueError(f"{name}: no step could end, as no tokens of {policy.name} write {step_delimiter!r}")
    return Reward(name, "process", [term], term.vocab_map.cpu() >= 0, policy.stop_ids)


def build_score_objective(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> ScoreObjective:
    """The score of a sequence classifier as a term; the model is left as it is, so that it can be trained.

    Raises:
        ValueError: vocabularies that cannot be matched, or a cache that cannot be cut.
    """
    return ScoreObjective(**_prepare_objective_args(policy, model, tokenizer, name))


def _prepare_frozen_objective_args(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> dict[str, Any]:
    """What a reward's term is made of; the model is frozen. Refuses more than one label, a head that is not finite."""
    if model.config.num_labels != 1:
        raise ValueError(f"{name} has {model.config.num_labels} labels: a scalar reward needs exactly one")
    model.eval().requires_grad_(False)
    parts = _prepare_objective_args(policy, model, tokenizer, name)
    if not all(weight.isfinite().all() for weight in model.score.parameters()):
        raise ValueError(f"{name} has a score head with weights that are not finite")
    return parts


def _prepare_objective_args(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> dict[str, Any]:
    """What a `ScoreTerm` is made of."""
    check_croppable_cache(model)
    mapping = map_vocabulary(
        policy.tokenizer,
        tokenizer,
        num_source_rows=policy.forbidden_mask.shape[0],
        num_target_rows=model.get_input_embeddings().weight.shape[0],
    )
    return {
        "model": model,
        "model_size": measure_model_size(model, "reward"),
        "vocab_map": mapping,
        "encode_prompt": make_template_prompt_encoder(tokenizer, mapping, name, get_context_length(model)),
        "turn_end_ids": get_turn_end_ids(tokenizer),
        "stop_ids": policy.stop_ids,
    }


def build_ensemble_reward(members: Sequence[Reward], uncertainty_penalty: float, name: str) -> Reward:
    """The lower confidence bound mean − caution · std of scalar rewards, or of process rewards, from memory.

    Raises:
        ValueError: fewer than two members, one twice, one of another kind or delimiter, or a caution below 0.
    """
    if len(members) < 2:
        raise ValueError(f"{name}: an ensemble needs at least two members")
    check_ensemble_members(name, [(one.name, one.kind, one.step_delimiter) for one in members])
    if len({id(one) for one in members}) < len(members):
        raise ValueError(f"{name}: a member is there twice, and so would count twice")
    if not 0 <= uncertainty_penalty < math.inf:
        raise ValueError(f"{name}: caution must be a number of at least 0, not {uncertainty_penalty}")
    terms = [term for one in members for term in one.objectives]
    readable = torch.stack([one.in_vocabulary for one in members]).all(0)
    stops = frozenset.intersection(*(one.stop_ids for one in members))
    return Reward(name, "ensemble", terms, readable, stops, uncertainty_penalty=uncertainty_penalty)


def _load_classifier(name: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if is_adapter(name):
        return _load_adapted_classifier(name, dtype, device)
    kind = load_architecture(name)
    if kind.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"{name} is a causal LM ({kind}), not a reward model: use {LOG_RATIO_PREFIX}{name} to reward its likelihood"
        )
    model = load_model(AutoModelForSequenceClassification, name, dtype=dtype, device=device)
    return model, load_tokenizer(name)


def _load_adapted_classifier(
    folder: str, dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    note = read_adapter_info(folder)
    if note.task_type == "CAUSAL_LM":
        raise ValueError(
            f"{folder} is an adapter of a causal LM, not of a reward model: use {LOG_RATIO_PREFIX}{folder} to reward its "
            "likelihood"
        )
    if note.task_type != "SEQ_CLS":
        raise ValueError(
            f"{folder} is an adapter for the task {note.task_type or 'None'}: a scalar reward needs SEQ_CLS"
        )
    auto = AutoModelForSequenceClassification
    base = load_model(
        auto, note.base_model, dtype=dtype, device=device, allowed_missing=SCORE_HEAD_WEIGHT, num_labels=1
    )
    return merge_adapter(base, folder, required_head=SCORE_HEAD_WEIGHT), load_tokenizer(folder)


def _load_causal_lm(name: str, policy: Policy, dtype: str, device: str | None) -> Policy:
    """The policy itself where it has this name: its likelihood is known from drawing."""
    if is_same_model(name, policy.name):
        return policy
    return load_policy(name, dtype=dtype, device=device)  # it may be sampled from, and is then asked in its own way


@torch.no_grad()
def check_reward(reward: Reward, policy: Policy, *, step_delimiter: str = "") -> None:
    """Score a probe through ids, through embeddings and through the cache; refuse a reward on which they differ.

    Args:
        within: a text that the probe holds, as the end of a step.

    Raises:
        ValueError: non-finite or differing values.
    """
    readable = torch.nonzero(reward.in_vocabulary & ~policy.forbidden_mask.cpu()).squeeze(1)
    special = {*policy.tokenizer.all_special_ids, *policy.stop_ids}
    body = [index for index in readable.tolist() if index not in special][:4]
    problem = Problem(id="probe", question=policy.decode(body))
    held = policy.tokenizer(step_delimiter, add_special_tokens=False)["input_ids"] if step_delimiter else []
    # Asked in the default way: worked examples belong to tasks.
    sample = Sample(
        problem, tokenize_prompt(policy.tokenizer, problem), [*body[:2], *held, *body[2:], min(reward.stop_ids)]
    )
    for term in reward.objectives:
        encoded = term.encode(sample)
        sequence = encoded.prompt_ids + encoded.response_ids + encoded.turn_end_ids
        memo = term.compute_prompt_caches([sample], FlopCounter())[0]
        cached, _ = term.score([sample], [memo], [0], FlopCounter())
        hard = _compute_unbatched_value(
            term, encoded, torch.tensor([sequence], device=term.model.device), from_embeddings=False
        )
        soft = _compute_unbatched_value(
            term, encoded, torch.tensor([sequence], device=term.model.device), from_embeddings=True
        )
        if not all(map(math.isfinite, (hard, soft, cached[0]))):
            raise ValueError(f"{reward.name} gives {hard} on a probe: its scores are not finite")
        tolerance = 1e-3 if term.model.dtype in (torch.float32, torch.float64) else 5e-2
        for label, value in (("embeddings", soft), ("the prefix cache", cached[0])):
            if abs(value - hard) > tolerance * max(1.0, abs(hard)):
                raise ValueError(f"{reward.name} scores a probe {hard:.4f} from ids but {value:.4f} through {label}")


def _compute_unbatched_value(
    objective: Objective, encoded: EncodedSample, ids: Tensor, from_embeddings: bool
) -> float:
    """A term's value by the model's own full forward, without any of our batching."""
    inputs = {"inputs_embeds": objective.model.get_input_embeddings()(ids)} if from_embeddings else {"input_ids": ids}
    if isinstance(objective, ScoreObjective):
        hidden = objective.model.base_model(**inputs).last_hidden_state[0, len(encoded.prompt_ids) - 1 :]
        return float(
            objective.model.score(
                hidden[objective.list_score_positions(encoded.response_ids, len(encoded.turn_end_ids))]
            ).sum()
        )
    logp = objective.model(**inputs).logits[0].float().log_softmax(-1)
    begin = len(encoded.prompt_ids)
    return float(logp[begin - 1 : -1].gather(1, ids[0, begin:, None]).sum())
