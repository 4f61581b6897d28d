"""Generation in this process by continuous decoding: every slot holds one sequence, each step adds a token to all.

A request takes a free slot as soon as there is one, with its prefix copied in from a cache. A sequence that ends
leaves its slot at once, so no step is spent on it, and no request waits for the longest one of a batch.

What the layers keep lies in the slots of a store (states/slots.py). The occupied slots are always the first ones: the
last occupied one moves into a slot that becomes free. All buffers stay where they are until they must grow. Nothing is
read back from the device but the tokens of `tokens_per_read` steps at a time. Tokens that a sequence was given past
its end are thrown away, so the number of steps between two reads changes no result.

The loop is our own instead of `model.generate`, because branching needs what `generate` does not return per sequence:
its cache, the policy's candidates at each position, and random numbers that belong to the sequence and not to the
batch. Both give the same tokens where they overlap (tests/models/test_generation.py).
"""

from __future__ import annotations

import logging
import math
from collections import deque
from collections.abc import Collection, Hashable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import Tensor

from nabla_trl.models.heads import StateRecorder
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationOutput, GenerationRequest, Policy, get_context_length
from nabla_trl.models.sampling import (
    TokenStatistic,
    build_warpers,
    compute_distribution_statistics,
    compute_log_importance_weight,
    compute_top_candidates,
    sample_tokens,
)
from nabla_trl.states import prefix
from nabla_trl.states.batch import catch_up, prefill_sequences
from nabla_trl.states.prefix import PrefixState
from nabla_trl.states.probe import get_layout
from nabla_trl.states.slots import SlotStore
from nabla_trl.utils.formatting import format_error

log = logging.getLogger(__name__)

CAPACITY_STEP = 64  # positions by which the cache and the outputs grow
TOKENS_PER_READ = 8  # on an accelerator; a CPU has nothing to wait for


@dataclass
class _Sequence:
    """What the host knows of one slot."""

    tag: Hashable
    request: GenerationRequest
    cached: int  # tokens in the cache
    ids: list[int] = field(default_factory=list)
    failed: bool = False
    snapshots: dict[int, tuple[Tensor, ...]] = field(default_factory=dict)  # of recurrent layers, by tokens read


class SlotDecoder:
    """Draws continuations of a policy under one sampling configuration.

    Args:
        top_k_candidates: K, tokens to record per position (at most the vocabulary).
        max_sequences: slots, the sequences that are decoded together at most.
        return_cache: return each sequence's cache.
        return_log_importance_weight: record how the sampler differs from π, if it does.
        statistics_top_k: k of the statistics of π to record at every position. 0: none.
        return_hidden_states: record the last hidden states that predict the tokens.
        tokens_per_read: steps between two reads of the drawn tokens.

    Attributes:
        store: what the layers keep of each sequence.
        positions: [slots] where each sequence's next token goes.
    """

    def __init__(
        self,
        policy: Policy,
        sampling: Sampling,
        *,
        top_k_candidates: int = 1,
        max_sequences: int = 256,
        return_cache: bool = False,
        return_log_importance_weight: bool = False,
        statistics_top_k: int = 0,
        return_hidden_states: bool = False,
        tokens_per_read: int | None = None,
    ):
        self.policy, self.sampling, self.num_slots = policy, sampling, max_sequences
        self.warpers = build_warpers(sampling)
        self.num_candidates = min(top_k_candidates, policy.forbidden_mask.shape[0])
        self.return_cache = return_cache
        self.return_weight = return_log_importance_weight and bool(self.warpers)
        self.statistics_top_k = statistics_top_k
        self.recorder = StateRecorder(policy.model) if return_hidden_states else None
        self.device, self.context_length = policy.device, policy.context_length
        device = self.device
        self.layout = get_layout(policy.model)
        self.tokens_per_read = tokens_per_read or (1 if device.type == "cpu" else TOKENS_PER_READ)
        if return_cache and self.layout.is_recurrent:
            self.tokens_per_read = 1  # a recurrent state cannot be taken back to the end of its sequence
        self.use_graphs = device.type == "cuda"
        self.graphs: dict[tuple[int, int], Any] = {}  # by slots and positions of a step
        self.waiting: deque[tuple[Hashable, GenerationRequest]] = deque()
        self.active: list[_Sequence] = []
        self.store = SlotStore(self.layout, device)
        self.slots = torch.zeros(0, dtype=torch.long, device=device)
        self.tokens = torch.zeros(0, dtype=torch.long, device=device)
        self.positions = torch.zeros(0, dtype=torch.long, device=device)
        self.counts = torch.zeros(0, dtype=torch.long, device=device)  # tokens drawn, by slot
        self.uniforms = torch.zeros(0, 0, dtype=torch.float64, device=device)
        self.latest = torch.zeros(0, dtype=torch.long, device=device)
        self.drawn = torch.zeros(0, self.tokens_per_read, dtype=torch.long, device=device)
        # [slots, tokens, K] candidates, log π and, if asked for, weights, and [slots, tokens, 3] statistics
        self.outputs: list[Tensor] = []
        self.states = torch.zeros(0, 0, 0, device=device)  # [slots, tokens, d], if asked for

    @property
    def num_unfinished(self) -> int:
        return len(self.active) + len(self.waiting)

    def submit(self, tag: Hashable, request: GenerationRequest) -> None:
        """Queue a request with the state of its prefix.

        Raises:
            ValueError: sampling without random numbers.
        """
        if self.sampling.temperature > 0:
            request.get_rng()
        if request.stop_entropy < math.inf and not self.statistics_top_k:
            raise ValueError("stop_entropy needs a session that records statistics: set statistics_top_k")
        self.waiting.append((tag, request))

    def list_requests(self) -> list[tuple[Hashable, GenerationRequest]]:
        return [(sequence.tag, sequence.request) for sequence in self.active] + list(self.waiting)

    @torch.no_grad()
    def step(self) -> list[tuple[Hashable, GenerationOutput | Exception]]:
        """Add `tokens_per_read` tokens to every sequence, and return those that have ended.

        Returns:
            tag and output of each; a ValueError in its place for NaN or infinite logits.
        """
        self._admit()
        count = len(self.active)
        if not count:
            return []
        longest = max(sequence.cached for sequence in self.active)
        self._reserve(self.store.num_slots, longest + self.tokens_per_read)
        for offset in range(self.tokens_per_read):
            self._run(*self._shape(count, longest + offset + 1))
            self.drawn[:, offset] = self.latest
        if self.return_cache and self.layout.is_recurrent:
            self._take_snapshots()
        ended = [slot for slot, ids in enumerate(self.drawn[:count].tolist()) if self._append(slot, ids)]
        # From the last one on, so that the slot that moves into a freed one holds a sequence that goes on.
        return [self._take(slot) for slot in reversed(ended)]

    def cancel(self, tags: Collection[Hashable]) -> None:
        """Drop the requests of these tags, whatever has been drawn for them."""
        self.waiting = deque(entry for entry in self.waiting if entry[0] not in tags)
        for slot in reversed(range(len(self.active))):
            if self.active[slot].tag in tags:
                self._free(slot)

    # --- one step ----------------------------------------------------------------------------------------

    def _shape(self, count: int, width: int) -> tuple[int, int]:
        """How many slots and positions a step covers: no more than needed on a CPU, else the next larger bucket."""
        if self.device.type == "cpu":
            return count, width
        return min(self.num_slots, 1 << (count - 1).bit_length()), -(-width // CAPACITY_STEP) * CAPACITY_STEP

    def _run(self, count: int, width: int) -> None:
        """Take one step; on a GPU by the CUDA graph of its bucket, which the first step in it is recorded as."""
        graph = self.graphs.get((count, width))
        if graph is not None:
            graph.replay()
            return
        self._advance(count, width)
        if self.use_graphs:
            self.graphs[count, width] = self._record(count, width)

    def _record(self, count: int, width: int) -> Any:
        """Record the step as a CUDA graph; nothing is computed. None, and no graphs from then on, where that fails."""
        graph = torch.cuda.CUDAGraph()
        try:
            with torch.cuda.graph(graph):
                self._advance(count, width)
        except (RuntimeError, NotImplementedError) as error:
            log.warning("decoding without CUDA graphs: %s", format_error(error))
            self.use_graphs = False
            return None
        return graph

    def _advance(self, count: int, width: int) -> None:
        """Draw one token for each of the first `count` slots, which attend to the first `width` positions.

        Nothing here waits for the device.
        """
        # Free slots count on, past the end of their buffers.
        slots, counts = self.slots[:count], self.counts[:count].clamp(max=self.uniforms.shape[1] - 1)
        output = self.store.run_step(
            self.policy.model if self.recorder is None else self.recorder,
            self.tokens[:count, None],
            self.positions[:count],
            width,
            # A token past a sequence's end is thrown away, but its position must exist.
            max_position=self.context_length - 1,
        )
        logits = output.logits[:, -1].float()
        allowed = logits.masked_fill(self.policy.forbidden_mask, -torch.inf)
        tokens = sample_tokens(allowed, self.uniforms[slots, counts], self.warpers, self.sampling)
        tables = [*compute_top_candidates(logits, tokens, self.policy.forbidden_mask, self.num_candidates)]
        if self.return_weight:
            tables.append(compute_log_importance_weight(allowed, tables[0], self.warpers))
        if self.statistics_top_k:
            statistics = compute_distribution_statistics(logits, self.policy.forbidden_mask, self.statistics_top_k)
            tables.append(statistics)
        for buffer, table in zip(self.outputs, tables, strict=True):
            buffer[slots, counts] = table
        if self.recorder is not None:
            self.states[slots, counts] = self.recorder.take()[:, -1]
        sound = (logits < torch.inf).all(-1)  # −inf only means that a token is impossible
        self.latest[:count] = torch.where(sound, tokens, -1)
        self.tokens[:count] = tokens
        self.counts[:count] += 1
        self.positions[:count] += 1

    def _append(self, slot: int, ids: list[int]) -> bool:
        """Give the sequence of a slot its next tokens up to its end, and return whether it has ended."""
        sequence = self.active[slot]
        request = sequence.request
        entropies = [0.0] * len(ids)
        if request.stop_entropy < math.inf:
            span = slice(len(sequence.ids), len(sequence.ids) + len(ids))
            entropies = self.outputs[-1][slot, span, TokenStatistic.ENTROPY].tolist()
        for token, entropy in zip(ids, entropies, strict=True):
            if token < 0:
                sequence.failed = True
                return True
            sequence.ids.append(token)
            sequence.cached += 1
            stops = request.should_stop is not None and request.should_stop(token)  # told every token, in order
            if (
                stops
                or (entropy >= request.stop_entropy and len(sequence.ids) >= request.stop_entropy_after)
                or token in self.policy.stop_ids
                or len(sequence.ids) >= request.max_new_tokens
                or (
                    request.stop_strings
                    and self.policy.is_finished(request.join_response(sequence.ids), request.stop_strings)
                )
            ):
                return True
        return False

    # --- slots -------------------------------------------------------------------------------------------

    def _admit(self) -> None:
        """Copy waiting requests into free slots."""
        entering = min(len(self.waiting), self.num_slots - len(self.active))
        if not entering:
            return
        entries = [self.waiting.popleft() for _ in range(entering)]
        states = [request.get_cache() for _, request in entries]
        # Requests that begin between two snapshots of recurrent layers (see `charge_generation`).
        prefixes = [request.prefix_ids for _, request in entries]
        states = catch_up(self.policy.model, self.layout, states, prefixes)
        self._reserve(
            len(self.active) + entering,
            max(state.length for state in states) + self.tokens_per_read,
            max(request.max_new_tokens for _, request in entries) + self.tokens_per_read,
        )
        first = len(self.active)
        uniforms = torch.zeros(entering, self.uniforms.shape[1], dtype=torch.float64)
        for row, ((tag, request), state) in enumerate(zip(entries, states, strict=True)):
            self.store.write(first + row, state)
            if self.sampling.temperature > 0:
                numbers = request.get_rng().random(request.max_new_tokens)
                uniforms[row, : request.max_new_tokens] = torch.from_numpy(numbers)
            self.active.append(_Sequence(tag, request, state.length, snapshots=dict(state.snapshots or {})))
        last = torch.tensor([[sequence.request.prefix_ids[-1], sequence.cached] for sequence in self.active[first:]])
        span = slice(first, first + entering)
        self.uniforms[span] = uniforms.to(self.uniforms.device)
        self.tokens[span], self.positions[span] = last.to(self.tokens.device).unbind(1)
        self.counts[span] = 0

    def _take(self, slot: int) -> tuple[Hashable, GenerationOutput | Exception]:
        sequence = self.active[slot]
        if sequence.failed:
            self._free(slot)
            return sequence.tag, ValueError(f"{self.policy.name} gave NaN or infinite logits")
        length, request = len(sequence.ids), sequence.request
        tables = [buffer[slot, :length].cpu().clone() for buffer in self.outputs]
        cache = self._copy_state(slot) if self.return_cache else None
        finished = self.policy.is_finished(request.join_response(sequence.ids), request.stop_strings)
        weight = tables[2] if self.return_weight else None
        statistics = tables[-1] if self.statistics_top_k else None
        states = None if self.recorder is None else self.states[slot, :length].clone()
        output = GenerationOutput(sequence.ids, finished, tables[0], tables[1], weight, cache, statistics, states)
        self._free(slot)
        return sequence.tag, output

    def _copy_state(self, slot: int) -> PrefixState:
        sequence = self.active[slot]
        snapshots = sequence.snapshots if self.layout.is_recurrent else None
        if snapshots is not None:
            snapshots[sequence.cached] = self.store.copy_fixed(slot)
        return PrefixState(sequence.cached, self.store.copy_tokens(slot, sequence.cached), snapshots)

    def _take_snapshots(self) -> None:
        """Copy the recurrent states of sequences that have read another `SNAPSHOT_INTERVAL` tokens."""
        for slot, sequence in enumerate(self.active):
            if (len(sequence.ids) + 1) % prefix.SNAPSHOT_INTERVAL == 0:
                sequence.snapshots[sequence.cached + 1] = self.store.copy_fixed(slot)

    def _free(self, slot: int) -> None:
        """Move the last occupied slot into this one."""
        sequence = self.active.pop()
        last = len(self.active)
        if slot == last:
            return
        self.active[slot] = sequence
        self.store.move(last, slot, sequence.cached)
        for buffer in (self.tokens, self.positions, self.counts, self.uniforms):
            buffer[slot] = buffer[last]
        for buffer in (*self.outputs, *[self.states] * (self.recorder is not None)):
            buffer[slot, : len(sequence.ids)] = buffer[last, : len(sequence.ids)]

    def _reserve(self, slots: int, capacity: int, tokens: int = 0) -> None:
        """Make buffers large enough; what they hold stays."""
        capacity = max(self.store.capacity, -(-capacity // CAPACITY_STEP) * CAPACITY_STEP)
        if slots > self.store.num_slots:
            room = min(self.num_slots, max(slots, 2 * self.store.num_slots))
            slots = self.num_slots if self.device.type != "cpu" else room
        else:
            slots = self.store.num_slots
        if self.store.reserve(slots, capacity):
            self.graphs.clear()  # they were recorded on the buffers before
        width = max(self.uniforms.shape[1], -(-tokens // CAPACITY_STEP) * CAPACITY_STEP)
        if (slots, width) != self.uniforms.shape:
            self.graphs.clear()
            device = self.tokens.device
            self.slots = torch.arange(slots, device=device)
            self.tokens, self.positions, self.counts, self.latest = (
                _enlarge(buffer, slots) for buffer in (self.tokens, self.positions, self.counts, self.latest)
            )
            self.drawn = _enlarge(self.drawn, slots, self.tokens_per_read)
            self.uniforms = _enlarge(self.uniforms, slots, width)
            columns = [self.num_candidates] * (2 + self.return_weight)
            columns += [len(TokenStatistic)] * bool(self.statistics_top_k)
            dtypes = [torch.long] + [torch.float32] * (len(columns) - 1)
            held = self.outputs or [
                torch.zeros(0, 0, size, dtype=dtype, device=device)
                for size, dtype in zip(columns, dtypes, strict=True)
            ]
            self.outputs = [_enlarge(buffer, slots, width, buffer.shape[-1]) for buffer in held]
            if self.recorder is not None:
                size = self.recorder.width
                states = self.states if self.states.numel() else self.states.new_zeros(0, 0, size)
                self.states = _enlarge(states.to(self.policy.model.dtype), slots, width, size)


def _enlarge(buffer: Tensor, *shape: int) -> Tensor:
    """Return a larger buffer that begins with what this one holds."""
    larger = buffer.new_zeros(shape)
    larger[tuple(slice(size) for size in buffer.shape)] = buffer
    return larger


class TransformersBackend:
    """Generates with `policy.model` itself (see `GenerationBackend`)."""

    returns_caches: ClassVar[bool] = True
    supports_should_stop: ClassVar[bool] = True
    knows_distributions: ClassVar[bool] = True

    def get_context_length(self, policy: Policy) -> int:
        return get_context_length(policy.model)

    def get_metadata(self) -> dict[str, str]:
        return {}

    def prefill(self, policy: Policy, sequences: Sequence[list[int]]) -> list[PrefixState]:
        return prefill_sequences(policy.model, get_layout(policy.model), sequences)

    def open_session(self, policy: Policy, sampling: Sampling, **options: Any) -> SlotDecoder:
        return SlotDecoder(policy, sampling, **options)
