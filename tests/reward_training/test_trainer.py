"""Scalar and implicit rewards: what is loaded from the folder is what was trained, for every way of tuning."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Sequence
from copy import deepcopy
from dataclasses import fields, replace
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel, load_peft_weights
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, PreTrainedModel
from trl import DPOConfig, RewardConfig

from nabla_trl.gradient.objectives import Sample
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training import implicit, trainer
from nabla_trl.reward_training.data import LabeledResponse, add_draw_info, choose_pairs
from nabla_trl.reward_training.implicit import make_dpo_config, train_implicit_reward
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.reward_training.trainer import RewardOptions, add_top_layers, load_initial_model, train_reward
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import RewardManifest, write_manifest
from nabla_trl.tasks import digit_chains
from nabla_trl.training.peft import LoraArguments

END = worlds.TOKENS.index(worlds.END)
LORA = LoraArguments(lora_r=4, lora_alpha=8)
SMALL = {"width": 64}  # 4-bit weights come in blocks of 64


pytestmark = pytest.mark.usefixtures("little_to_collect")


def responses(policy: Policy, count: int = 5) -> list[LabeledResponse]:
    """To each of some chains a right response, a wrong one, and one that was cut."""
    result = []
    for problem in digit_chains.make_digit_chain_problems("train", count):
        gold = digit_chains.make_gold_solution(problem.question)
        wrong = gold[:-1] + str((int(gold[-1]) + random.Random(problem.id).randint(1, 9)) % 10)
        result.append(LabeledResponse(worlds.sample(policy, problem, gold), True))
        result.append(LabeledResponse(worlds.sample(policy, problem, wrong), False))
        result.append(LabeledResponse(worlds.sample(policy, problem, gold[:9], finished=False), False))
    known = add_draw_info(policy, [item.sample for item in result], 5, 64)
    return [replace(item, sample=sample) for item, sample in zip(result, known, strict=True)]


@pytest.fixture(scope="module")
def policies(bases: dict[str, str]) -> dict[str, Policy]:
    return {name: load_policy(base) for name, base in bases.items()}


@pytest.fixture(scope="module")
def data(policies: dict[str, Policy]) -> dict[str, list[LabeledResponse]]:
    return {name: responses(policy) for name, policy in policies.items()}


@pytest.fixture
def trained(monkeypatch: pytest.MonkeyPatch) -> list[Any]:
    """The models that training ended with, in their order."""
    models: list[Any] = []
    write = trainer.save_model_atomically

    def spy(trainer: Any, output: Path) -> None:
        models.append(trainer.model.eval())
        write(trainer, output)

    monkeypatch.setattr(trainer, "save_model_atomically", spy)
    monkeypatch.setattr(implicit, "save_model_atomically", spy)
    return models


def settings(folder: Path, **options: Any) -> RewardConfig:
    return RewardConfig(str(folder / "trainer"), **worlds.TRAINER | {"max_steps": 3} | options)


@pytest.fixture
def train(
    policies: dict[str, Policy], data: dict[str, list[LabeledResponse]], bases: dict[str, str], tmp_path: Path
) -> Callable[..., Any]:
    """`train_reward` with small defaults; returns what it did."""

    def run(
        output: Path,
        *,
        architecture: str = "llama",
        start: str | None = None,
        steps: bool = True,
        grow: bool = True,
        config: dict[str, Any] | None = None,
        **options: Any,
    ) -> Any:
        policy = policies[architecture]
        return train_reward(
            bases[architecture] if start is None else start,
            data[architecture],
            output,
            policy=policy,
            options=RewardOptions(**options),
            lora=LORA,
            config=settings(tmp_path, **config or {}),
            dtype="float32",
            token_labels=TokenLabeler(policy) if steps else None,
            min_p=0.0,
            add_layers=grow,
        )

    return run


@torch.no_grad()
def plain_scores(model: Any, samples: Sequence[Sample]) -> list[float]:
    """The classifier's own pooled logits of whole turns."""
    closed = [item.response_ids if item.response_ids[-1] == END else [*item.response_ids, END] for item in samples]
    rows = [torch.tensor([item.prompt_ids + ids]) for item, ids in zip(samples, closed, strict=True)]
    return [float(model(input_ids=row).logits) for row in rows]


def scores(reward: Reward, samples: Sequence[Sample]) -> list[float]:
    return reward.score(samples, reward.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter())[0]


def samples_of(labeled: Sequence[LabeledResponse]) -> list[Sample]:
    return [item.sample for item in labeled]


def spread(values: Sequence[float]) -> float:
    return max(values) - min(values)


# --- scalar rewards ---------------------------------------------------------------------------------------

RUNS = {
    "llama-full-tokens": {"tuning": "full"},
    "llama-lora-tokens": {"tuning": "lora"},
    "llama-full-pairs": {"tuning": "full", "loss_type": "pairs", "margin": 0.5},
    "llama-lora-pairs": {"tuning": "lora", "loss_type": "pairs"},
    "llama-lora-outcome": {"tuning": "lora", "steps": False},
    "llama-full-matching": {"tuning": "full", "gradient_matching": 0.1},
    "llama-lora-matching": {"tuning": "lora", "gradient_matching": 0.1, "steps": False},
    "llama-full-grown": {"tuning": "full", "grow_layers": 2},
    "qwen2-lora-tokens": {"tuning": "lora"},
    "qwen3-full-tokens": {"tuning": "full"},
    "gpt2-lora-tokens": {"tuning": "lora"},
}


@pytest.mark.parametrize("name", RUNS)
def test_the_folder_scores_as_the_model_that_was_trained(
    name: str, train: Callable[..., Any], trained: list[Any], data: Any, policies: Any, tmp_path: Path
) -> None:
    architecture = name.split("-")[0]
    stats = train(tmp_path / "reward", architecture=architecture, **RUNS[name])
    assert (stats.steps, stats.tokens > 0, stats.flops > 0) == (3, True, True)
    reward = load_reward(str(tmp_path / "reward"), policy=policies[architecture])
    assert reward.kind == "scalar" and (tmp_path / "reward" / "tokenizer_config.json").exists()
    items = samples_of(data[architecture])
    expected = plain_scores(trained[0], items)
    assert scores(reward, items) == pytest.approx(expected, rel=1e-4, abs=1e-4) and spread(expected) > 0.05
    assert not (tmp_path / "reward.tmp").exists()


@pytest.mark.parametrize("tuning", ["full", "lora"])
def test_a_second_round_goes_on_where_the_first_ended(
    tuning: str, train: Callable[..., Any], trained: list[Any], data: Any, tmp_path: Path
) -> None:
    """Steps too small to move anything leave the first round's scores; a fresh start has another head."""
    options = {"tuning": tuning, "grow_layers": 1 if tuning == "full" else 0}
    tiny = {"learning_rate": 1e-7, "seed": 1}
    train(tmp_path / "first", **options)
    train(tmp_path / "second", start=str(tmp_path / "first"), grow=False, config=tiny, **options)
    train(tmp_path / "fresh", config=tiny, **options)
    first, second, fresh = (plain_scores(model, samples_of(data["llama"])) for model in trained)
    assert second == pytest.approx(first, abs=1e-3) and second != first
    assert max(abs(a - b) for a, b in zip(first, fresh, strict=True)) > 0.1
    if tuning == "full":
        assert [model.config.num_hidden_layers for model in trained] == [3, 3, 3]


def test_rounds_of_an_adapter_stay_adapters_of_the_base(
    train: Callable[..., Any], bases: dict[str, str], tmp_path: Path
) -> None:
    train(tmp_path / "first", tuning="lora")
    train(tmp_path / "second", start=str(tmp_path / "first"), tuning="lora", grow=False)
    for name in ("first", "second"):
        note = json.loads((tmp_path / name / "adapter_config.json").read_text())
        assert (note["base_model_name_or_path"], note["task_type"]) == (bases["llama"], "SEQ_CLS")
    before, after = (load_peft_weights(str(tmp_path / name), device="cpu") for name in ("first", "second"))
    assert before.keys() == after.keys() and any("score" in key for key in after)
    assert all(not torch.equal(before[key], after[key]) for key in after if "lora_B" in key or "score" in key)


def test_the_seed_decides_what_a_reward_becomes(
    train: Callable[..., Any], trained: list[Any], data: Any, tmp_path: Path
) -> None:
    for number, seed in enumerate((0, 0, 1)):
        train(tmp_path / str(number), tuning="full", config={"seed": seed})
    first, again, other = (plain_scores(model, samples_of(data["llama"])) for model in trained)
    assert first == again
    assert max(abs(a - b) for a, b in zip(first, other, strict=True)) > 0.1


@pytest.mark.parametrize(("tuning", "matching"), [("full", 0.0), ("lora", 0.5), ("qlora", 0.5)])
def test_gradient_checkpointing_changes_nothing_but_memory(
    tuning: str, matching: float, train: Callable[..., Any], trained: list[Any], data: Any, tmp_path: Path
) -> None:
    """TRL's default; gradient matching differentiates through it twice."""
    for number, saved in enumerate((False, True)):
        options = {"tuning": tuning, "gradient_matching": matching, "steps": False}
        train(tmp_path / str(number), config={"gradient_checkpointing": saved}, **options)
    plain, saved_ = (plain_scores(model, samples_of(data["llama"])) for model in trained)
    assert saved_ == pytest.approx(plain, rel=1e-3, abs=1e-3) and spread(plain) > 0.05


def test_no_pair_is_dropped_for_its_length(train: Callable[..., Any], tmp_path: Path) -> None:
    """Rows of tokens are all kept, however long they are."""
    short = {"max_length": 50}  # some of the responses have more tokens
    rows = [
        train(tmp_path / "reward", tuning="full", loss_type=loss_type, config=short).rows
        for loss_type in ("tokens", "pairs")
    ]
    assert rows == [15, 10]


def test_costs_grow_with_steps_and_with_what_is_trained(train: Callable[..., Any], tmp_path: Path) -> None:
    item = train(tmp_path / "a", tuning="lora", config={"max_steps": 1})
    three = train(tmp_path / "b", tuning="lora")
    assert (three.tokens, three.flops) == (3 * item.tokens, pytest.approx(3 * item.flops))
    pairs = train(tmp_path / "c", tuning="lora", loss_type="pairs")
    assert (pairs.tokens, pairs.flops) == (2 * three.tokens, pytest.approx(2 * three.flops))
    assert (three.rows, pairs.rows) == (15, 10)  # per problem three responses, and two pairs with the right one


@pytest.mark.parametrize("loss_type", ["tokens", "pairs"])
def test_a_training_that_fails_writes_nothing_over_what_was_there(
    loss_type: str, train: Callable[..., Any], tmp_path: Path
) -> None:
    (tmp_path / "reward").mkdir()
    (tmp_path / "reward" / "earlier").write_text("kept")
    common = {"tuning": "full", "loss_type": loss_type}
    wild = {"learning_rate": 1e38}
    worlds.refused(lambda: train(tmp_path / "reward", config=wild, **common), "nan at step 2", "lower learning_rate")
    idle = {"learning_rate": 0.0}
    worlds.refused(lambda: train(tmp_path / "reward", config=idle, **common), "3 steps of training did not change")
    assert [file.name for file in (tmp_path / "reward").iterdir()] == ["earlier"]


def test_a_base_that_cannot_be_loaded_is_refused(train: Callable[..., Any], tmp_path: Path) -> None:
    worlds.refused(lambda: train(tmp_path / "reward", start="nowhere/at-all"), "nowhere/at-all", "taken for a hub id")
    two = worlds.save(tmp_path / "two", worlds.tiny_model(kind="score", labels=2, **SMALL))
    worlds.refused(lambda: train(tmp_path / "reward", start=two), two)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"kind": "vector"}, ["kind must be one of scalar, head, implicit", "'vector'"]),
        ({"loss_type": "words"}, ["loss_type must be one of tokens, pairs"]),
        ({"tuning": "some"}, ["tuning must be one of full, lora, qlora"]),
        ({"relaxed_fraction": 1.5}, ["relaxed_fraction must be in [0, 1]"]),
        ({"relaxed_fraction": float("nan")}, ["relaxed_fraction must be in [0, 1]"]),
        ({"gradient_matching": float("inf")}, ["gradient_matching must be a number of at least 0"]),
        ({"margin": -1.0}, ["margin must be a number of at least 0"]),
        ({"target_samples": 0}, ["target_samples must be at least 1"]),
        ({"pairs_per_problem": 0}, ["must be at least 1"]),
        ({"num_members": 0}, ["must be at least 1"]),
        ({"grow_layers": -1, "tuning": "full"}, ["grow_layers must not be negative"]),
        ({"uncertainty_penalty": -1.0}, ["uncertainty_penalty must be a number of at least 0"]),
        ({"implicit_beta": 0.0}, ["implicit_beta must be a positive number"]),
        ({"implicit_reference": "none"}, ["implicit_reference none needs implicit_loss outcome"]),
        ({"kind": "implicit", "num_members": 2}, ["an implicit reward is one adapter"]),
        ({"kind": "implicit", "tuning": "full"}, ["an implicit reward is one adapter"]),
        ({"loss_type": "pairs", "gradient_matching": 0.1}, ["gradient_matching belongs to the loss_type tokens"]),
        ({"grow_layers": 1, "tuning": "lora"}, ["grow_layers needs tuning full"]),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], words: list[str]) -> None:
    worlds.refused(lambda: RewardOptions(**options), *words)


# --- growing ----------------------------------------------------------------------------------------------

IDS = torch.tensor([[3, 10, 4, 13, 7, 14, 8, END]])


@pytest.mark.parametrize("layers", [1, 3])
@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_new_layers_change_no_score_until_they_are_trained(architecture: str, layers: int) -> None:
    model = worlds.tiny_model(architecture, kind="score", seed=1)
    deeper = add_top_layers(model, layers).eval()
    assert model.config.num_hidden_layers == 2 and deeper.config.num_hidden_layers == 2 + layers
    with torch.no_grad():
        torch.testing.assert_close(deeper(IDS).logits, model(IDS).logits)
    deeper(IDS).logits.sum().backward()
    new = [weight for name, weight in deeper.named_parameters() if ".layers.2." in name and "o_proj.weight" in name]
    assert new and all(bool(weight.grad.any()) for weight in new), "but they can be"
    with torch.no_grad():
        new[0].normal_()
        assert not torch.allclose(deeper(IDS).logits, model(IDS).logits, atol=1e-3)


def test_new_layers_change_no_score_where_output_projections_have_biases() -> None:
    plain = worlds.tiny_model(kind="score", seed=1)
    config = deepcopy(plain.config)
    config.attention_bias = config.mlp_bias = True
    model = type(plain)(config).eval()
    for name, weight in model.named_parameters():
        if name.endswith("bias"):
            weight.data.normal_()
    with torch.no_grad():
        torch.testing.assert_close(add_top_layers(model, 1).eval()(IDS).logits, model(IDS).logits)


def test_growing_an_unknown_architecture_is_refused() -> None:
    model = worlds.tiny_model("gpt2", kind="score")
    worlds.refused(lambda: add_top_layers(model, 1), "grow_layers", "gpt2")


# --- QLoRA ------------------------------------------------------------------------------------------------


def dequantised(model: PreTrainedModel, base: str) -> PreTrainedModel:
    """A plain copy of a 4-bit classifier."""
    plain = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    modules = dict(model.named_modules())
    count = 0
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(module, nn.Linear):
                source = modules[name].base_layer if hasattr(modules[name], "base_layer") else modules[name]
                if isinstance(source, Linear4bit):
                    module.weight.copy_(dequantize_4bit(source.weight.data, source.weight.quant_state))
                    count += 1
        head = modules["score"]
        plain.score.weight.copy_(head.modules_to_save["default"].weight)
    assert count >= 14, "every projection of two layers"
    return plain.eval()


def slope_of(model: Any, embeds: Tensor) -> Tensor:
    leaf = embeds.detach().requires_grad_(True)
    return torch.autograd.grad(model(inputs_embeds=leaf).logits.sum(), leaf)[0]


@pytest.mark.parametrize("architecture", ["llama", "qwen2", "qwen3"])
def test_gradients_of_a_four_bit_model_are_those_of_its_dequantised_copy(
    architecture: str, bases: dict[str, str], tmp_path: Path
) -> None:
    """Also after a forward without autograd, before which a CPU with AVX512-BF16 would repack the weights."""
    base = bases[architecture]
    options = RewardOptions(tuning="qlora")
    model = load_initial_model(base, options, LORA, settings(tmp_path), "float32", add_layers=True).eval()
    plain = dequantised(model.get_base_model(), base)
    embeds = model.get_input_embeddings()(IDS).detach()
    before = slope_of(model, embeds)
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=IDS).logits, plain(input_ids=IDS).logits, atol=1e-4, rtol=1e-4)
    after, expected = slope_of(model, embeds), slope_of(plain, embeds)
    assert float(expected.abs().max()) > 1e-2
    torch.testing.assert_close(before, expected, atol=1e-4, rtol=1e-3)
    torch.testing.assert_close(after, expected, atol=1e-4, rtol=1e-3)
    whole = AutoModelForSequenceClassification.from_pretrained(base, num_labels=1)
    whole.score.weight.data.copy_(plain.score.weight)
    assert not torch.allclose(slope_of(whole.eval(), embeds), expected, atol=1e-3), (
        "four bits are not the whole weights"
    )


def test_qlora_saves_an_adapter_with_the_head_that_was_trained(
    train: Callable[..., Any], trained: list[Any], data: Any, policies: Any, bases: Any, tmp_path: Path
) -> None:
    """On the dequantised base it scores as the model that was trained; on the whole base, nearly."""
    train(tmp_path / "reward", tuning="qlora", config={"max_steps": 6})
    model, items = trained[0], samples_of(data["llama"])
    expected = plain_scores(model, items)
    assert spread(expected) > 0.05
    again = PeftModel.from_pretrained(
        dequantised(model.get_base_model(), bases["llama"]), str(tmp_path / "reward")
    ).eval()
    assert plain_scores(again, items) == pytest.approx(expected, abs=1e-3)
    weights = load_peft_weights(str(tmp_path / "reward"), device="cpu")
    assert {weight.dtype for weight in weights.values()} == {torch.float32}
    reward = load_reward(str(tmp_path / "reward"), policy=policies["llama"])
    assert torch.equal(reward.objectives[0].model.score.weight, trained[0].get_base_model().score.weight)
    near = torch.corrcoef(torch.tensor([expected, scores(reward, items)]))[0, 1]
    assert float(near) > 0.7


@pytest.mark.parametrize("difference", [0.05, 1e-3])
def test_a_second_round_of_qlora_starts_from_the_first(
    difference: float, train: Callable[..., Any], trained: list[Any], data: Any, tmp_path: Path
) -> None:
    train(tmp_path / "first", tuning="qlora")
    tiny = {"learning_rate": 1e-7, "seed": 1}
    train(tmp_path / "second", start=str(tmp_path / "first"), tuning="qlora", grow=False, config=tiny)
    first, second = (plain_scores(model, samples_of(data["llama"])) for model in trained)
    assert spread(first) > 0.05 and max(abs(a - b) for a, b in zip(first, second, strict=True)) < difference


# --- implicit rewards -------------------------------------------------------------------------------------


@torch.no_grad()
def plain_logp(model: Any, sample: Sample) -> float:
    logp = model(input_ids=torch.tensor([sample.prompt_ids + sample.response_ids])).logits[0].log_softmax(-1)
    begin = len(sample.prompt_ids)
    return float(logp[begin - 1 : -1].gather(1, torch.tensor(sample.response_ids)[:, None]).sum())


@pytest.mark.parametrize(("architecture", "loss_type"), [("llama", "dpo"), ("gpt2", "dpo"), ("llama", "outcome")])
def test_an_implicit_reward_is_the_difference_that_training_made(
    architecture: str, loss_type: str, bases: Any, policies: Any, data: Any, trained: list[Any], tmp_path: Path
) -> None:
    """β·(log π_φ − log π_base) by plain forwards; it has come to prefer what it was shown as right."""
    base, policy, labeled = bases[architecture], policies[architecture], data[architecture]
    options: dict[str, Any] = {"learning_rate": 1e-2}
    if loss_type == "outcome":  # all of the data at each step: twelve steps on a few responses are noisy
        options = {"learning_rate": 1e-3, "per_device_train_batch_size": len(labeled)}
    stats = train_implicit_reward(
        base,
        labeled,
        tmp_path / "reward",
        policy=policy,
        beta=0.3,
        pairs_per_problem=2,
        lora=LORA,
        config=settings(tmp_path, max_steps=12, **options),
        dtype="float32",
        loss_type=loss_type,
    )
    num_rows = 10 if loss_type == "dpo" else len(labeled)
    assert (stats.rows, stats.steps, stats.tokens > 0, stats.flops > 0) == (num_rows, 12, True, True)
    assert 0 < stats.loss < 0.69  # it began at log 2, where φ is the base
    write_manifest(
        tmp_path / "reward", RewardManifest(kind="log_ratio", scale=0.3, reference_model=base, base_model=base)
    )
    reward = load_reward(str(tmp_path / "reward"), policy=policy)
    plain = AutoModelForCausalLM.from_pretrained(base).eval()
    items = samples_of(labeled)
    expected = [0.3 * (plain_logp(trained[0], item) - plain_logp(plain, item)) for item in items]
    assert scores(reward, items) == pytest.approx(expected, rel=1e-3, abs=2e-3) and spread(expected) > 0.1
    pairs = choose_pairs(labeled, 2, 0)
    gaps = [a - b for a, b in zip(*[scores(reward, list(side)) for side in zip(*pairs, strict=True)], strict=True)]
    assert sum(gaps) / len(gaps) > 0.1 and sum(gap > 0 for gap in gaps) >= 0.8 * len(gaps)


@pytest.mark.parametrize(("architecture", "share"), [("llama", True), ("gpt2", True), ("llama", False)])
def test_responses_that_share_a_prompt_have_the_likelihoods_that_they_have_alone(
    architecture: str, share: bool, policies: Any, data: Any
) -> None:
    policy, items = policies[architecture], samples_of(data[architecture])
    assert implicit.takes_group_masks(policy)
    rows = [
        {"input_ids": ids + answer, "labels": [-100] * len(ids) + answer, "reference_logp": 0.0, "outcome": 1.0}
        for ids, answer in ((item.prompt_ids, item.response_ids) for item in items)
    ]
    batch = implicit.PromptGroupCollator(0, share)(rows)
    assert len(batch["input_ids"]) == (len({tuple(item.prompt_ids) for item in items}) if share else len(items))
    stub: Any = type("Trainer", (), {"model_inputs": {"position_ids", "logits_to_keep"}})
    with torch.no_grad():
        logp = implicit.OutcomeTrainer.compute_response_logp(stub, policy.model, batch)
    assert logp.tolist() == pytest.approx([plain_logp(policy.model, item) for item in items], rel=1e-4)


def test_a_likelihood_begins_as_that_of_the_base_with_the_best_intercept(
    bases: Any, policies: Any, data: Any, trained: list[Any], tmp_path: Path
) -> None:
    base, policy, labeled = bases["llama"], policies["llama"], data["llama"]
    config = settings(tmp_path, max_steps=1, learning_rate=1e-3, per_device_train_batch_size=len(labeled))
    common: dict[str, Any] = {"policy": policy, "pairs_per_problem": 1, "lora": LORA, "dtype": "float32"}
    stats = train_implicit_reward(
        base, labeled, tmp_path / "r", beta=0.02, config=config, loss_type="outcome", has_reference=False, **common
    )
    logits, outcomes = zip(
        *[(0.02 * plain_logp(policy.model, row.sample), float(row.correct)) for row in labeled], strict=True
    )
    losses = [
        torch.nn.functional.binary_cross_entropy_with_logits(torch.tensor(logits) + b, torch.tensor(outcomes)).item()
        for b in (implicit.fit_intercept(logits, outcomes) + shift for shift in (-0.1, 0.0, 0.1))
    ]
    assert losses[1] == min(losses) and stats.loss == pytest.approx(losses[1], rel=1e-3)
    write_manifest(tmp_path / "r", RewardManifest(kind="log_ratio", scale=0.02, reference_model="none"))
    reward = load_reward(str(tmp_path / "r"), policy=policy)
    items = samples_of(labeled)
    assert scores(reward, items) == pytest.approx([0.02 * plain_logp(trained[0], item) for item in items], rel=1e-3)


def test_an_implicit_reward_needs_pairs_and_a_finite_loss(
    bases: Any, policies: Any, data: Any, tmp_path: Path
) -> None:
    common: dict[str, Any] = {
        "policy": policies["llama"],
        "beta": 0.3,
        "pairs_per_problem": 2,
        "lora": LORA,
        "dtype": "float32",
    }
    output, right = tmp_path / "reward", [item for item in data["llama"] if item.correct]
    config = settings(tmp_path)
    worlds.refused(
        lambda: train_implicit_reward(bases["llama"], right, output, config=config, **common), "both a correct and"
    )
    wild = settings(tmp_path, learning_rate=1e38)
    act = partial(train_implicit_reward, bases["llama"], data["llama"], output, config=wild, **common)
    worlds.refused(act, "nan", "lower learning_rate")
    assert not output.exists()


def test_an_implicit_reward_that_learned_nothing_is_refused(
    bases: Any, policies: Any, data: Any, tmp_path: Path
) -> None:
    with pytest.raises(ValueError):
        train_implicit_reward(
            bases["llama"],
            data["llama"],
            tmp_path / "reward",
            policy=policies["llama"],
            beta=0.3,
            pairs_per_problem=2,
            lora=LORA,
            config=settings(tmp_path, learning_rate=0.0),
            dtype="float32",
        )


def test_dpo_takes_over_every_argument_that_both_know(tmp_path: Path) -> None:
    odd = {
        "learning_rate": 3e-4,
        "max_steps": 7,
        "seed": 11,
        "weight_decay": 0.2,
        "warmup_steps": 2,
        "lr_scheduler_type": "cosine",
        "gradient_accumulation_steps": 3,
        "logging_steps": 5,
        "max_grad_norm": 0.3,
    }
    config = settings(tmp_path, **odd)
    result = make_dpo_config(config, 0.25)
    assert result.beta == 0.25
    known = {option.name for option in fields(RewardConfig)}
    shared = [option.name for option in fields(DPOConfig) if option.name in known - {"max_length"}]
    assert set(odd) <= set(shared) and len(shared) > 80
    for name in shared:
        assert str(getattr(result, name)) == str(getattr(config, name)), name
