"""Process rewards: a score summed over the ends of steps, against plain forwards and plain autograd."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import worlds
from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import AutoModelForSequenceClassification, PreTrainedModel

from nabla_trl.audit.gradient import audit_gradient
from nabla_trl.audit.ranking import audit_ranking
from nabla_trl.baselines.sampling import draw_pool
from nabla_trl.gradient.objectives import Sample
from nabla_trl.gradient.score import ProcessObjective
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import FlopCounter
from nabla_trl.models.options import HARD_GRADIENT_POINT, GradientPoint, Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.card import render_reward_readme
from nabla_trl.rewards.limits import ValidatedLimits
from nabla_trl.rewards.loading import (
    build_ensemble_reward,
    build_process_reward,
    build_scalar_reward,
    check_reward,
    load_reward,
)
from nabla_trl.rewards.reward import Reward
from nabla_trl.rewards.spec import (
    RewardManifest,
    RewardSpec,
    compute_reward_identity,
    parse_reward_spec,
    write_manifest,
)
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search

DOUBLE = torch.float64
END = worlds.TOKENS.index(worlds.END)
TEXTS = ("1+2=3", "3*4=12;12-5=7;#7", "7;", "12-3=9;4*5=20;;9+20=29#29")
# How an assistant's turn ends: with the policy's own stop token; with more after it; otherwise; not at all.
CLOSINGS = {"stop": worlds.END, "stop and more": f"{worlds.END}a;", "otherwise": "b;", "nothing": ""}
EACH = list(zip(worlds.ARCHITECTURES, CLOSINGS.values(), strict=True))


def template(closing: str) -> str:
    return worlds.TEMPLATE.replace(worlds.END, closing)


def scorer(policy: Policy, architecture: str = "llama", *, seed: int = 1) -> PreTrainedModel:
    return worlds.tiny_model(architecture, kind="score", seed=seed, dtype=policy.model.dtype)


def rewards(
    policy: Policy, architecture: str = "llama", *, delimiter: str = ";", closing: str = worlds.END, seed: int = 1
) -> tuple[Reward, Reward]:
    """A process reward and the scalar one of the same model."""
    model, tokenizer = scorer(policy, architecture, seed=seed), worlds.char_tokenizer(template=template(closing))
    return build_process_reward(policy, model, tokenizer, "steps", step_delimiter=delimiter), build_scalar_reward(
        policy, model, tokenizer, "whole"
    )


def samples(policy: Policy) -> list[Sample]:
    """Finished and unfinished responses of mixed lengths."""
    pairs = list(zip(worlds.tiny_problems(), TEXTS, strict=True))
    return [worlds.sample(policy, problem, text, finished=done) for problem, text in pairs for done in (True, False)]


def score(reward: Reward, items: Sequence[Sample]) -> list[float]:
    return reward.score(items, reward.compute_prompt_caches(items, FlopCounter()), flop_counter=FlopCounter())[0]


def written(response: Sequence[int], delimiter: str) -> list[int]:
    """How many tokens of a response have been read at the end of each step, by its characters."""
    text, ends = "".join(worlds.TOKENS[index] if index != END else "" for index in response), []
    begin = text.find(delimiter)
    while begin >= 0:
        ends.append(begin + len(delimiter))
        begin = text.find(delimiter, ends[-1])
    return ends


def closed(response: list[int], closing: str) -> list[int]:
    """The response in its turn, from the definition: a stop token stays if it is how the turn ends, or if none is."""
    tail = list(worlds.char_tokenizer()(closing, add_special_tokens=False)["input_ids"])
    body = response[:-1] if response[-1] == END else response
    return body + (tail or response[len(body) :])


def levels(model: PreTrainedModel, prompt: list[int], response: list[int]) -> Tensor:
    """[T + 1] the head's output after none, one, … of the tokens, by one plain forward."""
    states = model.base_model(torch.tensor([prompt + response])).last_hidden_state[0, len(prompt) - 1 :]
    return model.score(states).squeeze(-1).detach()


def plain(reward: Reward, item: Sample, delimiter: str, closing: str = worlds.END) -> float:
    [term] = reward.objectives
    sequence = closed(item.response_ids, closing)
    places = {*written(item.response_ids, delimiter), len(sequence)}
    return float(levels(term.model, term.encode(item).prompt_ids, sequence)[sorted(places)].sum())


@pytest.fixture(scope="module")
def double() -> Policy:
    return worlds.tiny_policy(dtype=DOUBLE)


# --- values -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "=", "9;", ";;", "2"])
@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_the_sum_of_scores_at_the_ends_of_steps(architecture: str, delimiter: str, double: Policy) -> None:
    reward, _ = rewards(double, architecture, delimiter=delimiter)
    items = samples(double)
    values = score(reward, items)
    assert values == pytest.approx([plain(reward, item, delimiter) for item in items], rel=1e-9)
    assert [score(reward, [item])[0] for item in items] == pytest.approx(values, rel=1e-9)
    assert (reward.kind, reward.preferred_model, reward.validated_limits, reward.has_dense_gradient) == (
        "process",
        None,
        None,
        False,
    )


@pytest.mark.parametrize("closing", CLOSINGS.values(), ids=CLOSINGS)
def test_whatever_closes_the_turn(closing: str, double: Policy) -> None:
    """It is read after it, once, and a delimiter in it ends no step."""
    reward, whole = rewards(double, closing=closing)
    items = samples(double)
    values, ends = score(reward, items), score(whole, items)
    assert values == pytest.approx([plain(reward, item, ";", closing) for item in items], rel=1e-9)
    for item, value, end in zip(items, values, ends, strict=True):
        alone = not written(item.response_ids, ";") or (
            not closing and written(item.response_ids, ";") == [len(item.response_ids)]
        )
        assert (value == pytest.approx(end, rel=1e-9)) == alone


def test_the_sum_of_scalar_rewards_of_the_truncated_responses(double: Policy) -> None:
    """… where nothing closes a turn, so that a scalar reward reads a response that is cut after its last token."""
    reward, whole = rewards(double, closing="")
    for item in samples(double):
        cuts = sorted({*written(item.response_ids, ";"), len(item.response_ids)})
        parts = score(whole, [replace(item, response_ids=item.response_ids[:cut]) for cut in cuts])
        assert score(reward, [item]) == pytest.approx([sum(parts)], rel=1e-9)


def test_a_response_without_a_delimiter_has_the_scalar_rewards_value(double: Policy) -> None:
    for closing in CLOSINGS.values():
        reward, whole = rewards(double, delimiter="ff", closing=closing)
        assert score(reward, samples(double)) == score(whole, samples(double))


def test_shuffled_ids_padded_rows_and_unreadable_tokens(double: Policy) -> None:
    model = scorer(double)
    tokenizer, new_ids = worlds.permuted_tokenizer(worlds.char_tokenizer())
    moved = worlds.permuted_model(model, new_ids, len(tokenizer) + 5)
    one = build_process_reward(double, model, worlds.char_tokenizer(), "plain", step_delimiter="9;")
    other = build_process_reward(double, moved, tokenizer, "moved", step_delimiter="9;")
    check_reward(other, double, step_delimiter="9;")
    assert score(one, samples(double)) == pytest.approx(score(other, samples(double)), rel=1e-9)
    item = samples(double)[0]
    assert one.compute_max_new_tokens(item.problem, item.prompt_ids) == build_scalar_reward(
        double, model, double.tokenizer, "s"
    ).compute_max_new_tokens(item.problem, item.prompt_ids)
    long = replace(item, response_ids=[1] * (128 - len(item.prompt_ids)))
    assert score(one, [long]) == [-float("inf")]


# --- memory -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("delimiter", [";", "9;", ";;"])
@pytest.mark.parametrize(("architecture", "closing"), EACH, ids=CLOSINGS)
def test_scoring_from_a_branch_on_equals_scoring_the_whole(
    architecture: str, closing: str, delimiter: str, double: Policy
) -> None:
    """At every place, so before, within and after delimiters; and a branch's memory is as good for another branch."""
    reward, _ = rewards(double, architecture, delimiter=delimiter, closing=closing)
    start = samples(double)[-1]
    suffixes = ["", ";", "9;1", ";;2;", "8"]
    for finished in (True, False):
        items, caches, shared = [start], [reward.compute_prompt_caches([start], FlopCounter())[0]], [0]
        for turn in range(3):
            values, caches = reward.score(
                items, caches, flop_counter=FlopCounter(), num_shared=shared, return_caches=True
            )
            bare = reward.compute_prompt_caches(items, FlopCounter())
            afresh, fresh = reward.score(items, bare, flop_counter=FlopCounter(), return_caches=True)
            assert values == pytest.approx(afresh, rel=1e-9)
            for [a], [b] in zip(caches, fresh, strict=True):
                assert torch.allclose(a.prefix_scores, b.prefix_scores, rtol=0, atol=1e-9)
            branches = [(row, cut) for row, item in enumerate(items) for cut in range(len(item.response_ids) + 1)]
            branches = branches[:: 1 + 7 * turn]
            new = [
                worlds.sample(double, start.problem, suffixes[number % 5], finished=finished).response_ids
                for number in range(len(branches))
            ]
            caches = [caches[row] for row, _ in branches]
            items = [
                replace(items[row], response_ids=items[row].response_ids[:cut] + ids)
                for (row, cut), ids in zip(branches, new, strict=True)
            ]
            shared = [cut for _, cut in branches]
            read = [
                index for index, item in enumerate(items) if item.response_ids and END not in item.response_ids[:-1]
            ]
            items, caches, shared = ([column[i] for i in read] for column in (items, caches, shared))
    assert len(items) > 10


def test_a_branch_is_charged_from_where_it_begins(double: Policy) -> None:
    reward, whole = rewards(double)
    item = samples(double)[2]
    _, caches = reward.score(
        [item], reward.compute_prompt_caches([item], FlopCounter()), flop_counter=FlopCounter(), return_caches=True
    )
    costs = []
    for one, prompt_caches in ((reward, caches), (whole, caches)):
        meter = FlopCounter()
        one.score([item], prompt_caches, flop_counter=meter, num_shared=[len(item.response_ids) - 2])
        costs.append(meter.get_total_cost().flops)
        assert meter.get_total_cost().tokens == {"reward/forward": 3}
    assert costs[0] == costs[1]


@pytest.mark.parametrize(("architecture", "closing"), EACH, ids=CLOSINGS)
def test_an_open_turn_is_read_at_its_last_token(architecture: str, closing: str, double: Policy) -> None:
    """… whatever would close it; and a response is scored on from its beginning, and pays for the rest alone."""
    both = rewards(double, architecture, closing=closing)
    item = samples(double)[-2]
    [term] = both[0].objectives
    for reward, delimiter in zip(both, (";", "ff"), strict=True):
        read = levels(term.model, term.encode(item).prompt_ids, closed(item.response_ids, closing))
        [bare] = reward.compute_prompt_caches([item], FlopCounter())
        [whole] = score(reward, [item])
        for cut in range(1, len(item.response_ids)):
            part = replace(item, response_ids=item.response_ids[:cut], is_partial=True)
            [value], [memo] = reward.score([part], [bare], flop_counter=(meter := FlopCounter()), return_caches=True)
            places = sorted({*written(part.response_ids, delimiter), cut})
            assert value == pytest.approx(float(read[places].sum()), rel=1e-9)
            assert meter.get_total_cost().tokens == {"reward/forward": cut + 1}  # and the prompt's last token
            [after], _ = reward.score([item], [memo], flop_counter=(meter := FlopCounter()), num_shared=[cut])
            assert after == pytest.approx(whole, rel=1e-9)
            assert meter.get_total_cost().tokens == {
                "reward/forward": len(term.select_input_ids(term.encode(item), cut))
            }


# --- gradients --------------------------------------------------------------------------------------------


def value_at(reward: Reward, item: Sample, rows: Tensor, delimiter: str, closing: str) -> Tensor:
    """The reward at token weights [T, V], by the model's own forward; the steps are the response's."""
    [term] = reward.objectives
    prompt, sequence = term.encode(item).prompt_ids, closed(item.response_ids, closing)
    table = term.model.get_input_embeddings().weight
    count = min(len(sequence), len(item.response_ids))  # without a stop token that the template drops
    if item.response_ids[-1] == END and sequence[len(item.response_ids) - 1 : len(item.response_ids)] != [END]:
        count = len(item.response_ids) - 1
    embeds = torch.cat((table[prompt], rows[:count] @ table, table[sequence[count:]]))
    states = term.model.base_model(inputs_embeds=embeds[None]).last_hidden_state[0, len(prompt) - 1 :]
    places = {*written(item.response_ids, delimiter), len(sequence)}
    return term.model.score(states[sorted(places)]).sum()


@pytest.mark.parametrize(("alpha", "exact"), [(0.0, 1e-9), (0.6, 1e-5)], ids=["hard", "mixture"])
@pytest.mark.parametrize(("architecture", "closing"), EACH, ids=CLOSINGS)
def test_the_gradient_equals_autograd_through_the_one_hot(
    architecture: str, closing: str, alpha: float, exact: float
) -> None:
    """In a batch as alone, and at candidates as everywhere."""
    policy = worlds.tiny_policy(architecture, dtype=DOUBLE)
    reward, _ = rewards(policy, architecture, closing=closing)
    items = [worlds.known(policy, item) for item in samples(policy)[2:6]]
    point = GradientPoint((alpha,)) if alpha else HARD_GRADIENT_POINT
    prompt_caches = reward.compute_prompt_caches(items, FlopCounter())
    gradients = reward.compute_backward_gradient(
        items, prompt_caches, None, flop_counter=FlopCounter(), gradient_at=point
    )
    tables = [item.draw_info.candidates for item in items]
    at_candidates = reward.compute_backward_gradient(
        items, prompt_caches, tables, flop_counter=FlopCounter(), gradient_at=point
    )
    for item, memo, ours, few, table in zip(items, prompt_caches, gradients, at_candidates, tables, strict=True):
        rows = worlds.mixed(item, alpha, ours.shape[1]).requires_grad_(True)
        theirs = torch.autograd.grad(value_at(reward, item, rows, ";", closing), rows)[0]
        readable = reward.in_vocabulary
        scale = float(theirs.abs().max())
        assert scale > 1e-3 and float((ours - theirs)[:, readable].abs().max()) <= exact * scale
        alone = reward.compute_backward_gradient([item], [memo], None, flop_counter=FlopCounter(), gradient_at=point)[
            0
        ]
        torch.testing.assert_close(alone, ours, rtol=1e-7, atol=1e-9)
        torch.testing.assert_close(ours.gather(1, table), few, rtol=1e-7, atol=1e-9)


def test_the_gradient_equals_central_differences(double: Policy) -> None:
    reward, whole = rewards(double)
    item = worlds.known(double, samples(double)[2])
    [ours], [other] = (
        r.compute_backward_gradient(
            [item], r.compute_prompt_caches([item], FlopCounter()), None, flop_counter=FlopCounter()
        )
        for r in (reward, whole)
    )
    rows, step = worlds.mixed(item, 0.0, ours.shape[1]), 1e-4
    for place in [(0, 3), (6, 11), (7, 0), (len(item.response_ids) - 1, 7)]:
        with torch.no_grad():
            shift = torch.zeros_like(rows)
            shift[place] = step
            ends = [float(value_at(reward, item, rows + by * shift, ";", worlds.END)) for by in (1, -1)]
        slope = (ends[0] - ends[1]) / (2 * step)
        assert slope == pytest.approx(float(ours[place]), abs=1e-6 * float(ours.abs().max()))
    last = written(item.response_ids, ";")[-1]
    torch.testing.assert_close(ours[last:], other[last:], rtol=1e-9, atol=1e-9)  # only the end is read after it
    assert float((ours[:last] - other[:last]).abs().max()) > 1e-3


# --- the direct part --------------------------------------------------------------------------------------


def direct(reward: Reward, items: Sequence[Sample]) -> list[Tensor]:
    """[T, V] direct parts, which must cost nothing."""
    prompt_caches = reward.compute_prompt_caches(items, FlopCounter())
    _, caches = reward.score(items, prompt_caches, flop_counter=FlopCounter(), return_caches=True)
    tables = [torch.arange(len(reward.in_vocabulary)).expand(len(item.response_ids), -1) for item in items]
    meter = FlopCounter()
    gradients = reward.compute_direct_gradient(items, caches, tables, flop_counter=meter)
    assert meter.get_total_cost().flops == 0
    return gradients


@pytest.mark.parametrize("closing", CLOSINGS.values(), ids=CLOSINGS)
def test_the_direct_part_is_what_a_token_added_to_every_score_after_it(closing: str, double: Policy) -> None:
    reward, _ = rewards(double, closing=closing)
    items = samples(double)
    for item, slope in zip(items, direct(reward, items), strict=True):
        prompt, sequence = reward.objectives[0].encode(item).prompt_ids, closed(item.response_ids, closing)
        scores = levels(reward.objectives[0].model, prompt, sequence)
        reads = {*written(item.response_ids, ";"), len(sequence)}
        own = len(reward.objectives[0].encode(item).response_ids)
        expected = torch.zeros(slope.shape, dtype=DOUBLE)
        for at in range(1, own):
            later = sum(place > at for place in reads)
            expected[at, item.response_ids[at]] = later * (scores[at + 1] - scores[at])
        torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-6)
        if own == len(sequence):  # nothing but the response is read: the parts make up the reward
            begin = float(len(reads) * scores[1])
            assert begin + float(slope.double().sum()) == pytest.approx(score(reward, [item])[0], rel=1e-5, abs=1e-5)


def test_without_steps_the_direct_part_is_the_scalar_rewards(double: Policy) -> None:
    for closing in CLOSINGS.values():
        reward, whole = rewards(double, delimiter="ff", closing=closing)
        for ours, theirs in zip(direct(reward, samples(double)), direct(whole, samples(double)), strict=True):
            assert torch.equal(ours, theirs) and ours.any()


def test_the_direct_part_survives_branches(double: Policy) -> None:
    reward, _ = rewards(double)
    item = samples(double)[2]
    _, caches = reward.score(
        [item], reward.compute_prompt_caches([item], FlopCounter()), flop_counter=FlopCounter(), return_caches=True
    )
    branch = replace(item, response_ids=[*item.response_ids[:9], *item.response_ids[6:]])
    _, caches = reward.score([branch], caches, flop_counter=FlopCounter(), num_shared=[9], return_caches=True)
    table = torch.arange(len(reward.in_vocabulary)).expand(len(branch.response_ids), -1)
    [through] = reward.compute_direct_gradient([branch], caches, [table], flop_counter=FlopCounter())
    torch.testing.assert_close(through, direct(reward, [branch])[0], rtol=1e-6, atol=1e-7)


# --- ensembles --------------------------------------------------------------------------------------------


def test_an_ensemble_of_process_rewards(double: Policy) -> None:
    """Score, gradient and direct part are those of the bound of the members' sums."""
    members = [rewards(double, seed=seed)[0] for seed in (1, 2, 3)]
    reward, items = (
        build_ensemble_reward(members, 1.5, "three"),
        [worlds.known(double, item) for item in samples(double)[2:6]],
    )
    check_reward(reward, double, step_delimiter=";")
    sums = torch.tensor([score(one, items) for one in members], dtype=DOUBLE)
    bound = sums.mean(0) - 1.5 * sums.std(0, correction=0)
    assert score(reward, items) == pytest.approx(bound.tolist(), rel=1e-9)
    gradients = reward.compute_backward_gradient(
        items, reward.compute_prompt_caches(items, FlopCounter()), None, flop_counter=FlopCounter()
    )
    for item, ours, parts in zip(items, gradients, direct(reward, items), strict=True):
        rows = worlds.mixed(item, 0.0, ours.shape[1]).requires_grad_(True)
        values = torch.stack([value_at(one, item, rows, ";", worlds.END) for one in members])
        theirs = torch.autograd.grad(values.mean(0) - 1.5 * values.std(0, correction=0), rows)[0]
        torch.testing.assert_close(
            ours[:, reward.in_vocabulary], theirs[:, reward.in_vocabulary], rtol=1e-7, atol=1e-9
        )
        if item.response_ids[-1] == END:
            first = score(reward, [item])[0] - float(parts.double().sum())
            reads = len({*written(item.response_ids, ";"), len(item.response_ids)})
            begun = torch.stack(
                [reads * levels(one.objectives[0].model, item.prompt_ids, item.response_ids)[1] for one in members]
            )
            assert first == pytest.approx(float(begun.mean() - 1.5 * begun.std(correction=0)), rel=1e-4, abs=1e-4)


def test_members_that_do_not_go_together(double: Policy) -> None:
    one, whole = rewards(double)
    other, _ = rewards(double, delimiter="=", seed=2)
    for members in ([one, whole], [whole, one], [one, other]):
        worlds.refused(lambda members=members: build_ensemble_reward(members, 1.0, "mixed"), "mixed", "one delimiter")


# --- searches and audits ----------------------------------------------------------------------------------


@pytest.mark.parametrize("setting", ["none", "direct", "hard", "mixture:0.5", "direct+mixture:0.5", "sequential"])
def test_a_search_raises_the_reward_whatever_the_batch(setting: str, double: Policy) -> None:
    """The incumbent's reward, carried through branches, is that of a fresh scoring; a batch of 4 is 4 singles."""
    reward, _ = rewards(double, delimiter="e")
    options: dict[str, Any] = {
        "none": {"solver": "none"},
        "sequential": {"proposals": {"name": "sequential", "confidence": 1.0}, "solver": {"gradient_at": "hard"}},
    }.get(setting, {"solver": {"gradient_at": setting}})
    config = SearchConfig(max_rounds=5, max_new_tokens=10, candidate_min_p=0.0, **options)
    problems = worlds.tiny_problems()
    traces = run_search(problems, policy=double, reward=reward, config=config, seed=0)
    assert any(revision.accepted for trace in traces for revision in trace.revisions)
    steps = 0
    for trace, problem in zip(traces, problems, strict=True):
        assert trace.error is None and trace.reward >= trace.reward_initial
        [again] = score(reward, [Sample(problem, trace.prompt_ids, trace.response_ids)])
        assert trace.reward == pytest.approx(again, rel=1e-7)
        [alone] = run_search([problem], policy=double, reward=reward, config=config, seed=0)
        assert alone.response_ids == trace.response_ids and alone.reward == pytest.approx(trace.reward, rel=1e-9)
        steps += len(written(trace.response_ids, "e"))
    assert steps > 0, "a search without steps tells nothing of them"


def test_ste_follows_it_too(double: Policy) -> None:
    reward, _ = rewards(double, delimiter="e")
    config = SearchConfig(
        solver={"name": "ste", "steps": 3},
        proposals={"name": "sequential", "confidence": 1.0},
        max_rounds=2,
        max_new_tokens=6,
    )
    for trace in run_search(worlds.tiny_problems()[:2], policy=double, reward=reward, config=config, seed=0):
        assert trace.error is None and trace.revisions and trace.reward >= trace.reward_initial


def test_audits_of_a_process_reward(double: Policy) -> None:
    reward, _ = rewards(double, delimiter="e")
    sampling = Sampling(max_new_tokens=8)
    pool = draw_pool(worlds.tiny_problems(), 4, policy=double, reward=reward, sampling=sampling)
    answers = [draw.answer for entry in pool.entries for draw in entry.responses]
    gold = max(filter(None, answers), key=answers.count)
    assert 0 < answers.count(gold) < len(answers)
    entries = [replace(entry, problem=replace(entry.problem, answer=gold)) for entry in pool.entries]
    with AnswerChecker() as checker:
        assert audit_ranking(replace(pool, entries=entries), checker).samples == 4
    gradients = audit_gradient(
        worlds.tiny_problems(),
        policy=double,
        reward=reward,
        gradient_at=["direct", "hard"],
        sampling=sampling,
        samples_per_problem=4,
        num_swaps=20,
    )
    assert set(gradients.gradient_points) == {"direct", "hard"} and gradients.swaps == 20 and gradients.reward_std > 0


# --- specs and folders ------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> str:
    return worlds.save(tmp_path_factory.mktemp("saved"), worlds.tiny_model(kind="score", seed=1))


def copied(saved: str, folder: Path, card: RewardManifest) -> str:
    for file in Path(saved).iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    write_manifest(folder, card)
    return str(folder)


def test_loaded_by_spec_and_by_folder(saved: str, policy: Policy, tmp_path: Path) -> None:
    items = samples(policy)
    model = worlds.tiny_model(kind="score", seed=1)
    folder = copied(saved, tmp_path, RewardManifest("process", step_delimiter="9;"))
    mapping = {"kind": "process", "model": saved, "step_delimiter": ";"}
    texts = ((f"process@;:{saved}", ";"), (rf"process@\x39;:{saved}", "9;"), (folder, "9;"))
    for spec, delimiter in (*texts, (mapping, ";"), (json.dumps(mapping), ";")):
        reward = load_reward(spec, policy=policy, batch_size=3)
        expected = score(
            build_process_reward(policy, model, worlds.char_tokenizer(), "memory", step_delimiter=delimiter), items
        )
        assert score(reward, items) == pytest.approx(expected, rel=1e-4, abs=1e-4)
        name = json.dumps(spec) if isinstance(spec, dict) else spec
        assert (reward.kind, reward.name, reward.batch_size, reward.gradient_at) == ("process", name, 3, "mixture:0.5")
    values = [
        score(load_reward(f"process@;:{name}", policy=policy), items) for name in (saved, adapter(tmp_path, saved))
    ]
    assert values[0] != pytest.approx(values[1], abs=0.1)


def adapter(folder: Path, saved: str) -> str:
    base = AutoModelForSequenceClassification.from_pretrained(saved)
    with torch.random.fork_rng():
        torch.manual_seed(0)
        wrapped = get_peft_model(base, LoraConfig(r=2, target_modules=["q_proj"], task_type="SEQ_CLS"))
        for name, weight in wrapped.named_parameters():
            if "lora_B" in name or "modules_to_save" in name:
                weight.data.normal_(std=0.5)
    wrapped.save_pretrained(folder / "adapter")
    return str(folder / "adapter")


def test_a_folder_brings_its_audit_and_a_spec_none(saved: str, policy: Policy, tmp_path: Path) -> None:
    """The audit of a scalar reward is of another reward than the process one of the same score."""
    card = RewardManifest("scalar", validated_limits=ValidatedLimits(8, 2), gradient_at="direct")
    folder = copied(saved, tmp_path, card)
    reward = load_reward(f"process@;:{folder}", policy=policy)
    assert (reward.validated_limits, reward.gradient_at) == (None, "mixture:0.5")
    write_manifest(folder, replace(card, kind="process", step_delimiter=";"))
    reward = load_reward(folder, policy=policy)
    assert (reward.validated_limits, reward.gradient_at) == (ValidatedLimits(8, 2), "direct")
    assert parse_reward_spec(folder) == RewardSpec(
        folder,
        "process",
        (folder,),
        folder=folder,
        validated_limits=ValidatedLimits(8, 2),
        gradient_at="direct",
        step_delimiter=";",
    )
    assert 'A step ends with ";"' in render_reward_readme(replace(card, kind="process", step_delimiter=";"))


def test_ensembles_of_specs_and_folders(saved: str, policy: Policy, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path, RewardManifest("process", step_delimiter="9;"))
    own = rf"process@9\x3b:{adapter(tmp_path, saved)}"
    reward = load_reward(f"ensemble@0: {own},{folder}", policy=policy)
    parts = [score(load_reward(name, policy=policy), samples(policy)) for name in (own, folder)]
    assert score(reward, samples(policy)) == pytest.approx(
        [sum(values_of_item) / 2 for values_of_item in zip(*parts, strict=True)], rel=1e-5
    )
    for other, words in (
        (f"process@;:{saved}", ["one delimiter"]),
        (saved, ["one delimiter"]),
        (rf"process@9\x3b:{folder}", ["of kind process", "only a scalar one"]),
        (folder + "/../" + Path(folder).name, ["member twice"]),
    ):
        worlds.refused(lambda other=other: parse_reward_spec(f"ensemble:{folder},{other}"), *words)
    worlds.refused(lambda: parse_reward_spec(rf"ensemble:process@;:{saved},process@\x3b:{saved}"), "member twice")


def test_identity_follows_the_delimiter(saved: str, tmp_path: Path) -> None:
    folder = copied(saved, tmp_path, RewardManifest("process", step_delimiter=";"))
    first = compute_reward_identity(folder)
    write_manifest(folder, RewardManifest("process", step_delimiter="="))
    assert compute_reward_identity(folder) != first
    assert compute_reward_identity("process@;:some/model") == "process@;:some/model"


def test_the_default_delimiter_is_a_blank_line(policy: Policy) -> None:
    for spec, delimiter in (("process:a/b", "\n\n"), (r"process@\n:a/b", "\n"), ("process@ :a/b", " ")):
        assert parse_reward_spec(spec) == RewardSpec(spec, "process", ("a/b",), step_delimiter=delimiter)


@pytest.mark.parametrize(
    ("spec", "words"),
    [
        ("process:", ["process:NAME"]),
        ("process@;:", ["process@DELIMITER:NAME"]),
        ("process@:NAME", ["step_delimiter", "at least one character"]),
        ("process@::NAME", ["step_delimiter", "at least one character"]),
        (r"process@\q:NAME", ["step_delimiter", "escapes"]),
        ("process@\n\n:NAME", ["step_delimiter", "escapes"]),
        ("process@;:logratio:a", ["logratio:a is a reward of kind log-ratio"]),
        ("process@;:ensemble:a,b", ["of kind ensemble"]),
        ("process@;:process:a", ["process:a is a reward of kind process"]),
        ("process@;:no/such/model", ["no/such/model"]),
    ],
)
def test_specs_that_are_refused(spec: str, words: list[str], policy: Policy) -> None:
    worlds.refused(lambda: load_reward(spec, policy=policy), *words)


@pytest.mark.parametrize("delimiter", [r"\n\n", "Z", "12x", "<|pad|>"])
def test_a_delimiter_that_no_tokens_write(delimiter: str, saved: str, policy: Policy) -> None:
    """… or that the policy may not write: the padding token."""
    worlds.refused(lambda: load_reward(f"process@{delimiter}:{saved}", policy=policy), saved, "no step could end")


def test_models_that_are_refused(saved: str, policy: Policy, tmp_path: Path) -> None:
    worlds.save(tmp_path / "two", worlds.tiny_model(kind="score", labels=2))
    worlds.tiny_model().save_pretrained(tmp_path / "causal")
    note = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "base_model_name_or_path": str(tmp_path / "causal")}
    (tmp_path / "lora").mkdir()
    (tmp_path / "lora" / "adapter_config.json").write_text(json.dumps(note))
    for name, word in (("two", "2 labels"), ("causal", "causal LM"), ("lora", "adapter of a causal LM")):
        spec = f"process@;:{tmp_path / name}"
        worlds.refused(lambda spec=spec: load_reward(spec, policy=policy), str(tmp_path / name), word)


def test_the_probe_reads_the_end_of_a_step(double: Policy, monkeypatch: pytest.MonkeyPatch) -> None:
    """A reward that would forget the steps is refused at loading, as the probe holds one."""
    reward, _ = rewards(double)
    check_reward(reward, double, step_delimiter=";")
    scores = ProcessObjective._gather_scores
    monkeypatch.setattr(
        ProcessObjective, "_gather_scores", lambda self, hidden, places: scores(self, hidden, [p[-1:] for p in places])
    )
    check_reward(reward, double)
    worlds.refused(lambda: check_reward(reward, double, step_delimiter=";"), "steps", "the prefix cache")
