"""Evaluate a policy during training on held-out problems: accuracy, reward, KL and length.

A policy that is trained on a reward gets better rewards and worse answers at some point (reward over-optimization, Gao
et al., arXiv 2210.10760). The callback measures both, every `callback_steps` steps.
"""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, ClassVar

import torch
from accelerate.utils import gather_object
from peft import PeftModel
from transformers import PrinterCallback, TrainerCallback
from transformers.trainer import DEFAULT_PROGRESS_CALLBACK

from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.decoding import TransformersBackend
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.rewards.reward import Reward, Verifier
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.files import read_json_file, refuse_unreadable
from nabla_trl.utils.formatting import is_verbose
from nabla_trl.utils.progress import StepDisplay
from nabla_trl.utils.statistics import paired_difference


@dataclass(frozen=True)
class PolicyMeasurement:
    """Result of one evaluation. Lists are by problem, in the order of the problems.

    Attributes:
        correct: the greedy answer is correct.
        rewards: of one response sampled at temperature 1.
        kls: log q(y|x) − log π(y|x) of that response in nats, an unbiased estimate of KL(q ‖ π) for the prompt.
        lengths: of that response, in tokens.
        clipped: that response was cut at the limit.
    """

    step: int
    correct: list[bool]
    rewards: list[float]
    kls: list[float]
    lengths: list[int]
    clipped: list[bool]

    def to_log(self) -> dict[str, float]:
        """Return the means, under the names of the trainer's log."""
        return {
            "callback/accuracy": statistics.mean(self.correct),
            "callback/reward": statistics.mean(self.rewards),
            "callback/kl": statistics.mean(self.kls),
            "callback/length": statistics.mean(self.lengths),
            "callback/clipped_ratio": statistics.mean(self.clipped),
        }


class ProgressCallback(TrainerCallback):
    """Trainer callback that shows one line of progress, in place of the trainer's own bar and its log.

    Args:
        name: of the training.
    """

    # Names in the trainer's log, and names for people.
    METRICS: ClassVar[dict[str, str]] = {
        "loss": "loss",
        "reward": "reward",
        "kl": "KL",
        "callback/accuracy": "accuracy",
        "callback/reward": "reward",
        "callback/kl": "KL",
    }

    def __init__(self, name: str):
        self.name = name
        self.display: StepDisplay | None = None

    @classmethod
    @contextmanager
    def show(cls, trainer: Any, name: str) -> Iterator[None]:
        """Show the progress of a trainer within the block. With --verbose the trainer shows its own."""
        if is_verbose():
            yield
            return
        for callback in (DEFAULT_PROGRESS_CALLBACK, PrinterCallback):
            trainer.remove_callback(callback)
        progress = cls(name)
        trainer.add_callback(progress)
        try:
            yield
        finally:
            progress.close()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.display = StepDisplay(
            self.name, state.max_steps, num_done=state.global_step, show_progress=state.is_world_process_zero
        )
        self.display.__enter__()

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.display is not None:
            self.display.set_step(state.global_step)

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if self.display is not None:
            known = {self.METRICS[name]: value for name, value in (logs or {}).items() if name in self.METRICS}
            self.display.metrics |= {name: float(value) for name, value in known.items()}

    def close(self) -> None:
        """Stop showing."""
        if self.display is not None:
            self.display.__exit__(None, None, None)
            self.display = None


class EvaluationCallback(TrainerCallback):
    """Trainer callback that evaluates the policy before training, every `callback_steps` steps and at the end.

    Each checkpoint stores the most accurate measurement up to it, which a resumed run is compared with.

    Args:
        problems: with gold answers. Each process takes its share.
        base_policy: the frozen policy π that training started from.
        reward: what the search and the training maximize.
        max_new_tokens: longest response, in tokens.
        stop_on_overoptimization: end the training when the reward has risen and the accuracy fallen
            (`is_overoptimized`).

    Raises:
        ValueError: on attaching, where weights are sharded over processes, so that none could generate.
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
        self.max_new_tokens, self.callback_steps = max_new_tokens, callback_steps
        self.stop_on_overoptimization = stop_on_overoptimization
        self.verifier = Verifier(checker)
        self.best_measurement: PolicyMeasurement | None = None
        self.stop_reason = ""
        self.trainer: Any = None

    def attach(self, trainer: Any) -> None:
        """Evaluate the policy of this trainer."""
        if trainer.is_fsdp_enabled or trainer.is_deepspeed_enabled:
            raise ValueError(
                "evaluations during training need whole weights in each process: set max_callback_problems 0 under "
                "FSDP or DeepSpeed"
            )
        self.trainer = trainer
        trainer.add_callback(self)

    def restore_best_weights(self, trainer: Any) -> str:
        """Restore the weights of the best measurement after a stopped training, and return why it stopped, or ""."""
        if self.stop_reason and trainer.state.best_model_checkpoint:
            trainer._load_best_model()
        return self.stop_reason

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        file = _get_measurement_path(args, state)
        if state.global_step and file.is_file():
            with refuse_unreadable(f"{file} holds no measurement"):
                self.best_measurement = PolicyMeasurement(**read_json_file(file))
        self._measure_and_log(state, control)

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.is_world_process_zero and self.best_measurement is not None:
            _get_measurement_path(args, state).write_text(json.dumps(asdict(self.best_measurement)), encoding="utf-8")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.callback_steps == 0 or state.global_step == state.max_steps:
            self._measure_and_log(state, control)

    def _measure_and_log(self, state: Any, control: Any) -> None:
        current, best = self.measure(state.global_step), self.best_measurement
        self.trainer.log(current.to_log())
        if best is None or sum(current.correct) > sum(best.correct):
            self.best_measurement = current
            if self.stop_on_overoptimization and state.global_step:
                # The weights to go back to: a checkpoint that is not rotated away.
                state.best_global_step = state.global_step
                folder = Path(self.trainer.args.output_dir, f"checkpoint-{state.global_step}")
                state.best_model_checkpoint = str(folder)
                control.should_save = True
        elif is_overoptimized(best, current):
            before, after = best.to_log(), current.to_log()
            self.stop_reason = (
                f"over-optimized at step {current.step}: reward {before['callback/reward']:.3g} → "
                f"{after['callback/reward']:.3g}, accuracy {before['callback/accuracy']:.3f} → "
                f"{after['callback/accuracy']:.3f} since step {best.step}"
            )
            if self.stop_on_overoptimization and not best.step:
                self.stop_reason += ", the untrained policy; the weights kept are the last"
            control.should_training_stop = self.stop_on_overoptimization

    def measure(self, step: int) -> PolicyMeasurement:
        """Evaluate a greedy answer and one sample to each problem with the current weights."""
        accelerator = self.trainer.accelerator
        indices = list(range(accelerator.process_index, len(self.problems), accelerator.num_processes))
        with evaluation_mode(self.trainer.model, self.base_policy) as policy:
            process_columns = self._measure_problems([self.problems[index] for index in indices], policy)
        gathered = gather_object([list(zip(indices, *process_columns, strict=True))])
        rows = sorted(row for process_rows in gathered for row in process_rows)
        columns = [list(column) for column in zip(*rows, strict=True)][1:]
        return PolicyMeasurement(step, *columns)

    def _measure_problems(self, problems: list[Problem], policy: Policy) -> tuple[list[Any], ...]:
        """Return the columns of a `PolicyMeasurement`."""
        greedy = self._generate_responses(problems, policy, 0.0)
        texts = [
            policy.decode_response(output.ids, policy.get_stop_strings(problem))
            for problem, output in zip(problems, greedy, strict=True)
        ]
        correct = [result.is_correct for _, result in self.verifier(problems, texts)]
        sampled = self._generate_responses(problems, policy, 1.0)
        samples = [
            Sample(problem, policy.encode(problem), output.ids)
            for problem, output in zip(problems, sampled, strict=True)
        ]
        caches = self.reward.compute_prompt_caches(samples, FlopCounter())
        rewards, _ = self.reward.score(samples, caches, flop_counter=FlopCounter())
        # One candidate per position: log q of the sampled token itself.
        logps = [float(output.logp[:, 0].double().sum()) for output in sampled]
        kls = [q - p for q, p in zip(logps, compute_log_likelihoods(self.base_policy, samples), strict=True)]
        return correct, rewards, kls, [len(output.ids) for output in sampled], [not out.finished for out in sampled]

    def _generate_responses(
        self, problems: list[Problem], policy: Policy, temperature: float
    ) -> list[GenerationOutput]:
        sampling = Sampling(temperature=temperature, max_new_tokens=self.max_new_tokens)
        requests = []
        for problem in problems:
            prompt_ids = policy.encode(problem)
            requests.append(
                GenerationRequest(
                    problem.id,
                    prompt_ids,
                    make_rng(0, problem.id, "probe"),  # the same at every step: differences are the policy's
                    min(self.max_new_tokens, policy.context_length - len(prompt_ids)),
                    stop_strings=policy.get_stop_strings(problem),
                )
            )
        return generate_continuations(policy, requests, sampling, flop_counter=FlopCounter())


def _get_measurement_path(args: Any, state: Any) -> Path:
    return Path(args.output_dir, f"checkpoint-{state.global_step}", "callback.json")


def compute_log_likelihoods(policy: Policy, samples: Sequence[Sample]) -> list[float]:
    """Return log π(y|x) of each response, in nats."""
    objective = policy_likelihood(policy)
    caches = objective.compute_prompt_caches(samples, FlopCounter())
    values, _ = objective.score(samples, caches, [0] * len(samples), FlopCounter())
    return values


@contextmanager
def evaluation_mode(model: Any, base_policy: Policy) -> Iterator[Policy]:
    """Use the model in training as a policy to sample from: in evaluation mode, without gradients, and back again."""
    unwrapped = model.get_base_model() if isinstance(model, PeftModel) else model
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield replace(base_policy, model=unwrapped, name="the policy in training", backend=TransformersBackend())
    finally:
        model.train(was_training)


def is_overoptimized(best: PolicyMeasurement, current: PolicyMeasurement) -> bool:
    """Return True if the reward is higher than at the most accurate measurement and the accuracy significantly lower.

    The accuracy is significantly lower if the 95% interval over problems of its paired difference is below 0, and a
    sign-flip test agrees.
    """
    if statistics.mean(current.rewards) <= statistics.mean(best.rewards):
        return False
    current_scores, best_scores = (
        {str(index): [float(correct)] for index, correct in enumerate(measurement.correct)}
        for measurement in (current, best)
    )
    return paired_difference(current_scores, best_scores).side == "behind"
