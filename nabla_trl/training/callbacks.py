"""A probe in training: accuracy, reward, KL and length on problems kept apart, so that a hacked reward is seen.

A policy that is trained on a reward and not on what it stands for gets better rewards and worse answers at some point
(reward over-optimisation, Gao et al., arXiv 2210.10760). The probe measures both, every so many steps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import TrainerCallback

from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations, make_rng
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.requests import GenerationOutput, GenerationRequest
from nabla_trl.models.transformers_backend import TransformersBackend
from nabla_trl.rewards.reward import Reward, Verifier
from nabla_trl.search.proposals import policy_likelihood
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.statistics import paired_difference


@dataclass(frozen=True)
class PolicyMeasurement:
    """What one probe found; lists are by problem, in the order of the problems.

    Attributes:
        right: the greedy answer is right.
        rewards, kls, lengths: of one response drawn at temperature 1; kl is log q(y|x) − log π(y|x) in nats, an
            unbiased estimate of KL(q ‖ π) for that prompt.
        clipped: the response was cut at the limit.
    """

    step: int
    correct: list[bool]
    rewards: list[float]
    kls: list[float]
    lengths: list[int]
    clipped: list[bool]

    def to_log(self) -> dict[str, float]:
        """Means, under the names of the trainer's log."""
        return {
            "probe/accuracy": statistics.mean(self.correct),
            "probe/reward": statistics.mean(self.rewards),
            "probe/kl": statistics.mean(self.kls),
            "probe/length": statistics.mean(self.lengths),
            "probe/clipped_ratio": statistics.mean(self.clipped),
        }


class EvaluationCallback(TrainerCallback):
    """Reads the policy on held-out problems before training, every `every` steps and at the end.

    Each checkpoint keeps the most accurate reading up to it, which a resumed run is compared with.

    Args:
        problems: with gold answers; each process takes its share.
        base: the frozen policy π that training started from.
        reward: what the search and the training follow.
        max_new_tokens: longest response, in tokens.
        stop: end the training when the reward has gone up and the accuracy down (`overoptimised`).

    Raises:
        ValueError: on attaching, where weights are sharded over processes: no process could decode.
    """

    def __init__(
        self,
        problems: Sequence[Problem],
        *,
        base_policy: Policy,
        reward: Reward,
        max_new_tokens: int,
        callback_steps: int,
        stop_on_overoptimization: bool,
        checker: AnswerChecker,
    ):
        self.problems, self.base_policy, self.reward = list(problems), base_policy, reward
        self.max_new_tokens, self.callback_steps, self.stop_on_overoptimization = (
            max_new_tokens,
            callback_steps,
            stop_on_overoptimization,
        )
        self.verifier = Verifier(checker)
        self.best_measurement: PolicyMeasurement | None = None
        self.stop_reason = ""
        self.trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Read along with this trainer."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "a probe needs whole weights in each process: set probe_problems 0 under FSDP or DeepSpeed"
            )
        self.trainer = trainer
        trainer.add_callback(self)

    def restore_best_weights(self, trainer: Any) -> str:
        """After training: where it was stopped, the weights of the best probe are put back. Says why, or ""."""
        if self.stop_reason and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        return self.stop_reason

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        note = _get_measurement_path(args, state)
        if state.global_step and note.is_file():
            self.best_measurement = PolicyMeasurement(**json.loads(note.read_text(encoding="utf-8")))
        self._measure_and_log(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.best_measurement is not None:
            _get_measurement_path(args, state).write_text(json.dumps(asdict(self.best_measurement)), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.callback_steps == 0 or state.global_step == state.max_steps:
            self._measure_and_log(state, control)

    def _measure_and_log(self, state: Any, control: Any) -> None:
        reading = self.measure(state.global_step)
        self.trainer.log(reading.to_log())
        if self.best_measurement is None or sum(reading.correct) > sum(self.best_measurement.correct):
            self.best_measurement = reading
            if self.stop_on_overoptimization and state.global_step:
                # The weights to go back to: a checkpoint that is not rotated away.
                state.best_global_step = state.global_step
                folder = Path(self.trainer.args.output_dir, f"checkpoint-{state.global_step}")
                state.best_model_checkpoint = str(folder)
                control.should_save = True
        elif is_overoptimized(self.best_measurement, reading):
            found, had = reading.to_log(), self.best_measurement.to_log()
            self.stop_reason = (
                f"over-optimised at step {reading.step}: reward {had['probe/reward']:.3g} → "
                f"{found['probe/reward']:.3g}, accuracy {had['probe/accuracy']:.3f} → {found['probe/accuracy']:.3f} "
                f"since step {self.best_measurement.step}"
                + (
                    ""
                    if self.best_measurement.step or not self.stop_on_overoptimization
                    else ", the untrained policy; the weights kept are the last"
                )
            )
            control.should_training_stop = self.stop_on_overoptimization

    def measure(self, step: int) -> PolicyMeasurement:
        """Greedy answers and one sample to each problem by the weights as they are now."""
        accelerator = self.trainer.accelerator
        mine = list(range(accelerator.process_index, len(self.problems), accelerator.num_processes))
        with evaluation_mode(self.trainer.model, self.base_policy) as policy:
            shares = self._measure_problems([self.problems[index] for index in mine], policy)
        gathered = gather_object([list(zip(mine, *shares, strict=True))])
        rows = sorted(row for share in gathered for row in share)
        columns = [list(column) for column in zip(*rows, strict=True)][1:]
        return PolicyMeasurement(step, *columns)

    def _measure_problems(self, problems: list[Problem], policy: Policy) -> tuple[list[Any], ...]:
        greedy = self._generate_responses(problems, policy, 0.0)
        verdicts = self.verifier(
            problems,
            [policy.decode_response(d.ids, policy.get_stop_strings(p)) for p, d in zip(problems, greedy, strict=True)],
        )
        drawn = self._generate_responses(problems, policy, 1.0)
        samples = [Sample(p, policy.encode(p), d.ids) for p, d in zip(problems, drawn, strict=True)]
        memos = self.reward.compute_prompt_caches(samples, FlopCounter())
        rewards, _ = self.reward.score(samples, memos, flop_counter=FlopCounter())
        own = [_sum_token_logps(draft) for draft in drawn]
        kls = [q - p for q, p in zip(own, compute_log_likelihoods(self.base_policy, samples), strict=True)]
        right = [verdict.is_correct for _, verdict in verdicts]
        return right, rewards, kls, [len(draft.ids) for draft in drawn], [not draft.finished for draft in drawn]

    def _generate_responses(
        self, problems: list[Problem], policy: Policy, temperature: float
    ) -> list[GenerationOutput]:
        sampling = Sampling(temperature=temperature, max_new_tokens=self.max_new_tokens)
        jobs = [
            # The same random numbers at every probe: differences are the policy's.
            GenerationRequest(
                p.id,
                prompt,
                make_rng(0, p.id, "probe"),
                min(self.max_new_tokens, room),
                stop_strings=policy.get_stop_strings(p),
            )
            for p in problems
            for prompt in [policy.encode(p)]
            for room in [policy.context_length - len(prompt)]
        ]
        return generate_continuations(policy, jobs, sampling, flop_counter=FlopCounter())


def _get_measurement_path(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", "probe.json")


def _sum_token_logps(draft: GenerationOutput) -> float:
    """log π(y|x) of a draft made with one candidate per position: the drawn token itself."""
    return float(draft.logp[:, 0].double().sum())


def compute_log_likelihoods(policy: Policy, samples: Sequence[Sample]) -> list[float]:
    """log π(y|x) of each response, in nats."""
    term = policy_likelihood(policy)
    memos = term.compute_prompt_caches(samples, FlopCounter())
    values, _ = term.score(samples, memos, [0] * len(samples), FlopCounter())
    return values


@contextmanager
def evaluation_mode(model: Any, base_policy: Policy) -> Iterator[Policy]:
    """The model in training as a policy to draw from: evaluation mode, no gradients, and back again."""
    bare = model.get_base_model() if isinstance(model, PeftModel) else model
    training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield replace(base_policy, model=bare, name="the policy in training", backend=TransformersBackend())
    finally:
        model.train(training)


def is_overoptimized(best: PolicyMeasurement, current: PolicyMeasurement) -> bool:
    """The reward is above what it was at the most accurate reading, and the accuracy below it, beyond chance.

    Beyond chance: the 95% bootstrap interval over problems of the paired difference of accuracy lies below zero.
    """
    if statistics.mean(current.rewards) <= statistics.mean(best.rewards):
        return False
    ours, theirs = ({str(index): [float(right)] for index, right in enumerate(one.correct)} for one in (current, best))
    return paired_difference(ours, theirs).high < 0
