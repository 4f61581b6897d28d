"""rewards: scores against plain forwards, what is refused at load, and what a response may hold."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from transformers import PreTrainedModel

from nabla_trl.gradient.objectives import Sample
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.grading.equivalence import MatchResult
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.loading import build_log_ratio_reward, build_scalar_reward, check_reward, load_reward
from nabla_trl.rewards.reward import Reward, Verifier
from nabla_trl.rewards.spec import LOG_RATIO_PREFIX
from nabla_trl.tasks.problem import Problem

TEXTS = ("1+2=3", "3*4=12;12-5=7#7", "7", "12-3=9;4*5=20;9+20=29#29")
END, PAD = worlds.TOKENS.index(worlds.END), worlds.TOKENS.index(worlds.PAD)


def _scorer(architecture: str = "llama", **options: Any) -> PreTrainedModel:
    return worlds.tiny_model(architecture, kind="score", **{"seed": 1, **options})


def _samples(policy: Policy) -> list[Sample]:
    """Finished and unfinished responses of mixed lengths."""
    pairs = zip(worlds.tiny_problems(), TEXTS, strict=True)
    return [
        worlds.sample(policy, problem, text, finished=finished)
        for problem, text in pairs
        for finished in (True, False)
    ]


def _score(reward: Reward, samples: Sequence[Sample], meter: FlopCounter | None = None) -> list[float]:
    meter = FlopCounter() if meter is None else meter
    return reward.score(samples, reward.compute_prompt_caches(samples, meter), flop_counter=meter)[0]


def _plain_score(model: PreTrainedModel, ids: Sequence[int]) -> float:
    """The classifier's own forward, which pools at the last position when it is given embeddings."""
    embeds = model.get_input_embeddings()(torch.tensor([ids]))
    return float(model(inputs_embeds=embeds).logits.detach())


def _plain_logp(model: PreTrainedModel, prompt: Sequence[int], response: Sequence[int]) -> float:
    """One plain forward of the whole sequence: each token's share is read one position before it."""
    logp = model(torch.tensor([[*prompt, *response]])).logits[0].detach().log_softmax(-1)
    return sum(float(logp[len(prompt) - 1 + step, token]) for step, token in enumerate(response))


# --- loading ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_a_loaded_scalar_reward_scores_like_the_plain_model(architecture: str, policy: Policy, tmp_path: Path) -> None:
    model = _scorer(architecture)
    reward = load_reward(worlds.save(tmp_path, model), policy=policy)
    assert (reward.kind, reward.name) == ("scalar", str(tmp_path))
    samples = _samples(policy)
    scores = _score(reward, samples)
    for sample, score in zip(samples, scores, strict=True):
        closed = sample.response_ids if sample.response_ids[-1] == END else [*sample.response_ids, END]
        assert score == pytest.approx(_plain_score(model, sample.prompt_ids + closed), abs=1e-4)
    assert scores[::2] == pytest.approx(scores[1::2], abs=1e-4)  # the template closes what the limit cut off
    assert len({round(score, 3) for score in scores}) == len(TEXTS)


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_a_loaded_log_ratio_is_the_difference_of_summed_log_likelihoods(
    architecture: str, policy: Policy, tmp_path: Path
) -> None:
    better, reference = worlds.tiny_model(architecture, seed=2), worlds.tiny_model(architecture, seed=3)
    names = [worlds.save(tmp_path / "a", better), worlds.save(tmp_path / "b", reference)]
    against_policy = load_reward(LOG_RATIO_PREFIX + names[0], policy=policy)
    against_other = load_reward(f"{LOG_RATIO_PREFIX}{names[0]}, {names[1]}", policy=policy)
    assert against_policy.kind == against_other.kind == "log-ratio"
    samples = _samples(policy)
    for base, reward in ((policy.model, against_policy), (reference, against_other)):
        expected = [
            _plain_logp(better, sample.prompt_ids, sample.response_ids)
            - _plain_logp(base, sample.prompt_ids, sample.response_ids)
            for sample in samples
        ]
        assert _score(reward, samples) == pytest.approx(expected, rel=1e-4, abs=1e-4)


def test_the_log_ratio_of_a_model_against_itself_is_zero(policy: Policy) -> None:
    reward = build_log_ratio_reward(policy, policy, policy, "self")
    assert _score(reward, _samples(policy)) == [0.0] * (2 * len(TEXTS))


@pytest.mark.parametrize("spec", [LOG_RATIO_PREFIX, f"{LOG_RATIO_PREFIX}a,b,c", f"{LOG_RATIO_PREFIX}a,"])
def test_a_malformed_log_ratio_is_refused(policy: Policy, spec: str) -> None:
    worlds.refused(lambda: load_reward(spec, policy=policy), repr(spec), f"{LOG_RATIO_PREFIX}BETTER,REFERENCE")


def test_nothing_there(policy: Policy, tmp_path: Path) -> None:
    worlds.refused(lambda: load_reward("/no/such/reward", policy=policy), "/no/such/reward")
    worlds.refused(lambda: load_reward(f"{LOG_RATIO_PREFIX}/no/such/model", policy=policy), "/no/such/model")
    worlds.refused(lambda: load_reward(str(tmp_path), policy=policy), str(tmp_path))


def test_a_missing_score_head_is_refused(policy: Policy, tmp_path: Path) -> None:
    """A causal LM's weights under a classifier's name: transformers would draw the head at random."""
    model = worlds.tiny_model()
    model.config.architectures = ["LlamaForSequenceClassification"]
    name = worlds.save(tmp_path, model)
    text = (tmp_path / "config.json").read_text()
    (tmp_path / "config.json").write_text(text.replace("ForCausalLM", "ForSequenceClassification"))
    worlds.refused(lambda: load_reward(name, policy=policy), "score.weight", "random", "SequenceClassification")


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_causal_lm_as_scalar_reward_is_refused(architecture: str, policy: Policy, tmp_path: Path) -> None:
    name = worlds.save(tmp_path, worlds.tiny_model(architecture))
    worlds.refused(lambda: load_reward(name, policy=policy), "causal LM", f"{LOG_RATIO_PREFIX}{name}")


def test_two_labels_are_refused(policy: Policy, tmp_path: Path) -> None:
    name = worlds.save(tmp_path, _scorer(labels=2))
    worlds.refused(lambda: load_reward(name, policy=policy), name, "2 labels")


@pytest.mark.parametrize("bad", [math.nan, math.inf])
@pytest.mark.parametrize("kind", ["score", "causal"])
def test_weights_that_are_no_numbers_are_refused(kind: str, bad: float, policy: Policy, tmp_path: Path) -> None:
    model = worlds.tiny_model(kind=kind)
    with torch.no_grad():
        model.base_model.layers[0].mlp.down_proj.weight[0, 0] = bad
    spec = ("" if kind == "score" else LOG_RATIO_PREFIX) + worlds.save(tmp_path, model)
    worlds.refused(lambda: load_reward(spec, policy=policy), spec, "not finite")


@pytest.mark.parametrize("kind", ["score", "causal"])
def test_no_common_vocabulary_is_refused(kind: str, policy: Policy, tmp_path: Path) -> None:
    tokenizer = worlds.char_tokenizer(["α", "β", "γ", *worlds.TOKENS[len(worlds.CHARS) :]])
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    model = worlds.tiny_model(kind=kind, vocab=len(tokenizer), eos=eos, pad=pad)
    spec = ("" if kind == "score" else LOG_RATIO_PREFIX) + worlds.save(tmp_path, model, tokenizer)
    worlds.refused(lambda: load_reward(spec, policy=policy), "vocabulary lacks 22", "'0', '1', '2', '3', '4' …")


def test_a_likelihood_without_the_policys_stop_token_is_refused(policy: Policy) -> None:
    tokenizer = worlds.char_tokenizer([*worlds.TOKENS[:-2], "<|bye|>", worlds.UNK], eos="<|bye|>")
    worlds.refused(lambda: worlds.tiny_logratio(policy, tokenizer=tokenizer), "ratio", "stop tokens")


def test_an_encoder_is_refused(policy: Policy) -> None:
    from transformers import BertConfig, BertForSequenceClassification

    config = BertConfig(
        vocab_size=27, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, num_labels=1
    )
    model = BertForSequenceClassification(config)
    worlds.refused(lambda: build_scalar_reward(policy, model, worlds.char_tokenizer(), "bert"), "score")


# --- hard = soft = cached ---------------------------------------------------------------------------------


@contextmanager
def _patched(owner: Any, name: str, value: Any) -> Iterator[None]:
    before = getattr(owner, name)
    setattr(owner, name, value)
    try:
        yield
    finally:
        setattr(owner, name, before)


def _forward(model: PreTrainedModel, change: Callable[[dict, torch.Tensor], torch.Tensor]) -> Any:
    """A backbone forward whose last hidden state passes through `change(arguments, hidden)`."""
    plain = model.base_model.forward

    def forward(**arguments: Any) -> Any:
        output = plain(**arguments)
        output.last_hidden_state = change(arguments, output.last_hidden_state)
        return output

    return _patched(model.base_model, "forward", forward)


def test_sound_rewards_pass_the_check(policy: Policy, reward: Reward) -> None:
    check_reward(reward, policy)


def test_a_model_that_treats_embeddings_otherwise_is_refused(policy: Policy, reward: Reward) -> None:
    """As one does that scales its embeddings only where it looks the ids up itself."""
    with _forward(reward.objectives[0].model, lambda given, h: h if given.get("inputs_embeds") is None else 1.1 * h):
        worlds.refused(lambda: check_reward(reward, policy), reward.name, "through embeddings")


def test_a_model_whose_cache_changes_the_score_is_refused(policy: Policy, reward: Reward) -> None:
    """As one does that ignores the cached prefix."""

    def change(given: dict, hidden: torch.Tensor) -> torch.Tensor:
        cached = given.get("past_key_values") is not None and hidden.shape[1] < given["attention_mask"].shape[-1]
        return 1.1 * hidden if cached else hidden

    with _forward(reward.objectives[0].model, change):
        worlds.refused(lambda: check_reward(reward, policy), reward.name, "through the prefix cache")


def test_the_probe_reads_ordinary_tokens_only() -> None:
    """Special tokens first, and no digits: the probe's question must be one that the policy can read."""
    tokens = ["<|a|>", "<|b|>", "<|c|>", "<|d|>", worlds.UNK, worlds.PAD, worlds.USER, worlds.ASSISTANT]
    tokenizer = worlds.char_tokenizer([*tokens, worlds.END, *"uvwxyz"])
    policy = worlds.tiny_policy(tokenizer=tokenizer)
    check_reward(worlds.tiny_scalar(policy), policy)


# --- batches, caches, costs -------------------------------------------------------------------------------


def test_a_batch_scores_like_singles_whatever_its_size(policy: Policy, reward: Reward) -> None:
    samples = _samples(policy)
    singles = [_score(reward, [sample])[0] for sample in samples]
    assert _score(reward, samples) == pytest.approx(singles, rel=1e-4, abs=1e-4)
    with _patched(reward, "batch_size", 3):
        assert _score(reward, samples[::-1]) == pytest.approx(singles[::-1], rel=1e-4, abs=1e-4)


def test_scoring_from_a_shared_beginning_equals_scoring_afresh(policy: Policy, reward: Reward) -> None:
    samples, meter = _samples(policy)[::2], FlopCounter()
    bare = reward.compute_prompt_caches(samples, meter)
    _, caches = reward.score(samples, bare, flop_counter=meter, return_caches=True)
    for cut in (0, 1, 3):
        moved = [
            Sample(s.problem, s.prompt_ids, [*s.response_ids[: min(cut, len(s.response_ids) - 1)], 4, 5, END])
            for s in samples
        ]
        shared = [min(cut, len(s.response_ids) - 1) for s in samples]
        branch = FlopCounter()
        scores, _ = reward.score(moved, caches, flop_counter=branch, num_shared=shared)
        assert scores == pytest.approx(_score(reward, moved), rel=1e-4, abs=1e-4)
        fed = branch.get_total_cost().tokens[
            "reward/forward"
        ]  # the token before the branch, the branch, 5 and the stop
        assert fed == len(samples) * (4 if reward.kind == "scalar" else 3)


def test_scores_charge_the_problem_they_belong_to(policy: Policy, scalar_reward: Reward) -> None:
    [first, *_], meter = _samples(policy), FlopCounter()
    _score(scalar_reward, [first], meter)
    prompt, rest = len(first.prompt_ids), len(first.response_ids) + 1
    [term] = scalar_reward.objectives
    assert meter.get_cost("q0").tokens == {"reward/prefill": prompt - 1, "reward/forward": rest}
    assert meter.get_cost("q0").flops == term.model_size.compute_forward_flops(
        0, prompt - 1, 0
    ) + term.model_size.compute_forward_flops(prompt - 1, rest, rest)
    assert meter.get_total_cost().flops == meter.get_cost("q0").flops


# --- the score at every token -----------------------------------------------------------------------------


def _levels(reward: Reward, samples: Sequence[Sample]) -> list[torch.Tensor]:
    prompt_caches = reward.compute_prompt_caches(samples, FlopCounter())
    return [
        cache[0].prefix_scores
        for cache in reward.score(samples, prompt_caches, flop_counter=FlopCounter(), return_caches=True)[1]
    ]


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_levels_are_the_plain_scores_of_the_beginnings(architecture: str) -> None:
    """… of the response: what closes the turn after it is no part of it."""
    policy = worlds.tiny_policy(dtype=torch.float64)
    reward = worlds.tiny_scalar(policy, architecture)
    samples = _samples(policy)
    for sample, levels in zip(samples, _levels(reward, samples), strict=True):
        counts = range(len(sample.response_ids) + 1)
        plain = [
            _plain_score(reward.objectives[0].model, sample.prompt_ids + sample.response_ids[:count])
            for count in counts
        ]
        assert levels.tolist() == pytest.approx(plain, rel=1e-9, abs=1e-12)
    for bare in reward.compute_prompt_caches(samples, FlopCounter()):
        assert len(bare[0].prefix_scores) == 0
    ratio = worlds.tiny_logratio(policy)
    assert [len(levels) for levels in _levels(ratio, samples)] == [0] * len(samples)  # it has no score


def test_levels_remembered_across_a_shared_beginning_equal_those_of_a_full_scoring() -> None:
    """… however long the branch is, and across a second one."""
    policy = worlds.tiny_policy(dtype=torch.float64)
    reward = worlds.tiny_scalar(policy)
    samples = _samples(policy)
    _, caches = reward.score(
        samples, reward.compute_prompt_caches(samples, FlopCounter()), flop_counter=FlopCounter(), return_caches=True
    )
    for cuts, suffix in (((0, 1, 3, 99), [4, 5, END]), ((2, 4, 0, 1), [6]), ((1, 3, 2, 0), [7, 7, 7, 7])):
        shared = [min(cut, len(s.response_ids) - 1) for cut, s in zip([*cuts, *cuts], samples, strict=True)]
        samples = [
            Sample(s.problem, s.prompt_ids, s.response_ids[:cut] + suffix)
            for s, cut in zip(samples, shared, strict=True)
        ]
        _, caches = reward.score(samples, caches, flop_counter=FlopCounter(), num_shared=shared, return_caches=True)
        for sample, [cache], afresh in zip(samples, caches, _levels(reward, samples), strict=True):
            assert (
                len(cache.prefix_scores) == len(sample.response_ids) + 1 and cache.prefix_scores.dtype == torch.float64
            )
            assert torch.allclose(cache.prefix_scores, afresh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("template", ["none", "nothing after the response", "closed"])
def test_where_nothing_follows_the_response_its_steps_add_up_to_the_score(template: str) -> None:
    """s_T = s_1 + Σ_{t>1} (s_t − s_{t−1}), and of the direct part the own tokens' entries are these differences."""
    policy = worlds.tiny_policy(dtype=torch.float64)
    own_value = {"none": None, "closed": worlds.TEMPLATE, **{key: item for key, (item, _) in OTHER_TEMPLATES.items()}}
    reward = worlds.tiny_scalar(policy, tokenizer=worlds.char_tokenizer(template=own_value[template]))
    samples = _samples(policy)
    prompt_caches = reward.compute_prompt_caches(samples, FlopCounter())
    values, caches = reward.score(samples, prompt_caches, flop_counter=FlopCounter(), return_caches=True)
    tables = [torch.arange(len(worlds.TOKENS)).expand(len(sample.response_ids), -1) for sample in samples]
    result = reward.compute_direct_gradient(samples, caches, tables, flop_counter=FlopCounter())
    open_ended = 0
    for sample, value, [cache], slope in zip(samples, values, caches, result, strict=True):
        total = float(cache.prefix_scores[0] + cache.prefix_scores.diff().sum())
        steps = slope[range(len(sample.response_ids)), sample.response_ids]
        assert steps[0] == 0 and int(slope.count_nonzero()) == len(sample.response_ids) - 1
        assert float(cache.prefix_scores[1] + steps.double().sum()) == pytest.approx(total, rel=1e-5, abs=1e-5)
        if template != "closed" or sample.response_ids[-1] == END:  # nothing closes the turn any more
            assert total == pytest.approx(value, rel=1e-12)
        else:
            open_ended += 1
            assert abs(total - value) > 1e-3
    assert open_ended == (len(TEXTS) if template == "closed" else 0)


# --- templates --------------------------------------------------------------------------------------------

OTHER_TEMPLATES = {
    "other turns": (
        "{% for m in messages %}{{ '#' + m['role'][0] + '*' + m['content'] + ';' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '#a*' }}{% endif %}",
        "#u*{}; #a*{};",
    ),
    "no generation prompt": (
        "{% for m in messages %}{{ ('a=' if m['role'] == 'user' else 'b=') + m['content'] + '<|end|>' }}{% endfor %}",
        "a={}<|end|> b={}<|end|>",
    ),
    "nothing after the response": (
        "{% for m in messages %}{{ '-' + m['content'] }}{% endfor %}{% if add_generation_prompt %}-{% endif %}",
        "-{} -{}",
    ),
}
OTHER_CHARS = (*worlds.CHARS, "u", *worlds.TOKENS[len(worlds.CHARS) :])


@pytest.mark.parametrize("name", OTHER_TEMPLATES)
def test_the_rewards_own_template_is_used(name: str, policy: Policy) -> None:
    """The score is that of the text which the reward's template renders, read in the reward's own ids."""
    template, rendered = OTHER_TEMPLATES[name]
    tokenizer, _ = worlds.permuted_tokenizer(worlds.char_tokenizer(OTHER_CHARS, template=template))
    model = _scorer(vocab=len(tokenizer), eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    reward = build_scalar_reward(policy, model, tokenizer, "other")
    samples = _samples(policy)
    for sample, score in zip(samples, _score(reward, samples), strict=True):
        text = rendered.replace(" ", "").format(sample.problem.question, policy.decode(sample.response_ids))
        turns = [
            *sample.problem.build_messages(),
            {"role": "assistant", "content": policy.decode(sample.response_ids)},
        ]
        assert text == tokenizer.apply_chat_template(turns, tokenize=False)
        if name == "nothing after the response" and sample.response_ids[-1] == END:
            text += worlds.END  # the policy's own stop token stays where no tail takes its place
        ids = tokenizer(text, add_special_tokens=False)["input_ids"]
        assert score == pytest.approx(_plain_score(model, ids), abs=1e-4)


def test_without_template_the_policys_prompt_is_read(policy: Policy) -> None:
    tokenizer, new_ids = worlds.permuted_tokenizer(worlds.char_tokenizer(template=None))
    model = _scorer(eos=tokenizer.eos_token_id, pad=tokenizer.pad_token_id)
    reward = build_scalar_reward(policy, model, tokenizer, "bare")
    samples = _samples(policy)
    for sample, score in zip(samples, _score(reward, samples), strict=True):
        ids = new_ids[sample.prompt_ids + sample.response_ids].tolist()
        assert score == pytest.approx(_plain_score(model, ids), abs=1e-4)


def test_the_prompt_is_that_of_the_whole_chat(policy: Policy, scalar_reward: Reward) -> None:
    """Two chats that end in the same question, under the same id."""
    question = {"role": "user", "content": "1+2"}
    chats = [(question,), ({"role": "user", "content": "7"}, {"role": "assistant", "content": "8"}, question)]
    scores = []
    for messages in chats:
        problem = Problem(id="same", question="1+2", messages=messages)
        sample = worlds.sample(policy, problem, "3")
        scores += _score(scalar_reward, [sample])
        [term] = scalar_reward.objectives
        assert scores[-1] == pytest.approx(_plain_score(term.model, sample.prompt_ids + sample.response_ids), abs=1e-4)
    assert abs(scores[0] - scores[1]) > 1e-3


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_a_reward_whose_padding_is_its_eos(architecture: str, policy: Policy, tmp_path: Path) -> None:
    """transformers pools ids at the last token that is not padding; the reward must read the eos itself."""
    tokenizer = worlds.char_tokenizer(pad=worlds.END)
    model = _scorer(architecture, pad=END)
    reward = load_reward(worlds.save(tmp_path, model, tokenizer), policy=policy)
    samples = _samples(policy)[::2]
    for sample, score in zip(samples, _score(reward, samples), strict=True):
        ids = sample.prompt_ids + sample.response_ids
        assert score == pytest.approx(_plain_score(model, ids), abs=1e-4)
        assert abs(score - float(model(torch.tensor([ids])).logits.detach())) > 1e-3


@pytest.mark.parametrize("template", ["{{ messages[0]['content'] }}", "{{ messages[-1]['content'] * 2 }}"])
def test_a_template_that_does_not_show_the_response_once_is_refused(policy: Policy, template: str) -> None:
    tokenizer = worlds.char_tokenizer(template=template)
    worlds.refused(lambda: worlds.tiny_scalar(policy, tokenizer=tokenizer), "template", "assistant's response")


# --- what a reward cannot read ----------------------------------------------------------------------------


@pytest.fixture
def narrow(policy: Policy) -> Reward:
    """A reward that lacks two of the policy's special tokens and has a template without them."""
    tokens = [*worlds.CHARS, worlds.PAD, worlds.END, worlds.UNK]
    template, _ = OTHER_TEMPLATES["nothing after the response"]
    tokenizer = worlds.char_tokenizer(tokens, template=template)
    return worlds.tiny_scalar(policy, tokenizer=tokenizer)


def test_a_response_with_an_unreadable_token_scores_minus_infinity(policy: Policy, narrow: Reward) -> None:
    good = _samples(policy)[:2]
    user = worlds.TOKENS.index(worlds.USER)
    bad = [Sample(s.problem, s.prompt_ids, [user, *s.response_ids]) for s in good]
    mixed = [bad[0], good[0], good[1], bad[1]]
    scores = _score(narrow, mixed)
    assert [scores[0], scores[3]] == [-math.inf, -math.inf]
    assert scores[1:3] == pytest.approx(_score(narrow, good), abs=1e-5)
    assert all(map(math.isfinite, scores[1:3]))


def test_an_unreadable_prompt_is_refused_by_name(policy: Policy) -> None:
    tokenizer = worlds.char_tokenizer([*worlds.CHARS, worlds.PAD, worlds.END, worlds.UNK], template=None)
    reward = worlds.tiny_scalar(policy, tokenizer=tokenizer)  # without a template it reads the policy's prompt
    problem = worlds.tiny_problems()[0]
    worlds.refused(lambda: reward.compute_max_new_tokens(problem, policy.encode(problem)), "q0", "scorer", "no token")


def test_characters_unknown_to_the_rewards_template_are_refused_by_name() -> None:
    tokenizer = worlds.char_tokenizer()
    tokenizer.add_tokens(["é"])  # ordinary text, which a reward may lack because it was added
    policy = worlds.tiny_policy(tokenizer=tokenizer)
    reward = worlds.tiny_scalar(policy, tokenizer=worlds.char_tokenizer())
    problem = Problem(id="accent", question="é")
    worlds.refused(
        lambda: reward.compute_max_new_tokens(problem, policy.encode(problem)), "accent", "scorer", "does not know"
    )


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["scalar", "log-ratio"])
def test_the_rewards_context_limits_prompt_and_response(policy: Policy, kind: str, architecture: str) -> None:
    build = worlds.tiny_scalar if kind == "scalar" else worlds.tiny_logratio
    reward = build(policy, architecture, context=16, layers=1)
    tail = 1 if kind == "scalar" else 0
    problem = Problem(id="p", question="1" * 9)
    prompt = policy.encode(problem)
    assert reward.compute_max_new_tokens(problem, prompt) == 16 - len(prompt) - tail
    response = [1] * (16 - len(prompt) - tail)
    fits, long = Sample(problem, prompt, response), Sample(problem, prompt, [1, 1, *response])
    scores = _score(reward, [long, fits])
    assert scores[0] == -math.inf and math.isfinite(scores[1])
    problem = Problem(id="wide", question="1" * 13)
    worlds.refused(lambda: reward.compute_max_new_tokens(problem, policy.encode(problem)), "wide", "context")


def test_an_empty_response_and_one_of_a_stop_token_alone(policy: Policy, scalar_reward: Reward) -> None:
    problem = worlds.tiny_problems()[0]
    prompt = policy.encode(problem)
    scores = _score(scalar_reward, [Sample(problem, prompt, []), Sample(problem, prompt, [END])])
    [term] = scalar_reward.objectives
    assert scores == pytest.approx([_plain_score(term.model, [*prompt, END])] * 2, abs=1e-4)


# --- verifier ---------------------------------------------------------------------------------------------


def test_the_verifier_labels_texts() -> None:
    problems = [Problem(id="a", question="", answer="8"), Problem(id="b", question="", answer="9"), Problem("c", "")]
    with AnswerChecker() as checker:
        labels = Verifier(checker)(problems, ["3+5=8;#8", "#8", "#8"])
    assert labels == [("8", MatchResult.CORRECT), ("8", MatchResult.INCORRECT), ("8", MatchResult.NO_GOLD)]
