"""Check before a run what would stop it later: folders, models, prompts, devices, memory and disk. Loads no weights.

Every function raises `Faults` with all that it finds. A command collects those of several functions (`Checks`).
"""

from __future__ import annotations

import json
import os
import shutil
import struct
from collections.abc import Sequence
from pathlib import Path

import psutil
import torch
from transformers import AutoConfig, PreTrainedConfig, PreTrainedTokenizerBase

from nabla_trl.gradient.state_head import StateHead
from nabla_trl.models.loading import (
    ADAPTER_CONFIG_FILE,
    DTYPES,
    find_adapter_folder,
    get_dtype_name,
    has_bfloat16,
    is_adapter,
    load_tokenizer,
    resolve_adapters,
    resolve_device,
)
from nabla_trl.models.loading.pretrained import call_from_pretrained
from nabla_trl.models.options import PromptOptions
from nabla_trl.models.policy import read_context_length
from nabla_trl.models.prompts import check_prompt, check_prompt_options, tokenize_prompt
from nabla_trl.models.vllm_backend import HttpClient, fetch_context_length
from nabla_trl.planning.memory import build_empty_model, count_params
from nabla_trl.rewards.loading import check_classifier
from nabla_trl.rewards.spec import SAME_MODELS, RewardSpec, parse_reward_spec, read_validated_limits
from nabla_trl.tasks.problem import Problem
from nabla_trl.utils.faults import Checks
from nabla_trl.utils.files import read_json_file
from nabla_trl.utils.formatting import format_si, pluralize
from nabla_trl.utils.identity import is_same_model

DEFAULT_MAX_NEW_TOKENS = 512  # of `SearchConfig`. It gives way to a shorter context
MIN_FREE_BYTES = 50e6  # rows, traces and a report of a small run
_NUM_CHECKED_PROMPTS = 16
_SERVER_SECONDS = 3.0
_WEIGHT_FILES = ("*.safetensors", "*.bin", "*.gguf")


def collect_model_faults(
    checks: Checks,
    *,
    policy: str,
    reward: str,
    dtype: str | None,
    device: str | None = None,
    prompt_options: PromptOptions | None = None,
    vllm_url: str | None = None,
    problems: Sequence[Problem] = (),
    max_new_tokens: int = 0,
    adapter: str | None = None,
    audit_file: str | None = None,
) -> None:
    """Collect what is wrong with the models of a run, before they are loaded.

    Args:
        policy: its name. Empty: not checked.
        reward: its name. Empty: not checked.
        dtype: data type of their weights. None: that of `get_dtype_name`.
        problems: whose prompts are written.
        max_new_tokens: longest response. 0: not checked.
    """
    checks.call(check_device, device, dtype)
    if not policy:
        return
    checks.call(
        check_policy_files,
        policy,
        prompt_options=prompt_options,
        problems=problems,
        max_new_tokens=max_new_tokens,
        adapter=adapter,
    )
    if vllm_url:
        checks.call(check_vllm_server, vllm_url, policy)
    if reward:
        num_faults = len(checks.faults)
        checks.call(check_reward_files, reward, policy=policy, audit_file=audit_file)
        if len(checks.faults) == num_faults:
            with checks.collect():
                dtype = get_dtype_name(dtype, device)
                check_memory(list_frozen_models(policy, reward), dtype=dtype, device=device)


# --- folders and disk -----------------------------------------------------------------------------------


def check_output_dir(folder: str | Path, num_bytes: float = MIN_FREE_BYTES) -> None:
    """Check that a folder can be made and written to, and that its disk has space. Nothing is made.

    Args:
        num_bytes: what will be written at least.

    Raises:
        Faults: a file is in the way, the folder may not be written to, or its disk is too full.
    """
    checks, path = Checks(), Path(folder)
    existing = path
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    checks.require(
        existing.is_dir(), f"cannot write to {folder}: {existing} is a file" if existing.exists() else f"no {existing}"
    )
    if existing.is_dir():
        is_writable = os.access(existing, os.W_OK | os.X_OK)
        checks.require(is_writable, f"cannot write to {folder}: no permission to write in {existing}")
        free = shutil.disk_usage(existing).free
        checks.require(
            free >= num_bytes,
            f"the disk of {folder} has {format_si(free, 'B')} free, and this needs at least "
            f"{format_si(num_bytes, 'B')}: free some, or use another folder",
        )
    checks.raise_faults()


def check_output_file(file: str | Path) -> None:
    """Check that a file can be written. Nothing is made."""
    checks = Checks()
    checks.require(not Path(file).is_dir(), f"{file} is a folder: give the path of a file")
    with checks.collect():
        check_output_dir(Path(file).absolute().parent)
    checks.raise_faults()


# --- devices and servers --------------------------------------------------------------------------------


def check_device(device: str | None, dtype: str | None = None) -> None:
    """Check that a device exists and computes in a data type.

    Args:
        device: such as "cuda:1". None: a GPU if there is one, else the CPU.
    """
    checks = Checks()
    checks.require(dtype is None or dtype in DTYPES, f"dtype must be one of {', '.join(DTYPES)}, not {dtype!r}")
    with checks.collect():
        resolved = resolve_device(device)
        if dtype == "bfloat16" and resolved.startswith("cuda") and not has_bfloat16(resolved):
            raise ValueError(f"{torch.cuda.get_device_name(resolved)} does not compute in bfloat16: use float16")
    checks.raise_faults()


def check_vllm_server(urls: str, policy: str) -> None:
    """Check that vLLM servers answer and serve the policy.

    Args:
        urls: of one or several servers, separated by commas.

    Raises:
        Faults: one does not answer within some seconds, is no vLLM server or serves other models, or its address is no
            URL.
    """
    checks = Checks()
    for url in urls.split(","):
        with checks.collect():
            fetch_context_length(HttpClient(url.strip(), timeout=_SERVER_SECONDS, retries=0), policy)
    checks.raise_faults()


# --- models ---------------------------------------------------------------------------------------------


def check_policy_files(
    name: str,
    *,
    prompt_options: PromptOptions | None = None,
    problems: Sequence[Problem] = (),
    max_new_tokens: int = 0,
    adapter: str | None = None,
) -> None:
    """Check the files of a policy, its prompts and its context.

    Args:
        problems: the prompts of some of them are written.
        max_new_tokens: longest response. 0: not checked. The default of a search gives way to a shorter context.
        adapter: of the policy.

    Raises:
        Faults: no such model, no weights, a template that refuses a problem, or prompts that leave no room.
    """
    checks = Checks()
    options = PromptOptions() if prompt_options is None else prompt_options
    tokenizer: PreTrainedTokenizerBase | None = None
    with checks.collect():
        tokenizer = load_tokenizer(name)
    if tokenizer is None:
        checks.raise_faults()
        return
    with checks.collect():
        config = read_model_config(name)
        check_model_weights(name)
        if tokenizer is not None:
            _check_prompts(name, config, tokenizer, options, problems, max_new_tokens)
    with checks.collect():
        if adapter and Path(adapter).exists():
            if not is_adapter(adapter):
                raise ValueError(f"{adapter} is not an adapter: it has no {ADAPTER_CONFIG_FILE}")
            _check_folder(Path(adapter))
        elif adapter and not find_adapter_folder(adapter):
            raise ValueError(f"cannot put adapter {adapter} on {name}: no such folder here, and no such hub id")
    checks.raise_faults()


def check_reward_files(reward: str, *, policy: str, audit_file: str | None = None) -> None:
    """Check the name of a reward, the files of its models, and the audit that sets its limits.

    Args:
        policy: name of the policy, whose files are checked elsewhere.
        audit_file: JSON file of an over-optimization audit.

    Raises:
        Faults: a malformed spec or reward.json, no such model, no weights, a causal LM in place of a classifier, or an
            audit of another reward.
    """
    checks = Checks()
    with checks.collect():
        spec = parse_reward_spec(reward)
        against_policy = spec.kind == "log-ratio" and spec.has_reference and len(spec.model_names) == 1
        if against_policy and is_same_model(spec.model_names[0], policy):
            raise ValueError(f"{spec.name}: {SAME_MODELS}; name a better model than the policy {policy}")
        for member in spec.members or (spec,):
            for model in member.model_names:
                checks.call(_check_reward_model, member, model, policy)
            if member.kind == "head":
                checks.call(StateHead.load, str(member.folder))
    if audit_file:
        checks.call(read_validated_limits, audit_file, policy=policy, reward=reward)
    checks.raise_faults()


def _check_reward_model(spec: RewardSpec, model: str, policy: str) -> None:
    if is_same_model(model, policy) and spec.kind == "log-ratio":
        return
    if spec.kind in ("scalar", "process") and not resolve_adapters(model).adapters:
        check_classifier(model)
    read_model_config(model)
    check_model_weights(model)


def read_model_config(name: str) -> PreTrainedConfig:
    """Return the config of a model, of an adapter that of its base.

    Raises:
        ValueError: there is none.
    """
    chain = resolve_adapters(name)
    return call_from_pretrained(AutoConfig, "a model config", chain.base_model, revision=chain.revision)


def check_model_weights(name: str) -> None:
    """Check that the folders of a model, an adapter and its base hold weights. A hub id is not checked.

    Raises:
        ValueError: a folder without weights, or without one of the files that its index lists.
    """
    chain = resolve_adapters(name)
    for folder in (*(Path(path) for _, path, _ in chain.adapters), Path(chain.base_model)):
        if folder.is_dir():
            _check_folder(folder)


def _check_folder(folder: Path) -> None:
    if not any(file.stat().st_size for pattern in _WEIGHT_FILES for file in folder.glob(pattern)):
        raise ValueError(f"{folder} holds no weights ({', '.join(_WEIGHT_FILES)})")
    for index in folder.glob("*.index.json"):
        listed = set(read_json_file(index).get("weight_map", {}).values())
        if missing := sorted(file for file in listed if not (folder / file).is_file()):
            raise ValueError(f"{folder} lacks {missing[0]}, which {index.name} lists: is the download complete?")


def _check_prompts(
    name: str,
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    options: PromptOptions,
    problems: Sequence[Problem],
    max_new_tokens: int,
) -> None:
    """Write the prompts of the first and of the longest problems, and compare them with the context."""
    checks = Checks()
    checks.call(check_prompt_options, options, tokenizer, name)
    checks.call(options.check_problems, problems)
    if checks.faults:
        checks.raise_faults()
    context_length = read_context_length(config)
    by_length = sorted(problems, key=lambda problem: len(problem.question))
    half = _NUM_CHECKED_PROMPTS // 2
    chosen = {problem.id: problem for problem in [*problems[:half], *by_length[:half], *by_length[-half:]]}
    lengths, errors = [], []
    for problem in chosen.values():
        try:
            ids = tokenize_prompt(tokenizer, problem, options)
            lengths.append(len(check_prompt(ids, problem, tokenizer, name=name, context_length=context_length)))
        except ValueError as error:  # of some problems alone it is a counted error of the run
            errors.append(str(error))
    if chosen and not lengths:
        raise ValueError(errors[0] if len(chosen) == 1 else f"no problem has a prompt, the first: {errors[0]}")
    room = context_length - min(lengths, default=0)
    if max_new_tokens > room and max_new_tokens != DEFAULT_MAX_NEW_TOKENS:
        prompt = f" and the shortest prompt {min(lengths)}" if lengths else ""
        raise ValueError(
            f"max_new_tokens {max_new_tokens} is more than {name} can write: its context has {context_length} tokens"
            f"{prompt}: set at most {room}"
        )


# --- memory ---------------------------------------------------------------------------------------------


def count_model_params(name: str) -> int:
    """Return the number of parameters of a model, from the headers of its files, else from its config."""
    chain = resolve_adapters(name)
    files = sorted(Path(chain.base_model).glob("*.safetensors"))
    if not files:
        return count_params(build_empty_model(chain.base_model, dtype="float32"))
    num_params = 0
    for file in files:
        with file.open("rb") as stream:
            (length,) = struct.unpack("<Q", stream.read(8))
            header = json.loads(stream.read(length))
        for key, tensor in header.items():
            if key != "__metadata__":
                num_params += torch.Size(tensor["shape"]).numel()
    return num_params


def list_frozen_models(policy: str, reward: str) -> list[str]:
    """Return the models that a search keeps in memory."""
    spec = parse_reward_spec(reward)
    names = [name for member in spec.members or (spec,) for name in member.model_names]
    return [policy, *(name for name in names if not is_same_model(name, policy))]


def check_memory(models: Sequence[str], *, dtype: str, device: str | None, extra_bytes: float = 0.0) -> None:
    """Check that the weights of models fit into the memory of a device.

    Activations and the key/value cache come on top, so a run may still need a smaller batch.

    Args:
        extra_bytes: what a training needs beside the frozen models.
    """
    num_params = sum(map(count_model_params, models))
    needed = num_params * DTYPES[dtype].itemsize + extra_bytes
    resolved = resolve_device(device)
    if resolved.startswith("cuda"):
        available, total = torch.cuda.mem_get_info(resolved)
    else:
        memory = psutil.virtual_memory()
        available, total = memory.available, memory.total
    if needed > available:
        halved = " or dtype bfloat16" if dtype == "float32" else ""
        frozen = f"{pluralize(len(models), 'model')} with {format_si(num_params)} parameters in {dtype}"
        training = "a training" if extra_bytes else ""
        parts = [part for part in (frozen if models else "", training) if part]
        verb = "needs" if len(models) < 2 and len(parts) == 1 else "need"
        raise ValueError(
            f"{' and '.join(parts)} {verb} {format_si(needed, 'B')} before any activation, and {resolved} has "
            f"{format_si(available, 'B')} of {format_si(total, 'B')} free: use smaller models{halved}"
        )
