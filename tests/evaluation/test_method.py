"""Names of methods: taken apart and put together, and their order in a report."""

import pytest
import worlds

from nabla_trl.evaluation.method import LABELS, family, in_order, labelled, labels, split
from nabla_trl.evaluation.plan import budget, method_names, searches

RESTS = ("greedy", "best_of_1", "best_of_16", "nabla", "control@0.33", "nabla@best_of_8")


def test_every_label_is_taken_off_and_put_back():
    for label in ("", *LABELS):
        for rest in RESTS:
            assert split(labelled(label, rest)) == (label, rest)
    assert split("reward_model_sampling") == ("", "reward_model_sampling")
    assert split("weighted_best_of_4") == ("", "weighted_best_of_4")
    assert split("reward_weighted_best_of_4") == ("reward_weighted", "best_of_4")


def test_families_keep_the_label():
    assert family("self_consistency_16") == ("self_consistency", 16)
    assert family("sft_best_of_8") == ("sft_best_of", 8)
    assert family("dpo_nabla@best_of_8") == ("dpo_nabla", 0.5)


def test_methods_are_ordered_by_policy_then_kind_then_budget():
    expected = [
        *("greedy", "best_of_2", "best_of_16", "nabla@0.1", "nabla@0.33", "nabla"),
        *("distilled_greedy", "sft_greedy", "sft_best_of_1", "sft_best_of_8", "sft_nabla@0.33", "grpo_greedy"),
        *("zebra", "ant"),
    ]
    assert in_order(["zebra", *reversed(expected[:-2]), "ant", "greedy"]) == expected
    assert labels(expected) == ["distilled", "sft", "grpo"]


def test_names_of_trained_policies_are_read():
    names = ["best_of_16", *(labelled(label, rest) for label in LABELS for rest in RESTS), "best_of_8"]
    assert method_names(",".join(names)) == list(dict.fromkeys(names))
    assert searches(["sft_nabla"]) and not searches(["sft_greedy", "sft_best_of_8"])
    assert budget("rloo_control@0.5") == ("best_of_16", 0.5), "budgets are the base policy's"


@pytest.mark.parametrize("name", ["sft", "sft_", "sft_paper", "sft_weighted_best_of_4", "sft_best_of_0", "ppo_greedy"])
def test_names_that_mean_nothing_are_refused(name):
    worlds.refused(lambda: method_names(name), f"unknown method {name!r}", "L_greedy", "reward_weighted")


def test_a_trained_search_needs_the_method_that_sets_its_budget():
    worlds.refused(lambda: method_names("sft_nabla@best_of_4"), "add best_of_4 to the methods")
