"""Responses of rloo and grpo come from π alone, here and from vLLM."""

from __future__ import annotations

import json
import shutil
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
import worlds
from trl import GRPOConfig, RLOOConfig, SFTConfig
from trl.trainer import grpo_trainer, rloo_trainer

from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import Sampling
from nabla_trl.rewards.reward import Reward
from nabla_trl.training import rollouts as rollouts_module
from nabla_trl.training import trainers
from nabla_trl.training.offline import TrainOptions
from nabla_trl.training.online import train_online
from nabla_trl.training.peft import LoraArguments
from nabla_trl.training.rollouts import RolloutOptions, build_generation_kwargs
from nabla_trl.training.trainers import check_seeds

pytestmark = pytest.mark.usefixtures("little_to_collect")
# Each of these changed the draws or ended the training with a traceback.
GENERATION_CONFIGS: list[dict[str, Any]] = [
    {"min_p": 0.99},
    {"min_new_tokens": 6, "bad_words_ids": [[3]], "no_repeat_ngram_size": 1},
    {"num_beams": 2, "num_return_sequences": 2},
    {"stop_strings": ["1"], "max_time": 1e-6, "return_dict_in_generate": True},
    {"sequence_bias": [[[5], 9.0]], "begin_suppress_tokens": [6], "guidance_scale": 3.0},
    {"watermarking_config": {"greenlist_ratio": 0.1, "bias": 9.0}, "typical_p": 0.1, "top_h": 0.2},
]


def train_one_step(policy: str, folder: Path, method: str, tuning: str = "lora", **options: Any) -> None:
    base = load_policy(policy)
    with AnswerChecker() as checker:
        train_online(
            method,
            base,
            worlds.tiny_problems(),
            folder / "out",
            reward=worlds.tiny_scalar(base),
            checker=checker,
            beta=0.5,
            sampling=Sampling(max_new_tokens=6),
            options=TrainOptions(tuning=tuning, num_generations=4, **options),
            lora=LoraArguments(lora_r=4),
            config=SFTConfig(
                str(folder / "trainer"), **worlds.TRAINER | {"max_steps": 1, "per_device_train_batch_size": 8}
            ),
            dtype="float32",
        )


@pytest.fixture
def drawn(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """The responses of all trainings so far."""
    responses: list[list[int]] = []
    score = trainers._OnlineTrainerMixin._calculate_rewards

    def record(self: Any, inputs: Any, prompts: Any, completions: Any, ids: list[list[int]]) -> torch.Tensor:
        responses.extend(ids)
        return score(self, inputs, prompts, completions, ids)

    monkeypatch.setattr(trainers._OnlineTrainerMixin, "_calculate_rewards", record)
    return responses


@pytest.mark.parametrize(("method", "tuning"), [("rloo", "lora"), ("grpo", "full")])
def test_the_generation_config_of_the_policy_changes_no_draw(
    method: str, tuning: str, bases: dict[str, str], drawn: list[list[int]], tmp_path: Path
) -> None:
    train_one_step(bases["llama"], tmp_path / "plain", method, tuning)
    expected = list(drawn)
    assert len(expected) == 8
    for number, options in enumerate(GENERATION_CONFIGS if method == "rloo" else GENERATION_CONFIGS[1:3]):
        policy = tmp_path / f"policy-{number}"
        shutil.copytree(bases["llama"], policy)
        file = policy / "generation_config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | options))
        drawn.clear()
        train_one_step(str(policy), tmp_path / str(number), method, tuning)
        assert drawn == expected, options
        if tuning == "full":  # what is saved has the policy's own options
            saved = json.loads((tmp_path / str(number) / "out" / "generation_config.json").read_text())
            assert saved.keys() >= options.keys()


# ------------------------------------------------------------------------------------------------------ vLLM


class RecordingVllm:
    """Stands in for TRL's VLLMGeneration: keeps its arguments, and draws one response again and again."""

    calls: ClassVar[list[dict[str, Any]]] = []

    def __init__(self, **arguments: Any):
        self.calls.append(arguments)
        self.num_syncs = 0

    def sync_weights(self) -> None:
        self.num_syncs += 1

    def generate(self, prompts: list[list[int]], num_generations: int, **arguments: Any) -> tuple:
        assert self.num_syncs == 1
        ids = [[4 + index, 5, worlds.TOKENS.index(worlds.END)] for index in range(len(prompts))]
        logprobs = [[[-1.0]] * len(row) for row in ids]
        return prompts, ids, logprobs, [[[token] for token in row] for row in ids]


@pytest.mark.parametrize(("method", "module"), [("rloo", rloo_trainer), ("grpo", grpo_trainer)])
def test_vllm_gets_the_options_of_the_run(
    method: str,
    module: Any,
    bases: dict[str, str],
    drawn: list[list[int]],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(module, "VLLMGeneration", RecordingVllm)
    monkeypatch.setattr(RecordingVllm, "calls", [])
    options = {"vllm_gpu_memory_utilization": 0.5, "vllm_max_model_length": 64, "vllm_enable_sleep_mode": True}
    train_one_step(bases["llama"], tmp_path, method, use_vllm=True, **options)
    (call,) = RecordingVllm.calls
    assert (call["mode"], call["gpu_memory_utilization"], call["max_model_length"]) == ("colocate", 0.5, 64)
    assert (call["temperature"], call["top_k"], call["top_p"], call["min_p"]) == (1.0, 0, 1.0, None)
    assert call["max_completion_length"] == 6 and call["enable_sleep_mode"]
    assert call["generation_kwargs"]["stop_token_ids"] == [worlds.TOKENS.index(worlds.END)]
    assert call["generation_kwargs"]["logit_bias"] == {worlds.TOKENS.index(worlds.PAD): -100.0}
    assert len(drawn) == 8 and all(ids[1] == 5 for ids in drawn)


def test_trl_takes_every_option_of_vllm() -> None:
    defaults = RolloutOptions().get_trainer_options()
    for config_class in (RLOOConfig, GRPOConfig):
        theirs = {field.name: field.default for field in fields(config_class)}
        assert defaults.keys() <= theirs.keys()
        changed = {name for name, value in defaults.items() if theirs[name] != value}
        assert changed <= {"vllm_server_base_url"}  # ours is the address that TRL puts together


def test_a_sampler_is_kept_from_rows_without_a_token(bases: dict[str, str]) -> None:
    policy = load_policy(bases["llama"])
    forbidden = torch.nonzero(policy.forbidden_mask).flatten().tolist()
    assert forbidden
    assert build_generation_kwargs(policy, use_vllm=False) == {"suppress_tokens": forbidden}
    assert list(build_generation_kwargs(policy, use_vllm=True)["logit_bias"]) == forbidden


def test_vllm_is_refused_where_it_cannot_run(
    bases: dict[str, str], reward: Reward, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    options = RolloutOptions(use_vllm=True, vllm_tensor_parallel_size=2)
    monkeypatch.setattr(rollouts_module, "find_spec", lambda name: None)
    worlds.refused(lambda: options.check(bases["llama"], 2), "use_vllm needs vLLM", "not installed", "pip install")
    RolloutOptions().check(bases["llama"], 2)
    monkeypatch.setattr(rollouts_module, "find_spec", lambda name: True)
    options.check(bases["llama"], 4)
    worlds.refused(lambda: options.check(bases["llama"], 3), "vllm_tensor_parallel_size 2 does not divide 3")
    (tmp_path / "adapter_config.json").write_text("{}")
    worlds.refused(lambda: options.check(str(tmp_path), 2), "is an adapter", "use_vllm", "export --merge")


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"vllm_mode": "remote"}, ["vllm_mode must be one of colocate, server"]),
        ({"vllm_server_base_url": "http://me:secret@host:8000"}, ["without a user name or password"]),
        ({"vllm_server_base_url": "host:8000"}, ["http://HOST:PORT"]),
        ({"vllm_gpu_memory_utilization": 0.0}, ["above 0 and at most 1"]),
        ({"vllm_tensor_parallel_size": 0}, ["at least 1"]),
    ],
)
def test_options_of_vllm_that_mean_nothing_are_refused(options: dict[str, Any], words: list[str]) -> None:
    assert "secret" not in worlds.refused(lambda: RolloutOptions(**options), *words)


# ----------------------------------------------------------------------------------------------------- seeds


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"seed": 2**32}, ["seed must be between 0 and 4294967295", "4294967296"]),
        ({"seed": -1}, ["seed must be between 0", "-1"]),
        ({"seed": 0, "data_seed": -1}, ["data_seed must be between 0"]),
        ({"seed": 0, "data_seed": 2**64}, ["data_seed must be between 0"]),
    ],
)
def test_seeds_that_a_trainer_cannot_take_are_refused(
    options: dict[str, int], words: list[str], tmp_path: Path
) -> None:
    worlds.refused(lambda: check_seeds(SFTConfig(str(tmp_path), use_cpu=True, bf16=False, **options)), *words)


def test_the_largest_seed_leaves_room_for_those_that_follow(tmp_path: Path) -> None:
    config = SFTConfig(str(tmp_path), use_cpu=True, bf16=False, seed=2**32 - 1, data_seed=0)
    check_seeds(config)
    worlds.refused(lambda: check_seeds(config, num_derived=3), "between 0 and 4294967293")
