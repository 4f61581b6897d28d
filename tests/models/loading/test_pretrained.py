"""pretrained: every weight of a checkpoint is used or refused, text parts load alone, and no foreign code runs."""

from __future__ import annotations

import ast
import io
import json
import sys
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import transformers
import worlds
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from nabla_trl.cli.main import main
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.generation import GenerationRequest, generate_continuations
from nabla_trl.models.loading import (
    load_model,
    load_policy,
    load_tokenizer,
    set_trust_remote_code,
    trusting_remote_code,
)
from nabla_trl.models.loading.pretrained import trusts_remote_code
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import UNLIMITED_CONTEXT, get_context_length
from nabla_trl.rewards.loading import load_reward
from nabla_trl.search.reasoner import NablaReasoner
from nabla_trl.states.releases import supports_recurrent_layers

ROOT = Path(__file__).parents[3]
IDS = torch.tensor([[5, 6, 7, 8]])


def edit_weights(folder: Path, **changes: torch.Tensor | None) -> None:
    """Add weights to a checkpoint, or remove those that are None. `__` stands for a dot."""
    file = folder / "model.safetensors"
    weights = load_file(file)
    for name, weight in changes.items():
        weights.pop(name.replace("__", "."), None)
        if weight is not None:
            weights[name.replace("__", ".")] = weight
    save_file(weights, file, metadata={"format": "pt"})


# --- weights ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name",
    [
        "model__layers__0__self_attn__q_proj__bias",
        "model__layers__1__mlp__up_proj__bias",
        "lm_head__bias",
        "score__weight",
        "model__layers__2__mlp__up_proj__weight",  # a layer more than the config says
        "model__extra__weight",
    ],
)
def test_weights_without_a_place_are_refused(name: str, tmp_path: Path) -> None:
    folder = worlds.save(tmp_path, worlds.tiny_model())
    load_policy(folder)
    edit_weights(tmp_path, **{name: torch.ones(32)})
    worlds.refused(lambda: load_policy(folder), folder, name.replace("__", "."), "LlamaForCausalLM", "no place")


def test_weights_that_never_matter_are_no_reason_to_refuse(tmp_path: Path) -> None:
    folder = worlds.save(tmp_path, worlds.tiny_model())
    edit_weights(
        tmp_path,
        model__layers__0__self_attn__rotary_emb__inv_freq=torch.ones(4),  # written by old versions
        mtp__layers__0__proj__weight=torch.ones(4),  # predicts further tokens
    )
    assert load_policy(folder).size.num_layers == 2


def test_attention_biases_that_the_config_denies(tmp_path: Path) -> None:
    config = worlds.tiny_model().config
    config.attention_bias = True
    folder = worlds.save(tmp_path, transformers.LlamaForCausalLM(config))
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"attention_bias": False}))
    worlds.refused(lambda: load_policy(folder), "bias", "no place")


def test_a_head_beside_tied_embeddings_is_used(tmp_path: Path) -> None:
    model = worlds.tiny_model(tied=False)
    folder = worlds.save(tmp_path, model)
    file = tmp_path / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tie_word_embeddings": True}))
    torch.testing.assert_close(load_policy(folder).model(IDS).logits, model(IDS).logits)


def test_a_missing_bias_is_refused(tmp_path: Path) -> None:
    folder = worlds.save(tmp_path, worlds.tiny_model("qwen2"))
    edit_weights(tmp_path, model__layers__1__self_attn__k_proj__bias=None)
    worlds.refused(lambda: load_policy(folder), "model.layers.1.self_attn.k_proj.bias", "random")


def test_the_bias_of_a_token_classifier_counts_in_every_step(tmp_path: Path) -> None:
    policy = worlds.tiny_policy("qwen2")
    model = transformers.Qwen2ForTokenClassification(worlds.tiny_model("qwen2", kind="score").config).eval()
    model.score.bias.data.fill_(5.0)
    reward = load_reward(f"process@;:{worlds.save(tmp_path, model)}", policy=policy)
    problem = worlds.tiny_problems()[0]
    item = worlds.sample(policy, problem, "9-5=4;4+1=5;#5")
    row = reward.objectives[0].encode(item)
    scores = model(torch.tensor([row.sequence_ids])).logits[0, len(row.prompt_ids) - 1 :, 0].detach()
    positions = reward.objectives[0].list_score_positions(row.response_ids, len(row.turn_end_ids))  # type: ignore[attr-defined]
    assert len(positions) == 3
    ([value], _) = reward.score(
        [item], reward.compute_prompt_caches([item], FlopCounter()), flop_counter=FlopCounter()
    )
    assert value == pytest.approx(float(scores[positions].sum()), rel=1e-4)


def test_a_score_bias_of_a_sequence_classifier_is_refused(tmp_path: Path) -> None:
    folder = worlds.save(tmp_path, worlds.tiny_model(kind="score"))
    load_reward(folder, policy=worlds.tiny_policy())
    edit_weights(tmp_path, score__bias=torch.ones(1))
    worlds.refused(lambda: load_reward(folder, policy=worlds.tiny_policy()), "score.bias", "no place")


# --- text parts -------------------------------------------------------------------------------------------

TEXT: dict[str, Any] = {
    "vocab_size": len(worlds.TOKENS),
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 64,
    "bos_token_id": None,
    "eos_token_id": worlds.TOKENS.index(worlds.END),
    "pad_token_id": worlds.TOKENS.index(worlds.PAD),
}
FULL = {**TEXT, "layer_types": ["full_attention"] * 2}
VISION: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "image_size": 16,
    "patch_size": 8,
}
QWEN_VISION = {"depth": 1, "hidden_size": 32, "num_heads": 4, "out_hidden_size": 32, "patch_size": 8}
# class name -> config of a vision-language model, and its class
COMPOSITES: dict[str, tuple[str, dict[str, Any]]] = {
    "Gemma3ForConditionalGeneration": (
        "gemma3",
        {"text_config": FULL, "vision_config": VISION, "mm_tokens_per_image": 4},
    ),
    "Gemma4ForConditionalGeneration": (
        "gemma4",
        {
            "text_config": FULL
            | {
                "num_kv_shared_layers": 0,
                "vocab_size_per_layer_input": len(worlds.TOKENS),
                "hidden_size_per_layer_input": 8,
                "global_head_dim": 8,
            },
            "vision_config": VISION,
            "audio_config": None,
        },
    ),
    "Qwen3_5ForConditionalGeneration": ("qwen3_5", {"text_config": FULL, "vision_config": QWEN_VISION}),
    "Mistral3ForConditionalGeneration": (
        "mistral3",
        {
            "text_config": {"model_type": "mistral", **TEXT, "sliding_window": None},
            "vision_config": {"model_type": "pixtral", **VISION, "head_dim": 8},
        },
    ),
    "Llama4ForConditionalGeneration": (
        "llama4",
        {
            "text_config": {**TEXT, "moe_layers": [], "intermediate_size_mlp": 64, "num_local_experts": 2},
            "vision_config": {
                **VISION,
                "vision_output_dim": 32,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
            },
        },
    ),
    "LlavaForConditionalGeneration": (
        "llava",
        {
            "text_config": {"model_type": "llama", **TEXT},
            "vision_config": {"model_type": "clip_vision_model", **VISION},
        },
    ),
}


def make_composite(class_name: str) -> PreTrainedModel:
    model_type, options = COMPOSITES[class_name]
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = transformers.AutoConfig.for_model(model_type, **options)
        return getattr(transformers, class_name)(config).eval()


@pytest.mark.parametrize("class_name", COMPOSITES)
def test_the_text_part_of_a_vision_language_model_is_a_causal_lm(class_name: str, tmp_path: Path) -> None:
    if class_name.startswith("Qwen3_5") and not supports_recurrent_layers:
        pytest.skip("recurrent layers need a newer transformers")
    whole = make_composite(class_name)
    folder = worlds.save(tmp_path, whole)
    text = load_model(AutoModelForCausalLM, folder, dtype="float32", device="cpu")
    assert type(text).__name__.endswith("ForCausalLM")
    assert not [name for name, _ in text.named_parameters() if "vision" in name or "visual" in name]
    torch.testing.assert_close(text(IDS).logits, whole(input_ids=IDS).logits)
    weights = load_file(tmp_path / "model.safetensors")
    query = next(name for name in weights if name.endswith("q_proj.weight") and "visi" not in name)
    bias = query.replace(".weight", ".bias").replace(".", "__")
    edit_weights(tmp_path, **{bias: torch.ones(len(weights[query]))})
    worlds.refused(
        lambda: load_model(AutoModelForCausalLM, folder, dtype="float32", device="cpu"), "q_proj.bias", "no place"
    )


def test_a_vision_language_model_whose_text_part_is_none_is_refused(tmp_path: Path) -> None:
    rope = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}}
    config = transformers.Qwen3VLConfig(
        text_config=TEXT | rope, vision_config={**QWEN_VISION, "deepstack_visual_indexes": []}
    )
    folder = worlds.save(tmp_path, transformers.Qwen3VLForConditionalGeneration(config))
    worlds.refused(lambda: load_policy(folder), folder, "qwen3_vl", "no CausalLM class", "text part")


def test_a_policy_from_a_vision_language_model(tmp_path: Path) -> None:
    folder = worlds.save(tmp_path, make_composite("Mistral3ForConditionalGeneration"))
    policy = load_policy(folder)
    assert policy.context_length == 64 and policy.head.is_plain


# --- contexts ---------------------------------------------------------------------------------------------


def test_context_lengths_by_other_names() -> None:
    size = {"vocab_size": 22, "bos_token_id": None}
    mpt = transformers.MptConfig(**size, d_model=32, n_layers=1, n_heads=4, max_seq_len=48)
    bloom = transformers.BloomConfig(**size, hidden_size=32, n_layer=1, n_head=4)
    assert get_context_length(transformers.MptForCausalLM(mpt)) == 48
    assert get_context_length(transformers.BloomForCausalLM(bloom)) == UNLIMITED_CONTEXT
    assert get_context_length(worlds.tiny_model("gpt2", context=96)) == 96


SHORT_FACTORS = {"short_factor": [1.0] * 4, "long_factor": [4.0] * 4}


@pytest.mark.parametrize(
    ("family", "options", "length"),
    [
        (
            "phi3",
            {
                "max_position_embeddings": 256,
                "original_max_position_embeddings": 64,
                "rope_parameters": {"rope_type": "longrope", "rope_theta": 10000.0, **SHORT_FACTORS},
            },
            64,
        ),
        ("llama4_text", {"max_position_embeddings": 256, "floor_scale": 64}, 32),
        ("llama4_text", {"max_position_embeddings": 256, "floor_scale": 64, "attn_temperature_tuning": False}, 256),
        ("doge", {"max_position_embeddings": 256, "keep_window_size": 64}, 32),
        ("doge", {"max_position_embeddings": 16, "keep_window_size": 64}, 16),
    ],
)
def test_contexts_end_where_a_token_would_depend_on_the_rest_of_the_batch(
    family: str, options: dict[str, Any], length: int
) -> None:
    size = {"hidden_size": 32, "num_attention_heads": 4, "num_key_value_heads": 2, "pad_token_id": 0}
    config = transformers.AutoConfig.for_model(family, **size, **options)
    assert get_context_length(SimpleNamespace(config=config)) == length  # type: ignore[arg-type]


ALIBI: dict[str, Any] = {
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 64},
    "falcon": {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
}


@pytest.mark.parametrize("family", ALIBI)
def test_models_without_position_embeddings_decode_as_transformers_does(family: str, tmp_path: Path) -> None:
    ids = {name: TEXT[name] for name in ("vocab_size", "bos_token_id", "eos_token_id", "pad_token_id")}
    config = transformers.AutoConfig.for_model(family, **ids, **ALIBI[family])
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = AutoModelForCausalLM.from_config(config)
        for weight in model.parameters():
            if weight.ndim == 2:
                weight.data.normal_(std=0.3)
    policy = load_policy(worlds.save(tmp_path, model))
    prompts = [policy.encode(problem) for problem in worlds.tiny_problems()]
    requests = [GenerationRequest(str(number), prompt, None, 6) for number, prompt in enumerate(prompts)]
    sampling = Sampling(temperature=0, max_new_tokens=6)
    outputs = generate_continuations(policy, requests, sampling, flop_counter=FlopCounter())
    forbidden = [[index] for index in policy.forbidden_mask.nonzero().squeeze(1).tolist()]
    for prompt, output in zip(prompts, outputs, strict=True):
        options: dict[str, Any] = {"max_new_tokens": 6, "do_sample": False, "bad_words_ids": forbidden}
        expected = policy.model.generate(torch.tensor([prompt]), **options)[0, len(prompt) :]
        assert output.ids == expected.tolist()


# --- foreign code -----------------------------------------------------------------------------------------

CODE = """
from pathlib import Path
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
Path(__file__).with_name("ran").touch()
Path({marker!r}).touch()
class ForeignConfig(LlamaConfig):
    model_type = "foreign-kind"
class ForeignLM(LlamaForCausalLM):
    config_class = ForeignConfig
class ForeignTokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.fixture
def foreign(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[str, Path]:
    """A repository that needs its own code, and the file that this code writes. Consent is piped in, as by `yes`."""
    folder, marker = tmp_path / "repository", tmp_path / "ran"
    model = worlds.tiny_model()
    worlds.save(folder, model)
    (folder / "foreign.py").write_text(CODE.format(marker=str(marker)))
    config = json.loads((folder / "config.json").read_text())
    auto_map = {"AutoConfig": "foreign.ForeignConfig", "AutoModelForCausalLM": "foreign.ForeignLM"}
    (folder / "config.json").write_text(
        json.dumps(config | {"model_type": "foreign-kind", "architectures": ["ForeignLM"], "auto_map": auto_map})
    )
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 99))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    return str(folder), marker


def test_code_of_a_repository_is_not_run(foreign: tuple[str, Path]) -> None:
    folder, marker = foreign
    for action in (
        lambda: load_policy(folder),
        lambda: load_model(AutoModelForCausalLM, folder, dtype="float32", device="cpu"),
        lambda: load_reward(folder, policy=worlds.tiny_policy()),
        lambda: load_reward(f"logratio:{folder}", policy=worlds.tiny_policy()),
        lambda: NablaReasoner.from_pretrained(folder, reward=folder),
    ):
        worlds.refused(action, folder, "needs code from its repository", "--trust_remote_code")
        assert not marker.exists()


def test_code_of_a_repository_runs_where_it_is_trusted(foreign: tuple[str, Path]) -> None:
    folder, marker = foreign
    policy = load_policy(folder, trust_remote_code=True)
    assert type(policy.model).__name__ == "ForeignLM" and marker.exists()
    assert not trusts_remote_code()
    set_trust_remote_code(True)
    try:
        assert type(load_policy(folder).model).__name__ == "ForeignLM"
        worlds.refused(lambda: load_policy(folder, trust_remote_code=False), "needs code")
        with trusting_remote_code(None):
            assert trusts_remote_code()
    finally:
        set_trust_remote_code(False)


def test_the_shell_runs_no_code_of_a_repository_unless_told(
    foreign: tuple[str, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    folder, marker = foreign
    command = ["solve", "1+2", "--policy", folder, "--reward", "power:2", "--max_new_tokens", "2"]
    try:
        assert main(command) == 2 and not marker.exists()
        lines = capsys.readouterr().err.strip().splitlines()
        assert "--trust_remote_code" in lines[0] and lines[1:] in ([], ["1 fault. Nothing was started."])
        main([*command, "--trust_remote_code"])
        assert marker.exists()
        assert main(command) == 2  # the option holds for one command
    finally:
        set_trust_remote_code(False)


def test_a_tokenizer_with_code_is_refused(tmp_path: Path, foreign: tuple[str, Path]) -> None:
    folder, marker = Path(foreign[0]), foreign[1]
    file = folder / "tokenizer_config.json"
    settings = json.loads(file.read_text()) | {
        "tokenizer_class": "ForeignTokenizer",
        "auto_map": {"AutoTokenizer": ["foreign.ForeignTokenizer", None]},
    }
    file.write_text(json.dumps(settings))
    worlds.refused(lambda: load_tokenizer(str(folder)), "needs code from its repository")
    assert not marker.exists()


def test_nothing_loads_without_saying_whether_foreign_code_may_run() -> None:
    """`call_from_pretrained` says so for the package. A recipe that uses no package internals says so by itself."""
    calls = [
        f"{path}:{node.lineno}"
        for folder in ("nabla_trl", "recipes")
        for path in (ROOT / folder).rglob("*.py")
        if "Auto" in (text := path.read_text()) and '"trust_remote_code": False' not in text
        for node in ast.walk(ast.parse(text))
        if isinstance(node, ast.Call)
        and isinstance(node.func, ast.Attribute)
        and node.func.attr == "from_pretrained"
        and getattr(node.func.value, "id", "").startswith("Auto")
    ]
    assert not calls, f"use call_from_pretrained: {calls}"


@pytest.mark.parametrize("sharded", [False, True])
def test_whole_weights_are_loaded_where_zero_3_is_on(
    sharded: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """transformers shards every model that it loads while ZeRO-3 is on: one to train may be, a frozen one not."""
    from transformers.integrations import deepspeed

    class Zero3:
        def is_zero3(self) -> bool:
            return True

    zero3 = Zero3()
    monkeypatch.setattr(deepspeed, "_hf_deepspeed_config_weak_ref", lambda: zero3)
    folder, seen = worlds.save(tmp_path, worlds.tiny_model()), []
    original = transformers.LlamaForCausalLM.__init__

    def record(self: Any, config: Any) -> None:
        seen.append(deepspeed.is_deepspeed_zero3_enabled())
        original(self, config)

    monkeypatch.setattr(transformers.LlamaForCausalLM, "__init__", record)
    with suppress(ValueError, ImportError):  # sharding itself needs DeepSpeed
        load_model(AutoModelForCausalLM, folder, dtype="float32", device="cpu", sharded=sharded)
    assert seen == [sharded] or (sharded and not seen)
    assert deepspeed.is_deepspeed_zero3_enabled()
