"""Teach a pretrained model the embedded task a little, for a policy that is sometimes correct and can be refined.

    python recipes/chains/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir outputs/smol --max_steps 120

The recipe trains a LoRA adapter on correct solutions of training problems, and saves the merged model in OUT/policy.
How many steps give an accuracy of one half depends on the model. So the recipe prints the accuracy on other training
problems from time to time.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.loading import freeze_policy, load_model, load_tokenizer
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.models.sampling import make_rng
from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem
from nabla_trl.training.peft import LoraArguments, build_lora_config
from nabla_trl.utils.fields import option, required_option


@dataclass
class SftArguments:
    """The model and its data."""

    model: str = required_option("Hub id or path of a causal language model with a chat template.")
    max_train_problems: int = option(4000, "Maximum number of training problems.")
    max_callback_problems: int = option(100, "Maximum number of other training problems to measure the accuracy on.")
    callback_steps: int = option(40, "Optimizer steps between two measurements of the accuracy.")
    dtype: str = option("float32", "Data type of the base model's weights: float32 or bfloat16.")


class AccuracyCallback(TrainerCallback):
    """A callback that prints the accuracy of one sampled answer per problem."""

    def __init__(self, tokenizer, problems: Sequence[Problem], every_steps: int):  # type: ignore[no-untyped-def]
        self.tokenizer, self.problems, self.every_steps = tokenizer, problems, every_steps

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        """Print the accuracy after some steps and after the last one."""
        if state.global_step % self.every_steps and state.global_step != state.max_steps:
            return
        trained_weights = [weight for weight in model.parameters() if weight.requires_grad]
        with torch.no_grad():
            policy = freeze_policy(model.get_base_model(), self.tokenizer, "policy in training")
            print(f"step {state.global_step}: accuracy {measure_accuracy(policy, self.problems):.3f}", flush=True)
        model.train()
        for weight in trained_weights:
            weight.requires_grad_(True)


def measure_accuracy(policy: Policy, problems: Sequence[Problem]) -> float:
    """Return the share of correct answers, with one sample per problem at temperature 1."""
    requests = [
        GenerationRequest(problem.id, policy.encode(problem), make_rng(0, problem.id, "probe"), 64)
        for problem in problems
    ]
    outputs = generate_continuations(policy, requests, Sampling(), flop_counter=FlopCounter())
    texts = [policy.decode(output.ids) for output in outputs]
    return sum(map(digit_chains.is_correct, problems, texts)) / len(problems)


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, lora, config = parse_dataclasses([SftArguments, LoraArguments, SFTConfig], argv)
    tokenizer = load_tokenizer(args.model)
    problems = digit_chains.make_digit_chain_problems("train", args.max_train_problems + args.max_callback_problems)
    rng = random.Random(config.seed)
    rows = []
    for problem in problems[: args.max_train_problems]:
        prompt = tokenize_prompt(tokenizer, problem)
        solution = digit_chains.make_styled_solution(problem.question, rng)
        response = [*tokenizer(solution, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    trainer = SFTTrainer(
        model=load_model(AutoModelForCausalLM, args.model, dtype=args.dtype, device=str(config.device)),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=build_lora_config(lora, "CAUSAL_LM"),
        callbacks=[AccuracyCallback(tokenizer, problems[args.max_train_problems :], args.callback_steps)],
    )
    trainer.train()
    output = Path(config.output_dir, "policy")
    trainer.model.merge_and_unload().save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"policy: {output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
