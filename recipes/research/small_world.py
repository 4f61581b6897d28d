"""An enumerable world: a random policy and reward model of a real architecture, and prompts, as folders and a file.

Weights are drawn wide from one seed, so that laws differ from prompt to prompt and from token to token; the reward's
head is scaled to a standard deviation of `spread` under the policy. Nothing is trained.
"""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import torch
from enumeration import enumerate_responses, score_enumerated_responses
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification, PreTrainedTokenizerFast

from nabla_trl.models.loading import load_policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.fields import option

END_TOKEN = "<|end|>"
# A turn is its words and the end; a response begins right after the prompt's end.
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class WorldArguments:
    """The size and the seed of a world that is made."""

    world_seed: int = option(2, "seed of its weights and prompts")
    num_symbols: int = option(4, "tokens beside the one that ends")
    num_prompts: int = option(6, "prompts, pairs of symbols")
    hidden_size: int = option(64, "hidden size of both models, a multiple of 8")
    num_layers: int = option(2, "layers of both models")
    weight_std: float = option(0.25, "standard deviation of every weight")
    reward_std: float = option(1.0, "standard deviation of the reward under the policy, mean over prompts")

    def __post_init__(self) -> None:
        if not 2 <= self.num_symbols <= len(ALPHABET):
            raise ValueError(f"symbols must be 2 to {len(ALPHABET)}, not {self.num_symbols}")
        if not 1 <= self.num_prompts <= self.num_symbols**2:
            raise ValueError(
                f"prompts must be 1 to {self.num_symbols**2}, the pairs of symbols, not {self.num_prompts}"
            )
        if self.hidden_size % 8 or self.hidden_size < 8 or self.num_layers < 1:
            raise ValueError("width must be a multiple of 8 and layers at least 1")
        if not (self.weight_std > 0 and self.reward_std > 0):
            raise ValueError("weights and spread must be positive")


def make_world(folder: Path, args: WorldArguments, max_new_tokens: int) -> None:
    """Write policy/, reward/ and problems.jsonl into `folder`, whole or not at all; responses have `length` tokens."""
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    _write_problems(scratch / "problems.jsonl", args)
    tokenizer = _make_tokenizer(args.num_symbols)
    scorer = _make_model(LlamaForSequenceClassification, tokenizer, args, args.world_seed + 1, num_labels=1)
    _save_model(_make_model(LlamaForCausalLM, tokenizer, args, args.world_seed), tokenizer, scratch / "policy")
    _save_model(scorer, tokenizer, scratch / "reward")
    with torch.no_grad():
        scorer.score.weight *= args.reward_std / _measure_reward_std(scratch, max_new_tokens)
    _save_model(scorer, tokenizer, scratch / "reward")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _write_problems(file: Path, args: WorldArguments) -> None:
    pairs = ["".join(pair) for pair in product(ALPHABET[: args.num_symbols], repeat=2)]
    chosen = np.random.default_rng(args.world_seed).permutation(pairs)[: args.num_prompts]
    lines = [json.dumps({"id": f"prompt-{text}", "question": str(text)}) for text in sorted(chosen)]
    file.write_text("\n".join(lines) + "\n", encoding="utf-8")


def _make_tokenizer(num_symbols: int) -> PreTrainedTokenizerFast:
    """One token per symbol, and one that ends, pads and stands for the unknown: there is none that is never drawn."""
    vocabulary = {token: index for index, token in enumerate([END_TOKEN, *ALPHABET[:num_symbols]])}
    core = Tokenizer(models.WordLevel(vocabulary, unk_token=END_TOKEN))
    core.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    core.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=core,
        eos_token=END_TOKEN,
        pad_token=END_TOKEN,
        unk_token=END_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def _make_model(
    model_class: Any, tokenizer: PreTrainedTokenizerFast, args: WorldArguments, seed: int, **options: Any
) -> Any:
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=args.hidden_size,
        intermediate_size=2 * args.hidden_size,
        num_hidden_layers=args.num_layers,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=64,
        initializer_range=args.weight_std,
        bos_token_id=None,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
        **options,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return model_class(config).eval()


def _save_model(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def _measure_reward_std(folder: Path, max_new_tokens: int) -> float:
    """Standard deviation of the reward under the policy, mean over prompts."""
    policy = load_policy(str(folder / "policy"), device="cpu")
    reward = load_reward(str(folder / "reward"), policy=policy, device="cpu")
    found = []
    for problem in load_problems(str(folder / "problems.jsonl")):
        tree = enumerate_responses(policy, problem, max_new_tokens)
        law, rewards = np.exp(tree.logp), score_enumerated_responses(tree, policy, reward).rewards
        found.append(np.sqrt(law @ (rewards - law @ rewards) ** 2))
    return float(np.mean(found))
