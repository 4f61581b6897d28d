"""`nabla-trl serve`: answer HTTP requests in the format of OpenAI's chat completions."""

from __future__ import annotations

import importlib
import logging
import math
import os
import re
import socket
import sys
from collections.abc import Sequence
from contextlib import ExitStack, redirect_stdout
from dataclasses import dataclass

from nabla_trl.cli.arguments import ModelArguments
from nabla_trl.cli.parsing import Parser, UsageError
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.fields import option

API_KEY_ENV_VAR = "NABLA_API_KEY"
SERVE_HELP = """The server has POST /v1/chat/completions, POST /v1/completions, GET /v1/models,
GET /health and GET /metrics (Prometheus). Any client of OpenAI's API can use it:

  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="...")
  client.chat.completions.create(model=POLICY, messages=[...], seed=0,
                                 extra_body={"max_flops": 1e12, "beta": 0.5})

A request may set the API's own fields, and max_flops, beta, target_kl, max_rounds,
patience, num_starts, num_chains, max_rollouts, top_k and min_p of the search. The
options of this command are the defaults. --max_new_tokens and --max_request_... are
the limits. The same seed gives the same answer. usage.nabla contains the cost of the
search. A request with stream: true receives every accepted revision. A field that
the server does not support (tools, JSON formats, ...) is refused, unless its value
asks for nothing."""


@dataclass
class ServeArguments:
    """Options of `nabla-trl serve`."""

    host: str = option(
        "127.0.0.1",
        "Address to listen on. 0.0.0.0 accepts connections from other machines. Set an API key in that case.",
        common=True,
    )
    port: int = option(8000, "Port to listen on. 0 chooses a free port.", common=True)
    api_key: str | None = option(
        None,
        f"Bearer token that requests must send. Prefer the environment variable {API_KEY_ENV_VAR}, because other "
        f"users of this machine can see command lines (default: {API_KEY_ENV_VAR}, and no key if that is not set).",
        common=True,
    )
    served_model_name: str | None = option(
        None,
        "Name of the model in requests. Set it to hide a local path (default: the name of the policy).",
        common=True,
    )
    max_request_flops: float = option(
        0.0,
        "Largest FLOPs budget that a request may ask for. Requests without a budget, and without --max_flops as the "
        "default, get this budget. Set it to spend the same on every request. With 0, requests without a budget end "
        "by their other limits, and a budget may be as large as --max_request_rounds rounds cost.",
        common=True,
    )
    max_request_rounds: int = option(
        256, "Most rounds that a request may ask for. A larger --max_rounds of this server raises the limit."
    )
    max_request_starts: int = option(
        16,
        "Most first responses and chains that a request may ask for. A larger --num_starts of this server raises the "
        "limit.",
    )
    max_queue: int = option(1000, "Maximum number of waiting requests. Further requests get status 429.")
    request_timeout: float = option(
        600.0, "Seconds from a request to its answer, including the time in the queue. Increase it for long searches."
    )
    max_running: int = option(
        64,
        "Maximum number of searches that run together. They share the decoding slots evenly by client, and small ones "
        "do not wait for large ones. Lower it if memory runs out.",
    )
    max_connections: int = option(
        1000,
        "Maximum number of open connections. A new one takes the place of the one that is idle for the longest time. "
        "Lowered to what the limit of open files (ulimit -n) allows.",
    )
    header_timeout: float = option(
        20.0, "Seconds from a connection, or the first byte of a request, to the end of the request's headers."
    )
    body_timeout: float = option(60.0, "Seconds from the headers of a request to the end of its body.")
    shutdown_timeout: float = option(
        60.0, "Seconds that running requests have after Ctrl-C or SIGTERM. Then they get status 503."
    )
    cors_origins: list[str] = option(
        [],
        "Origins whose pages may ask this server from a browser, such as http://localhost:3000, or * for "
        "all (default: none).",
    )
    access_log: bool = option(True, "Write one line per request on stderr.")

    def __post_init__(self) -> None:
        checks = Checks()
        checks.require(0 <= self.port < 2**16, f"port must be in [0, 65535], not {self.port}")
        checks.require(
            self.max_queue >= 1 and self.max_running >= 1 and 0 < self.request_timeout < math.inf,
            "a server needs max_queue >= 1, max_running >= 1 and a finite request_timeout > 0",
        )
        checks.require_minimum(self, 1, "max_request_rounds", "max_request_starts", "max_connections")
        for name in ("header_timeout", "body_timeout", "shutdown_timeout"):
            seconds = getattr(self, name)
            checks.require(0 < seconds < math.inf, f"{name} must be a positive number of seconds, not {seconds}")
        for origin in self.cors_origins:
            checks.require(
                origin == "*" or re.fullmatch(r"https?://[^\s/@?#]+", origin) is not None,
                f"cors_origins must be * or like http://localhost:3000, not {origin!r}",
            )
        checks.require(
            self.api_key != "" and self.served_model_name != "",
            "api_key and served_model_name must not be empty: leave them out instead",
        )
        checks.raise_faults()


def main(argv: Sequence[str]) -> int:
    """Run the command and return its exit code."""
    parser = Parser(
        [ModelArguments, ServeArguments, SearchConfig],
        presets=PRESETS,
        prog="nabla-trl serve",
        usage="nabla-trl serve --policy P --reward R [options]",
        description="Answer HTTP requests. The search refines the answer to each request, and many in one batch.",
        epilog=SERVE_HELP,
    )
    checks = Checks()
    models, args, config = parser.parse_options(argv, checks)[:3]
    checks.call(_check_packages)
    api_key = args.api_key or os.environ.get(API_KEY_ENV_VAR) or None
    checks.require(
        api_key is None or (api_key.isascii() and api_key.isprintable() and " " not in api_key),
        "the API key must consist of ASCII characters without spaces: clients cannot send others",
    )
    with ExitStack() as stack:
        with checks.collect():
            listener = stack.enter_context(bind_socket(args.host, args.port))
        models.preflight(checks, max_new_tokens=config.max_new_tokens)
        with checks.collect():
            from nabla_trl.serving.requests import ServerLimits

            ServerLimits(args.served_model_name or models.policy, config, args.max_request_flops)
        checks.raise_faults(UsageError)
        serve(listener, models, args, config, api_key)
    return 0


def serve(
    listener: socket.socket, models: ModelArguments, args: ServeArguments, config: SearchConfig, api_key: str | None
) -> None:
    """Load the models, and answer requests until a signal arrives."""
    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.serving import asgi, server
    from nabla_trl.serving.requests import ServerLimits, estimate_flops_bound
    from nabla_trl.serving.service import SearchService

    model_name = args.served_model_name or models.policy
    with redirect_stdout(sys.stderr):
        policy, reward = models.load_policy_and_reward(4 * config.batch_size)
    warn_past_limits(reward, config)
    limits = ServerLimits(
        model_name,
        config,
        args.max_request_flops,
        args.max_request_rounds,
        args.max_request_starts,
        estimate_flops_bound(policy, reward, config, args.max_request_rounds),
    )
    base_url = format_base_url(listener)
    if api_key is None and not args.host.startswith("127.") and args.host not in ("localhost", "::1"):
        print(f"warning: anyone who can reach {base_url} can use it: set {API_KEY_ENV_VAR}", file=sys.stderr)
    if args.access_log:
        write_access_log()
    service = asgi.ChatService(
        SearchService(
            policy, reward, max_queue=args.max_queue, max_running=args.max_running, num_slots=4 * config.batch_size
        ),
        limits,
        api_key=api_key,
        request_timeout=args.request_timeout,
        body_timeout=args.body_timeout,
        cors_origins=args.cors_origins,
        access_log=args.access_log,
    )
    message = f"serving {limits.model_name} at {base_url}; Ctrl-C finishes the running requests and stops"
    server.run_server(
        service,
        listener,
        lambda: print(message, flush=True),
        shutdown_timeout=args.shutdown_timeout,
        max_connections=args.max_connections,
        header_timeout=args.header_timeout,
    )


def _check_packages() -> None:
    """Check that the packages of the extra `serve` are installed."""
    for package in ("starlette", "uvicorn", "prometheus_client"):
        try:
            importlib.import_module(package)
        except ModuleNotFoundError as error:
            raise ValueError(f"nabla-trl serve needs {package}: pip install nabla-trl[serve]") from error


def write_access_log() -> None:
    """Send the access log to stderr, one line per request with its time."""
    logger = logging.getLogger("nabla_trl.access")
    logger.setLevel(logging.INFO)
    logger.propagate = False
    if not logger.handlers:
        logger.addHandler(logging.StreamHandler())
        logger.handlers[0].setFormatter(logging.Formatter("%(asctime)s %(message)s"))


def bind_socket(host: str, port: int) -> socket.socket:
    """Bind a socket to an address without accepting connections yet.

    Raises:
        OSError: the address does not exist, or is in use.
    """
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    except (OSError, UnicodeError) as error:
        raise OSError(
            f"cannot listen on {host!r}: {getattr(error, 'strerror', None) or 'it is no address'}"
        ) from error
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen on {host}, port {port}: {error.strerror}") from error
    return listener


def format_base_url(listener: socket.socket) -> str:
    """Return the base URL of the API, for clients of the server at this socket."""
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
