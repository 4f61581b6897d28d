"""A small HTTP server that speaks vLLM's endpoint over a tiny real model.

It does what `vllm serve` 0.32 was seen to do with the fields that are used here, and shares no code with the modules
that are tested: one forward of the whole sequence per token, and the exponential race of vLLM's sampler.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock, Thread
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

Answer = tuple[int, Any]  # status, and JSON or raw bytes


class Refused(Exception):
    def __init__(self, status: int, message: str, param: str | None = None):
        super().__init__(message)
        self.answer = status, {"error": {"message": message, "type": "Error", "param": param, "code": status}}


class FakeVllm:
    """What the server says, and what it was asked.

    Attributes:
        before: called with (number of the completion request, its body); an answer it gives is sent instead, and
            "hang up" closes the connection.
        requests: bodies of the completion requests so far.
        headers: of the last request.
    """

    def __init__(self, model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, name: str, max_logprobs: int = 20):
        self.model, self.tokenizer, self.name, self.max_logprobs = model, tokenizer, name, max_logprobs
        self.context = model.config.max_position_embeddings
        self.raw = True  # --logprobs-mode raw_logprobs or processed_logprobs
        self.before: Callable[[int, dict[str, Any]], Answer | str | None] = lambda number, body: None
        self.requests: list[dict[str, Any]] = []
        self.headers: dict[str, str] = {}
        self.url = ""
        self._lock = Lock()

    def answer(self, path: str, body: dict[str, Any] | None) -> Answer | str:
        try:
            if path == "/v1/models":
                return 200, {"object": "list", "data": [{"id": self.name, "max_model_len": self.context}]}
            if path == "/version":
                return 200, {"version": "0.32.0"}
            if body is not None and body["model"] != self.name:
                raise Refused(404, f"The model `{body['model']}` does not exist.", "model")
            if path == "/tokenize" and body is not None:
                return 200, {"tokens": self.tokenizer(body["prompt"])["input_ids"]}
            if path == "/v1/completions" and body is not None:
                with self._lock:
                    self.requests.append(body)
                    number = len(self.requests)
                return self.before(number, body) or (200, {"choices": [self.complete(body)]})
            raise Refused(404, "Not Found")
        except Refused as refusal:
            return refusal.answer

    @torch.no_grad()
    def complete(self, body: dict[str, Any]) -> dict[str, Any]:
        prompt, limit = body["prompt"], body["max_tokens"]
        if body["logprobs"] > self.max_logprobs:
            message = f"Requested sample logprobs of {body['logprobs']}, which is greater than max allowed"
            raise Refused(400, f"{message}: {self.max_logprobs}", "logprobs")
        if len(prompt) + limit > self.context:
            raise Refused(400, f"max_model_len is {self.context}", "max_tokens")
        if not 0 <= body["temperature"] <= 2:
            raise Refused(400, f"temperature must be in [0, 2], got {body['temperature']}.", "temperature")
        if max(body["stop_token_ids"], default=0) >= self.model.config.vocab_size:
            raise Refused(400, "out-of-vocab token ids", "stop_token_ids")
        ids: list[int] = []
        tops: list[dict[str, float]] = []
        generator = torch.Generator().manual_seed(body.get("seed", 0))
        while len(ids) < limit and not self.over(ids, body):
            logits = self.model(input_ids=torch.tensor([prompt + ids])).logits[0, -1].float()
            drawn, processed = _sample(logits, body, generator)
            logp = logits.log_softmax(-1) if self.raw else processed.log_softmax(-1)
            tokens = [drawn, *logp.topk(body["logprobs"]).indices.tolist()]
            tops.append({f"token_id:{token}": max(float(logp[token]), -9999.0) for token in tokens})
            ids.append(drawn)
        return {
            "index": 0,
            "text": self.tokenizer.decode(ids),
            "logprobs": {"top_logprobs": tops},
            "finish_reason": "stop" if self.over(ids, body) else "length",
            "prompt_token_ids": prompt,
            "token_ids": ids,
        }

    def over(self, ids: list[int], body: dict[str, Any]) -> bool:
        """A stop string ends a completion wherever it stands in its own text, and is kept if that is asked for."""
        assert body.get("include_stop_str_in_output", "stop" not in body)
        text = self.tokenizer.decode(ids, skip_special_tokens=True)
        return bool(ids) and (ids[-1] in body["stop_token_ids"] or any(one in text for one in body.get("stop", [])))


def _sample(logits: Tensor, body: dict[str, Any], generator: torch.Generator) -> tuple[int, Tensor]:
    """A token and the processed logits it was drawn from."""
    logits = logits.clone()
    for token, bias in body.get("logit_bias", {}).items():
        logits[int(token)] += bias
    if body["temperature"] == 0:
        return int(logits.argmax()), logits
    logits /= body["temperature"]
    logits[logits.softmax(-1) < body["min_p"] * logits.softmax(-1).max()] = -torch.inf
    if body["top_k"]:
        logits[logits < logits.topk(body["top_k"]).values[-1]] = -torch.inf
    ordered, order = logits.softmax(-1).sort()
    logits[order[ordered.cumsum(0) <= 1 - body["top_p"]]] = -torch.inf
    race = torch.empty_like(logits).exponential_(generator=generator)
    return int((logits.softmax(-1) / race).argmax()), logits


@contextmanager
def serving(fake: FakeVllm) -> Iterator[FakeVllm]:
    """`fake` behind a free port of this machine; its `url` is set."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True

        def do_GET(self) -> None:
            self.reply(None)

        def do_POST(self) -> None:
            self.reply(json.loads(self.rfile.read(int(self.headers["Content-Length"]))))

        def reply(self, body: dict[str, Any] | None) -> None:
            fake.headers = dict(self.headers)
            answer = fake.answer(self.path, body)
            if isinstance(answer, str):
                self.close_connection = True
                return
            status, content = answer
            data = content if isinstance(content, bytes) else json.dumps(content).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, *args: Any) -> None:
            pass

    class Listener(ThreadingHTTPServer):
        daemon_threads = True
        block_on_close = False

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # a client that did not wait for its answer

    with Listener(("127.0.0.1", 0), Handler) as listener:
        fake.url = f"http://127.0.0.1:{listener.server_address[1]}"
        thread = Thread(target=listener.serve_forever, kwargs={"poll_interval": 0.01}, daemon=True)
        thread.start()
        try:
            yield fake
        finally:
            listener.shutdown()
            thread.join()
