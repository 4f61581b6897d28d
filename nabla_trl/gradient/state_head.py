"""A head on the policy's last hidden states as a differentiable objective.

Drawing a response computes the hidden states h_1 … h_T that predict its tokens, where h_t has read y_<t. A small head
on these states scores the response without another pass of any model:

    f(y) = s(h_T), and s_t = s(h_t) after each of the tokens before the last one.

So the last token, which is mostly the end of the response, is never read. It has no gradient, and its part of the
direct gradient is 0. A score of a response whose states are not known (drawn by a server, or with tokens exchanged)
takes a forward pass of the policy, which is charged.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load, save
from torch import Tensor, nn
from transformers import PreTrainedModel

from nabla_trl.gradient.objectives import EncodedSample, Sample, ScoreCache, get_prompt_ids
from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.states.layout import find_backbone
from nabla_trl.utils.files import write_atomic
from nabla_trl.utils.formatting import format_error

HEAD_FILE = "head.safetensors"
_PROBE_TOKENS = 8
# Mean distance of two policies' states of the same text, in standard deviations of a state, above which a head that
# was trained on one of them is refused on the other. Rounding to bfloat16 gives a tenth of it.
MAX_PROBE_DISTANCE = 0.25


class StateHead(nn.Module):
    """A scalar function of a hidden state: standardized, then a linear map or a network with one hidden layer.

    Args:
        width: d, the size of a hidden state.
        hidden_width: units of the hidden layer. 0: a linear map.

    Attributes:
        mean, std: [d] of the states that the head was trained on.
        probe: [d] the policy's state of a fixed text, by which `check_policy` knows the policy. Zeros: not known.
    """

    mean: Tensor
    std: Tensor
    probe: Tensor

    def __init__(self, width: int, hidden_width: int = 0):
        super().__init__()
        self.width, self.hidden_width = width, hidden_width
        for name, value in (("mean", torch.zeros), ("std", torch.ones), ("probe", torch.zeros)):
            self.register_buffer(name, value(width))
        layers: list[nn.Module] = [nn.Linear(width, hidden_width or 1)]
        if hidden_width:
            layers += [nn.GELU(), nn.Linear(hidden_width, 1)]
        self.layers = nn.Sequential(*layers)

    def forward(self, states: Tensor) -> Tensor:
        """Return the scores [...], in the dtype of the head, of states [..., d]."""
        return self.layers((states.to(self.mean) - self.mean) / self.std).squeeze(-1)

    @property
    def num_params(self) -> int:
        """Return the weights in matrices, which decide the FLOPs."""
        return sum(weight.numel() for weight in self.layers.parameters() if weight.ndim > 1)

    def save(self, folder: Path) -> None:
        """Write the head to a folder, whole or not at all."""
        tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in self.state_dict().items()}
        folder.mkdir(parents=True, exist_ok=True)
        write_atomic(folder / HEAD_FILE, save(tensors, {"hidden_width": json.dumps(self.hidden_width)}))

    @classmethod
    def load(cls, folder: str | Path) -> StateHead:
        """Load the head of a folder.

        Raises:
            ValueError: no such file, another content, or weights that are not finite.
        """
        file = Path(folder, HEAD_FILE)
        try:
            tensors = load(file.read_bytes())
        except (OSError, SafetensorError) as error:
            raise ValueError(f"{file} cannot be read: {format_error(error)}") from error
        first = tensors.get("layers.0.weight")
        if first is None or first.ndim != 2 or "mean" not in tensors:
            raise ValueError(f"{file} holds no head on hidden states")
        head = cls(first.shape[1], first.shape[0] if "layers.2.weight" in tensors else 0).to(first.dtype)
        try:
            head.load_state_dict(tensors)
        except RuntimeError as error:
            raise ValueError(f"{file} holds no head on hidden states: {format_error(error)}") from error
        if not all(tensor.isfinite().all() for tensor in tensors.values()):
            raise ValueError(f"{file} has weights that are not finite")
        return head.requires_grad_(False)

    def check_policy(self, policy: Policy, name: str) -> None:
        """Refuse a policy whose states are not those that the head was trained on.

        Args:
            name: of the head, which begins the message.

        Raises:
            ValueError: another width, or another state of the same text.
        """
        state = compute_probe(policy.model).to(self.mean.device)
        if len(state) != self.width:
            raise ValueError(
                f"{name} reads hidden states of {self.width} numbers, those of {policy.name} have {len(state)}"
            )
        distance = float(((state - self.probe) / self.std).abs().mean())
        if self.probe.any() and not distance <= MAX_PROBE_DISTANCE:
            raise ValueError(
                f"{name} was trained on the hidden states of another policy than {policy.name}: the same text gives "
                f"states that are {distance:.2f} standard deviations apart. Train a head on this policy's answers"
            )


@torch.no_grad()
def compute_probe(model: PreTrainedModel) -> Tensor:
    """Return the last hidden state [d] (float32) of a fixed text of a few tokens."""
    vocab_size = model.config.get_text_config().vocab_size
    ids = torch.arange(1, _PROBE_TOKENS + 1, device=model.device)[None] * (vocab_size // (_PROBE_TOKENS + 2))
    return find_backbone(model)(input_ids=ids).last_hidden_state[0, -1].float()


class HeadObjective(ScoreObjective):
    """f(y): a head read at the policy's hidden state that predicted the last token of the response.

    Args:
        policy: the states are those of its model.
    """

    def __init__(self, policy: Policy, head: StateHead):
        super().__init__(
            policy.model,
            replace(policy.size, name="reward", head_params=head.num_params),
            vocab_map=torch.arange(policy.forbidden_mask.shape[0]),
            encode_prompt=get_prompt_ids,
            turn_end_ids=[],
            stop_ids=policy.stop_ids,
        )
        self.head = head.to(policy.device)

    def encode(self, sample: Sample) -> EncodedSample:
        # The same for a beginning of a response as for a whole one, so that its states are known from drawing, too.
        return EncodedSample(sample.prompt_ids, list(sample.response_ids[:-1]), turn_end_ids=[])

    def has_draw_logp(self, sample: Sample) -> bool:
        info = sample.draw_info
        return info is not None and info.hidden_states is not None and info.model is self.model

    def score_drawn(
        self, samples: Sequence[Sample], caches: Sequence[ScoreCache], flop_counter: FlopCounter, return_caches: bool
    ) -> tuple[list[float], list[ScoreCache]] | None:
        states = [sample.draw_info.hidden_states for sample in samples if self.has_draw_logp(sample)]  # type: ignore[union-attr]
        known = [state for state in states if state is not None]
        if len(known) < len(samples) or not all(len(state) for state in known):
            return None
        lengths = [len(state) for state in known]
        scores = self.apply_head(torch.cat(known).to(self.model.device)).split(lengths)
        for sample, length in zip(samples, lengths, strict=True):
            start = len(sample.prompt_ids) - 1
            flop_counter.add_flops(sample.cost_key, self.model_size, "forward", start, 0, num_head_positions=length)
        new_caches = []
        for sample, cache, row in zip(samples, caches, scores, strict=True) if return_caches else ():
            new_cache = self.make_prompt_cache(cache.state.cut(len(sample.prompt_ids) - 1))
            new_cache.prefix_scores = row
            new_caches.append(new_cache)
        return [float(row[-1].double()) for row in scores], new_caches

    def compute_running_values(self, sample: Sample, cache: ScoreCache) -> Tensor:
        return cache.prefix_scores.double()

    def apply_head(self, states: Tensor) -> Tensor:
        return self.head(states)
