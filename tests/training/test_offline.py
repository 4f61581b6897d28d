"""Training: the same weights, interrupted or not; ids as they are; nothing lost when it is stopped."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
import yaml
from accelerate import PartialState
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import load_peft_weights
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM
from trl import SFTConfig

from nabla_trl.cli.quiet import quiet_libraries
from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.datasets import TrainingRows, build_preference_rows, build_sft_rows, build_weighted_rows
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter
from nabla_trl.training import callbacks
from nabla_trl.training import offline as offline_module
from nabla_trl.training.callbacks import EvaluationCallback, PolicyMeasurement, evaluation_mode, is_overoptimized
from nabla_trl.training.checkpoints import hash_traces
from nabla_trl.training.offline import (
    ON_POLICY,
    ONLINE_METHODS,
    TrainingResult,
    TrainOptions,
    build_training_rows,
    check_tokenizer,
    train_on_traces,
)
from nabla_trl.training.online import RewardScorer, train_online
from nabla_trl.training.peft import LoraArguments, find_last_checkpoint, load_trainable_model
from nabla_trl.training.stage import TrainStage
from nabla_trl.training.trainers import MAX_CONSTANT_REWARD_STEPS
from nabla_trl.utils import progress
from nabla_trl.utils.formatting import VERBOSE_VARIABLE

LORA = LoraArguments(lora_r=4, lora_alpha=8)
SAMPLING = Sampling(max_new_tokens=6)
SEARCH = SearchConfig(solver={"gradient_at": "hard"}, beta=1.0, max_rounds=6, max_new_tokens=12, top_k_candidates=8)


pytestmark = pytest.mark.usefixtures("little_to_collect")


@pytest.fixture(scope="module")
def base(bases: dict[str, str]) -> Policy:
    return load_policy(bases["llama"])


@pytest.fixture(scope="module")
def reward(base: Policy) -> Reward:
    return worlds.tiny_scalar(base)


@pytest.fixture(scope="module")
def traces(base: Policy, reward: Reward) -> list[Trace]:
    searched = run_search(worlds.tiny_problems(), policy=base, reward=reward, config=SEARCH)
    return [replace(trace, finished=True) if trace.response_ids else trace for trace in searched]


def settings(folder: Path, **options: Any) -> SFTConfig:
    return SFTConfig(str(folder / "trainer"), **worlds.TRAINER | {"max_steps": 4, "logging_steps": 1} | options)


def weights(folder: Path) -> dict[str, torch.Tensor]:
    if (folder / "adapter_config.json").exists():
        return load_peft_weights(str(folder), device="cpu")
    return load_file(folder / "model.safetensors")


def same(folder: Path, other_folder: Path) -> bool:
    folder_weights, other_weights = weights(folder), weights(other_folder)
    return folder_weights.keys() == other_weights.keys() and all(
        torch.equal(folder_weights[name], other_weights[name]) for name in folder_weights
    )


def offline(
    method: str, policy: str, training_rows: TrainingRows, folder: Path, tuning: str = "lora", **options: Any
) -> TrainingResult:
    return train_on_traces(
        method,
        policy,
        training_rows,
        folder / "out",
        beta=1.0,
        tuning=tuning,
        lora=LORA,
        config=settings(folder, **options),
        dtype="float32",
    )


def online(
    method: str,
    base: Policy,
    reward: Reward,
    folder: Path,
    *,
    tuning: str = "lora",
    callback: EvaluationCallback | None = None,
    problems: Sequence[Problem] | None = None,
    online_reward: str = "reward",
    **options: Any,
) -> TrainingResult:
    with AnswerChecker() as checker:
        return train_online(
            method,
            base,
            worlds.tiny_problems() if problems is None else problems,
            folder / "out",
            reward=reward,
            checker=checker,
            beta=0.5,
            sampling=SAMPLING,
            options=TrainOptions(tuning=tuning, num_generations=4, online_reward=online_reward),
            lora=LORA,
            config=settings(folder, **{"per_device_train_batch_size": 8, **options}),
            dtype="float32",
            callback=callback,
        )


# ------------------------------------------------------------------------------------------------------ rows


def test_selections_of_a_search(traces: list[Trace]) -> None:
    again = [replace(trace, seed=1, reward=trace.reward - 1, revisions=[]) for trace in traces]
    again = [replace(trace, initial_ids=trace.response_ids) for trace in again]
    best, skipped = build_sft_rows([*traces, *again], "best")
    assert len(best) == len(traces) and skipped["not the best"] == len(traces)
    for row, trace in zip(best, traces, strict=True):
        assert row["input_ids"] == trace.prompt_ids + trace.response_ids
    improved, _ = build_sft_rows(traces, "improved", include_unfinished=True)
    assert len(improved) == sum(revision.accepted for trace in traces for revision in trace.revisions)
    samples, _ = build_sft_rows([*traces, *again], "samples")
    assert len(samples) == 2 * len(traces)


def test_an_unfinished_step_on_the_way_is_not_trained_on(traces: list[Trace]) -> None:
    """States between the first and the last are responses of their own: those without an end are left out."""
    ends = {trace.response_ids[-1] for trace in traces}
    rows, skipped = build_sft_rows(traces, "improved")
    assert all(row["input_ids"][-1] in ends for row in rows)
    whole, _ = build_sft_rows(traces, "improved", include_unfinished=True)
    assert len(rows) + skipped["unfinished"] == len(whole)


def test_what_the_reward_could_not_read_is_not_trained_on(traces: list[Trace]) -> None:
    """Its weight would be exp(−∞), and not a number where a problem has nothing else."""
    unread = [replace(trace, reward=-math.inf, reward_initial=-math.inf, revisions=[]) for trace in traces[:1]]
    mixed = [*unread, *traces[1:]]
    for training_rows in (build_sft_rows(mixed), build_sft_rows(mixed, "samples"), build_weighted_rows(mixed, 1.0)):
        assert training_rows.skipped["unscorable"] == 1
        assert all(math.isfinite(row.get("weight", 1.0)) for row in training_rows.rows) and training_rows.rows


def test_weights_are_those_of_importance_sampling(traces: list[Trace]) -> None:
    rows, _ = build_weighted_rows(traces, beta=0.5, include_unfinished=True)
    index = 0
    for trace in traces:
        rewards = torch.tensor([reward for ids, reward in trace.list_incumbents() if ids], dtype=torch.float64)
        expected = (rewards / 0.5).softmax(0) * len(rewards)
        weights_of_rows = [row["weight"] for row in rows[index : index + len(rewards)]]
        assert weights_of_rows == pytest.approx(expected.tolist(), rel=1e-9)
        index += len(rewards)
    assert index == len(rows)


# -------------------------------------------------------------------------------------------- what is trained


@pytest.mark.parametrize(
    ("architecture", "tuning"), [*product(worlds.ARCHITECTURES, ["lora", "full"]), ("llama", "qlora")]
)
def test_what_is_saved_is_what_was_trained(
    architecture: str, tuning: str, bases: dict[str, str], traces: list[Trace], tmp_path: Path
) -> None:
    training_rows = build_sft_rows(traces)
    before = _likelihood(load_policy(bases[architecture]), training_rows)
    result = offline("sft", bases[architecture], training_rows, tmp_path, tuning, max_steps=8)
    output = tmp_path / "out"
    tuned = load_policy(str(output)) if tuning == "full" else load_policy(bases[architecture], adapter=str(output))
    assert _likelihood(tuned, training_rows) > before + 0.5
    assert result.steps == 8 and result.flops > 0 and result.tokens > 0
    assert (tmp_path / "log.jsonl").read_text().count("\n") >= 8


def test_gradients_of_a_four_bit_policy_are_those_of_its_dequantized_copy(
    bases: dict[str, str], tmp_path: Path
) -> None:
    """Also after a forward without autograd, before which a CPU with AVX512-BF16 would repack the weights."""
    four = load_trainable_model(bases["llama"], tuning="qlora", dtype="float32", config=settings(tmp_path)).eval()
    plain = AutoModelForCausalLM.from_pretrained(bases["llama"]).eval()
    quantized_modules, count = dict(four.named_modules()), 0
    with torch.no_grad():
        for name, module in plain.named_modules():
            if isinstance(quantized_modules[name], Linear4bit):
                module.weight.copy_(
                    dequantize_4bit(quantized_modules[name].weight.data, quantized_modules[name].weight.quant_state)
                )
                count += 1
    assert count == 14, "every projection of two layers, and not the head"
    ids = torch.arange(10)[None]
    with torch.no_grad():
        torch.testing.assert_close(four(ids).logits, plain(ids).logits, atol=1e-4, rtol=1e-4)
    slopes = []
    for model in (four, plain):
        leaf = model.get_input_embeddings()(ids).detach().requires_grad_(True)
        loss = model(inputs_embeds=leaf).logits.log_softmax(-1)[..., 3].sum()
        slopes.append(torch.autograd.grad(loss, leaf)[0])
    assert float(slopes[1].abs().max()) > 1e-2
    torch.testing.assert_close(slopes[0], slopes[1], atol=1e-4, rtol=1e-3)


def _likelihood(policy: Policy, training_rows: TrainingRows) -> float:
    """Mean log-likelihood of the trained tokens."""
    total = count = 0.0
    for row in training_rows.rows:
        ids = torch.tensor([row["input_ids"]])
        logp = policy.model(ids).logits[0, :-1].log_softmax(-1)
        picked = logp.gather(1, ids[0, 1:, None]).squeeze(1)[[label != -100 for label in row["labels"][1:]]]
        total, count = total + float(picked.detach().sum()), count + len(picked)
    return total / count


def test_weights_of_one_are_plain_sft(bases: dict[str, str], traces: list[Trace], tmp_path: Path) -> None:
    plain = build_sft_rows(traces, "samples")
    weighted = TrainingRows([row | {"weight": 1.0} for row in plain.rows], plain.skipped)
    sgd = {"optim": "sgd"}  # Adam makes large differences of small ones
    offline("sft", bases["llama"], plain, tmp_path / "plain", "full", **sgd)
    offline("reward-weighted", bases["llama"], weighted, tmp_path / "weighted", "full", **sgd)
    ours, theirs = weights(tmp_path / "plain" / "out"), weights(tmp_path / "weighted" / "out")
    for name in ours:
        torch.testing.assert_close(ours[name], theirs[name], rtol=1e-4, atol=1e-5)


def test_rows_of_weight_zero_do_not_count(bases: dict[str, str], traces: list[Trace], tmp_path: Path) -> None:
    rows = [row | {"weight": 1.0} for row in build_sft_rows(traces).rows]
    other = [row | {"weight": 0.0} for row in build_sft_rows(traces).rows]
    for row in other:
        row["labels"] = [label if label == -100 else (label + 1) % 20 for label in row["labels"]]
    half = len(rows) // 2
    kept = [row | {"weight": 0.0} if index >= half else row for index, row in enumerate(rows)]
    mixed = [other[index] if index >= half else row for index, row in enumerate(rows)]
    options = {"max_steps": 1, "per_device_train_batch_size": len(rows), "optim": "sgd"}
    for name, rows_of_run in (("kept", kept), ("mixed", mixed)):
        training_rows = TrainingRows(rows_of_run, build_sft_rows(traces).skipped)
        offline("reward-weighted", bases["llama"], training_rows, tmp_path / name, "full", **options)
    assert same(tmp_path / "kept" / "out", tmp_path / "mixed" / "out")


def test_a_response_is_not_cut(bases: dict[str, str], traces: list[Trace], tmp_path: Path) -> None:
    """What is longer than max_length is left out and counted: half a response teaches not to end."""
    training_rows = build_sft_rows(traces, "improved")
    lengths = sorted(len(row["input_ids"]) for row in training_rows.rows)
    longest = lengths[len(lengths) // 2]
    short = TrainingRows(
        [row for row in training_rows.rows if len(row["input_ids"]) <= longest], training_rows.skipped
    )
    left_out = len(training_rows.rows) - len(short.rows)
    assert short.rows and left_out
    result = offline("sft", bases["llama"], training_rows, tmp_path / "limited", max_length=longest)
    assert (result.rows, result.skipped["longer than max_length"]) == (len(short.rows), left_out)
    offline("sft", bases["llama"], short, tmp_path / "short")
    assert same(tmp_path / "limited" / "out", tmp_path / "short" / "out")
    worlds.refused(
        lambda: offline("sft", bases["llama"], training_rows, tmp_path / "none", max_length=3),
        "longer than max_length 3",
    )


def test_dpo_prefers_what_the_reward_preferred(bases: dict[str, str], traces: list[Trace], tmp_path: Path) -> None:
    training_rows = build_preference_rows(traces)
    offline("dpo", bases["llama"], training_rows, tmp_path, max_steps=12)
    before, after = load_policy(bases["llama"]), load_policy(bases["llama"], adapter=str(tmp_path / "out"))
    assert _margin(after, training_rows) > _margin(before, training_rows)


def _margin(policy: Policy, training_rows: TrainingRows) -> float:
    total = 0.0
    for row in training_rows.rows:
        for sign, name in ((1, "chosen_ids"), (-1, "rejected_ids")):
            ids = torch.tensor([row["prompt_ids"] + row[name]])
            logp = policy.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
            total += sign * float(logp[len(row["prompt_ids"]) - 1 :].detach().sum())
    return total


@pytest.mark.parametrize("method", ["rloo", "grpo"])
@pytest.mark.parametrize("tuning", ["lora", "full"])
def test_online_training_raises_the_reward(
    method: str, tuning: str, base: Policy, reward: Reward, tmp_path: Path
) -> None:
    result = online(method, base, reward, tmp_path, tuning=tuning, max_steps=20, learning_rate=1e-2)
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    rewards = [entry["rewards/reward/mean"] for entry in log if "rewards/reward/mean" in entry]
    assert sum(rewards[-4:]) > sum(rewards[:4])  # two steps go once through all problems
    assert all({"kl", "completions/clipped_ratio", "frac_reward_zero_std"} <= set(log[step]) for step in range(20))
    assert result.method_metrics["responses"] == 20 * 8 and result.epochs == 10 and result.flops > 0


def test_the_rewards_of_training_are_those_of_the_search(base: Policy, reward: Reward) -> None:
    problems = {problem.id: problem for problem in worlds.tiny_problems()}
    encoded = {name: base.encode(problem) for name, problem in problems.items()}
    scorer = RewardScorer(reward, problems, encoded)
    prompts = ["q1", "q0", "q1", "q2"]
    responses = [[1, 2, 3], [4], [5, 6], [7, 8, 9, 10]]
    samples = [Sample(problems[name], encoded[name], ids) for name, ids in zip(prompts, responses, strict=True)]
    expected, _ = reward.score(
        samples, reward.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter()
    )
    assert scorer(prompts, responses) == pytest.approx(expected, rel=1e-6)
    assert scorer.compute_flops_per_response() > 0


def test_the_terms_of_a_reward_are_logged_apart(base: Policy, tmp_path: Path) -> None:
    reward = worlds.tiny_logratio(base)
    online("rloo", base, reward, tmp_path, max_steps=2)
    entry = json.loads((tmp_path / "log.jsonl").read_text().splitlines()[0])
    parts = entry["rewards/reward/objective_0"] - entry["rewards/reward/objective_1"]
    assert parts == pytest.approx(entry["rewards/reward/mean"], rel=1e-4)


def test_a_verifier_can_be_the_reward(base: Policy, reward: Reward, tmp_path: Path) -> None:
    problems = [replace(problem, answer="7") for problem in worlds.tiny_problems()]
    blank = [replace(problems[0], id="blank", answer=None)]
    result = online("rloo", base, reward, tmp_path, problems=problems + blank, online_reward="verifier", max_steps=12)
    assert result.rows == len(problems) and result.skipped == {"no gold answer": 1}
    log = [json.loads(line) for line in (tmp_path / "log.jsonl").read_text().splitlines()]
    assert all(0 <= entry["rewards/verifier/mean"] <= 1 for entry in log if "rewards/verifier/mean" in entry)
    assert (
        result.method_metrics["groups_without_variance"] > 0
    )  # a random policy is hardly ever right, and that is no error


# ------------------------------------------------------------------------------------- stopped and gone on


class Killed(Exception):
    pass


@pytest.fixture
def kill_at(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Ends a training once the checkpoint of a step is written."""

    def arm(step: int) -> None:
        save = offline_module.TrainingTimeCallback.on_save

        def saved(self: Any, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
            save(self, args, state, control, **kwargs)
            if state.global_step == step:
                raise Killed

        monkeypatch.setattr(offline_module.TrainingTimeCallback, "on_save", saved)

    return arm


@pytest.mark.parametrize("method", ["sft", "dpo", "rloo", pytest.param(ON_POLICY, marks=pytest.mark.slow)])
def test_a_resumed_training_ends_with_the_same_weights(
    method: str,
    bases: dict[str, str],
    base: Policy,
    reward: Reward,
    traces: list[Trace],
    tmp_path: Path,
    kill_at: Callable[[int], None],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def train(folder: Path) -> TrainingResult:
        options = {"save_strategy": "steps", "save_steps": 2, "max_steps": 6, "lr_scheduler_type": "linear"}
        if method in ONLINE_METHODS:
            return online(method, base, reward, folder, **options)
        training_rows = build_training_rows(method, traces, sft_selection="best", beta=1.0)
        return offline(method, bases["llama"], training_rows, folder, **options, per_device_train_batch_size=2)

    undisturbed = train(tmp_path / "whole")
    kill_at(4)
    with pytest.raises(Killed):
        train(tmp_path / "parts")
    assert not (tmp_path / "parts" / "out").exists()
    monkeypatch.undo()
    resumed = train(tmp_path / "parts")
    assert same(tmp_path / "whole" / "out", tmp_path / "parts" / "out")
    assert (resumed.steps, resumed.tokens) == (undisturbed.steps, undisturbed.tokens)
    steps = [json.loads(line)["step"] for line in (tmp_path / "parts" / "log.jsonl").read_text().splitlines()]
    assert sorted(set(steps)) == list(range(1, 7))


def test_a_full_disk_leaves_the_checkpoint_before_intact(
    bases: dict[str, str], traces: list[Trace], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = {"save_strategy": "steps", "save_steps": 2}
    save = torch.save
    calls = []

    def full(obj: Any, f: Any, *args: Any, **kwargs: Any) -> None:
        if "checkpoint-4" in str(f):
            calls.append(f)
            raise OSError(28, "No space left on device")
        save(obj, f, *args, **kwargs)

    monkeypatch.setattr(torch, "save", full)
    message = worlds.refused(
        lambda: offline("sft", bases["llama"], build_sft_rows(traces), tmp_path, **options),
        "checkpoint of step 4",
        "No space left",
        "checkpoint-2 is intact",
    )
    assert calls, message
    monkeypatch.undo()
    trainer = tmp_path / "trainer"
    assert find_last_checkpoint(trainer) == trainer / "checkpoint-2" and not (trainer / "checkpoint-4").exists()
    offline("sft", bases["llama"], build_sft_rows(traces), tmp_path, **options)
    assert (tmp_path / "out" / "adapter_config.json").exists()


def test_a_checkpoint_that_was_cut_off_is_not_gone_on_from(tmp_path: Path) -> None:
    for step, text in ((2, "{}"), (4, "{"), (6, None)):
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        if text is not None:
            (folder / "trainer_state.json").write_text(text)
    assert find_last_checkpoint(tmp_path) == tmp_path / "checkpoint-2"
    assert find_last_checkpoint(tmp_path / "none") is None


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_reward_that_breaks_in_training_stops_it(
    bad: float, base: Policy, reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = RewardScorer.__call__
    calls = []

    def breaks(self: RewardScorer, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]:
        calls.append(prompts)
        values = score(self, prompts, responses)
        return [bad, *values[1:]] if len(calls) == 3 else values

    monkeypatch.setattr(RewardScorer, "__call__", breaks)
    worlds.refused(lambda: online("rloo", base, reward, tmp_path), f"a reward became {bad} at step 3", "checkpoint-2")
    assert find_last_checkpoint(tmp_path / "trainer") == tmp_path / "trainer" / "checkpoint-2"
    assert not (tmp_path / "out").exists()


def test_a_constant_reward_stops_the_training(
    base: Policy, reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RewardScorer, "__call__", lambda self, prompts, responses: [0.25] * len(prompts))
    worlds.refused(
        lambda: online("grpo", base, reward, tmp_path, max_steps=30),
        f"every reward of the last {MAX_CONSTANT_REWARD_STEPS} steps was 0.25",
        f"at step {MAX_CONSTANT_REWARD_STEPS}",
        f"checkpoint-{MAX_CONSTANT_REWARD_STEPS - 1} is kept",
    )


def test_a_response_the_reward_cannot_read_is_left_out(
    base: Policy, reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = RewardScorer.__call__

    def score_all_but_first(self: RewardScorer, prompts: Sequence[str], responses: Sequence[list[int]]) -> list[float]:
        return [-math.inf, *score(self, prompts, responses)[1:]]

    monkeypatch.setattr(RewardScorer, "__call__", score_all_but_first)
    result = online("rloo", base, reward, tmp_path)
    assert result.method_metrics["unscorable_responses"] == 4
    assert all(weight.isfinite().all() for weight in weights(tmp_path / "out").values())


# ------------------------------------------------------------------------------------------- the callback


def reading(step: int, right: float, reward: float, count: int = 40) -> PolicyMeasurement:
    flags = [index < right * count for index in range(count)]
    return PolicyMeasurement(step, flags, [reward] * count, [0.0] * count, [5] * count, [False] * count)


def test_overoptimization_is_reward_up_and_accuracy_down_beyond_chance() -> None:
    best = reading(10, 0.9, 1.0)
    assert is_overoptimized(best, reading(20, 0.5, 2.0))
    assert not is_overoptimized(best, reading(20, 0.5, 0.5)), "the reward fell, too"
    assert not is_overoptimized(best, reading(20, 0.875, 2.0)), "one problem of 40 is chance"
    assert not is_overoptimized(best, reading(20, 1.0, 2.0))


def make_callback(base: Policy, reward: Reward, *, every: int = 2, stop: bool = False) -> EvaluationCallback:
    problems = [replace(problem, answer="7") for problem in worlds.tiny_problems()]
    return EvaluationCallback(
        problems,
        base_policy=base,
        reward=reward,
        max_new_tokens=6,
        callback_steps=every,
        stop_on_overoptimization=stop,
        checker=AnswerChecker(),
    )


def test_an_overoptimized_run_ends_with_the_weights_of_the_best_measurement(
    base: Policy, reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = {0: reading(0, 0.5, 0.0), 2: reading(2, 0.9, 1.0), 4: reading(4, 0.2, 2.0)}
    monkeypatch.setattr(EvaluationCallback, "measure", lambda self, step: measurements[step])
    online("rloo", base, reward, tmp_path / "short", max_steps=2)
    callback = make_callback(base, reward, stop=True)
    result = online("rloo", base, reward, tmp_path / "long", max_steps=20, callback=callback)
    assert result.steps == 4
    assert result.stop_reason == "over-optimized at step 4: reward 1 → 2, accuracy 0.900 → 0.200 since step 2"
    assert same(tmp_path / "short" / "out", tmp_path / "long" / "out")


def test_a_resumed_run_is_compared_with_the_best_measurement_before(
    base: Policy, reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kill_at: Callable[[int], None]
) -> None:
    measurements = {
        0: reading(0, 0.5, 0.0),
        2: reading(2, 0.9, 1.0),
        4: reading(4, 0.85, 1.5),
        6: reading(6, 0.5, 2.0),
    }
    monkeypatch.setattr(EvaluationCallback, "measure", lambda self, step: measurements[step])
    save = {"save_strategy": "steps", "save_steps": 2, "save_total_limit": 1, "max_steps": 8}
    online("rloo", base, reward, tmp_path / "short", max_steps=2)
    kill_at(4)
    with pytest.raises(Killed):
        online("rloo", base, reward, tmp_path / "long", callback=make_callback(base, reward, stop=True), **save)
    kill_at(-1)
    result = online("rloo", base, reward, tmp_path / "long", callback=make_callback(base, reward, stop=True), **save)
    assert result.stop_reason == "over-optimized at step 6: reward 1 → 2, accuracy 0.900 → 0.500 since step 2"
    assert same(tmp_path / "short" / "out", tmp_path / "long" / "out")


def test_where_nothing_was_better_than_the_untrained_policy_it_says_so(
    base: Policy, reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = {0: reading(0, 0.9, 0.0), 2: reading(2, 0.2, 1.0)}
    monkeypatch.setattr(EvaluationCallback, "measure", lambda self, step: measurements[step])
    result = online("rloo", base, reward, tmp_path, max_steps=4, callback=make_callback(base, reward, stop=True))
    assert result.steps == 2 and result.stop_reason.endswith(
        "since step 0, the untrained policy; the weights kept are the last"
    )


def test_without_the_flag_an_overoptimized_run_goes_on_and_says_so(
    base: Policy, reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    measurements = {0: reading(0, 0.9, 0.0), 2: reading(2, 0.2, 1.0), 4: reading(4, 0.2, 2.0)}
    monkeypatch.setattr(EvaluationCallback, "measure", lambda self, step: measurements[step])
    result = online("rloo", base, reward, tmp_path, max_steps=4, callback=make_callback(base, reward))
    assert result.steps == 4 and "over-optimized at step 4" in result.stop_reason


def test_the_callback_evaluates_the_policy_and_leaves_training_alone(
    base: Policy, reward: Reward, tmp_path: Path
) -> None:
    callback = make_callback(base, reward)
    online("rloo", base, reward, tmp_path / "read", callback=callback)
    online("rloo", base, reward, tmp_path / "unread")
    assert same(tmp_path / "read" / "out", tmp_path / "unread" / "out")
    log = [json.loads(line) for line in (tmp_path / "read" / "log.jsonl").read_text().splitlines()]
    evaluated = [entry for entry in log if "callback/kl" in entry]
    assert [entry["step"] for entry in evaluated] == [0, 2, 4]
    assert evaluated[0]["callback/kl"] == pytest.approx(0, abs=1e-4), "the policy has not moved yet"
    assert evaluated[-1]["callback/kl"] != pytest.approx(0, abs=1e-4)
    assert {"callback/accuracy", "callback/reward", "callback/length", "callback/clipped_ratio"} <= set(evaluated[0])


def test_decoding_puts_the_training_mode_back(base: Policy) -> None:
    model = worlds.tiny_model(seed=3, width=64).train()
    with evaluation_mode(model, base) as policy:
        assert not model.training and not torch.is_grad_enabled() and policy.model is model
    assert model.training and torch.is_grad_enabled()


def test_log_likelihoods_are_those_of_a_plain_forward(base: Policy) -> None:
    samples = [worlds.sample(base, problem, "12+3") for problem in worlds.tiny_problems()]
    for value, sample in zip(callbacks.compute_log_likelihoods(base, samples), samples, strict=True):
        ids = torch.tensor([sample.prompt_ids + sample.response_ids])
        logp = base.model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])
        assert value == pytest.approx(float(logp[len(sample.prompt_ids) - 1 :].sum()), abs=1e-4)


# ------------------------------------------------------------------------------------------------ refusals


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"tuning": "half"}, ["tuning must be one of full, lora, qlora"]),
        ({"sft_selection": "worst"}, ["sft_selection must be one of best, improved, samples"]),
        ({"num_generations": 1}, ["num_generations must be at least 2"]),
        ({"stop_on_overoptimization": True}, ["needs evaluations during training", "max_callback_problems"]),
    ],
)
def test_options_that_mean_nothing_are_refused(options: dict[str, Any], words: list[str]) -> None:
    worlds.refused(lambda: TrainOptions(**options), *words)


def test_traces_without_an_acceptance_are_refused(traces: list[Trace]) -> None:
    flat = [replace(trace, revisions=[], response_ids=trace.initial_ids) for trace in traces]
    for method in ("sft", "dpo"):
        choose = partial(build_training_rows, method, flat, sft_selection="best", beta=1.0)
        worlds.refused(choose, "was accepted", "raise max_rounds")
    assert build_training_rows("sft", flat, sft_selection="samples", beta=1.0).rows, "samples need no search"


def test_traces_of_another_tokenizer_are_refused(traces: list[Trace], bases: dict[str, str]) -> None:
    check_tokenizer(traces, bases["llama"])
    other = [replace(trace, meta=trace.meta | {"tokenizer_hash": "0123"}) for trace in traces]
    worlds.refused(
        lambda: check_tokenizer(other, bases["llama"]), "another tokenizer", "0123", "generate the traces again"
    )


def test_a_step_must_hold_whole_groups(base: Policy, reward: Reward, tmp_path: Path) -> None:
    worlds.refused(
        lambda: online("rloo", base, reward, tmp_path, per_device_train_batch_size=6),
        "6 responses",
        "whole groups of num_generations 4",
    )


def test_a_training_prints_its_progress_and_nothing_else(
    bases: dict[str, str], traces: list[Trace], tmp_path: Path, capfd: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(progress, "_LINE_SECONDS", 0.0)
    quiet_libraries()  # as every command does
    offline("sft", bases["llama"], build_sft_rows(traces), tmp_path / "quiet", max_steps=3)
    out, err = capfd.readouterr()
    assert out == "" and [line.partition(",")[0] for line in err.splitlines()] == [
        "train sft: step 1 of 3",
        "train sft: step 2 of 3",
    ]
    assert "loss " in err and "s/step" in err
    monkeypatch.setenv(VERBOSE_VARIABLE, "1")
    offline("sft", bases["llama"], build_sft_rows(traces), tmp_path / "verbose", max_steps=3, disable_tqdm=True)
    out, err = capfd.readouterr()
    assert out.count("'loss':") == 3 and err == ""


def test_nothing_trainable_is_refused(bases: dict[str, str], traces: list[Trace], tmp_path: Path) -> None:
    lora = LoraArguments(lora_target_modules=["no_such_layer"])
    with pytest.raises(ValueError, match="no_such_layer"):
        train_on_traces(
            "sft",
            bases["llama"],
            build_sft_rows(traces),
            tmp_path / "out",
            beta=1.0,
            tuning="lora",
            lora=lora,
            config=settings(tmp_path),
            dtype="float32",
        )


def stage(folder: Path, base: Policy, reward: Reward, bases: dict[str, str], **changes: Any) -> TrainStage:
    values: dict[str, Any] = {
        "run_dir": folder,
        "policy": bases["llama"],
        "dtype": "float32",
        "problems": worlds.tiny_problems(),
        "callback_problems": [],
        "search_config": replace(SEARCH, max_new_tokens=6),
        "options": TrainOptions(num_generations=4),
        "lora": LORA,
        "sft_config": settings(folder, per_device_train_batch_size=8, save_strategy="steps", save_steps=2),
        "load_models": lambda: (base, reward),
        "search_settings": {"reward": "r"},
        "checker": AnswerChecker(),
        "process_state": PartialState(),
        "command_options": {"learning_rate": 0.005},
        "command": "distill",
    }
    return TrainStage(**values | changes)


def test_training_is_gone_on_with_only_as_it_was_begun(
    base: Policy, reward: Reward, bases: dict[str, str], tmp_path: Path, kill_at: Callable[[int], None]
) -> None:
    kill_at(2)
    with pytest.raises(Killed):
        stage(tmp_path, base, reward, bases).train_method("rloo")
    warmer = settings(tmp_path, per_device_train_batch_size=8, learning_rate=1e-4)
    worlds.refused(
        lambda: stage(tmp_path, base, reward, bases, sft_config=warmer).train_method("rloo"),
        "made with other settings",
        "learning_rate '0.0001' (was '0.005')",
    )
    shorter = settings(tmp_path, per_device_train_batch_size=8, max_grad_norm=0.1)
    worlds.refused(
        lambda: stage(tmp_path, base, reward, bases, sft_config=shorter).train_method("rloo"), "max_grad_norm '0.1'"
    )
    other = replace(SEARCH, beta=0.25, max_new_tokens=6)
    worlds.refused(
        lambda: stage(
            tmp_path, base, reward, bases, search_config=other, search_settings={"reward": "r", "beta": "0.25"}
        ).train_method("rloo"),
        "beta '0.25' (was None)",
    )


def test_a_training_is_of_its_own_problems_traces_and_call(
    base: Policy, reward: Reward, bases: dict[str, str], traces: list[Trace], tmp_path: Path, kill_at: Callable
) -> None:
    """The folder may hold traces of more problems, and get more of them while a training waits to go on."""

    def write(new_traces: list[Trace], rank: int) -> None:
        with TraceWriter(tmp_path / "traces", rank=rank) as writer:
            for trace in new_traces:
                writer.add(trace)

    write(traces, 0)
    problems = worlds.tiny_problems()[:2]
    options = TrainOptions(sft_selection="improved")
    few = partial(stage, tmp_path, base, reward, bases, problems=problems, options=options)
    kill_at(2)
    with pytest.raises(Killed):
        few().train_method("sft")
    write([replace(trace, seed=1) for trace in traces], 1)
    worlds.refused(lambda: few().train_method("sft"), "made with other settings", "traces_hash")
    (tmp_path / "traces/traces-00001-00000.parquet").unlink()
    result = few(command_options={"learning_rate": 0.005, "stages": "train"}).train_method("sft")
    mine = [trace for trace in traces if trace.problem_id in {problem.id for problem in problems}]
    assert result is not None and result.rows == len(build_sft_rows(mine, "improved").rows) < len(
        build_sft_rows(traces, "improved").rows
    )
    note = json.loads((tmp_path / "trained/sft/train.json").read_text())
    assert (note["traces_hash"], note["command"]) == (hash_traces(tmp_path), "distill")
    assert note["trace_flops"] == pytest.approx(sum(trace.cost.flops for trace in mine))
    assert yaml.safe_load((tmp_path / "trained/sft/config.yaml").read_text())["stages"] == "train"


def test_what_is_not_given_is_chosen_for_the_method_and_said(
    base: Policy, reward: Reward, bases: dict[str, str], tmp_path: Path
) -> None:
    sized = replace(SEARCH, beta=None, solver={"gradient_at": "hard", "target_kl": 2.0})
    free = stage(tmp_path, base, reward, bases, search_config=sized, command_options={})
    assert (
        free.beta == 1.0
        and free.describe_defaults("sft") == "learning_rate 0.0002 (TRL's for sft, × 10 for an adapter)"
    )
    assert free.describe_defaults("dpo").startswith(
        "beta 1 (the search has a KL target, and no beta for the training)"
    )
    assert free.build_config("rloo").learning_rate == pytest.approx(1e-5)
    full = stage(tmp_path, base, reward, bases, options=TrainOptions(tuning="full"), command_options={})
    assert full.describe_defaults("dpo") == "learning_rate 1e-06 (TRL's for dpo)"
    given = stage(tmp_path, base, reward, bases)
    assert given.describe_defaults("dpo") == "" and given.build_config("dpo").learning_rate == 0.005
    samples = TrainOptions(sft_selection="samples")
    worlds.refused(
        lambda: stage(tmp_path, base, reward, bases, options=samples).check_method("sft"), "acceptance metropolis"
    )


def test_the_callback_needs_graded_problems(
    base: Policy, reward: Reward, bases: dict[str, str], tmp_path: Path
) -> None:
    options = TrainOptions(num_generations=4, max_callback_problems=3)
    graded = [replace(problem, answer="1") for problem in worlds.tiny_problems()[:2]]
    worlds.refused(
        lambda: stage(tmp_path, base, reward, bases, options=options, callback_problems=graded).train_method("rloo"),
        "only 2 training problems",
        "lower max_train_problems",
    )


def test_full_weights_are_not_held_to_the_base_of_an_adapter(
    base: Policy, reward: Reward, bases: dict[str, str], traces: list[Trace], tmp_path: Path
) -> None:
    """TRL loads the reference by the name of the model's configuration, which is the base's."""
    offline("sft", bases["llama"], build_sft_rows(traces), tmp_path / "first")
    adapter = str(tmp_path / "first" / "out")
    words = ("is an adapter", "reference", "nabla-trl export --merge")
    pairs = build_preference_rows(traces)
    worlds.refused(lambda: offline("dpo", adapter, pairs, tmp_path / "dpo", tuning="full"), *words)
    worlds.refused(lambda: online("rloo", load_policy(adapter), reward, tmp_path / "rloo", tuning="full"), *words)
    asked = stage(
        tmp_path, base, reward, bases, policy=adapter, options=TrainOptions(tuning="full", num_generations=4)
    )
    worlds.refused(lambda: asked.check_method("grpo"), *words)
    asked.check_method("sft")


def test_what_cannot_be_trained_is_refused_before_anything_is_loaded(
    base: Policy, reward: Reward, bases: dict[str, str], tmp_path: Path
) -> None:
    def check(method: str, **changes: Any) -> None:
        stage(tmp_path, base, reward, bases, **changes).check_method(method)

    worlds.refused(lambda: check("rloo", options=TrainOptions(num_generations=3)), "8 responses", "whole groups")
    worlds.refused(lambda: check("sft", dtype="bfloat16"), "set bf16 true")
    greedy = replace(SEARCH, temperature=0.0)
    worlds.refused(lambda: check("grpo", search_config=greedy), "temperature must be above 0")
    evaluated = TrainOptions(num_generations=4, max_callback_problems=3)
    worlds.refused(lambda: check("sft", options=evaluated), "only 0 training problems", "lower max_train_problems")
