"""Teach an instruction-tuned model to answer word problems in short lines of arithmetic, for a search to refine.

    python recipes/svamp/make_policy.py --config recipes/svamp/policy.yaml --model HuggingFaceTB/SmolLM2-135M-Instruct

The recipe trains on the solutions in OUT/data/sft.jsonl, which recipes/svamp/prepare.py wrote. It saves the policy in
OUT/policy, with the chat template that it was trained with. Training continues from its last checkpoint.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from trl import SFTConfig

from nabla_trl.cli.parsing import parse_dataclasses, quiet_libraries, run_main
from nabla_trl.models.loading import load_causal_lm, load_tokenizer
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.tasks.registry import load_problems
from nabla_trl.traces.datasets import IGNORE_INDEX, TrainingRows
from nabla_trl.training.offline import train_on_traces
from nabla_trl.training.peft import LoraArguments
from nabla_trl.utils.fields import option, required_option
from nabla_trl.utils.files import write_atomic


@dataclass
class PolicyArguments:
    """The model and its data."""

    model: str = required_option("hub id or path of a causal language model")
    sft_file: str = option("outputs/svamp/data/sft.jsonl", "problems with solutions, of recipes/svamp/prepare.py")
    tuning: str = option("full", "weights to train: full (all), lora or qlora. An adapter is merged into the policy")
    dtype: str = option("float32", "data type of frozen weights: float32 or bfloat16")


def main(argv: Sequence[str]) -> None:
    quiet_libraries()
    args, lora, config = parse_dataclasses([PolicyArguments, LoraArguments, SFTConfig], argv)
    output_dir = Path(config.output_dir)
    tokenizer = load_tokenizer(args.model)
    if config.chat_template_path:
        tokenizer.chat_template = Path(config.chat_template_path).read_text(encoding="utf-8")
    end_token = tokenizer.eos_token_id
    rows = []
    for problem in load_problems(args.sft_file):
        prompt = tokenize_prompt(tokenizer, problem)
        response = [*tokenizer(problem.solution, add_special_tokens=False)["input_ids"], end_token]
        rows.append({"input_ids": prompt + response, "labels": [IGNORE_INDEX] * len(prompt) + response})
    config.output_dir = str(output_dir / "checkpoints")
    result = train_on_traces(
        "sft",
        args.model,
        TrainingRows(rows, Counter()),
        output_dir / ("policy" if args.tuning == "full" else "adapter"),
        beta=1.0,
        tuning=args.tuning,
        lora=lora,
        config=config,
        dtype=args.dtype,
    )
    if args.tuning != "full":
        merged_model = load_causal_lm(str(output_dir / "adapter"), dtype="float32", device="cpu")
        merged_model.save_pretrained(output_dir / "policy")
    tokenizer.save_pretrained(output_dir / "policy")
    write_atomic(output_dir / "policy.json", json.dumps(asdict(args) | asdict(result), indent=2) + "\n")
    shutil.rmtree(config.output_dir, ignore_errors=True)  # the optimizer's states are twice the model
    print(f"policy: {output_dir / 'policy'}, loss {result.loss:.3f}, {result.seconds:.0f} s")


if __name__ == "__main__":
    sys.exit(run_main(main))
