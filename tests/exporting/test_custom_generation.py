"""custom_generation: the reasoner inside transformers' `model.generate`, by the file that an exported folder holds."""

from __future__ import annotations

import subprocess
import sys
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel

from nabla_trl.exporting import custom_generation
from nabla_trl.models.loading import freeze_policy
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import build_log_ratio_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.reasoner import NablaReasoner

# As an exported folder has it: the files are copied as they are.
FOLDER = str(Path(custom_generation.__file__).parent)
SEARCH: dict[str, Any] = {"max_rounds": 3, "max_new_tokens": 8, "top_k_candidates": 6}
PAD = worlds.TOKENS.index(worlds.PAD)


@pytest.fixture(autouse=True)
def modules(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """transformers copies the file to a cache of its own, which is not the user's here."""
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path_factory.mktemp("modules")))
    monkeypatch.setattr(sys, "path", list(sys.path))


def prompts(policy: Policy, questions: tuple[str, ...] = worlds.QUESTIONS) -> dict[str, Tensor]:
    """Left-padded prompts as the tokenizer writes them."""
    chats = [[{"role": "user", "content": question}] for question in questions]
    policy.tokenizer.padding_side = "left"
    read = policy.tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    return {name: read[name] for name in ("input_ids", "attention_mask")}


def generate(model: PreTrainedModel, inputs: dict[str, Tensor], policy: Policy, reward: Any, **options: Any) -> Tensor:
    settings = {**SEARCH, **options}
    return model.generate(
        **inputs, custom_generate=FOLDER, trust_remote_code=True, tokenizer=policy.tokenizer, reward=reward, **settings
    )


def written(output: Tensor, prompt: int) -> list[list[int]]:
    """The responses without their padding."""
    return [[index for index in row if index != PAD] for row in output[:, prompt:].tolist()]


@pytest.mark.parametrize("kind", ["scalar", "log-ratio"])
@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_it_gives_the_reasoners_tokens(architecture: str, kind: str) -> None:
    policy = worlds.tiny_policy(architecture)
    make = worlds.tiny_scalar if kind == "scalar" else worlds.tiny_logratio
    reward = make(policy, architecture)
    inputs = prompts(policy)
    assert inputs["attention_mask"][0, 0] == 0  # padded on the left
    output = generate(policy.model, inputs, policy, reward, seed=3)
    solved = NablaReasoner(policy, reward, SearchConfig(**SEARCH)).solve(list(worlds.QUESTIONS), seed=3)
    assert any(revision.accepted for trace in solved for revision in trace.revisions)
    assert torch.equal(output[:, : inputs["input_ids"].shape[1]], inputs["input_ids"])
    assert written(output, inputs["input_ids"].shape[1]) == [trace.response_ids for trace in solved]


def test_a_batch_is_its_rows_and_the_seed_counts(policy: Policy, scalar_reward: Reward) -> None:
    whole = prompts(policy)
    width = whole["input_ids"].shape[1]
    first, other = (generate(policy.model, whole, policy, scalar_reward, seed=seed) for seed in (0, 1))
    alone = prompts(policy, worlds.QUESTIONS[:1])
    single = generate(policy.model, alone, policy, scalar_reward)
    assert written(single, alone["input_ids"].shape[1]) == written(first, width)[:1]
    assert written(first, width) != written(other, width)


def test_padding_is_seen_without_a_mask(policy: Policy, scalar_reward: Reward) -> None:
    inputs = prompts(policy)
    masked = generate(policy.model, inputs, policy, scalar_reward)
    assert torch.equal(masked, generate(policy.model, {"inputs": inputs["input_ids"]}, policy, scalar_reward))


def test_the_model_is_given_back_as_it_was(policy: Policy, scalar_reward: Reward) -> None:
    model = worlds.tiny_model().train()
    model.lm_head.weight.requires_grad_(False)
    generate(model, prompts(policy), policy, scalar_reward)
    assert model.training and not model.lm_head.weight.requires_grad
    assert all(weight.requires_grad for name, weight in model.named_parameters() if name != "lm_head.weight")


def test_it_runs_in_inference_mode(policy: Policy, scalar_reward: Reward) -> None:
    plain = generate(policy.model, prompts(policy), policy, scalar_reward)
    with torch.inference_mode():
        assert torch.equal(generate(policy.model, prompts(policy), policy, scalar_reward), plain)


def test_an_adapter_beside_its_base_counts(policy: Policy) -> None:
    wrapped = get_peft_model(worlds.tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    merged = freeze_policy(worlds.tiny_model(), policy.tokenizer, "merged")
    merged.model.load_state_dict(deepcopy(wrapped).merge_and_unload().state_dict())
    reward = worlds.tiny_scalar(merged)
    inputs = prompts(policy)
    output = wrapped.generate(
        **inputs, custom_generate=FOLDER, trust_remote_code=True, tokenizer=policy.tokenizer, reward=reward, **SEARCH
    )
    assert torch.equal(output, generate(merged.model, inputs, policy, reward))
    assert not torch.equal(output, generate(worlds.tiny_model(), inputs, policy, reward))


def test_a_reward_that_names_the_base_means_the_base(policy: Policy, tmp_path: Path) -> None:
    """And not the model in memory that an adapter has changed: log p_base − log p_base is zero."""
    base = worlds.tiny_model()
    worlds.save(tmp_path, base, policy.tokenizer)
    adapted = AutoModelForCausalLM.from_pretrained(tmp_path)
    wrapped = get_peft_model(adapted, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
    settings = {**SEARCH, "solver": "none", "num_starts": 4}
    inputs, call = (
        prompts(policy),
        {"custom_generate": FOLDER, "trust_remote_code": True, "tokenizer": policy.tokenizer},
    )
    named = wrapped.generate(**inputs, **call, reward=f"logratio:{tmp_path}", **settings)
    frozen = freeze_policy(deepcopy(wrapped).merge_and_unload(), policy.tokenizer, "adapted")
    expected_reward = build_log_ratio_reward(frozen, freeze_policy(base, policy.tokenizer, "base"), frozen, "ratio")
    solved = NablaReasoner(frozen, expected_reward, SearchConfig(**settings)).solve(list(worlds.QUESTIONS))
    assert any(trace.reward for trace in solved)
    assert written(named, inputs["input_ids"].shape[1]) == [trace.response_ids for trace in solved]


# --- what a reward reads ------------------------------------------------------------------------------


def test_a_reward_reads_the_question_that_was_asked(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    seen = _questions(policy, monkeypatch, prompts(policy))
    assert seen == list(worlds.QUESTIONS)


def test_without_a_template_the_question_is_the_text(monkeypatch: pytest.MonkeyPatch) -> None:
    policy = worlds.tiny_policy("gpt2", tokenizer=worlds.char_tokenizer(template=None))
    ids = policy.tokenizer(["1+2", "7"], padding=True, padding_side="left", return_tensors="pt")
    seen = _questions(policy, monkeypatch, {name: ids[name] for name in ("input_ids", "attention_mask")})
    assert seen == ["1+2", "7"]


def test_a_prompt_of_several_turns_needs_its_messages(policy: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    chat = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}, {"role": "user", "content": "3"}]
    text = policy.tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True)
    inputs = {"input_ids": torch.tensor([policy.tokenizer(text, add_special_tokens=False)["input_ids"]])}
    reward = worlds.tiny_scalar(policy)
    worlds.refused(lambda: generate(policy.model, inputs, policy, reward), "row 0", "messages=")
    assert _questions(policy, monkeypatch, inputs, messages=[chat]) == ["3"]
    both = [chat, chat]
    worlds.refused(lambda: generate(policy.model, inputs, policy, reward, messages=both), "each of 1 rows: 2")


def _questions(
    policy: Policy, monkeypatch: pytest.MonkeyPatch, inputs: dict[str, Tensor], **options: Any
) -> list[str]:
    """The questions of the problems that are solved."""
    seen: list[str] = []

    def solve(problems: Any, **kwargs: Any) -> Any:
        seen.extend(problem.question for problem in problems)
        return original(problems, **kwargs)

    original = custom_generation.run_search
    monkeypatch.setattr(custom_generation, "run_search", solve)
    reward = worlds.tiny_scalar(policy, "gpt2" if policy.tokenizer.chat_template is None else "llama")
    generate(policy.model, inputs, policy, reward, **options)
    return seen


# --- refusals -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("missing", ["tokenizer", "reward"])
def test_what_must_be_given(policy: Policy, scalar_reward: Reward, missing: str) -> None:
    arguments = {"tokenizer": policy.tokenizer, "reward": scalar_reward, missing: None}
    call = dict(custom_generate=FOLDER, trust_remote_code=True, **arguments, **SEARCH)
    worlds.refused(lambda: policy.model.generate(**prompts(policy), **call), f"needs {missing}")


@pytest.mark.parametrize(
    ("option", "value"), [("num_beams", 4), ("streamer", object()), ("logits_processor", [object()])]
)
def test_what_it_does_not_take(policy: Policy, scalar_reward: Reward, option: str, value: Any) -> None:
    options = {option: value}
    call = lambda: generate(policy.model, prompts(policy), policy, scalar_reward, **options)  # noqa: E731
    worlds.refused(call, repr(option), "max_new_tokens")


def test_a_row_that_cannot_be_run_is_named(policy: Policy, scalar_reward: Reward) -> None:
    long = {"input_ids": prompts(policy, ("1+" * 70 + "1",))["input_ids"]}
    worlds.refused(lambda: generate(policy.model, long, policy, scalar_reward), "question/0", "context")


def test_without_trust_nothing_runs(policy: Policy, scalar_reward: Reward) -> None:
    with pytest.raises(ValueError, match="trust_remote_code"):
        policy.model.generate(
            **prompts(policy), custom_generate=FOLDER, trust_remote_code=False, tokenizer=policy.tokenizer
        )


def test_a_missing_package_is_named(tmp_path: Path) -> None:
    """Where nabla_trl is not installed, the file says what to do."""
    code = (
        f"import sys; sys.modules['nabla_trl'] = None; exec(open({f'{FOLDER}/custom_generate/generate.py'!r}).read())"
    )
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert ran.returncode == 1
    assert ran.stderr.splitlines()[-1].startswith(
        "ImportError: this custom generation method needs the package nabla-trl"
    )


@pytest.mark.parametrize(
    "options",
    [
        {"do_sample": True, "num_beams": 1, "num_return_sequences": 1, "use_cache": True},
        {"generation_config": GenerationConfig(max_new_tokens=8, eos_token_id=1)},
    ],
)
def test_arguments_that_ask_for_nothing_else_are_accepted(
    options: dict[str, Any], policy: Policy, scalar_reward: Reward
) -> None:
    plain = generate(policy.model, prompts(policy), policy, scalar_reward)
    assert torch.equal(generate(policy.model, prompts(policy), policy, scalar_reward, **options), plain)


def test_sampling_options_of_transformers_count(policy: Policy, scalar_reward: Reward) -> None:
    inputs = prompts(policy)
    greedy = generate(policy.model, inputs, policy, scalar_reward, temperature=0.0)
    assert torch.equal(generate(policy.model, inputs, policy, scalar_reward, do_sample=False), greedy)
    cold = generate(policy.model, inputs, policy, scalar_reward, temperature=0.5)
    config = GenerationConfig(temperature=0.5, do_sample=True, max_new_tokens=3)
    assert torch.equal(generate(policy.model, inputs, policy, scalar_reward, generation_config=config), cold)


def test_without_a_tokenizer_that_of_the_models_folder_is_taken(
    policy: Policy, scalar_reward: Reward, tmp_path: Path
) -> None:
    worlds.save(tmp_path, policy.model, policy.tokenizer)
    model, inputs = AutoModelForCausalLM.from_pretrained(tmp_path), prompts(policy)
    call: dict[str, Any] = {"custom_generate": FOLDER, "trust_remote_code": True, "reward": scalar_reward}
    output = model.generate(**inputs, **call, **SEARCH)
    assert torch.equal(output, generate(policy.model, inputs, policy, scalar_reward))
