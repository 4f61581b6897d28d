"""What would stop a run later is named before anything is loaded, all of it at once."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
import worlds

from nabla_trl.cli.arguments import ModelArguments
from nabla_trl.cli.commands.train import TrainArguments
from nabla_trl.cli.distill.arguments import DistillArguments
from nabla_trl.models.loading import get_dtype_name
from nabla_trl.models.options import PromptOptions
from nabla_trl.pipeline.models import ModelPair
from nabla_trl.planning import preflight
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.faults import Checks, Faults

POLICY, REWARD = "data/tiny/policy", "data/tiny/reward"


def problems(*questions: str) -> list[Problem]:
    return [Problem(id=str(index), question=question) for index, question in enumerate(questions)]


@pytest.fixture
def broken(tmp_path: Path) -> Path:
    """A folder of the embedded policy without its weights."""
    folder = tmp_path / "broken"
    shutil.copytree(POLICY, folder, ignore=shutil.ignore_patterns("*.safetensors"))
    return folder


def test_checks_collect_and_go_on() -> None:
    checks = Checks()
    for error in (ValueError("a\n b"), OSError("c"), Faults("d", "a b", replacements={"x": "y"}), KeyError("dropped")):
        with checks.collect():
            raise error
    checks.require(True, "not this")
    checks.require(False, "e")
    with pytest.raises(Faults) as caught:
        checks.raise_faults()
    assert caught.value.lines == ("a b", "c", "d", "e") and caught.value.replacements == {"x": "y"}
    assert str(caught.value) == "a b; c; d; e"
    with pytest.raises(KeyError), Checks().collect():  # without a fault it is a mistake of ours
        raise KeyError("bug")


def test_good_models_pass() -> None:
    preflight.check_policy_files(POLICY, problems=problems("1+1", "2+2*3"), max_new_tokens=64)
    preflight.check_reward_files(REWARD, policy=POLICY)
    preflight.check_reward_files("logratio:data/tiny/clean", policy=POLICY)
    preflight.check_device("cpu", "bfloat16")
    preflight.check_memory(preflight.list_frozen_models(POLICY, REWARD), dtype="float32", device="cpu")
    assert preflight.count_model_params(POLICY) == worlds_size(POLICY)


def worlds_size(folder: str) -> int:
    from safetensors import safe_open

    with safe_open(Path(folder, "model.safetensors"), framework="pt") as file:
        return sum(file.get_tensor(name).numel() for name in file.keys())  # noqa: SIM118  (not a mapping)


def test_files_of_models(broken: Path, tmp_path: Path) -> None:
    worlds.refused(
        lambda: preflight.check_policy_files(str(broken)), "holds no weights (*.safetensors, *.bin, *.gguf)"
    )
    (broken / "model.safetensors").touch()
    worlds.refused(lambda: preflight.check_policy_files(str(broken)), "holds no weights")
    (broken / "model-00001-of-00002.safetensors").write_text("x")
    index = {"weight_map": {"a": "model-00001-of-00002.safetensors", "b": "model-00002-of-00002.safetensors"}}
    (broken / "model.safetensors.index.json").write_text(json.dumps(index))
    worlds.refused(lambda: preflight.check_policy_files(str(broken)), "lacks model-00002-of-00002.safetensors")
    worlds.refused(lambda: preflight.check_policy_files("no/policy"), "cannot load a tokenizer from 'no/policy'")
    worlds.refused(lambda: preflight.check_policy_files(POLICY, adapter=str(tmp_path)), "is not an adapter")
    worlds.refused(lambda: preflight.check_reward_files("data/tiny/clean", policy=POLICY), "is a causal LM")
    worlds.refused(lambda: preflight.check_reward_files(f"logratio:{POLICY}", policy=POLICY), "against itself")


def test_all_members_of_a_reward_are_named(broken: Path) -> None:
    with pytest.raises(Faults) as caught:
        preflight.check_reward_files(f"ensemble:no/a,{broken}", policy=POLICY, audit_file="no/audit.json")
    assert [word in line for word, line in zip(("no/a", "causal LM", "audit.json"), caught.value.lines, strict=True)]


def test_prompts_and_contexts() -> None:
    check = preflight.check_policy_files
    long = problems("1+" * 300)
    worlds.refused(lambda: check(POLICY, problems=long), "the context of")
    worlds.refused(
        lambda: check(POLICY, problems=[*long, Problem(id="x", question="x" * 400)]),
        "no problem has a prompt, the first:",
    )
    check(POLICY, problems=[*long, Problem(id="short", question="1+1")])  # a counted error of the run
    worlds.refused(
        lambda: check(POLICY, problems=problems("1+1"), max_new_tokens=1000),
        "max_new_tokens 1000 is more than data/tiny/policy can write: its context has 256 tokens",
        "set at most 2",
    )
    check(POLICY, problems=problems("1+1"), max_new_tokens=preflight.DEFAULT_MAX_NEW_TOKENS)
    worlds.refused(
        lambda: check(POLICY, prompt_options=PromptOptions("few_shot"), problems=problems("1+1")), "worked examples"
    )
    worlds.refused(lambda: check(POLICY, prompt_options=PromptOptions("auto", {"thinking": 1})), "has no")


def test_folders_and_disks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    preflight.check_output_dir(tmp_path / "a" / "b")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").touch()
    worlds.refused(lambda: preflight.check_output_dir(tmp_path / "file" / "out"), f"{tmp_path / 'file'} is a file")
    worlds.refused(lambda: preflight.check_output_file(tmp_path), "is a folder")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=3e6))
    monkeypatch.setattr(os, "access", lambda *args: False)
    with pytest.raises(Faults) as caught:
        preflight.check_output_dir(tmp_path / "out")
    assert len(caught.value.lines) == 2 and "no permission" in str(caught.value) and "3 MB free" in str(caught.value)


def test_devices_and_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(Faults) as caught:
        preflight.check_device("warp:9", "float17")
    assert len(caught.value.lines) == 2
    if not torch.cuda.is_available():
        worlds.refused(lambda: preflight.check_device("cuda"), "cannot use device 'cuda'")
    memory = SimpleNamespace(available=1e6, total=2e6)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    worlds.refused(
        lambda: preflight.check_memory([POLICY, REWARD], dtype="float32", device="cpu"),
        "2 models with",
        "cpu has 1 MB of 2 MB free: use smaller models or dtype bfloat16",
    )


def test_a_server_that_is_not_there() -> None:
    with pytest.raises(Faults) as caught:
        preflight.check_vllm_server("http://127.0.0.1:9,nonsense", POLICY)
    assert len(caught.value.lines) == 2


@pytest.mark.parametrize(("has_bfloat16", "expected"), [(True, "bfloat16"), (False, "float32")])
def test_every_stage_chooses_the_same_dtype_on_a_gpu(
    has_bfloat16: bool, expected: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traces of `nabla-trl traces` have the settings that `nabla-trl distill` has on the same GPU."""
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.is_bf16_supported", lambda including_emulation=True: has_bfloat16)
    for device in ("cuda", "cuda:0", torch.device("cuda", 1), None):
        assert ModelPair(POLICY, "power:2", device=device).get_settings()["dtype"] == expected
        assert get_dtype_name(None, device) == expected
        assert get_dtype_name("float16", device) == get_dtype_name(torch.float16, device) == "float16"
    assert ModelPair(POLICY, "power:2", device="cpu").get_settings()["dtype"] == "float32"
    for command in (ModelArguments, DistillArguments, TrainArguments):
        assert command.__dataclass_fields__["dtype"].default is None
