"""Measure how long a small request to `nabla-trl serve` takes alone and beside others.

    python recipes/research/serve_fairness.py --num_runs 9

The server is a process of its own, on the embedded world. The others come from a third process, so that they do not
delay the clock, and are sent again as soon as they are answered. Reported are medians over the runs and their ratios
to the lone medians: of seconds, which need a quiet machine, and of the seconds of CPU that the server used from the
small request to its answer, which do not.
"""

from __future__ import annotations

import json
import multiprocessing
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import httpx2
import psutil

from nabla_trl.cli.parsing import parse_dataclasses, run_main
from nabla_trl.utils.fields import option

SEARCH_CONFIG = "recipes/tiny/search.yaml"
MODEL = "fairness"
SMALL = {"max_tokens": 24, "max_rounds": 2, "messages": [{"role": "user", "content": "9-5*4+7"}]}
LARGE_QUESTION = [{"role": "user", "content": "9-5*4+7*2-6+8*3"}]
NUM_BETAS = 25
HUGE_PROMPT_BYTES = 4 * 2**20 - 1000
TIMEOUT_SECONDS = 300.0


@dataclass
class FairnessArguments:
    """Options of the measurement."""

    num_runs: int = option(9, "Small requests per scenario. The median of their seconds counts.")
    warm_up_seconds: float = option(2.0, "Seconds that the other requests run before the first small one.")


def ask(url: str, **fields: Any) -> int:
    """Send a chat request, and return the status of its answer."""
    return httpx2.post(f"{url}/chat/completions", json={"model": MODEL, **fields}, timeout=TIMEOUT_SECONDS).status_code


def send_huge_budget(url: str, number: int) -> None:
    """Ask for the largest budget there is, which takes minutes."""
    answer = httpx2.post(
        f"{url}/chat/completions",
        json={"model": MODEL, "messages": LARGE_QUESTION, "max_flops": 1e30},
        timeout=TIMEOUT_SECONDS,
    )
    limit = float(answer.json()["error"]["message"].split("<= ")[1].split(",")[0])
    ask(url, messages=LARGE_QUESTION, max_flops=limit, max_rounds=0, seed=number)


def send_huge_prompt(url: str, number: int) -> None:
    """Send a prompt of almost 4 MiB."""
    ask(url, messages=[{"role": "user", "content": "1" * HUGE_PROMPT_BYTES}], seed=number)


def send_other_beta(url: str, number: int) -> None:
    """Ask for a search of full length with a β of its own."""
    ask(url, messages=LARGE_QUESTION, beta=0.1 + 0.05 * (number % NUM_BETAS), seed=number)


SCENARIOS: dict[str, tuple[int, Callable[[str, int], None]]] = {
    "one huge budget": (1, send_huge_budget),
    "prompts of 4 MB": (1, send_huge_prompt),
    f"{NUM_BETAS} values of beta": (NUM_BETAS, send_other_beta),
}


def keep_busy(url: str, scenario: str, began: Any) -> None:
    """Send the requests of a scenario again and again, as many at a time as it says. Ends with its process.

    Args:
        began: an event that is set before the first request.
    """
    count, send = SCENARIOS[scenario]

    def send_forever(number: int) -> None:
        while True:
            send(url, number)
            number += count

    with ThreadPoolExecutor(count) as pool:
        futures = [pool.submit(send_forever, number) for number in range(count)]
        began.set()
        for future in futures:
            future.result()


@contextmanager
def running_server() -> Iterator[tuple[str, psutil.Process]]:
    """Run the server, and give its base URL and its process."""
    command = [sys.executable, "-m", "nabla_trl.cli", "serve", "--config", SEARCH_CONFIG, "--port", "0"]
    command += ["--served_model_name", MODEL, "--patience", "0", "--no_access_log", "--shutdown_timeout", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at " not in line:
            raise OSError("the server did not start")
        yield line.split(" at ")[1].split(";")[0], psutil.Process(process.pid)
    finally:
        process.terminate()
        process.wait()


@contextmanager
def running_others(url: str, scenario: str, warm_up_seconds: float) -> Iterator[None]:
    """Keep the server busy with the requests of a scenario."""
    context = multiprocessing.get_context("spawn")
    began = context.Event()
    others = context.Process(target=keep_busy, args=(url, scenario, began), daemon=True)
    others.start()
    try:
        began.wait()
        time.sleep(warm_up_seconds)
        yield
        if not others.is_alive():
            raise ValueError(f"the other requests ({scenario}) ended early")
    finally:
        others.terminate()
        others.join()


def measure(url: str, server: psutil.Process, num_runs: int) -> tuple[float, float]:
    """Return the medians of seconds, and of the server's seconds of CPU, of small requests one after another."""
    seconds, cpu_seconds = [], []
    for run in range(num_runs):
        began, cpu_began = time.perf_counter(), sum(server.cpu_times()[:2])
        if ask(url, seed=run, **SMALL) != 200:
            raise ValueError("a small request was not answered")
        seconds.append(time.perf_counter() - began)
        cpu_seconds.append(sum(server.cpu_times()[:2]) - cpu_began)
    return statistics.median(seconds), statistics.median(cpu_seconds)


def main(argv: Sequence[str]) -> None:
    """Print a line per scenario."""
    [args] = parse_dataclasses([FairnessArguments], argv, prog="serve_fairness.py")
    with running_server() as (url, server):
        measure(url, server, args.num_runs)  # warms up
        for scenario in SCENARIOS:
            alone = measure(url, server, args.num_runs)
            with running_others(url, scenario, args.warm_up_seconds):
                beside = measure(url, server, args.num_runs)
            result: dict[str, Any] = {"scenario": scenario}
            for name, lone, value in zip(("seconds", "cpu_seconds"), alone, beside, strict=True):
                result |= {f"lone_{name}": round(lone, 3), name: round(value, 3)}
                result[f"{name}_ratio"] = round(value / lone, 2)
            print(json.dumps(result), flush=True)
            while httpx2.get(url.removesuffix("/v1") + "/health").json()["running"]:  # until their searches have ended
                time.sleep(0.1)


if __name__ == "__main__":
    sys.exit(run_main(main, resume_command=""))
