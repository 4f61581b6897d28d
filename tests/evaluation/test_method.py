"""Names of methods: taken apart and put together, and their order in a report."""

import math
from dataclasses import replace

import pytest
import worlds

from nabla_trl.evaluation.method import (
    POLICY_LABELS,
    Method,
    has_search,
    list_policy_labels,
    parse_methods,
    sort_methods,
)

RESTS = ("greedy", "best_of_1", "best_of_16", "nabla", "control@0.33", "nabla@best_of_8")


def test_every_label_is_taken_off_and_put_back():
    for label in ("", *POLICY_LABELS):
        for rest in RESTS:
            name = str(replace(Method.parse(rest), policy=label))
            assert name == (f"{label}_{rest}" if label else rest)
            assert (Method.parse(name).policy, str(Method.parse(name).base_method)) == (label, rest)
    assert Method.parse("reward_model_sampling") == Method("reward_model_sampling")
    assert Method.parse("weighted_best_of_4") == Method("weighted_best_of", n=4)
    assert Method.parse("reward_weighted_best_of_4") == Method("best_of", n=4, policy="reward_weighted")
    assert Method.parse("dpo_nabla@0.33") == Method("nabla", budget="0.33", policy="dpo")


@pytest.mark.parametrize(
    "name", ["", "sft_", "nabla@", "zebra", "best_of_08", "nabla_lambda_0.3@best_of_8", "dvts_4@.50"]
)
def test_every_name_is_written_as_it_was_read(name):
    assert str(Method.parse(name)) == name


def test_a_budget_that_is_no_number_is_refused():
    for name in ("nabla@much", "sft_nabla@best_of_few"):
        worlds.refused(lambda name=name: Method.parse(name), repr(name), "its budget is no number")
        worlds.refused(lambda name=name: parse_methods(name), f"unknown method {name!r}")


def test_families_keep_the_label():
    def parse_family(name):
        return Method.parse(name).family, Method.parse(name).size

    assert parse_family("self_consistency_16") == ("self_consistency", 16)
    assert parse_family("sft_best_of_8") == ("sft_best_of", 8)
    assert parse_family("dpo_nabla@best_of_8") == ("dpo_nabla", 0.5)
    assert parse_family("nabla") == ("nabla", math.inf)


def test_methods_are_ordered_by_policy_then_kind_then_budget():
    expected = [
        *("greedy", "best_of_2", "best_of_16", "nabla@0.1", "nabla@0.33", "nabla"),
        *("distilled_greedy", "sft_greedy", "sft_best_of_1", "sft_best_of_8", "sft_nabla@0.33", "grpo_greedy"),
        *("zebra", "ant"),
    ]
    assert sort_methods(["zebra", *reversed(expected[:-2]), "ant", "greedy"]) == expected
    assert list_policy_labels(expected) == ["distilled", "sft", "grpo"]


def test_names_of_trained_policies_are_read():
    names = ["best_of_16", *(f"{label}_{rest}" for label in POLICY_LABELS for rest in RESTS), "best_of_8"]
    assert parse_methods(",".join(names)) == parse_methods(names) == list(dict.fromkeys(names))
    assert parse_methods(["greedy, best_of_8", "nabla control,greedy"]) == ["greedy", "best_of_8", "nabla", "control"]
    assert has_search(["sft_nabla"]) and not has_search(["sft_greedy", "sft_best_of_8"])
    trained = Method.parse("rloo_control@0.5")
    assert (trained.budget_reference, trained.budget_factor) == ("best_of_16", 0.5), "budgets are the base policy's"


@pytest.mark.parametrize("name", ["sft", "sft_", "sft_paper", "sft_weighted_best_of_4", "sft_best_of_0", "ppo_greedy"])
def test_names_that_mean_nothing_are_refused(name):
    worlds.refused(lambda: parse_methods(name), f"unknown method {name!r}")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("allocated_vote_4", "write allocated_vote@best_of_8 or allocated_vote@0.5"),
        ("power_smc", "write power_smc_8 or power_smc@best_of_8 or power_smc@0.5"),
        ("sft_nabla_8", "write sft_nabla or sft_nabla@best_of_8 or sft_nabla@0.5"),
        ("greedy_3", "write greedy"),
        ("samples_1000", "at most samples_999"),
        ("sft_allocated_vote@best_of_4", "of a trained policy there are greedy, best_of, samples, nabla, control"),
    ],
)
def test_a_known_name_without_its_size_or_budget_says_how_it_is_written(name, words):
    worlds.refused(lambda: parse_methods(name), f"unknown method {name!r}: {words}")


def test_a_trained_search_needs_the_method_that_sets_its_budget():
    worlds.refused(lambda: parse_methods("sft_nabla@best_of_4"), "add best_of_4 to the methods")
