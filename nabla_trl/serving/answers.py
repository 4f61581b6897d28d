"""Write answers in the formats of OpenAI's chat completions and completions, whole or as the chunks of a stream.

Fields that OpenAI does not have stand under the key "nabla":

    answer    nabla: {seed, answer, reward_initial, reward, stop}, of the first choice. Each choice has its own
    usage     nabla: {flops, seconds, tokens, calls, starts, proposals, accepted, rejected}, the sum over all choices
    chunk     nabla: {chain, round, position, reward_before, reward, flops, text}, a `service.SearchProgress`
"""

from __future__ import annotations

import time
import uuid
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from transformers import PreTrainedTokenizerBase

from nabla_trl.engine.logprobs import TokenLogprobs
from nabla_trl.models.flops import Cost
from nabla_trl.serving.requests import SearchRequest
from nabla_trl.serving.service import SearchProgress
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.formatting import finite_or_none

TRACE_COUNTS = ("starts", "proposals", "accepted")


@dataclass(frozen=True)
class Choice:
    """One answer.

    Attributes:
        text: the answer before the stop string. With `echo`, the prompt stands before it.
        num_prompt_tokens, num_tokens: of the prompt and of the response.
        trace: of the search. None: only the prompt is returned.
        tokens: text, log-probability and alternatives of each token. None: not asked for.
    """

    index: int
    text: str
    num_prompt_tokens: int
    num_tokens: int
    seed: int
    trace: Trace | None = None
    tokens: list[TokenText] | None = None

    @property
    def finish_reason(self) -> str:
        """Return "stop" if the response has an end, and "length" if it is cut off."""
        return "stop" if self.trace is not None and self.trace.finished else "length"

    def describe_search(self) -> dict[str, Any] | None:
        """Return what the search says about the answer."""
        trace = self.trace
        if trace is None:
            return None
        rewards = {name: finite_or_none(getattr(trace, name)) for name in ("reward_initial", "reward")}
        return {"seed": self.seed, "answer": trace.answer, **rewards, "stop": trace.stop_reason}


@dataclass(frozen=True)
class TokenText:
    """A token of an answer.

    Attributes:
        offset: where it begins in the text.
        top: the likeliest tokens at its position, the likeliest first, with their log-probabilities.
    """

    text: str
    offset: int
    logprob: float | None
    top: list[tuple[str, float]]


def cut_at_stop_string(text: str, stop: Sequence[str]) -> str:
    """Return the text before the first stop string."""
    ends = [position for string in stop if (position := text.find(string)) >= 0]
    return text[: min(ends)] if ends else text


def write_tokens(tokenizer: PreTrainedTokenizerBase, logprobs: TokenLogprobs, begin: int) -> list[TokenText]:
    """Return the tokens of a sequence with their texts and log-probabilities, special tokens included.

    Args:
        begin: the first token to return. Those before it are its context.
    """
    ids = logprobs.ids
    tokens: list[TokenText] = []
    offset = 0
    for index in range(begin, len(ids)):
        before = ids[max(0, index - 4) : index]
        text = _decode_after(tokenizer, before, ids[index])
        top: dict[str, float] = {}
        for token, logprob in logprobs.top[index]:  # two tokens may have one text: the likelier one counts
            top.setdefault(_decode_after(tokenizer, before, token), logprob)
        tokens.append(TokenText(text, offset, logprobs.logprobs[index], list(top.items())))
        offset += len(text)
    return tokens


def _decode_after(tokenizer: PreTrainedTokenizerBase, before: list[int], token: int) -> str:
    """Return the text that a token adds to the few before it."""
    prefix, text = tokenizer.decode(before), tokenizer.decode([*before, token])
    return text[len(prefix) :] if text.startswith(prefix) else tokenizer.decode([token])


def build_usage(choices: Sequence[Choice], num_choices: int = 1) -> dict[str, Any]:
    """Return the tokens of prompts and answers, and under "nabla" the work of all searches.

    The work includes rejected proposals. Its seconds are the searches' share of the seconds of their batches.

    Args:
        num_choices: answers to each prompt, whose tokens count once.
    """
    prompt = sum(choice.num_prompt_tokens for choice in choices if choice.index % num_choices == 0)
    response = sum(choice.num_tokens for choice in choices)
    traces = [choice.trace for choice in choices if choice.trace is not None]
    counts = {name: sum(int(trace.meta[name]) for trace in traces) for name in TRACE_COUNTS}
    counts["rejected"] = counts["proposals"] - counts["accepted"]
    cost = sum((trace.cost for trace in traces), Cost())
    return {
        "prompt_tokens": prompt,
        "completion_tokens": response,
        "total_tokens": prompt + response,
        "nabla": {**cost.to_dict(), **counts},
    }


@dataclass(frozen=True)
class Answer:
    """The answer to one request, as one object or as the chunks of a stream."""

    model_name: str
    request: SearchRequest
    fingerprint: str
    created: int = field(default_factory=lambda: int(time.time()))
    id: str = field(default="", init=False)

    object_type = ""
    chunk_type = ""
    id_prefix = ""

    def __post_init__(self) -> None:
        object.__setattr__(self, "id", f"{self.id_prefix}-{uuid.uuid4().hex}")

    def write_text(self, text: str) -> dict[str, Any]:
        """Return the fields of a choice that hold its text."""
        raise NotImplementedError

    def write_delta(self, text: str | None) -> dict[str, Any]:
        """Return the fields of a chunk that hold new text. None: there is none."""
        raise NotImplementedError

    def write_logprobs(self, tokens: list[TokenText]) -> dict[str, Any]:
        """Return the log-probabilities of a choice."""
        raise NotImplementedError

    def build_first_chunks(self, index: int) -> list[dict[str, Any]]:
        """Return what a stream sends of a choice before there is any text."""
        return []

    def build_progress_chunk(self, index: int, progress: SearchProgress) -> dict[str, Any]:
        """Return a chunk without text, because a client cannot take back text that later changes."""
        rewards = {name: finite_or_none(getattr(progress, name)) for name in ("reward_before", "reward")}
        text = {"text": cut_at_stop_string(progress.text, self.request.stop)}
        return self._build_chunk(index, self.write_delta(None), nabla=asdict(progress) | rewards | text)

    def build_final_chunks(self, choice: Choice) -> list[dict[str, Any]]:
        """Return chunks with the text of a choice and its finish reason."""
        text = self.write_delta(choice.text) | {"logprobs": self._build_logprobs(choice)}
        end = self.write_delta(None) | {"finish_reason": choice.finish_reason}
        return [
            self._build_chunk(choice.index, text),
            self._build_chunk(choice.index, end, nabla=choice.describe_search()),
        ]

    def build(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the answer as one object."""
        return {
            **self._build_header(self.object_type),
            "choices": [
                {
                    "index": choice.index,
                    **self.write_text(choice.text),
                    "logprobs": self._build_logprobs(choice),
                    "finish_reason": choice.finish_reason,
                    "nabla": choice.describe_search(),
                }
                for choice in choices
            ],
            "usage": build_usage(choices, self.request.num_choices),
            "nabla": choices[0].describe_search(),
        }

    def build_usage_chunk(self, choices: Sequence[Choice]) -> dict[str, Any]:
        """Return the last chunk of a stream with the usage, which has no choices."""
        usage = build_usage(choices, self.request.num_choices)
        return {**self._build_header(self.chunk_type), "choices": [], "usage": usage}

    def _build_header(self, object_type: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": object_type,
            "created": self.created,
            "model": self.model_name,
            "system_fingerprint": self.fingerprint,
        }

    def _build_chunk(self, index: int, fields: dict[str, Any], **extra_fields: Any) -> dict[str, Any]:
        choice = {"index": index, "logprobs": None, "finish_reason": None} | fields
        empty_usage = {"usage": None} if self.request.include_usage else {}
        return {**self._build_header(self.chunk_type), "choices": [choice], **empty_usage, **extra_fields}

    def _build_logprobs(self, choice: Choice) -> dict[str, Any] | None:
        return None if choice.tokens is None else self.write_logprobs(choice.tokens)


class ChatAnswer(Answer):
    """An answer of POST /v1/chat/completions."""

    object_type, chunk_type, id_prefix = "chat.completion", "chat.completion.chunk", "chatcmpl"

    def write_text(self, text: str) -> dict[str, Any]:
        return {"message": {"role": "assistant", "content": text, "refusal": None}}

    def write_delta(self, text: str | None) -> dict[str, Any]:
        return {"delta": {} if text is None else {"content": text}}

    def build_first_chunks(self, index: int) -> list[dict[str, Any]]:
        return [self._build_chunk(index, {"delta": {"role": "assistant", "content": ""}})]

    def write_logprobs(self, tokens: list[TokenText]) -> dict[str, Any]:
        def describe(text: str, logprob: float | None) -> dict[str, Any]:
            return {"token": text, "logprob": logprob, "bytes": list(text.encode(errors="replace"))}

        content = [
            {**describe(token.text, token.logprob), "top_logprobs": [describe(*entry) for entry in token.top]}
            for token in tokens
        ]
        return {"content": content, "refusal": None}


class CompletionAnswer(Answer):
    """An answer of POST /v1/completions."""

    object_type, chunk_type, id_prefix = "text_completion", "text_completion", "cmpl"

    def write_text(self, text: str) -> dict[str, Any]:
        return {"text": text}

    def write_delta(self, text: str | None) -> dict[str, Any]:
        return {"text": text or ""}

    def write_logprobs(self, tokens: list[TokenText]) -> dict[str, Any]:
        tops: list[dict[str, float] | None] = []
        for token in tokens:
            tops.append(None if token.logprob is None else dict(token.top))
            if tops[-1] is not None and token.logprob is not None:
                tops[-1].setdefault(token.text, token.logprob)  # the token itself is there, as in OpenAI's answers
        return {
            "tokens": [token.text for token in tokens],
            "token_logprobs": [token.logprob for token in tokens],
            "top_logprobs": tops,
            "text_offset": [token.offset for token in tokens],
        }


def build_model_entry(name: str, created: int, context_length: int) -> dict[str, Any]:
    """Return a model as GET /v1/models lists it.

    Args:
        context_length: most tokens of prompt and answer together.
    """
    return {
        "id": name,
        "object": "model",
        "created": created,
        "owned_by": "nabla_trl",
        "root": name,
        "parent": None,
        "max_model_len": context_length,
    }
