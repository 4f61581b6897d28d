"""Names of methods: taken apart and put together, and their order in a report."""

import pytest
import worlds

from nabla_trl.evaluation.method import (
    POLICY_LABELS,
    join_label,
    list_policy_labels,
    parse_family,
    sort_methods,
    split_label,
)
from nabla_trl.evaluation.plan import has_search, parse_budget, parse_methods

RESTS = ("greedy", "best_of_1", "best_of_16", "nabla", "control@0.33", "nabla@best_of_8")


def test_every_label_is_taken_off_and_put_back():
    for label in ("", *POLICY_LABELS):
        for rest in RESTS:
            assert split_label(join_label(label, rest)) == (label, rest)
    assert split_label("reward_model_sampling") == ("", "reward_model_sampling")
    assert split_label("weighted_best_of_4") == ("", "weighted_best_of_4")
    assert split_label("reward_weighted_best_of_4") == ("reward_weighted", "best_of_4")


def test_families_keep_the_label():
    assert parse_family("self_consistency_16") == ("self_consistency", 16)
    assert parse_family("sft_best_of_8") == ("sft_best_of", 8)
    assert parse_family("dpo_nabla@best_of_8") == ("dpo_nabla", 0.5)


def test_methods_are_ordered_by_policy_then_kind_then_budget():
    expected = [
        *("greedy", "best_of_2", "best_of_16", "nabla@0.1", "nabla@0.33", "nabla"),
        *("distilled_greedy", "sft_greedy", "sft_best_of_1", "sft_best_of_8", "sft_nabla@0.33", "grpo_greedy"),
        *("zebra", "ant"),
    ]
    assert sort_methods(["zebra", *reversed(expected[:-2]), "ant", "greedy"]) == expected
    assert list_policy_labels(expected) == ["distilled", "sft", "grpo"]


def test_names_of_trained_policies_are_read():
    names = ["best_of_16", *(join_label(label, rest) for label in POLICY_LABELS for rest in RESTS), "best_of_8"]
    assert parse_methods(",".join(names)) == list(dict.fromkeys(names))
    assert has_search(["sft_nabla"]) and not has_search(["sft_greedy", "sft_best_of_8"])
    assert parse_budget("rloo_control@0.5") == ("best_of_16", 0.5), "budgets are the base policy's"


@pytest.mark.parametrize("name", ["sft", "sft_", "sft_paper", "sft_weighted_best_of_4", "sft_best_of_0", "ppo_greedy"])
def test_names_that_mean_nothing_are_refused(name):
    worlds.refused(lambda: parse_methods(name), f"unknown method {name!r}", "L_greedy", "reward_weighted")


def test_a_trained_search_needs_the_method_that_sets_its_budget():
    worlds.refused(lambda: parse_methods("sft_nabla@best_of_4"), "add best_of_4 to the methods")
