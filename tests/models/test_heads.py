"""heads: the logits of given hidden states are the model's own, whatever its family does around its head."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel

from nabla_trl.gradient.likelihood import LikelihoodObjective, policy_likelihood
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.heads import OutputHead
from nabla_trl.models.loading import freeze_policy, load_policy
from nabla_trl.models.options import HARD_GRADIENT_POINT
from nabla_trl.rewards.loading import load_reward
from nabla_trl.states.layout import find_backbone

SHAPE: dict[str, Any] = {
    "vocab_size": len(worlds.TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": worlds.TOKENS.index(worlds.END),
    "pad_token_id": worlds.TOKENS.index(worlds.PAD),
}
FULL = {"layer_types": ["full_attention"] * 2, "head_dim": 8}
# model type -> options, and whether the output embedding is the whole head
FAMILIES: dict[str, tuple[dict[str, Any], bool]] = {
    "llama": ({}, True),
    "qwen2": ({}, True),
    "phi": ({}, True),  # a bias in the head
    "gpt2": ({"n_embd": 32, "n_layer": 2, "n_head": 4}, True),
    "opt": ({"ffn_dim": 64, "word_embed_proj_dim": 16}, True),  # states narrower than the layers
    "llama4_text": ({"moe_layers": [], "intermediate_size_mlp": 64, "num_local_experts": 2}, True),
    "granite": ({"logits_scaling": 4.0}, False),  # divides
    "cohere": ({"logit_scale": 0.25}, False),  # multiplies
    "gemma2": ({"head_dim": 8, "final_logit_softcapping": 30.0}, False),
    "gemma3_text": ({**FULL, "final_logit_softcapping": 20.0}, False),
    "nanochat": ({}, False),
    "minicpm3": (
        {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
        | {"num_key_value_heads": 4, "dim_model_base": 8},
        False,  # scales the hidden states before the head
    ),
    "falcon_h1": (
        {"mamba_n_heads": 8, "mamba_d_head": 8, "mamba_d_state": 8, "mamba_d_ssm": 64, "mamba_n_groups": 1}
        | {"lm_head_multiplier": 0.5},
        False,  # reads the factor from the backbone
    ),
}


def make_model(family: str, *, seed: int = 0, **options: Any) -> PreTrainedModel:
    config = AutoConfig.for_model(family, **{**SHAPE, **FAMILIES[family][0], **options})
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_config(config).eval()
        for weight in model.parameters():
            if weight.ndim >= 2:
                weight.data.normal_(std=0.5)
    return model


@pytest.mark.parametrize("family", FAMILIES)
def test_logits_of_hidden_states_are_the_models_own(family: str) -> None:
    model = make_model(family)
    ids = torch.tensor([[5, 6, 7, 8]])
    states = find_backbone(model)(input_ids=ids).last_hidden_state[0].detach().requires_grad_(True)
    head = OutputHead(model)
    logits = head(states)
    torch.testing.assert_close(logits, model(ids).logits[0], rtol=1e-5, atol=1e-5)
    assert head.is_plain is FAMILIES[family][1] and head.num_rows == logits.shape[-1]
    one_by_one = torch.cat([head(state) for state in states.split(1)])
    torch.testing.assert_close(one_by_one, logits, rtol=1e-5, atol=1e-5)
    assert torch.autograd.grad(logits.sum(), states)[0].abs().sum() > 0


def test_a_padding_row_of_zeros_hides_no_scale() -> None:
    assert not OutputHead(make_model("granite", logits_scaling=4.0, pad_token_id=0)).is_plain
    assert OutputHead(make_model("granite", logits_scaling=1.0, pad_token_id=0)).is_plain
    quiet = make_model("gemma2", final_logit_softcapping=30.0)
    for weight in quiet.parameters():
        weight.data.mul_(1e-3)  # logits far below the cap
    assert not OutputHead(quiet).is_plain


def test_a_base_model_that_is_the_whole_model() -> None:
    model = make_model("llama4_text")
    assert model.base_model is model  # what this is about
    assert find_backbone(model) is model.model


def test_a_model_whose_logits_depend_on_more_is_refused() -> None:
    model = make_model("llama")
    model.register_forward_pre_hook(lambda module, args, kwargs: setattr(module, "extra", kwargs), with_kwargs=True)

    def add_ids(module: Any, args: Any, output: Any) -> Any:
        output.logits = output.logits + (module.extra.get("input_ids") is not None) * 5.0
        return output

    model.register_forward_hook(add_ids)
    worlds.refused(lambda: OutputHead(model), "LlamaForCausalLM", "more than a function of its last hidden states")


@pytest.mark.parametrize("family", ["granite", "cohere", "gemma3_text"])
def test_log_ratios_and_their_gradients_of_models_that_scale_or_cap(family: str, tmp_path: Path) -> None:
    for seed in (0, 1):
        make_model(family, seed=seed).double().save_pretrained(tmp_path / str(seed))
        worlds.char_tokenizer().save_pretrained(tmp_path / str(seed))
    policy = load_policy(str(tmp_path / "0"), dtype="float64")
    reward = load_reward(f"logratio:{tmp_path / '1'}", policy=policy, dtype="float64")
    assert not policy.head.is_plain
    item = worlds.sample(policy, worlds.tiny_problems()[1], "12+3")
    caches = reward.compute_prompt_caches([item], FlopCounter())
    ([value], _) = reward.score([item], caches, flop_counter=FlopCounter())
    [gradient] = reward.compute_backward_gradient(
        [item], caches, None, flop_counter=FlopCounter(), gradient_at=HARD_GRADIENT_POINT
    )
    total, expected = 0.0, torch.zeros_like(gradient)
    for objective in reward.objectives:
        assert isinstance(objective, LikelihoodObjective)
        one_hot = torch.nn.functional.one_hot(torch.tensor(item.response_ids), len(worlds.TOKENS)).double()
        one_hot.requires_grad_(True)
        table = objective.embed_ids(torch.arange(len(worlds.TOKENS)))
        embeds = torch.cat((table[item.prompt_ids], one_hot @ table))[None]
        logp = objective.model(inputs_embeds=embeds).logits[0].double().log_softmax(-1)
        likelihood = (one_hot * logp[len(item.prompt_ids) - 1 : -1]).sum()
        total += objective.weight * float(likelihood.detach())
        expected += objective.weight * torch.autograd.grad(likelihood, one_hot)[0]
    assert value == pytest.approx(total, rel=1e-6)
    torch.testing.assert_close(gradient, expected, rtol=1e-5, atol=1e-5 * float(expected.abs().max()))


def test_the_likelihood_of_a_policy_has_the_policys_head() -> None:
    policy = freeze_policy(make_model("cohere"), worlds.char_tokenizer(), "cohere")
    assert policy_likelihood(policy).head is policy.head
