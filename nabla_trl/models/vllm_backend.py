"""Responses from a vLLM server: token ids in, token ids out, in the place of `generate`'s own loop.

    vllm serve POLICY --served-model-name POLICY --dtype float32 --max-logprobs 20 --generation-config vllm

with the policy's name as it is given here, the dtype that it has here, and at least as many log-probabilities as the
search has candidates. --logprobs-mode must be raw_logprobs, as by default: log π is stored at temperature 1, before
any filter. Prefix caching, on by default, is what makes branching cheap; costs are charged as if it never missed.

Only drawing moves to the server. Gradients, rewards and adapters stay in transformers, so the policy is loaded here
too, and `connect` checks that both are the same model.

A draw has a seed of its own, from the job's random stream, so that it depends on (seed, problem, draw) alone. The
sampler is vLLM's: draws differ from those of transformers, and repeat as far as vLLM's logits do, which in 16 bits may
change with what else is in its batch (VLLM_BATCH_INVARIANT=1 takes that away on some GPUs).

The endpoint is vLLM's OpenAI-compatible /v1/completions (vllm/entrypoints/openai/completion/protocol.py).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from threading import Event
from typing import Any

import torch
from torch import Tensor

from nabla_trl.models import kv_cache
from nabla_trl.models.generation import random_stream
from nabla_trl.models.http_client import Client, concurrently
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import prompt_ids
from nabla_trl.models.requests import Draft, Job
from nabla_trl.tasks.problem import Problem

FLOOR = -9999.0  # vLLM writes this for −inf, which JSON does not know
NEVER = -100.0  # the lowest bias that vLLM takes: a factor of e^−100
MARK = "token_id:"

PROBE = Problem(id="probe", question="What is 12+34*5-6?")
PROBE_TOKENS, PROBE_CANDIDATES = 16, 5
# Not 1, so that processed log-probabilities in place of raw ones show.
PROBE_SAMPLING = Sampling(temperature=0.5, max_new_tokens=PROBE_TOKENS)
# Largest mean |Δ log π| between two implementations of the same weights, by dtype; other weights differ by far more.
TOLERANCE = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class Server:
    """A server that draws for a policy.

    Attributes:
        model: the policy's name, under which the server lists it.
        context: longest sequence (tokens) the server takes.
        version: of vLLM.
        concurrency: requests under way together; vLLM batches them.
    """

    client: Client
    model: str
    context: int
    version: str
    concurrency: int = 128

    def draw(self, policy: Policy, jobs: Sequence[Job], sampling: Sampling, candidates: int) -> list[Draft]:
        """Every job's continuation; `Job.cache` is not looked at, and the drafts' caches are empty rows.

        Candidates are vLLM's likeliest tokens: where forbidden ones are among them, fewer than asked for can be used
        (log π −inf), where `generate` goes on to the next likeliest.

        Raises:
            ConnectionError: the server fails, or does not answer, as often as is tried.
            ValueError: it refuses the request, or answers something else than was asked for.
        """
        width = min(candidates, len(policy.forbidden))
        shared = self._request(policy, sampling, width)
        asked = [(job, shared | _own(job, sampling)) for job in jobs]

        def one(request: tuple[Job, dict[str, Any]], stop: Event) -> Draft:
            job, body = request
            try:
                answer = self.client.call("/v1/completions", body, stop)
            except ValueError as error:
                if "logprobs" not in str(error) or "max allowed" not in str(error):
                    raise
                raise ValueError(f"{error}; {width} candidates need vllm serve --max-logprobs {width}") from error
            try:
                return _draft(policy, job, body, answer, width)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.client.url} does not answer as vLLM does: {type(error).__name__} {error}"
                ) from error
            except ValueError as error:
                raise ValueError(f"{self.client.url}: {error}") from error

        return concurrently(one, asked, self.concurrency)

    def _request(self, policy: Policy, sampling: Sampling, width: int) -> dict[str, Any]:
        """What all requests have in common. Nothing is left to defaults, which a generation config may change."""
        rows = len(policy.forbidden)
        # A bias rather than `allowed_token_ids`: a few rows against a whole vocabulary in every request.
        never = {str(token): NEVER for token in torch.nonzero(policy.forbidden).flatten().tolist()}
        return {
            "model": self.model,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # The stop tokens are ours alone, whatever the server's copy of the model thinks of them.
            "ignore_eos": True,
            "stop_token_ids": sorted(token for token in policy.stop_ids if token < rows),
            "logprobs": width,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # in the table of candidates, which else is by text
            **({"logit_bias": never} if never else {}),
        }


def _own(job: Job, sampling: Sampling) -> dict[str, Any]:
    own: dict[str, Any] = {"prompt": job.prefix, "max_tokens": job.limit}
    if job.stop:  # a response ends behind the string, as those that are drawn here
        own |= {"stop": list(job.stop), "include_stop_str_in_output": True}
    if not sampling.temperature:
        return own
    if job.stream is None:
        raise ValueError("sampling needs a random stream for every job")
    return own | {"seed": int(job.stream.integers(2**63 - 1))}


def _draft(policy: Policy, job: Job, body: dict[str, Any], answer: dict[str, Any], width: int) -> Draft:
    """The draft in an answer to `body`; ValueError where it is not what was asked for."""
    [choice] = answer["choices"]
    ids, tops = list(choice["token_ids"]), choice["logprobs"]["top_logprobs"]
    if job.stop:  # a server does not see a string that began in the prefix
        length = next((n for n in range(1, len(ids)) if job.over(policy, ids[:n])), len(ids))
        ids, tops = ids[:length], tops[:length]
    finished = job.over(policy, ids)
    if choice["prompt_token_ids"] != body["prompt"]:
        raise ValueError("the prompt that came back is not the one that was sent")
    if not ids or len(ids) > body["max_tokens"] or not (finished or len(ids) == body["max_tokens"]):
        reason = choice["finish_reason"]
        raise ValueError(f"the response has {len(ids)} of {body['max_tokens']} tokens and no stop token ({reason})")
    if policy.forbidden[ids].any():
        raise ValueError("the response holds a token that must not be drawn")
    if len(tops) != len(ids):
        raise ValueError(f"log-probabilities of {len(tops)} positions came back for {len(ids)} tokens")
    never = set(torch.nonzero(policy.forbidden).flatten().tolist())
    tables = [_ranked(top, drawn, width, never) for top, drawn in zip(tops, ids, strict=True)]
    candidates = torch.tensor([[token for token, _ in row] for row in tables])
    logp = torch.tensor([[value for _, value in row] for row in tables], dtype=torch.float32)
    return Draft(ids, finished, candidates, logp, cache=kv_cache.empty_row(policy.model))


def _ranked(top: dict[str, float], drawn: int, width: int, never: set[int]) -> list[tuple[int, float]]:
    """The `width` likeliest (token, log π) of one position, those that cannot be drawn at the end (−inf).

    The drawn token is always among them: in the last place if it is none of the likeliest, so that the other places
    do not depend on it, as in `generate`.
    """
    named = {int(name.removeprefix(MARK)): value for name, value in top.items()}
    if not all(value <= 0 for value in named.values()):
        raise ValueError("log-probabilities are NaN or above 0: --logprobs-mode must be raw_logprobs")
    likeliest = sorted(named, key=named.__getitem__, reverse=True)[:width]
    if len(likeliest) < width:
        raise ValueError(f"{len(likeliest)} candidates came back of {width}")
    usable = {token: value for token, value in named.items() if token not in never and value > FLOOR}
    ranked = sorted(likeliest, key=lambda token: token not in usable)  # stable
    if drawn not in ranked:
        ranked[-1] = drawn
    return [(token, usable.get(token, -math.inf)) for token in ranked]


# --- is it the same model? ----------------------------------------------------------------------------


def connect(policy: Policy, url: str, *, timeout: float = 600.0, retries: int = 4, backoff: float = 0.5) -> Policy:
    """The same policy, drawing from the vLLM server at `url`, which is checked to serve it.

    Args:
        timeout, retries, backoff: see `Client`.

    Raises:
        ConnectionError: no answer.
        ValueError: it is no vLLM server, or serves another model, tokenizer or weights; what differs is named.
    """
    client = Client(url, timeout=timeout, retries=retries, backoff=backoff)
    context = _context(client, policy.name)
    _check_tokenizer(client, policy)
    server = Server(client, policy.name, context, str(_field(client, "/version", "version")))
    served = replace(policy, server=server)
    _check_weights(served)
    return served


def _field(client: Client, path: str, name: str, body: dict[str, Any] | None = None) -> Any:
    answer = client.call(path, body)
    if not isinstance(answer, dict) or name not in answer:
        raise ValueError(f"{client.url}{path} does not answer as vLLM does: no {name!r}")
    return answer[name]


def _context(client: Client, name: str) -> int:
    """The longest sequence that the server takes for the model `name`."""
    try:
        cards = {card["id"]: card for card in _field(client, "/v1/models", "data")}
        return int(_named(cards, client, name)["max_model_len"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{client.url}/v1/models does not answer as vLLM does: {error!r}") from error


def _named(cards: dict[str, Any], client: Client, name: str) -> dict[str, Any]:
    if name not in cards:
        raise ValueError(
            f"{client.url} serves {', '.join(cards) or 'nothing'}, not {name!r}: "
            f"start it with --served-model-name {name}"
        )
    return cards[name]


def _check_tokenizer(client: Client, policy: Policy) -> None:
    """Both must read a text that holds tokens from all over the vocabulary alike."""
    tokens = torch.nonzero(~policy.forbidden).flatten().tolist()
    text = PROBE.question + policy.tokenizer.decode(tokens[:: max(1, len(tokens) // 256)])
    ours = list(policy.tokenizer(text)["input_ids"])
    theirs = _field(client, "/tokenize", "tokens", {"model": policy.name, "prompt": text})
    if theirs != ours:
        at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        raise ValueError(
            f"{client.url} has another tokenizer than {policy.name}: of a probe text, "
            f"token {at} is {theirs[at : at + 1]} there and {ours[at : at + 1]} here"
        )


@torch.no_grad()
def _check_weights(policy: Policy) -> None:
    """Along a probe response of the server's, its log-probabilities must be those of the model here."""
    assert policy.server is not None
    prompt = prompt_ids(policy.tokenizer, PROBE)
    job = Job("probe", prompt, random_stream(0, "probe"), PROBE_TOKENS)
    [draft] = policy.server.draw(policy, [job], PROBE_SAMPLING, PROBE_CANDIDATES)
    off = (draft.logp - _log_probabilities(policy, prompt, draft)).abs()
    mean = float(off[draft.logp.isfinite()].mean())
    dtype = policy.model.dtype
    if not mean <= TOLERANCE[dtype]:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{policy.server.client.url} gives other log-probabilities than {policy.name} in {kind} does here: "
            f"{mean:.3g} apart on average, at most {TOLERANCE[dtype]:g} is expected; it may have other weights, "
            f"or was started without --dtype {kind} or --logprobs-mode raw_logprobs"
        )


def _log_probabilities(policy: Policy, prompt: list[int], draft: Draft) -> Tensor:
    """[T, K] log π of a draft's candidates in the model here."""
    ids = torch.tensor([prompt + draft.ids], device=policy.device)
    logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).cpu().gather(1, draft.candidates)
