"""The model of lm-eval without lm-eval: its answers, costs, log and refusals."""

from __future__ import annotations

import json
import logging
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch
from worlds import refused, search_config, tiny_policy, tiny_scalar

from nabla_trl.evaluation.results import load_results
from nabla_trl.lm_eval.harness import (
    GenerationOptions,
    HarnessModel,
    HarnessRequest,
    build_configs,
    check_method,
    grade_log,
)
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.loop import run_search
from nabla_trl.search.options import MirrorSolver, VoteSelection
from nabla_trl.tasks.problem import Problem

CONFIG = search_config(max_rounds=2, max_new_tokens=12, batch_size=3)
GREEDY = {"until": ["+"], "do_sample": False, "temperature": 0.0, "max_gen_toks": 10}
PROMPTS = ("1+2", "3*4-5", "7", "12-3+4*5")


def make_requests(prompts: Any = PROMPTS, options: Any = GREEDY, task: str = "sums") -> list[HarnessRequest]:
    return [HarnessRequest(task, str(index), 0, prompt, options) for index, prompt in enumerate(prompts)]


@pytest.fixture(scope="module")
def searcher(policy: Policy, scalar_reward: Reward) -> HarnessModel:
    return HarnessModel(policy, scalar_reward, config=CONFIG, seed=5)


def test_an_answer_is_that_of_the_search_and_so_is_its_cost(searcher, policy, scalar_reward) -> None:
    before = len(searcher.rows)
    answers = searcher.generate(make_requests())
    problems = [
        Problem(request.problem_id, request.prompt, task="sums", stop_strings=("+",), prompt_ids=tuple(ids))
        for request in make_requests()
        for ids in [policy.tokenizer(request.prompt)["input_ids"]]
    ]
    config = search_config(max_rounds=2, max_new_tokens=10)
    traces = run_search(problems, policy=policy, reward=scalar_reward, config=config, seed=5)
    assert answers == [trace.response.partition("+")[0] for trace in traces]
    rows = searcher.rows[before:]
    assert [row.flops for row in rows] == [trace.cost.flops for trace in traces] and rows[0].flops > 0
    costs = searcher.summarize(rows)["costs"]["sums"]
    assert costs["answers"] == 4 and costs["flops_per_answer"] == pytest.approx(sum(r.flops for r in rows) / 4)


def test_order_and_batch_do_not_change_an_answer_and_a_repeat_is_another_one(policy, scalar_reward) -> None:
    together, alone = (
        HarnessModel(policy, scalar_reward, config=search_config(max_rounds=1, max_new_tokens=8, batch_size=size))
        for size in (4, 1)
    )
    repeats = [HarnessRequest("sums", "0", repeat, PROMPTS[1], {"until": []}) for repeat in range(3)]
    answers = together.generate([*repeats, repeats[0]])
    assert len(set(answers)) > 1 and answers[3] == answers[0]
    heard: list[str] = []
    assert alone.generate(repeats[::-1], lambda request, answer: heard.append(answer)) == answers[2::-1]
    assert heard == answers[2::-1]


def test_greedy_and_samples_follow_the_options_of_the_task(policy, scalar_reward) -> None:
    greedy = HarnessModel(policy, scalar_reward, method="greedy", config=CONFIG)
    inputs = policy.tokenizer(PROMPTS[1], return_tensors="pt")["input_ids"]
    output = policy.model.generate(inputs, max_new_tokens=6, do_sample=False, eos_token_id=sorted(policy.stop_ids))
    options = {"until": [], "max_new_tokens": 6, "do_sample": False, "num_beams": 1, "repetition_penalty": 1.0}
    [answer] = greedy.generate(make_requests([PROMPTS[1]], options))
    assert answer == policy.decode(output[0, inputs.shape[1] :].tolist())
    message = refused(lambda: greedy.generate(make_requests(options={"do_sample": True, "temperature": 0.7})))
    assert "best_of_1" in message
    cold = HarnessModel(policy, scalar_reward, method="best_of_1", config=CONFIG)
    assert cold.generate(make_requests([PROMPTS[1]], options | {"do_sample": True, "temperature": 1e-6})) == [answer]
    fixed = HarnessModel(policy, scalar_reward, config=CONFIG, fixed_options={"temperature"})
    refused(lambda: fixed.generate(make_requests(options={"temperature": 0.5})), "temperature=0.5", "temperature=1.0")


def test_options_that_the_search_does_not_have_are_refused_together() -> None:
    wrong = {"num_beams": 4, "bad_words": ["a"], "max_gen_toks": 0, "until": [1], "top_p": "x"}
    refused(
        lambda: GenerationOptions.parse(wrong, "sums"), "num_beams=4", "bad_words", "max_gen_toks=0", "until", "top_p"
    )
    assert GenerationOptions.parse({"until": "a", "max_tokens": 3}, "sums") == GenerationOptions(("a",), 3, ())
    assert not GenerationOptions.parse({"temperature": 0.7, "do_sample": False}, "sums").sampling
    assert GenerationOptions.parse({"temperature": 0.7, "top_k": 5}, "sums").sampling == (
        ("temperature", 0.7),
        ("top_k", 5.0),
    )


def test_a_stop_string_may_be_a_special_token(policy, scalar_reward) -> None:
    model = HarnessModel(policy, scalar_reward, method="best_of_2", config=search_config(max_new_tokens=40))
    [whole] = model.generate(make_requests(["1+2"], {"until": []}))
    trace = SimpleNamespace(response=whole, response_ids=policy.tokenizer("12<|user|>34")["input_ids"])
    assert model._get_answer(trace, Problem("a", "b", stop_strings=("<|user|>",))) == "12"


def test_a_reward_with_a_template_reads_the_turns_of_the_chat(policy, scalar_reward) -> None:
    model = HarnessModel(policy, scalar_reward, config=CONFIG)
    chat = [{"role": "user", "content": "1+2"}]
    text = model.render_chat(chat)
    assert text == "<|user|>1+2<|end|><|assistant|>"
    [answer] = model.generate(make_requests([text]))
    problem = Problem("sums/0", "1+2", task="sums", stop_strings=("+",))
    config = search_config(max_rounds=2, max_new_tokens=10)
    [trace] = run_search([problem], policy=policy, reward=scalar_reward, config=config)
    assert trace.prompt_ids == model.encode(text) and answer == trace.response.partition("+")[0]
    assert model.rows[-1].reward == trace.reward
    begun = model.render_chat([*chat, {"role": "assistant", "content": "3"}], add_generation_prompt=False)
    assert begun.endswith("<|assistant|>3")
    refused(lambda: model.generate(make_requests([begun])), "gen_prefix")


def test_a_policy_without_a_template_refuses_chats(scalar_reward) -> None:
    from worlds import char_tokenizer

    plain = tiny_policy(tokenizer=char_tokenizer(template=None))
    model = HarnessModel(plain, tiny_scalar(plain), config=CONFIG)
    refused(lambda: model.render_chat([{"role": "user", "content": "1"}]), "--apply_chat_template")


def test_likelihoods_are_those_of_the_policy(searcher, policy) -> None:
    ids = policy.tokenizer("1+2=3")["input_ids"]
    logp = policy.model(torch.tensor([ids])).logits[0].log_softmax(-1)
    expected = sum(float(logp[index - 1, ids[index]]) for index in (3, 4))
    likelihood, is_greedy = searcher.score(ids[:3], ids[3:])
    assert likelihood == pytest.approx(expected, abs=1e-5)
    assert is_greedy == all(int(logp[index - 1].argmax()) == ids[index] for index in (3, 4))
    assert searcher.score(ids[:2], [int(logp[1].argmax())])[1]
    long = searcher.score([1] * 300, ids[3:])  # loses its beginning
    assert long[0] == pytest.approx(searcher.score([1] * (policy.context_length - 2), ids[3:])[0], abs=1e-4)
    refused(lambda: searcher.score(ids, []), "0 tokens")
    assert searcher.summarize()["loglikelihood_flops"] > 0


def test_a_log_is_an_evaluation_and_sets_budgets(policy, scalar_reward, tmp_path) -> None:
    def run(method: str, config: SearchConfig = CONFIG, options: Any = GREEDY) -> list[str]:
        model = HarnessModel(policy, scalar_reward, method=method, config=config, log_dir=tmp_path, seed=1)
        return model.generate(make_requests(options=options))

    refused(lambda: run("nabla@best_of_4"), "best_of_4", "4 of 4 prompts", "sums")
    answers = run("best_of_4")
    run("nabla@best_of_4")
    assert run("best_of_4") == answers  # again, without other rows
    rows, facts = load_results(tmp_path)
    by_method = {name: [row for row in rows if row.method == name] for name in ("best_of_4", "nabla@best_of_4")}
    assert [len(group) for group in by_method.values()] == [4, 4] and facts["task"] == "sums"
    budget, spent = (sum(row.flops for row in group) for group in by_method.values())
    assert 0.5 * budget < spent < 1.2 * budget
    refused(lambda: run("best_of_4", search_config(max_rounds=3)), "max_rounds", "another log")
    refused(lambda: run("best_of_4", options=GREEDY | {"until": ["-"]}), "sums/0", "another log")
    refused(lambda: HarnessModel(policy, scalar_reward, method="nabla@0.5"), "best_of_16", "log=FOLDER")
    write_samples(tmp_path / "out/run", [1.0, 0.0, 1.0, 1.0])
    assert grade_log(tmp_path, tmp_path / "out", method="best_of_4") == 4
    run("greedy")  # keeps these verdicts
    verdicts = [(row.method, row.correct) for row in load_results(tmp_path)[0]]
    assert [correct for method, correct in verdicts if method == "best_of_4"] == [1.0, 0.0, 1.0, 1.0]
    assert {correct for method, correct in verdicts if method != "best_of_4"} == {None}
    refused(lambda: grade_log(tmp_path, tmp_path / "out", method="best_of_4", metric="bleu"), "metric bleu")
    refused(lambda: grade_log(tmp_path, tmp_path / "rows", method="best_of_4"), "--log_samples")


def test_the_log_has_the_rows_of_all_processes(policy, scalar_reward, tmp_path) -> None:
    options = {"method": "greedy", "config": CONFIG, "log_dir": tmp_path}
    first, second = (HarnessModel(policy, scalar_reward, rank=rank, **options) for rank in (0, 1))
    requests = make_requests()
    first.wait_for_all = lambda: second.generate(requests[1::2]) and None  # slower than the main process
    first.generate(requests[::2])
    assert [row.problem for row in load_results(tmp_path)[0]] == [f"sums/{index}" for index in range(4)]


def write_samples(folder: Path, values: list[float]) -> None:
    folder.mkdir(parents=True)
    lines = [
        {"doc_id": index, "filter": name, "metrics": ["exact_match"], "exact_match": value if name == "first" else 0.0}
        for name in ("first", "second")
        for index, value in enumerate(values)
    ]
    text = "".join(json.dumps(line) + "\n" for line in lines)
    (folder / "samples_sums_2026-11-29T16-12-55.159012.jsonl").write_text(text)


def test_a_prompt_that_cannot_be_run_is_counted(policy, scalar_reward, caplog) -> None:
    model = HarnessModel(policy, scalar_reward, method="best_of_1", config=CONFIG)
    with caplog.at_level(logging.WARNING):
        answers = model.generate(make_requests(["1+2", "1" * 500]))
    assert answers[1] == "" and "1 of 2 answers are empty" in caplog.text and "context" in caplog.text
    assert model.summarize()["costs"]["sums"]["errors"] == 1
    refused(lambda: model.generate(make_requests(["1" * 500])), "no request could be run")


def test_model_args_name_options_and_methods() -> None:
    options = {"solver.step_size": 2, "select": "vote", "max_flops": 1e9, "max_step_tokens": 3, "solver": "mirror"}
    config, steps = build_configs("default", options)
    assert isinstance(config.solver, MirrorSolver) and config.solver.step_size == 2.0
    assert isinstance(config.select, VoteSelection) and config.max_flops == 1e9 and steps.max_step_tokens == 3
    refused(lambda: build_configs("default", {"max_flop": 1, "rewards": "x"}), "max_flops", "did you mean reward?")
    for name in ("samples_4", "sft_greedy", "best_of", "magic"):
        refused(lambda name=name: check_method(name), name)


def test_a_search_that_keeps_all_candidates_of_an_audited_reward_says_so(caplog) -> None:
    shared = {"policy": "data/tiny/policy", "reward": "data/tiny/reward", "max_new_tokens": 4}
    HarnessModel.load(**shared)
    assert "candidate_min_p" not in caplog.text
    HarnessModel.load(**shared, candidate_min_p=0.0)
    assert "candidate_min_p 0 lets" in caplog.text


def test_a_budget_belongs_to_a_search(policy, scalar_reward) -> None:
    config = search_config(max_flops=1e9)
    refused(lambda: HarnessModel(policy, scalar_reward, method="best_of_4", config=config), "max_flops", "best_of_4")


# --- the class, with a stand-in for lm-eval -----------------------------------------------------------------


@pytest.fixture
def model_module(monkeypatch: pytest.MonkeyPatch) -> Any:
    """nabla_trl.lm_eval.model, imported over the few names of lm-eval that it uses."""

    class TemplateLM:
        def __init__(self) -> None:
            self._rank, self._world_size, self.added = 0, 1, []
            self.cache_hook = SimpleNamespace(add_partial=lambda *entry: self.added.append(entry))

        rank = property(lambda self: self._rank)
        world_size = property(lambda self: self._world_size)

    stand_ins = {
        "lm_eval": {},
        "lm_eval.api": {},
        "lm_eval.api.instance": {"Instance": object},
        "lm_eval.api.model": {"TemplateLM": TemplateLM},
        "lm_eval.api.registry": {"register_model": lambda name: lambda cls: cls},
        "lm_eval.utils": dict.fromkeys(
            ("get_rolling_token_windows", "make_disjoint_window", "simple_parse_args_string")
        ),
    }
    for name, values in stand_ins.items():
        module = ModuleType(name)
        vars(module).update(values)
        monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "nabla_trl.lm_eval.model", raising=False)
    import nabla_trl.lm_eval.model as module

    yield module
    sys.modules.pop("nabla_trl.lm_eval.model", None)


def test_requests_of_lm_eval_are_answered_in_order(model_module, policy, scalar_reward, monkeypatch) -> None:
    loaded: dict[str, Any] = {}

    def load(**options: Any) -> HarnessModel:
        loaded.update(options)
        return HarnessModel(policy, scalar_reward, method="best_of_1", config=CONFIG)

    monkeypatch.setattr(model_module.HarnessModel, "load", load)
    torch.manual_seed(7)
    model = model_module.NablaLM.create_from_arg_obj(
        {"policy": "P", "reward": "R", "max_flops": 2}, {"batch_size": "auto", "max_batch_size": 3, "device": "cuda:0"}
    )
    assert loaded["batch_size"] == 3 and loaded["seed"] == 7 and loaded["max_flops"] == 2
    assert loaded["device"] == ("cuda:0" if torch.cuda.is_available() else None)
    first, second = (
        SimpleNamespace(args=(prompt, GREEDY), task_name="sums", doc_id=index, idx=0, repeats=2 - index)
        for index, prompt in enumerate(PROMPTS[:2])
    )
    answers = model.generate_until([first, first, second, second, second], disable_tqdm=True)  # two are padding
    assert answers[2] == answers[3] == answers[4]
    rows = model.get_model_info()["nabla"]["costs"]["sums"]
    assert rows["answers"] == 3 and [entry[1][0] for entry in model.added] == [PROMPTS[0], PROMPTS[0], PROMPTS[1]]
    refused(lambda: model_module.NablaLM(policy="P"), "model_args lack reward")


def test_without_lm_eval_the_command_says_what_to_install(monkeypatch, capsys) -> None:
    from nabla_trl.lm_eval.__main__ import main

    monkeypatch.setitem(sys.modules, "lm_eval", None)
    monkeypatch.delitem(sys.modules, "nabla_trl.lm_eval.model", raising=False)
    assert main() == 2
    error = capsys.readouterr().err
    assert (
        error.startswith("error: lm-eval is not installed")
        and "nabla-trl[lm-eval]" in error
        and error.count("\n") == 1
    )
