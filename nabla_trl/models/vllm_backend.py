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
from nabla_trl.models.generation import make_rng
from nabla_trl.models.http_client import HttpClient, run_concurrently
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.models.requests import GenerationOutput, GenerationRequest
from nabla_trl.tasks.problem import Problem

VLLM_MIN_LOGP = -9999.0  # vLLM writes this for −inf, which JSON does not know
FORBIDDEN_LOGIT_BIAS = -100.0  # the lowest bias that vLLM takes: a factor of e^−100
TOKEN_ID_PREFIX = "token_id:"

CHECK_PROBLEM = Problem(id="probe", question="What is 12+34*5-6?")
CHECK_MAX_NEW_TOKENS, CHECK_TOP_K_CANDIDATES = 16, 5
# Not 1, so that processed log-probabilities in place of raw ones show.
CHECK_SAMPLING = Sampling(temperature=0.5, max_new_tokens=CHECK_MAX_NEW_TOKENS)
# Largest mean |Δ log π| between two implementations of the same weights, by dtype; other weights differ by far more.
LOGP_TOLERANCE = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}


@dataclass(frozen=True)
class VllmBackend:
    """A server that draws for a policy.

    Attributes:
        model: the policy's name, under which the server lists it.
        context: longest sequence (tokens) the server takes.
        version: of vLLM.
        concurrency: requests under way together; vLLM batches them.
    """

    client: HttpClient
    model_name: str
    context_length: int
    vllm_version: str
    max_concurrent_requests: int = 128

    def generate(
        self, policy: Policy, requests: Sequence[GenerationRequest], sampling: Sampling, top_k_candidates: int
    ) -> list[GenerationOutput]:
        """Every job's continuation; `Job.cache` is not looked at, and the drafts' caches are empty rows.

        Candidates are vLLM's likeliest tokens: where forbidden ones are among them, fewer than asked for can be used
        (log π −inf), where `generate` goes on to the next likeliest.

        Raises:
            ConnectionError: the server fails, or does not answer, as often as is tried.
            ValueError: it refuses the request, or answers something else than was asked for.
        """
        width = min(top_k_candidates, len(policy.forbidden_mask))
        shared = self._build_shared_body(policy, sampling, width)
        asked = [(job, shared | _build_request_body(job, sampling)) for job in requests]

        def one(request: tuple[GenerationRequest, dict[str, Any]], stop: Event) -> GenerationOutput:
            job, body = request
            try:
                answer = self.client.request_json("/v1/completions", body, stop)
            except ValueError as error:
                if "logprobs" not in str(error) or "max allowed" not in str(error):
                    raise
                raise ValueError(f"{error}; {width} candidates need vllm serve --max-logprobs {width}") from error
            try:
                return _parse_output(policy, job, body, answer, width)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.client.url} does not answer as vLLM does: {type(error).__name__} {error}"
                ) from error
            except ValueError as error:
                raise ValueError(f"{self.client.url}: {error}") from error

        return run_concurrently(one, asked, self.max_concurrent_requests)

    def _build_shared_body(self, policy: Policy, sampling: Sampling, num_candidates: int) -> dict[str, Any]:
        """What all requests have in common. Nothing is left to defaults, which a generation config may change."""
        rows = len(policy.forbidden_mask)
        # A bias rather than `allowed_token_ids`: a few rows against a whole vocabulary in every request.
        never = {str(token): FORBIDDEN_LOGIT_BIAS for token in torch.nonzero(policy.forbidden_mask).flatten().tolist()}
        return {
            "model": self.model_name,
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
            "logprobs": num_candidates,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # in the table of candidates, which else is by text
            **({"logit_bias": never} if never else {}),
        }


def _build_request_body(job: GenerationRequest, sampling: Sampling) -> dict[str, Any]:
    own: dict[str, Any] = {"prompt": job.prefix_ids, "max_tokens": job.max_new_tokens}
    if job.stop_strings:  # a response ends behind the string, as those that are drawn here
        own |= {"stop": list(job.stop_strings), "include_stop_str_in_output": True}
    if not sampling.temperature:
        return own
    if job.rng is None:
        raise ValueError("sampling needs a random stream for every job")
    return own | {"seed": int(job.rng.integers(2**63 - 1))}


def _parse_output(
    policy: Policy, job: GenerationRequest, body: dict[str, Any], answer: dict[str, Any], num_candidates: int
) -> GenerationOutput:
    """The draft in an answer to `body`; ValueError where it is not what was asked for."""
    [choice] = answer["choices"]
    ids, tops = list(choice["token_ids"]), choice["logprobs"]["top_logprobs"]
    if job.stop_strings:  # a server does not see a string that began in the prefix
        length = next((n for n in range(1, len(ids)) if job.is_finished(policy, ids[:n])), len(ids))
        ids, tops = ids[:length], tops[:length]
    finished = job.is_finished(policy, ids)
    if choice["prompt_token_ids"] != body["prompt"]:
        raise ValueError("the prompt that came back is not the one that was sent")
    if not ids or len(ids) > body["max_tokens"] or not (finished or len(ids) == body["max_tokens"]):
        reason = choice["finish_reason"]
        raise ValueError(f"the response has {len(ids)} of {body['max_tokens']} tokens and no stop token ({reason})")
    if policy.forbidden_mask[ids].any():
        raise ValueError("the response holds a token that must not be drawn")
    if len(tops) != len(ids):
        raise ValueError(f"log-probabilities of {len(tops)} positions came back for {len(ids)} tokens")
    never = set(torch.nonzero(policy.forbidden_mask).flatten().tolist())
    tables = [_rank_candidates(top, drawn, num_candidates, never) for top, drawn in zip(tops, ids, strict=True)]
    candidates = torch.tensor([[token for token, _ in row] for row in tables])
    logp = torch.tensor([[value for _, value in row] for row in tables], dtype=torch.float32)
    return GenerationOutput(ids, finished, candidates, logp, cache=kv_cache.make_empty_cache(policy.model))


def _rank_candidates(
    top: dict[str, float], sampled_id: int, num_candidates: int, forbidden_ids: set[int]
) -> list[tuple[int, float]]:
    """The `width` likeliest (token, log π) of one position, those that cannot be drawn at the end (−inf).

    The drawn token is always among them: in the last place if it is none of the likeliest, so that the other places
    do not depend on it, as in `generate`.
    """
    named = {int(name.removeprefix(TOKEN_ID_PREFIX)): value for name, value in top.items()}
    if not all(value <= 0 for value in named.values()):
        raise ValueError("log-probabilities are NaN or above 0: --logprobs-mode must be raw_logprobs")
    likeliest = sorted(named, key=named.__getitem__, reverse=True)[:num_candidates]
    if len(likeliest) < num_candidates:
        raise ValueError(f"{len(likeliest)} candidates came back of {num_candidates}")
    usable = {token: value for token, value in named.items() if token not in forbidden_ids and value > VLLM_MIN_LOGP}
    ranked = sorted(likeliest, key=lambda token: token not in usable)  # stable
    if sampled_id not in ranked:
        ranked[-1] = sampled_id
    return [(token, usable.get(token, -math.inf)) for token in ranked]


# --- is it the same model? ----------------------------------------------------------------------------


def connect_vllm(
    policy: Policy, url: str, *, timeout: float = 600.0, retries: int = 4, backoff: float = 0.5
) -> Policy:
    """The same policy, drawing from the vLLM server at `url`, which is checked to serve it.

    Args:
        timeout, retries, backoff: see `Client`.

    Raises:
        ConnectionError: no answer.
        ValueError: it is no vLLM server, or serves another model, tokenizer or weights; what differs is named.
    """
    client = HttpClient(url, timeout=timeout, retries=retries, backoff=backoff)
    context = _fetch_context_length(client, policy.name)
    _check_tokenizer(client, policy)
    server = VllmBackend(client, policy.name, context, str(_fetch_field(client, "/version", "version")))
    served = replace(policy, backend=server)
    _check_weights(served)
    return served


def _fetch_field(client: HttpClient, path: str, name: str, body: dict[str, Any] | None = None) -> Any:
    answer = client.request_json(path, body)
    if not isinstance(answer, dict) or name not in answer:
        raise ValueError(f"{client.url}{path} does not answer as vLLM does: no {name!r}")
    return answer[name]


def _fetch_context_length(client: HttpClient, name: str) -> int:
    """The longest sequence that the server takes for the model `name`."""
    try:
        cards = {card["id"]: card for card in _fetch_field(client, "/v1/models", "data")}
        return int(_select_served_model(cards, client, name)["max_model_len"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{client.url}/v1/models does not answer as vLLM does: {error!r}") from error


def _select_served_model(cards: dict[str, Any], client: HttpClient, name: str) -> dict[str, Any]:
    if name not in cards:
        raise ValueError(
            f"{client.url} serves {', '.join(cards) or 'nothing'}, not {name!r}: "
            f"start it with --served-model-name {name}"
        )
    return cards[name]


def _check_tokenizer(client: HttpClient, policy: Policy) -> None:
    """Both must read a text that holds tokens from all over the vocabulary alike."""
    tokens = torch.nonzero(~policy.forbidden_mask).flatten().tolist()
    text = CHECK_PROBLEM.question + policy.tokenizer.decode(tokens[:: max(1, len(tokens) // 256)])
    ours = list(policy.tokenizer(text)["input_ids"])
    theirs = _fetch_field(client, "/tokenize", "tokens", {"model": policy.name, "prompt": text})
    if theirs != ours:
        at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        raise ValueError(
            f"{client.url} has another tokenizer than {policy.name}: of a probe text, "
            f"token {at} is {theirs[at : at + 1]} there and {ours[at : at + 1]} here"
        )


@torch.no_grad()
def _check_weights(policy: Policy) -> None:
    """Along a probe response of the server's, its log-probabilities must be those of the model here."""
    assert policy.backend is not None
    prompt = tokenize_prompt(policy.tokenizer, CHECK_PROBLEM)
    job = GenerationRequest("probe", prompt, make_rng(0, "probe"), CHECK_MAX_NEW_TOKENS)
    [draft] = policy.backend.generate(policy, [job], CHECK_SAMPLING, CHECK_TOP_K_CANDIDATES)
    off = (draft.logp - _compute_logp(policy, prompt, draft)).abs()
    mean = float(off[draft.logp.isfinite()].mean())
    dtype = policy.model.dtype
    if not mean <= LOGP_TOLERANCE[dtype]:
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{policy.backend.client.url} gives other log-probabilities than {policy.name} in {kind} does here: "
            f"{mean:.3g} apart on average, at most {LOGP_TOLERANCE[dtype]:g} is expected; it may have other weights, "
            f"or was started without --dtype {kind} or --logprobs-mode raw_logprobs"
        )


def _compute_logp(policy: Policy, prompt: list[int], draft: GenerationOutput) -> Tensor:
    """[T, K] log π of a draft's candidates in the model here."""
    ids = torch.tensor([prompt + draft.ids], device=policy.device)
    logits = policy.model(input_ids=ids).logits[0, len(prompt) - 1 : -1].float()
    return logits.log_softmax(-1).cpu().gather(1, draft.candidates)
