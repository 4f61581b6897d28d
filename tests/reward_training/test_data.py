"""Data of rewards: candidates as the policy showed them, rows in the reward's ids, files, pairs within problems."""

from __future__ import annotations

import json
import random
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import worlds
from transformers import PreTrainedModel

from nabla_trl.gradient.objectives import DrawInfo, Sample
from nabla_trl.gradient.score import ScoreObjective
from nabla_trl.grading.checker import AnswerChecker
from nabla_trl.models.flops import Cost, FlopCounter
from nabla_trl.models.generation import generate_continuations
from nabla_trl.models.loading import load_policy
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import GenerationRequest, Policy
from nabla_trl.models.sampling import make_rng
from nabla_trl.reward_training.data import (
    LabeledResponse,
    add_draw_info,
    build_pair_rows,
    build_token_rows,
    check_both_classes,
    choose_pairs,
    collect_accepted_responses,
    filter_encodable,
    label_responses,
    read_samples,
    sample_responses,
    write_samples,
)
from nabla_trl.reward_training.labels import TokenLabeler
from nabla_trl.reward_training.token_trainer import TokenCollator, compute_token_scores
from nabla_trl.rewards.loading import build_score_objective
from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.build import build_error_trace, build_response_trace
from nabla_trl.traces.schema import Revision

EMBEDDED = str(Path(__file__).parents[2] / "data" / "tiny" / "policy")
SAMPLING = Sampling(min_p=0.02, max_new_tokens=64)
PROBLEMS = digit_chains.make_digit_chain_problems("train", 12)


@pytest.fixture(scope="module")
def embedded() -> Policy:
    return load_policy(EMBEDDED)


@pytest.fixture(scope="module")
def checker() -> Iterator[AnswerChecker]:
    with AnswerChecker() as item:
        yield item


@pytest.fixture(scope="module")
def labeled(embedded: Policy, checker: AnswerChecker) -> list[LabeledResponse]:
    samples_drawn = sample_responses(PROBLEMS, 3, policy=embedded, sampling=SAMPLING)
    return label_responses(samples_drawn + samples_drawn[:5], policy=embedded, checker=checker, top_k_candidates=6)


def scorer(policy: Policy) -> PreTrainedModel:
    vocab = policy.model.get_input_embeddings().weight.shape[0]
    ids = {"eos": policy.tokenizer.eos_token_id, "pad": policy.tokenizer.pad_token_id}
    return worlds.tiny_model(kind="score", seed=1, vocab=vocab, **ids)


@pytest.fixture(scope="module")
def term(embedded: Policy) -> ScoreObjective:
    """Of a random classifier that shares the embedded policy's tokenizer."""
    return build_score_objective(embedded, scorer(embedded), embedded.tokenizer, "scorer")


def text_of(policy: Policy, sample: Sample) -> str:
    return policy.decode(sample.response_ids)


# --- drawing and labelling --------------------------------------------------------------------------------


def test_labels_are_the_verdicts_on_distinct_responses(embedded: Policy, labeled: list[LabeledResponse]) -> None:
    samples_drawn = sample_responses(PROBLEMS, 3, policy=embedded, sampling=SAMPLING)
    assert Counter(item.problem.id for item in samples_drawn) == {problem.id: 3 for problem in PROBLEMS}
    responses = [(item.sample.problem.id, tuple(item.sample.response_ids)) for item in labeled]
    assert len(responses) == len(set(responses)), "what was given twice is there once"
    assert set(responses) == {(item.problem.id, tuple(item.response_ids)) for item in samples_drawn}
    for item in labeled:
        assert item.correct == digit_chains.is_correct(item.sample.problem, text_of(embedded, item.sample))
        assert item.sample.prompt_ids == embedded.encode(item.sample.problem)
    check_both_classes(labeled)


def test_a_response_depends_on_neither_their_number_nor_the_batch(embedded: Policy) -> None:
    few = sample_responses(PROBLEMS[:4], 2, policy=embedded, sampling=SAMPLING, seed=3)
    many = sample_responses(PROBLEMS, 3, policy=embedded, sampling=SAMPLING, seed=3, batch_size=5)
    by_problem = {problem.id: [item.response_ids for item in many if item.problem == problem] for problem in PROBLEMS}
    assert [item.response_ids for item in few] == [r for problem in PROBLEMS[:4] for r in by_problem[problem.id][:2]]
    other = sample_responses(PROBLEMS[:4], 2, policy=embedded, sampling=SAMPLING, seed=4)
    assert [item.response_ids for item in few] != [item.response_ids for item in other]


def test_problems_that_cannot_be_run_are_left_out_unless_all_are(policy: Policy) -> None:
    unknown = Problem(id="strange", question="what?")  # characters that the tokenizer does not know
    sound = worlds.tiny_problems()[0]
    samples_drawn = sample_responses([unknown, sound], 2, policy=policy, sampling=SAMPLING)
    assert [item.problem.id for item in samples_drawn] == [sound.id] * 2
    worlds.refused(lambda: sample_responses([unknown], 2, policy=policy, sampling=SAMPLING), "none of 1", "strange")
    worlds.refused(lambda: sample_responses([], 2, policy=policy, sampling=SAMPLING), "none of 0")


def test_what_a_search_accepted_is_every_incumbent_but_the_first(policy: Policy) -> None:
    """Of a trace with an accepted, a refused and another accepted revision; failed problems give nothing."""
    problem = worlds.tiny_problems()[1]
    first = worlds.sample(policy, problem, "1+2=3")
    common = {
        "policy": policy,
        "problem": problem,
        "method": "nabla",
        "seed": 0,
        "prompt_ids": first.prompt_ids,
        "meta": {},
    }
    revisions, before = [], first.response_ids
    for turn, (text, taken) in enumerate([("1+2=4", True), ("1+5=6#6", False), ("7", True)]):
        whole = worlds.sample(policy, problem, text).response_ids
        at = next(index for index, (a, b) in enumerate(zip(before, whole, strict=False)) if a != b)
        suffix = tuple(whole[at:])
        revisions.append(Revision(turn, at, before[at], suffix[0], suffix, turn, turn + 1.0, taken, 0.0))
        before = whole if taken else before
    trace = build_response_trace(
        response_ids=before, reward=3.0, cost=Cost(), initial_ids=first.response_ids, revisions=revisions, **common
    )
    trace.validate()
    failed = build_error_trace(problem, "nabla", 0, "no room", {})
    results = collect_accepted_responses([trace, failed], {problem.id: problem})
    assert [text_of(policy, item) for item in results] == ["1+2=4", "7"]
    assert all((item.problem, item.prompt_ids) == (problem, first.prompt_ids) for item in results)


@pytest.mark.parametrize(("wrong", "right"), [(2, 0), (0, 3), (0, 0)])
def test_labels_of_one_class_are_refused(wrong: int, right: int, policy: Policy) -> None:
    item = worlds.sample(policy, worlds.tiny_problems()[0], "3")
    responses = [LabeledResponse(item, False)] * wrong + [LabeledResponse(item, True)] * right
    kind = "wrong" if wrong else "correct"
    message = worlds.refused(
        lambda: check_both_classes(responses), "needs correct and wrong responses", f"all {len(responses)} are"
    )
    assert message.endswith(kind) or not responses
    check_both_classes([*responses, LabeledResponse(item, True), LabeledResponse(item, False)])


# --- candidates -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", worlds.ARCHITECTURES)
def test_candidates_are_those_that_drawing_would_have_shown(architecture: str) -> None:
    """Prompts and responses of several lengths; some of the drawn tokens are not among the likeliest."""
    policy = worlds.tiny_policy(architecture, seed=5)
    problems = worlds.tiny_problems()
    jobs = [
        GenerationRequest(problem.id, policy.encode(problem), make_rng(seed, problem.id), 12)
        for problem in problems
        for seed in range(3)
    ]
    drafts = generate_continuations(policy, jobs, Sampling(), flop_counter=FlopCounter(), top_k_candidates=3)
    samples = [
        Sample(problems[index // 3], job.prefix_ids, draft.ids)
        for index, (job, draft) in enumerate(zip(jobs, drafts, strict=True))
    ]
    assert len({len(item.response_ids) for item in samples}) > 2
    results = add_draw_info(policy, samples, 3, 5)
    unlikely = 0
    whole = add_draw_info(policy, samples, 99, 5)  # the whole vocabulary
    for sample, draft, original, every in zip(results, drafts, samples, whole, strict=True):
        assert sample.draw_info is not None and sample.draw_info.model is policy.model
        assert torch.equal(sample.draw_info.candidates, draft.candidates)
        torch.testing.assert_close(sample.draw_info.logp, draft.logp, atol=1e-4, rtol=1e-4)
        assert replace(sample, draw_info=None) == original
        assert every.draw_info is not None and every.draw_info.logp.shape == (len(draft.ids), len(worlds.TOKENS))
        unlikely += int((sample.draw_info.gather_response_logp(draft.ids) < every.draw_info.logp[:, 2] - 0.1).sum())
    assert unlikely


def test_a_batch_shows_what_single_responses_show(embedded: Policy, labeled: list[LabeledResponse]) -> None:
    samples = [replace(item.sample, draw_info=None) for item in labeled]
    assert len({len(item.response_ids) for item in samples}) > 1
    for item, single in zip(labeled, add_draw_info(embedded, samples, 6, 1), strict=True):
        assert isinstance(item.sample.draw_info, DrawInfo) and single.draw_info is not None
        assert torch.equal(item.sample.draw_info.candidates, single.draw_info.candidates)
        torch.testing.assert_close(item.sample.draw_info.logp, single.draw_info.logp, atol=1e-4, rtol=1e-4)


# --- rows -------------------------------------------------------------------------------------------------


def test_rows_hold_the_response_in_the_rewards_words(
    embedded: Policy, labeled: list[LabeledResponse], term: ScoreObjective
) -> None:
    rows = build_token_rows(labeled, term, token_labels=TokenLabeler(embedded), min_p=0.0)
    judge = TokenLabeler(embedded)
    for item, row in zip(labeled, rows, strict=True):
        sample, info = item.sample, item.sample.draw_info
        assert info is not None
        assert row["input_ids"] == sample.prompt_ids + sample.response_ids  # the stop token closes the turn
        assert row["input_ids"][: row["response_start"]] == sample.prompt_ids
        ids, weights = torch.tensor(row["candidate_ids"]), torch.tensor(row["candidate_weights"])
        assert ids[:, 0].tolist() == sample.response_ids and not weights[:, 0].any()
        assert torch.equal(ids[:, 1:], info.candidates)
        torch.testing.assert_close(weights[:, 1:], info.logp.exp() / info.logp.exp().sum(-1, keepdim=True))
        right = torch.tensor(row["correct"]).bool()
        assert torch.equal(right, judge.label_candidates(sample.problem, sample.response_ids, ids))
        assert row["answer_correct"] == item.correct and row["ends_with_stop"] == 1.0
    assert {row["answer_correct"] for row in rows} == {0.0, 1.0}


def test_unlikely_candidates_have_no_weight_in_mixtures(labeled: list[LabeledResponse], term: ScoreObjective) -> None:
    dropped = 0
    for item, row in zip(labeled, build_token_rows(labeled, term, token_labels=None, min_p=0.1), strict=True):
        assert item.sample.draw_info is not None
        policy = item.sample.draw_info.logp.exp()
        plausible = policy >= 0.1 * policy.amax(-1, keepdim=True)
        candidates = term.vocab_map[item.sample.draw_info.candidates]
        for at, (ids, weights) in enumerate(zip(row["candidate_ids"], row["candidate_weights"], strict=True)):
            mixed = {token for token, weight in zip(ids[1:], weights[1:], strict=True) if weight > 0}
            assert mixed == set(candidates[at][plausible[at]].tolist()) and sum(weights[1:]) == pytest.approx(1)
        dropped += int((~plausible & (policy > 0)).sum())
    assert dropped


def test_without_step_labels_a_row_tells_the_outcome_alone(
    labeled: list[LabeledResponse], term: ScoreObjective
) -> None:
    rows = build_token_rows(labeled, term, token_labels=None, min_p=0.0)
    assert all(row["correct"] == [] for row in rows)
    assert [row["answer_correct"] for row in rows] == [float(item.correct) for item in labeled]


def test_a_response_cut_at_the_limit_is_not_closed_and_its_end_not_right(
    embedded: Policy, labeled: list[LabeledResponse], term: ScoreObjective
) -> None:
    whole = next(item for item in labeled if item.correct)
    cut = add_draw_info(embedded, [replace(whole.sample, response_ids=whole.sample.response_ids[:-3])], 6, 1)[0]
    judge = TokenLabeler(embedded)
    done, open_ = build_token_rows([whole, LabeledResponse(cut, False)], term, token_labels=judge, min_p=0.0)
    assert (done["ends_with_stop"], open_["ends_with_stop"]) == (1.0, 0.0)
    collate = TokenCollator(embedded.tokenizer.pad_token_id, 0.0)
    targets = [collate([row])["targets"][0] for row in (done, open_)]
    assert targets[0][done["response_start"] :].tolist() == [1.0] * len(whole.sample.response_ids)
    # All that it wrote is right, but the turn that the template closes behind it (the tail) is not.
    assert targets[1][open_["response_start"] :].tolist() == [1.0] * len(cut.response_ids) + [0.0] * len(
        term.turn_end_ids
    )
    assert term.turn_end_ids and len(open_["input_ids"]) == len(cut.prompt_ids + cut.response_ids + term.turn_end_ids)


def test_rows_follow_a_rewards_shuffled_vocabulary(
    embedded: Policy, labeled: list[LabeledResponse], term: ScoreObjective
) -> None:
    """The same tokens under other ids, with equal weights and labels, and equal scores by the moved model."""
    tokenizer, new_ids = worlds.permuted_tokenizer(embedded.tokenizer)
    moved = worlds.permuted_model(term.model, new_ids, len(new_ids) + 3)
    other = build_score_objective(embedded, moved, tokenizer, "moved")
    judge = TokenLabeler(embedded)
    plain = build_token_rows(labeled, term, token_labels=judge, min_p=0.02)
    rows = build_token_rows(labeled, other, token_labels=judge, min_p=0.02)
    for item, row in zip(plain, rows, strict=True):
        assert row["input_ids"] == new_ids[item["input_ids"]].tolist() != item["input_ids"]
        assert row["candidate_ids"] == new_ids[torch.tensor(item["candidate_ids"])].tolist()
        same = ("response_start", "candidate_weights", "correct", "answer_correct", "ends_with_stop")
        assert [row[name] for name in same] == [item[name] for name in same]
    scores = []
    for model, some_rows in ((term.model, plain), (moved, rows)):
        batch = TokenCollator(0, 0.0)(some_rows[:4])
        embeds = model.get_input_embeddings()(batch["input_ids"])
        scores.append(compute_token_scores(model, embeds, batch["attention_mask"])[batch["attention_mask"].bool()])
    torch.testing.assert_close(scores[0], scores[1])


def test_responses_with_tokens_that_the_base_lacks_are_left_out_and_counted(
    embedded: Policy, labeled: list[LabeledResponse], caplog: pytest.LogCaptureFixture
) -> None:
    """Candidates that it lacks leave no row out."""

    def lacking(word: str) -> ScoreObjective:
        term = build_score_objective(embedded, scorer(embedded), embedded.tokenizer, "other")
        term.vocab_map[embedded.tokenizer.convert_tokens_to_ids(word)] = -1
        return term

    seldom = lacking(",")
    gone = [(seldom.vocab_map[item.sample.response_ids] < 0).any() for item in labeled]
    assert 0 < sum(gone) < len(labeled)
    plausible = filter_encodable(labeled, seldom, "other")
    assert [id(item) for item in plausible] == [id(item) for item, lost in zip(labeled, gone, strict=True) if not lost]
    assert f"{sum(gone)} of {len(labeled)} responses hold tokens that other" in caplog.text
    caplog.clear()
    rows = build_token_rows(plausible, seldom, token_labels=None, min_p=0.0)
    assert len(rows) == len(plausible) and all(
        min(map(min, row["candidate_ids"])) >= 0 <= min(row["input_ids"]) for row in rows
    )
    assert (
        len(filter_encodable(plausible, seldom, "other"))
        == len(filter_encodable(labeled, seldom, "other", quiet=True))
        == len(plausible)
    )
    assert caplog.text == ""
    worlds.refused(
        lambda: filter_encodable(labeled, lacking("="), "other"), f"each of {len(labeled)}", "choose a base"
    )


def test_rows_need_the_policys_candidates(labeled: list[LabeledResponse], term: ScoreObjective) -> None:
    bare = LabeledResponse(replace(labeled[0].sample, draw_info=None), True)
    worlds.refused(
        lambda: build_token_rows([bare], term, token_labels=None, min_p=0.0), bare.sample.problem.id, "candidates"
    )


# --- a reward that drops the policy's stop token ----------------------------------------------------------


@pytest.fixture(scope="module")
def dropping(embedded: Policy) -> ScoreObjective:
    """Closes a turn with another token than the policy's stop token, which is therefore dropped."""
    template = worlds.TEMPLATE.replace("'<|end|>'", "'#'")
    tokenizer, _ = worlds.permuted_tokenizer(embedded.tokenizer)
    tokenizer.chat_template = template
    return build_score_objective(embedded, scorer(embedded), tokenizer, "dropping")


def test_a_dropped_stop_token_leaves_the_rows_positions_in_step(
    embedded: Policy, labeled: list[LabeledResponse], dropping: ScoreObjective
) -> None:
    for item, row in zip(
        labeled, build_token_rows(labeled, dropping, token_labels=TokenLabeler(embedded), min_p=0.0), strict=True
    ):
        count = len(item.sample.response_ids) - 1
        assert len(row["candidate_ids"]) == len(row["candidate_weights"]) == len(row["correct"]) == count
        assert len(row["input_ids"]) == row["response_start"] + count + len(dropping.turn_end_ids)


def test_stopping_too_early_is_wrong_also_where_the_stop_token_is_dropped(
    embedded: Policy, labeled: list[LabeledResponse], term: ScoreObjective, dropping: ScoreObjective
) -> None:
    whole = next(item for item in labeled if item.correct).sample
    early = replace(whole, response_ids=[*whole.response_ids[:-3], whole.response_ids[-1]])
    early = add_draw_info(embedded, [early], 6, 1)[0]
    for reader in (term, dropping):
        (row,) = build_token_rows(
            [LabeledResponse(early, False)], reader, token_labels=TokenLabeler(embedded), min_p=0.0
        )
        assert TokenCollator(0, 0.0)([row])["targets"][0, -1] == 0


def test_an_empty_response_can_be_trained_on_where_the_stop_token_is_dropped(
    embedded: Policy, labeled: list[LabeledResponse], dropping: ScoreObjective
) -> None:
    item = labeled[0].sample
    empty = add_draw_info(embedded, [replace(item, response_ids=item.response_ids[-1:])], 6, 1)[0]
    rows = build_token_rows(
        [LabeledResponse(empty, False), labeled[0]], dropping, token_labels=TokenLabeler(embedded), min_p=0.0
    )
    assert TokenCollator(0, 1.0)(rows)["targets"][0, len(rows[0]["input_ids"]) - 1] == 0


# --- files ------------------------------------------------------------------------------------------------


def test_samples_come_back_from_their_file(labeled: list[LabeledResponse], tmp_path: Path) -> None:
    samples = [replace(item.sample, draw_info=None) for item in labeled]
    problems = {problem.id: problem for problem in PROBLEMS}
    for responses in (samples, []):
        write_samples(tmp_path / "some.jsonl", responses)
        assert read_samples(tmp_path / "some.jsonl", problems) == responses
    assert [file.name for file in tmp_path.iterdir()] == ["some.jsonl"]


@pytest.mark.parametrize("line", ['{"problem_id": "chains/tra', '{"problem_id": "chains/train/0"}', "[]", "null"])
def test_a_broken_line_is_refused_and_named(line: str, labeled: list[LabeledResponse], tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    write_samples(file, [labeled[0].sample])
    file.write_text(file.read_text() + line + "\n")
    problems = {problem.id: problem for problem in PROBLEMS}
    worlds.refused(lambda: read_samples(file, problems), f"{file}:2", "is not a sample")


def test_samples_of_an_unknown_problem_are_refused(labeled: list[LabeledResponse], tmp_path: Path) -> None:
    file = tmp_path / "some.jsonl"
    write_samples(file, [labeled[0].sample])
    assert json.loads(file.read_text())["problem_id"] == PROBLEMS[0].id
    worlds.refused(lambda: read_samples(file, {PROBLEMS[1].id: PROBLEMS[1]}), f"{file}:1", PROBLEMS[0].id)


# --- pairs ------------------------------------------------------------------------------------------------


def graded(policy: Policy, sizes: Sequence[tuple[int, int]]) -> list[LabeledResponse]:
    """Per problem, so many right and wrong responses, in mixed order."""
    responses = [
        LabeledResponse(worlds.sample(policy, Problem(id=f"p{index}", question="1+2"), f"{right:d}{number}"), right)
        for index, size in enumerate(sizes)
        for right, count in zip((True, False), size, strict=True)
        for number in range(count)
    ]
    random.Random(0).shuffle(responses)
    return responses


def pairs_of(
    responses: Sequence[LabeledResponse], **options: int
) -> list[tuple[str, tuple[int, ...], tuple[int, ...]]]:
    verdicts = {(item.sample.problem.id, *item.sample.response_ids): item.correct for item in responses}
    results = []
    for good, bad in choose_pairs(responses, **options):
        assert good.problem == bad.problem
        assert [verdicts[(item.problem.id, *item.response_ids)] for item in (good, bad)] == [True, False]
        results.append((good.problem.id, tuple(good.response_ids), tuple(bad.response_ids)))
    assert len(results) == len(set(results)), "no pair twice"
    return results


@pytest.mark.parametrize("most", [1, 2, 4, 99])
def test_pairs_join_a_right_and_a_wrong_response_to_one_problem(most: int, policy: Policy) -> None:
    sizes = [(1, 1), (3, 2), (2, 0), (0, 3), (4, 4)]
    results = pairs_of(graded(policy, sizes), pairs_per_problem=most)
    expected = {f"p{index}": min(most, good * bad) for index, (good, bad) in enumerate(sizes) if good * bad}
    assert Counter(problem for problem, *_ in results) == expected


def test_pairs_are_drawn_by_the_seed(policy: Policy) -> None:
    responses = graded(policy, [(4, 4)] * 3)
    first = pairs_of(responses, pairs_per_problem=2, seed=1)
    assert first == pairs_of(responses, pairs_per_problem=2, seed=1)
    assert len({tuple(pairs_of(responses, pairs_per_problem=2, seed=seed)) for seed in range(5)}) > 1


def test_no_pairs_at_all_are_refused(policy: Policy) -> None:
    responses = graded(policy, [(2, 0), (0, 2)])
    worlds.refused(lambda: choose_pairs(responses, 4), "no problem has both", "samples_per_problem")


@pytest.mark.parametrize("margin", [0.0, 0.5])
def test_rows_of_pairs_are_whole_turns_in_the_rewards_ids(margin: float, policy: Policy) -> None:
    tokenizer, new_ids = worlds.permuted_tokenizer(policy.tokenizer)
    model = worlds.tiny_model(kind="score", vocab=len(new_ids))
    responses = graded(policy, [(2, 2), (1, 2)])
    responses = [
        replace(item, sample=replace(item.sample, response_ids=item.sample.response_ids[: None if index % 2 else -1]))
        for index, item in enumerate(responses)
    ]
    term = build_score_objective(policy, model, tokenizer, "moved")
    rows = build_pair_rows(responses, term, pairs_per_problem=3, margin=margin, seed=2)
    end = policy.tokenizer.eos_token_id
    for row, (good, bad) in zip(rows, choose_pairs(responses, 3, 2), strict=True):
        for name, item in (("chosen_ids", good), ("rejected_ids", bad)):
            body = item.response_ids if item.response_ids[-1] == end else [*item.response_ids, end]
            assert row[name] == new_ids[item.prompt_ids + body].tolist()
        assert row.get("margin") == (margin or None)
