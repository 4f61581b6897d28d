"""Generate continuations of token prefixes, with whatever back end the policy has.

A prefix is prefilled once and shared by all requests that continue it. Every token is charged to the problem that it
belongs to.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from typing import Any

from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy
from nabla_trl.states.batch import prefill_sequences
from nabla_trl.states.prefix import PrefixState
from nabla_trl.states.probe import get_layout

_PrefixKey = tuple[str, tuple[int, ...]]  # cost key and prefix: no problem's cost may depend on the others


def generate_continuations(
    policy: Policy,
    requests: Sequence[GenerationRequest],
    sampling: Sampling,
    *,
    flop_counter: FlopCounter,
    batch_size: int = 256,
    **options: Any,
) -> list[GenerationOutput]:
    """Generate the continuation of every request, at most `batch_size` of them together.

    Args:
        options: what is recorded of the outputs, as for `GenerationBackend.open_session`.

    Raises:
        ValueError: NaN or infinite logits, or an option that the back end does not support.
        ConnectionError: a server fails or does not answer.
    """
    session = policy.backend.open_session(policy, sampling, max_sequences=batch_size, **options)
    prefix_caches: dict[_PrefixKey, PrefixState] = {}
    for begin in range(0, len(requests), batch_size):
        batch = requests[begin : begin + batch_size]
        with flop_counter.measure_seconds([request.cost_key for request in batch]):
            for index, request in enumerate(_add_prefix_caches(policy, batch, prefix_caches, flop_counter), begin):
                session.submit(index, request)
    outputs: dict[Hashable, GenerationOutput] = {}
    while session.num_unfinished:
        unfinished = session.list_requests()
        with flop_counter.measure_seconds([request.cost_key for _, request in unfinished]):
            ended = session.step()
        for tag, output in ended:
            if isinstance(output, Exception):
                session.cancel([tag for tag, _ in unfinished])
                raise output
            outputs[tag] = output
    for index, request in enumerate(requests):
        charge_generation(policy, request, outputs[index], flop_counter)
    return [outputs[index] for index in range(len(requests))]


def charge_generation(
    policy: Policy, request: GenerationRequest, output: GenerationOutput, flop_counter: FlopCounter
) -> None:
    """Charge a continuation, and what of its prefix had to be read again (see `PrefixState.resume_length`).

    A server is charged as if its prefix cache never missed, as vLLM's rarely does.
    """
    state = request.cache
    if state is not None and state.resume_length < state.length:
        start = state.resume_length
        flop_counter.add_flops(
            request.cost_key, policy.size, "prefill", start, state.length - start, num_head_positions=0
        )
    flop_counter.add_flops(request.cost_key, policy.size, "decode", len(request.prefix_ids) - 1, len(output.ids))


def _add_prefix_caches(
    policy: Policy,
    requests: Sequence[GenerationRequest],
    prefix_caches: dict[_PrefixKey, PrefixState],
    flop_counter: FlopCounter,
) -> list[GenerationRequest]:
    """Return the requests with a cache each. Prefixes that are not in `prefix_caches` yet are prefilled into it."""
    missing = {_make_prefix_key(request): request.prefix_ids for request in requests if request.cache is None}
    missing = {key: ids for key, ids in missing.items() if key not in prefix_caches}
    if missing:
        rows = prepare_prompt_caches(policy, [(key[0], ids) for key, ids in missing.items()], flop_counter)
        prefix_caches.update(zip(missing, rows, strict=True))
    return [
        replace(request, cache=prefix_caches[_make_prefix_key(request)]) if request.cache is None else request
        for request in requests
    ]


def _make_prefix_key(request: GenerationRequest) -> _PrefixKey:
    return request.cost_key, tuple(request.prefix_ids)


def prepare_prompt_caches(
    policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter
) -> list[PrefixState]:
    """Return the state of every prompt but its last token, for pairs of cost key and prompt ids.

    The rows are empty where the back end keeps its caches to itself.
    """
    rows = policy.backend.prefill(policy, [ids[:-1] for _, ids in prompts])
    _charge_prefill(policy, prompts, flop_counter)
    return rows


def prefill_prompts(
    policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter
) -> list[PrefixState]:
    """Return the same rows computed by the model in this process, whatever the back end is."""
    rows = prefill_sequences(policy.model, get_layout(policy.model), [ids[:-1] for _, ids in prompts])
    _charge_prefill(policy, prompts, flop_counter)
    return rows


def _charge_prefill(policy: Policy, prompts: Sequence[tuple[str, list[int]]], flop_counter: FlopCounter) -> None:
    for key, ids in prompts:
        flop_counter.add_flops(key, policy.size, "prefill", 0, len(ids) - 1, num_head_positions=0)
