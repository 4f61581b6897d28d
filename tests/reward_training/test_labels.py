"""Step labels against the text's own first error, and against every right solution spelled out."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest
import torch
import worlds
from tokenizers import Tokenizer, decoders, models
from transformers import PreTrainedTokenizerFast

from nabla_trl.models.loading import load_policy
from nabla_trl.models.policy import Policy
from nabla_trl.reward_training.labels import TokenLabeler, has_step_labels
from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem

EMBEDDED = str(Path(__file__).parents[2] / "data" / "tiny" / "policy")
PROBLEMS = digit_chains.make_digit_chain_problems("train", 60, seed=5)
MERGED = ("=0;", "=0,", "12", "=3", ";4", ";#", "+1", "5;")


def merging_tokenizer() -> PreTrainedTokenizerFast:
    """Tokens of one to three characters; `;#` and the like straddle what ends a step."""
    chars = [*"0123456789+-*=;,#"]
    tokens = [*chars, "=0", *MERGED, worlds.PAD, worlds.END, worlds.UNK]
    merges = [("=", "0"), *[(text[:-1], text[-1]) for text in MERGED]]
    vocab = {token: index for index, token in enumerate(tokens)}
    inner = Tokenizer(models.BPE(vocab=vocab, merges=merges, unk_token=worlds.UNK))
    inner.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=inner, eos_token=worlds.END, pad_token=worlds.PAD, unk_token=worlds.UNK
    )


@pytest.fixture(scope="module", params=["characters", "merged"])
def writer(request: pytest.FixtureRequest) -> Policy:
    """The embedded policy, whose tokens are characters, and one whose tokens may hold several."""
    if request.param == "characters":
        return load_policy(EMBEDDED)
    policy = worlds.tiny_policy(tokenizer=merging_tokenizer())
    assert max(map(len, policy.tokenizer.tokenize("9-5=4;4+1=5;5-5=0;#0"))) == 3
    return policy


def ids(policy: Policy, text: str, *, stop: bool = True) -> list[int]:
    written = list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
    assert policy.tokenizer.unk_token_id not in written
    return written + [policy.tokenizer.eos_token_id] * stop


def at_token(policy: Policy, response: list[int], character: int | None) -> int | None:
    """The token that holds a character of the response's text; the one after the text for its length."""
    if character is None:
        return None
    ends = [len(policy.tokenizer.decode(response[: index + 1])) for index in range(len(response))]
    return next(index for index, end in enumerate(ends) if character < end)


def right_solutions(problem: Problem) -> set[str]:
    """Every right solution, spelled out: either separator after any step but the last."""
    steps = digit_chains.make_gold_solution(problem.question).split(";")
    return {
        "".join(step + end for step, end in zip(steps[:-1], [*ends, ";"], strict=True)) + steps[-1]
        for ends in product(digit_chains.SEPARATORS, repeat=len(steps) - 2)
    }


def test_right_solutions_are_sound_throughout_whatever_separators_they_use(writer: Policy) -> None:
    labels, rng = TokenLabeler(writer), random.Random(0)
    styles = set()
    for problem in PROBLEMS:
        for text in (
            digit_chains.make_gold_solution(problem.question),
            digit_chains.make_styled_solution(problem.question, rng),
        ):
            response = ids(writer, text)
            assert labels.label_prefixes(problem, response) == [True] * len(response)
            assert labels.find_first_error(problem, response) is None
            styles.add("," in text)
    assert styles == {True, False}


def test_the_first_wrong_token_holds_the_first_wrong_character(writer: Policy) -> None:
    """The text tells it by itself; what comes later is unsound however it looks."""
    labels, rng = TokenLabeler(writer), random.Random(1)
    errors = []
    for problem in PROBLEMS:
        text = digit_chains.make_noisy_solution(problem.question, rng)
        response = ids(writer, text)
        first = at_token(writer, response, digit_chains.find_first_error(problem, text))
        assert labels.find_first_error(problem, response) == first
        num_correct = len(response) if first is None else first
        assert labels.label_prefixes(problem, response) == [index < num_correct for index in range(len(response))]
        errors.append(first)
    assert None in errors and len(set(errors)) > 5


def test_right_alternatives_are_those_of_a_right_solution_spelled_out(writer: Policy) -> None:
    """All tokens of the vocabulary at every place of a right response, the stop token at its end among them."""
    labels, rng = TokenLabeler(writer), random.Random(2)
    names = writer.tokenizer.convert_ids_to_tokens(range(writer.forbidden_mask.shape[0]))
    several = 0
    for problem in PROBLEMS[:6]:
        solutions = right_solutions(problem)
        response = ids(writer, digit_chains.make_styled_solution(problem.question, rng))
        every = torch.arange(len(names)).expand(len(response), -1)
        table = labels.label_candidates(problem, response, every)
        for place, row in enumerate(table.tolist()):
            before = writer.tokenizer.decode(response[:place])
            assert any(text.startswith(before) for text in solutions)
            right = {
                name
                for name in names
                if any(text.startswith(before + name) for text in solutions)
                or (name == worlds.END and before in solutions)
            }
            assert {name for name, fits in zip(names, row, strict=True) if fits} == right
            several += len(right) > 1
    assert several > 6


@pytest.mark.parametrize("cut", [0, 1, 7, -1])
def test_a_response_that_stops_early_is_wrong_where_it_stops(cut: int, writer: Policy) -> None:
    labels, problem = TokenLabeler(writer), PROBLEMS[0]
    text = digit_chains.make_gold_solution(problem.question)[:cut]
    response = ids(writer, text)
    assert digit_chains.find_first_error(problem, text) == len(text)
    assert labels.find_first_error(problem, response) == len(response) - 1
    if text:
        assert labels.find_first_error(problem, response[:-1]) is None, "cut at the limit it has made no error yet"


@pytest.mark.parametrize("more", ["1", "#1", ";"])
def test_a_response_that_runs_on_is_wrong_behind_the_solution(more: str, writer: Policy) -> None:
    labels, problem = TokenLabeler(writer), PROBLEMS[0]
    gold = digit_chains.make_gold_solution(problem.question)
    solution, added = ids(writer, gold, stop=False), ids(writer, more)
    assert digit_chains.find_first_error(problem, gold + more) == len(gold)
    assert labels.find_first_error(problem, solution + added) == len(solution)


def test_what_follows_the_stop_token_cannot_be_right(writer: Policy) -> None:
    labels, problem = TokenLabeler(writer), PROBLEMS[0]
    response = ids(writer, digit_chains.make_gold_solution(problem.question))
    every = torch.arange(writer.forbidden_mask.shape[0]).expand(len(response) + 1, -1)
    assert not labels.label_candidates(problem, [*response, response[0]], every)[-1].any()


def test_tasks_without_step_labels_are_refused(writer: Policy) -> None:
    labels, response = TokenLabeler(writer), [0]
    plain = replace(PROBLEMS[0], task="gsm8k", id="g1")
    worlds.refused(lambda: labels.label_prefixes(plain, response), "g1", "gsm8k", "no step labels")
    unsolved = replace(PROBLEMS[0], solution=None)
    worlds.refused(lambda: labels.find_first_error(unsolved, response), unsolved.id, "no step labels")
    assert has_step_labels(PROBLEMS)
    assert not has_step_labels([*PROBLEMS, plain]) and not has_step_labels([unsolved, *PROBLEMS])
