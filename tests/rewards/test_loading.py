"""Rewards from adapters, implicit rewards and ensembles, against plain forwards and plain autograd."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel

from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import HARD_GRADIENT_POINT, GradientPoint
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import (
    build_ensemble_reward,
    build_log_ratio_reward,
    build_scalar_reward,
    check_reward,
    load_reward,
)
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import LOG_RATIO_PREFIX, RewardManifest, write_manifest
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search

DOUBLE = torch.float64
TEXTS = ("1+2=3", "3*4=12;12-5=7#7", "7", "12-3=9;4*5=20;9+20=29#29")
WEIGHTS = "adapter_model.safetensors"


def scorer(**options: Any) -> PreTrainedModel:
    return worlds.tiny_model(kind="score", **{"seed": 1, **options})


def adapter(folder: Path, base: str, task: str = "SEQ_CLS", *, seed: int = 0, trained: bool = True) -> PeftModel:
    """An adapter of the saved model `base`, in `folder`; a classifier's with a wide head."""
    auto = AutoModelForSequenceClassification if task == "SEQ_CLS" else AutoModelForCausalLM
    options = {"num_labels": 1} if task == "SEQ_CLS" else {}
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        lora = LoraConfig(r=2, target_modules=["q_proj", "down_proj"], task_type=task)
        wrapped = get_peft_model(auto.from_pretrained(base, **options), lora)
        for name, weight in wrapped.named_parameters():
            if trained and ("lora_B" in name or "modules_to_save" in name):
                weight.data.normal_(std=0.5)
    wrapped.save_pretrained(folder)
    return wrapped.eval()


def samples(policy: Policy) -> list[Sample]:
    """Finished and unfinished responses of mixed lengths."""
    pairs = list(zip(worlds.tiny_problems(), TEXTS, strict=True))
    return [worlds.sample(policy, problem, text, finished=done) for problem, text in pairs for done in (True, False)]


def score(reward: Reward, items: Sequence[Sample]) -> list[float]:
    return reward.score(items, reward.compute_prompt_caches(items, FlopCounter()), flop_counter=FlopCounter())[0]


def plain_logp(model: PreTrainedModel, item: Sample) -> float:
    logp = model(torch.tensor([item.prompt_ids + item.response_ids])).logits[0].detach().log_softmax(-1)
    begin = len(item.prompt_ids)
    return float(logp[begin - 1 : -1].gather(1, torch.tensor(item.response_ids)[:, None]).sum())


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A causal LM on disk that adapters are made for; its config has transformers' default of two labels."""
    return worlds.save(tmp_path_factory.mktemp("base"), worlds.tiny_model(seed=3, labels=2))


@pytest.fixture(scope="module")
def adapted(base: str, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, PeftModel]:
    """A classifier's adapter on disk, and its model."""
    folder = tmp_path_factory.mktemp("adapted")
    return str(folder), adapter(folder, base)


# --- scalar rewards from adapters -------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["causal", "score"])
def test_an_adapter_equals_its_merged_model(kind: str, policy: Policy, tmp_path: Path) -> None:
    """Also where the base is a classifier with a head of its own: the adapter's head is the one that counts."""
    wrapped = adapter(tmp_path / "adapter", worlds.save(tmp_path / "base", worlds.tiny_model(kind=kind, seed=3)))
    full = worlds.save(tmp_path / "full", deepcopy(wrapped).merge_and_unload())
    ours, merged = load_reward(str(tmp_path / "adapter"), policy=policy), load_reward(full, policy=policy)
    assert (ours.kind, ours.name, ours.preferred_model, ours.validated_limits) == (
        "scalar",
        str(tmp_path / "adapter"),
        None,
        None,
    )
    values = score(ours, samples(policy))
    assert values == pytest.approx(score(merged, samples(policy)), rel=1e-5, abs=1e-5)
    assert len({round(value, 3) for value in values}) == len(TEXTS)
    item = samples(policy)[0]
    embeds = wrapped.get_input_embeddings()(torch.tensor([item.prompt_ids + item.response_ids]))
    assert values[0] == pytest.approx(float(wrapped(inputs_embeds=embeds).logits.detach()), rel=1e-4)


def test_a_merged_adapter_keeps_the_dtype_that_was_asked_for(adapted: tuple[str, Any], policy: Policy) -> None:
    reward = load_reward(adapted[0], policy=policy, dtype="bfloat16")
    assert {weight.dtype for weight in reward.objectives[0].model.parameters()} == {torch.bfloat16}
    exact = score(load_reward(adapted[0], policy=policy), samples(policy))
    assert score(reward, samples(policy)) == pytest.approx(exact, rel=0.1, abs=0.3)


def test_the_tokenizer_beside_an_adapter_is_the_rewards_own(adapted: tuple[str, PeftModel], policy: Policy) -> None:
    folder, wrapped = adapted
    template = "{% for m in messages %}{{ '#' + m['content'] + ';' }}{% endfor %}"
    template += "{% if add_generation_prompt %}{{ '#' }}{% endif %}"
    plain = score(load_reward(folder, policy=policy), samples(policy))
    worlds.char_tokenizer(template=template).save_pretrained(folder)
    try:
        own = score(load_reward(folder, policy=policy), samples(policy))
    finally:
        for file in Path(folder).glob("*token*"):
            file.unlink()
        Path(folder, "chat_template.jinja").unlink()
    model = deepcopy(wrapped).merge_and_unload()
    expected = build_scalar_reward(policy, model, worlds.char_tokenizer(template=template), "memory")
    assert own == pytest.approx(score(expected, samples(policy)), rel=1e-4, abs=1e-4)
    assert abs(own[0] - plain[0]) > 1e-3


def edited(folder: Path, base: str, change: dict[str, Any] | None = None, **adapter_options: Any) -> str:
    """An adapter in `folder` whose note is changed (None: removed)."""
    adapter(folder, base, **adapter_options)
    note = folder / "adapter_config.json"
    note.write_text(json.dumps(json.loads(note.read_text()) | (change or {})))
    return str(folder)


def test_an_adapter_without_its_head_is_refused(base: str, policy: Policy, tmp_path: Path) -> None:
    folder = edited(tmp_path, base)
    weights = load_file(tmp_path / WEIGHTS)
    caches = {name: weight for name, weight in weights.items() if "score" not in name}
    assert len(caches) == len(weights) - 1
    save_file(caches, tmp_path / WEIGHTS, metadata={"format": "pt"})
    worlds.refused(lambda: load_reward(folder, policy=policy), folder, "score.weight", "would be random")


def test_a_causal_lms_adapter_is_no_scalar_reward(base: str, policy: Policy, tmp_path: Path) -> None:
    folder = edited(tmp_path, base, task="CAUSAL_LM")
    worlds.refused(lambda: load_reward(folder, policy=policy), "causal LM", f"use {LOG_RATIO_PREFIX}{folder}")


def test_an_inert_adapter_is_refused_whatever_its_head(base: str, policy: Policy, tmp_path: Path) -> None:
    folder = edited(tmp_path, base, trained=False)
    worlds.refused(lambda: load_reward(folder, policy=policy), folder, "inert")


@pytest.mark.parametrize("made_for", [{"width": 64}, {"layers": 1}, {"layers": 3}], ids=str)
def test_an_adapter_of_another_shape_is_refused(made_for: dict, base: str, policy: Policy, tmp_path: Path) -> None:
    other = worlds.save(tmp_path / "other", worlds.tiny_model(**made_for))
    folder = edited(tmp_path / "adapter", other, {"base_model_name_or_path": base})
    worlds.refused(lambda: load_reward(folder, policy=policy), f"adapter {folder}", base)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"base_model_name_or_path": None}, ["does not name the model"]),
        ({"base_model_name_or_path": "/no/such/base"}, ["cannot load a model", "/no/such/base"]),
        ({"task_type": "TOKEN_CLS"}, ["TOKEN_CLS", "needs SEQ_CLS"]),
        ({"task_type": None}, ["None", "needs SEQ_CLS"]),
    ],
)
def test_notes_that_do_not_fit(change: dict, words: list[str], base: str, policy: Policy, tmp_path: Path) -> None:
    folder = edited(tmp_path, base, change)
    worlds.refused(lambda: load_reward(folder, policy=policy), *words)


@pytest.mark.parametrize("content", ["{", "[]", ""])
def test_a_broken_note_is_named(content: str, base: str, policy: Policy, tmp_path: Path) -> None:
    folder = edited(tmp_path, base)
    (tmp_path / "adapter_config.json").write_text(content)
    worlds.refused(lambda: load_reward(folder, policy=policy), "adapter_config.json", "JSON")


@pytest.mark.parametrize("content", [b"", None], ids=["no bytes", "no weights"])
def test_an_empty_adapter_file_is_refused(content: bytes | None, base: str, policy: Policy, tmp_path: Path) -> None:
    folder, file = edited(tmp_path, base), tmp_path / WEIGHTS
    if content is None:
        save_file({}, file, metadata={"format": "pt"})
    else:
        file.write_bytes(content)
    worlds.refused(lambda: load_reward(folder, policy=policy), folder)


def test_an_adapter_with_two_labels_is_refused(base: str, policy: Policy, tmp_path: Path) -> None:
    folder = edited(tmp_path, base)
    weights = load_file(tmp_path / WEIGHTS)
    [head] = [name for name in weights if "score" in name]
    save_file(weights | {head: weights[head].repeat(2, 1)}, tmp_path / WEIGHTS, metadata={"format": "pt"})
    worlds.refused(lambda: load_reward(folder, policy=policy), f"adapter {folder}", "size mismatch")


@pytest.mark.parametrize("bad", [math.nan, -math.inf])
def test_heads_that_are_not_finite_are_refused(bad: float, base: str, policy: Policy, tmp_path: Path) -> None:
    model = scorer()
    with torch.no_grad():
        model.score.weight[0, 0] = bad
    full = worlds.save(tmp_path / "full", model)
    worlds.refused(lambda: load_reward(full, policy=policy), full, "score head", "not finite")
    folder = edited(tmp_path / "adapter", base)
    weights = load_file(tmp_path / "adapter" / WEIGHTS)
    [head] = [name for name in weights if "score" in name]
    weights[head][0, 0] = bad
    save_file(weights, tmp_path / "adapter" / WEIGHTS, metadata={"format": "pt"})
    worlds.refused(lambda: load_reward(folder, policy=policy), folder, "score head", "not finite")


# --- likelihoods of adapters, and implicit rewards --------------------------------------------------------


def test_log_ratios_of_adapters(base: str, policy: Policy, tmp_path: Path) -> None:
    better, reference = (adapter(tmp_path / name, base, "CAUSAL_LM", seed=seed) for seed, name in enumerate("ab"))
    names = [str(tmp_path / "a"), str(tmp_path / "b")]
    for spec, against in (
        (LOG_RATIO_PREFIX + names[0], policy.model),
        (LOG_RATIO_PREFIX + ",".join(names), reference),
    ):
        reward = load_reward(spec, policy=policy)
        expected = [plain_logp(better, item) - plain_logp(against, item) for item in samples(policy)]
        assert score(reward, samples(policy)) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        assert reward.kind == "log-ratio" and names[0] in reward.preferred_model.name
    assert plain_logp(better, samples(policy)[0]) != pytest.approx(plain_logp(reference, samples(policy)[0]), abs=0.1)


def test_a_classifiers_adapter_gives_no_likelihood(adapted: tuple[str, Any], policy: Policy) -> None:
    worlds.refused(lambda: load_reward(LOG_RATIO_PREFIX + adapted[0], policy=policy), adapted[0], "no likelihoods")


def implicit(folder: Path, reference: str, scale: float = 0.25) -> str:
    write_manifest(folder, RewardManifest("log_ratio", scale=scale, reference_model=reference))
    return str(folder)


@pytest.mark.parametrize("form", ["adapter", "full"])
def test_an_implicit_reward_is_beta_times_a_difference(form: str, base: str, policy: Policy, tmp_path: Path) -> None:
    tuned = adapter(tmp_path, base, "CAUSAL_LM") if form == "adapter" else worlds.tiny_model(seed=7)
    if form == "full":
        worlds.save(tmp_path, tuned)
    reward = load_reward(implicit(tmp_path, base), policy=policy)
    reference = worlds.tiny_model(seed=3)
    expected = [0.25 * (plain_logp(tuned, item) - plain_logp(reference, item)) for item in samples(policy)]
    assert score(reward, samples(policy)) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    assert (reward.kind, reward.name) == ("log-ratio", str(tmp_path))
    assert [term.weight for term in reward.objectives] == [0.25, -0.25]
    assert reward.preferred_model.model is reward.objectives[0].model
    assert torch.equal(reward.objectives[1].model.lm_head.weight, reference.lm_head.weight)


def test_a_reference_of_the_policys_name_is_the_policy(base: str, tmp_path: Path) -> None:
    worlds.save(tmp_path / "tuned", worlds.tiny_model(seed=7))
    policy = worlds.tiny_policy(seed=3, name=base)
    same = base + "/../" + Path(base).name
    for reference in (base, same):
        reward = load_reward(implicit(tmp_path / "tuned", reference), policy=policy)
        assert reward.objectives[1].model is policy.model
        assert reward.objectives[0].model is not policy.model
    other = worlds.tiny_policy(seed=3, name=f"{base}+adapter")
    assert load_reward(str(tmp_path / "tuned"), policy=other).objectives[1].model is not other.model


def test_a_smaller_pair_guides_a_larger_policy(tmp_path: Path) -> None:
    """r = β (log p_tuned − log p_untuned) of models of half the policy's width, over shuffled ids."""
    policy = worlds.tiny_policy(width=64)
    tokenizer, new_ids = worlds.permuted_tokenizer(worlds.char_tokenizer())
    ids = {"eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}
    tuned, untuned = (worlds.tiny_model(seed=seed, width=32, **ids) for seed in (5, 6))
    for name, model in (("tuned", tuned), ("untuned", untuned)):
        worlds.save(tmp_path / name, model, tokenizer)
    reward = load_reward(implicit(tmp_path / "tuned", str(tmp_path / "untuned"), 2.0), policy=policy)
    moved = [
        replace(i, prompt_ids=new_ids[i.prompt_ids].tolist(), response_ids=new_ids[i.response_ids].tolist())
        for i in samples(policy)
    ]
    expected = [2.0 * (plain_logp(tuned, item) - plain_logp(untuned, item)) for item in moved]
    assert score(reward, samples(policy)) == pytest.approx(expected, rel=1e-4, abs=1e-4)
    config = SearchConfig(max_rounds=4, max_new_tokens=8, batch_size=4)
    traces = run_search(worlds.tiny_problems(), policy=policy, reward=reward, config=config, seed=0)
    assert all(trace.error is None and trace.reward >= trace.reward_initial for trace in traces)
    assert any(revision.accepted for trace in traces for revision in trace.revisions)


def test_the_gradient_of_an_implicit_reward_is_beta_times_a_log_ratios() -> None:
    policy = worlds.tiny_policy(dtype=DOUBLE)
    better = worlds.tiny_policy(seed=2, dtype=DOUBLE)
    plain, scaled = (build_log_ratio_reward(policy, better, policy, "r", scale=scale) for scale in (1.0, 0.25))
    items = samples(policy)
    [one, quarter] = (
        r.compute_backward_gradient(
            items, r.compute_prompt_caches(items, FlopCounter()), None, flop_counter=FlopCounter()
        )
        for r in (plain, scaled)
    )
    for a, b in zip(one, quarter, strict=True):
        torch.testing.assert_close(0.25 * a, b, rtol=1e-12, atol=1e-12)


# --- ensembles --------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def trio() -> tuple[Policy, list[Reward]]:
    """A policy and three classifiers, in float64."""
    policy = worlds.tiny_policy(dtype=DOUBLE)
    return policy, [worlds.tiny_scalar(policy, seed=seed, name=f"s{seed}") for seed in (1, 2, 3)]


def bound(values: Tensor, uncertainty_penalty: float) -> Tensor:
    """mean − uncertainty_penalty · (population) std over the first axis."""
    return values.mean(0) - uncertainty_penalty * (values - values.mean(0)).square().mean(0).sqrt()


@pytest.mark.parametrize("uncertainty_penalty", [0.0, 1.0, 2.5])
def test_an_ensemble_scores_its_lower_bound_and_a_batch_like_singles(uncertainty_penalty: float, trio: Any) -> None:
    policy, members = trio
    reward = build_ensemble_reward(members, uncertainty_penalty, "three")
    items = samples(policy)
    expected = bound(torch.tensor([score(one, items) for one in members], dtype=DOUBLE), uncertainty_penalty)
    assert score(reward, items) == pytest.approx(expected.tolist(), rel=1e-9)
    assert [score(reward, [item])[0] for item in items] == pytest.approx(expected.tolist(), rel=1e-9)
    assert (reward.kind, reward.uncertainty_penalty, reward.preferred_model) == ("ensemble", uncertainty_penalty, None)
    check_reward(reward, policy)


def lower_bound_at(members: Sequence[Reward], item: Sample, rows: Tensor, uncertainty_penalty: float) -> Tensor:
    """The bound at token weights [T, V], by each classifier's own forward."""
    values = []
    for one in members:
        model = one.objectives[0].model
        table = model.get_input_embeddings().weight
        parts = (table[item.prompt_ids], rows @ table)  # finished responses: nothing closes the turn after them
        values.append(model(inputs_embeds=torch.cat(parts)[None]).logits.squeeze())
    return bound(torch.stack(values), uncertainty_penalty)


@pytest.mark.parametrize(("alpha", "exact"), [(0.0, 1e-9), (0.5, 1e-5)], ids=["hard", "mixture"])
@pytest.mark.parametrize("uncertainty_penalty", [0.0, 1.0, 2.5])
def test_the_gradient_is_that_of_the_lower_bound(
    uncertainty_penalty: float, alpha: float, exact: float, trio: Any
) -> None:
    policy, members = trio
    reward = build_ensemble_reward(members, uncertainty_penalty, "three")
    items = [worlds.known(policy, item) for item in samples(policy)[::2]]
    point = GradientPoint((alpha,)) if alpha else HARD_GRADIENT_POINT
    gradients = reward.compute_backward_gradient(
        items, reward.compute_prompt_caches(items, FlopCounter()), None, flop_counter=FlopCounter(), gradient_at=point
    )
    for item, ours in zip(items, gradients, strict=True):
        rows = worlds.mixed(item, alpha, ours.shape[1]).requires_grad_(True)
        theirs = torch.autograd.grad(lower_bound_at(members, item, rows, uncertainty_penalty), rows)[0]
        readable = reward.in_vocabulary
        scale = float(theirs.abs().max())
        assert scale > 1e-3 and float((ours - theirs)[:, readable].abs().max()) <= exact * scale
        alone = reward.compute_backward_gradient(
            [item],
            reward.compute_prompt_caches([item], FlopCounter()),
            None,
            flop_counter=FlopCounter(),
            gradient_at=point,
        )[0]
        torch.testing.assert_close(alone, ours, rtol=1e-7, atol=1e-9)


def test_the_gradient_equals_central_differences(trio: Any) -> None:
    policy, members = trio
    reward = build_ensemble_reward(members, 1.5, "three")
    item = worlds.known(policy, samples(policy)[2])
    [ours] = reward.compute_backward_gradient(
        [item],
        reward.compute_prompt_caches([item], FlopCounter()),
        None,
        flop_counter=FlopCounter(),
        gradient_at=GradientPoint((0.5,)),
    )
    rows, step = worlds.mixed(item, 0.5, ours.shape[1]), 1e-4
    for place in [(0, 3), (2, 11), (5, 0), (len(item.response_ids) - 1, 7)]:
        with torch.no_grad():
            shift = torch.zeros_like(rows)
            shift[place] = step
            ends = [float(lower_bound_at(members, item, rows + by * shift, 1.5)) for by in (1, -1)]
        assert (ends[0] - ends[1]) / (2 * step) == pytest.approx(
            float(ours[place]), abs=1e-5 * float(ours.abs().max())
        )


def plain_levels(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """[T + 1] the head's output after none, one, … of the response's tokens, by one plain forward."""
    states = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 :]
    return model.score(states).squeeze(-1).detach()


@pytest.mark.parametrize("uncertainty_penalty", [0.0, 1.0, 2.5])
def test_the_direct_part_of_an_ensemble_is_what_each_token_added_to_its_bound(
    uncertainty_penalty: float, trio: Any
) -> None:
    """The difference of the members' combined scores, which is not that of each, combined."""
    policy, members = trio
    reward = build_ensemble_reward(members, uncertainty_penalty, "three")
    items = samples(policy)
    prompt_caches = reward.compute_prompt_caches(items, FlopCounter())
    values, caches = reward.score(items, prompt_caches, flop_counter=FlopCounter(), return_caches=True)
    tables = [torch.arange(len(reward.in_vocabulary)).expand(len(item.response_ids), -1) for item in items]
    meter = FlopCounter()
    gradients = reward.compute_direct_gradient(items, caches, tables, flop_counter=meter)
    assert meter.get_total_cost().flops == 0
    for item, value, slope in zip(items, values, gradients, strict=True):
        levels = bound(
            torch.stack(
                [plain_levels(one.objectives[0].model, item.prompt_ids, item.response_ids) for one in members]
            ),
            uncertainty_penalty,
        )
        expected = torch.zeros(slope.shape, dtype=DOUBLE)
        for at in range(1, len(item.response_ids)):
            expected[at, item.response_ids[at]] = levels[at + 1] - levels[at]
        torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-6)
        if item.response_ids[-1] == policy.tokenizer.eos_token_id:
            assert float(levels[-1]) == pytest.approx(value, rel=1e-9)


def test_members_that_read_the_stop_token_and_ones_that_do_not(trio: Any) -> None:
    """To a member whose template closes the turn otherwise, the policy's stop token adds nothing."""
    policy, members = trio
    template = worlds.TEMPLATE.replace(worlds.END, ";")
    other = worlds.tiny_scalar(policy, tokenizer=worlds.char_tokenizer(template=template), seed=5, name="other")
    reward, items = build_ensemble_reward([*members, other], 1.0, "four"), samples(policy)
    for item in items:
        prompt_caches = reward.compute_prompt_caches([item], FlopCounter())
        _, caches = reward.score([item], prompt_caches, flop_counter=FlopCounter(), return_caches=True)
        table = torch.tensor(item.response_ids)[:, None]
        [slope] = reward.compute_direct_gradient([item], caches, [table], flop_counter=FlopCounter())
        stops = item.response_ids[-1] == policy.tokenizer.eos_token_id
        body = item.response_ids[:-1] if stops else item.response_ids
        prompt = other.objectives[0].encode(item).prompt_ids
        last = plain_levels(other.objectives[0].model, prompt, body)
        rows = [plain_levels(one.objectives[0].model, item.prompt_ids, item.response_ids) for one in members]
        rows.append(torch.cat((last, last[-1:])) if stops else last)
        expected = bound(torch.stack(rows), 1.0).diff()
        expected[0] = 0
        torch.testing.assert_close(slope.squeeze(1).double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("point", ["direct", "hard", "mixture:0.5", "direct+hard", "direct+mixture:0.5"])
def test_a_search_raises_the_lower_bound(point: str, trio: Any) -> None:
    policy, members = trio
    reward = build_ensemble_reward(members, 1.0, "three")
    config = SearchConfig(solver={"gradient_at": point}, max_rounds=4, max_new_tokens=8, batch_size=4)
    problems = worlds.tiny_problems()
    traces = run_search(problems, policy=policy, reward=reward, config=config, seed=0)
    assert any(revision.accepted for trace in traces for revision in trace.revisions)
    for trace, problem in zip(traces, problems, strict=True):
        assert trace.error is None and trace.reward >= trace.reward_initial
        [again] = score(reward, [Sample(problem, trace.prompt_ids, trace.response_ids)])
        assert trace.reward == pytest.approx(again, rel=1e-6)


def test_loaded_ensembles_by_spec_and_by_folder(adapted: tuple[str, Any], policy: Policy, tmp_path: Path) -> None:
    """Members may be full models, adapters, or folders with a card of their own."""
    first = worlds.save(tmp_path / "a", scorer())
    worlds.save(tmp_path / "b", scorer(seed=2))
    write_manifest(tmp_path / "b", RewardManifest("scalar"))
    names = [first, str(tmp_path / "b"), adapted[0]]
    parts = [score(load_reward(name, policy=policy), samples(policy)) for name in names]
    card = RewardManifest("ensemble", members=["a", "b", adapted[0]], uncertainty_penalty=0.5)
    write_manifest(tmp_path, card)
    members = [names[0], {"kind": "scalar", "model": names[1]}, names[2]]
    mapping = json.dumps({"kind": "ensemble", "members": members, "uncertainty_penalty": 1.5})
    specs = {
        mapping: 1.5,
        f"ensemble:{','.join(names)}": 1.0,
        f"ensemble@2:{', '.join(names)}": 2.0,
        str(tmp_path): 0.5,
    }
    for spec, uncertainty_penalty in specs.items():
        reward = load_reward(spec, policy=policy, batch_size=3)
        expected = bound(torch.tensor(parts, dtype=DOUBLE), uncertainty_penalty).tolist()
        assert score(reward, samples(policy)) == pytest.approx(expected, rel=1e-5, abs=1e-5)
        assert (reward.kind, reward.name, reward.batch_size) == ("ensemble", spec, 3)
        assert reward.gradient_at == "mixture:0.5"
    write_manifest(tmp_path, replace(card, gradient_at="direct"))
    assert load_reward(str(tmp_path), policy=policy).gradient_at == "direct"


def test_the_point_of_a_reward_is_that_of_its_folder_or_of_its_kind(policy: Policy, tmp_path: Path) -> None:
    classifier, causal = worlds.save(tmp_path / "a", scorer()), worlds.save(tmp_path / "b", worlds.tiny_model(seed=2))
    reference = worlds.save(tmp_path / "c", worlds.tiny_model(seed=3))
    assert load_reward(classifier, policy=policy).gradient_at == "mixture:0.5"
    assert load_reward(LOG_RATIO_PREFIX + causal, policy=policy).gradient_at == "direct"
    cards = {
        classifier: RewardManifest("scalar", gradient_at="direct+mixture:0.5"),
        causal: RewardManifest("log_ratio", reference_model=reference, gradient_at="hard"),
    }
    own = {classifier: "mixture:0.5", causal: "direct"}
    for folder, card in cards.items():
        write_manifest(folder, card)
        assert load_reward(folder, policy=policy).gradient_at == card.gradient_at
        write_manifest(folder, replace(card, gradient_at=None))  # not audited
        assert load_reward(folder, policy=policy).gradient_at == own[folder]


def test_a_reward_in_memory_has_the_audit_of_its_folder_until_it_is_trained(policy: Policy, tmp_path: Path) -> None:
    folder = worlds.save(tmp_path / "a", scorer())
    write_manifest(folder, RewardManifest("scalar", gradient_at="direct"))
    model = AutoModelForSequenceClassification.from_pretrained(folder)
    reward = load_reward(model, policy.tokenizer, policy=policy)
    assert reward.gradient_at == "direct" and reward.gradient_at == load_reward(folder, policy=policy).gradient_at
    with torch.no_grad():
        model.score.weight += 0.1
    assert load_reward(model, policy.tokenizer, policy=policy).gradient_at == "mixture:0.5"


def test_a_member_that_cannot_be_trusted_is_named(base: str, policy: Policy, tmp_path: Path) -> None:
    good, bad = worlds.save(tmp_path / "good", scorer()), scorer(seed=2)
    with torch.no_grad():
        bad.base_model.layers[0].mlp.down_proj.weight[0, 0] = math.nan
    name = worlds.save(tmp_path / "bad", bad)
    worlds.refused(lambda: load_reward(f"ensemble:{good},{name}", policy=policy), f"{name} gives nan")
    worlds.refused(lambda: load_reward(f"ensemble:{good},{base}", policy=policy), base, "causal LM")


def test_ensembles_in_memory_that_are_refused(trio: Any) -> None:
    policy, members = trio
    ratio = worlds.tiny_logratio(policy)
    worlds.refused(lambda: build_ensemble_reward(members[:1], 1.0, "few"), "few", "at least two")
    worlds.refused(lambda: build_ensemble_reward([members[0], members[0]], 1.0, "twin"), "twin", "twice")
    worlds.refused(lambda: build_ensemble_reward([members[0], ratio], 1.0, "mixed"), "mixed", "ratio", "scalar")
    for penalty in (-0.1, math.nan, math.inf):
        worlds.refused(lambda k=penalty: build_ensemble_reward(members, k, "bold"), "bold", "uncertainty_penalty")
