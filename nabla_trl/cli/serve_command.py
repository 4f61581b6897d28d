"""`nabla-trl serve`: the inference reasoner as a service, with OpenAI's chat completions as its API."""

from __future__ import annotations

import os
import socket
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout

from nabla_trl.cli.arguments import ModelArguments, ServeArguments
from nabla_trl.cli.parsing import Parser

API_KEY_ENV_VAR = "NABLA_API_KEY"
SERVE_HELP = """POST /v1/chat/completions, GET /v1/models and GET /health; any client of OpenAI's API will do:

  client = openai.OpenAI(base_url="http://127.0.0.1:8000/v1", api_key="...")
  client.chat.completions.create(model=POLICY, messages=[...], seed=0,
                                 extra_body={"flops": 1e12, "beta": 0.5})

Beside the API's own fields a request may set flops, beta, kl, rounds, patience,
top_k and sample_min_p of the search; the options here are the defaults, and
--max_new_tokens and --max_flops the limits. The same seed gives the same answer.
usage.nabla has what the search cost; stream: true tells of every accepted
revision. What cannot be honoured (n > 1, tools, logprobs, ...) is refused."""


def run_serve(argv: Sequence[str]) -> int:
    from nabla_trl.search.config import PRESETS, SearchConfig

    parser = Parser(
        [ModelArguments, ServeArguments, SearchConfig],
        presets=PRESETS,
        prog="nabla-trl serve",
        usage="nabla-trl serve --policy P --reward R [options]",
        description="Answer requests over HTTP: each is refined by the search, many at once.",
        epilog=SERVE_HELP,
    )
    models, args, config = parser.parse_options(argv)[:3]
    try:
        from nabla_trl.serving import asgi
    except ModuleNotFoundError as error:
        package = (error.name or "").partition(".")[0]
        if package not in ("starlette", "uvicorn"):
            raise
        raise ValueError(f"nabla-trl serve needs {package}: pip install nabla-trl[serve]") from error
    from nabla_trl.audit.overoptimization import warn_past_limits
    from nabla_trl.serving.api import ServerLimits
    from nabla_trl.serving.service import Engine

    key = args.api_key or os.environ.get(API_KEY_ENV_VAR) or None
    if key is not None and not (key.isascii() and key.isprintable() and " " not in key):
        raise ValueError("the key must be of ASCII letters, digits and signs, without spaces: clients send no other")
    offer = ServerLimits(args.served_model_name or models.policy, config, args.max_flops)
    with bind_socket(args.host, args.port) as listener:  # first: an address in use must not cost the loading of models
        with redirect_stdout(sys.stderr):
            policy, reward = models.load(4 * config.batch_size)
        warn_past_limits(reward, config)
        address = format_base_url(listener)
        if key is None and not args.host.startswith("127.") and args.host not in ("localhost", "::1"):
            print(f"warning: anyone who reaches {address} may use it: set {API_KEY_ENV_VAR}", file=sys.stderr)
        service = asgi.ChatService(
            Engine(policy, reward, max_queue=args.max_queue, batch_window=args.batch_window),
            offer,
            api_key=key,
            request_timeout=args.request_timeout,
        )
        message = f"serving {offer.model_name} at {address}; Ctrl-C finishes what runs and stops"
        asgi.run_server(service, listener, lambda: print(message, flush=True))
    return 0


def bind_socket(host: str, port: int) -> socket.socket:
    """A socket at this address, on which nothing is taken yet.

    Raises:
        OSError: no such address, or it is in use.
    """
    family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
    listener = socket.socket(family, kind, protocol)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind(address)
    except OSError as error:
        listener.close()
        raise OSError(f"cannot listen at {host}, port {port}: {error.strerror}") from error
    return listener


def format_base_url(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}/v1" if ":" in host else f"http://{host}:{port}/v1"
