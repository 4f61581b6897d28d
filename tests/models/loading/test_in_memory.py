"""Models that the caller has loaded: their tokenizers, adapters, types and names."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import worlds
from peft import LoraConfig, PromptTuningConfig, get_peft_model

from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import load_reward
from nabla_trl.search.loop import run_search

CONFIG = worlds.search_config(max_rounds=2, max_new_tokens=6)


def lora(model, task: str = "CAUSAL_LM", **options):
    targets = {"target_modules": ["q_proj"], **options}
    return get_peft_model(model, LoraConfig(r=2, init_lora_weights=False, task_type=task, **targets))


def test_a_model_with_its_tokenizer_searches_as_one_that_was_loaded(policy: Policy, scalar_reward) -> None:
    own = load_policy(worlds.tiny_model(), worlds.char_tokenizer())
    assert "(in memory, " in own.name and own.model.training is False
    problems = worlds.tiny_problems()
    traces = [run_search(problems, policy=one, reward=scalar_reward, config=CONFIG) for one in (policy, own)]
    assert [trace.response_ids for trace in traces[0]] == [trace.response_ids for trace in traces[1]]
    without_padding = load_policy(worlds.tiny_model(), worlds.char_tokenizer(pad=None))
    [trace] = run_search(problems[:1], policy=without_padding, reward=scalar_reward, config=CONFIG)
    assert trace.error is None and trace.response_ids


def test_the_name_depends_on_the_weights_alone() -> None:
    tokenizer = worlds.char_tokenizer()
    names = {load_policy(worlds.tiny_model(seed=seed), tokenizer).name for seed in (0, 0, 1)}
    assert len(names) == 2


def test_lora_beside_the_weights_computes_what_it_computes_merged(scalar_reward) -> None:
    tokenizer, problems = worlds.char_tokenizer(), worlds.tiny_problems()
    torch.manual_seed(0)
    beside = lora(worlds.tiny_model(), target_modules=["q_proj", "down_proj"])
    own = load_policy(beside, tokenizer)
    traces = run_search(problems, policy=own, reward=scalar_reward, config=CONFIG)
    base = run_search(
        problems, policy=load_policy(worlds.tiny_model(), tokenizer), reward=scalar_reward, config=CONFIG
    )
    merged = load_policy(beside.merge_and_unload(), tokenizer)
    expected = run_search(problems, policy=merged, reward=scalar_reward, config=CONFIG)
    assert [one.response_ids for one in traces] == [one.response_ids for one in expected]
    assert [one.response_ids for one in traces] != [one.response_ids for one in base]


def test_a_reward_model_with_lora_and_a_head_of_its_own(policy: Policy) -> None:
    tokenizer, problems = worlds.char_tokenizer(), worlds.tiny_problems()
    torch.manual_seed(0)
    beside = lora(worlds.tiny_model(kind="score", seed=1), "SEQ_CLS")
    reward = load_reward(beside, tokenizer, policy=policy)
    traces = run_search(problems, policy=policy, reward=reward, config=CONFIG)
    merged = load_reward(beside.merge_and_unload(), tokenizer, policy=policy)
    expected = run_search(problems, policy=policy, reward=merged, config=CONFIG)
    assert [one.reward for one in traces] == pytest.approx([one.reward for one in expected], abs=1e-4)


def test_models_in_memory_in_mappings(policy: Policy, logratio_reward) -> None:
    better = worlds.tiny_model(seed=2)
    reward = load_reward({"kind": "log_ratio", "model": better}, worlds.char_tokenizer(), policy=policy)
    assert reward.kind == "log-ratio" and reward.preferred_model is not None
    assert reward.preferred_model.model is better
    scorers = [worlds.tiny_model(kind="score", seed=seed) for seed in (1, 2)]
    ensemble = load_reward({"kind": "ensemble", "members": scorers}, worlds.char_tokenizer(), policy=policy)
    assert ensemble.kind == "ensemble" and len(ensemble.objectives) == 2


def test_half_precision_stays(policy: Policy) -> None:
    model = worlds.tiny_model(dtype=torch.bfloat16)
    own = load_policy(model, worlds.char_tokenizer(), dtype="bfloat16")
    assert (
        own.model.dtype
        == torch.bfloat16
        == load_policy(model, worlds.char_tokenizer(), dtype=torch.bfloat16).model.dtype
    )
    scorer = worlds.tiny_model(kind="score", seed=1)
    reward = load_reward(scorer, worlds.char_tokenizer(), policy=own)
    [trace] = run_search(worlds.tiny_problems()[:1], policy=own, reward=reward, config=CONFIG)
    assert trace.error is None


def test_what_cannot_be_used_is_refused_in_one_line(policy: Policy, tmp_path: Path) -> None:
    tokenizer, model = worlds.char_tokenizer(), worlds.tiny_model()
    causal = lambda: load_reward(worlds.tiny_model(seed=3), tokenizer, policy=policy)  # noqa: E731
    worlds.refused(lambda: load_policy(model), "no name by which its tokenizer could be found")
    worlds.refused(lambda: load_policy(model, 3), "expected a tokenizer")
    worlds.refused(
        lambda: load_policy(model, tokenizer, dtype="bfloat16"), "is in float32", "model.to(torch.bfloat16)"
    )
    worlds.refused(lambda: load_policy(model, tokenizer, device="meta"), "is on cpu")
    worlds.refused(lambda: load_policy(policy, tokenizer), "is loaded already, so tokenizer cannot be set")
    worlds.refused(lambda: load_policy(policy, adapter="x", dtype="float32"), "so dtype, adapter cannot be set")
    worlds.refused(lambda: load_policy(torch.nn.Linear(1, 1), tokenizer), "not Linear")
    worlds.refused(lambda: load_policy(7), "expected a model of transformers or PEFT, or the name of one, not int")
    worlds.refused(causal, "sequence classifier with one label", "log_ratio")
    two = worlds.tiny_model(kind="score", labels=2)
    worlds.refused(lambda: load_reward(two, tokenizer, policy=policy), "has 2 labels")
    virtual = get_peft_model(worlds.tiny_model(), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    worlds.refused(lambda: load_policy(virtual, tokenizer), "virtual tokens")
    head = lora(worlds.tiny_model(), target_modules=["lm_head"])
    worlds.refused(lambda: load_policy(head, tokenizer), "changes the head of the model", "merge_and_unload")
    table = lora(worlds.tiny_model(), target_modules=["embed_tokens"])
    worlds.refused(lambda: load_policy(table, tokenizer), "changes the embeddings of the model")


def test_a_policy_is_handed_on_and_an_adapter_leaves_the_model_as_it_was(policy: Policy, tmp_path: Path) -> None:
    assert load_policy(policy) is policy
    torch.manual_seed(0)
    lora(worlds.tiny_model()).save_pretrained(tmp_path)
    model = worlds.tiny_model()
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    trained = load_policy(model, worlds.char_tokenizer(), adapter=str(tmp_path))
    assert all(torch.equal(before[name], weight) for name, weight in model.named_parameters())
    assert trained.model is not model and trained.name.endswith(f"+{tmp_path}")
