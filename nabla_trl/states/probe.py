"""Find out the layout of a model by running it on a few tokens.

A first forward shows the arrays of every layer with their shapes. A second one goes on from prefixes of different
lengths in one batch, and must give the hidden states of a forward without a cache. A model that fails is refused when
it is loaded, before any work is done with it.
"""

from __future__ import annotations

import inspect
from collections import defaultdict
from dataclasses import replace
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel
from transformers.cache_utils import (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionLayer,
)

from nabla_trl.states.attention import AttentionLayer, IndexedLayer
from nabla_trl.states.batch import prefill_sequences, read_tokens
from nabla_trl.states.layout import PER_TOKEN_ARRAYS, ArrayGroup, StateLayout, find_backbone
from nabla_trl.states.recurrent import HybridLayer, RecurrentLayer
from nabla_trl.states.releases import (
    RECURRENT_LAYERS_RELEASE,
    DummyLayer,
    DynamicIndexedLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    supports_recurrent_layers,
)
from nabla_trl.states.slots import SlotStore
from nabla_trl.states.writers import BatchWriter
from nabla_trl.utils.formatting import format_error

# Layer classes of transformers, and what holds their state here.
LAYER_TYPES: dict[type, type] = {
    DynamicLayer: AttentionLayer,
    DynamicSlidingWindowLayer: AttentionLayer,
    DynamicIndexedLayer: IndexedLayer,
    LinearAttentionLayer: RecurrentLayer,
    LinearAttentionAndFullAttentionLayer: HybridLayer,
    LinearAttentionAndSlidingWindowAttentionLayer: HybridLayer,
    DummyLayer: DummyLayer,
}
# Models that mask by the place in the cache, which differs from the position in a batch of slots.
OWN_MASKS = {"gpt_neo": "local"}
PROBE_LENGTH = 6  # tokens
PREFIX_LENGTHS = (3, 1)  # of the two sequences of the second forward
# Largest relative error of a hidden state. A wrong mask or state gives errors near 1.
MAX_ERRORS = {torch.float64: 1e-2, torch.float32: 1e-2, torch.bfloat16: 0.2, torch.float16: 0.2}

_layouts: WeakKeyDictionary[PreTrainedModel, StateLayout] = WeakKeyDictionary()


def get_layout(model: PreTrainedModel) -> StateLayout:
    """Return the layout of a model, which is found out once.

    Raises:
        ValueError: the model's state cannot be stored, cut and gone on from.
    """
    layout = _layouts.get(model)
    if layout is None or layout.dtype != model.dtype:
        layout = _layouts[model] = _find_layout(model)
    return layout


def find_known_layout(model: Any) -> StateLayout | None:
    """Return the layout of a model, or of the base of an adapter, if it was found out before. The model is not run."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    return _layouts.get(base)


@torch.no_grad()
def _find_layout(model: PreTrainedModel) -> StateLayout:
    name = model.config.model_type
    cache_layers = _list_cache_layers(model, name)
    special = sorted({type(layer).__name__ for layer in cache_layers if type(layer) not in LAYER_TYPES})
    if special:
        raise ValueError(f"{name} keeps {', '.join(special)} states, which cannot be gone on from at another token")
    if not supports_recurrent_layers and any(isinstance(layer, LinearAttentionLayer) for layer in cache_layers):
        raise ValueError(f"{name} has recurrent layers, which need transformers {RECURRENT_LAYERS_RELEASE} or newer")
    if name in OWN_MASKS and OWN_MASKS[name] in str(getattr(model.config, "attention_layers", "")):
        raise ValueError(f"{name} has {OWN_MASKS[name]} attention that counts entries of the cache, not positions")
    parameters = inspect.signature(find_backbone(model).forward).parameters
    takes_any = any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values())
    names = [key for key in ("past_key_values", "cache_params") if key in parameters]
    cache_argument = next(iter(names), "past_key_values" if takes_any else None)
    if cache_argument is None:
        raise ValueError(f"{name} takes no cache of a prefix, so it would read every prefix again")
    text = model.config.get_text_config(decoder=True)
    chunk = getattr(text, "attention_chunk_size", None)
    windows = {layer.sliding_window for layer in cache_layers if hasattr(layer, "sliding_window")} - {chunk}
    config_type = type(text)
    if config_type.__module__.startswith("transformers.") and not hasattr(config_type, "sliding_window"):
        windows = set()  # transformers' caches read the entry in a config whose model does not
    if len(windows) > 1:
        raise ValueError(f"{name} has sliding windows of several sizes: {', '.join(map(str, sorted(windows)))}")
    layout = StateLayout(
        layer_types=tuple((LAYER_TYPES[type(layer)], getattr(layer, "number_of_states", 1)) for layer in cache_layers),
        token_groups=(),
        fixed_groups=(),
        window=next(iter(windows), None),
        chunk=chunk,
        mask_style="one",
        cache_argument=cache_argument,
        takes_positions="position_ids" in parameters,
        dtype=model.dtype,
        num_sharing_layers=sum(mode == "reuse" for mode in getattr(text, "kv_sharing_modes", None) or ()),
    )
    layout = _find_arrays(model, layout, name)
    return _find_mask_style(model, layout, cache_layers, name)


def _list_cache_layers(model: PreTrainedModel, name: str) -> list[Any]:
    try:
        return list(DynamicCache(config=model.config).layers)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"transformers has no cache for {name}: {format_error(error)}") from error


def _find_arrays(model: PreTrainedModel, layout: StateLayout, name: str) -> StateLayout:
    """Return the layout with the arrays that a forward leaves in the cache."""
    cache = layout.make_cache(BatchWriter(continues=False), {})
    ids = _probe_ids(model)
    try:
        layout.run(find_backbone(model), cache, torch.ones_like(ids), _positions(ids), input_ids=ids)
    except Exception as error:  # of any kind: the model's code may fail anywhere
        raise ValueError(f"{name} does not run with a cache of its layers: {format_error(error)}") from error
    groups: dict[bool, dict[tuple[Any, ...], list[tuple[int, str]]]] = {
        True: defaultdict(list),
        False: defaultdict(list),
    }
    for index, layer in enumerate(cache.layers):
        for array_name, array in getattr(layer, "arrays", {}).items():
            per_token = array_name in PER_TOKEN_ARRAYS
            shape = (array.shape[1], array.shape[3]) if per_token else tuple(array.shape[1:])
            groups[per_token][shape, array.dtype].append((index, array_name))
    token_groups, fixed_groups = (
        tuple(ArrayGroup(tuple(arrays), shape, dtype) for (shape, dtype), arrays in groups[per_token].items())
        for per_token in (True, False)
    )
    if not token_groups and not fixed_groups:
        raise ValueError(f"{name} leaves nothing in its cache, so it would read every prefix again")
    return replace(layout, token_groups=token_groups, fixed_groups=fixed_groups)


def _find_mask_style(model: PreTrainedModel, layout: StateLayout, cache_layers: list[Any], name: str) -> StateLayout:
    """Return the layout with the first form of mask under which a prefix gives the model's own hidden states."""
    ids = _probe_ids(model)
    reference = find_backbone(model)(input_ids=ids).last_hidden_state[0]
    is_windowed = [hasattr(layer, "sliding_window") for layer in cache_layers if isinstance(layer, DynamicLayer)]
    has_one_kind = len(set(is_windowed)) <= 1 and (layout.window is None or layout.chunk is None)
    failures = {}
    for style in ("one", "by kind", "padding"):
        if style == "one" and not has_one_kind:
            failures[style] = "layers of several kinds would have one mask"
            continue
        if style == "padding" and (any(is_windowed) or layout.is_recurrent):
            continue
        candidate = replace(layout, mask_style=style)
        try:
            errors = [
                compute(model, candidate, ids, reference) for compute in (_compute_batch_error, _compute_slot_error)
            ]
            error = float(torch.tensor(errors).max())  # NaN if one of them is
        except Exception as exception:  # of any kind: the model's code may fail anywhere
            failures[style] = format_error(exception)
            continue
        if error <= MAX_ERRORS.get(model.dtype, 0.2) or not reference.isfinite().all():  # of NaN, others will tell
            return candidate
        failures[style] = f"hidden states differ by {error:.0%}"
    # One reason in one line: the error that numbers show, rather than that of a form of mask the model does not take.
    reason = min(failures.values(), key=lambda text: not text.startswith("hidden states differ"))
    raise ValueError(f"{name} does not go on from a prefix as it reads a whole sequence: {reason}")


def _compute_batch_error(model: PreTrainedModel, layout: StateLayout, ids: Tensor, reference: Tensor) -> float:
    """Return the median relative error of hidden states that go on from prefixes of different lengths."""
    sequence, count = ids[0].tolist(), PROBE_LENGTH - max(PREFIX_LENGTHS)
    states = prefill_sequences(model, layout, [sequence[:length] for length in PREFIX_LENGTHS])
    inputs = torch.stack([ids[0, length : length + count] for length in PREFIX_LENGTHS])
    positions = torch.stack([torch.arange(length, length + count) for length in PREFIX_LENGTHS]).to(ids.device)
    hidden, _ = read_tokens(model, layout, states, inputs, positions, [count] * len(states))
    expected = torch.stack([reference[length : length + count] for length in PREFIX_LENGTHS])
    return _summarize_error(hidden, expected)


def _compute_slot_error(model: PreTrainedModel, layout: StateLayout, ids: Tensor, reference: Tensor) -> float:
    """Return the median relative error of the hidden states of one step in slots that are longer than the prefixes."""
    sequence = ids[0].tolist()
    store = SlotStore(layout, ids.device)
    store.reserve(len(PREFIX_LENGTHS), PROBE_LENGTH)
    for slot, state in enumerate(prefill_sequences(model, layout, [sequence[:n] for n in PREFIX_LENGTHS])):
        store.write(slot, state)
    positions = torch.tensor(PREFIX_LENGTHS, device=ids.device)
    output = store.run_step(find_backbone(model), ids[0, positions, None], positions, PROBE_LENGTH)
    return _summarize_error(output.last_hidden_state[:, 0], reference[positions])


def _summarize_error(hidden: Tensor, expected: Tensor) -> float:
    errors = (hidden.float() - expected.float()).norm(dim=-1) / expected.float().norm(dim=-1)
    return float(errors.median() if hidden.dtype.itemsize < 4 else errors.max())


def _probe_ids(model: PreTrainedModel) -> Tensor:
    rows = model.get_input_embeddings().weight.shape[0]
    return (torch.arange(1, PROBE_LENGTH + 1, device=model.device) % rows)[None]


def _positions(ids: Tensor) -> Tensor:
    return torch.arange(ids.shape[1], device=ids.device)[None]
