"""The gradient audit: perfect and useless gradients are told apart, and swaps are what they claim to be."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import pytest
import torch
import worlds
from torch import Tensor

from nabla_trl.audit.first_errors import WrongResponse, find_wrong_responses
from nabla_trl.audit.gradient import GradientAudit, audit_gradient, classify_effect, conclude_gradient_audit
from nabla_trl.audit.swaps import SampledResponse, choose_swaps, draw_responses, measure_swaps
from nabla_trl.gradient.objectives import DrawInfo, Sample, ScoreCache
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import GradientPoint, Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import find_token_columns
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.rewards.loading import load_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.tasks.registry import load_problems
from nabla_trl.utils.statistics import Interval, wilson_interval

PLAIN = Sampling(max_new_tokens=12)
MANY = [replace(problem, id=f"{problem.id}-{copy}") for copy in range(10) for problem in worlds.tiny_problems()]
DIGIT_CHAINS = Sampling(max_new_tokens=64, min_p=0.02)

GradientFunction = Callable[[Sample, Tensor], Tensor]  # a response and its candidates [T, K] -> [T, K]


@dataclass
class Toy(Reward):
    """r = Σ_t table[t, y_t]: linear in the one-hot matrix, with `table` as its gradient, or `custom_gradient`."""

    table: Tensor = field(default_factory=lambda: torch.zeros(0))
    custom_gradient: GradientFunction | None = None

    @property
    def has_dense_gradient(self) -> bool:
        return False

    def compute_max_new_tokens(self, problem: Any, prompt_ids: list[int]) -> int:
        return len(self.table)

    def compute_prompt_caches(self, samples: Sequence[Sample], flop_counter: FlopCounter) -> list[list[ScoreCache]]:
        return [[] for _ in samples]

    def score(
        self,
        samples: Sequence[Sample],
        caches: Sequence[Sequence[ScoreCache]],
        *,
        flop_counter: FlopCounter,
        num_shared: Sequence[int] | None = None,
        return_caches: bool = False,
    ) -> tuple[list[float], list[list[ScoreCache]]]:
        values = [float(self.table[range(len(s.response_ids)), s.response_ids].sum()) for s in samples]
        return values, [[] for _ in samples]

    def compute_gradient(
        self,
        samples: Sequence[Sample],
        prompt_caches: Sequence[Sequence[ScoreCache]],
        response_caches: Sequence[Sequence[ScoreCache]],
        candidates: Sequence[Tensor],
        *,
        flop_counter: FlopCounter,
        gradient_at: GradientPoint,
    ) -> list[Tensor]:
        compute = self.custom_gradient or (lambda sample, table: self.table[: len(table)].gather(1, table))
        return [compute(sample, table) for sample, table in zip(samples, candidates, strict=True)]


def toy(policy: Policy, gradient: GradientFunction | None = None, table: Tensor | None = None, **changes: Any) -> Toy:
    rows = len(policy.forbidden_mask)
    random = torch.randn(64, rows, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    in_vocabulary = torch.ones(rows, dtype=torch.bool)
    table = random if table is None else table
    reward = Toy("toy", "scalar", [], in_vocabulary, policy.stop_ids, table=table, custom_gradient=gradient)
    return replace(reward, **changes)


def run(policy: Policy, reward: Reward, problems: Sequence[Any] | None = None, **changes: Any) -> GradientAudit:
    defaults = {"gradient_at": ["hard"], "sampling": PLAIN, "samples_per_problem": 8, "num_swaps": 300}
    return audit_gradient(problems or worlds.tiny_problems(), policy=policy, reward=reward, **{**defaults, **changes})


def noise() -> GradientFunction:
    generator = torch.Generator().manual_seed(1)
    return lambda sample, table: torch.randn(table.shape, generator=generator)


@pytest.fixture(scope="module")
def chains_policy() -> Policy:
    return load_policy("data/tiny/policy")


@pytest.fixture(scope="module")
def chains() -> list[Any]:
    return load_problems("digit_chains", split="train", max_problems=24)


def planted(policy: Policy, sign: float = 1.0) -> GradientFunction:
    """`sign` at right tokens of the first error, 0 elsewhere."""
    labels = TokenLabeler(policy)

    def compute(sample: Sample, table: Tensor) -> Tensor:
        at = labels.find_first_error(sample.problem, sample.response_ids)
        gradient = torch.zeros(table.shape)
        if at is not None:
            gradient[at] = sign * labels.label_candidates(sample.problem, sample.response_ids, table)[at]
        return gradient

    return compute


# --- swaps ------------------------------------------------------------------------------------------------


def test_an_exact_gradient_predicts_every_swap(policy):
    audit = run(policy, toy(policy))
    point = audit.gradient_points["hard"]
    for interval in (point.correlation, point.correlation_informative):
        assert (interval.value, interval.low, interval.high) == pytest.approx((1, 1, 1), abs=1e-4)
    for interval in (point.sign_accuracy, point.sign_accuracy_informative):
        assert interval.value == interval.high == 1 and interval.low > 0.5
        assert interval.low == pytest.approx(wilson_interval(1.0, audit.problems)[0], abs=0.05), "problems, not swaps"
    assert (point.effect, audit.best_gradient_at, audit.swaps) == ("helps", "hard", 300)
    assert 0 < audit.informative_swaps <= 300
    assert audit.conclusion.startswith("take the gradient at hard: it predicts the direction of 100% [")
    assert (audit.no_labels_reason, audit.baseline) == ("the problems have no step labels", None)


def test_a_gradient_of_the_wrong_sign_misleads(policy):
    reward = toy(policy)
    reward.custom_gradient = lambda sample, table: -reward.table[: len(table)].gather(1, table)
    audit = run(policy, reward)
    point = audit.gradient_points["hard"]
    assert point.correlation.value == pytest.approx(-1) and point.sign_accuracy.value == 0
    assert (point.effect, audit.best_gradient_at) == ("misleads", None)
    assert "misleads at hard" in audit.conclusion and "solver none" in audit.conclusion


def test_where_points_mislead_is_told_apart_from_where_they_add_nothing(policy):
    point = run(policy, toy(policy)).gradient_points["hard"]
    points = {name: replace(point, effect="misleads") for name in ("hard", "b")}
    everywhere = conclude_gradient_audit(points, None)
    assert "misleads at hard, b:" in everywhere and "elsewhere" not in everywhere
    points["b"] = replace(points["b"], effect="adds nothing")
    assert "and adds nothing elsewhere" in conclude_gradient_audit(points, None)
    points = {name: replace(point, effect="adds nothing") for name, point in points.items()}
    assert "misleads" not in conclude_gradient_audit(points, None)


def test_a_gradient_of_noise_adds_nothing(policy):
    audit = run(policy, toy(policy, noise()))
    point = audit.gradient_points["hard"]
    assert point.sign_accuracy_informative.low < 0.5 < point.sign_accuracy_informative.high
    assert abs(point.correlation.value) < 0.2
    assert point.effect in ("adds nothing", "too few to tell") and audit.best_gradient_at is None
    assert "solver none" in audit.conclusion


def test_too_few_swaps_say_so(policy):
    point = run(policy, toy(policy)).gradient_points["hard"]
    point = replace(point, effect="too few to tell", conclusion="the gradient at hard may help: 55% [40%, 70%]")
    words = conclude_gradient_audit({"hard": point}, None)
    assert words.startswith("too few wrong responses or swaps to tell") and "at hard (55% [40%, 70%])" in words


def test_a_gradient_of_zero_is_no_better_than_chance(policy):
    point = run(policy, toy(policy, lambda sample, table: torch.zeros(table.shape))).gradient_points["hard"]
    assert (point.sign_accuracy.value, point.correlation, point.effect) == (0.5, None, "too few to tell")


def test_the_better_point_is_advised(policy):
    """A later point is taken if it is measurably better, the earlier one if they are alike."""
    reward = toy(policy)
    exact = reward.table
    blurred = exact + 3 * torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))

    @dataclass
    class TwoPoints(Toy):
        def compute_gradient(self, samples, prompts, scored, candidates, *, flop_counter, gradient_at):
            table = exact if gradient_at.alphas[0] >= 0.5 else blurred
            return [table[: len(rows)].gather(1, rows) for rows in candidates]

    two = TwoPoints("two", "scalar", [], reward.in_vocabulary, reward.stop_ids, table=exact)
    audit = run(policy, two, MANY, gradient_at=["hard", "mixture:0.5", "mixture:1"], num_swaps=600)
    assert {name: point.effect for name, point in audit.gradient_points.items()} == dict.fromkeys(
        audit.gradient_points, "helps"
    )
    assert audit.best_gradient_at == "mixture:0.5"


@pytest.mark.parametrize(("error", "best"), [(0.3, "direct"), (3.0, "hard")])
def test_a_more_expensive_point_must_be_worth_it(policy, error, best):
    """A backward pass that predicts surely more, but only a little more, is not advised."""
    exact = toy(policy).table
    blurred = exact + error * torch.randn(exact.shape, generator=torch.Generator().manual_seed(2))

    @dataclass
    class TwoPoints(Toy):
        def compute_gradient(self, samples, prompts, scored, candidates, *, flop_counter, gradient_at):
            table = blurred if gradient_at.direct else exact
            return [table[: len(rows)].gather(1, rows) for rows in candidates]

    reward = toy(policy)
    two = TwoPoints("two", "scalar", [], reward.in_vocabulary, reward.stop_ids, table=exact)
    audit = run(policy, two, MANY, gradient_at=["direct", "hard"], num_swaps=1000)
    direct, hard = (
        audit.gradient_points["direct"].sign_accuracy_informative,
        audit.gradient_points["hard"].sign_accuracy_informative,
    )
    assert hard.value == 1 > direct.high and audit.gradient_points["direct"].effect == "helps"
    assert audit.best_gradient_at == best


def responses_to(policy: Policy, reward: Reward, **changes: Any) -> list[SampledResponse]:
    options = {"sampling": PLAIN, "top_k_candidates": 6, "candidate_min_p": 0.02, **changes}
    return draw_responses(worlds.tiny_problems(), 3, policy=policy, reward=reward, **options)


def test_true_changes_are_those_of_whole_responses(policy, reward):
    """Scored from the branch on, in batches, they are what two full scores differ by."""
    responses = responses_to(policy, reward)
    swaps = choose_swaps(responses, 40, np.random.default_rng(0))
    points = {name: GradientPoint.parse(name, 0.02) for name in ("direct", "mixture:0.5")}
    measured = measure_swaps(responses, swaps, points, reward=reward, batch_size=5)
    assert list(measured.predicted_changes) == list(points)
    for swap, change in zip(swaps, measured.reward_changes, strict=True):
        response = responses[swap.response_index]
        ids = list(response.sample.response_ids)
        ids[swap.position] = int(response.draw_info.candidates[swap.position, swap.candidate_index])
        assert ids != response.sample.response_ids
        pair = [replace(response.sample, draw_info=None), replace(response.sample, response_ids=ids, draw_info=None)]
        before, after = reward.score(
            pair, reward.compute_prompt_caches(pair, FlopCounter()), flop_counter=FlopCounter()
        )[0]
        assert change == pytest.approx(after - before, abs=1e-4)
        assert measured.rewards[swap.response_index] == pytest.approx(before, abs=1e-4)


def test_predicted_changes_are_differences_of_the_gradient(policy, reward):
    responses = responses_to(policy, reward)
    swaps = choose_swaps(responses, 5, np.random.default_rng(0))
    points = {name: GradientPoint.parse(name) for name in ("hard", "direct", "direct+hard")}
    measured = measure_swaps(responses, swaps, points, reward=reward)
    samples, tables = zip(*((response.sample, response.draw_info.candidates) for response in responses), strict=True)
    caches = [response.prompt_caches for response in responses]
    whole = reward.compute_backward_gradient(samples, caches, tables, flop_counter=FlopCounter())
    bare = [replace(sample, draw_info=None) for sample in samples]
    scored = reward.score(bare, caches, flop_counter=FlopCounter(), return_caches=True)[1]
    direct = reward.compute_direct_gradient(samples, scored, tables, flop_counter=FlopCounter())
    both = whole  # of a log-ratio it has the direct part already
    if reward.kind == "scalar":
        both = [gradient + other for gradient, other in zip(whole, direct, strict=True)]
    for name, gradients in {"hard": whole, "direct": direct, "direct+hard": both}.items():
        for response, gradient, predicted in zip(responses, gradients, measured.predicted_changes[name], strict=True):
            is_own_token = torch.tensor(response.sample.response_ids)[:, None] == response.draw_info.candidates
            assert torch.allclose(predicted, gradient - gradient[is_own_token][:, None], atol=1e-4)


def test_swaps_are_distinct_allowed_and_spread_over_responses(policy):
    responses = responses_to(policy, toy(policy), candidate_min_p=0.0)
    swaps = choose_swaps(responses, 24, np.random.default_rng(0))
    assert len(set(swaps)) == len(swaps) == 24 and swaps == sorted(swaps, key=lambda swap: swap.response_index)
    assert all(responses[swap.response_index].allowed_swaps[swap.position, swap.candidate_index] for swap in swaps)
    counts = np.bincount([swap.response_index for swap in swaps], minlength=len(responses))
    assert counts.max() <= 4  # twice 24 / 12
    assert swaps == choose_swaps(responses, 24, np.random.default_rng(0))
    assert swaps != choose_swaps(responses, 24, np.random.default_rng(1))
    every = choose_swaps(responses, 10**6, np.random.default_rng(0))
    assert len(every) == sum(int(response.allowed_swaps.sum()) for response in responses)


def test_responses_do_not_depend_on_the_batch(policy, scalar_reward):
    small, large = (responses_to(policy, scalar_reward, batch_size=size) for size in (2, 64))
    assert [a.sample.response_ids for a in small] == [b.sample.response_ids for b in large]


# --- first errors -----------------------------------------------------------------------------------------


def make_wrong_response(
    allowed: list[list[int]], position: int, right: list[int], logp: Tensor | None = None
) -> WrongResponse:
    """A made-up wrong response of two or three positions and as many candidates as told; the first is its own."""
    table = torch.tensor(allowed, dtype=torch.bool)
    logp = torch.zeros(table.shape) if logp is None else logp
    known = DrawInfo(None, torch.zeros(table.shape, dtype=torch.long), logp)  # type: ignore[arg-type]
    sample = Sample(worlds.tiny_problems()[0], [1], [0] * len(allowed))
    return WrongResponse(
        0, SampledResponse(sample, known, 0, True, table, []), position, torch.tensor(right, dtype=torch.bool)
    )


def test_ranks_and_repairs_by_hand():
    wrong = make_wrong_response([[0, 1, 1], [0, 1, 0], [0, 0, 0]], 1, [0, 1, 0])
    table = torch.tensor([[9.0, 1.0, 2.0], [9.0, 3.0, 8.0], [9.0, 9.0, 9.0]])  # what is not allowed does not count
    assert wrong.rank_error_by_swap(table) == 0 and wrong.is_repaired(table) is True
    assert wrong.is_repaired_at_error(table) is wrong.is_correction_predicted(table) is True
    lower = torch.tensor([[0.0, 4.0, 0.0], [0.0, -3.0, 0.0], [0.0, 0.0, 0.0]])
    assert wrong.rank_error_by_swap(lower) == 1 and wrong.is_repaired(lower) is False
    assert wrong.is_repaired_at_error(lower) is True and wrong.is_correction_predicted(lower) is False


def test_an_error_where_nothing_may_be_proposed_is_never_found():
    wrong = make_wrong_response([[0, 1], [0, 0]], 1, [0, 0])
    assert not wrong.is_repairable
    assert wrong.rank_error_by_swap(torch.ones(2, 2)) == 2
    assert wrong.is_repaired_at_error(torch.ones(2, 2)) is False


def test_the_earlier_of_equal_positions_comes_first():
    responses = [make_wrong_response([[0, 1], [0, 1], [0, 1]], position, [0, 1]) for position in range(3)]
    assert [wrong.rank_error_by_swap(torch.zeros(3, 2)) for wrong in responses] == [0, 1, 2]


def test_entropy_ranks_the_least_certain_position_first():
    logp = torch.tensor([[0.5, 0.5, 0.0], [0.9, 0.1, 0.0], [0.4, 0.3, 0.3]]).log()
    responses = [make_wrong_response([[0, 1, 1]] * 3, position, [0, 1, 1], logp) for position in range(3)]
    assert [wrong.rank_error_by_entropy() for wrong in responses] == [1, 2, 0]


def test_a_gradient_that_points_at_the_first_error_finds_it(chains_policy, chains):
    reward = toy(chains_policy, planted(chains_policy))
    audit = run(chains_policy, reward, chains, sampling=DIGIT_CHAINS, samples_per_problem=4, reward_weight=100.0)
    finding = audit.gradient_points["hard"].first_error_scores
    assert audit.repairable_responses == audit.wrong_responses > 20  # else "repair" could not be 1
    assert finding.top1.value == finding.top3.value == finding.repair_at_error.value == finding.repair.value == 1.0
    assert audit.gradient_points["hard"].correct_token_predicted.value == 1.0
    assert audit.baseline.top1.value < 0.9 and audit.baseline.repair.value < 0.9
    assert audit.gradient_points["hard"].top1_gain.value == pytest.approx(1 - audit.baseline.top1.value)
    assert (audit.gradient_points["hard"].effect, audit.best_gradient_at) == ("helps", "hard")
    assert f"first in 100% (entropy {audit.baseline.top1.value:.0%})" in audit.conclusion


def test_a_gradient_against_the_repair_misleads(chains_policy, chains):
    reward = toy(chains_policy, planted(chains_policy, -1.0))
    problems = load_problems("digit_chains", split="train", max_problems=48)
    audit = run(chains_policy, reward, problems, sampling=DIGIT_CHAINS, samples_per_problem=8, reward_weight=100.0)
    assert (
        audit.gradient_points["hard"].first_error_scores.repair.value
        == audit.gradient_points["hard"].correct_token_predicted.value
        == 0
    )
    assert (audit.gradient_points["hard"].effect, audit.best_gradient_at) == ("misleads", None)


def test_noise_finds_first_errors_by_chance_alone(chains_policy, chains):
    audit = run(chains_policy, toy(chains_policy, noise()), chains, sampling=DIGIT_CHAINS, samples_per_problem=4)
    responses = draw_responses(
        chains,
        4,
        policy=chains_policy,
        reward=toy(chains_policy),
        sampling=DIGIT_CHAINS,
        top_k_candidates=16,
        candidate_min_p=0.02,
    )
    wrong_responses, _ = find_wrong_responses(chains, responses, chains_policy)
    assert len(wrong_responses) == audit.wrong_responses
    # Random scores rank a position as often first as it has candidates to draw from.
    chance = np.mean(
        [
            int(wrong.response.allowed_swaps[wrong.error_position].sum()) / int(wrong.response.allowed_swaps.sum())
            for wrong in wrong_responses
        ]
    )
    top1 = audit.gradient_points["hard"].first_error_scores.top1
    assert top1.low <= chance <= top1.high
    assert audit.gradient_points["hard"].effect != "helps"


def test_wrong_responses_are_finished_and_wrong(chains_policy, chains):
    reward = toy(chains_policy)
    responses = draw_responses(
        chains,
        4,
        policy=chains_policy,
        reward=reward,
        sampling=DIGIT_CHAINS,
        top_k_candidates=16,
        candidate_min_p=0.02,
    )
    wrong_responses, reason = find_wrong_responses(chains, responses, chains_policy)
    assert reason is None and {wrong.response_index for wrong in wrong_responses} < set(range(len(responses)))
    for wrong in wrong_responses:
        text = chains_policy.decode(wrong.response.sample.response_ids)
        assert wrong.response.finished and not text.endswith(f"#{wrong.response.sample.problem.answer}")
        is_correct = TokenLabeler(chains_policy).label_candidates(
            wrong.response.sample.problem, wrong.response.sample.response_ids, wrong.response.draw_info.candidates
        )
        columns = find_token_columns(wrong.response.draw_info.candidates, wrong.response.sample.response_ids)
        assert not is_correct[wrong.error_position, columns[wrong.error_position]]
        assert all(is_correct[position, columns[position]] for position in range(wrong.error_position))
        assert not wrong.correct_candidates[columns[wrong.error_position]]


def test_the_direct_gradient_of_a_log_ratio_helps(chains_policy, chains):
    reward = load_reward("logratio:data/tiny/clean", policy=chains_policy)
    audit = run(
        chains_policy, reward, chains, sampling=DIGIT_CHAINS, samples_per_problem=4, gradient_at=["direct", "hard"]
    )
    assert list(audit.gradient_points) == ["direct", "hard"]
    point = audit.gradient_points["direct"]
    assert point.sign_accuracy_informative.low > 0.75 and point.repair_gain.low > 0
    assert audit.best_gradient_at == "direct" and audit.conclusion.startswith("take the direct gradient: ")
    assert audit.to_dict()["gradient_points"]["direct"]["sign_accuracy"] == point.sign_accuracy.to_dict()


def test_without_wrong_responses_the_reason_is_named(chains_policy, chains):
    audit = run(chains_policy, toy(chains_policy), chains, sampling=Sampling(max_new_tokens=12), samples_per_problem=2)
    assert audit.no_labels_reason == "none of 48 responses is finished and wrong"
    assert audit.baseline is None and audit.gradient_points["hard"].first_error_scores is None
    assert audit.best_gradient_at == "hard"  # by swaps alone


# --- conclusions and refusals --------------------------------------------------------------------------------

LOW, MID, HIGH = Interval(-0.3, -0.4, -0.1), Interval(0.0, -0.1, 0.1), Interval(0.3, 0.1, 0.4)


@pytest.mark.parametrize(
    ("sign", "first", "repair", "effect"),
    [
        (Interval(0.6, 0.51, 0.7), None, None, "helps"),
        (Interval(0.6, 0.49, 0.7), None, None, "too few to tell"),
        (Interval(0.4, 0.3, 0.49), None, None, "misleads"),
        (Interval(0.5, 0.48, 0.53), None, None, "adds nothing"),
        (None, None, None, "too few to tell"),
        (None, MID, HIGH, "helps"),
        (None, HIGH, MID, "helps"),
        (None, LOW, HIGH, "helps"),
        (None, HIGH, LOW, "misleads"),
        (Interval(1.0, 1.0, 1.0), MID, MID, "too few to tell"),
        (None, MID, Interval(0.0, -0.01, 0.02), "too few to tell"),
        (None, Interval(0.0, -0.02, 0.01), Interval(0.0, -0.01, 0.02), "adds nothing"),
        (Interval(1.0, 1.0, 1.0), LOW, MID, "too few to tell"),
    ],
)
def test_the_rules_of_the_effect(sign, first, repair, effect):
    assert classify_effect(sign, first, repair) == effect


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"gradient_at": ["soft"]}, ["must be", "'soft'"]),
        ({"gradient_at": []}, ["at least one point"]),
        ({"samples_per_problem": 0}, ["at least one sample"]),
        ({"num_swaps": 0}, ["one swap"]),
        ({"sampling": Sampling(temperature=0, max_new_tokens=4), "candidate_min_p": 0.999}, ["no swap is possible"]),
    ],
)
def test_options_that_cannot_work_are_refused(policy, changes, words):
    worlds.refused(lambda: run(policy, toy(policy), **changes), *words)


def test_a_reward_that_does_not_vary_is_refused(policy):
    table = torch.ones(64, len(policy.forbidden_mask))
    # Responses of one length get equal sums.
    sampling = Sampling(max_new_tokens=1)
    worlds.refused(lambda: run(policy, toy(policy, table=table), sampling=sampling), "toy", "1 to all 32 responses")


def test_swaps_that_change_nothing_are_refused(policy):
    """This reward counts tokens, so that only lengths matter."""
    table = torch.ones(64, len(policy.forbidden_mask))
    worlds.refused(lambda: run(policy, toy(policy, table=table)), "none of", "swaps changes the reward toy")


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_what_is_not_finite_is_refused(policy, value):
    table = toy(policy).table.clone()
    table[0] = value
    worlds.refused(lambda: run(policy, toy(policy, table=table)), "the reward toy of a response is", "finite numbers")
    broken = toy(policy, lambda sample, candidates: torch.full(candidates.shape, value))
    worlds.refused(lambda: run(policy, broken), "the gradient of toy at hard is not finite")


def test_problems_that_cannot_be_read_are_refused(policy):
    worlds.refused(
        lambda: run(policy, toy(policy), [replace(worlds.tiny_problems()[0], question="1" * 200)]),
        "no problem can be run",
    )
