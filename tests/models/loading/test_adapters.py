"""adapters: what is merged gives the trained model's logits, and chains of adapters end."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import worlds
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM, PreTrainedModel

from nabla_trl.models.loading import adapters as adapters_module
from nabla_trl.models.loading import load_causal_lm, load_policy, load_tokenizer, resolve_adapters
from nabla_trl.rewards.loading import load_reward

IDS = torch.tensor([[1, 14, 16, 10, 3, 2, 14, 16, 10, 18, 9]])
TARGETS: dict[str, dict[str, Any]] = {
    "embeddings": {"target_modules": ["q_proj", "embed_tokens"]},
    "head": {"target_modules": ["q_proj", "lm_head"]},
    "both": {"target_modules": ["embed_tokens", "lm_head"]},
    "both, kept tied": {"target_modules": ["embed_tokens", "lm_head"], "ensure_weight_tying": True},
    "saved head": {"target_modules": ["q_proj"], "modules_to_save": ["lm_head"]},
    "saved embeddings": {"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]},
    "saved, kept tied": {
        "target_modules": ["q_proj"],
        "modules_to_save": ["embed_tokens"],
        "ensure_weight_tying": True,
    },
    "rows": {"target_modules": ["q_proj"], "trainable_token_indices": {"embed_tokens": [1, 14]}},
    "head alone": {"target_modules": ["lm_head"]},
    "saved head alone": {"target_modules": ["k_proj"], "modules_to_save": ["lm_head"]},
    "neither": {"target_modules": ["q_proj"]},
}


def train_adapter(base: PreTrainedModel, **options: Any) -> PeftModel:
    """An adapter whose trained weights are all random."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        trained = get_peft_model(base, LoraConfig(r=4, **{"task_type": "CAUSAL_LM", **options})).eval()
        for name, weight in trained.named_parameters():
            if weight.requires_grad and "k_proj" not in name:  # k_proj stands for a module that learned nothing
                weight.data.add_(torch.randn_like(weight) * 0.1)
    return trained


@pytest.mark.parametrize("target", TARGETS)
def test_adapters_of_tied_weights_give_the_trained_logits(target: str, tmp_path: Path) -> None:
    base = worlds.save(tmp_path / "base", worlds.tiny_model("qwen2", tied=True))
    trained = train_adapter(AutoModelForCausalLM.from_pretrained(base), **TARGETS[target])
    expected = trained(IDS).logits
    trained.save_pretrained(tmp_path / "adapter")
    policy = load_policy(base, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(policy.model(IDS).logits, expected, rtol=1e-4, atol=1e-3)
    assert (expected - load_policy(base).model(IDS).logits).abs().max() > 0.01
    # Saved and loaded again, as an export with --merge is.
    policy.model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    torch.testing.assert_close(again(IDS).logits, expected, rtol=1e-4, atol=1e-3)
    stays_tied = again.lm_head.weight is again.model.embed_tokens.weight
    assert again.config.tie_word_embeddings is stays_tied
    assert stays_tied or target != "neither"


@pytest.mark.parametrize("target", ["head alone", "embeddings"])
def test_an_untrained_adapter_of_a_tied_weight_is_inert(target: str, tmp_path: Path) -> None:
    base = worlds.save(tmp_path / "base", worlds.tiny_model("qwen2", tied=True))
    model = AutoModelForCausalLM.from_pretrained(base)
    untrained = get_peft_model(model, LoraConfig(r=4, task_type="CAUSAL_LM", **TARGETS[target]))
    untrained.save_pretrained(tmp_path / "adapter")
    worlds.refused(lambda: load_policy(base, adapter=str(tmp_path / "adapter")), "inert")


def test_a_merge_that_would_change_the_logits_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = worlds.save(tmp_path / "base", worlds.tiny_model("qwen2", tied=True))
    train_adapter(AutoModelForCausalLM.from_pretrained(base), **TARGETS["head"]).save_pretrained(tmp_path / "adapter")
    monkeypatch.setattr(adapters_module, "_untie_adapted_weights", lambda wrapped: None)
    worlds.refused(lambda: load_policy(base, adapter=str(tmp_path / "adapter")), "cannot be merged", base, "logits")


def test_a_merge_is_checked_on_tokens_of_texts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = worlds.tiny_model("llama", vocab=64)
    model.get_input_embeddings().weight.data[:8] *= 1e-15  # special tokens that were never trained: small logits
    base = worlds.save(tmp_path / "base", model)
    adapter = make_adapter_folder(tmp_path / "adapter", base, model)
    merge = adapters_module._merge

    def merge_wrongly(wrapped: Any) -> Any:
        merged = merge(wrapped)
        merged.model.layers[0].mlp.up_proj.weight.data *= 2
        return merged

    load_policy(base, adapter=adapter)
    monkeypatch.setattr(adapters_module, "_merge", merge_wrongly)
    worlds.refused(lambda: load_policy(base, adapter=adapter), "cannot be merged", base, "logits")


def make_adapter_folder(folder: Path, base: str, model: Any = None, **changes: Any) -> str:
    train_adapter(model or worlds.tiny_model(), target_modules=["q_proj"]).save_pretrained(folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": base, **changes}))
    return str(folder)


@pytest.mark.parametrize("length", [1, 2, 3])
def test_adapters_that_lead_back_to_themselves_are_refused(length: int, tmp_path: Path) -> None:
    folders = [tmp_path / str(number) for number in range(length)]
    for number, folder in enumerate(folders):
        make_adapter_folder(folder, str(folders[(number + 1) % length]))
    name = str(folders[0])
    for action in (
        lambda: load_tokenizer(name),
        lambda: load_policy(name),
        lambda: load_causal_lm(name, dtype="float32", device="cpu"),
        lambda: load_reward(f"logratio:{name}", policy=worlds.tiny_policy()),
        lambda: load_reward(name, policy=worlds.tiny_policy()),
    ):
        worlds.refused(action, "adapter", "leads back to itself")


def test_an_adapter_that_names_its_folder_by_another_path(tmp_path: Path) -> None:
    make_adapter_folder(tmp_path / "adapter", f"{tmp_path}/./adapter/../adapter")
    worlds.refused(lambda: resolve_adapters(str(tmp_path / "adapter")), "leads back to itself")


def test_an_adapter_of_an_adapter(tmp_path: Path) -> None:
    base = worlds.save(tmp_path / "base", worlds.tiny_model())
    first = make_adapter_folder(tmp_path / "first", base)
    second = make_adapter_folder(tmp_path / "second", first)
    chain = resolve_adapters(second)
    assert [name for name, _, _ in chain.adapters] == [second, first] and chain.base_model == base
    model = load_causal_lm(second, dtype="float32", device="cpu")
    once, plain = load_causal_lm(first, dtype="float32", device="cpu"), worlds.tiny_model()
    delta = [part.model.layers[0].self_attn.q_proj.weight for part in (model, once, plain)]
    torch.testing.assert_close(delta[0] - delta[1], delta[1] - delta[2])  # the same adapter, twice
    assert model.name_or_path == second


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["bias", "dora", "rslora", "norm", "loha", "lokr", "ia3", "vera", "oft", "pissa"])
def test_adapters_of_other_kinds_give_the_trained_logits(kind: str, tmp_path: Path) -> None:
    task: dict[str, Any] = {"task_type": "CAUSAL_LM", "target_modules": ["q_proj", "down_proj"]}
    configs = {
        "bias": peft.LoraConfig(r=2, bias="all", **task),
        "dora": peft.LoraConfig(r=2, use_dora=True, **task),
        "rslora": peft.LoraConfig(r=2, use_rslora=True, **task),
        "norm": peft.LoraConfig(r=2, modules_to_save=["norm"], **task),
        "loha": peft.LoHaConfig(r=2, **task),
        "lokr": peft.LoKrConfig(r=2, **task),
        "ia3": peft.IA3Config(feedforward_modules=["down_proj"], **task),
        "vera": peft.VeraConfig(r=2, task_type="CAUSAL_LM", target_modules=["q_proj"]),
        "oft": peft.OFTConfig(r=0, oft_block_size=4, **task),
        "pissa": peft.LoraConfig(r=2, init_lora_weights="pissa", **task),
    }
    base = worlds.save(tmp_path / "base", worlds.tiny_model("qwen2", tied=True))
    trained = get_peft_model(AutoModelForCausalLM.from_pretrained(base), configs[kind]).eval()
    for weight in trained.parameters():
        if weight.requires_grad:
            weight.data.add_(torch.randn(weight.shape, generator=torch.Generator().manual_seed(0)) * 0.1)
    trained.save_pretrained(tmp_path / "adapter")
    policy = load_policy(base, adapter=str(tmp_path / "adapter"))
    torch.testing.assert_close(policy.model(IDS).logits, trained(IDS).logits, rtol=1e-4, atol=1e-3)


@pytest.mark.parametrize("kind", ["prompt", "prefix"])
def test_adapters_that_are_no_weights_are_refused(kind: str, tmp_path: Path) -> None:
    from peft import PrefixTuningConfig, PromptTuningConfig

    base = worlds.save(tmp_path / "base", worlds.tiny_model())
    make_config = PromptTuningConfig if kind == "prompt" else PrefixTuningConfig
    config = make_config(task_type="CAUSAL_LM", num_virtual_tokens=2)
    get_peft_model(AutoModelForCausalLM.from_pretrained(base), config).save_pretrained(tmp_path / "adapter")
    worlds.refused(lambda: load_policy(base, adapter=str(tmp_path / "adapter")), "adapter", base)
