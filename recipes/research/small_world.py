"""Generate an enumerable world: a random policy and reward model of a real architecture, and prompts.

The weights have a large standard deviation, so that distributions differ between prompts and between tokens. The
reward's head is scaled to a given standard deviation of the reward under the policy. Nothing is trained.
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
# A turn is its text and the end token. A response begins right after the end token of the prompt.
CHAT_TEMPLATE = "{% for m in messages %}{{ m['content'] + '<|end|>' }}{% endfor %}"
ALPHABET = "abcdefghijklmnopqrstuvwxyz"


@dataclass
class WorldArguments:
    """Size and seed of a generated world."""

    world_seed: int = option(2, "Random seed of the generated world's weights and prompts.")
    num_symbols: int = option(4, "Number of tokens of the generated world, without the end token.")
    num_prompts: int = option(6, "Number of prompts of the generated world. Each is a pair of symbols.")
    hidden_size: int = option(64, "Hidden size of both generated models, a multiple of 8.")
    num_layers: int = option(2, "Number of layers of both generated models.")
    weight_std: float = option(
        0.25,
        "Standard deviation of every weight of the generated models. Increase it for policies with lower entropy.",
    )
    reward_std: float = option(
        1.0,
        "Standard deviation of the reward under the policy, averaged over prompts. Increase it for a stronger reward.",
    )

    def __post_init__(self) -> None:
        if not 2 <= self.num_symbols <= len(ALPHABET):
            raise ValueError(f"num_symbols must be 2 to {len(ALPHABET)}, not {self.num_symbols}")
        if not 1 <= self.num_prompts <= self.num_symbols**2:
            raise ValueError(
                f"num_prompts must be 1 to {self.num_symbols**2}, the pairs of symbols, not {self.num_prompts}"
            )
        if self.hidden_size % 8 or self.hidden_size < 8 or self.num_layers < 1:
            raise ValueError("hidden_size must be a multiple of 8 and num_layers at least 1")
        if not (self.weight_std > 0 and self.reward_std > 0):
            raise ValueError("weight_std and reward_std must be positive")


def make_world(folder: Path, args: WorldArguments, max_new_tokens: int) -> None:
    """Write policy/, reward/ and problems.jsonl to a folder, completely or not at all.

    Args:
        max_new_tokens: maximum length of the responses over which the standard deviation of the reward is computed.
    """
    scratch = folder.with_name(folder.name + ".tmp")
    shutil.rmtree(scratch, ignore_errors=True)
    scratch.mkdir(parents=True)
    pairs = ["".join(symbols) for symbols in product(ALPHABET[: args.num_symbols], repeat=2)]
    questions = np.random.default_rng(args.world_seed).permutation(pairs)[: args.num_prompts]
    lines = [json.dumps({"id": f"prompt-{question}", "question": str(question)}) for question in sorted(questions)]
    (scratch / "problems.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    tokenizer = _make_tokenizer(args.num_symbols)
    scorer = _make_model(LlamaForSequenceClassification, tokenizer, args, args.world_seed + 1, num_labels=1)
    _save_model(_make_model(LlamaForCausalLM, tokenizer, args, args.world_seed), tokenizer, scratch / "policy")
    _save_model(scorer, tokenizer, scratch / "reward")
    with torch.no_grad():
        scorer.score.weight *= args.reward_std / _measure_reward_std(scratch, max_new_tokens)
    _save_model(scorer, tokenizer, scratch / "reward")
    shutil.rmtree(folder, ignore_errors=True)
    scratch.rename(folder)


def _make_tokenizer(num_symbols: int) -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token per symbol and one for end, padding and unknown text. All can be sampled."""
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
    """Return the standard deviation of the reward under the policy, averaged over prompts."""
    policy = load_policy(str(folder / "policy"), device="cpu")
    reward = load_reward(str(folder / "reward"), policy=policy, device="cpu")
    deviations = []
    for problem in load_problems(str(folder / "problems.jsonl")):
        enumerated = enumerate_responses(policy, problem, max_new_tokens)
        probs, rewards = np.exp(enumerated.logp), score_enumerated_responses(enumerated, policy, reward).rewards
        deviations.append(np.sqrt(probs @ (rewards - probs @ rewards) ** 2))
    return float(np.mean(deviations))
