"""EleutherAI's lm-eval asks the server as it asks any of OpenAI's API. Skipped where lm_eval is not installed."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from chat_server import Running, direct, serving
from lm_eval_tasks import write_tasks

from nabla_trl.engine.logprobs import compute_token_logprobs
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.serving.requests import ServerLimits

pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'lm-eval[api]'")

ROOT = Path(__file__).parents[2]
MODEL = str(ROOT / "data/tiny/policy")
QUESTIONS = ("9-5*4+7*2-6", "1+2*3", "7-4+2", "8*2-9+3")
CHOICES = ("3", "7")


@pytest.fixture(scope="module")
def policy() -> Policy:
    return load_policy(MODEL)


@pytest.fixture(scope="module")
def server(policy: Policy) -> Iterator[Running]:
    reward = load_reward(str(ROOT / "data/tiny/reward"), policy=policy)
    limits = ServerLimits(MODEL, SearchConfig(max_new_tokens=48, max_rounds=2))
    with serving(policy, reward, limits) as running:
        yield running


def evaluate(folder: Path, model: str, task: str, url: str, *options: str) -> list[dict[str, Any]]:
    """Run lm_eval as a user does, and return its log of samples."""
    rows = [{"question": question, "answer": "7", "label": 1} for question in QUESTIONS]
    write_tasks(folder, rows, "tiny_chat", until=["#", ";;", "++"], target='"{{label}}"')
    arguments = f"base_url={url},model={MODEL},num_concurrent=2,max_retries=1,timeout=120"
    command = [sys.executable, "-m", "lm_eval", "--model", model, "--tasks", task, "--include_path", str(folder)]
    command += ["--output_path", str(folder / "out"), "--log_samples", "--model_args", arguments, *options]
    environment = os.environ | {"HF_DATASETS_CACHE": str(folder / "cache"), "OPENAI_API_KEY": "-"}
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=500)
    assert result.returncode == 0, result.stderr[-3000:]
    [samples] = (folder / "out").rglob(f"samples_{task}_*.jsonl")
    return sorted(map(json.loads, samples.read_text().splitlines()), key=lambda row: row["doc_id"])


@pytest.mark.slow
def test_local_chat_completions_evaluates_the_search(server, policy, tmp_path) -> None:
    url = f"{server.url}/chat/completions"
    samples = evaluate(tmp_path, "local-chat-completions", "tiny_chat", url, "--apply_chat_template")
    reward = server.server.searches.reward
    config = SearchConfig(max_new_tokens=48, max_rounds=2, temperature=0.0)
    for sample, question in zip(samples, QUESTIONS, strict=True):
        [[response]] = sample["resps"]
        assert response and not any(stop in response for stop in ("#", ";;", "++"))
        # The harness sends temperature 0 and its own seed. The first response is the policy's greedy one.
        assert direct(policy, reward, question, 1234, config).response.startswith(response)


@pytest.mark.slow
def test_local_completions_generates_and_compares_likelihoods(server, policy, tmp_path) -> None:
    url = f"{server.url}/completions"
    tokenizer = f"tokenizer={MODEL},tokenizer_backend=huggingface"
    samples = evaluate(tmp_path, "local-completions", "tiny_choice", f"{url},{tokenizer}", "--batch_size", "3")
    for sample, question in zip(samples, QUESTIONS, strict=True):
        for choice, [[likelihood, is_greedy]] in zip(CHOICES, sample["resps"], strict=True):
            ids = list(policy.tokenizer(f"{question}={choice}", add_special_tokens=False)["input_ids"])
            expected = compute_token_logprobs(policy, ids, 1)
            assert float(likelihood) == pytest.approx(expected.logprobs[-1], abs=1e-4)
            assert (str(is_greedy) == "True") == (expected.top[-1][0][0] == ids[-1])
    samples = evaluate(tmp_path / "..", "local-completions", "tiny_chat", f"{url},{tokenizer}")
    assert all(sample["resps"][0][0] is not None and "#" not in sample["resps"][0][0] for sample in samples)
