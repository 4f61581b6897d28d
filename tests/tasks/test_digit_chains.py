"""The procedural task and the committed embedded world."""

from __future__ import annotations

import hashlib
import random
import re
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from nabla_trl.tasks import digit_chains
from nabla_trl.tasks.problem import Problem

WORLD = Path(__file__).parents[2] / "data" / "tiny"
MODELS = ("clean", "policy")


def test_splits_share_no_question_and_repeat_none():
    train = {problem.question for problem in digit_chains.make_digit_chain_problems("train", 2000)}
    test = {problem.question for problem in digit_chains.make_digit_chain_problems("test", 2000, seed=3)}
    assert len(train) == len(test) == 2000
    assert not train & test
    assert {digit_chains.assign_digit_chain_split(question) for question in test} == {"test"}


def test_problems_are_deterministic_and_a_smaller_limit_is_a_prefix():
    problems = digit_chains.make_digit_chain_problems("test")
    assert len(problems) == 300
    assert digit_chains.make_digit_chain_problems("test", 40) == problems[:40]
    other = digit_chains.make_digit_chain_problems("test", 40, seed=1)
    assert not {p.id for p in other} & {p.id for p in problems}


def test_solution_evaluates_to_the_answer():
    for problem in digit_chains.make_digit_chain_problems("train", 300):
        steps, answer = problem.solution.split(";")[:-1], problem.solution.rpartition("#")[2]
        current = problem.question[0]
        for step, asked in zip(steps, re.findall(r"[-+*]\d", problem.question), strict=True):
            worked, result = step.split("=")
            assert worked == current + asked
            assert eval(worked) % 10 == int(result)
            current = result
        assert answer == current == problem.answer
        assert 5 <= len(steps) <= 7


def test_first_error_finds_the_first_corrupted_character():
    rng = random.Random(0)
    for problem in digit_chains.make_digit_chain_problems("train", 100):
        gold = problem.solution
        assert digit_chains.find_first_error(problem, gold) is None
        first, later = sorted(rng.sample(range(len(gold)), 2))
        corrupted = list(gold)
        corrupted[first] = corrupted[later] = "?"
        assert digit_chains.find_first_error(problem, "".join(corrupted)) == first
        assert digit_chains.find_first_error(problem, gold[:first]) == first
        assert digit_chains.find_first_error(problem, gold + "1") == len(gold)
    with pytest.raises(ValueError, match="no solution"):
        digit_chains.find_first_error(Problem(id="a", question="1+1"), "")


def test_noisy_solutions_err_only_on_facts_in_the_gap():
    gap = digit_chains.get_knowledge_gap()
    assert len(gap) == 75
    rng, errors = random.Random(0), 0
    for problem in digit_chains.make_digit_chain_problems("train", 300):
        for left, operator, right, result in re.findall(
            r"(\d)(.)(\d)=(\d)", digit_chains.make_noisy_solution(problem.question, rng)
        ):
            fact = int(left), operator, int(right)
            if int(result) != digit_chains.compute_result(*fact):
                assert gap[fact].wrong_result == int(result)
                errors += 1
    assert errors > 100


@pytest.mark.parametrize(
    "call",
    [
        lambda: digit_chains.make_digit_chain_problems("dev"),
        lambda: digit_chains.make_digit_chain_problems("test", -1),
    ],
)
def test_unknown_split_and_negative_limit_are_refused(call):
    with pytest.raises(ValueError, match=r"not 'dev'|negative"):
        call()


@pytest.mark.parametrize("question", ["", "1+", "1/2", "12+3", "1+2="])
def test_text_that_is_no_chain_is_refused(question):
    with pytest.raises(ValueError, match="not a chain"):
        digit_chains.make_gold_solution(question)


def test_tokenizer_round_trip():
    tokenizer = AutoTokenizer.from_pretrained(WORLD / "policy")
    assert tokenizer.pad_token_id != tokenizer.eos_token_id
    assert tokenizer.bos_token is None
    for problem in digit_chains.make_digit_chain_problems("test", 20):
        chat = [*problem.build_messages(), {"role": "assistant", "content": problem.solution}]
        rendered = tokenizer.apply_chat_template(chat, tokenize=False)
        assert rendered == f"<|user|>{problem.question}<|end|><|assistant|>{problem.solution}<|end|>"
        coded = tokenizer.apply_chat_template(chat, return_dict=True, return_assistant_tokens_mask=True)
        ids = coded["input_ids"]
        assert tokenizer(rendered)["input_ids"] == ids
        assert tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids) == rendered
        marked = [i for i, said in zip(ids, coded["assistant_masks"], strict=True) if said]
        assert tokenizer.decode(marked) == problem.solution + "<|end|>"
        prompt = tokenizer.apply_chat_template(problem.build_messages(), add_generation_prompt=True)["input_ids"]
        assert ids[: len(prompt)] == prompt


@pytest.mark.parametrize(("name", "low", "high"), [("clean", 0.95, 1.0), ("policy", 0.40, 0.70)])
def test_greedy_accuracy_of_the_committed_models(name, low, high):
    tokenizer = AutoTokenizer.from_pretrained(WORLD / name, padding_side="left")
    model = AutoModelForCausalLM.from_pretrained(WORLD / name, dtype=torch.float32).eval()
    problems = digit_chains.make_digit_chain_problems("test", 100)
    batch = tokenizer.apply_chat_template(
        [problem.build_messages() for problem in problems],
        add_generation_prompt=True,
        padding=True,
        return_dict=True,
        return_tensors="pt",
    )
    output = model.generate(**batch, max_new_tokens=48, do_sample=False)
    written = tokenizer.batch_decode(output[:, batch["input_ids"].shape[1] :], skip_special_tokens=True)
    assert low <= sum(map(digit_chains.is_correct, problems, written)) / 100 <= high


def test_card_lists_every_model_file_with_its_sha256():
    card = (WORLD / "README.md").read_text(encoding="utf-8")
    listed = dict(re.findall(r"^\| (\S+) \| \d+ \| ([0-9a-f]{64}) \|$", card, flags=re.MULTILINE))
    files = [path for name in MODELS for path in (WORLD / name).iterdir()]
    assert listed == {
        path.relative_to(WORLD).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() for path in files
    }
    assert sum(path.stat().st_size for path in files) <= 6_000_000
