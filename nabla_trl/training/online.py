"""KL-regularised RL on the reward that the search follows: RLOO and GRPO, the dual of test-time refinement.

Both maximise E_q[r] − β KL(q ‖ π) from π itself, with the same r, the same β and the same token ids. RLOO takes the KL
as β · (log q − log π) of the whole response, inside its reward: its optimum is π* ∝ π exp(r/β). GRPO has it in the
loss, token by token, and there only as it depends on the token at hand.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from trl import GRPOConfig, RLOOConfig, SFTConfig

from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter, ModelSize, measure_model_size
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward, Verifier
from nabla_trl.tasks.problem import Problem
from nabla_trl.training.callbacks import EvaluationCallback
from nabla_trl.training.offline import TrainerOutcome, TrainingResult, TrainOptions, load_padded_tokenizer, run_trainer
from nabla_trl.training.peft import (
    LoraArguments,
    build_lora_config,
    check_reference_model,
    compute_training_flops,
    load_trainable_model,
)
from nabla_trl.training.trainers import TokenIdsGRPOTrainer, TokenIdsRLOOTrainer, convert_config


@dataclass
class RewardScorer:
    """The reward of responses by their ids, as the search scores them.

    Attributes:
        components: mean of each of the reward's terms over the responses scored last.
    """

    reward: Reward
    problems: dict[str, Problem]
    prompt_ids: dict[str, list[int]]
    components: dict[str, float] = field(default_factory=dict)
    flop_counter: FlopCounter = field(default_factory=FlopCounter)
    num_scored: int = 0

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]:
        asked = list(dict.fromkeys(prompts))
        bare = [Sample(self.problems[name], self.prompt_ids[name], []) for name in asked]
        memos = dict(zip(asked, self.reward.compute_prompt_caches(bare, self.flop_counter), strict=True))
        samples = [
            Sample(self.problems[name], self.prompt_ids[name], ids)
            for name, ids in zip(prompts, responses, strict=True)
        ]
        values, parts, _ = self.reward.score_by_objective(
            samples, [memos[name] for name in prompts], flop_counter=self.flop_counter
        )
        self._update_components([part for part in parts if part])
        self.num_scored += len(samples)
        return values

    def _update_components(self, parts: list[list[float]]) -> None:
        count = len(self.reward.objectives)
        if count > 1:  # the names are always the same: all processes log them together
            means = [sum(part[index] for part in parts) / len(parts) if parts else math.nan for index in range(count)]
            self.components = {f"term_{index}": mean for index, mean in enumerate(means)}

    def compute_flops_per_response(self) -> float:
        """Mean FLOPs of scoring one response."""
        return self.flop_counter.get_total_cost().flops / max(self.num_scored, 1)


@dataclass
class VerifierScorer:
    """1 for a right answer, 0 for another."""

    policy: Policy
    problems: dict[str, Problem]
    checker: AnswerChecker
    components: dict[str, float] = field(default_factory=dict)

    def __call__(self, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]:
        problems = [self.problems[name] for name in prompts]
        texts = [self.policy.decode_response(list(ids)) for ids in responses]
        return [float(verdict.is_correct) for _, verdict in Verifier(self.checker)(problems, texts)]

    def compute_flops_per_response(self) -> float:
        return 0.0


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
) -> TrainingResult:
    """Train a policy by RLOO or GRPO and write the adapter, or the whole model, to `output` (whole or not at all).

    Args:
        base: the frozen policy π that training starts from and is held to.
        sampling: how responses are drawn; π* is the optimum only where that is π itself.
        config: `per_device_train_batch_size` responses per process and step, times the accumulated steps.

    Raises:
        ValueError: no problem that can be asked, a batch that does not hold whole groups, a reward that is not finite
            or does not differ, weights that did not change, a full disk, or what `check_reference` refuses.
    """
    check_online_options(config, sampling, options)
    check_stop_strings(base_policy, problems)
    check_reference_model(base_policy.name, options.tuning)
    asked, encoded, skipped = _select_trainable_problems(
        problems, base_policy, reward, sampling, graded=options.online_reward == "verifier"
    )
    scorer: RewardScorer | VerifierScorer
    if options.online_reward == "verifier":
        scorer = VerifierScorer(base_policy, asked, checker)
    else:
        scorer = RewardScorer(reward, asked, encoded)
    model = load_trainable_model(base_policy.name, tuning=options.tuning, dtype=dtype, config=config)
    kind, settings = _choose_trainer(method, config, len(asked), base_policy, beta, sampling, options)
    course = _order_problems(list(asked), settings, options)
    trainer = kind(
        model=model,
        args=settings,
        train_dataset=Dataset.from_dict({"prompt": course}),
        processing_class=load_padded_tokenizer(base_policy.name),
        peft_config=None if options.tuning == "full" else build_lora_config(lora, "CAUSAL_LM"),
        encoded=encoded,
        scorer=scorer,
        name=options.online_reward,
        labels=options.online_reward == "verifier",
    )
    size = measure_model_size(model, "policy")
    outcome = run_trainer(trainer, output_dir, tuning=options.tuning, callback=callback)
    return _build_result(
        method, beta, trainer, outcome, size, scorer.compute_flops_per_response(), skipped, len(asked), options
    )


def _select_trainable_problems(
    problems: Sequence[Problem], base: Policy, reward: Reward, sampling: Sampling, *, graded: bool
) -> tuple[dict[str, Problem], dict[str, list[int]], dict[str, int]]:
    """Problems and prompt ids by problem id, and how many were left out, by reason."""
    asked, encoded = {}, {}
    skipped: dict[str, int] = {}
    for problem in problems:
        reason = None
        try:
            prompt = base.encode(problem)
            if (
                min(base.context_length - len(prompt), reward.compute_max_new_tokens(problem, prompt))
                < sampling.max_new_tokens
            ):
                reason = "no room for a response"
        except ValueError:
            reason = "prompt"
        if graded and not problem.answer:
            reason = "no gold answer"
        if reason is None:
            asked[problem.id], encoded[problem.id] = problem, prompt
        else:
            skipped[reason] = skipped.get(reason, 0) + 1
    if not asked:
        raise ValueError(f"no problem can be trained on ({skipped}): lower max_new_tokens, or choose other problems")
    return asked, encoded, skipped


def _order_problems(names: Sequence[str], settings: Any, options: TrainOptions) -> list[str]:
    """The problems of all steps, in their order: one permutation after the other.

    TRL draws each epoch's order from a generator that a resumed run starts anew; of one epoch the order is the same.
    """
    count = (
        -(-settings.max_steps // options.num_iterations)
        * _count_responses_per_step(settings)
        // options.num_generations
    )
    order = random.Random(settings.seed)
    course: list[str] = []
    while len(course) < count:
        course += order.sample(names, len(names))
    return course[:count]


def _count_responses_per_step(config: Any) -> int:
    """Responses of one optimiser step, over all processes."""
    return int(config.per_device_train_batch_size * config.gradient_accumulation_steps * config.world_size)


def check_stop_strings(base_policy: Policy, problems: Sequence[Problem]) -> None:
    """Refuse problems whose responses end with a string: TRL draws them, and knows stop tokens alone."""
    ends = next((stops for problem in problems if (stops := base_policy.get_stop_strings(problem))), None)
    if ends:
        raise ValueError(
            f"rloo and grpo cannot end a response at {ends[0]!r}, where this policy's are over: train by sft, "
            "reward-weighted or dpo, or use a policy with a chat template"
        )


def check_online_options(config: SFTConfig, sampling: Sampling, options: TrainOptions) -> None:
    """Refuse steps that do not hold whole groups, and responses that cannot differ, before anything is loaded."""
    batch = _count_responses_per_step(config)
    if batch % options.num_generations:
        raise ValueError(
            f"a step's {batch} responses (per_device_train_batch_size × gradient_accumulation_steps × processes) are "
            f"not whole groups of num_generations {options.num_generations}"
        )
    if sampling.temperature == 0:
        raise ValueError("rloo and grpo need responses that differ: temperature must be above 0")


def _choose_trainer(
    method: str,
    config: SFTConfig,
    problems: int,
    base: Policy,
    beta: float,
    sampling: Sampling,
    options: TrainOptions,
) -> tuple[type[Any], Any]:
    per_epoch = problems * options.num_generations * options.num_iterations / _count_responses_per_step(config)
    common = {
        "max_steps": config.max_steps if config.max_steps > 0 else math.ceil(config.num_train_epochs * per_epoch),
        "shuffle_dataset": False,
        "beta": beta,
        "num_generations": options.num_generations,
        "num_iterations": options.num_iterations,
        "max_completion_length": sampling.max_new_tokens,
        "temperature": sampling.temperature,
        "top_k": sampling.top_k,
        "top_p": sampling.top_p,
        "min_p": sampling.min_p or None,
        # What the search never draws either: rows of the head without a token.
        "generation_kwargs": {"suppress_tokens": torch.nonzero(base.forbidden_mask).flatten().tolist() or None},
        "disable_dropout": True,
        "remove_unused_columns": False,
    }
    if method == "rloo":
        return TokenIdsRLOOTrainer, convert_config(RLOOConfig, config, **common)
    # Scaling by a group's spread would make λ differ from prompt to prompt, dividing by its own length from response
    # to response. The corrected KL has the gradient of KL(q ‖ π), the plain one that of KL(π ‖ q).
    dual = {"scale_rewards": "none", "loss_type": "dr_grpo", "use_bias_correction_kl": True}
    return TokenIdsGRPOTrainer, convert_config(GRPOConfig, config, **common, **dual)


def _build_result(
    method: str,
    beta: float,
    trainer: Any,
    outcome: TrainerOutcome,
    size: ModelSize,
    scoring_flops: float,
    skipped: dict[str, int],
    problems: int,
    options: TrainOptions,
) -> TrainingResult:
    """What it cost: drawing, reading by q and π, scoring, and the steps themselves."""
    drawn = outcome.steps * _count_responses_per_step(trainer.args) / options.num_iterations
    tokens = trainer.state.num_input_tokens_seen  # prompts and responses, of all processes
    length = round(tokens / max(drawn, 1))
    frozen = options.tuning != "full"
    forward = size.compute_forward_flops(0, length)
    step = compute_training_flops(size, outcome.trainable_parameters if frozen else 0, length, frozen=frozen)
    read = 2 if method == "rloo" or options.num_iterations > 1 else 1  # by q, as it was when it drew, and by π
    return TrainingResult(
        method=method,
        tuning=options.tuning,
        beta=beta,
        rows=problems,
        skipped=skipped,
        steps=outcome.steps,
        epochs=drawn / options.num_generations / problems,
        tokens=tokens,
        flops=drawn * ((1 + read) * forward + scoring_flops + options.num_iterations * step),
        seconds=outcome.seconds,
        loss=outcome.loss,
        stop_reason=outcome.stop_reason,
        method_metrics=_compute_method_metrics(outcome.log_history, drawn, options),
    )


def _compute_method_metrics(log: Sequence[dict[str, Any]], drawn: float, options: TrainOptions) -> dict[str, float]:
    """Zero-variance groups and clipped responses, counted from the shares in the log."""

    def mean(name: str) -> float:
        values = [entry[name] for entry in log if entry.get(name) is not None]
        return sum(values) / len(values) if values else 0.0

    return {
        "responses": drawn,
        "groups_without_variance": round(mean("frac_reward_zero_std") * drawn / options.num_generations),
        "clipped_responses": round(mean("completions/clipped_ratio") * drawn),
        "unreadable_responses": round(mean("unreadable_ratio") * drawn),
    }
