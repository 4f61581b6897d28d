"""TRL's names: each goes to the methods that have it, and to no other."""

from __future__ import annotations

from dataclasses import fields
from typing import Any

import pytest
import worlds
from trl import DPOConfig, RLOOConfig

from nabla_trl.cli.parsing import Parser, collect_given_options
from nabla_trl.models.options import Sampling
from nabla_trl.training.offline import TrainOptions
from nabla_trl.training.online import _choose_trainer
from nabla_trl.training.trl_options import (
    CONFIG_CLASSES,
    OWNERS,
    TrainerConfig,
    TrlOptions,
    collect_trl_options,
    list_trl_faults,
    select_trl_options,
)

CPU = ["--use_cpu", "true", "--bf16", "false", "--output_dir", "out"]


def given(*flags: str, config: str = "") -> dict[str, Any]:
    argv = [*CPU, *flags, *(["--config", config] if config else [])]
    trl_options, trainer_config = Parser([TrlOptions, TrainerConfig]).parse_options(argv)[:2]
    names = collect_given_options(argv, [trl_options, trainer_config])
    return collect_trl_options(trl_options, trainer_config, names)


def test_each_option_goes_to_the_methods_that_have_it(tmp_path: Any) -> None:
    (tmp_path / "mine.yaml").write_text("epsilon: 1e-1\nreward_clip_range: [-2, 3]\nscale_rewards: group\n")
    options = given("--label_smoothing", "0.1", "--padding_free", "false", config=str(tmp_path / "mine.yaml"))
    assert select_trl_options("sft", options) == {"padding_free": False}
    assert select_trl_options("dpo", options) == {"padding_free": False, "label_smoothing": 0.1}
    assert select_trl_options("rloo", options) == {"epsilon": 0.1, "reward_clip_range": (-2.0, 3.0)}
    assert select_trl_options("grpo", options) == {"epsilon": 0.1, "scale_rewards": "group"}
    assert given() == {}


def test_options_have_the_types_and_owners_of_trl() -> None:
    """Every option that is offered can be set on the configuration of every method it names."""
    for name, methods in OWNERS.items():
        for method in methods:
            assert name in {item.name for item in fields(CONFIG_CLASSES[method])}
    offered = {item.name for item in fields(TrlOptions)}
    assert {"label_smoothing", "epsilon", "scale_rewards", "mask_truncated_completions"} <= offered == set(OWNERS)
    assert not offered & {"beta", "temperature", "num_generations", "max_completion_length", "loss_type"}


def test_options_reach_the_trainers_configuration_and_win_over_ours() -> None:
    config = TrainerConfig(output_dir="out", use_cpu=True, bf16=False, max_steps=1, per_device_train_batch_size=8)
    policy, sampling = worlds.tiny_policy(), Sampling(max_new_tokens=6)
    values: dict[str, Any] = {"epsilon": 0.3, "scale_rewards": "group", "loss_type": "dapo"}
    chosen = select_trl_options("grpo", values)
    _, grpo = _choose_trainer("grpo", config, 4, policy, 0.5, sampling, TrainOptions(), chosen)
    assert (grpo.epsilon, grpo.scale_rewards, grpo.loss_type, grpo.beta) == (0.3, "group", "dapo", 0.5)
    _, grpo = _choose_trainer("grpo", config, 4, policy, 0.5, sampling, TrainOptions(), {})
    assert (grpo.scale_rewards, grpo.loss_type) == ("none", "dr_grpo")
    _, rloo = _choose_trainer("rloo", config, 4, policy, 0.5, sampling, TrainOptions(), {"reward_clip_range": (-1, 1)})
    assert isinstance(rloo, RLOOConfig) and rloo.reward_clip_range == (-1, 1)
    losses = select_trl_options("dpo", {"loss_type": "hinge,bco_pair"})
    assert DPOConfig(output_dir="out", use_cpu=True, bf16=False, **losses).loss_type == ["hinge", "bco_pair"]


@pytest.mark.parametrize(
    ("methods", "values", "faults"),
    [
        (["sft"], {"epsilon": 0.3}, ["epsilon belongs to rloo and grpo, which train_methods (sft) does not name"]),
        (["sft", "grpo"], {"epsilon": 0.3, "label_smoothing": 0.1}, ["label_smoothing belongs to dpo"]),
        (["dpo"], {"loss_type": "hinge,bco_pair"}, []),
        (["grpo"], {"loss_type": "dapo"}, []),
        (["sft"], {"loss_type": "dft"}, []),
        (["dpo"], {"loss_type": "hinge,nll"}, ["loss_type nll is unknown to dpo, which has sigmoid, hinge"]),
        (["sft", "dpo"], {"loss_type": "hinge"}, ["loss_type hinge is unknown to sft, which has "]),
        (["rloo"], {"loss_type": "dapo"}, ["loss_type dapo is unknown to rloo, which has one loss"]),
    ],
)
def test_options_of_other_methods_are_named_with_their_method(
    methods: list[str], values: dict[str, Any], faults: list[str]
) -> None:
    found = list_trl_faults(methods, values)
    assert len(found) == len(faults)
    assert all(text.startswith(start) for text, start in zip(found, faults, strict=True))


def test_a_misspelled_option_names_the_near_one_and_its_methods() -> None:
    parser = Parser([TrlOptions, TrainerConfig])
    for flag, hint in (
        ("--epsilom", "--epsilon, of rloo and grpo?)"),
        ("--label_smooth", "--label_smoothing, of dpo?)"),
    ):
        worlds.refused(lambda flag=flag: parser.parse_options([*CPU, flag, "0.1"]), f"(did you mean {hint}")
