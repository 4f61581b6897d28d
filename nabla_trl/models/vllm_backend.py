"""Generation by a vLLM server: token ids in, token ids out.

    vllm serve POLICY --served-model-name POLICY --dtype float32 --max-logprobs 20 --generation-config vllm

Give the policy's name and dtype as they are given here, and at least as many log-probabilities as the search has
candidates. --logprobs-mode must be raw_logprobs, which is the default: log π is stored at temperature 1, before any
filter. Prefix caching, on by default, makes branching cheap. Costs are charged as if it never missed.

Only generation moves to the server. Gradients, rewards and adapters stay in transformers, so the policy is loaded here
too, and `connect_vllm` checks that both are the same model.

Every request has a seed of its own from its random stream, so that a sample depends on (seed, problem, label) alone.
The sampler is vLLM's. Its samples differ from those of transformers, and repeat as far as vLLM's logits do. In 16 bits
these may change with what else is in the batch (VLLM_BATCH_INVARIANT=1 prevents that on some GPUs).

The endpoint is vLLM's OpenAI-compatible /v1/completions (vllm/entrypoints/openai/completion/protocol.py).
"""

from __future__ import annotations

import math
import os
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Event, Thread
from typing import Any, ClassVar, TypeVar

import httpx2
import torch
from torch import Tensor

from nabla_trl.models import kv_cache
from nabla_trl.models.generation import build_warpers, make_rng
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy, get_context_length
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.models.requests import GenerationOutput, GenerationRequest
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.formatting import format_error

ItemT = TypeVar("ItemT")
ResultT = TypeVar("ResultT")

VLLM_MIN_LOGP = -9999.0  # what vLLM writes for −inf, which JSON cannot
FORBIDDEN_LOGIT_BIAS = -100.0  # the lowest bias that vLLM takes: a factor of e^−100
TOKEN_ID_PREFIX = "token_id:"

CHECK_PROBLEM = Problem(id="probe", question="What is 12+34*5-6?")
CHECK_MAX_NEW_TOKENS, CHECK_TOP_K_CANDIDATES = 16, 5
# The temperature is not 1, so that processed log-probabilities in place of raw ones are noticed.
CHECK_SAMPLING = Sampling(temperature=0.5, max_new_tokens=CHECK_MAX_NEW_TOKENS)
# Largest mean |Δ log π| between two implementations of the same weights. Other weights differ by far more.
LOGP_TOLERANCE = {torch.float64: 0.01, torch.float32: 0.01, torch.float16: 0.03, torch.bfloat16: 0.1}

RETRY_STATUSES = (429, 500, 502, 503, 504)  # a retry may succeed. Any other refusal is final
MAX_BACKOFF_SECONDS = 30.0


@dataclass(frozen=True)
class VllmBackend:
    """Generates with a vLLM server (see `GenerationBackend`).

    Attributes:
        model_name: the policy's name, under which the server lists the model.
        context_length: longest sequence (tokens) that the server takes.
        max_concurrent_requests: requests under way together. vLLM batches them.
    """

    client: HttpClient
    model_name: str
    context_length: int
    vllm_version: str
    max_concurrent_requests: int = 128

    returns_caches: ClassVar[bool] = False  # the server keeps them to itself
    supports_should_stop: ClassVar[bool] = False  # it answers with whole responses

    def get_context_length(self, policy: Policy) -> int:
        return min(get_context_length(policy.model), self.context_length)

    def get_metadata(self) -> dict[str, str]:
        return {"version/vllm": self.vllm_version}

    def prefill(self, policy: Policy, sequences: Sequence[list[int]]) -> list[Tensor]:
        return [kv_cache.make_empty_cache(policy.model)] * len(sequences)

    def generate(
        self,
        policy: Policy,
        requests: Sequence[GenerationRequest],
        sampling: Sampling,
        *,
        top_k_candidates: int = 1,
        return_cache: bool = False,
        return_log_importance_weight: bool = False,
    ) -> list[GenerationOutput]:
        """Send all requests at once.

        Candidates are vLLM's likeliest tokens. Where a forbidden one is among them its log π is −inf, and fewer than
        `top_k_candidates` can be used. (Transformers goes on to the next likeliest.)

        Raises:
            ConnectionError: the server fails or does not answer, at every try.
            ValueError: an option that the server does not support, or an answer that is not what was asked for.
        """
        if return_log_importance_weight and build_warpers(sampling):
            raise ValueError(
                "a vLLM server does not return the log-probabilities of its sampler: metropolis with vllm_url needs "
                "temperature 1, and no top_k, top_p or min_p"
            )
        if any(request.should_stop for request in requests):
            raise ValueError("a vLLM server generates whole responses, and cannot stop after a step: omit vllm_url")
        num_candidates = min(top_k_candidates, len(policy.forbidden_mask))
        shared_body = self._build_shared_body(policy, sampling, num_candidates)
        bodies = [shared_body | _build_request_body(request, sampling) for request in requests]

        def complete(index: int, stop_event: Event) -> GenerationOutput:
            try:
                answer = self.client.request_json("/v1/completions", bodies[index], stop_event)
            except ValueError as error:
                if "logprobs" not in str(error) or "max allowed" not in str(error):
                    raise
                hint = f"{num_candidates} candidates need vllm serve --max-logprobs {num_candidates}"
                raise ValueError(f"{error}: {hint}") from error
            try:
                return _parse_output(policy, requests[index], answer, num_candidates)
            except (KeyError, IndexError, TypeError, AttributeError) as error:
                raise ValueError(
                    f"{self.client.url} does not answer as vLLM does: {type(error).__name__} {error}"
                ) from error
            except ValueError as error:
                raise ValueError(f"{self.client.url}: {error}") from error

        return run_concurrently(complete, range(len(requests)), self.max_concurrent_requests)

    def _build_shared_body(self, policy: Policy, sampling: Sampling, num_candidates: int) -> dict[str, Any]:
        """Return what all requests share. Everything is set, because a generation config may change the defaults."""
        num_rows = len(policy.forbidden_mask)
        # A bias instead of `allowed_token_ids`: a few tokens instead of a whole vocabulary in every request.
        bias = {str(token): FORBIDDEN_LOGIT_BIAS for token in _list_forbidden_ids(policy)}
        return {
            "model": self.model_name,
            "temperature": sampling.temperature,
            "top_k": sampling.top_k,
            "top_p": sampling.top_p,
            "min_p": sampling.min_p,
            "repetition_penalty": 1.0,
            "presence_penalty": 0.0,
            "frequency_penalty": 0.0,
            # Only the policy's stop tokens end a response, whatever the server's copy of the model says.
            "ignore_eos": True,
            "stop_token_ids": sorted(token for token in policy.stop_ids if token < num_rows),
            "logprobs": num_candidates,
            "return_token_ids": True,
            "return_tokens_as_token_ids": True,  # in the table of candidates, which otherwise is by text
            **({"logit_bias": bias} if bias else {}),
        }


def _list_forbidden_ids(policy: Policy) -> list[int]:
    return torch.nonzero(policy.forbidden_mask).flatten().tolist()


def _build_request_body(request: GenerationRequest, sampling: Sampling) -> dict[str, Any]:
    body: dict[str, Any] = {"prompt": request.prefix_ids, "max_tokens": request.max_new_tokens}
    if request.stop_strings:  # a response ends behind the string, as in transformers
        body |= {"stop": list(request.stop_strings), "include_stop_str_in_output": True}
    if sampling.temperature:
        body["seed"] = int(request.get_rng().integers(2**63 - 1))
    return body


def _parse_output(
    policy: Policy, request: GenerationRequest, answer: dict[str, Any], num_candidates: int
) -> GenerationOutput:
    """Return the output in a server's answer.

    Raises:
        ValueError: an answer that is not what was asked for.
    """

    def is_finished(new_ids: list[int]) -> bool:
        return policy.is_finished(request.join_response(new_ids), request.stop_strings)

    [choice] = answer["choices"]
    ids, top_logprobs = list(choice["token_ids"]), choice["logprobs"]["top_logprobs"]
    if request.stop_strings:  # a server does not see a string that began in the prefix
        length = next((n for n in range(1, len(ids)) if is_finished(ids[:n])), len(ids))
        ids, top_logprobs = ids[:length], top_logprobs[:length]
    finished, limit = is_finished(ids), request.max_new_tokens
    if choice["prompt_token_ids"] != request.prefix_ids:
        raise ValueError("the prompt that came back is not the one that was sent")
    if not ids or len(ids) > limit or not (finished or len(ids) == limit):
        reason = choice["finish_reason"]
        raise ValueError(f"the response has {len(ids)} of {limit} tokens and no stop token ({reason})")
    if policy.forbidden_mask[ids].any():
        raise ValueError("the response holds a token that must not be sampled")
    if len(top_logprobs) != len(ids):
        raise ValueError(f"log-probabilities of {len(top_logprobs)} positions came back for {len(ids)} tokens")
    forbidden_ids = set(_list_forbidden_ids(policy))
    table = [
        _rank_candidates(logprobs, sampled_id, num_candidates, forbidden_ids)
        for logprobs, sampled_id in zip(top_logprobs, ids, strict=True)
    ]
    candidates = torch.tensor([[token for token, _ in row] for row in table])
    logp = torch.tensor([[value for _, value in row] for row in table], dtype=torch.float32)
    return GenerationOutput(ids, finished, candidates, logp, cache=kv_cache.make_empty_cache(policy.model))


def _rank_candidates(
    logprobs: dict[str, float], sampled_id: int, num_candidates: int, forbidden_ids: set[int]
) -> list[tuple[int, float]]:
    """Return the likeliest (token, log π) of one position, those that cannot be sampled at the end (−inf).

    The sampled token takes the last place if it is none of the likeliest, as in `compute_top_candidates`.
    """
    logp = {int(name.removeprefix(TOKEN_ID_PREFIX)): value for name, value in logprobs.items()}
    if not all(value <= 0 for value in logp.values()):
        raise ValueError("log-probabilities are NaN or above 0: --logprobs-mode must be raw_logprobs")
    likeliest = sorted(logp, key=logp.__getitem__, reverse=True)[:num_candidates]
    if len(likeliest) < num_candidates:
        raise ValueError(f"{len(likeliest)} candidates came back of {num_candidates}")
    allowed = {token: value for token, value in logp.items() if token not in forbidden_ids and value > VLLM_MIN_LOGP}
    ranked = sorted(likeliest, key=lambda token: token not in allowed)  # stable
    if sampled_id not in ranked:
        ranked[-1] = sampled_id
    return [(token, allowed.get(token, -math.inf)) for token in ranked]


# --- connecting: does the server have the same model? ---------------------------------------------------


def connect_vllm(
    policy: Policy, url: str, *, timeout: float = 600.0, retries: int = 4, backoff: float = 0.5
) -> Policy:
    """Return the same policy with the vLLM server at `url` as its back end.

    Args:
        timeout, retries, backoff: see `HttpClient`.

    Raises:
        ConnectionError: no answer.
        ValueError: no vLLM server, or one with another model, tokenizer or weights. The difference is named.
    """
    client = HttpClient(url, timeout=timeout, retries=retries, backoff=backoff)
    context_length = _fetch_context_length(client, policy.name)
    _check_tokenizer(client, policy)
    backend = VllmBackend(client, policy.name, context_length, str(_fetch_field(client, "/version", "version")))
    _check_weights(policy, backend)
    return replace(policy, backend=backend)


def _fetch_field(client: HttpClient, path: str, name: str, body: dict[str, Any] | None = None) -> Any:
    answer = client.request_json(path, body)
    if not isinstance(answer, dict) or name not in answer:
        raise ValueError(f"{client.url}{path} does not answer as vLLM does: no {name!r}")
    return answer[name]


def _fetch_context_length(client: HttpClient, name: str) -> int:
    """Return the longest sequence that the server takes for the model `name`."""
    try:
        cards = {card["id"]: card for card in _fetch_field(client, "/v1/models", "data")}
        if name in cards:
            return int(cards[name]["max_model_len"])
    except (KeyError, TypeError) as error:
        raise ValueError(f"{client.url}/v1/models does not answer as vLLM does: {error!r}") from error
    raise ValueError(
        f"{client.url} serves {', '.join(cards) or 'nothing'}, not {name!r}: start it with --served-model-name {name}"
    )


def _check_tokenizer(client: HttpClient, policy: Policy) -> None:
    """Refuse a server that tokenizes differently a text with tokens from all over the vocabulary."""
    tokens = torch.nonzero(~policy.forbidden_mask).flatten().tolist()
    text = CHECK_PROBLEM.question + policy.tokenizer.decode(tokens[:: max(1, len(tokens) // 256)])
    ours = list(policy.tokenizer(text)["input_ids"])
    theirs = _fetch_field(client, "/tokenize", "tokens", {"model": policy.name, "prompt": text})
    if theirs != ours:
        at = next((at for at, (a, b) in enumerate(zip(ours, theirs, strict=False)) if a != b), len(ours))
        raise ValueError(
            f"{client.url} has another tokenizer than {policy.name}: of a test text, "
            f"token {at} is {theirs[at : at + 1]} there and {ours[at : at + 1]} here"
        )


@torch.no_grad()
def _check_weights(policy: Policy, backend: VllmBackend) -> None:
    """Refuse a server whose log-probabilities along a response of its own are not those of the model here."""
    prompt_ids = tokenize_prompt(policy.tokenizer, CHECK_PROBLEM)
    request = GenerationRequest("probe", prompt_ids, make_rng(0, "probe"), CHECK_MAX_NEW_TOKENS)
    [output] = backend.generate(policy, [request], CHECK_SAMPLING, top_k_candidates=CHECK_TOP_K_CANDIDATES)
    ids = torch.tensor([prompt_ids + output.ids], device=policy.device)
    logits = policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].float()
    difference = (output.logp - logits.log_softmax(-1).cpu().gather(1, output.candidates)).abs()
    mean = float(difference[output.logp.isfinite()].mean())
    dtype = policy.model.dtype
    if not mean <= LOGP_TOLERANCE[dtype]:  # NaN too
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{backend.client.url} gives other log-probabilities than {policy.name} in {kind} does here: "
            f"{mean:.3g} apart on average, at most {LOGP_TOLERANCE[dtype]:g} is expected. It may have other weights, "
            f"or was started without --dtype {kind} or --logprobs-mode raw_logprobs"
        )


# --- HTTP -----------------------------------------------------------------------------------------------


class HttpClient:
    """A JSON client with retries.

    The environment variable VLLM_API_KEY, which vLLM itself reads, is sent as a bearer token.

    Args:
        url: http://host:port, with or without a final /v1.
        timeout: seconds to wait for an answer, of which at most ten for the connection.
        retries: how often a request is repeated after a time-out, a lost connection or one of `RETRY_STATUSES`.
        backoff: seconds before the first retry. Each further pause is twice as long, times a number in [0.5, 1.5].

    Raises:
        ValueError: not a URL, or numbers out of range.
    """

    def __init__(self, url: str, *, timeout: float = 600.0, retries: int = 4, backoff: float = 0.5):
        if not timeout > 0 or retries < 0 or not backoff >= 0:
            raise ValueError("a client needs timeout > 0, retries >= 0 and backoff >= 0")
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            raise ValueError(f"{url!r} is not a URL: {format_error(error)}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"a server's URL looks like http://localhost:8000, not {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._jitter = random.Random()  # not the global generator, which training seeds
        key = os.environ.get("VLLM_API_KEY")
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(timeout, connect=min(timeout, 10.0), pool=None),
            limits=httpx2.Limits(max_connections=None),  # `run_concurrently` sets the limit
        )
        weakref.finalize(self, self._http.close)

    def request_json(self, path: str, body: dict[str, Any] | None = None, stop_event: Event | None = None) -> Any:
        """Return the JSON answer to a POST of `body`, or to a GET without one. Thread-safe.

        Args:
            stop_event: no retries once it is set.

        Raises:
            ConnectionError: no answer, or one of `RETRY_STATUSES`, at every try.
            ValueError: the server refuses the request, or does not answer in JSON.
        """
        failure = ""
        for tries in range(1, self.retries + 2):
            try:
                response = self._http.request("GET" if body is None else "POST", self.url + path, json=body)
            except httpx2.TimeoutException:
                failure = f"no answer within {self.timeout:g} s"
            except httpx2.RequestError as error:
                failure = format_error(error)
            else:
                if response.status_code not in RETRY_STATUSES:
                    return self._parse_response(response, path)
                failure = f"status {response.status_code} ({_extract_error_message(response)})"
            pause = self.backoff * 2 ** (tries - 1) * self._jitter.uniform(0.5, 1.5)
            if tries > self.retries or (stop_event or Event()).wait(min(pause, MAX_BACKOFF_SECONDS)):
                break
        raise ConnectionError(f"{self.url}{path}: {failure}, tried {tries} time{'s' * (tries > 1)}")

    def _parse_response(self, response: httpx2.Response, path: str) -> Any:
        if response.status_code != 200:
            message = _extract_error_message(response)
            raise ValueError(f"{self.url}{path} refused with status {response.status_code}: {message}")
        try:
            return response.json()
        except ValueError as error:
            raise ValueError(f"{self.url}{path} did not answer in JSON but {response.text[:60]!r}") from error


def _extract_error_message(response: httpx2.Response) -> str:
    """Return vLLM's error message, or the beginning of any other answer."""
    try:
        text = str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        text = response.text
    return format_error(ValueError(text or "no message"))


def run_concurrently(
    function: Callable[[ItemT, Event], ResultT], items: Sequence[ItemT], num_threads: int
) -> list[ResultT]:
    """Return `function(item, stop_event)` of every item. The first error sets the event and is raised at once.

    Calls under way are not waited for, and the threads are daemons: a time-out of minutes must delay neither the error
    nor Ctrl-C. That is why this is no ThreadPoolExecutor.
    """
    todo: SimpleQueue[int] = SimpleQueue()
    done: SimpleQueue[tuple[int, ResultT] | Exception] = SimpleQueue()
    stop_event = Event()

    def work() -> None:
        while not stop_event.is_set():
            try:
                index = todo.get_nowait()
            except Empty:
                return
            try:
                done.put((index, function(items[index], stop_event)))
            except Exception as error:
                done.put(error)
                stop_event.set()

    for index in range(len(items)):
        todo.put(index)
    for _ in range(min(num_threads, len(items))):
        Thread(target=work, daemon=True).start()
    results: dict[int, ResultT] = {}
    try:
        while len(results) < len(items):
            result = done.get()
            if isinstance(result, Exception):
                raise result
            results[result[0]] = result[1]
    finally:
        stop_event.set()
    return [results[index] for index in range(len(items))]
