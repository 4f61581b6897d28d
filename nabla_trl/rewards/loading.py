"""Build differentiable rewards from models, on disk or in memory, and refuse unusable ones."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import (
    AutoModelForSequenceClassification,
    AutoModelForTokenClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nabla_trl.gradient.embeddings import embed_tokens, split_embeddings
from nabla_trl.gradient.likelihood import LikelihoodObjective, policy_likelihood
from nabla_trl.gradient.objectives import EncodedSample, Objective, Sample
from nabla_trl.gradient.score import ProcessObjective, ScoreObjective
from nabla_trl.gradient.state_head import HeadObjective, StateHead
from nabla_trl.gradient.step_ends import BLANK_LINE, StepFinder
from nabla_trl.models.flops import FlopCounter, measure_model_size
from nabla_trl.models.loading import (
    check_stays_as_loaded,
    find_tokenizer,
    fix_quantized_gradients,
    freeze_policy,
    get_device_name,
    get_dtype_name,
    is_adapter,
    load_architecture,
    load_model,
    load_policy,
    load_tokenizer,
    map_vocabulary,
    merge_adapter,
    name_model,
    resolve_adapters,
    trusting_remote_code,
    unwrap_model,
)
from nabla_trl.models.policy import Policy, get_context_length
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.rewards.function import RewardFunction, build_function_reward, is_reward_function
from nabla_trl.rewards.prompts import MappedPromptEncoder, get_turn_end_ids, make_template_prompt_encoder
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import (
    LOG_RATIO_PREFIX,
    MANIFEST_FILE,
    SAME_MODELS,
    RewardSpec,
    check_ensemble_members,
    check_uncertainty_penalty,
    parse_reward_spec,
    read_manifest,
)
from nabla_trl.states.layout import find_backbone
from nabla_trl.states.probe import get_layout
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.formatting import format_error
from nabla_trl.utils.identity import is_same_model

SCORE_HEAD_WEIGHT = "score.weight"
# The head of a causal LM, which a classifier that is made from one does not use.
CAUSAL_HEAD_WEIGHTS = ("lm_head.weight", "lm_head.bias")


def load_reward(
    spec: str | Path | Mapping[str, Any] | PreTrainedModel | RewardFunction | Reward | Any,
    tokenizer: PreTrainedTokenizerBase | str | None = None,
    *,
    policy: Policy,
    dtype: str | torch.dtype | None = None,
    device: str | torch.device | None = None,
    batch_size: int | None = None,
    conversational: bool | None = None,
    trust_remote_code: bool | None = None,
) -> Reward:
    """Load a reward for a policy: by name, from a model in memory, or from a function.

    Args:
        spec: which reward. A model of transformers or PEFT in memory is a sequence classifier with one label, and is
            frozen. A function is called as TRL calls its reward functions, with prompts, completions, completion_ids
            and columns of the problems (see `FunctionReward`). It has no gradient, so it serves best-of-N, votes,
            searches with solver none and online training. A reward is returned as it is. As text or as a mapping (a
            dict, a YAML mapping or a JSON object as text):

            NAME or {kind: scalar, model: NAME}: hub id or path of a sequence classifier with one label, or a folder
                with a LoRA adapter of one and its score head. A folder with a reward.json may hold a reward of any
                kind (`nabla_trl.rewards.spec.RewardManifest`).
            logratio:A[,B] or {kind: log_ratio, model: A, reference: B, scale: 1.0}: scale · (log p_A(y|x) −
                log p_B(y|x)) of two causal LMs or adapter folders of causal LMs. B is the policy by default. A model
                of the policy's name is the policy itself and is not loaded again. With B = none, the reward is
                scale · log p_A(y|x).
            process:NAME, process@DELIMITER:NAME or {kind: process, model: NAME, step_delimiter: "\\n\\n"}: the sum of
                the scalar reward's score over the ends of reasoning steps and the end of the response. A step ends
                with the delimiter, a blank line by default. In text, `parse_delimiter` reads its escapes.
            head:FOLDER or {kind: head, model: FOLDER}: a head on the policy's own hidden states, which drawing has
                computed already, so that a score costs nearly nothing (`nabla_trl.gradient.state_head`).
            power:ALPHA or {kind: power, alpha: ALPHA}: (ALPHA − 1) · log π(y|x) of the policy itself, for ALPHA > 1.
                With β = 1 the optimum is π^ALPHA. No model is loaded, and drawing a response has scored it already.
            ensemble:A,B,…, ensemble@K:A,B,… or {kind: ensemble, members: [A, B], uncertainty_penalty: 1.0}:
                mean − K·std of two or more scalar rewards, of heads, or of process rewards with one delimiter. K
                is 1 by default.

            The models of a Python mapping may be in memory too.
        tokenizer: of models in memory, or its name. None: that of the model's name.
        policy: its tokens and prompts are what the reward reads.
        dtype: None: bfloat16 on a GPU that has it, else float32, and for a model in memory its own.
        device: None: a GPU if there is one, and for a model in memory where it is.
        batch_size: responses that are scored together (default: 256).
        conversational: how a function gets texts (see `FunctionReward`).
        trust_remote_code: as for `load_policy`.

    Raises:
        ValueError: a malformed spec or reward.json, no such model, a random or multi-label head, an adapter that does
            not fit, a head of another policy, a vocabulary that does not cover the policy's, a delimiter that no
            tokens write, non-finite scores, or a score that changes when embeddings are fed in place of ids.
    """
    if isinstance(spec, Reward):
        return spec if batch_size is None else replace(spec, batch_size=batch_size)
    batch_size = 256 if batch_size is None else batch_size
    if is_reward_function(spec):
        function: Any = spec
        return build_function_reward(policy, function, conversational=conversational, batch_size=batch_size)
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]] = {}
    named_spec = _name_models_in_memory(spec, tokenizer, models, dtype, device)
    plan = parse_reward_spec(named_spec)
    if isinstance(spec, torch.nn.Module):
        plan = _add_audit_of_files(plan, models[plan.name][0])
    with trusting_remote_code(trust_remote_code):
        reward = _Loader(policy, get_dtype_name(dtype, device), get_device_name(device), models).load(plan)
    reward.batch_size, reward.validated_limits = batch_size, plan.validated_limits
    reward.gradient_at = plan.gradient_at or reward.gradient_at
    reward.gradient_unhelpful = plan.validated_limits is not None and plan.gradient_at is None
    return reward


def _name_models_in_memory(
    spec: Any,
    tokenizer: Any,
    models: dict[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]],
    dtype: Any,
    device: Any,
) -> str | Mapping[str, Any]:
    """Return a spec with names in place of models in memory, which are put into `models` by their names."""
    if isinstance(spec, str | Path):
        return str(spec)
    if isinstance(spec, Mapping):

        def name(value: Any) -> Any:
            is_ours = isinstance(value, Mapping | torch.nn.Module)
            return _name_models_in_memory(value, tokenizer, models, dtype, device) if is_ours else value

        named = {key: name(value) if key in ("model", "reference") else value for key, value in spec.items()}
        if isinstance(members := named.get("members"), list | tuple):
            named["members"] = [name(member) for member in members]
        return named
    if isinstance(spec, list | tuple):
        raise ValueError("a reward is one model, name or function: several are an {kind: ensemble, members: […]}")
    if not isinstance(spec, torch.nn.Module):
        raise ValueError(f"a reward is a name, a mapping, a model or a function, not {format_error(repr(spec), 60)}")
    model = unwrap_model(spec)
    check_stays_as_loaded(model, dtype=dtype, device=device)
    model_name = name_model(model)
    models[model_name] = model, find_tokenizer(tokenizer, model.name_or_path)
    return model_name


def _add_audit_of_files(plan: RewardSpec, model: PreTrainedModel) -> RewardSpec:
    """Return the spec of a classifier in memory with the audit in the folder that it was loaded from.

    A model that was trained since then has another score head, and the audit does not count for it.
    """
    folder = Path(model.name_or_path)
    if not model.name_or_path or not (folder / MANIFEST_FILE).is_file():
        return plan
    manifest = read_manifest(folder)
    score = next((weight for name, weight in model.named_parameters() if name.endswith(SCORE_HEAD_WEIGHT)), None)
    if manifest.kind != "scalar" or score is None:
        return plan
    for file in folder.glob("*.safetensors"):
        with safe_open(file, framework="pt") as tensors:
            stored = {name: tensors.get_tensor(name) for name in tensors.keys() if name.endswith(SCORE_HEAD_WEIGHT)}  # noqa: SIM118
        if any(torch.equal(weight.to(score), score) for weight in stored.values() if weight.shape == score.shape):
            return replace(plan, validated_limits=manifest.validated_limits, gradient_at=manifest.gradient_at)
    return plan


@dataclass(frozen=True)
class _Loader:
    """Loads and checks rewards by their specs. Names of models in memory stand for these models."""

    policy: Policy
    dtype: str
    device: str | None
    models: Mapping[str, tuple[PreTrainedModel, PreTrainedTokenizerBase]]

    def load(self, spec: RewardSpec) -> Reward:
        """Load and check a reward, each member of an ensemble under its own name."""
        policy = self.policy
        if spec.kind == "ensemble":
            members = [self.load(member) for member in spec.members]
            return build_ensemble_reward(members, spec.uncertainty_penalty, spec.name)
        if spec.kind == "power":
            return build_power_reward(policy, spec.scale + 1, spec.name)
        if spec.kind == "log-ratio":
            models = [self._load_causal_lm(name) for name in spec.model_names]
            reference = models[1] if len(models) > 1 else policy if spec.has_reference else None
            if models[0] is reference:
                raise ValueError(f"{spec.name}: {SAME_MODELS}; name a better model than the policy {policy.name}")
            reward = build_log_ratio_reward(policy, models[0], reference, spec.name, scale=spec.scale)
        elif spec.kind == "process":
            classifier = self._load_classifier(spec.model_names[0])
            reward = build_process_reward(policy, *classifier, spec.name, step_delimiter=spec.step_delimiter)
        elif spec.kind == "head":
            reward = build_head_reward(policy, StateHead.load(str(spec.folder)), spec.name)
        else:
            reward = build_scalar_reward(policy, *self._load_classifier(spec.model_names[0]), spec.name)
        check_reward(reward, policy, step_delimiter=spec.step_delimiter)
        return reward

    def _load_classifier(self, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
        if name not in self.models:
            return _load_classifier(name, self.dtype, self.device)
        model, tokenizer = self.models[name]
        if not hasattr(model, "score") or not hasattr(model.config, "num_labels"):
            raise ValueError(
                f"{name} is a {type(model).__name__}, and a reward model is a sequence classifier with one label: use "
                "{'kind': 'log_ratio', 'model': MODEL} to reward the likelihood of a causal LM"
            )
        return model, tokenizer

    def _load_causal_lm(self, name: str) -> Policy:
        """Return the policy itself if the name is the policy's: its likelihood is known from sampling."""
        if is_same_model(name, self.policy.name):
            return self.policy
        # Without the policy's prompt options: methods may sample from this model, in its own style.
        if name in self.models:
            return freeze_policy(*self.models[name], name)
        return load_policy(name, dtype=self.dtype, device=self.device)


def build_log_ratio_reward(
    policy: Policy, preferred_model: Policy, reference_model: Policy | None, name: str, *, scale: float = 1.0
) -> Reward:
    """Build scale · (log p_preferred(y|x) − log p_reference(y|x)) from models in memory.

    Args:
        reference_model: None: the reward is scale · log p_preferred(y|x).
        scale: β where `preferred_model` was tuned from `reference_model` under a KL penalty of strength β. The reward
            is then the one that it was tuned for, up to a function of x (Rafailov et al., arXiv 2305.18290).

    Raises:
        ValueError: vocabularies that cannot be matched, or without any of the policy's stop tokens.
    """
    objectives: list[Objective] = []
    for model, weight, label in ((preferred_model, scale, "reward"), (reference_model, -scale, "reference")):
        if model is None:
            continue
        vocab_map = map_vocabulary(
            policy.tokenizer,
            model.tokenizer,
            num_source_rows=policy.forbidden_mask.shape[0],
            num_target_rows=model.model.get_input_embeddings().weight.shape[0],
        )
        objectives.append(
            LikelihoodObjective(
                model.model,
                measure_model_size(model.model, label),
                vocab_map=vocab_map,
                weight=weight,
                encode_prompt=MappedPromptEncoder(vocab_map.tolist(), name),
                head=model.head,
            )
        )
    in_vocabulary = torch.stack([objective.vocab_map.cpu() >= 0 for objective in objectives]).all(0)
    stop_ids = frozenset(index for index in policy.stop_ids if in_vocabulary[index])
    if not stop_ids:
        raise ValueError(f"{name} has none of the policy's stop tokens, so it has no likelihood that a response ends")
    return Reward(
        name, "log-ratio", objectives, in_vocabulary, stop_ids, preferred_model=preferred_model, gradient_at="direct"
    )


def build_power_reward(policy: Policy, alpha: float, name: str) -> Reward:
    """Build (α − 1) · log π(y|x), whose optimum π·exp(r) is π^α (Karan and Du, arXiv 2510.14901).

    Args:
        alpha: α > 1.
    """
    objective = policy_likelihood(policy, weight=alpha - 1)
    in_vocabulary = torch.ones(policy.forbidden_mask.shape[0], dtype=torch.bool)
    return Reward(name, "power", [objective], in_vocabulary, policy.stop_ids, gradient_at="direct")


def build_head_reward(policy: Policy, head: StateHead, name: str) -> Reward:
    """Build a reward from a head on the policy's hidden states in memory.

    Raises:
        ValueError: the head was trained on another policy's states.
    """
    head.check_policy(policy, name)
    in_vocabulary = torch.ones(policy.forbidden_mask.shape[0], dtype=torch.bool)
    return Reward(name, "head", [HeadObjective(policy, head)], in_vocabulary, policy.stop_ids, gradient_at="direct")


def build_scalar_reward(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> Reward:
    """Build a reward from a sequence classifier with one label in memory. Freezes the model.

    Raises:
        ValueError: more than one label, a head that is not finite, or vocabularies that cannot be matched.
    """
    objective = ScoreObjective(**_prepare_frozen_objective_args(policy, model, tokenizer, name))
    return Reward(name, "scalar", [objective], objective.vocab_map.cpu() >= 0, policy.stop_ids)


def build_process_reward(
    policy: Policy,
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    name: str,
    *,
    step_delimiter: str = BLANK_LINE,
) -> Reward:
    """Build the sum of a sequence classifier's score over the ends of reasoning steps (`ProcessObjective`).

    Raises:
        ValueError: as `build_scalar_reward`, or a delimiter that the policy cannot write or that the reward cannot
            read.
    """
    step_finder = StepFinder(tokenizer, step_delimiter)
    args = _prepare_frozen_objective_args(policy, model, tokenizer, name)
    objective = ProcessObjective(**args, step_finder=step_finder)
    policy_ids = policy.tokenizer(step_delimiter, add_special_tokens=False)["input_ids"]
    reward_ids = objective.vocab_map[policy_ids].tolist()
    # Both ids are checked: a tokenizer may read an unknown character as <unk>, or leave it out.
    if (
        policy.forbidden_mask[policy_ids].any()
        or min(reward_ids, default=-1) < 0
        or not step_finder.find_step_ends(reward_ids)
    ):
        raise ValueError(f"{name}: no step could end, as no tokens of {policy.name} write {step_delimiter!r}")
    return Reward(name, "process", [objective], objective.vocab_map.cpu() >= 0, policy.stop_ids)


def build_score_objective(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> ScoreObjective:
    """Build the objective of a sequence classifier's score. The model stays as it is, so that it can be trained.

    Raises:
        ValueError: vocabularies that cannot be matched, or a cache that cannot be cropped.
    """
    return ScoreObjective(**_prepare_objective_args(policy, model, tokenizer, name))


def _prepare_frozen_objective_args(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> dict[str, Any]:
    """Freeze a classifier and return an objective's arguments. Refuse more labels than one, and a non-finite head."""
    if model.config.num_labels != 1:
        raise ValueError(f"{name} has {model.config.num_labels} labels: a scalar reward needs exactly one")
    model.eval().requires_grad_(False)
    args = _prepare_objective_args(policy, model, tokenizer, name)
    if not all(weight.isfinite().all() for weight in model.score.parameters()):
        raise ValueError(f"{name} has a score head with weights that are not finite")
    return args


def _prepare_objective_args(
    policy: Policy, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str
) -> dict[str, Any]:
    fix_quantized_gradients(model, name)  # of one that was not loaded here
    get_layout(model)
    vocab_map = map_vocabulary(
        policy.tokenizer,
        tokenizer,
        num_source_rows=policy.forbidden_mask.shape[0],
        num_target_rows=model.get_input_embeddings().weight.shape[0],
    )
    return {
        "model": model,
        "model_size": measure_model_size(model, "reward"),
        "vocab_map": vocab_map,
        "encode_prompt": make_template_prompt_encoder(tokenizer, vocab_map, name, get_context_length(model)),
        "turn_end_ids": get_turn_end_ids(tokenizer),
        "stop_ids": policy.stop_ids,
    }


def build_ensemble_reward(members: Sequence[Reward], uncertainty_penalty: float, name: str) -> Reward:
    """Build the lower confidence bound mean − uncertainty_penalty · std of rewards in memory.

    The members are all scalar rewards, all heads, or all process rewards with one delimiter (Coste et al., arXiv
    2310.02743).

    Raises:
        ValueError: fewer than two members, a member twice, a member of another kind or delimiter, or a penalty below
            0.
    """
    if len(members) < 2:
        raise ValueError(f"{name}: an ensemble needs at least two members")
    check_ensemble_members(name, [(member.name, member.kind, member.step_delimiter) for member in members])
    if len({id(member) for member in members}) < len(members):
        raise ValueError(f"{name}: a member is given twice, and so would count twice")
    check_uncertainty_penalty(uncertainty_penalty, f"{name}: uncertainty_penalty")
    objectives = [objective for member in members for objective in member.objectives]
    in_vocabulary = torch.stack([member.in_vocabulary for member in members]).all(0)
    stop_ids = frozenset.intersection(*(member.stop_ids for member in members))
    return Reward(name, "ensemble", objectives, in_vocabulary, stop_ids, uncertainty_penalty=uncertainty_penalty)


def _load_classifier(name: str, dtype: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if is_adapter(name):
        return _load_adapted_classifier(name, dtype, device)
    # A token classifier scores every token, with a bias in its head.
    is_token_classifier = check_classifier(name).endswith("ForTokenClassification")
    auto_class = AutoModelForTokenClassification if is_token_classifier else AutoModelForSequenceClassification
    return load_model(auto_class, name, dtype=dtype, device=device), load_tokenizer(name)


def check_classifier(name: str) -> str:
    """Return the architecture of a reward model, from its config.

    Raises:
        ValueError: no config, or one of a causal LM.
    """
    architecture = load_architecture(name)
    if architecture.endswith(("ForCausalLM", "LMHeadModel")):
        raise ValueError(
            f"{name} is a causal LM ({architecture}), not a reward model: use {LOG_RATIO_PREFIX}{name} to reward its "
            "likelihood"
        )
    return architecture


def _load_adapted_classifier(
    folder: str, dtype: str, device: str | None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    chain = resolve_adapters(folder)
    task_type = chain.adapters[0][2].task_type
    if task_type == "CAUSAL_LM":
        raise ValueError(
            f"{folder} is an adapter of a causal LM, not of a reward model: use {LOG_RATIO_PREFIX}{folder} to reward "
            "its likelihood"
        )
    if task_type != "SEQ_CLS":
        raise ValueError(f"{folder} is an adapter for the task {task_type or 'None'}: a scalar reward needs SEQ_CLS")
    model = load_model(
        AutoModelForSequenceClassification,
        chain.base_model,
        dtype=dtype,
        device=device,
        revision=chain.revision,
        allowed_missing=SCORE_HEAD_WEIGHT,
        allowed_unexpected=CAUSAL_HEAD_WEIGHTS,
        num_labels=1,
    )
    for number, (name, adapter, _) in enumerate(reversed(chain.adapters), 1):
        is_last = number == len(chain.adapters)
        model = merge_adapter(model, adapter, required_head=SCORE_HEAD_WEIGHT if is_last else None)
        model.name_or_path = name
    return model, load_tokenizer(folder)


@torch.no_grad()
def check_reward(reward: Reward, policy: Policy, *, step_delimiter: str = "") -> None:
    """Score a test input from ids, from embeddings and through the cache, and refuse a reward on which they differ.

    Args:
        step_delimiter: a text that the test response holds, as the end of a reasoning step.

    Raises:
        ValueError: non-finite or differing values, or a log-ratio of two models with the same weights.
    """
    readable = torch.nonzero(reward.in_vocabulary & ~policy.forbidden_mask.cpu()).squeeze(1)
    special = {*policy.tokenizer.all_special_ids, *policy.stop_ids}
    body = [index for index in readable.tolist() if index not in special][:4]
    problem = Problem(id="test-input", question=policy.decode(body))
    delimiter = policy.tokenizer(step_delimiter, add_special_tokens=False)["input_ids"] if step_delimiter else []
    # The prompt has the default style: worked examples belong to tasks.
    sample = Sample(
        problem, tokenize_prompt(policy.tokenizer, problem), [*body[:2], *delimiter, *body[2:], min(reward.stop_ids)]
    )
    values = []
    for objective in reward.objectives:
        encoded = objective.encode(sample)
        cache = objective.compute_prompt_caches([sample], FlopCounter())[0]
        (cached,), _ = objective.score([sample], [cache], [0], FlopCounter())
        from_ids = _compute_unbatched_value(objective, encoded, from_embeddings=False)
        from_embeddings = _compute_unbatched_value(objective, encoded, from_embeddings=True)
        if not all(map(math.isfinite, (from_ids, from_embeddings, cached))):
            raise ValueError(f"{reward.name} gives {from_ids} on a test input: its scores are not finite")
        values.append(from_ids)
        tolerance = 1e-3 if objective.model.dtype in (torch.float32, torch.float64) else 5e-2
        for label, value in (("embeddings", from_embeddings), ("the prefix cache", cached)):
            if abs(value - from_ids) > tolerance * max(1.0, abs(from_ids)):
                raise ValueError(
                    f"{reward.name} scores a test input {from_ids:.4f} from ids but {value:.4f} through {label}"
                )
    if reward.kind == "log-ratio" and len(values) == 2 and values[0] == values[1]:
        raise ValueError(f"{reward.name} compares two models with the same weights: {SAME_MODELS}")


def _compute_unbatched_value(objective: Objective, encoded: EncodedSample, *, from_embeddings: bool) -> float:
    """Return an objective's value by the model's own full forward, without this package's batching."""
    begin = len(encoded.prompt_ids)
    ids = torch.tensor([encoded.sequence_ids], device=objective.model.device)
    model = objective.model
    inputs = split_embeddings(model, embed_tokens(model, ids)) if from_embeddings else {"input_ids": ids}
    if isinstance(objective, ScoreObjective):
        hidden = find_backbone(objective.model)(**inputs).last_hidden_state[0, begin - 1 :]
        positions = objective.list_score_positions(encoded.response_ids, len(encoded.turn_end_ids))
        return float(objective.apply_head(hidden[positions]).sum())
    logp = objective.model(**inputs).logits[0].float().log_softmax(-1)
    return float(logp[begin - 1 : -1].gather(1, ids[0, begin:, None]).sum())
