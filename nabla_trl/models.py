"""Policies and tokenizers: loading, where responses end, and the map between two vocabularies."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError
from torch import Tensor
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from nabla_trl.adapters import adapter_folder, adapter_note, merge_adapter, tokenizer_home
from nabla_trl.compute import ModelSize, model_size
from nabla_trl.kv import check_cacheable
from nabla_trl.names import cannot_load, one_line
from nabla_trl.options import PromptOptions
from nabla_trl.prompts import (
    NEXT_QUESTION,
    check_options,
    check_prompt,
    opens_thinking,
    prompt_ids,
    shows_examples,
)
from nabla_trl.tasks import Problem

if TYPE_CHECKING:
    from nabla_trl.server import Server

DTYPES = {
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
    "float64": torch.float64,
}
THINK = "<think>"  # before a response that begins inside a think block


@dataclass
class Policy:
    """A frozen causal LM with its tokenizer.

    Attributes:
        name: hub id or path, as the user gave it.
        stop_ids: tokens that end a response (every eos of tokenizer and generation config).
        forbidden: [rows of the output head] bool, tokens that must not be sampled: rows without a token string
            and a padding token that is not a stop token.
        plain_head: the logits are the output head of the last hidden state and nothing more; models that scale or
            cap them cannot be differentiated slice by slice.
        server: draws responses in this model's place (`server.connect`); gradients are taken here all the same.
        prompting: how problems are put to it.
    """

    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    name: str
    size: ModelSize
    stop_ids: frozenset[int]
    forbidden: Tensor
    plain_head: bool
    server: Server | None = None
    prompting: PromptOptions = field(default_factory=PromptOptions)

    @property
    def device(self) -> torch.device:
        return self.model.device

    @property
    def context(self) -> int:
        """Longest sequence (tokens) the position encoding was made for and the server takes."""
        own = context_length(self.model)
        return own if self.server is None else min(own, self.server.context)

    def encode(self, problem: Problem) -> list[int]:
        """Prompt ids: the chat template with a generation prompt; without one worked examples, or the plain question.

        Raises:
            PromptTooLong: the prompt fills the context.
            ValueError: it is empty, holds unknown characters, the template refuses it, or examples are missing.
        """
        ids = prompt_ids(self.tokenizer, problem, self.prompting)
        return check_prompt(ids, problem, self.tokenizer, name=self.name, context=self.context)

    def decode(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=True)

    def stops(self, problem: Problem) -> tuple[str, ...]:
        """The strings at whose end a response to this problem is over, besides the stop tokens."""
        examples = shows_examples(self.tokenizer, problem, self.prompting)
        return (*problem.stop, NEXT_QUESTION) if examples else problem.stop

    def over(self, ids: Sequence[int], stop: tuple[str, ...] = ()) -> bool:
        """Whether a response ends here: with a stop token, or with the token that completes one of the strings.

        A response that goes past such a token is not looked through: one that is drawn ends there.
        """
        if not ids:
            return False
        return ids[-1] in self.stop_ids or bool(stop and self._completes(ids, stop))

    def _completes(self, ids: Sequence[int], stop: tuple[str, ...]) -> bool:
        # The last token writes the last character, or its last byte: most tokens are told by that alone.
        last = self._texts.get(ids[-1])
        if last is None:
            last = self._texts[ids[-1]] = self.decode([ids[-1]])
        if not any(one[-1] in last or not one[-1].isascii() for one in stop):
            return False
        width = 1 + max(len(one.encode()) for one in stop)  # a token writes a byte at least
        tail = self.decode(list(ids[-width:]))
        return any(one in tail for one in stop)

    @cached_property
    def _texts(self) -> dict[int, str]:
        return {}

    def said(self, ids: list[int], stop: tuple[str, ...] = ()) -> str:
        """The text of a response up to a stop string, where its answer is looked for; thinking is marked as such."""
        text = self.decode(ids)
        ends = [at for one in stop if (at := text.find(one)) >= 0]
        return THINK * self._thinks + (text[: min(ends)] if ends else text)

    @cached_property
    def _thinks(self) -> bool:
        return opens_thinking(self.tokenizer, self.prompting)

    @cached_property
    def tokenizer_hash(self) -> str:
        """Identifies the map from ids to token strings. Every trace names it, so it is computed once."""
        return hash_vocabulary(self.tokenizer)


def hash_vocabulary(tokenizer: PreTrainedTokenizerBase) -> str:
    """Identifies the map from ids to token strings."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(json.dumps(vocabulary).encode()).hexdigest()[:16]


def context_length(model: PreTrainedModel) -> int:
    """Longest sequence (tokens) that the position encoding of a model was made for."""
    return model.config.get_text_config().max_position_embeddings


def load_tokenizer(name: str, revision: str | None = None) -> PreTrainedTokenizerBase:
    """The tokenizer of a model; of an adapter its own, or its base's where it has none."""
    home, version = tokenizer_home(name, revision)
    try:
        return AutoTokenizer.from_pretrained(home, revision=version)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load("a tokenizer", name, error)) from error


def load_policy(
    name: str,
    *,
    dtype: str = "float32",
    device: str | None = None,
    adapter: str | None = None,
    revision: str | None = None,
    prompting: PromptOptions | None = None,
) -> Policy:
    """Load a frozen policy from a hub id or a local folder, with an optional LoRA adapter merged in memory.

    It may itself be an adapter (`load_causal`).

    Raises:
        ValueError: nothing loadable at `name`, weights missing from the file or of another shape, no such dtype
            or device, a cache that cannot be cut, no eos token, an adapter that does not fit or changes nothing,
            prompt options that the chat template cannot heed.
    """
    prompting = PromptOptions() if prompting is None else prompting
    tokenizer = load_tokenizer(name, revision)
    check_options(prompting, tokenizer, name)
    model = load_causal(name, dtype=dtype, device=device, revision=revision)
    if adapter is not None:
        model = merge_adapter(model, adapter)
    policy = freeze_policy(model, tokenizer, name if adapter is None else f"{name}+{adapter}")
    return replace(policy, prompting=prompting)


def load_causal(name: str, *, dtype: str, device: str | None, revision: str | None = None) -> PreTrainedModel:
    """A causal LM; of an adapter, in a folder or on the hub, its base with the adapter merged in, under its own name.

    Raises:
        ValueError: as `load_model` and `merge_adapter`, or an adapter of a classifier.
    """
    folder = adapter_folder(name, revision)
    if folder is None:
        return load_model(AutoModelForCausalLM, name, dtype=dtype, device=device, revision=revision)
    note = adapter_note(folder)
    if note.task == "SEQ_CLS":
        raise ValueError(f"{name} is an adapter of a reward model, not of a causal LM: it gives no likelihoods")
    model = merge_adapter(load_causal(note.base, dtype=dtype, device=device, revision=note.revision), folder)
    model.name_or_path = name  # what is trained from it belongs to it, and not to its base
    return model


def freeze_policy(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str) -> Policy:
    """Wrap a model that is already in memory; the model is put in eval mode and frozen."""
    check_cacheable(model)
    model.eval().requires_grad_(False)
    stops = stop_tokens(model, tokenizer)
    rows = model.get_output_embeddings().weight.shape[0]
    forbidden = torch.ones(rows, dtype=torch.bool)
    known = [index for index in tokenizer.get_vocab().values() if index < rows]
    forbidden[known] = False
    padding = tokenizer.pad_token_id
    if padding is not None and padding < rows and padding not in stops:
        forbidden[padding] = True
    size = model_size(model, "policy")
    return Policy(model, tokenizer, name, size, stops, forbidden.to(model.device), has_plain_head(model))


@torch.no_grad()
def has_plain_head(model: PreTrainedModel) -> bool:
    ids = torch.zeros(1, 1, dtype=torch.long, device=model.device)
    hidden = model.base_model(input_ids=ids).last_hidden_state
    return torch.allclose(model.get_output_embeddings()(hidden), model(input_ids=ids).logits, atol=1e-3, rtol=1e-3)


def stop_tokens(model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
    configured = model.generation_config.eos_token_id if model.generation_config is not None else None
    listed = configured if isinstance(configured, list) else [configured]
    stops = frozenset(index for index in [*listed, tokenizer.eos_token_id] if index is not None)
    if not stops:
        raise ValueError(f"{model.name_or_path or 'the model'} has no eos token: responses could never end")
    return stops


def load_model(
    auto: Any,
    name: str,
    *,
    dtype: str,
    device: str | None,
    revision: str | None = None,
    supplied: str | None = None,
    **options: Any,
) -> PreTrainedModel:
    """`auto.from_pretrained`, refusing files that leave weights newly initialised.

    Args:
        supplied: a weight that may be missing, since the caller brings it.
        options: of the model's config.
    """
    if dtype not in DTYPES:
        raise ValueError(f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    where = usable_device(device)
    try:
        model, info = auto.from_pretrained(
            name, dtype=DTYPES[dtype], revision=revision, output_loading_info=True, **options
        )
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise ValueError(cannot_load("a model", name, error)) from error
    missing = sorted({*info["missing_keys"]} - {supplied})
    if missing:
        raise ValueError(
            f"{name} has no weights for {', '.join(missing[:3])}{' …' if len(missing) > 3 else ''}: "
            f"they would be random. Is it a {auto.__name__.removeprefix('AutoModelFor')} model?"
        )
    return model.to(where)


def usable_device(device: str | None) -> str:
    """`device`, or the default one; ValueError where there is none of that name."""
    if device is None:
        return "cuda" if torch.cuda.is_available() else "cpu"
    try:
        torch.empty(0, device=device)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"cannot use device {device!r}: {one_line(error)}") from error
    return device


def architecture(name: str, revision: str | None = None) -> str:
    """The class name in a model's config ("" where the config names none)."""
    try:
        config = AutoConfig.from_pretrained(name, revision=revision)
    except (OSError, ValueError) as error:
        raise ValueError(cannot_load("a model config", name, error)) from error
    return (config.architectures or [""])[0]


def vocabulary_map(
    source: PreTrainedTokenizerBase, target: PreTrainedTokenizerBase, *, source_rows: int, target_rows: int
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
    mapping = torch.full((source_rows,), -1, dtype=torch.long)
    missing = []
    for token, index in sorted(source.get_vocab().items(), key=lambda item: item[1]):
        match = theirs.get(token)
        if match is not None and match < target_rows and index < source_rows:
            mapping[index] = match
        elif token not in special and index < source_rows:
            missing.append(token)
    if missing:
        named = ", ".join(map(repr, missing[:5])) + (" …" if len(missing) > 5 else "")
        raise ValueError(
            f"the reward's vocabulary lacks {len(missing)} of the policy's tokens ({named}): "
            "gradients need a reward over the same token strings"
        )
    return mapping
