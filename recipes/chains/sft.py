"""Teach a pretrained model the embedded task a little, so that it is right sometimes: a policy to study rewards on.

    python recipes/chains/sft.py --model HuggingFaceTB/SmolLM2-135M-Instruct --output_dir outputs/smol --max_steps 120

A LoRA adapter on right solutions of training problems, merged and saved as a plain model in OUT/policy. How many steps
leave it half right depends on the model: each checkpoint's accuracy on training problems apart is printed.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, TrainerCallback
from trl import SFTConfig, SFTTrainer

from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import generate_continuations, make_rng
from nabla_trl.models.loading import freeze_policy, load_model, load_tokenizer
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.models.requests import GenerationRequest
from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem
from nabla_trl.training.peft import LoraArguments, build_lora_config


@dataclass
class SftArguments:
    model: str = field(metadata={"help": "hub id or path of a causal LM with a chat template"})
    problems: int = field(default=4000, metadata={"help": "training problems"})
    probe: int = field(default=100, metadata={"help": "training problems apart, to measure accuracy on"})
    probe_steps: int = field(default=40, metadata={"help": "steps between two measurements"})
    dtype: str = field(default="float32", metadata={"help": "weights of the base: float32 or bfloat16"})


class Probe(TrainerCallback):
    """Prints the accuracy of one sampled answer per problem every so many steps."""

    def __init__(self, tokenizer, problems: Sequence[Problem], every: int):  # type: ignore[no-untyped-def]
        self.tokenizer, self.problems, self.every = tokenizer, problems, every

    def on_step_end(self, args, state, control, model=None, **kwargs) -> None:  # type: ignore[no-untyped-def]
        if state.global_step % self.every and state.global_step != state.max_steps:
            return
        trained = [weight for weight in model.parameters() if weight.requires_grad]
        with torch.no_grad():
            policy = freeze_policy(model.get_base_model(), self.tokenizer, "probe")
            print(f"step {state.global_step}: {accuracy(policy, self.problems):.3f} right", flush=True)
        model.train()
        for weight in trained:
            weight.requires_grad_(True)


def accuracy(policy: Policy, problems: Sequence[Problem]) -> float:
    """Share of right answers, one sample per problem at temperature 1."""
    jobs = [GenerationRequest(p.id, policy.encode(p), make_rng(0, p.id, "probe"), 64) for p in problems]
    drafts = generate_continuations(policy, jobs, Sampling(), flop_counter=FlopCounter())
    return sum(digit_chains.is_correct(p, policy.decode(d.ids)) for p, d in zip(problems, drafts, strict=True)) / len(
        problems
    )


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, lora, config = parse_dataclasses([SftArguments, LoraArguments, SFTConfig], argv)
    tokenizer = load_tokenizer(args.model)
    problems = digit_chains.make_digit_chain_problems("train", args.problems + args.probe)
    rng = random.Random(config.seed)
    rows = []
    for problem in problems[: args.problems]:
        prompt = tokenize_prompt(tokenizer, problem)
        solution = tokenizer(digit_chains.make_styled_solution(problem.question, rng), add_special_tokens=False)[
            "input_ids"
        ]
        response = [*solution, tokenizer.eos_token_id]
        rows.append({"input_ids": prompt + response, "labels": [-100] * len(prompt) + response})
    trainer = SFTTrainer(
        model=load_model(AutoModelForCausalLM, args.model, dtype=args.dtype, device=str(config.device)),
        args=config,
        train_dataset=Dataset.from_list(rows),
        processing_class=tokenizer,
        peft_config=build_lora_config(lora, "CAUSAL_LM"),
        callbacks=[Probe(tokenizer, problems[args.problems :], args.probe_steps)],
    )
    trainer.train()
    output = Path(config.output_dir, "policy")
    trainer.model.merge_and_unload().save_pretrained(output)
    tokenizer.save_pretrained(output)
    print(f"policy: {output}")


if __name__ == "__main__":
    sys.exit(run_main(main))
