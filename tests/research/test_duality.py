"""The recipe on the smallest world: what samples π* is told from what does not, and rows of trained policies."""

from __future__ import annotations

import importlib
import json
import shutil
from collections import Counter
from dataclasses import asdict
from pathlib import Path
from typing import Any

import duality_report
import numpy as np
import pytest
import worlds
from distributions import DistributionMetrics, EnumeratedCase, compute_empirical_distribution, compute_total_variation
from duality_report import DualityRow, NoiseStatistics
from enumeration import EnumeratedResponses

ROOT = Path(__file__).parents[2]
OPTIONS = {
    **{"num_symbols": 2, "num_prompts": 1, "max_new_tokens": 3, "hidden_size": 16, "num_layers": 1},
    **{"world_seed": 1, "weight_std": 0.4, "reward_std": 1.2},
    **{"best_of_n": "2 4", "num_chains": 60, "max_rounds": 12, "device": "cpu"},
}
RUN = [word for name, value in OPTIONS.items() for word in (f"--{name}", *str(value).split())]


def recipe() -> Any:
    return importlib.import_module("duality")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A finished run."""
    folder = tmp_path_factory.mktemp("duality")
    recipe().main([*RUN, "--output_dir", str(folder)])
    return folder


def rows(folder: Path) -> dict[tuple[str, int | None], dict[str, Any]]:
    found = json.loads((folder / "duality.json").read_text(encoding="utf-8"))
    return {(row["method"], row["size"]): row for row in found["rows"]}


def test_metropolis_samples_the_optimum_and_greedy_does_not(folder: Path) -> None:
    found = rows(folder)
    for more in ("", " + gradient"):
        ended, greedy = found[f"metropolis{more}", 12], found[f"greedy search{more}", 12]
        assert ended["measures"]["kl_optimum"] < 2 * ended["noise"]["kl"] and "samples π*" in ended["conclusion"]
        assert greedy["measures"]["kl_optimum"] > 3 * greedy["noise"]["kl"] and "overshoots" in greedy["conclusion"]
        spent = [found[f"metropolis{more}", steps]["flops"] for steps in (1, 2, 4, 8, 12)]
        assert spent == sorted(set(spent))
    assert found["π", None]["measures"]["kl_policy"] == pytest.approx(0, abs=1e-9)
    assert found["best of N", 4]["frontier_reward"] > found["best of N", 4]["measures"]["reward"]
    assert found["π", None]["flops"] < found["best of N", 2]["flops"] < found["best of N", 4]["flops"]


def test_pages_and_figures_are_there(folder: Path) -> None:
    text = (folder / "duality.md").read_text(encoding="utf-8")
    for words in ("| π* |", "best of N @4", "- metropolis: π* from ", "15 responses each"):
        assert words in text
    assert (folder / "duality.png").stat().st_size > 10_000
    assert not list(folder.rglob("*.tmp*"))


def study_of(folder: Path) -> Any:
    """The study of a finished run, for its models and laws."""
    module = recipe()
    options = [*RUN, "--output_dir", str(folder)]
    args, world = module.parse_dataclasses([module.DualityArguments, module.WorldArguments], options)
    return module.DualityStudy(args, *module.load_or_make_world(args, world))


def test_chains_are_not_run_again(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(folder, tmp_path / "again")
    module, out = recipe(), ["--output_dir", str(tmp_path / "again")]
    monkeypatch.setattr(module, "run_search", None)
    module.main([*RUN, *out])
    assert rows(tmp_path / "again") == rows(folder)
    worlds.refused(lambda: module.main([*RUN, *out, "--beta", "2"]), "beta '2.0' (was '1.0')")
    worlds.refused(lambda: module.main([*RUN, *out, "--reward_std", "2"]), "reward_std '2.0' (was '1.2')")


def test_rows_of_trained_policies(folder: Path) -> None:
    """One that training left as it was has the law and the price of π."""
    checkpoint = recipe().PolicyCheckpoint("rloo", str(folder / "world" / "policy"), 3e9)
    [own] = study_of(folder).compute_trained_rows([checkpoint])
    policy = rows(folder)["π", None]
    assert asdict(own.measures) == pytest.approx(policy["measures"], abs=1e-12) and own.flops == policy["flops"]
    assert (own.kind, own.training_flops, own.is_optimum) == ("trained", 3e9, False)


def test_policies_are_trained_once_and_stand_by_what_they_cost(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(folder, tmp_path / "again")
    train = "--train_methods sft reward-weighted dpo soft-targets rloo grpo on-policy-distillation "
    train += "--train_batch_size 8 --train_num_generations 4 "
    train += "--train_steps 4 --train_num_checkpoints 2 --train_samples_per_prompt 16 --train_max_rounds 2"
    command = [*RUN, "--output_dir", str(tmp_path / "again"), *train.split()]
    module = recipe()
    module.main(command)
    before = json.loads((tmp_path / "again/duality.json").read_text(encoding="utf-8"))["rows"]
    trained = [row for row in before if row["kind"] == "trained"]
    methods = ["sft", "reward-weighted", "dpo", "dpo, Bradley-Terry labels", "soft-targets"]
    methods += ["soft-targets, reverse KL", "rloo", "grpo", "on-policy-distillation"]
    assert [row["method"] for row in trained] == [name for name in methods for _ in range(2)]
    for first, last in zip(trained[::2], trained[1::2], strict=True):
        assert 0 < first["training_flops"] < last["training_flops"]
        assert first["measures"] != last["measures"], first["method"]
    monkeypatch.setattr(importlib.import_module("duality_training"), "run_search", None)
    monkeypatch.setattr(module, "run_search", None)
    module.main(command)
    assert json.loads((tmp_path / "again/duality.json").read_text(encoding="utf-8"))["rows"] == before
    worlds.refused(
        lambda: module.main([*command, "--train_learning_rate", "1"]), "train_learning_rate '1.0' (was '0.001')"
    )


def test_what_cannot_be_is_refused(tmp_path: Path) -> None:
    module, out = recipe(), ["--output_dir", str(tmp_path / "out")]
    worlds.refused(lambda: module.main([*out, "--policy", "P"]), "policy, reward and dataset belong together")
    worlds.refused(lambda: module.main([*out, "--num_symbols", "40"]), "num_symbols must be 2 to 26")
    own = [
        "--policy",
        "data/tiny/policy",
        "--reward",
        "data/tiny/reward",
        "--dataset",
        "digit_chains",
        "--device",
        "cpu",
    ]
    worlds.refused(lambda: module.main([*out, *own]), "3,368,421 responses of up to 5 tokens", "at most 20,000")
    # … and can be mended in the same folder, as nothing was made there yet.
    worlds.refused(lambda: module.main([*out, *own, "--max_new_tokens", "4"]), "168,421 responses of up to 4 tokens")
    worlds.refused(lambda: module.main([*out, *own, "--world_seed", "7"]), "no world is made")


def test_verdicts_follow_the_numbers() -> None:
    best = DistributionMetrics(reward=2.0, kl_policy=1.0, kl_optimum=0.0, tv_optimum=0.0, regularized_reward=1.0)

    def row(size: int, kl: float, moved: float, p_value: float | None = None) -> DualityRow:
        noise = None if p_value is None else NoiseStatistics(kl=0.3, kl_sd=0.01, tv=0.1, p_value=p_value)
        return DualityRow(
            "m", duality_report.TEST_TIME, size, DistributionMetrics(1.0, moved, kl, 0.1, 0.0), None, 1e6, noise=noise
        )

    assert duality_report.conclude_row(row(1, 0.05, 1.0), best) == "is π* to 0.050 nats"
    assert "falls short, KL(q‖π) 0.20 against 1.00" in duality_report.conclude_row(row(1, 0.5, 0.2), best)
    assert "overshoots" in duality_report.conclude_row(row(1, 0.5, 2.0), best)
    assert "as far from π as π* is" in duality_report.conclude_row(row(1, 0.5, 1.05), best)
    assert "within the noise" in duality_report.conclude_row(row(1, 0.31, 1.3, 0.4), best)
    assert "0.20 nats off beyond noise; falls short, KL(q‖π) 0.70" in duality_report.conclude_row(
        row(1, 0.5, 1.0, 0.01), best
    )
    far, near = row(1, 0.9, 1.0, 0.01), row(2, 0.31, 1.0, 0.5)
    assert duality_report.conclude_method([far, near]) == "m: π* from 2 on, within noise"
    assert duality_report.conclude_method([near, far]) == "m: 0.01 nats off at its nearest (2), 0.60 at its end (1)"
    assert duality_report.conclude_final_points([far, near]) == "π* at the end: m"


def test_trained_rows_have_a_panel_of_their_own(tmp_path: Path) -> None:
    one = DistributionMetrics(1.0, 1.0, 0.05, 0.1, 0.0)
    made = [
        DualityRow("best of N", duality_report.TEST_TIME, 2, one, 1.0, 1e6),
        DualityRow("sft", duality_report.TRAINED_POLICY, None, one, 1.0, 1e6, training_flops=1e12),
    ]
    sizes = []
    for some in (made[:1], made):
        duality_report.plot_duality(tmp_path / "duality.png", some, {"subject": "two laws"})
        sizes.append((tmp_path / "duality.png").stat().st_size)
    assert sizes[1] != sizes[0] and np.prod(sizes)


def control_kernel(tree: EnumeratedResponses, case: EnumeratedCase) -> np.ndarray:
    """[N, N] chances of one Metropolis step without the gradient, from every response to every other.

    A branch is drawn by π(v|y_<t) among all (t, v ≠ y_t), whose sum is S(y), and its suffix by π: y' is proposed with
    π(y')/π(what it shares with y)/S(y), so that all but S cancels in the ratio of Hastings.
    """
    begun: Counter[tuple[int, ...]] = Counter()
    for response, mass in zip(tree.responses, case.policy_probs, strict=True):
        for size in range(len(response) + 1):
            begun[response[:size]] += mass
    moves = np.array([sum(1 - begun[y[: t + 1]] / begun[y[:t]] for t in range(len(y))) for y in tree.responses])
    kernel = np.zeros((len(moves), len(moves)))
    for row, one in enumerate(tree.responses):
        for column, other in enumerate(tree.responses):
            if row != column:
                shared = next(t for t, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
                ratio = np.exp((case.rewards[column] - case.rewards[row]) / case.beta) * moves[row] / moves[column]
                kernel[row, column] = case.policy_probs[column] / begun[one[:shared]] / moves[row] * min(1.0, ratio)
        kernel[row, row] = 1 - kernel[row].sum()
    return kernel


def test_chains_follow_their_exact_law_at_every_step(folder: Path) -> None:
    """… not only at the end: the control's kernel can be written down, and leaves π* as it is."""
    study = study_of(folder)
    [tree], [case] = study.enumerated, study.cases
    kernel = control_kernel(tree, case)
    assert case.optimum_probs @ kernel == pytest.approx(case.optimum_probs, abs=1e-12)
    config = study.args.make_search_configs(len(study.policy.forbidden_mask))["metropolis"]
    steps = [1, 2, 4, 8, 12]
    counts, _ = study.count_chain_states(tree, config, steps, folder / "chains" / "search-1-prompt-0.npz")
    law = case.policy_probs
    for step in range(1, 13):
        law = law @ kernel
        if step in steps:
            noise = [compute_total_variation(rng_law(law, study.args.num_chains, seed), law) for seed in range(40)]
            assert compute_total_variation(compute_empirical_distribution(counts[steps.index(step)]), law) <= max(
                noise
            )
    assert case.compute_metrics(law).kl_optimum < 0.02 < case.compute_metrics(case.policy_probs).kl_optimum


def rng_law(law: np.ndarray, draws: int, seed: int) -> np.ndarray:
    """A law counted from so many draws."""
    return compute_empirical_distribution(np.random.default_rng(seed).multinomial(draws, law / law.sum()))
