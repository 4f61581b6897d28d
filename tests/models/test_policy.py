"""models: what is loaded, what is refused and in which words, prompts, and the map between vocabularies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import (
    AutoModelForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

from nabla_trl.models.loading import freeze_policy, load_policy, map_vocabulary
from nabla_trl.states.probe import get_layout
from nabla_trl.tasks.problem import Problem

QUESTION = Problem(id="q", question="1+2")


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A folder with the default tiny policy; not to be changed."""
    return worlds.save(tmp_path_factory.mktemp("policy"))


def _edit(path: Path, **values: Any) -> None:
    path.write_text(json.dumps({**json.loads(path.read_text()), **values}))


# --- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_a_loaded_policy_is_the_saved_model_frozen(architecture: str, tmp_path: Path) -> None:
    model = worlds.tiny_model(architecture)
    policy = load_policy(worlds.save(tmp_path, model))
    ids = torch.tensor([policy.encode(QUESTION)])
    assert torch.equal(policy.model(ids).logits, model(ids).logits)
    assert not policy.model.training and not any(weight.requires_grad for weight in policy.model.parameters())
    assert policy.stop_ids == {worlds.TOKENS.index(worlds.END)}
    assert policy.name == str(tmp_path) and policy.context_length == 128
    assert policy.tokenizer_hash == worlds.tiny_policy().tokenizer_hash


def test_dtype_is_what_was_asked_for(saved: str) -> None:
    assert load_policy(saved).model.dtype == torch.float32
    assert load_policy(saved, dtype="bfloat16").model.dtype == torch.bfloat16


def test_stop_tokens_are_all_eos_of_model_and_tokenizer(tmp_path: Path) -> None:
    model = worlds.tiny_model(eos=1)
    model.generation_config.eos_token_id = [1, 3]
    policy = load_policy(worlds.save(tmp_path, model))
    assert policy.stop_ids == {1, 3, policy.tokenizer.eos_token_id}


@pytest.mark.parametrize(
    ("pad", "rows", "forbidden"),
    [
        (worlds.PAD, 27, [22]),
        (worlds.PAD, 30, [22, 27, 28, 29]),  # padded rows have no token string
        (worlds.END, 27, []),  # pad = eos: it must be drawn, or nothing ends
        (None, 27, []),
        (worlds.PAD, 22, []),  # a padding token added to the tokenizer, but not to the model
    ],
)
def test_tokens_that_must_not_be_drawn(pad: str | None, rows: int, forbidden: list[int]) -> None:
    policy = worlds.tiny_policy(tokenizer=worlds.char_tokenizer(pad=pad), vocab=rows, pad=None)
    assert policy.forbidden_mask.nonzero().squeeze(1).tolist() == forbidden


@pytest.mark.parametrize("name", ["/nowhere/at/all", "no-such-model-here", "not a name!"])
def test_nothing_there(name: str) -> None:
    worlds.refused(lambda: load_policy(name), "tokenizer", repr(name), "no such folder")


def test_an_empty_folder_and_one_without_tokenizer(tmp_path: Path) -> None:
    worlds.refused(lambda: load_policy(str(tmp_path)), "cannot load a tokenizer", str(tmp_path))
    worlds.tiny_model().save_pretrained(tmp_path)
    worlds.refused(lambda: load_policy(str(tmp_path)), "cannot load a tokenizer", str(tmp_path))


def test_a_tokenizer_without_model(tmp_path: Path) -> None:
    worlds.char_tokenizer().save_pretrained(tmp_path)
    worlds.refused(lambda: load_policy(str(tmp_path)), "cannot load a model", str(tmp_path))


def test_missing_weights_are_named(tmp_path: Path) -> None:
    name = worlds.save(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    save_file(weights, tmp_path / "model.safetensors", metadata={"format": "pt"})
    worlds.refused(lambda: load_policy(name), "lm_head.weight", "random", "CausalLM")


@pytest.mark.parametrize("keep", [0, 0.5])
def test_cut_off_weights_are_refused(tmp_path: Path, keep: float) -> None:
    name, file = worlds.save(tmp_path), tmp_path / "model.safetensors"
    file.write_bytes(file.read_bytes()[: int(keep * file.stat().st_size)])
    worlds.refused(lambda: load_policy(name), "cannot load a model", name)


def test_weights_of_another_shape_are_refused(tmp_path: Path) -> None:
    name = worlds.save(tmp_path)
    _edit(tmp_path / "config.json", intermediate_size=80)
    worlds.refused(lambda: load_policy(name), "cannot load a model", "mismatched")


def test_unknown_dtype_and_device(saved: str) -> None:
    worlds.refused(lambda: load_policy(saved, dtype="int3"), "float32", "bfloat16", "'int3'")
    worlds.refused(lambda: load_policy(saved, device="toaster"), "cannot use device 'toaster'")


def test_no_eos_token(tmp_path: Path) -> None:
    model = worlds.tiny_model(eos=None)
    tokenizer = worlds.char_tokenizer()
    tokenizer.eos_token = None
    name = worlds.save(tmp_path, model, tokenizer)
    worlds.refused(lambda: load_policy(name), "no eos token", name)


WINDOWED = {
    "mistral": (MistralConfig, MistralForCausalLM, {"sliding_window": 8}),
    "gemma2": (Gemma2Config, Gemma2ForCausalLM, {"sliding_window": 8, "head_dim": 8}),
}
SHAPE = {
    "vocab_size": len(worlds.TOKENS),
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "bos_token_id": None,
    "eos_token_id": worlds.TOKENS.index(worlds.END),
    "pad_token_id": worlds.TOKENS.index(worlds.PAD),
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_sliding_windows_are_welcome(kind: str, tmp_path: Path) -> None:
    config, model, options = WINDOWED[kind]
    name = worlds.save(tmp_path, model(config(**SHAPE, **options)))
    assert get_layout(load_policy(name).model).window == 8


# --- adapters ---------------------------------------------------------------------------------------------


def _adapter(folder: Path, model: PreTrainedModel, *, trained: bool = True, **options: Any) -> PeftModel:
    config = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type="CAUSAL_LM", **options)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(model, config)
        for name, weight in wrapped.named_parameters():
            if trained and "lora_B" in name:
                weight.data.normal_()
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def test_a_merged_adapter_equals_the_unmerged_model(saved: str, tmp_path: Path) -> None:
    wrapped = _adapter(tmp_path, worlds.tiny_model())
    policy = load_policy(saved, adapter=str(tmp_path))
    ids = torch.tensor([policy.encode(QUESTION)])
    merged, plain = policy.model(ids).logits, load_policy(saved).model(ids).logits
    torch.testing.assert_close(merged, wrapped(ids).logits, rtol=1e-4, atol=1e-4)
    assert (merged - plain).abs().max() > 0.1
    assert type(policy.model) is type(worlds.tiny_model())
    assert not any(weight.requires_grad for weight in policy.model.parameters())
    assert str(tmp_path) in policy.name and saved in policy.name


def test_an_inert_adapter_is_refused(saved: str, tmp_path: Path) -> None:
    _adapter(tmp_path, worlds.tiny_model(), trained=False)
    worlds.refused(lambda: load_policy(saved, adapter=str(tmp_path)), str(tmp_path), "inert")


@pytest.mark.parametrize(
    ("made_for", "architecture"),
    [
        ({"width": 64}, "llama"),
        ({"layers": 1}, "llama"),  # fits the first layer only
        ({"layers": 3}, "llama"),  # the third layer's part has no place
        ({}, "gpt2"),  # no module of these names
    ],
    ids=["wider", "shallower", "deeper", "other architecture"],
)
def test_an_adapter_of_another_base_is_refused(made_for: dict, architecture: str, tmp_path: Path) -> None:
    base = worlds.save(tmp_path / "base", worlds.tiny_model(architecture))
    _adapter(tmp_path / "adapter", worlds.tiny_model(**made_for))
    adapter = str(tmp_path / "adapter")
    worlds.refused(lambda: load_policy(base, adapter=adapter), f"adapter {adapter}", base)


def test_an_adapter_that_names_another_base_of_the_same_shape_is_refused(saved: str, tmp_path: Path) -> None:
    other = tmp_path / "other"
    worlds.tiny_model(seed=5).save_pretrained(other)
    _adapter(tmp_path / "adapter", AutoModelForCausalLM.from_pretrained(other))
    worlds.refused(lambda: load_policy(saved, adapter=str(tmp_path / "adapter")), f"was made for {other}", saved)


def test_an_adapter_folder_that_holds_none(saved: str, tmp_path: Path) -> None:
    worlds.refused(lambda: load_policy(saved, adapter=str(tmp_path)), "no adapter_config.json")
    worlds.refused(lambda: load_policy(saved, adapter=str(tmp_path / "nowhere")), "nowhere")


@pytest.mark.parametrize("content", [b"", None], ids=["no bytes", "no weights"])
def test_an_empty_adapter_file_is_refused(saved: str, tmp_path: Path, content: bytes | None) -> None:
    _adapter(tmp_path, worlds.tiny_model())
    file = tmp_path / "adapter_model.safetensors"
    if content is None:
        save_file({}, file, metadata={"format": "pt"})
    else:
        file.write_bytes(content)
    worlds.refused(lambda: load_policy(saved, adapter=str(tmp_path)), str(tmp_path))


# --- prompts ----------------------------------------------------------------------------------------------


def test_the_chat_template_opens_the_assistants_turn() -> None:
    policy = worlds.tiny_policy()
    assert policy.tokenizer.decode(policy.encode(QUESTION)) == "<|user|>1+2<|end|><|assistant|>"
    chat = ({"role": "assistant", "content": "3"}, {"role": "user", "content": "4"})
    ids = policy.encode(Problem(id="c", question="4", messages=chat))
    assert policy.tokenizer.decode(ids) == "<|assistant|>3<|end|><|user|>4<|end|><|assistant|>"


def test_responses_are_decoded_without_special_tokens() -> None:
    policy = worlds.tiny_policy()
    assert policy.decode([1, 10, 2, policy.tokenizer.eos_token_id]) == "1+2"


def test_a_policy_without_chat_template_gets_the_question_and_a_line_break() -> None:
    tokenizer = worlds.char_tokenizer((*worlds.TOKENS, "\n"), template=None)
    policy = worlds.tiny_policy(tokenizer=tokenizer)
    assert tokenizer.decode(policy.encode(QUESTION)) == "1+2\n"


def _with_bos(template: str | None) -> PreTrainedTokenizerFast:
    """A tokenizer that adds `<|bos|>` by itself, as Llama's do."""
    from tokenizers.processors import TemplateProcessing

    tokenizer = worlds.char_tokenizer((*worlds.TOKENS, "\n", "<|bos|>"), template=template)
    bos = tokenizer.convert_tokens_to_ids("<|bos|>")
    tokenizer.bos_token = "<|bos|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|bos|> $A", special_tokens=[("<|bos|>", bos)]
    )
    assert tokenizer("1")["input_ids"] == [bos, 1]
    return tokenizer


@pytest.mark.parametrize("template", ["{{ bos_token }}" + worlds.TEMPLATE, None], ids=["template", "no template"])
def test_bos_comes_once(template: str | None) -> None:
    tokenizer = _with_bos(template)
    ids = worlds.tiny_policy(tokenizer=tokenizer).encode(QUESTION)
    assert ids.count(tokenizer.bos_token_id) == 1 and ids[0] == tokenizer.bos_token_id


def test_a_template_without_bos_gets_none() -> None:
    tokenizer = _with_bos(worlds.TEMPLATE)
    assert tokenizer.bos_token_id not in worlds.tiny_policy(tokenizer=tokenizer).encode(QUESTION)


def test_a_prompt_that_fills_the_context_is_refused() -> None:
    policy = worlds.tiny_policy(context=16)
    assert len(policy.encode(Problem(id="fits", question="1" * 12))) == 15
    worlds.refused(
        lambda: policy.encode(Problem(id="long", question="1" * 13)), "long", "16 tokens", "context", "policy"
    )


def test_an_empty_prompt_is_refused() -> None:
    policy = worlds.tiny_policy(tokenizer=worlds.char_tokenizer(template="{{ messages[0]['content'] }}"))
    worlds.refused(lambda: policy.encode(Problem(id="void", question="")), "void", "empty")


def test_unknown_characters_are_refused() -> None:
    policy = worlds.tiny_policy()
    worlds.refused(lambda: policy.encode(Problem(id="greek", question="1+π")), "greek", "does not know")


def test_a_byte_level_tokenizer_that_names_eos_as_unknown_is_welcome() -> None:
    """GPT-2's unk token is its eos token, and templates write it."""
    tokenizer = worlds.char_tokenizer(template="{{ messages[0]['content'] + eos_token }}")
    tokenizer.unk_token = tokenizer.eos_token
    ids = worlds.tiny_policy(tokenizer=tokenizer).encode(QUESTION)
    assert ids[-1] == tokenizer.unk_token_id


def test_messages_that_the_template_refuses() -> None:
    template = "{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system role') }}{% endif %}1"
    policy = worlds.tiny_policy(tokenizer=worlds.char_tokenizer(template=template))
    chat = ({"role": "system", "content": "be brief"}, {"role": "user", "content": "1"})
    problem = Problem(id="strict", question="1", messages=chat)
    worlds.refused(lambda: policy.encode(problem), "strict", "template", "no system role")


# --- vocabularies -----------------------------------------------------------------------------------------


def _map(source: PreTrainedTokenizerFast, target: PreTrainedTokenizerFast, **rows: int) -> list[int]:
    rows = {"num_source_rows": len(source), "num_target_rows": len(target), **rows}
    return map_vocabulary(source, target, **rows).tolist()


def test_the_map_of_a_vocabulary_to_itself_is_the_identity() -> None:
    tokenizer = worlds.char_tokenizer()
    assert _map(tokenizer, worlds.char_tokenizer()) == list(range(len(tokenizer)))


def test_permuted_ids_are_matched_by_token_string() -> None:
    tokenizer = worlds.char_tokenizer()
    shuffled, new_ids = worlds.permuted_tokenizer(tokenizer)
    assert _map(tokenizer, shuffled) == new_ids.tolist() != list(range(len(tokenizer)))
    there = map_vocabulary(tokenizer, shuffled, num_source_rows=len(tokenizer), num_target_rows=len(shuffled))
    back = map_vocabulary(shuffled, tokenizer, num_source_rows=len(tokenizer), num_target_rows=len(tokenizer))
    assert back[there].tolist() == list(range(len(tokenizer)))


def test_padded_rows_map_to_nothing_and_larger_targets_do_not_matter() -> None:
    tokenizer = worlds.char_tokenizer()
    larger = worlds.char_tokenizer((*worlds.TOKENS, "x", "y"))
    mapped = _map(tokenizer, larger, num_source_rows=32, num_target_rows=64)
    assert mapped == [*range(len(tokenizer)), *[-1] * 5]


def test_special_tokens_may_be_missing() -> None:
    tokenizer = worlds.char_tokenizer()
    fewer = worlds.char_tokenizer([*worlds.CHARS, worlds.PAD, worlds.END, worlds.UNK])
    mapped = dict(zip(worlds.TOKENS, _map(tokenizer, fewer), strict=True))
    assert mapped[worlds.USER] == mapped[worlds.ASSISTANT] == -1
    assert mapped[worlds.END] == len(worlds.CHARS) + 1


def test_missing_ordinary_tokens_are_counted_and_named() -> None:
    tokenizer = worlds.char_tokenizer()
    fewer = worlds.char_tokenizer([token for token in worlds.TOKENS if token not in "789abcdef"])
    message = worlds.refused(lambda: _map(tokenizer, fewer), "lacks 9", "'7', '8', '9', 'a', 'b' …")
    assert "'c'" not in message


def test_a_token_beyond_the_targets_embedding_is_missing() -> None:
    """The target's tokenizer knows it, its model does not."""
    tokenizer = worlds.char_tokenizer()
    worlds.refused(lambda: _map(tokenizer, worlds.char_tokenizer(), num_target_rows=21), "lacks 1", "'f'")


def test_a_policy_in_memory_is_frozen() -> None:
    model = worlds.tiny_model().train()
    policy = freeze_policy(model, worlds.char_tokenizer(), "name")
    assert not model.training and not any(weight.requires_grad for weight in model.parameters())
    assert replace(policy).device == torch.device("cpu")
