"""quantization: gradients of 4-bit and 8-bit models are those of their dequantized weights."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, BitsAndBytesConfig, PreTrainedModel

from nabla_trl.gradient.likelihood import policy_likelihood
from nabla_trl.gradient.token_gradient import compute_token_gradient
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import freeze_policy, load_policy, merge_adapter
from nabla_trl.models.loading.quantization import fix_quantized_gradients
from nabla_trl.models.options import HARD_GRADIENT_POINT
from nabla_trl.rewards.loading import load_reward

bitsandbytes = pytest.importorskip("bitsandbytes")
BITS = {
    "4": {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": torch.float32},
    "4, double": {
        "load_in_4bit": True,
        "bnb_4bit_quant_type": "fp4",
        "bnb_4bit_use_double_quant": True,
        "bnb_4bit_compute_dtype": torch.float32,
    },
    "8": {"load_in_8bit": True},
}


def save_quantized(folder: Path, bits: str, kind: str) -> tuple[str, str]:
    """Save a random model quantized, and the same with its dequantized weights. Return both folders."""
    auto = AutoModelForCausalLM if kind == "causal" else AutoModelForSequenceClassification
    worlds.tiny_model(kind=kind, width=64).save_pretrained(folder / "full")
    config = BitsAndBytesConfig(llm_int8_skip_modules=["lm_head", "score"], **BITS[bits])
    options: dict[str, Any] = {"quantization_config": config, "device_map": {"": "cpu"}, "dtype": torch.float32}
    auto.from_pretrained(folder / "full", **options).save_pretrained(folder / "quantized")
    plain = auto.from_pretrained(folder / "full")
    for name, module in auto.from_pretrained(folder / "quantized").named_modules():
        if isinstance(module, bitsandbytes.nn.Linear4bit | bitsandbytes.nn.Linear8bitLt):
            plain.get_submodule(name).weight.data = dequantize(module)
    plain.save_pretrained(folder / "plain")
    for name in ("quantized", "plain"):
        worlds.char_tokenizer().save_pretrained(folder / name)
    return str(folder / "quantized"), str(folder / "plain")


def dequantize(module: Any) -> torch.Tensor:
    weight = module.weight
    if isinstance(module, bitsandbytes.nn.Linear4bit):
        return bitsandbytes.functional.dequantize_4bit(weight.data, weight.quant_state).float()
    codes = weight.data if weight.CB is None else weight.CB
    return codes.float() * weight.SCB[:, None] / 127


@pytest.mark.parametrize("bits", BITS)
def test_a_reward_of_few_bits_is_its_dequantized_self(bits: str, tmp_path: Path) -> None:
    policy = worlds.tiny_policy()
    item = worlds.sample(policy, worlds.tiny_problems()[1], "12+3;7")
    results = []
    for folder in save_quantized(tmp_path, bits, "score"):
        reward = load_reward(folder, policy=policy)
        caches = reward.compute_prompt_caches([item], FlopCounter())  # without autograd, before the gradient
        ([value], _) = reward.score([item], caches, flop_counter=FlopCounter())
        [gradient] = reward.compute_backward_gradient(
            [item], caches, None, flop_counter=FlopCounter(), gradient_at=HARD_GRADIENT_POINT
        )
        results.append((value, gradient))
    (value, gradient), (expected_value, expected) = results
    assert value == pytest.approx(expected_value, rel=1e-4)
    assert float(expected.abs().max()) > 0.01
    torch.testing.assert_close(gradient, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", BITS)
def test_a_policy_of_few_bits_is_its_dequantized_self(bits: str, tmp_path: Path) -> None:
    results = []
    for folder in save_quantized(tmp_path, bits, "causal"):
        policy = load_policy(folder)
        item = worlds.sample(policy, worlds.tiny_problems()[1], "12+3;7")
        objective = policy_likelihood(policy)
        caches = [objective.compute_prompt_caches([item], FlopCounter())]
        [gradient] = compute_token_gradient([objective], [item], caches, None, flop_counter=FlopCounter())
        # A sequence's logits do not depend on its neighbors, as those of bitsandbytes' 8-bit layers do.
        batch = policy.model(torch.tensor([item.prompt_ids, [9] * len(item.prompt_ids)])).logits[0]
        torch.testing.assert_close(batch, policy.model(torch.tensor([item.prompt_ids])).logits[0])
        results.append((batch, gradient))
    for quantized, expected in zip(*results, strict=True):
        torch.testing.assert_close(quantized, expected, rtol=1e-3, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("bits", BITS)
def test_a_model_in_memory_that_has_run_before(bits: str, tmp_path: Path) -> None:
    folder, plain_folder = save_quantized(tmp_path, bits, "causal")
    model = AutoModelForCausalLM.from_pretrained(folder).eval()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        model(ids)
    states = [module.weight.quant_state for module in model.modules() if hasattr(module, "quant_state")]
    if any(getattr(state, "packing_format_for_cpu", False) for state in states):  # on CPUs with AVX512-BF16
        worlds.refused(lambda: freeze_policy(model, worlds.char_tokenizer(), "in memory"), "repacked", "load", "again")
        return
    policy = freeze_policy(model, worlds.char_tokenizer(), "in memory")
    expected = AutoModelForCausalLM.from_pretrained(plain_folder)(ids).logits
    torch.testing.assert_close(policy.model(ids).logits, expected, rtol=1e-3, atol=1e-3)
    embeds = model.get_input_embeddings()(ids).detach().requires_grad_(True)
    assert torch.autograd.grad(policy.model(inputs_embeds=embeds).logits.sum(), embeds)[0].abs().sum() > 0
    freeze_policy(model, worlds.char_tokenizer(), "in memory")
    torch.testing.assert_close(policy.model(ids).logits, expected, rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("bits", ["4", "8"])
def test_an_adapter_stays_beside_weights_of_few_bits(bits: str, tmp_path: Path) -> None:
    folder, _ = save_quantized(tmp_path, bits, "causal")
    trained = get_peft_model(
        load_policy(folder).model, LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM")
    ).eval()
    inert = tmp_path / "inert"
    trained.save_pretrained(inert)
    for name, weight in trained.named_parameters():
        if "lora_B" in name:
            weight.data.normal_(std=0.1)
    trained.save_pretrained(tmp_path / "adapter")
    ids = torch.tensor([[5, 6, 7, 8]])
    policy = load_policy(folder, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(policy.model(ids).logits, trained(ids).logits)
    assert isinstance(policy.model, PreTrainedModel) and policy.head.num_rows == len(worlds.TOKENS)
    assert not any(weight.requires_grad for weight in policy.model.parameters())
    worlds.refused(lambda: load_policy(folder, adapter=str(inert)), "inert")
    worlds.refused(
        lambda: merge_adapter(policy.model, str(tmp_path / "adapter")), "an adapter beside quantized weights"
    )


def test_other_kinds_of_quantization_are_refused() -> None:
    model = worlds.tiny_model()
    fix_quantized_gradients(model, "plain")
    model.quantization_method = "gptq"
    worlds.refused(lambda: fix_quantized_gradients(model, "some-model"), "some-model", "gptq", "gradients")
