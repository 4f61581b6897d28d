"""Distillation: the divergence to a few tokens and the rest, and training on it, on traces and on own samples."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from trl import SFTConfig

from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.traces.datasets import build_sft_rows, build_soft_target_rows
from nabla_trl.traces.schema import SoftTargets, Trace
from nabla_trl.training.offline import (
    ON_POLICY,
    SOFT_TARGETS,
    TrainingResult,
    TrainOptions,
    build_training_rows,
    train_on_traces,
)
from nabla_trl.training.online import RefinedTeacher, train_online
from nabla_trl.training.peft import LoraArguments
from nabla_trl.training.trainers import compute_advantage_gains, compute_lumped_kl

VOCAB = len(worlds.TOKENS)
LORA = LoraArguments(lora_r=4, lora_alpha=8)
SEARCH = SearchConfig(
    solver={"gradient_at": "direct"}, beta=1.0, max_rounds=4, max_new_tokens=8, top_k_candidates=8, soft_target_top_k=6
)
pytestmark = pytest.mark.usefixtures("little_to_collect")


@pytest.fixture(scope="module")
def base(bases: dict[str, str]) -> Policy:
    return load_policy(bases["llama"])


@pytest.fixture(scope="module")
def reward(base: Policy) -> Reward:
    return worlds.tiny_logratio(base, width=64)


@pytest.fixture(scope="module")
def traces(base: Policy, reward: Reward) -> list[Trace]:
    return run_search(worlds.tiny_problems(), policy=base, reward=reward, config=SEARCH)


def settings(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(str(folder / "trainer"), **worlds.TRAINER | {"max_steps": 6, "logging_steps": 1} | options)


# ---------------------------------------------------------------------------------------------- the divergence


def draw_distributions() -> tuple[torch.Tensor, torch.Tensor]:
    torch.manual_seed(0)
    p, q = (2 * torch.randn(2, 50, 9, dtype=torch.float64)).log_softmax(-1)
    return p, q


@pytest.mark.parametrize("is_reverse", [False, True])
def test_the_lumped_kl_is_at_most_the_full_one_and_equal_with_every_token(is_reverse: bool) -> None:
    p, q = draw_distributions()
    full = ((p.exp() * (p - q)) if is_reverse else (q.exp() * (q - p))).sum(-1)
    before = torch.full_like(full, -1e-12)
    for count in range(1, 10):
        logp, ids = q.topk(count, dim=-1)
        lumped = compute_lumped_kl(p, ids, logp, is_reverse=is_reverse)
        assert (lumped >= before - 1e-9).all(), "finer parts cannot lose information"
        assert (lumped <= full + 1e-9).all()
        before = lumped
    torch.testing.assert_close(before, full)
    padded_ids, padded = torch.nn.functional.pad(ids, (0, 2)), torch.nn.functional.pad(logp, (0, 2), value=-torch.inf)
    torch.testing.assert_close(compute_lumped_kl(p, padded_ids, padded, is_reverse=is_reverse), full)


@pytest.mark.parametrize("is_reverse", [False, True])
@pytest.mark.parametrize("count", [1, 4, 9])
def test_there_is_no_gradient_at_the_target_and_a_step_leads_to_it(is_reverse: bool, count: int) -> None:
    p, q = draw_distributions()
    logp, ids = q.topk(count, dim=-1)

    def compute_gradient(logits: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        logits = logits.clone().requires_grad_(True)
        kl = compute_lumped_kl(logits.log_softmax(-1), ids, logp, is_reverse=is_reverse).sum()
        return kl, torch.autograd.grad(kl, logits)[0]

    kl, gradient = compute_gradient(q)
    assert abs(float(kl)) < 1e-9 and float(gradient.abs().max()) < 1e-9
    kl, gradient = compute_gradient(p)
    assert float(kl) > 1 and float(compute_gradient(p - 0.1 * gradient)[0]) < float(kl)


def test_a_position_without_targets_teaches_nothing() -> None:
    p, _ = draw_distributions()
    ids, logp = torch.zeros(50, 3, dtype=torch.long), torch.full((50, 3), -torch.inf, dtype=torch.float64)
    for is_reverse in (False, True):
        logits = p.clone().requires_grad_(True)
        compute_lumped_kl(logits.log_softmax(-1), ids, logp, is_reverse=is_reverse).sum().backward()
        assert logits.grad is not None and float(logits.grad.abs().max()) < 1e-9


# -------------------------------------------------------------------------------------------------- soft targets


def train_soft_targets(policy: str, traces: list[Trace], folder: Path, **options: Any) -> TrainingResult:
    divergence = options.pop("divergence", "forward_kl")
    return train_on_traces(
        SOFT_TARGETS,
        policy,
        build_soft_target_rows(traces),
        folder / "out",
        beta=1.0,
        tuning="lora",
        lora=LORA,
        config=settings(folder, **options),
        dtype="float32",
        divergence=divergence,
    )


def compute_mean_kl(policy: Policy, traces: list[Trace], *, is_reverse: bool) -> float:
    """Return the mean KL to the targets of all rows, computed row by row."""
    values = []
    for trace in traces:
        for targets, (response_ids, _) in zip(trace.soft_targets, trace.list_incumbents(), strict=False):
            logits = policy.model(torch.tensor([trace.prompt_ids + response_ids])).logits[0].detach()
            ids, logp = map(torch.tensor, targets.to_arrays())
            own = logits[len(trace.prompt_ids) - 1 : -1].log_softmax(-1)
            values.append(compute_lumped_kl(own, ids.long(), logp, is_reverse=is_reverse))
    return float(torch.cat(values).mean())


@pytest.mark.parametrize("divergence", ["forward_kl", pytest.param("reverse_kl", marks=pytest.mark.slow)])
def test_the_exported_adapter_is_nearer_to_the_targets(
    divergence: str, base: Policy, traces: list[Trace], tmp_path: Path
) -> None:
    num_rows = len(build_soft_target_rows(traces).rows)
    before = compute_mean_kl(base, traces, is_reverse=divergence == "reverse_kl")
    result = train_soft_targets(
        base.name, traces, tmp_path, divergence=divergence, per_device_train_batch_size=num_rows
    )
    trained = load_policy(base.name, adapter=str(tmp_path / "out"))
    after = compute_mean_kl(trained, traces, is_reverse=divergence == "reverse_kl")
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert log[0]["loss"] == pytest.approx(before, rel=1e-3), "the first loss is that of the untrained policy"
    assert after < 0.9 * before and result.flops > 0 and result.beta is None


def test_one_hot_targets_are_plain_sft(base: Policy, traces: list[Trace], tmp_path: Path) -> None:
    one_hot = [
        replace(
            trace,
            soft_targets=[
                SoftTargets.from_arrays([[token] for token in ids], [[0.0]] * len(ids))
                for ids, _ in trace.list_incumbents()[-1:]
            ],
            revisions=[],
            initial_ids=trace.response_ids,
            predicted_gain=[],
            finished=True,
        )
        for trace in traces
    ]
    options = {"max_steps": 1, "per_device_train_batch_size": len(one_hot)}
    train_soft_targets(base.name, one_hot, tmp_path / "soft", **options)
    shared: dict[str, Any] = {"beta": 1.0, "tuning": "lora", "lora": LORA, "dtype": "float32"}
    rows = build_sft_rows(one_hot, "samples", include_unfinished=True)
    train_on_traces(
        "sft", base.name, rows, tmp_path / "sft" / "out", config=settings(tmp_path / "sft", **options), **shared
    )
    losses = [json.loads((tmp_path / name / "log.jsonl").read_text().splitlines()[0]) for name in ("soft", "sft")]
    assert losses[0]["loss"] == pytest.approx(losses[1]["loss"], rel=1e-4)
    assert losses[0]["grad_norm"] == pytest.approx(losses[1]["grad_norm"], rel=1e-3)


def test_traces_without_targets_are_refused_in_one_line(traces: list[Trace]) -> None:
    plain = [replace(trace, soft_targets=[]) for trace in traces]
    worlds.refused(lambda: build_soft_target_rows(plain), "soft-targets", "soft_target_top_k 16")
    mixed = build_soft_target_rows([traces[0], *plain[1:]])
    assert mixed.skipped == {"without soft targets": len(traces) - 1}
    worlds.refused(lambda: TrainOptions(divergence="jsd"), "divergence must be one of forward_kl, reverse_kl")


def test_samples_are_selected_by_their_answers_or_their_reward(traces: list[Trace]) -> None:
    """Traces without proposals are draws of the policy: rejection sampling needs no accepted revision."""
    draws = [
        replace(
            trace,
            seed=seed,
            revisions=[],
            initial_ids=trace.response_ids,
            predicted_gain=[],
            soft_targets=[],
            finished=True,
            correct=bool((number + seed) % 2),
            reward=float(seed),
        )
        for number, trace in enumerate(traces)
        for seed in range(3)
    ]
    best = build_training_rows("sft", draws, sft_selection="best", beta=1.0)
    assert len(best.rows) == len(traces)
    correct = build_training_rows("sft", draws, sft_selection="correct", beta=1.0)
    assert len(correct.rows) == len(traces), "equal responses to a problem count once"
    num_wrong = sum(not trace.correct for trace in draws)
    assert correct.skipped["not correct"] == num_wrong
    assert correct.skipped["duplicate"] == len(draws) - num_wrong - len(traces)
    worlds.refused(lambda: build_training_rows("sft", draws, sft_selection="improved", beta=1.0), "was accepted")


# --------------------------------------------------------------------------------------- on-policy distillation


class SampledTokenTeacher(RefinedTeacher):
    """A teacher that knows what the sampled tokens alone add to the score, as of a process reward or a head."""

    scores_candidates = False


def make_teacher(
    base: Policy,
    reward: Reward,
    gradient_at: str,
    divergence: str = "reverse_kl",
    teacher_class: type[RefinedTeacher] = RefinedTeacher,
) -> RefinedTeacher:
    problems = {problem.id: problem for problem in worlds.tiny_problems()}
    config = SearchConfig(solver={"gradient_at": gradient_at}, beta=0.5, top_k_candidates=VOCAB, candidate_min_p=0.0)
    prompt_ids = {name: base.encode(problem) for name, problem in problems.items()}
    return teacher_class(base, reward, problems, prompt_ids, config, divergence)


def test_the_minimizer_is_the_refined_distribution(base: Policy) -> None:
    """The next token after a prefix can be enumerated, so that the expected gradient of the loss is exact.

    It is 0 at p ∝ π·exp(λ·A), where A is what each token adds to the score, and nowhere near it at π.
    """
    scalar = worlds.tiny_scalar(base)
    teacher = make_teacher(base, scalar, "direct", teacher_class=SampledTokenTeacher)
    vocabulary = [token for token in range(VOCAB) if not base.forbidden_mask[token] and token not in base.stop_ids]
    responses = [[5, token] for token in vocabulary]
    targets = teacher(["q0"] * len(responses), responses)
    assert teacher.is_policy_gradient and teacher.compute_flops_per_response() > 0
    gains = torch.tensor([float(row.advantages[1]) for row in targets]).double()
    ids, policy_logp = targets[0].ids[1], targets[0].logp[1].double()
    base_logp = torch.full((VOCAB,), -torch.inf, dtype=torch.float64).scatter(0, ids, policy_logp)[vocabulary]

    def compute_expected_gradient(logits: torch.Tensor) -> torch.Tensor:
        logits = logits.clone().requires_grad_(True)
        # One row for each token that may have been sampled.
        logp, columns = logits.log_softmax(-1).expand(len(vocabulary), -1), torch.arange(len(vocabulary))
        policy_logp = base_logp.log_softmax(-1).expand_as(logp)
        kl = compute_lumped_kl(logp, columns.expand_as(logp), policy_logp, is_reverse=True)
        losses = kl - compute_advantage_gains(logp, columns, gains)
        return torch.autograd.grad((logp[0].detach().exp() * losses).sum(), logits)[0]

    assert float(compute_expected_gradient(base_logp).abs().max()) > 0.01
    assert float(compute_expected_gradient((base_logp + gains).log_softmax(-1)).abs().max()) < 1e-6


def test_the_teacher_of_a_score_does_not_depend_on_the_sampled_token(base: Policy) -> None:
    """At a prefix it is π·exp(λ·score), whichever token was sampled. After a stop token the score is the reward."""
    scalar = worlds.tiny_scalar(base)
    teacher = make_teacher(base, scalar, "direct")
    vocabulary = [token for token in range(VOCAB) if not base.forbidden_mask[token]]
    rows = teacher(["q0"] * len(vocabulary), [[5, token] for token in vocabulary])
    ids, logp = rows[0].ids[1], rows[0].logp[1]
    for row in rows[1:]:
        assert torch.equal(row.ids[1], ids) and not row.advantages.any()
        torch.testing.assert_close(row.logp[1], logp, atol=1e-4, rtol=1e-4)
    partial = [
        Sample(teacher.problems["q0"], teacher.prompt_ids["q0"], [5, token], is_partial=token not in base.stop_ids)
        for token in vocabulary
    ]
    caches = scalar.compute_prompt_caches(partial, FlopCounter())
    scores = torch.tensor(scalar.score(partial, caches, flop_counter=FlopCounter())[0]).float()
    prompt_and_prefix = torch.tensor([teacher.prompt_ids["q0"] + [5]])
    policy_logp = base.model(prompt_and_prefix).logits[0, -1].log_softmax(-1)[vocabulary].detach()
    expected = (policy_logp + 2 * scores).log_softmax(-1) + policy_logp.logsumexp(-1)
    found = torch.full((VOCAB,), -torch.inf).scatter(0, ids, logp)[vocabulary]
    torch.testing.assert_close(found, expected, atol=2e-4, rtol=1e-3)


@pytest.mark.parametrize("divergence", ["forward_kl", "reverse_kl"])
def test_the_teacher_of_a_log_ratio_is_the_tilted_policy(base: Policy, reward: Reward, divergence: str) -> None:
    better = reward.preferred_model
    assert better is not None
    responses = [[1, 2, 3], [7], [4, 5]]
    prompts = ["q1", "q0", "q1"]
    teacher = make_teacher(base, reward, "direct", divergence)
    for prompt, response, row in zip(prompts, responses, teacher(prompts, responses), strict=True):
        ids = torch.tensor([teacher.prompt_ids[prompt] + response])
        own, other = (
            policy.model(ids).logits[0, -len(response) - 1 : -1].detach().log_softmax(-1) for policy in (base, better)
        )
        own_logp = own.masked_fill(base.forbidden_mask, -torch.inf)
        tilted = (own_logp + 2 * (other - own)).log_softmax(-1) + own_logp.logsumexp(-1, keepdim=True)
        torch.testing.assert_close(row.logp, tilted.gather(1, row.ids), atol=2e-4, rtol=1e-3)
        assert not row.advantages.any()


def test_a_response_that_the_reward_cannot_read_has_no_target(base: Policy) -> None:
    scalar = worlds.tiny_scalar(base)
    unreadable = replace(scalar, in_vocabulary=scalar.in_vocabulary.clone())
    unreadable.in_vocabulary[3] = False
    rows = make_teacher(base, unreadable, "direct")(["q0", "q0"], [[3, 4], [4, 5]])
    assert not rows[0].logp.isfinite().any() and not rows[0].advantages.any()
    assert rows[1].logp.isfinite().any()


def distill(base: Policy, reward: Reward, folder: Path, **options: Any) -> TrainingResult:
    search = options.pop("search", SearchConfig(top_k_candidates=VOCAB, max_new_tokens=6))
    with AnswerChecker() as checker:
        return train_online(
            ON_POLICY,
            base,
            worlds.tiny_problems(),
            folder / "out",
            reward=reward,
            checker=checker,
            beta=1.0,
            sampling=Sampling(max_new_tokens=6),
            options=TrainOptions(),
            lora=LORA,
            config=settings(folder, **{"per_device_train_batch_size": 8, **options}),
            dtype="float32",
            search_config=search,
        )


def test_on_policy_distillation_approaches_its_teacher(base: Policy, reward: Reward, tmp_path: Path) -> None:
    options = {"per_device_train_batch_size": 8, "gradient_accumulation_steps": 2, "learning_rate": 3e-2}
    result = distill(base, reward, tmp_path, max_steps=6, **options)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    kls = [entry["teacher_kl"] for entry in log if "teacher_kl" in entry]
    assert kls[-1] < 0.8 * kls[0]
    assert (result.method_metrics["responses"], result.epochs) == (6 * 16, 6 * 16 / 4)
    assert "groups_without_variance" not in result.method_metrics
    trained = load_policy(base.name, adapter=str(tmp_path / "out"))
    ids = torch.tensor([base.encode(worlds.tiny_problems()[0])])
    assert not torch.allclose(trained.model(ids).logits, base.model(ids).logits, atol=1e-3)


def test_the_passes_of_the_teacher_are_counted(base: Policy, reward: Reward) -> None:
    """The teacher of a direct gradient reads π and the better model. Another gradient has backward passes too."""
    responses = [[1, 2, 3, 4, 5, 6]]
    teachers = {gradient_at: make_teacher(base, reward, gradient_at) for gradient_at in ("direct", "hard")}
    flops = {}
    for gradient_at, teacher in teachers.items():
        teacher(["q0"], responses)
        flops[gradient_at] = teacher.compute_flops_per_response()
    forward = base.size.compute_forward_flops(0, len(teacher.prompt_ids["q0"]) + 5)
    assert 1.8 * forward < flops["direct"] < 3 * forward
    assert flops["hard"] > flops["direct"] + 2 * forward


def test_what_has_no_teacher_is_refused(base: Policy, reward: Reward, tmp_path: Path) -> None:
    control = SearchConfig(solver="none", max_new_tokens=6)
    worlds.refused(lambda: distill(base, reward, tmp_path, search=control), ON_POLICY, "solver none has none")
