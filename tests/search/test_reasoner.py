"""NablaReasoner from Python: from saved folders to traces, and its configuration."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import worlds
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from nabla_trl import NablaReasoner, Problem, Trace
from nabla_trl.search.config import SearchConfig
from nabla_trl.search.options import SequentialProposals, SteSolver

SHORT = {"max_new_tokens": 6, "max_rounds": 2}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Saved models: a policy, a better one, and a scalar reward."""
    models = {
        "policy": worlds.tiny_model(),
        "better": worlds.tiny_model(seed=2),
        "scorer": worlds.tiny_model(kind="score", seed=1),
    }
    root = tmp_path_factory.mktemp("models")
    return {name: worlds.save(root / name, model) for name, model in models.items()}


@pytest.fixture(scope="module")
def reasoner(folders: dict[str, str]) -> NablaReasoner:
    return NablaReasoner.from_pretrained(folders["policy"], reward=folders["scorer"], **SHORT)


# --- questions --------------------------------------------------------------------------------------------


def test_one_text_gives_one_trace(reasoner: NablaReasoner) -> None:
    trace = reasoner.solve("1+2")
    assert isinstance(trace, Trace)
    trace.validate()
    assert trace.prompt == "<|user|>1+2<|end|><|assistant|>"
    assert trace.reward >= trace.reward_initial and len(trace.revisions) == 2
    assert trace.cost.flops > 0 and trace.error is None


def test_texts_chats_and_problems_mix_and_come_back_in_order(reasoner: NablaReasoner) -> None:
    chat = [{"role": "user", "content": "7"}, {"role": "assistant", "content": "8"}, {"role": "user", "content": "9"}]
    problem = Problem(id="mine", question="3*4", answer="12", task="tables")
    traces = reasoner.solve(["1+2", chat, problem, "1+2"])
    assert [trace.problem_id for trace in traces] == ["question/0", "question/1", "mine", "question/3"]
    assert traces[1].prompt == "<|user|>7<|end|><|assistant|>8<|end|><|user|>9<|end|><|assistant|>"
    assert (traces[2].gold, traces[2].task) == ("12", "tables")
    assert all(trace.error is None for trace in traces)


def test_one_chat_and_one_problem_give_one_trace_each(reasoner: NablaReasoner) -> None:
    chat = reasoner.solve([{"role": "user", "content": "1+2"}])
    assert isinstance(chat, Trace) and chat.response_ids == reasoner.solve("1+2").response_ids
    problem = reasoner.solve(Problem(id="question/0", question="1+2"))
    assert isinstance(problem, Trace) and problem.response_ids == chat.response_ids


def test_solving_many_equals_solving_each(reasoner: NablaReasoner) -> None:
    problems = worlds.tiny_problems()
    together = reasoner.solve(problems, seed=5)
    for problem, trace in zip(problems, together, strict=True):
        assert reasoner.solve(problem, seed=5).response_ids == trace.response_ids
    others = reasoner.solve(problems, seed=6)
    assert [t.response_ids for t in others] != [t.response_ids for t in together]


def test_a_chat_is_scored_whole_also_after_another_with_the_same_ending(folders: dict[str, str]) -> None:
    """Questions are numbered anew at each call: nothing may be remembered by their names."""

    def chat(first: str) -> list[dict[str, str]]:
        turns = [("user", first), ("assistant", "8"), ("user", "9")]
        return [{"role": role, "content": content} for role, content in turns]

    def load() -> NablaReasoner:
        return NablaReasoner.from_pretrained(folders["policy"], reward=folders["scorer"], **SHORT)

    used = load()
    used.solve([chat("7")])
    [again], [fresh] = used.solve([chat("5")]), load().solve([chat("5")])
    assert again.reward_initial == pytest.approx(fresh.reward_initial, abs=1e-5)


@pytest.mark.parametrize(
    ("question", "words"),
    [
        ("", ["question 0", "empty"]),
        (" \n", ["question 0", "empty"]),
        (["1+2", ""], ["question 1", "empty"]),
        (["1+2", []], ["question 1", "messages"]),
        (None, ["a question or a list of questions, not NoneType"]),
        (7, ["a question or a list of questions, not int"]),
        (["1+2", 7], ["question 1", "messages"]),
        ([["1", "2"]], ["question 0", "messages"]),
        ([[{"role": "user"}]], ["question 0", "'content'"]),
        ([[{"role": "user", "content": None}]], ["question 0", "'content'"]),
        ([Problem(id="p", question="1"), Problem(id="p", question="2")], ["'p'", "2 times"]),
    ],
)
def test_what_is_no_question_is_refused(reasoner: NablaReasoner, question: Any, words: list[str]) -> None:
    worlds.refused(lambda: reasoner.solve(question), *words)


def test_a_reasoner_is_pickled_and_solves_the_same(reasoner: NablaReasoner) -> None:
    copied = pickle.loads(pickle.dumps(reasoner))
    assert copied.solve("1+2").response_ids == reasoner.solve("1+2").response_ids


def test_no_questions_give_no_traces(reasoner: NablaReasoner) -> None:
    assert reasoner.solve([]) == []


def test_a_question_that_cannot_be_run_gives_an_error_trace(reasoner: NablaReasoner) -> None:
    good, bad = reasoner.solve(["1+2", "what is love"])
    assert good.error is None and "question/1" in bad.error and bad.stop_reason == "error"


# --- options of one call ----------------------------------------------------------------------------------


def test_options_of_one_call_are_those_of_another_reasoner(reasoner: NablaReasoner) -> None:
    before = reasoner.config.to_dict()
    trace = reasoner.solve("1+2", max_rounds=1, **{"solver.step_size": 0.5})
    config = replace(reasoner.config, max_rounds=1, solver=replace(reasoner.config.solver, step_size=0.5))
    other = NablaReasoner(reasoner.policy, reasoner.reward, config)
    assert trace == replace(other.solve("1+2"), cost=trace.cost) and trace.meta != reasoner.solve("1+2").meta
    assert reasoner.config.to_dict() == before
    options = {name: value for name, value in config.to_dict().items() if name != "batch_size"}
    assert reasoner.solve("1+2", config=options).meta == trace.meta
    both = reasoner.solve(["1+2", {"question": "3", "answer": "3"}], config=config, num_starts=2)
    assert [trace.gold for trace in both] == [None, "3"] and both[0].meta == reasoner.solve("1+2", **OTHER).meta


OTHER = {"max_rounds": 1, "solver": {"step_size": 0.5}, "num_starts": 2}


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"max_round": 2}, ["unknown option 'max_round' (did you mean max_rounds?)"]),
        ({"solver.step_sise": 2}, ["has no option 'step_sise' (did you mean step_size?)"]),
        ({"sovler.step_size": 2}, ["unknown option 'sovler.step_size'"]),
        ({"step_size": 2}, ["it is an option of solver"]),
        ({"solver": "stee"}, ["solver must be one of", "did you mean ste?"]),
        ({"solver.steps": 3}, ["steps belongs to ste"]),
        ({"max_rounds": -1}, ["max_rounds must not be negative"]),
        ({"config": 3}, ["config is a SearchConfig", "not int"]),
        ({"seed": 1.5}, ["seed must be a whole number, not 1.5"]),
        ({"max_round": 2, "solver.steps": 3}, ["max_round", "steps belongs to ste"]),
    ],
)
def test_options_of_one_call_that_are_refused(
    reasoner: NablaReasoner, options: dict[str, Any], words: list[str]
) -> None:
    worlds.refused(lambda: reasoner.solve("1+2", **options), *words)


@pytest.mark.parametrize(
    ("first", "overrides", "same_as"),
    [
        ({}, {"beta": 0.5}, {"beta": 0.5}),
        ({"beta": 0.5}, {"solver.target_kl": 1.0}, {"solver": {"target_kl": 1.0}}),
        ({"solver": {"target_kl": 1.0}}, {"beta": 0.5}, {"beta": 0.5}),
        ({}, {"solver": "none"}, {"solver": "none"}),
        ({"solver": "none"}, {"solver": "mirror"}, {}),
        ({}, {"acceptance": "metropolis"}, {"acceptance": "metropolis"}),
        ({"acceptance": "metropolis"}, {"acceptance": "greedy"}, {}),
        ({"solver": "ste"}, {"solver.steps": 3}, {"solver": {"name": "ste", "steps": 3}}),
        ({"solver": {"target_kl": 1.0}}, {"solver.step_size": 0.5}, {"solver": {"target_kl": 1.0, "step_size": 0.5}}),
        ({"beta": 3.0}, {"max_rounds": 2}, {"beta": 3.0, "max_rounds": 2}),
    ],
)
def test_defaults_that_depend_on_others_are_chosen_anew(
    first: dict[str, Any], overrides: dict[str, Any], same_as: dict[str, Any]
) -> None:
    assert SearchConfig(**first).with_options(**overrides) == SearchConfig(**same_as)


# --- models in memory -------------------------------------------------------------------------------------


def test_models_in_memory_solve_as_those_on_disk(folders: dict[str, str]) -> None:
    model = AutoModelForCausalLM.from_pretrained(folders["policy"])
    reward = AutoModelForSequenceClassification.from_pretrained(folders["scorer"])
    options = {"max_rounds": 2, "max_new_tokens": 6}
    by_name = NablaReasoner.from_pretrained(folders["policy"], reward=folders["scorer"], **options).solve("1+2")
    in_memory = NablaReasoner.from_pretrained(model, reward=reward, **options).solve("1+2")
    assert in_memory.response_ids == by_name.response_ids and in_memory.reward == by_name.reward
    assert "(in memory, " in in_memory.meta["policy"]


# --- loading ----------------------------------------------------------------------------------------------


def test_a_log_ratio_reward_and_the_control(folders: dict[str, str]) -> None:
    spec = f"logratio:{folders['better']}"
    trace = NablaReasoner.from_pretrained(folders["policy"], reward=spec, solver="none", **SHORT).solve("1+2")
    assert (trace.method, trace.meta["reward"]) == ("control", spec)


def test_the_paper_preset_runs_and_can_be_overridden(folders: dict[str, str]) -> None:
    paper = NablaReasoner.from_pretrained(
        folders["policy"],
        reward=folders["scorer"],
        preset="paper",
        max_new_tokens=6,
        solver={"steps": 2},
        proposals={"confidence": 1.0},
    )
    config = paper.config
    assert config.solver == SteSolver(steps=2, learning_rate=0.01)
    assert config.proposals == SequentialProposals(confidence=1.0, resample_temperature=0.5)
    assert (config.max_rollouts, config.temperature) == (8, 0.7)
    trace = paper.solve("12-3+4*5")
    trace.validate()
    assert trace.error is None and trace.stop_reason in ("scanned", "max_rollouts")
    assert len(trace.revisions) < 8 and trace.cost.tokens["reward/backward"] > 0


def test_an_adapter_is_put_on_the_policy(folders: dict[str, str], tmp_path: Any) -> None:
    wrapped = get_peft_model(worlds.tiny_model(), LoraConfig(r=2, target_modules=["q_proj"], task_type="CAUSAL_LM"))
    for name, weight in wrapped.named_parameters():
        if "lora_B" in name:
            weight.data.fill_(0.5)
    wrapped.save_pretrained(tmp_path)
    adapted = NablaReasoner.from_pretrained(
        folders["policy"], reward=folders["scorer"], adapter=str(tmp_path), **SHORT
    )
    assert str(tmp_path) in adapted.solve("1+2").meta["policy"]


def test_unknown_options_and_presets_are_refused_by_name_before_anything_is_loaded() -> None:
    def load(**options: Any) -> Callable[[], NablaReasoner]:
        return lambda: NablaReasoner.from_pretrained("/nowhere", reward="/nowhere", **options)

    worlds.refused(load(bets=2.0), "unknown option 'bets'", "beta")
    worlds.refused(load(preset="papr"), "unknown preset 'papr'", "paper")
    worlds.refused(load(), "/nowhere")


# --- configuration ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"solver": "adam"}, ["solver", "'adam'", "mirror"]),
        ({"proposals": "local"}, ["proposals", "'local'", "global"]),
        ({"beta": 0.0}, ["beta"]),
        ({"beta": float("nan")}, ["beta"]),
        ({"max_rounds": -1}, ["max_rounds"]),
        ({"max_flops": float("nan")}, ["max_flops"]),
        ({"proposals_per_round": 0}, ["proposals_per_round"]),
        ({"top_k_candidates": 0}, ["top_k_candidates"]),
        ({"candidate_min_p": 1.0}, ["candidate_min_p"]),
        ({"temperature": -1.0}, ["temperature"]),
        ({"max_new_tokens": 0}, ["max_new_tokens"]),
        ({"max_rounds": 0}, ["never end"]),
        ({"learning_rate": 0.1}, ["solver mirror has no option", "learning_rate belongs to ste"]),
        (
            {"solver": "none", "likelihood_suffix_grad": True},
            ["solver none has no option", "likelihood_suffix_grad belongs to ste"],
        ),
        ({"confidence": 0.5}, ["proposals global has no option", "confidence belongs to sequential"]),
        ({"proposals": "sequential", "proposals_per_round": 2}, ["proposals_per_round belongs to global"]),
        ({"proposals": "sequential", "confidence": 0.0}, ["confidence"]),
        ({"proposals": "sequential", "resample_temperature": 0.0}, ["resample_temperature"]),
        ({"solver": "ste", "steps": 0}, ["steps"]),
        ({"solver": "ste", "learning_rate": 0.0}, ["learning_rate"]),
    ],
)
def test_a_configuration_that_means_nothing_is_refused(options: dict[str, Any], words: list[str]) -> None:
    worlds.refused(lambda: worlds.search_config(**options), *words)


def test_options_that_apply_get_their_defaults_and_others_stay_unset() -> None:
    mirror, ste = SearchConfig(), SearchConfig(solver="ste", proposals="sequential")
    assert not hasattr(mirror.solver, "learning_rate") and not hasattr(mirror.proposals, "confidence")
    assert (ste.solver.learning_rate, ste.solver.steps, ste.proposals.confidence) == (0.01, 20, 0.97)
    assert SearchConfig(beta=0.25).reward_weight == 4.0


def test_the_control_differs_in_the_gradient_only() -> None:
    config = SearchConfig(solver=SteSolver(learning_rate=0.3), max_rounds=5, temperature=0.7, batch_size=3)
    control = config.with_no_gradient()
    assert control.method == "control" and config.method == "nabla"
    assert (control.max_rounds, control.temperature, control.batch_size) == (5, 0.7, 3)
    assert control.compute_hash() != config.compute_hash()
    assert (
        SearchConfig(max_rounds=5).with_no_gradient().compute_hash()
        == SearchConfig(max_rounds=5, solver="none").compute_hash()
    )
