"""What an accelerator would be asked to do, checked on a pretended one: `python accelerator_checks.py`."""

from __future__ import annotations

from dataclasses import replace

import torch
import worlds

from nabla_trl.models.decoding import SlotDecoder
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import prefill_prompts
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng

CPU_POLICY = worlds.tiny_policy()  # random weights need the CPU's generator alone

from pretended_device import DEVICE, PretendedDevice  # noqa: E402  (it changes torch for good)


def move_policy() -> Policy:
    torch.__future__.set_overwrite_module_params_on_conversion(True)
    with PretendedDevice():
        model = CPU_POLICY.model.to(DEVICE)
        return replace(CPU_POLICY, model=model, forbidden_mask=CPU_POLICY.forbidden_mask.to(DEVICE))


def decoding() -> None:
    """One read for all tokens of several steps; equal kernels, and buffers that stay where they are."""
    policy = replace(move_policy(), stop_ids=frozenset())
    requests = [GenerationRequest(f"q{index}", [3, 4], make_rng(0, f"q{index}", "suffix"), 40) for index in range(4)]
    with PretendedDevice() as device:
        caches = prefill_prompts(policy, [(one.cost_key, one.prefix_ids) for one in requests], FlopCounter())
        decoder = SlotDecoder(policy, Sampling(top_p=0.9), top_k_candidates=4, tokens_per_read=8, max_sequences=4)
        for index, (request, cache) in enumerate(zip(requests, caches, strict=True)):
            decoder.submit(index, replace(request, cache=cache))
        decoder.step()
        addresses = [
            buffer.data_on_cpu.data_ptr() for buffer in (*decoder.store.buffers, *decoder.outputs, decoder.tokens)
        ]
        kernels = []
        for _ in range(3):
            device.waits.clear()
            device.kernels.clear()
            decoder.step()
            kernels.append(dict(device.kernels))
            assert sum(device.waits.values()) == 1, f"8 tokens took more than one wait: {device.waits}"
        assert kernels[0] == kernels[1] == kernels[2], "a step of the same bucket runs other kernels"
        after = [
            buffer.data_on_cpu.data_ptr() for buffer in (*decoder.store.buffers, *decoder.outputs, decoder.tokens)
        ]
        assert addresses == after, "a buffer has moved"


if __name__ == "__main__":
    decoding()
