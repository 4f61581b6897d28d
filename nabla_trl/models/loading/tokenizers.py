"""Load tokenizers, and map one vocabulary to another."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from transformers import AutoTokenizer, PreTrainedTokenizerBase

from nabla_trl.models.loading.adapters import resolve_adapters
from nabla_trl.models.loading.pretrained import call_from_pretrained


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a model. An adapter without a tokenizer has that of its base.

    Raises:
        ValueError: there is none, or adapters that lead back to themselves.
    """
    chain = resolve_adapters(name, revision)
    for _, folder, _ in chain.adapters:
        if Path(folder, "tokenizer_config.json").is_file():
            return call_from_pretrained(AutoTokenizer, "a tokenizer", folder)
    return call_from_pretrained(AutoTokenizer, "a tokenizer", chain.base_model, revision=chain.revision)


def map_vocabulary(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, *, num_source_rows: int, num_target_rows: int
) -> Tensor:
    """Return the target id of each source id, matched by token string, and −1 where the target has no such token.

    Only special and added tokens may be missing. A reward that lacks an ordinary token of the policy cannot read its
    responses.

    Args:
        num_source_rows: rows of the source model's output head. Rows beyond its vocabulary map to −1.
        num_target_rows: rows of the target model's embedding table.

    Returns:
        [num_source_rows] long.

    Raises:
        ValueError: ordinary tokens are missing. The first five are named.
    """
    target_ids = target.get_vocab()
    special = set(source.all_special_tokens) | set(source.get_added_vocab())
    vocab_map = torch.full((num_source_rows,), -1, dtype=torch.long)
    missing = []
    for token, source_id in sorted(source.get_vocab().items(), key=lambda item: item[1]):
        target_id = target_ids.get(token)
        if target_id is not None and target_id < num_target_rows and source_id < num_source_rows:
            vocab_map[source_id] = target_id
        elif token not in special and source_id < num_source_rows:
            missing.append(token)
    if missing:
        names = ", ".join(map(repr, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise ValueError(
            f"the reward's vocabulary lacks {len(missing)} of the policy's tokens ({names}): "
            "gradients need a reward over the same token strings"
        )
    return vocab_map
