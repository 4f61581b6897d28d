"""server: clients that misbehave, many at once, and the end of the server. Sockets of this machine only."""

from __future__ import annotations

import json
import logging
import os
import random
import resource
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from chat_server import NAME, Running, serving
from watched_reward import PATIENCE, Gate, Watched

from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.serving import server as http_server
from nabla_trl.serving.requests import ServerLimits

LIMITS = ServerLimits(NAME, SearchConfig(max_new_tokens=4, max_rounds=1))
BODY = json.dumps({"messages": [{"role": "user", "content": "1+2"}], "seed": 1}).encode()
HEAD = b"POST /v1/chat/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"


@pytest.fixture(scope="module")
def server(policy: Policy, scalar_reward: Reward) -> Iterator[Running]:
    options = {"header_timeout": 0.5, "max_connections": 100, "shutdown_timeout": 5.0}
    with serving(policy, scalar_reward, LIMITS, body_timeout=0.5, server_options=options) as running:
        yield running


def connect(server: Running) -> socket.socket:
    url = httpx2.URL(server.url)
    return socket.create_connection((url.host, url.port), timeout=PATIENCE)


def write_request(body: bytes = BODY, headers: bytes = b"") -> bytes:
    return HEAD + headers + b"Content-Length: %d\r\n\r\n%s" % (len(body), body)


def read_all(connection: socket.socket) -> bytes:
    """What the server sends until it closes the connection."""
    parts = []
    try:
        while part := connection.recv(65536):
            parts.append(part)
    except ConnectionResetError:
        pass
    return b"".join(parts)


def is_alive(server: Running) -> bool:
    return ask_once(server) and server.get("/health").json()["status"] == "ok"


def ask_once(server: Running) -> bool:
    return bool(server.ask("1+2", seed=1).choices[0].finish_reason)


# --- what is not a request --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "status"),
    [
        (b"\x00\xff" * 500 + b"\r\n\r\n", b"400"),
        (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\r\n\r\n", b"400"),  # TLS
        (b"GET / HTTP/1.1\r\n\r\n", b"400"),
        (b"SSH-2.0-OpenSSH_9.6\r\n\r\n", b"400"),
        (HEAD + b"X-Long: " + b"a" * 2_000_000 + b"\r\n\r\n", b"400"),
        (HEAD + b"".join(b"X-%d: 1\r\n" % n for n in range(20_000)) + b"\r\n", b"400"),
        (HEAD + b"Content-Length: -5\r\n\r\n", b"400"),
        (HEAD + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello", b"400"),
        (HEAD + b"Transfer-Encoding: chunked\r\n\r\nzz\r\n", b"400"),
    ],
)
def test_what_is_not_http_gets_a_400_and_a_closed_connection(server, sent: bytes, status: bytes, caplog) -> None:
    with connect(server) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert answer.startswith(b"HTTP/1.1 " + status) or not answer  # a reset may overtake the answer
    assert len(caplog.records) <= 1
    assert is_alive(server)


def test_many_wrong_clients_fill_no_log(server, caplog) -> None:
    for _ in range(30):
        with connect(server) as connection:
            connection.sendall(b"rubbish\r\n\r\n")
            read_all(connection)
    assert len(caplog.records) <= 1
    assert 'nabla_connections_closed_total{reason="invalid"}' in server.get("/metrics").text


# --- slow clients -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("sent", "answers"),
    [
        (b"", b""),
        (HEAD, b""),
        (HEAD + b"Content-Length: 100\r\n\r\n{", b"HTTP/1.1 408"),
        (HEAD + b"Expect: 100-continue\r\nContent-Length: 100\r\n\r\n", b"HTTP/1.1 100"),
    ],
)
def test_a_client_that_stops_in_the_middle_is_left_after_a_while(server, sent: bytes, answers: bytes) -> None:
    began = time.monotonic()
    with connect(server) as connection:
        connection.sendall(sent)
        answer = read_all(connection)
    assert answer.startswith(answers) and time.monotonic() - began < 10


def test_a_slow_loris_ends_by_the_clock_and_not_by_its_bytes(server) -> None:
    with connect(server) as connection:
        connection.settimeout(0.1)
        for byte in HEAD + b"X-More: " + b"a" * 200:
            try:
                connection.sendall(bytes([byte]))
                if connection.recv(1000) == b"":
                    break
            except TimeoutError:
                continue
            except OSError:
                break
        else:
            raise AssertionError("the server has waited for every byte")
    assert is_alive(server)


def test_pipelined_requests_are_answered_in_their_order(server) -> None:
    with connect(server) as connection:
        second = write_request(BODY.replace(b'"seed": 1', b'"seed": 2'), b"Connection: close\r\n")
        connection.sendall(write_request() + b"GET /health HTTP/1.1\r\nHost: x\r\n\r\n" + second)
        answer = read_all(connection)
    assert answer.count(b"HTTP/1.1 200") == 3
    assert answer.index(b'"seed":1') < answer.index(b'"status":"ok"') < answer.index(b'"seed":2')


def test_a_body_that_is_too_large_is_refused_by_its_length_and_not_asked_for(server) -> None:
    with connect(server) as connection:
        connection.sendall(HEAD + b"Expect: 100-continue\r\nContent-Length: 5000000\r\n\r\n")
        assert read_all(connection).startswith(b"HTTP/1.1 413")
    with connect(server) as connection:
        connection.sendall(HEAD + b"Content-Length: 99999999999\r\n\r\n{")
        assert read_all(connection).startswith(b"HTTP/1.1 413")


def test_a_body_in_chunks_is_read(server) -> None:
    with connect(server) as connection:
        pieces = b"".join(b"1\r\n%c\r\n" % byte for byte in BODY) + b"0\r\n\r\n"
        connection.sendall(HEAD + b"Connection: close\r\nTransfer-Encoding: chunked\r\n\r\n" + pieces)
        assert read_all(connection).startswith(b"HTTP/1.1 200")


# --- many -------------------------------------------------------------------------------------------------


def test_a_new_connection_takes_the_place_of_an_idle_one(policy, scalar_reward, caplog) -> None:
    options = {"max_connections": 8, "header_timeout": 60.0}
    with serving(policy, scalar_reward, LIMITS, server_options=options) as server, ExitStack() as stack:
        idle = [stack.enter_context(connect(server)) for _ in range(60)]
        assert is_alive(server)
        assert server.get("/metrics").text.count("nabla_connections 8.0") <= 1
        open_connections = 0
        for connection in idle:
            connection.setblocking(False)
            try:
                open_connections += connection.recv(1) != b""
            except BlockingIOError:
                open_connections += 1
            except ConnectionResetError:
                pass
        assert open_connections <= 8
    assert len(caplog.records) <= 1


def test_busy_connections_keep_their_place(policy, scalar_reward) -> None:
    watched = Watched(scalar_reward)
    watched.before = gate = Gate("7")
    with serving(policy, watched, LIMITS, server_options={"max_connections": 1}) as server, connect(server) as busy:
        busy.sendall(write_request(BODY.replace(b"1+2", b"7"), b"Connection: close\r\n"))
        assert gate.reached.wait(PATIENCE)
        with connect(server) as refused:
            assert read_all(refused).startswith(b"HTTP/1.1 503")
        gate.opened.set()
        assert read_all(busy).startswith(b"HTTP/1.1 200")


def test_chaos_loses_no_request(server) -> None:
    """Fifty requests beside clients that leave, stall, and send rubbish: each is answered, and the server goes on."""
    rng = random.Random(0)
    process = psutil.Process()
    memory = process.memory_info().rss

    def disturb(number: int) -> None:
        with connect(server) as connection:
            kind = number % 5
            if kind == 0:  # leaves in the middle of a stream
                body = BODY.replace(b'"seed"', b'"stream": true, "max_rounds": 200, "seed"')
                connection.sendall(write_request(body))
                connection.recv(100)
            elif kind == 1:  # leaves in the middle of a body
                connection.sendall(write_request()[: rng.randrange(len(HEAD), len(HEAD) + 40)])
            elif kind == 2:
                connection.sendall(rng.randbytes(2000))
            elif kind == 3:
                connection.sendall(HEAD + b"X: " + b"x" * 50_000)
            else:  # asks, and does not wait
                connection.sendall(write_request())

    def request(number: int) -> int:
        body = json.dumps({"messages": [{"role": "user", "content": f"{number}+1"}], "n": 1 + number % 2}).encode()
        return server.post(body).status_code

    with ThreadPoolExecutor(25) as pool:
        disturbed = [pool.submit(disturb, number) for number in range(50)]
        statuses = list(pool.map(request, range(50)))
        errors = [future.exception(PATIENCE) for future in disturbed]
    assert statuses == [200] * 50
    assert all(error is None or isinstance(error, OSError) for error in errors)
    assert is_alive(server)
    deadline = time.monotonic() + PATIENCE
    while (state := server.get("/health").json())["running"] + state["waiting"] and time.monotonic() < deadline:
        time.sleep(0.05)
    assert state["running"] == state["waiting"] == 0
    assert process.memory_info().rss - memory < 200 * 2**20


# --- the end ----------------------------------------------------------------------------------------------


def test_sigterm_ends_half_sent_requests_and_lets_running_ones_end(policy, scalar_reward) -> None:
    watched = Watched(scalar_reward)
    watched.before = gate = Gate("7")
    options = {"shutdown_timeout": PATIENCE}
    with serving(policy, watched, LIMITS, server_options=options) as server, ExitStack() as stack:
        idle, half_head, half_body, running = (stack.enter_context(connect(server)) for _ in range(4))
        half_head.sendall(HEAD[:30])
        half_body.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
        running.sendall(write_request(BODY.replace(b"1+2", b"7")))
        assert gate.reached.wait(PATIENCE)
        began = time.monotonic()
        server.server.handle_exit(signal.SIGTERM, None)
        assert read_all(half_body).startswith(b"HTTP/1.1 503")
        assert read_all(half_head) == read_all(idle) == b""
        assert time.monotonic() - began < 10
        gate.opened.set()
        assert read_all(running).startswith(b"HTTP/1.1 200")


def test_running_requests_get_their_answer_within_a_bound(policy, scalar_reward) -> None:
    watched = Watched(scalar_reward)
    watched.before = gate = Gate("7")
    options = {"shutdown_timeout": 0.3}
    with serving(policy, watched, LIMITS, server_options=options) as server, ExitStack() as stack:
        running, stream = (stack.enter_context(connect(server)) for _ in range(2))
        running.sendall(write_request(BODY.replace(b"1+2", b"7")))
        stream.sendall(write_request(BODY.replace(b"1+2", b"7").replace(b'"seed"', b'"stream": true, "seed"')))
        assert gate.reached.wait(PATIENCE)
        server.server.handle_exit(signal.SIGTERM, None)
        answers = [read_all(running), read_all(stream)]
        gate.opened.set()
    assert all(b"shutting_down" in answer for answer in answers)
    assert answers[0].startswith(b"HTTP/1.1 503")


def test_the_log_tells_of_a_trouble_once_a_minute(caplog, monkeypatch) -> None:
    now = [1000.0]
    monkeypatch.setattr(http_server.time, "monotonic", lambda: now[0])
    trouble = http_server.TroubleLog()
    for _ in range(100):
        trouble.warn("files", "no files")
    now[0] += 61
    trouble.warn("files", "no files")
    assert [record.message for record in caplog.records] == ["no files", "no files (99 more since the last line)"]
    assert all(record.levelno == logging.WARNING for record in caplog.records)


def test_connections_are_fewer_than_the_files_that_may_be_open(monkeypatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda kind: (64, 64))
    count = http_server.count_possible_connections()
    assert http_server.MIN_CONNECTIONS <= count < 64


@pytest.mark.slow
def test_the_command_survives_few_files_and_ends_at_sigterm(tmp_path) -> None:
    """As a user runs it: 64 files, 120 idle sockets, real signals."""
    root = Path(__file__).parents[2]
    command = [sys.executable, "-m", "nabla_trl.cli", "serve", "--config", "recipes/tiny/search.yaml", "--port", "0"]
    log = (tmp_path / "log").open("w+")
    limits = ["bash", "-c", 'ulimit -n 64; exec "$@"', "-", *command]
    process: Any = subprocess.Popen(limits, cwd=root, stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        url = process.stdout.readline().split(" at ")[1].split(";")[0]
        server = Running(url, None)  # type: ignore[arg-type]
        with ExitStack() as stack:
            for _ in range(120):
                stack.enter_context(connect(server))
            model = {"model": "data/tiny/policy", "max_tokens": 8}
            assert server.ask("1+2", **model).choices[0].finish_reason
            half = stack.enter_context(connect(server))
            half.sendall(HEAD + b"Content-Length: 100\r\n\r\n{")
            time.sleep(0.5)
            began = time.monotonic()
            process.send_signal(signal.SIGTERM)
            assert read_all(half).startswith(b"HTTP/1.1 503")
            assert process.wait(PATIENCE) in (143, -signal.SIGTERM) and time.monotonic() - began < 10
    finally:
        process.kill()
    log.seek(0)
    lines = log.read().splitlines()
    assert len(lines) < 12 and not any("Traceback" in line for line in lines), lines
    assert os.path.getsize(tmp_path / "log") < 4000
