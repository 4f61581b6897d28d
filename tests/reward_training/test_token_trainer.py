"""Token targets: batches against enumeration of their draws, the loss by hand, gradient matching by differences."""

from __future__ import annotations

from collections.abc import Sequence
from copy import deepcopy
from itertools import product
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import worlds
from datasets import Dataset
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from transformers import Gemma3nTextConfig, PreTrainedModel
from transformers.modeling_layers import GenericForSequenceClassification
from transformers.models.gemma3n.modeling_gemma3n import Gemma3nPreTrainedModel
from trl import RewardConfig

from nabla_trl.reward_training.token_trainer import (
    RelaxedLossConfig,
    TokenCollator,
    TokenRewardTrainer,
    compute_token_scores,
    mix_embeddings,
    sample_mixture_weights,
    sample_token_swaps,
)

PAD = worlds.TOKENS.index(worlds.PAD)
Row = dict[str, Any]


def make_row(
    seed: int,
    *,
    start: int = 3,
    count: int = 4,
    width: int = 3,
    tail: int = 1,
    steps: bool = True,
    closed: float = 1.0,
) -> Row:
    """A row as `build_token_rows` makes them, with random ids, weights and labels."""
    draw = torch.Generator().manual_seed(seed)
    chars = len(worlds.CHARS)
    ids = torch.stack([torch.randperm(chars, generator=draw)[: width + 1] for _ in range(count)])
    ids[0, 1] = ids[0, 0]  # the response's own token is usually a candidate, too
    weights = torch.rand(count, width + 1, generator=draw) + 0.1
    weights[:, 0] = 0
    right = (torch.rand(count, width + 1, generator=draw) < 0.7).float()
    right[0, 1] = right[0, 0]
    prompt, closing = torch.randint(chars, (start + 1,), generator=draw).split([start, 1])
    return {
        "input_ids": [*prompt.tolist(), *ids[:, 0].tolist(), *closing.tolist()],
        "response_start": start,
        "candidate_ids": ids.tolist(),
        "candidate_weights": (weights / weights.sum(-1, keepdim=True)).tolist(),
        "correct": right.tolist() if steps else [],
        "answer_correct": float(seed % 2),
        "ends_with_stop": closed,
    }


def some_rows(**options: Any) -> list[Row]:
    """Rows of different lengths and numbers of candidates."""
    sizes = ((3, 4, 3), (5, 2, 1), (2, 6, 2))
    return [
        make_row(seed, start=start, count=count, width=width, **options)
        for seed, (start, count, width) in enumerate(sizes)
    ]


def seeded(seed: int, action: Any) -> Any:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return action()


def collated(rows: Sequence[Row], relaxed: float, seed: int = 0) -> dict[str, Tensor]:
    return seeded(seed, lambda: TokenCollator(PAD, relaxed)(rows))


def scorer(architecture: str = "llama", **options: Any) -> PreTrainedModel:
    return worlds.tiny_model(architecture, kind="score", **{"seed": 1, **options})


def trainer(folder: Path, model: Any, rows: Sequence[Row], **options: Any) -> TokenRewardTrainer:
    loss = RelaxedLossConfig(
        **{
            name: options.pop(name)
            for name in ("relaxed_fraction", "target_samples", "gradient_matching")
            if name in options
        }
    )
    common = {"use_cpu": True, "bf16": False, "gradient_checkpointing": False, "report_to": "none"}
    args = RewardConfig(str(folder), disable_tqdm=True, save_strategy="no", **common, **options)
    tokenizer = worlds.char_tokenizer()
    dataset = Dataset.from_list(list(rows))
    return TokenRewardTrainer(
        model=model, args=args, train_dataset=dataset, processing_class=tokenizer, loss_config=loss
    )


def prefix_score(model: PreTrainedModel, ids: Sequence[int]) -> Tensor:
    """The classifier's own logit of a sequence, pooled at its last token."""
    return model(input_ids=torch.tensor([list(ids)])).logits[0, 0]


class PerLayerScorer(GenericForSequenceClassification, Gemma3nPreTrainedModel):
    """transformers has no classifier of a Gemma with embeddings per layer yet."""

    config_class = Gemma3nTextConfig


def test_embeddings_per_layer_are_refused(tmp_path: Path) -> None:
    config = Gemma3nTextConfig(
        vocab_size=len(worlds.TOKENS),
        vocab_size_per_layer_input=len(worlds.TOKENS),
        hidden_size=32,
        hidden_size_per_layer_input=8,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_kv_shared_layers=0,
        head_dim=8,
        laurel_rank=4,
        layer_types=["full_attention"] * 2,
        activation_sparsity_pattern=[0.0] * 2,
        num_labels=1,
        pad_token_id=PAD,
    )
    model = PerLayerScorer(config)
    with pytest.raises(ValueError, match="gemma3n_text reads embeddings of each token in every layer"):
        trainer(tmp_path, model, some_rows())


# --- batches ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [True, False])
def test_without_relaxation_a_batch_is_the_responses_themselves(steps: bool) -> None:
    rows = some_rows(steps=steps)
    batch = collated(rows, 0.0)
    length = max(len(row["input_ids"]) for row in rows)
    assert not batch["needs_estimate"].any()
    assert batch["last_position"].tolist() == [len(row["input_ids"]) - 1 for row in rows]
    for index, row in enumerate(rows):
        real = len(row["input_ids"])
        assert batch["input_ids"][index].tolist() == row["input_ids"] + [PAD] * (length - real)
        assert batch["attention_mask"][index].tolist() == [1] * real + [0] * (length - real)
    one_hot = F.one_hot(batch["input_ids"], len(worlds.TOKENS)).float()
    assert torch.equal(dense(batch), one_hot)


def dense(batch: dict[str, Tensor]) -> Tensor:
    """Y [B, L, V] of a batch."""
    table = torch.zeros(*batch["candidate_ids"].shape[:2], len(worlds.TOKENS))
    return table.scatter_add(2, batch["candidate_ids"], batch["candidate_weights"])


def test_without_relaxation_targets_are_the_step_labels() -> None:
    """1 up to the first wrong token, then 0; the tail follows the last token where the response is closed."""
    for closed in (1.0, 0.0):
        rows = [*some_rows(closed=closed), make_row(9, closed=closed) | {"correct": [[1.0] * 4] * 4}]
        for row, targets in zip(rows, collated(rows, 0.0)["targets"], strict=True):
            free, expected_targets = True, []
            for right in row["correct"]:
                free = free and bool(right[0])
                expected_targets.append(float(free))
            expected_targets.append(float(free and bool(closed)))
            begin, end = row["response_start"], len(row["input_ids"])
            assert targets[begin:end].tolist() == expected_targets
            assert targets[:begin].isnan().all() and targets[end:].isnan().all()


def test_targets_of_mixtures_are_the_probability_that_a_draw_is_free_of_error() -> None:
    """Against all draws of one token per position, each as likely as its weights make it."""
    mixed = 0
    for seed in range(8):
        row = make_row(seed, start=2, count=3, width=2)
        batch = collated([row], 1.0, seed)
        weights, right = batch["candidate_weights"][0, 2:5], torch.tensor(row["correct"])
        probability = torch.zeros(3)
        for choice in product(range(3), repeat=3):
            chance = torch.stack([weights[at, column] for at, column in enumerate(choice)]).prod()
            free = torch.stack([right[at, column] for at, column in enumerate(choice)]).cumprod(0)
            probability += chance * free
        torch.testing.assert_close(batch["targets"][0, 2:5], probability)
        torch.testing.assert_close(batch["targets"][0, 5], probability[-1])
        mixed += int(((probability > 0) & (probability < 1)).any())
    assert mixed > 4


def test_a_mixture_has_the_policys_shares_and_leaves_prompt_and_tail_alone() -> None:
    """(1−α)·onehot + α·π, with one α for all mixed places of a row."""
    rows = [make_row(seed, count=6) for seed in range(30)]
    batch = collated(rows, 1.0)
    table = dense(batch)
    torch.testing.assert_close(table.sum(-1), torch.ones(table.shape[:2]))
    hard = F.one_hot(batch["input_ids"], len(worlds.TOKENS)).float()
    shares = set()
    for index, row in enumerate(rows):
        begin, end = row["response_start"], row["response_start"] + 6
        outside = [*range(begin), *range(end, table.shape[1])]
        assert torch.equal(table[index, outside], hard[index, outside])
        policy = torch.zeros(6, len(worlds.TOKENS))
        policy.scatter_add_(1, torch.tensor(row["candidate_ids"]), torch.tensor(row["candidate_weights"]))
        step = policy - hard[index, begin:end]
        alpha = ((table[index, begin:end] - hard[index, begin:end]) * step).sum(-1) / step.square().sum(-1)
        torch.testing.assert_close(table[index, begin:end], hard[index, begin:end] + alpha[:, None] * step)
        positive = alpha[alpha > 1e-6]
        assert (alpha > -1e-6).all() and (alpha < 1).all()
        torch.testing.assert_close(positive, positive[:1].expand_as(positive))
        shares.add(round(float(alpha.max()), 4))
    assert len(shares) > 15


@pytest.mark.parametrize("relaxed", [0.0, 1.0])
def test_outcome_labels_stand_at_every_token_of_response_and_tail(relaxed: float) -> None:
    rows = some_rows(steps=False, closed=0.0)
    batch = collated(rows, relaxed)
    for row, targets in zip(rows, batch["targets"], strict=True):
        begin, end = row["response_start"], len(row["input_ids"])
        assert targets[begin:end].tolist() == [row["answer_correct"]] * (end - begin)
        assert targets[:begin].isnan().all() and targets[end:].isnan().all()
    mixed = (dense(batch) - F.one_hot(batch["input_ids"], len(worlds.TOKENS))).abs().amax((1, 2)) > 0
    assert torch.equal(batch["needs_estimate"], mixed)
    assert not collated(some_rows(), relaxed)["needs_estimate"].any(), "step labels need no estimate"


def test_what_the_policy_offered_are_its_other_tokens() -> None:
    rows = some_rows()
    rows[0]["candidate_weights"][2] = [0.0, 1.0, 0.0, 0.0]  # the others were dropped as too unlikely
    batch = collated(rows, 0.5)
    for index, row in enumerate(rows):
        offered = set()
        for at, (ids, weights) in enumerate(zip(row["candidate_ids"], row["candidate_weights"], strict=True)):
            offered |= {
                (row["response_start"] + at, v) for v, w in zip(ids, weights, strict=True) if w and v != ids[0]
            }
        places, columns = torch.nonzero(batch["is_alternative"][index], as_tuple=True)
        assert {*zip(places.tolist(), batch["candidate_ids"][index, places, columns].tolist(), strict=True)} == offered


# --- shares -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("relaxed", [0.0, 0.3, 1.0])
def test_the_share_of_relaxed_rows_is_the_one_asked_for(relaxed: float) -> None:
    rows = seeded(0, lambda: torch.stack([sample_mixture_weights(200, relaxed) for _ in range(2000)]))
    assert ((rows >= 0) & (rows < 1)).all()
    mixed = rows[(rows > 0).any(1)]
    assert len(mixed) / len(rows) == pytest.approx(relaxed, abs=0.04)  # four standard errors
    if not relaxed:
        assert not len(mixed)
        return
    alphas, places = mixed.amax(1), (mixed > 0).float().mean(1)
    assert torch.equal(mixed, torch.where(mixed > 0, alphas[:, None], 0.0)), "one share per row"
    assert float(alphas.mean()) == pytest.approx(0.5, abs=0.06) and float(alphas.std()) > 0.2
    assert 0.4 < float((places == 1).float().mean()) < 0.6, "half of them mix every position"
    assert float(places[places < 1].std()) > 0.2, "the others any part of them"


@pytest.mark.parametrize(
    "options",
    [
        {"relaxed_fraction": -0.1},
        {"relaxed_fraction": float("nan")},
        {"target_samples": 0},
        {"gradient_matching": -1.0},
        {"gradient_matching": float("nan")},
    ],
)
def test_options_out_of_range_are_refused(options: dict[str, float]) -> None:
    worlds.refused(
        lambda: RelaxedLossConfig(**options),
        "relaxed_fraction must be in [0, 1]",
        "target_samples",
        "gradient_matching",
    )


# --- scores -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_mixing_at_one_hot_weights_is_embedding(architecture: str) -> None:
    embed = scorer(architecture).get_input_embeddings()
    batch = collated(some_rows(), 0.0)
    assert torch.equal(
        mix_embeddings(embed, batch["candidate_ids"], batch["candidate_weights"]), embed(batch["input_ids"])
    )
    batch = collated(some_rows(), 1.0, seed=3)
    assert not torch.equal(batch["candidate_weights"][..., 0], torch.ones(batch["input_ids"].shape))
    torch.testing.assert_close(
        mix_embeddings(embed, batch["candidate_ids"], batch["candidate_weights"]), dense(batch) @ embed.weight
    )


def adapted(model: PreTrainedModel, architecture: str) -> Any:
    modules = ["c_attn"] if architecture == "gpt2" else ["q_proj", "down_proj"]
    wrapped = get_peft_model(
        model, LoraConfig(r=2, target_modules=modules, task_type="SEQ_CLS", modules_to_save=["score"])
    )
    generator = torch.Generator().manual_seed(4)
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name or "modules_to_save" in name:
            weight.data.normal_(std=0.5, generator=generator)
    return wrapped.eval()


@pytest.mark.parametrize("peft", [False, True])
@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_a_score_at_every_position_is_the_pooled_logit_of_what_came_before(architecture: str, peft: bool) -> None:
    """Rows of different lengths in one padded batch; the model's own pooling reads ids, one prefix at a time."""
    plain = scorer(architecture)
    model = adapted(deepcopy(plain), architecture) if peft else plain
    batch = collated(some_rows(), 0.0)
    with torch.no_grad():
        embeds = model.get_input_embeddings()(batch["input_ids"])
        scores = compute_token_scores(model, embeds, batch["attention_mask"])
        pooled = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.squeeze(-1)
        torch.testing.assert_close(scores[range(3), batch["last_position"]], pooled, atol=1e-5, rtol=1e-4)
        for row, ids in enumerate(batch["input_ids"].tolist()):
            for end in range(1, int(batch["last_position"][row]) + 2):
                pooled_score = prefix_score(model, ids[:end])
                torch.testing.assert_close(scores[row, end - 1], pooled_score, atol=1e-5, rtol=1e-4)
        if peft:
            base = prefix_score(plain, batch["input_ids"][0].tolist())
            assert abs(float(base - scores[0, -1])) > 1e-3, "the adapter's head is the one that is read"
    assert scores.std() > 0.1


# --- the loss ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("steps", [True, False])
@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_the_loss_of_hard_rows_is_binary_cross_entropy_by_hand(architecture: str, steps: bool, tmp_path: Path) -> None:
    rows = some_rows(steps=steps)
    model = scorer(architecture)
    reward_trainer = trainer(tmp_path, model, rows)
    loss = reward_trainer.compute_loss(model, reward_trainer.data_collator(rows))
    parts = []
    for row in rows:
        free = 1.0
        for place in range(row["response_start"], len(row["input_ids"])):
            step = place - row["response_start"]
            if steps and step < len(row["correct"]):
                free *= row["correct"][step][0]
            chance = torch.sigmoid(prefix_score(model, row["input_ids"][: place + 1]))
            parts.append(-torch.log(chance if (free if steps else row["answer_correct"]) else 1 - chance))
    torch.testing.assert_close(loss, torch.stack(parts).mean(), atol=1e-5, rtol=1e-4)


def known_mixture(rows: Sequence[Row], weights: Tensor) -> dict[str, Tensor]:
    """A batch whose response positions have these weights, marked as one whose targets are to be estimated."""
    batch = collated(rows, 0.0)
    for index, row in enumerate(rows):
        batch["candidate_weights"][
            index, row["response_start"] : row["response_start"] + len(row["candidate_ids"])
        ] = weights
    return batch | {"needs_estimate": torch.ones(len(rows), dtype=torch.bool)}


def loss_against(scores: Tensor, targets: Tensor) -> Tensor:
    has_target = ~targets.isnan()
    return F.binary_cross_entropy_with_logits(scores[has_target], targets[has_target])


def test_the_target_of_a_sure_mixture_is_the_models_own_prediction_of_its_tokens(tmp_path: Path) -> None:
    """All weight on one candidate: every draw is the same, and the target what the model makes of it."""
    rows = [make_row(seed, steps=False) for seed in range(3)]
    model = scorer()
    reward_trainer = trainer(tmp_path, model, rows, relaxed_fraction=1.0, target_samples=3)
    batch = known_mixture(rows, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    sampled_ids = batch["input_ids"].clone()
    for index, row in enumerate(rows):
        sampled_ids[index, row["response_start"] : row["response_start"] + 4] = torch.tensor(row["candidate_ids"])[
            :, 2
        ]
    assert not torch.equal(sampled_ids, batch["input_ids"])
    with torch.no_grad():
        scores = compute_token_scores(model, model.get_input_embeddings()(sampled_ids), batch["attention_mask"])
    expected_targets = torch.where(batch["targets"].isnan(), torch.nan, scores.sigmoid())
    torch.testing.assert_close(reward_trainer.compute_loss(model, batch), loss_against(scores, expected_targets))
    batch["needs_estimate"][1] = False  # a hard row beside them keeps its outcome
    expected_targets[1] = batch["targets"][1]
    torch.testing.assert_close(reward_trainer.compute_loss(model, batch), loss_against(scores, expected_targets))


def test_the_target_of_a_mixture_is_the_mean_prediction_over_its_draws(tmp_path: Path) -> None:
    """Against the expectation over all draws; one draw alone gives another target."""
    row = make_row(1, start=2, count=2, width=2, steps=False)
    weights = torch.tensor([[0.5, 0.2, 0.3], [0.1, 0.6, 0.3]])
    model = scorer()
    batch = known_mixture([row] * 16, weights)
    embed = model.get_input_embeddings()
    expected, single = torch.zeros(5), []
    with torch.no_grad():
        for choice in product(range(3), repeat=2):
            ids = batch["input_ids"][:1].clone()
            ids[0, 2:4] = torch.tensor([row["candidate_ids"][at][column] for at, column in enumerate(choice)])
            seen = compute_token_scores(model, embed(ids), batch["attention_mask"][:1])[0].sigmoid()
            expected += weights[0, choice[0]] * weights[1, choice[1]] * seen
            single.append(seen[2:])
        scores = compute_token_scores(
            model, mix_embeddings(embed, batch["candidate_ids"], batch["candidate_weights"]), batch["attention_mask"]
        )
    assert torch.stack(single).std(0).max() > 0.1
    targets = torch.where(batch["targets"].isnan(), torch.nan, expected)
    for draws, close in ((256, True), (1, False)):
        reward_trainer = trainer(tmp_path, model, [row], relaxed_fraction=1.0, target_samples=draws)
        # The loss is linear in the targets; one row at a time, a single draw is far from the mean.
        subset = batch if close else {name: value[:1] for name, value in batch.items()}
        count = len(subset["input_ids"])
        sampled_loss = seeded(
            0, lambda reward_trainer=reward_trainer, subset=subset: reward_trainer.compute_loss(model, subset)
        )
        gap = abs(float(sampled_loss.detach() - loss_against(scores[:count], targets[:count])))
        assert gap < 0.01 if close else gap > 0.02


def test_no_gradient_flows_into_estimated_targets(tmp_path: Path) -> None:
    """The slope of the loss is the prediction minus the target, as for a known one."""
    rows = [make_row(seed, steps=False) for seed in range(3)]
    model = scorer()
    reward_trainer = trainer(tmp_path, model, rows, relaxed_fraction=1.0)
    batch = known_mixture(rows, torch.tensor([0.0, 0.0, 1.0, 0.0]))
    (slope,) = torch.autograd.grad(reward_trainer.compute_loss(model, batch), model.score.weight)
    assert float(slope.abs().max()) < 1e-6, "it predicts what it predicts"
    assert model.score.weight.requires_grad


# --- gradient matching ------------------------------------------------------------------------------------


class LinearScorer(nn.Module):
    """A score that is linear in the input embeddings: at each position the mean of those up to it, weighed."""

    def __init__(self, rows: int, width: int):
        super().__init__()
        self.embed, self.score = nn.Embedding(rows, width), nn.Linear(width, 1)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def forward(self, inputs_embeds: Tensor, attention_mask: Tensor, use_cache: bool = False) -> Any:
        return SimpleNamespace(logits=self.score(inputs_embeds.cumsum(1))[:, -1])


def matching_loss(
    reward_trainer: TokenRewardTrainer, model: Any, batch: dict[str, Tensor], weight: float = 1.0
) -> Tensor:
    """What gradient matching adds to the loss."""
    parts = []
    for matching in (weight, 0.0):
        reward_trainer.loss_config = RelaxedLossConfig(gradient_matching=matching)
        parts.append(seeded(0, lambda: reward_trainer.compute_loss(model, batch)))
    return parts[0] - parts[1]


@pytest.mark.parametrize("relaxed", [0.0, 1.0])
def test_a_linear_score_matches_its_gradient_everywhere(relaxed: float, tmp_path: Path) -> None:
    rows = some_rows()
    reward_trainer = trainer(tmp_path, scorer(), rows)
    batch = collated(rows, relaxed)
    linear = seeded(2, lambda: LinearScorer(len(worlds.TOKENS), 8))
    assert abs(float(matching_loss(reward_trainer, linear, batch))) < 1e-6
    assert float(matching_loss(reward_trainer, scorer(), batch)) > 1e-3, "a transformer's does not"


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_the_gradient_of_matching_agrees_with_finite_differences(
    architecture: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of the Huber loss of (slope · step − true change), step and true change held fixed; second derivatives."""
    narrow = F.softmax  # eager attention asks for float32 whatever the weights are
    monkeypatch.setattr(F, "softmax", lambda x, dim, dtype=None: narrow(x, dim))
    model = scorer(architecture, dtype=torch.float64)
    model.set_attn_implementation("eager")
    row = make_row(2, start=2, count=3, width=2)
    row["candidate_weights"] = [[0.0, 1.0, 0.0], [0.0, 0.0, 1.0], [0.0, 1.0, 0.0]]
    row["candidate_ids"] = [
        [v[0], v[0], v[2]] if at != 1 else v for at, v in enumerate(row["candidate_ids"])
    ]  # one swap is offered
    reward_trainer = trainer(tmp_path, model, [row])
    batch = collated([row], 0.0)
    place, token = 3, row["candidate_ids"][1][2]
    assert token != row["candidate_ids"][1][0]
    embed = model.get_input_embeddings()
    swapped = batch["input_ids"].clone()
    swapped[0, place] = token
    with torch.no_grad():
        step = embed(swapped)[0, place] - embed(batch["input_ids"])[0, place]
        true = model(input_ids=swapped).logits - model(input_ids=batch["input_ids"]).logits

    def gap() -> float:
        embeds = embed(batch["input_ids"]).detach().requires_grad_(True)
        (slopes,) = torch.autograd.grad(model(inputs_embeds=embeds).logits.sum(), embeds)
        return float(F.smooth_l1_loss((slopes[0, place] * step).sum(), true.squeeze()))

    weights = [
        weight for name, weight in model.named_parameters() if not name.endswith(("wte.weight", "tokens.weight"))
    ]
    loss = matching_loss(reward_trainer, model, batch)
    assert float(loss) == pytest.approx(gap(), rel=1e-6, abs=1e-9) and float(loss) > 1e-4
    slopes = torch.autograd.grad(loss, weights, allow_unused=True)
    draw = torch.Generator().manual_seed(3)
    for _ in range(3):
        direction = [torch.randn(weight.shape, generator=draw, dtype=torch.float64) for weight in weights]
        ours = sum(float((s * d).sum()) for s, d in zip(slopes, direction, strict=True) if s is not None)
        values = []
        for shift in (1e-6, -2e-6):
            with torch.no_grad():
                for weight, way in zip(weights, direction, strict=True):
                    weight += shift * way
            values.append(gap())
        with torch.no_grad():
            for weight, way in zip(weights, direction, strict=True):
                weight += 1e-6 * way
        assert ours == pytest.approx((values[0] - values[1]) / 2e-6, rel=1e-3, abs=1e-6)
        assert abs(ours) > 1e-4


def test_swaps_are_among_the_tokens_that_were_offered() -> None:
    """And any of them may come, at any place."""
    rows = some_rows()
    batch = collated(rows, 0.5)
    seen: list[set[tuple[int, int]]] = [set() for _ in rows]
    for seed in range(200):
        places, tokens = seeded(seed, lambda: sample_token_swaps(batch))
        for index, swap in enumerate(zip(places.tolist(), tokens.tolist(), strict=True)):
            seen[index].add(swap)
    for index in range(len(rows)):
        places, columns = torch.nonzero(batch["is_alternative"][index], as_tuple=True)
        assert seen[index] == {
            *zip(places.tolist(), batch["candidate_ids"][index, places, columns].tolist(), strict=True)
        }


def test_a_swap_changes_nothing_where_nothing_was_offered() -> None:
    rows = some_rows()
    rows[1]["candidate_weights"] = [[0.0, 1.0], [0.0, 1.0]]
    rows[1]["candidate_ids"] = [[v[0], v[0]] for v in rows[1]["candidate_ids"]]
    batch = collated(rows, 0.5)
    assert not batch["is_alternative"][1].any()
    for seed in range(100):
        places, tokens = seeded(seed, lambda: sample_token_swaps(batch))
        assert batch["input_ids"][1, places[1]] == tokens[1]


# --- training ---------------------------------------------------------------------------------------------


def test_training_learns_the_targets(tmp_path: Path) -> None:
    rows = [make_row(seed, count=5) for seed in range(8)]
    model = scorer()
    model.set_attn_implementation("eager")
    reward_trainer = trainer(
        tmp_path,
        model,
        rows,
        relaxed_fraction=0.5,
        gradient_matching=0.1,
        max_steps=30,
        learning_rate=3e-3,
        per_device_train_batch_size=8,
        logging_steps=10,
    )
    batch = collated(rows, 0.0)
    before = float(reward_trainer.compute_loss(model, batch))
    result = reward_trainer.train()
    reward_trainer.loss_config = RelaxedLossConfig()
    assert float(reward_trainer.compute_loss(model, batch)) < 0.7 * before
    assert result.global_step == 30
    logged = [entry for entry in reward_trainer.state.log_history if "loss" in entry]
    assert all({"mean_reward", "accuracy"} <= set(entry) and 0 <= entry["accuracy"] <= 1 for entry in logged)


def test_a_loss_that_is_not_finite_stops_with_its_step_named(tmp_path: Path) -> None:
    rows = some_rows()
    reward_trainer = trainer(tmp_path, scorer(), rows, max_steps=5, learning_rate=1e38, lr_scheduler_type="constant")
    worlds.refused(reward_trainer.train, "the loss became nan at step 2", "lower learning_rate")
