"""Tiny worlds for tests: a character tokenizer, and random models of real architectures that fit it.

Nothing here is trained, but weights are drawn wide, so that outputs differ visibly from token to token.
"""

from __future__ import annotations

import json
import resource
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from copy import deepcopy
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen2ForSequenceClassification,
    Qwen3Config,
    Qwen3ForCausalLM,
    Qwen3ForSequenceClassification,
)

from nabla_trl.evaluation.plan import EvaluationSetup, plan_jobs
from nabla_trl.evaluation.rows import Row
from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.models.loading import freeze_policy
from nabla_trl.models.policy import Policy
from nabla_trl.models.sampling import compute_top_candidates
from nabla_trl.rewards.loading import build_log_ratio_reward, build_scalar_reward
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace
from nabla_trl.utils.fields import get_option_groups

CHARS = "0123456789+-*=;#abcdef"
PAD, USER, ASSISTANT, END, UNK = "<|pad|>", "<|user|>", "<|assistant|>", "<|end|>", "<|unk|>"
TOKENS = (*CHARS, PAD, USER, ASSISTANT, END, UNK)
TEMPLATE = (
    "{% for m in messages %}{{ '<|' + m['role'] + '|>' + m['content'] + '<|end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
)
ARCHITECTURES = {
    "llama": (LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification),
    "qwen2": (Qwen2Config, Qwen2ForCausalLM, Qwen2ForSequenceClassification),
    "qwen3": (Qwen3Config, Qwen3ForCausalLM, Qwen3ForSequenceClassification),
    "gpt2": (GPT2Config, GPT2LMHeadModel, GPT2ForSequenceClassification),
}
# Arguments of any of TRL's trainers for a few steps on a CPU, of which nothing is left.
TRAINER: dict[str, Any] = {
    "per_device_train_batch_size": 4,
    "learning_rate": 5e-3,
    "lr_scheduler_type": "constant",
    "use_cpu": True,
    "bf16": False,
    "gradient_checkpointing": False,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}
QUESTIONS = ("1+2", "3*4-5", "7", "12-3+4*5")


def search_options(**options: Any) -> dict[str, Any]:
    """Search options by plain names, with those of a solver, proposals or acceptance put into their groups."""
    for name, group in get_option_groups(SearchConfig).items():
        names = {field.name for member in group.members.values() for field in fields(member)}
        own = {key: options.pop(key) for key in list(options) if key in names}
        if own:
            options[name] = {"name": options[name], **own} if name in options else own
    return options


def search_config(**options: Any) -> SearchConfig:
    """Return a search among all candidates: models with random weights prefer none, and tests want many to move to."""
    return SearchConfig(**search_options(**{"candidate_min_p": 0.0, **options}))


def run_plan(
    names: Sequence[str], setup: EvaluationSetup, problems: Sequence[Problem]
) -> tuple[dict[str, float], list[tuple[str, ...]], list[Trace]]:
    """The mean FLOPs of every method of an evaluation, the methods of each job, and all traces, ungraded."""
    flops, jobs, traces = dict[str, float](), [], []
    for job in plan_jobs(names, setup, {}, flops.__getitem__):
        jobs.append(job.methods)
        new = job.run(problems, 0)
        assert not any(trace.error for trace in new)
        for name in job.methods:
            costs = [trace.cost.flops for trace in new if trace.method == name]
            flops[name] = sum(costs) / len(costs)
        traces += new
    return flops, jobs, traces


def char_tokenizer(
    tokens: Sequence[str] = TOKENS, *, template: str | None = TEMPLATE, eos: str = END, pad: str | None = PAD
) -> PreTrainedTokenizerFast:
    """A fast tokenizer, one token per character; the position in `tokens` is the id.

    Tokens of more than one character are special. `tokens` must hold `<|unk|>`, `eos` and `pad`.
    """
    inner = Tokenizer(models.WordLevel({token: index for index, token in enumerate(tokens)}, unk_token=UNK))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    inner.decoder = decoders.Fuse()
    special = [token for token in tokens if len(token) > 1 and token not in (eos, pad, UNK)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=eos, pad_token=pad, unk_token=UNK, additional_special_tokens=special
    )
    tokenizer.chat_template = template
    return tokenizer


def permuted_tokenizer(
    tokenizer: PreTrainedTokenizerFast, seed: int = 0, **kwargs: Any
) -> tuple[PreTrainedTokenizerFast, Tensor]:
    """The same token strings under shuffled ids, and [V] the new id of each old one."""
    old = sorted(tokenizer.get_vocab(), key=tokenizer.get_vocab().__getitem__)
    new_ids = torch.randperm(len(old), generator=torch.Generator().manual_seed(seed))
    tokens = [old[index] for index in new_ids.argsort().tolist()]
    return char_tokenizer(tokens, template=tokenizer.chat_template, **kwargs), new_ids


def tiny_model(
    architecture: str = "llama",
    *,
    kind: str = "causal",
    vocab: int = len(TOKENS),
    tied: bool = False,
    dtype: torch.dtype = torch.float32,
    seed: int = 0,
    width: int = 32,
    layers: int = 2,
    context: int = 128,
    eos: int = TOKENS.index(END),
    pad: int | None = TOKENS.index(PAD),
    labels: int = 1,
) -> PreTrainedModel:
    """A random model in eval mode, weights not frozen yet; kind "causal" or "score" (sequence classifier).

    In float64 the norms run in float64 too: transformers' RMSNorm computes in float32 whatever the weights
    are, which would hide any difference below 1e-7.
    """
    config_class, causal, score = ARCHITECTURES[architecture]
    shape = (
        {"n_embd": width, "n_layer": layers, "n_head": 4, "n_positions": context}
        if architecture == "gpt2"
        else {
            "hidden_size": width,
            "intermediate_size": 2 * width,
            "num_hidden_layers": layers,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "head_dim": width // 4,
            "max_position_embeddings": context,
        }
    )
    config = config_class(
        vocab_size=vocab,
        initializer_range=0.3,
        tie_word_embeddings=tied,
        bos_token_id=None,
        eos_token_id=eos,
        pad_token_id=pad,
        num_labels=labels,
        **shape,
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = (causal if kind == "causal" else score)(config)
    model = model.to(dtype).eval()
    if dtype == torch.float64:
        _widen_norms(model)
    return model


def _widen_norms(model: PreTrainedModel) -> None:
    for module in list(model.modules()):
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm"):
                norm = nn.RMSNorm(child.weight.shape[0], eps=child.variance_epsilon)
                norm.weight = child.weight
                setattr(module, name, norm)


def permuted_model(model: PreTrainedModel, new_ids: Tensor, rows: int) -> PreTrainedModel:
    """A copy of `model` over shuffled ids, with `rows` embedding rows.

    Row `new_ids[v]` of its embeddings (and output head) is row v of the model's; further rows are random.
    """
    moved = deepcopy(model)
    moved.resize_token_embeddings(rows, mean_resizing=False)
    heads = [(model.get_input_embeddings(), moved.get_input_embeddings())]
    if model.get_output_embeddings() is not None:
        heads.append((model.get_output_embeddings(), moved.get_output_embeddings()))
    with torch.no_grad():
        for old, new in heads:
            new.weight.normal_(generator=torch.Generator().manual_seed(1))
            new.weight[new_ids] = old.weight
    return moved


def save(
    folder: Path,
    model: PreTrainedModel | None = None,
    tokenizer: PreTrainedTokenizerBase | None = None,
    **options: Any,
) -> str:
    """Save a model (`tiny_model`) and its tokenizer (`char_tokenizer(**options)`) to a folder, and return its name."""
    (tiny_model() if model is None else model).save_pretrained(folder)
    (char_tokenizer(**options) if tokenizer is None else tokenizer).save_pretrained(folder)
    return str(folder)


def save_world(folder: Path, num_problems: int) -> list[str]:
    """Save policy/, better/ and problems.jsonl to a folder, and return the flags of models and problems."""
    for name, seed in (("policy", 0), ("better", 2)):
        save(folder / name, tiny_policy(seed=seed).model)
    lines = [json.dumps({"question": f"{n}+{n}", "answer": str(n)}) for n in range(1, num_problems + 1)]
    (folder / "problems.jsonl").write_text("\n".join(lines), encoding="utf-8")
    models = ["--policy", str(folder / "policy"), "--reward", f"logratio:{folder / 'better'}"]
    return [*models, "--dataset", str(folder / "problems.jsonl")]


def tiny_policy(
    architecture: str = "llama",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    name: str = "policy",
    **kwargs: Any,
) -> Policy:
    """A frozen random policy; `kwargs` as in `tiny_model`."""
    tokenizer = char_tokenizer() if tokenizer is None else tokenizer
    return freeze_policy(tiny_model(architecture, **{**_ids(tokenizer), **kwargs}), tokenizer, name)


def tiny_scalar(
    policy: Policy,
    architecture: str = "llama",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    name: str = "scorer",
    seed: int = 1,
    **kwargs: Any,
) -> Reward:
    """A random sequence classifier with one label as reward; its tokenizer is the policy's unless given."""
    tokenizer = policy.tokenizer if tokenizer is None else tokenizer
    kwargs = {"dtype": policy.model.dtype, **_ids(tokenizer), **kwargs}
    return build_scalar_reward(policy, tiny_model(architecture, kind="score", seed=seed, **kwargs), tokenizer, name)


def tiny_logratio(
    policy: Policy,
    architecture: str = "llama",
    *,
    tokenizer: PreTrainedTokenizerFast | None = None,
    name: str = "ratio",
    seed: int = 2,
    **kwargs: Any,
) -> Reward:
    """log p_better − log p_policy with a random better model; its tokenizer is the policy's unless given."""
    tokenizer = policy.tokenizer if tokenizer is None else tokenizer
    kwargs = {"dtype": policy.model.dtype, **kwargs}
    better = tiny_policy(architecture, tokenizer=tokenizer, seed=seed, name="better", **kwargs)
    return build_log_ratio_reward(policy, better, policy, name)


def tiny_problems(questions: Sequence[str] = QUESTIONS) -> list[Problem]:
    return [Problem(id=f"q{index}", question=question) for index, question in enumerate(questions)]


def sample(policy: Policy, problem: Problem, text: str, *, finished: bool = True) -> Sample:
    """A response to a problem, written out as text; `finished` adds the stop token."""
    ids = list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    return Sample(problem, policy.encode(problem), ids + [policy.tokenizer.eos_token_id] * finished)


def result_row(method: str, number: int, **values: Any) -> Row:
    """A row of a problem with this number."""
    return Row(**{"method": method, "task": "t", "problem": f"p{number}", "seed": 0} | values)


def known(policy: Policy, item: Sample, width: int = 6) -> Sample:
    """The sample with the `width` likeliest candidates of the policy (its own tokens among them)."""
    logits = policy.model(torch.tensor([item.prompt_ids + item.response_ids])).logits.detach()
    ids, logp = compute_top_candidates(
        logits[0, len(item.prompt_ids) - 1 : -1], torch.tensor(item.response_ids), policy.forbidden_mask, width
    )
    return replace(item, draw_info=DrawInfo(policy.model, ids, logp))


def mixed(item: Sample, alpha: float, rows: int, min_p: float = 0.0) -> Tensor:
    """(1−α)·onehot + α·π over the candidates, dense [T, V] in float64, from the definition."""
    logp = item.draw_info.logp
    weights = logp.exp() * (logp.exp() >= min_p * logp.exp().amax(-1, keepdim=True))
    policy = torch.zeros(len(item.response_ids), rows, dtype=torch.float64)
    policy.scatter_add_(1, item.draw_info.candidates, (weights / weights.sum(-1, keepdim=True)).double())
    return (1 - alpha) * nn.functional.one_hot(torch.tensor(item.response_ids), rows).double() + alpha * policy


def _ids(tokenizer: PreTrainedTokenizerFast) -> dict[str, Any]:
    return {"vocab": len(tokenizer), "eos": tokenizer.eos_token_id, "pad": tokenizer.pad_token_id}


def refused(action: Callable[[], Any], *words: str) -> str:
    """The one-line ValueError of `action`, which names all `words`."""
    with pytest.raises(ValueError) as caught:
        action()
    message = str(caught.value)
    assert "\n" not in message
    for word in words:
        assert word in message, message
    return message


@contextmanager
def full_disk(free: int) -> Iterator[None]:
    """No file can grow past `free` bytes; the system then answers a write with OSError."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (free, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
