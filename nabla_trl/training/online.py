"""Train a policy by KL-regularized RL (RLOO, GRPO) or by on-policy distillation of the refined distribution.

Both maximize E_q[r] − β KL(q ‖ π) from π itself, with the same r, the same β and the same token ids as the search.
RLOO (Ahmadian et al., arXiv 2402.14740) takes the KL as β · (log q − log π) of the whole response, inside its reward.
Its optimum is π* ∝ π exp(r/β). GRPO (Shao et al., arXiv 2402.03300) has the KL in the loss, token by token, where it
depends on the current token alone.

On-policy distillation (Agarwal et al., arXiv 2306.13649) has a teacher for each token in place of one reward for a
response. The teacher at a prefix that the policy has sampled is the distribution that the search would propose from
there: one mirror step from π along the reward's gradient, by the same functions. The policy minimizes the KL to it.
"""

from __future__ import annotations

import math
import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import DistillationConfig, GRPOConfig, RLOOConfig, SFTConfig

from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.gradient.relaxation import compute_replaceable_mask
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter, ModelSize, measure_model_size
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import compute_top_candidates, find_token_columns
from nabla_trl.rewards.reward import Reward, Verifier
from nabla_trl.search import solvers
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import MirrorSolver
from nabla_trl.search.refinement import compute_refined_logp, is_own_token_gradient
from nabla_trl.tasks.problem import Problem
from nabla_trl.training.callbacks import EvaluationCallback
from nabla_trl.training.offline import (
    GROUP_METHODS,
    OFFLINE_METHODS,
    ON_POLICY,
    ONLINE_METHODS,
    REVERSE_KL,
    TrainerOutcome,
    TrainingResult,
    TrainOptions,
    run_trainer,
)
from nabla_trl.training.peft import (
    LoraArguments,
    build_lora_config,
    check_reference_model,
    compute_training_flops,
    load_padded_tokenizer,
    load_trainable_model,
)
from nabla_trl.training.rollouts import build_generation_kwargs
from nabla_trl.training.trainers import (
    ResponseScorer,
    TeacherTargets,
    TokenIdsDistillationTrainer,
    TokenIdsGRPOTrainer,
    TokenIdsRLOOTrainer,
    convert_config,
)
from nabla_trl.utils.faults import Checks


@dataclass
class RewardScorer:
    """Reward of responses by their ids, as the search scores them.

    Attributes:
        components: mean of each of the reward's objectives over the responses scored last.
    """

    reward: Reward
    problems: dict[str, Problem]
    prompt_ids: dict[str, list[int]]
    components: dict[str, float] = field(default_factory=dict)
    flop_counter: FlopCounter = field(default_factory=FlopCounter)
    num_scored: int = 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]:
        """Return one reward per pair of problem id and response ids."""
        names = list(dict.fromkeys(prompts))
        bare = [Sample(self.problems[name], self.prompt_ids[name], []) for name in names]
        caches = dict(zip(names, self.reward.compute_prompt_caches(bare, self.flop_counter), strict=True))
        samples = [
            Sample(self.problems[name], self.prompt_ids[name], ids)
            for name, ids in zip(prompts, responses, strict=True)
        ]
        values, objective_values, _ = self.reward.score_by_objective(
            samples, [caches[name] for name in prompts], flop_counter=self.flop_counter
        )
        num_objectives = len(self.reward.objectives)
        if num_objectives > 1:  # the names are always the same, so that all processes log them together
            scorable = [row for row in objective_values if row]
            self.components = {
                f"objective_{index}": sum(row[index] for row in scorable) / len(scorable) if scorable else math.nan
                for index in range(num_objectives)
            }
        self.num_scored += len(samples)
        return values

    def compute_flops_per_response(self) -> float:
        """Return the mean FLOPs of scoring one response."""
        return self.flop_counter.get_total_cost().flops / max(self.num_scored, 1)


@dataclass
class VerifierScorer:
    """Reward of 1 for a correct answer and 0 for another."""

    policy: Policy
    problems: dict[str, Problem]
    checker: AnswerChecker
    components: dict[str, float] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]:
        """Return one label per pair of problem id and response ids."""
        problems = [self.problems[name] for name in prompts]
        texts = [self.policy.decode_response(list(ids)) for ids in responses]
        return [float(result.is_correct) for _, result in Verifier(self.checker)(problems, texts)]

    def compute_flops_per_response(self) -> float:
        """Return 0, since no model is run."""
        return 0.0


@dataclass
class RefinedTeacher:
    """Teacher of sampled responses: at each prefix the distribution that the search's mirror step makes of π.

    The direct gradient of a score is known for the sampled token alone. So a reward model scores every token that the
    search may propose, which costs one token each. Other scores (of steps, or of hidden states) cannot be read after
    another token. With them the teacher is π, and the sampled token's λ·A is its advantage. In expectation over the
    samples, the gradient of the loss is then that of the reverse KL to π·exp(λ·A) with A known for every token.

    Args:
        policy: the frozen π.
        config: of the search, with solver mirror, its `gradient_at`, and β.
        divergence: "forward_kl" or "reverse_kl". A forward KL needs a distribution, so it takes what is known of it.
    """

    policy: Policy
    reward: Reward
    problems: dict[str, Problem]
    prompt_ids: dict[str, list[int]]
    config: SearchConfig
    divergence: str
    flop_counter: FlopCounter = field(default_factory=FlopCounter)
    num_read: int = 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[TeacherTargets]:
        """Return the targets along each response. A response that the reward cannot read has none.

        Raises:
            ValueError: a reward or a gradient is not a number.
        """
        pairs = zip(prompts, responses, strict=True)
        samples = self._add_draw_info([Sample(self.problems[name], self.prompt_ids[name], ids) for name, ids in pairs])
        distinct = dict(zip(prompts, samples, strict=True))
        caches = self.reward.compute_prompt_caches(list(distinct.values()), self.flop_counter)
        by_prompt = dict(zip(distinct, caches, strict=True))
        prompt_caches = [by_prompt[name] for name in prompts]
        rewards, response_caches = self.reward.score(
            samples, prompt_caches, flop_counter=self.flop_counter, return_caches=True
        )
        self._check_finite(rewards)
        rows = [row for row, value in enumerate(rewards) if value > -math.inf]
        scorable, scored = [samples[row] for row in rows], [response_caches[row] for row in rows]
        advantages = (
            self._score_candidates(scorable, scored, [rewards[row] for row in rows])
            if self.scores_candidates
            else self._compute_advantages(scorable, [prompt_caches[row] for row in rows], scored)
        )
        self.num_read += len(samples)
        by_row = dict(zip(rows, advantages, strict=True))
        return [self._make_targets(sample, by_row.get(row)) for row, sample in enumerate(samples)]

    @property
    def has_own_token_gradient(self) -> bool:
        return is_own_token_gradient(self.reward, self.config.get_gradient_point())

    @property
    def scores_candidates(self) -> bool:
        """Tell whether the reward is read after every token that the search may propose."""
        return self.has_own_token_gradient and self.reward.scores_every_token

    @property
    def is_policy_gradient(self) -> bool:
        """Tell whether the sampled tokens have advantages, beside a KL to π."""
        return self.divergence == REVERSE_KL and self.has_own_token_gradient and not self.scores_candidates

    def _check_finite(self, rewards: Sequence[float]) -> None:
        if invalid := [value for value in rewards if math.isnan(value) or value == math.inf]:
            raise ValueError(f"the reward {self.reward.name} became {invalid[0]}")

    @torch.no_grad()
    def _add_draw_info(self, samples: Sequence[Sample]) -> list[Sample]:
        """Return the samples with π's candidates along them, as if π had drawn them."""
        likelihood = policy_likelihood(self.policy)
        caches = likelihood.compute_prompt_caches(samples, self.flop_counter)
        _, caches = likelihood.score(samples, caches, [0] * len(samples), self.flop_counter, return_caches=True)
        completed = []
        for sample, cache in zip(samples, caches, strict=True):
            ids = torch.tensor(sample.response_ids, device=cache.hidden_states.device)
            candidates, logp = compute_top_candidates(
                self.policy.head(cache.hidden_states).float(),
                ids,
                self.policy.forbidden_mask,
                self.config.top_k_candidates,
            )
            states = cache.hidden_states.float().cpu()
            completed.append(
                replace(sample, draw_info=DrawInfo(self.policy.model, candidates.cpu(), logp.cpu(), states))
            )
        return completed

    def _compute_advantages(
        self,
        samples: Sequence[Sample],
        prompt_caches: Sequence[Sequence[ScoreCache]],
        response_caches: Sequence[Sequence[ScoreCache]],
    ) -> list[Tensor]:
        """Return A [T, K] of the candidates along each response, by the gradient of the reward."""
        gradients = self.reward.compute_gradient(
            samples,
            prompt_caches,
            response_caches,
            [_get_draw_info(sample).candidates for sample in samples],
            flop_counter=self.flop_counter,
            gradient_at=self.config.get_gradient_point(),
        )
        if any(gradient.isnan().any() for gradient in gradients):
            raise ValueError(f"the token gradient of {self.reward.name} holds NaN")
        if self.is_policy_gradient:
            return gradients
        columns = [find_token_columns(_get_draw_info(sample).candidates, sample.response_ids) for sample in samples]
        return [solvers.compute_advantages(*pair) for pair in zip(gradients, columns, strict=True)]

    def _score_candidates(
        self, samples: Sequence[Sample], response_caches: Sequence[Sequence[ScoreCache]], rewards: Sequence[float]
    ) -> list[Tensor]:
        """Return A [T, K]: the reward after a candidate less that after the response's own token. −inf: not known.

        After a stop token it is that of the whole response.
        """
        tables = [torch.full(_get_draw_info(sample).candidates.shape, -torch.inf) for sample in samples]
        places: list[tuple[int, int, int]] = []  # sample, position, column
        variants = []
        for index, sample in enumerate(samples):
            candidates = _get_draw_info(sample).candidates
            for position, column in self._find_replaceable(sample).nonzero().tolist():
                places.append((index, position, column))
                ids = [*sample.response_ids[:position], int(candidates[position, column])]
                is_partial = ids[-1] not in self.policy.stop_ids
                variants.append(replace(sample, response_ids=ids, draw_info=None, is_partial=is_partial))
        values, _ = self.reward.score(
            variants,
            [response_caches[index] for index, _, _ in places],
            num_shared=[position for _, position, _ in places],
            flop_counter=self.flop_counter,
        )
        self._check_finite(values)
        own_rewards = []
        for sample, caches, reward in zip(samples, response_caches, rewards, strict=True):
            own = self.reward.compute_running_rewards(sample, caches)[1:].tolist()
            is_ended = sample.response_ids[-1] in self.policy.stop_ids
            own_rewards.append([*own[:-1], reward] if is_ended else own)
        for (index, position, column), value in zip(places, values, strict=True):
            tables[index][position, column] = value - own_rewards[index][position]
        for table, sample in zip(tables, samples, strict=True):
            columns = find_token_columns(_get_draw_info(sample).candidates, sample.response_ids)
            table.scatter_(1, columns[:, None], 0.0)
        return tables

    def _find_replaceable(self, sample: Sample) -> Tensor:
        """Return [T, K] which candidates the search may propose in place of the response's own tokens."""
        info, vocabulary = _get_draw_info(sample), self.reward.in_vocabulary
        return compute_replaceable_mask(
            sample.response_ids, info.candidates, info.logp, vocabulary, self.config.candidate_min_p
        )

    def _make_targets(self, sample: Sample, advantages: Tensor | None) -> TeacherTargets:
        draw_info = _get_draw_info(sample)
        ids, logp = draw_info.candidates, draw_info.logp
        nothing = torch.zeros(len(ids))
        if advantages is None:
            return TeacherTargets(ids, torch.full_like(logp, -torch.inf), nothing)
        solver = self.config.solver
        assert isinstance(solver, MirrorSolver) and self.config.beta is not None
        weight, columns = solver.step_size / self.config.beta, find_token_columns(ids, sample.response_ids)
        if self.is_policy_gradient:
            return TeacherTargets(ids, logp, weight * advantages.gather(1, columns[:, None]).squeeze(1))
        is_own = torch.nn.functional.one_hot(columns, ids.shape[1]).bool()
        is_refined = (self._find_replaceable(sample) | is_own) & advantages.isfinite()
        gains = weight * advantages.masked_fill(~is_refined, 0.0)
        return TeacherTargets(ids, compute_refined_logp(logp, gains, is_refined), nothing)

    def compute_flops_per_response(self) -> float:
        """Return the mean FLOPs of the teacher for one response: π, the reward and its gradient."""
        return self.flop_counter.get_total_cost().flops / max(self.num_read, 1)


def _get_draw_info(sample: Sample) -> DrawInfo:
    assert sample.draw_info is not None
    return sample.draw_info


def train_online(
    method: str,
    base_policy: Policy,
    problems: Sequence[Problem],
    output_dir: Path,
    *,
    reward: Reward,
    checker: AnswerChecker,
    beta: float,
    sampling: Sampling,
    options: TrainOptions,
    lora: LoraArguments,
    config: SFTConfig,
    dtype: str,
    callback: EvaluationCallback | None = None,
    trl_options: Mapping[str, Any] | None = None,
    search_config: SearchConfig | None = None,
) -> TrainingResult:
    """Train a policy by RLOO, GRPO or on-policy distillation, and write the adapter or model, whole or not at all.

    Args:
        method: "rloo", "grpo" or "on-policy-distillation".
        base_policy: the frozen policy π that training starts from, and the reference of the KL.
        sampling: how responses are sampled. π* is the optimum only where that is π itself.
        config: `per_device_train_batch_size` responses per process and step, times the accumulated steps.
        dtype: of a frozen base.
        trl_options: further options of TRL's trainer (see `trl_options.select_trl_options`).
        search_config: of the mirror step that makes the teacher of on-policy distillation. None: the default one.

    Raises:
        ValueError: no problem that can be trained on, a batch that does not hold whole groups, a reward that is not
            finite or does not differ, weights that did not change, a full disk, or what `check_reference_model`
            refuses.
    """
    check_online_options(method, config, sampling.temperature, options)
    teacher_config = (
        _make_teacher_config(search_config or SearchConfig(), reward, beta) if method == ON_POLICY else None
    )
    check_stop_strings(base_policy, problems)
    check_reference_model(base_policy.name, options.tuning)
    is_graded = options.online_reward == "verifier"
    trainable, prompt_ids, skipped = _select_trainable_problems(
        problems, base_policy, reward, sampling, needs_answer=is_graded
    )
    judge: ResponseScorer | RefinedTeacher
    extra: dict[str, Any]
    if teacher_config is not None:
        divergence = options.get_divergence(method)
        judge = RefinedTeacher(base_policy, reward, trainable, prompt_ids, teacher_config, divergence)
        extra = {"teacher": judge, "divergence": divergence}
    else:
        judge = (
            VerifierScorer(base_policy, trainable, checker)
            if is_graded
            else RewardScorer(reward, trainable, prompt_ids)
        )
        extra = {"scorer": judge, "reward_name": options.online_reward, "allow_constant_rewards": is_graded}
    model = load_trainable_model(base_policy.name, tuning=options.tuning, dtype=dtype, config=config)
    trainer_class, trainer_config = _choose_trainer(
        method, config, len(trainable), base_policy, beta, sampling, options, trl_options or {}
    )
    trainer = trainer_class(
        model=model,
        args=trainer_config,
        train_dataset=Dataset.from_dict({"prompt": _order_problems(method, list(trainable), trainer_config, options)}),
        processing_class=load_padded_tokenizer(base_policy.name),
        peft_config=None if options.tuning == "full" else build_lora_config(lora, "CAUSAL_LM"),
        prompt_ids=prompt_ids,
        **extra,
    )
    size = measure_model_size(model, "policy")
    outcome = run_trainer(trainer, output_dir, tuning=options.tuning, callback=callback, name=f"train {method}")
    return _build_result(
        method, beta, trainer, outcome, size, judge.compute_flops_per_response(), skipped, len(trainable), options
    )


def _select_trainable_problems(
    problems: Sequence[Problem], policy: Policy, reward: Reward, sampling: Sampling, *, needs_answer: bool
) -> tuple[dict[str, Problem], dict[str, list[int]], dict[str, int]]:
    """Return problems and prompt ids by problem id, and how many were left out, by reason."""
    trainable, prompt_ids = {}, {}
    skipped: dict[str, int] = {}
    for problem in problems:
        reason = None
        try:
            ids = policy.encode(problem)
            max_new_tokens = min(policy.context_length - len(ids), reward.compute_max_new_tokens(problem, ids))
            if max_new_tokens < sampling.max_new_tokens:
                reason = "prompt too long for a response"
        except ValueError:
            reason = "prompt"
        if needs_answer and not problem.answer:
            reason = "no gold answer"
        if reason is None:
            trainable[problem.id], prompt_ids[problem.id] = problem, ids
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    if not trainable:
        raise ValueError(f"no problem can be trained on ({skipped}): lower max_new_tokens, or choose other problems")
    return trainable, prompt_ids, skipped


def _make_teacher_config(config: SearchConfig, reward: Reward, beta: float) -> SearchConfig:
    """Return the configuration of the mirror step that makes the teacher.

    Raises:
        ValueError: a search without that step, or a reward without a gradient.
    """
    check_teacher_options(config)
    if not reward.has_gradient:
        raise ValueError(
            f"the reward {reward.name} is a function, which has no gradient for {ON_POLICY}: train by rloo or grpo"
        )
    return config.with_beta(beta).with_default_gradient_at(reward.gradient_at)


def check_teacher_options(config: SearchConfig) -> None:
    """Refuse a search without the mirror step that makes the teacher of on-policy distillation."""
    if not isinstance(config.solver, MirrorSolver):
        raise ValueError(
            f"{ON_POLICY} takes the distribution of solver mirror, and solver {config.solver.name} has none"
        )


def _get_group_size(method: str, options: TrainOptions) -> int:
    """Return the number of responses that a method samples to one problem at a time."""
    return options.num_generations if method in GROUP_METHODS else 1


def _get_num_iterations(method: str, options: TrainOptions) -> int:
    """Return the optimizer steps of a method on the same responses."""
    return options.num_iterations if method in GROUP_METHODS else 1


def _order_problems(method: str, names: Sequence[str], config: Any, options: TrainOptions) -> list[str]:
    """Return the problems of all steps in their order: one permutation after the other, as one epoch.

    TRL draws each epoch's order from a generator that a resumed run restarts. Within one epoch the order is the same.
    """
    num_batches = math.ceil(config.max_steps / _get_num_iterations(method, options))
    num_prompts = num_batches * _count_responses_per_step(config) // _get_group_size(method, options)
    rng = random.Random(config.seed)
    ordered: list[str] = []
    while len(ordered) < num_prompts:
        ordered += rng.sample(names, len(names))
    return ordered[:num_prompts]


def _count_responses_per_step(config: Any) -> int:
    """Return the number of responses of one optimizer step, over all processes."""
    return int(config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size)


def check_stop_strings(base_policy: Policy, problems: Sequence[Problem]) -> None:
    """Refuse problems whose responses end with a string, since TRL samples them and knows only stop tokens."""
    stop_strings = next((stops for problem in problems if (stops := base_policy.get_stop_strings(problem))), None)
    if stop_strings:
        raise ValueError(
            f"{', '.join(ONLINE_METHODS)} cannot end a response at {stop_strings[0]!r}, where this policy's responses "
            f"end: train by {', '.join(OFFLINE_METHODS)}, or use a policy with a chat template"
        )


def check_online_options(method: str, config: SFTConfig, temperature: float, options: TrainOptions) -> None:
    """Refuse steps that do not hold whole groups, and responses that cannot differ, before anything is loaded."""
    checks = Checks()
    batch = _count_responses_per_step(config)
    checks.require(
        batch % _get_group_size(method, options) == 0,
        f"a step's {batch} responses (per_device_train_batch_size × gradient_accumulation_steps × processes) are "
        f"not whole groups of num_generations {options.num_generations}",
    )
    checks.require(temperature != 0, f"{method} needs responses that differ: temperature must be above 0")
    checks.require(
        method != ON_POLICY or options.online_reward == "reward",
        f"{ON_POLICY} needs the gradient of a reward: online_reward must be reward, not {options.online_reward}",
    )
    checks.raise_faults()


def _choose_trainer(
    method: str,
    config: SFTConfig,
    num_problems: int,
    policy: Policy,
    beta: float,
    sampling: Sampling,
    options: TrainOptions,
    trl_options: Mapping[str, Any],
) -> tuple[type[Any], Any]:
    """Return the trainer's class and its configuration."""
    responses_per_epoch = num_problems * _get_group_size(method, options)
    steps_per_epoch = responses_per_epoch * _get_num_iterations(method, options) / _count_responses_per_step(config)
    common = {
        "max_steps": config.max_steps
        if config.max_steps > 0
        else math.ceil(config.num_train_epochs * steps_per_epoch),
        "shuffle_dataset": False,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
        "generation_kwargs": build_generation_kwargs(policy, use_vllm=options.use_vllm),
        **options.get_trainer_options(),
        "disable_dropout": True,
        "remove_unused_columns": False,
    }
    if method == ON_POLICY:
        # TRL's β chooses the divergence, which the trainer's own loss knows already.
        return TokenIdsDistillationTrainer, convert_config(DistillationConfig, config, **{**common, **trl_options})
    common |= {
        "beta": beta,
        "num_generations": options.num_generations,
        "num_iterations": options.num_iterations,
    }
    if method == "rloo":
        return TokenIdsRLOOTrainer, convert_config(RLOOConfig, config, **{**common, **trl_options})
    # Scaling by a group's standard deviation would make λ differ from prompt to prompt, and dividing by the length
    # from response to response. The corrected KL has the gradient of KL(q ‖ π), the plain one that of KL(π ‖ q).
    grpo_options = {"scale_rewards": "none", "loss_type": "dr_grpo", "use_bias_correction_kl": True}
    return TokenIdsGRPOTrainer, convert_config(GRPOConfig, config, **{**common, **grpo_options, **trl_options})


def _build_result(
    method: str,
    beta: float,
    trainer: Any,
    outcome: TrainerOutcome,
    size: ModelSize,
    scoring_flops: float,
    skipped: dict[str, int],
    num_problems: int,
    options: TrainOptions,
) -> TrainingResult:
    num_iterations, group_size = _get_num_iterations(method, options), _get_group_size(method, options)
    num_responses = outcome.steps * _count_responses_per_step(trainer.args) / num_iterations
    tokens = trainer.state.num_input_tokens_seen  # prompts and responses, of all processes
    length = round(tokens / max(num_responses, 1))
    is_frozen = options.tuning != "full"
    forward = size.compute_forward_flops(0, length)
    step = compute_training_flops(size, outcome.trainable_parameters if is_frozen else 0, length, frozen=is_frozen)
    # Forward passes that score the sampled tokens: by π, and by q as it was when it sampled.
    num_scoring_passes = 0 if method == ON_POLICY else 2 if method == "rloo" or num_iterations > 1 else 1
    flops_per_response = (1 + num_scoring_passes) * forward + scoring_flops + num_iterations * step
    return TrainingResult(
        method=method,
        tuning=options.tuning,
        beta=beta,
        rows=num_problems,
        skipped=skipped,
        steps=outcome.steps,
        epochs=num_responses / group_size / num_problems,
        tokens=tokens,
        flops=num_responses * flops_per_response,
        seconds=outcome.seconds,
        loss=outcome.loss,
        stop_reason=outcome.stop_reason,
        method_metrics=_compute_method_metrics(outcome.log_history, num_responses, group_size),
    )


def _compute_method_metrics(log: Sequence[dict[str, Any]], num_responses: float, group_size: int) -> dict[str, float]:
    """Count groups without variance, clipped and unscorable responses from the shares in the log."""

    def mean(name: str) -> float:
        values = [entry[name] for entry in log if entry.get(name) is not None]
        return sum(values) / len(values) if values else 0.0

    constant_groups = mean("frac_reward_zero_std") * num_responses / group_size
    return {
        "responses": num_responses,
        **({"groups_without_variance": round(constant_groups)} if group_size > 1 else {}),
        "clipped_responses": round(mean("completions/clipped_ratio") * num_responses),
        "unscorable_responses": round(mean("unscorable_ratio") * num_responses),
    }
