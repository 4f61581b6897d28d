"""Map between the vocabularies of two models."""

from __future__ import annotations

import hashlib
import json
from typing import TYPE_CHECKING

import torch
from torch import Tensor
from transformers import (
    PreTrainedTokenizerBase,
)

if TYPE_CHECKING:
    pass


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies the map from ids to token strings."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def map_vocabulary(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, *, num_source_rows: int, num_target_rows: int
) -> Tensor:
    """Target id of each source id, matched by token string; −1 where the target has no such token.

    Only special and added tokens may be missing: a reward that lacks an ordinary token of the policy cannot
    read its responses.

    Args:
        source_rows: rows of the source's output head; rows beyond its vocabulary map to −1.
        target_rows: rows of the target's embedding.

    Returns:
        [source_rows] long.

    Raises:
        ValueError: ordinary tokens are missing; the first five are named.
    """
    theirs = target.get_vocab()
    special = set(source.all_special_tokens) | set(source.get_added_vocab())
    mapping = torch.full((num_source_rows,), -1, dtype=torch.long)
    missing = []
    for token, index in sorted(source.get_vocab().items(), key=lambda item: item[1]):
        match = theirs.get(token)
        if match is not None and match < num_target_rows and index < num_source_rows:
            mapping[index] = match
        elif token not in special and index < num_source_rows:
            missing.append(token)
    if missing:
        named = ", ".join(map(repr, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise ValueError(
            f"the reward's vocabulary lacks {len(missing)} of the policy's tokens ({named}): "
            "gradients need a reward over the same token strings"
        )
    return mapping
