"""Measure how long a small request to `nabla-trl serve` takes alone and beside others.

    python recipes/research/serve_fairness.py --num_runs 9

The server is a process of its own, on the embedded world. The others come from a third process, so that they do not
delay the clock. Reported is the median over the runs, and its ratio to the lone median. Seconds need a quiet machine.
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


def keep_busy(url: str, scenario: str) -> None:
    """Send the requests of a scenario again and again, as many at a time as it says. Ends with its process."""
    count, send = SCENARIOS[scenario]

    def send_forever(number: int) -> None:
        while True:
            send(url, number)
            number += count

    with ThreadPoolExecutor(count) as pool:
        for future in [pool.submit(send_forever, number) for number in range(count)]:
            future.result()


@contextmanager
def running_server() -> Iterator[str]:
    """Run the server, and give its base URL."""
    command = [sys.executable, "-m", "nabla_trl.cli", "serve", "--config", SEARCH_CONFIG, "--port", "0"]
    command += ["--served_model_name", MODEL, "--patience", "0", "--no_access_log", "--shutdown_timeout", "1"]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        if " at " not in line:
            raise OSError("the server did not start")
        yield line.split(" at ")[1].split(";")[0]
    finally:
        process.terminate()
        process.wait()


def measure(url: str, num_runs: int) -> list[float]:
    """Return the seconds of small requests, one after another. The first one is not counted."""
    seconds = []
    for run in range(num_runs + 1):
        began = time.perf_counter()
        if ask(url, seed=run, **SMALL) != 200:
            raise ValueError("a small request was not answered")
        seconds.append(time.perf_counter() - began)
    return seconds[1:]


def main(argv: Sequence[str]) -> None:
    """Print a line per scenario."""
    [args] = parse_dataclasses([FairnessArguments], argv, prog="serve_fairness.py")
    with running_server() as url:
        lone = statistics.median(measure(url, args.num_runs))
        print(json.dumps({"scenario": "alone", "median_seconds": round(lone, 4)}), flush=True)
        for scenario in SCENARIOS:
            others = multiprocessing.get_context("spawn").Process(target=keep_busy, args=(url, scenario), daemon=True)
            others.start()
            try:
                time.sleep(args.warm_up_seconds)
                seconds = measure(url, args.num_runs)
            finally:
                others.terminate()
                others.join()
            again = measure(url, args.num_runs)  # the machine may have changed
            lone = statistics.median(again)
            result = {
                "scenario": scenario,
                "median_seconds": round(statistics.median(seconds), 4),
                "worst_seconds": round(max(seconds), 4),
                "lone_seconds": round(lone, 4),
                "ratio": round(statistics.median(seconds) / lone, 2),
            }
            print(json.dumps(result), flush=True)


if __name__ == "__main__":
    sys.exit(run_main(main, resume_command=""))
