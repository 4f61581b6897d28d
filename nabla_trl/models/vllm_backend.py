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
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, replace
from queue import Empty, SimpleQueue
from threading import Event, Lock, Thread
from typing import Any, ClassVar

import httpx2
import torch

from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy, get_context_length
from nabla_trl.models.prompts import tokenize_prompt
from nabla_trl.models.sampling import TokenStatistic, build_warpers, make_rng
from nabla_trl.states.prefix import PrefixState
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.formatting import format_error, hide_userinfo

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
MAX_STEP_SECONDS = 1.0  # that a step waits for an output


@dataclass(frozen=True)
class VllmBackend:
    """Generates with vLLM servers (see `GenerationBackend`).

    Attributes:
        clients: one per server. All serve the same model.
        model_name: the policy's name, under which the server lists the model.
        context_length: longest sequence (tokens) that the server takes.
        max_concurrent_requests: requests under way together. vLLM batches them.
    """

    clients: tuple[HttpClient, ...]
    model_name: str
    context_length: int
    vllm_version: str
    max_concurrent_requests: int = 128

    returns_caches: ClassVar[bool] = False  # the server keeps them to itself
    supports_should_stop: ClassVar[bool] = False  # it answers with whole responses
    knows_distributions: ClassVar[bool] = False  # it returns the likeliest tokens alone

    def get_context_length(self, policy: Policy) -> int:
        return min(get_context_length(policy.model), self.context_length)

    def get_metadata(self) -> dict[str, str]:
        return {"version/vllm": self.vllm_version}

    def prefill(self, policy: Policy, sequences: Sequence[list[int]]) -> list[PrefixState]:
        return [PrefixState(0)] * len(sequences)

    def open_session(
        self,
        policy: Policy,
        sampling: Sampling,
        *,
        max_sequences: int = 256,
        top_k_candidates: int = 1,
        return_cache: bool = False,
        return_log_importance_weight: bool = False,
        statistics_top_k: int = 0,
        return_hidden_states: bool = False,
    ) -> VllmSession:
        """Return a session whose requests are sent as they come. It returns no hidden states.

        Candidates are vLLM's likeliest tokens. Where a forbidden one is among them its log π is −inf, and fewer than
        `top_k_candidates` can be used. (Transformers goes on to the next likeliest.)

        Raises:
            ValueError: an option that the server does not support.
        """
        if return_log_importance_weight and build_warpers(sampling):
            raise ValueError(
                "a vLLM server does not return the log-probabilities of its sampler: metropolis with vllm_url needs "
                "temperature 1, and no top_k, top_p or min_p"
            )
        num_candidates, num_rows = min(top_k_candidates, len(policy.forbidden_mask)), len(policy.forbidden_mask)
        return VllmSession(self, policy, sampling, num_candidates, min(statistics_top_k, num_rows))

    def build_shared_body(self, policy: Policy, sampling: Sampling, num_candidates: int) -> dict[str, Any]:
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


class VllmSession:
    """Requests of one kind on their way to the servers (see `GenerationSession`).

    Each goes to the server with the fewest requests under way. One that a dead server had goes to the others.
    """

    def __init__(
        self, backend: VllmBackend, policy: Policy, sampling: Sampling, num_candidates: int, statistics_top_k: int = 0
    ):
        self.backend, self.policy, self.sampling, self.num_candidates = backend, policy, sampling, num_candidates
        self.statistics_top_k = statistics_top_k
        self.num_logprobs = max(num_candidates, statistics_top_k)
        self.shared_body = backend.build_shared_body(policy, sampling, self.num_logprobs)
        self._requests: dict[Hashable, GenerationRequest] = {}
        self._stop_events: dict[Hashable, Event] = {}
        self._todo: SimpleQueue[Hashable] = SimpleQueue()
        self._done: SimpleQueue[tuple[Hashable, GenerationOutput | Exception]] = SimpleQueue()
        self._lock = Lock()
        self._num_threads = 0
        self._load = dict.fromkeys(backend.clients, 0)

    @property
    def num_unfinished(self) -> int:
        return len(self._requests)

    def list_requests(self) -> list[tuple[Hashable, GenerationRequest]]:
        return list(self._requests.items())

    def submit(self, tag: Hashable, request: GenerationRequest) -> None:
        if request.should_stop or request.stop_entropy < math.inf:
            raise ValueError("a vLLM server generates whole responses, and cannot stop after a step: omit vllm_url")
        if self.sampling.temperature > 0:
            request.get_rng()
        self._requests[tag], self._stop_events[tag] = request, Event()
        self._todo.put(tag)
        with self._lock:
            # Daemons, and no ThreadPoolExecutor: a time-out of minutes must delay neither an error nor Ctrl-C.
            if self._num_threads < self.backend.max_concurrent_requests:
                self._num_threads += 1
                Thread(target=self._work, daemon=True).start()

    def step(self) -> list[tuple[Hashable, GenerationOutput | Exception]]:
        """Wait for the next outputs, a second at most."""
        ended: list[tuple[Hashable, GenerationOutput | Exception]] = []
        timeout: float | None = MAX_STEP_SECONDS
        while True:
            try:
                tag, output = self._done.get(timeout=timeout) if timeout else self._done.get_nowait()
            except Empty:
                return ended
            timeout = None
            if self._requests.pop(tag, None) is not None:  # it was not cancelled
                del self._stop_events[tag]
                ended.append((tag, output))

    def cancel(self, tags: Collection[Hashable]) -> None:
        for tag in tags:
            if self._requests.pop(tag, None) is not None:
                self._stop_events.pop(tag).set()

    def _work(self) -> None:
        while True:
            with self._lock:
                try:
                    tag = self._todo.get_nowait()
                except Empty:
                    self._num_threads -= 1
                    return
            request, stop_event = self._requests.get(tag), self._stop_events.get(tag)
            if request is None or stop_event is None:
                continue
            try:
                self._done.put((tag, self._complete(request, stop_event)))
            except Exception as error:
                self._done.put((tag, error))

    def _complete(self, request: GenerationRequest, stop_event: Event) -> GenerationOutput:
        """Send a request to the least busy server, and to the next one if that is dead.

        Raises:
            ConnectionError: no server answers, at every try.
            ValueError: an answer that is not what was asked for.
        """
        body = self.shared_body | _build_request_body(request, self.sampling)
        while True:
            with self._lock:
                client = min(self._load, key=self._load.__getitem__)
                self._load[client] += 1
            try:
                return self._parse(client, request, client.request_json("/v1/completions", body, stop_event))
            except ConnectionError:
                with self._lock:
                    self._load.pop(client, None)
                    if not self._load:
                        self._load = dict.fromkeys(self.backend.clients, 0)  # for requests that come later
                        raise
            except ValueError as error:
                if "logprobs" not in str(error) or "max allowed" not in str(error):
                    raise
                hint = f"{self.num_logprobs} log-probabilities need vllm serve --max-logprobs {self.num_logprobs}"
                raise ValueError(f"{error}: {hint}") from error
            finally:
                with self._lock:
                    if client in self._load:
                        self._load[client] = max(0, self._load[client] - 1)

    def _parse(self, client: HttpClient, request: GenerationRequest, answer: Any) -> GenerationOutput:
        try:
            return _parse_output(self.policy, request, answer, self.num_candidates, self.statistics_top_k)
        except (KeyError, IndexError, TypeError, AttributeError) as error:
            raise ValueError(f"{client.url} does not answer as vLLM does: {type(error).__name__} {error}") from error
        except ValueError as error:
            raise ValueError(f"{client.url}: {error}") from error


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
    policy: Policy, request: GenerationRequest, answer: dict[str, Any], num_candidates: int, statistics_top_k: int = 0
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
    statistics = None
    if statistics_top_k:
        top_means = [_compute_top_mean(logprobs, statistics_top_k, forbidden_ids) for logprobs in top_logprobs]
        statistics = torch.full((len(ids), len(TokenStatistic)), torch.nan)
        statistics[:, TokenStatistic.TOP_LOGP] = torch.tensor(top_means)
    return GenerationOutput(ids, finished, candidates, logp, cache=PrefixState(0), statistics=statistics)


def _compute_top_mean(logprobs: dict[str, float], top_k: int, forbidden_ids: set[int]) -> float:
    """Return the mean log π of those of the `top_k` likeliest tokens of one position that can be sampled."""
    likeliest = sorted(logprobs, key=logprobs.__getitem__, reverse=True)[:top_k]
    values = [
        logprobs[name]
        for name in likeliest
        if logprobs[name] > VLLM_MIN_LOGP and int(name.removeprefix(TOKEN_ID_PREFIX)) not in forbidden_ids
    ]
    return math.fsum(values) / len(values) if values else 0.0


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
    """Return the same policy with one or several vLLM servers as its back end.

    Args:
        url: of the server, or several URLs separated by commas.
        timeout, retries, backoff: see `HttpClient`.

    Raises:
        ConnectionError: no answer.
        ValueError: no vLLM server, or one with another model, tokenizer or weights. The difference is named.
    """
    clients = tuple(
        HttpClient(one.strip(), timeout=timeout, retries=retries, backoff=backoff) for one in url.split(",")
    )
    context_length = min(fetch_context_length(client, policy.name) for client in clients)
    version = str(_fetch_field(clients[0], "/version", "version"))
    for client in clients:
        _check_tokenizer(client, policy)
        _check_weights(policy, VllmBackend((client,), policy.name, context_length, version))
    return replace(policy, backend=VllmBackend(clients, policy.name, context_length, version))


def _fetch_field(client: HttpClient, path: str, name: str, body: dict[str, Any] | None = None) -> Any:
    answer = client.request_json(path, body)
    if not isinstance(answer, dict) or name not in answer:
        raise ValueError(f"{client.url}{path} does not answer as vLLM does: no {name!r}")
    return answer[name]


def fetch_context_length(client: HttpClient, name: str) -> int:
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
    session = backend.open_session(policy, CHECK_SAMPLING, top_k_candidates=CHECK_TOP_K_CANDIDATES)
    session.submit(0, request)
    while not (ended := session.step()):
        pass
    [(_, output)] = ended
    if isinstance(output, Exception):
        raise output
    ids = torch.tensor([prompt_ids + output.ids], device=policy.device)
    logits = policy.model(input_ids=ids).logits[0, len(prompt_ids) - 1 : -1].float()
    difference = (output.logp - logits.log_softmax(-1).cpu().gather(1, output.candidates)).abs()
    mean = float(difference[output.logp.isfinite()].mean())
    dtype = policy.model.dtype
    if not mean <= LOGP_TOLERANCE[dtype]:  # NaN too
        kind = str(dtype).removeprefix("torch.")
        raise ValueError(
            f"{backend.clients[0].url} gives other log-probabilities than {policy.name} in {kind} does here: "
            f"{mean:.3g} apart on average, at most {LOGP_TOLERANCE[dtype]:g} is expected. It may have other weights, "
            f"or was started without --dtype {kind} or --logprobs-mode raw_logprobs"
        )


# --- HTTP -----------------------------------------------------------------------------------------------


class HttpClient:
    """A JSON client with retries.

    The environment variable VLLM_API_KEY, which vLLM itself reads, is sent as a bearer token. A user name and a
    password in the URL are sent by basic authentication instead, for a proxy that asks for them.

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
        shown = hide_userinfo(url if "//" in url else f"//{url}").removeprefix("//")
        try:
            parsed = httpx2.URL(url)
        except httpx2.InvalidURL as error:
            # The reason may quote a part of the password.
            reason = "write special characters of the password as %XX" if "@" in url else format_error(error)
            raise ValueError(f"{shown!r} is not a URL: {reason}") from error
        if parsed.scheme not in ("http", "https") or not parsed.host:
            raise ValueError(f"a server's URL looks like http://localhost:8000, not {shown!r}")
        # Without user name and password, because messages and logs show it.
        self.url = str(parsed.copy_with(username=None, password=None)).rstrip("/").removesuffix("/v1")
        self.timeout, self.retries, self.backoff = timeout, retries, backoff
        self._jitter = random.Random()  # not the global generator, which training seeds
        key = os.environ.get("VLLM_API_KEY")
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            auth=(parsed.username, parsed.password) if parsed.username else None,
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
