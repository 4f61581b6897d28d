"""Count what a method costs: tokens and calls by model and kind, FLOPs by formula, wall seconds by problem.

The formula, for one sequence (a multiply-add is 2 FLOPs), where `num_tokens` tokens are placed at
positions p = start .. start + num_tokens - 1 of a causal model:

    forward  = 2 * linear_params * num_tokens                          every weight matrix, once per token
             + 4 * attention_width * layers * sum over p of (p + 1)    Q.K^T and A.V over the causal half
             + 6 * state_size * num_tokens                             recurrent states: decay, update, read
             + 2 * head_params * num_head_positions                    output head, where it is applied

    backward, frozen weights  = 1x linear + 2x attention + 2x state + 1x head     activations only: dX, dQ dK dV dA
    backward, trained weights = 2x linear + 2x attention + 2x state + 2x head     dX and dW
    train    = forward + backward

attention_width is query heads x head_dim (grouped keys are repeated, so query heads count). Where keys and values
have different widths, head_dim is their mean. `layers` are those with attention. The work on a
cached token is not charged again, but attention to it is. A detached prefix under backward is charged its dK
and dV, because kernels compute them before they are discarded.

Left out, all below one percent of a model of useful size: embedding look-ups, norms, rotary angles, biases,
softmax, activations, sampling. Sliding-window layers are charged as full attention (an upper bound). Padding is
not charged: a batch costs what its rows would cost alone. Nor are the masked half that dense attention kernels
compute, and the second forward of gradient checkpointing. The formula counts what the method needs, and the
seconds show what the machine did.

A call is one pass of one model over one sequence, whatever its length: a decoded token, a prompt that is read
(prefill), a response that is scored (forward), the backward of a gradient. `count_model_calls` counts as the paper of
the method does (arXiv 2603.04948 and its released code): one call for each decoded token, each scored response, and
each forward and each backward of a gradient. Prompts are free there.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from time import perf_counter
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import nn
    from transformers import PreTrainedModel

WORK_KINDS = ("prefill", "decode", "forward", "backward", "train")
CALL_KINDS = ("decode", "forward", "backward")  # what the paper counts as calls of a model


@dataclass(frozen=True)
class ModelSize:
    """The numbers of a transformer that its FLOPs depend on.

    Attributes:
        name: labels the model in the token counts ("policy", "reward", ...).
        linear_params: weights in matmuls at every token, without embeddings and output head.
        num_layers: layers with attention.
        head_params: weights of the output head (lm_head or score), applied only where its output is needed.
        state_size: numbers in the recurrent states of all layers.
    """

    name: str
    linear_params: int
    num_layers: int
    attention_width: int
    head_params: int
    state_size: int = 0

    def compute_forward_flops(self, start: int, num_tokens: int, num_head_positions: int | None = None) -> float:
        """Return the FLOPs of tokens at positions start .. start + num_tokens - 1 of one sequence.

        Args:
            num_head_positions: positions at which the output head is applied. None: all of them. With
                `num_tokens` 0, the head alone is counted.
        """
        linear, attention, output = self._compute_flops_by_part(start, num_tokens, num_head_positions)
        return float(linear + attention + output)

    def compute_backward_flops(
        self, start: int, num_tokens: int, num_head_positions: int | None = None, frozen: bool = True
    ) -> float:
        """Return the FLOPs of the backward alone, for the same tokens.

        Args:
            frozen: gradients with respect to activations only (token gradients, and LoRA, whose own matrices
                are negligible). False adds those of the weights.
        """
        linear, attention, output = self._compute_flops_by_part(start, num_tokens, num_head_positions)
        weights = 1 if frozen else 2
        return float(weights * (linear + output) + 2 * attention)

    def _compute_flops_by_part(
        self, start: int, num_tokens: int, num_head_positions: int | None
    ) -> tuple[int, int, int]:
        """Return the forward FLOPs of the linear layers, of attention and recurrent states, and of the output head."""
        attended = num_tokens * start + num_tokens * (num_tokens + 1) // 2
        return (
            2 * self.linear_params * num_tokens,
            4 * self.attention_width * self.num_layers * attended + 6 * self.state_size * num_tokens,
            2 * self.head_params * (num_tokens if num_head_positions is None else num_head_positions),
        )


@dataclass
class Cost:
    """FLOPs, wall seconds, and tokens and calls by "<model>/<kind>". Costs add up with `+`.

    `calls` is empty where it is not known, as in traces that were read from disk.
    """

    flops: float = 0.0
    seconds: float = 0.0
    tokens: dict[str, int] = field(default_factory=dict)
    calls: dict[str, int] = field(default_factory=dict)

    def __add__(self, other: Cost) -> Cost:
        tokens, calls = (_add_counts(*pair) for pair in ((self.tokens, other.tokens), (self.calls, other.calls)))
        return Cost(self.flops + other.flops, self.seconds + other.seconds, tokens, calls)

    def to_dict(self) -> dict[str, Any]:
        """Return plain numbers for JSON."""
        counts = {"tokens": dict(self.tokens), "calls": dict(self.calls)}
        return {"flops": self.flops, "seconds": self.seconds, **counts}

    @classmethod
    def from_dict(cls, data: Mapping[str, Any]) -> Cost:
        """Read what `to_dict` returned."""
        tokens, calls = (
            {str(name): int(count) for name, count in data.get(key, {}).items()} for key in ("tokens", "calls")
        )
        return cls(float(data["flops"]), float(data["seconds"]), tokens, calls)


def count_model_calls(calls: Mapping[str, float]) -> float | None:
    """Return the calls of models as the paper counts them, from calls by "<model>/<kind>". None without counts."""
    if not calls:
        return None
    return sum(count for name, count in calls.items() if name.rpartition("/")[2] in CALL_KINDS)


def _add_counts(first: Mapping[str, int], second: Mapping[str, int]) -> dict[str, int]:
    return {name: first.get(name, 0) + second.get(name, 0) for name in {**first, **second}}


class FlopCounter:
    """One account per key (a problem id). Not thread-safe.

    Wasted and rejected work is charged like any other. Work that belongs to no problem (training, an audit)
    gets a key of its own, and so counts in `get_total_cost`.

    Attributes:
        total_flops: FLOPs charged so far, those of forgotten keys included.
    """

    def __init__(self) -> None:
        self.total_flops = 0.0
        self._costs: dict[str, Cost] = {}
        self._nested_seconds: list[float] = []  # per open clock, the seconds of clocks inside it

    def add_flops(
        self,
        key: str,
        size: ModelSize,
        kind: str,
        start: int,
        num_tokens: int,
        *,
        num_head_positions: int | None = None,
        frozen: bool = True,
    ) -> None:
        """Charge `key` for tokens of one sequence at positions start .. start + num_tokens - 1.

        Args:
            kind: "prefill", "decode" and "forward" cost one forward, "backward" costs the backward alone, and
                "train" costs both.
            num_head_positions: as in `ModelSize.compute_forward_flops`.
            frozen: as in `ModelSize.compute_backward_flops`, for "backward" and "train".

        Raises:
            ValueError: an unknown kind, or a negative number.
        """
        if kind not in WORK_KINDS:
            raise ValueError(f"unknown kind of work {kind!r}; known: {', '.join(WORK_KINDS)}")
        if start < 0 or num_tokens < 0 or (num_head_positions is not None and num_head_positions < 0):
            raise ValueError(f"cannot charge {start=}, {num_tokens=}, {num_head_positions=}: a number is negative")
        flops = 0.0
        if kind != "backward":
            flops += size.compute_forward_flops(start, num_tokens, num_head_positions)
        if kind in ("backward", "train"):
            flops += size.compute_backward_flops(start, num_tokens, num_head_positions, frozen)
        cost = self._get_or_create_cost(key)
        cost.flops += flops
        self.total_flops += flops
        name = f"{size.name}/{kind}"
        cost.tokens[name] = cost.tokens.get(name, 0) + num_tokens
        # The output head alone, which reads no token, is no call.
        num_calls = num_tokens if kind == "decode" else min(num_tokens, 1)
        cost.calls[name] = cost.calls.get(name, 0) + num_calls

    @contextmanager
    def measure_seconds(self, keys: Sequence[str]) -> Iterator[None]:
        """Share the wall seconds of the `with` block evenly over `keys`, also when the block raises.

        A key listed n times (n rows of a batch) gets n shares. Blocks may nest: the seconds of an inner one are
        charged to its own keys and not to those of the outer one. An accelerator works asynchronously, so the
        block must end with something that reads a result back.

        Raises:
            ValueError: `keys` is empty.
        """
        if not keys:
            raise ValueError("measured seconds need at least one key to be charged to")
        keys = list(keys)
        self._nested_seconds.append(0.0)
        began = perf_counter()
        try:
            yield
        finally:
            elapsed = perf_counter() - began
            share = (elapsed - self._nested_seconds.pop()) / len(keys)
            if self._nested_seconds:
                self._nested_seconds[-1] += elapsed
            for key in keys:
                self._get_or_create_cost(key).seconds += share

    def get_cost(self, key: str) -> Cost:
        """Return a copy of what `key` has cost so far, zero for a key that was never charged."""
        return self._costs.get(key, Cost()) + Cost()

    def forget(self, key: str) -> None:
        """Drop what a key has cost."""
        self._costs.pop(key, None)

    def get_total_cost(self) -> Cost:
        """Return the sum over all keys."""
        return sum(self._costs.values(), Cost())

    def _get_or_create_cost(self, key: str) -> Cost:
        cost = self._costs.get(key)
        if cost is None:
            cost = self._costs[key] = Cost()
        return cost


def measure_model_size(model: PreTrainedModel, name: str) -> ModelSize:
    """Measure a causal LM or a sequence classifier (also under PEFT, adapters included).

    Weights count where they are matrices (ndim >= 2) and not an embedding table. A tied head counts as a head.
    Of a mixture of experts, the share that one token uses is counted if the config states it
    (`num_experts_per_tok` and `num_experts` or `num_local_experts`), and otherwise all experts.

    Raises:
        ValueError: any other kind of model.
    """
    config = model.config.get_text_config()
    head = _get_output_head(model)
    in_head = {id(module) for module in head.modules()}
    params: Counter[str] = Counter()
    for path, module in model.named_modules():
        if ".original_module" in path:  # PEFT keeps it beside the trained copy, and runs the copy
            continue
        part = "head" if id(module) in in_head else "experts" if ".experts." in f"{path}." else "other"
        params[part] += _count_matrix_params(module)
    num_active, num_experts = _get_active_experts(config)
    from nabla_trl.states.probe import find_known_layout  # here, so that a report needs no torch

    layout = find_known_layout(model)
    return ModelSize(
        name=name,
        linear_params=params["other"] + params["experts"] * num_active // num_experts,
        num_layers=config.num_hidden_layers if layout is None else layout.num_attention_layers,
        attention_width=_get_attention_width(config),
        head_params=params["head"],
        state_size=0 if layout is None else layout.state_size,
    )


def _get_attention_width(config: Any) -> int:
    """Return query heads x head_dim of a layer with attention, the largest where layers differ, and 0 without any."""
    widths = [0]
    for layer in getattr(config, "per_layer_config", None) or [config]:
        heads = getattr(layer, "num_attention_heads", None)
        if not heads:
            continue
        key_dim = getattr(layer, "head_dim", None) or layer.hidden_size // heads
        if getattr(layer, "kv_lora_rank", None):  # multi-head latent attention
            key_dim = layer.qk_nope_head_dim + layer.qk_rope_head_dim
        value_dim = getattr(layer, "v_head_dim", None) or key_dim
        widths.append(heads * (key_dim + value_dim) // 2)
    return max(widths)


def _get_output_head(model: PreTrainedModel) -> nn.Module:
    kind = type(model).__name__
    if kind.endswith(("ForSequenceClassification", "ForTokenClassification")):
        head = getattr(model, "score", None)  # encoders name theirs differently, and are not supported
    else:
        head = model.get_output_embeddings()
    if head is None:
        raise ValueError(f"{kind} has no lm_head and no `score` head: load a causal LM or a reward model")
    return head


def _count_matrix_params(module: nn.Module) -> int:
    """Return the matrix entries of `module` itself, without its children."""
    from torch import nn  # here, so that a report needs no torch

    if isinstance(module, nn.Embedding):
        return 0
    if isinstance(module, nn.Linear):  # not numel: 4-bit weights are packed, two to a byte
        return module.in_features * module.out_features
    return sum(weight.numel() for weight in module.parameters(recurse=False) if weight.ndim >= 2)


def _get_active_experts(config: Any) -> tuple[int, int]:
    """Return the number of experts per token and of all experts, (1, 1) where the config does not say."""
    num_active = getattr(config, "num_experts_per_tok", None)
    num_experts = getattr(config, "num_experts", None) or getattr(config, "num_local_experts", None)
    return (num_active, num_experts) if num_active and num_experts else (1, 1)
