"""Every method has a group, words and a look of its own, and panels place the names of their lines."""

import pytest

from nabla_trl.evaluation.method import (
    BUDGET_FORCING,
    POLICY_LABELS,
    POOL_METHODS,
    POWER_SAMPLERS,
    POWER_SEARCHES,
    REWARD_MODEL_SAMPLING,
    SEARCHES,
    STEP_SEARCHES,
)
from nabla_trl.report.groups import (
    METHOD_GROUPS,
    OTHER,
    SINGLE_PASS,
    TRAINED,
    VOTES,
    describe_method,
    get_method_group,
    group_methods,
)
from nabla_trl.report.html.figures import get_css_color
from nabla_trl.report.plots.canvas import METHOD_STYLES, get_style
from nabla_trl.report.plots.panels import spread_out

FAMILIES = (
    *("greedy", BUDGET_FORCING, REWARD_MODEL_SAMPLING, *SEARCHES, *STEP_SEARCHES, *POWER_SAMPLERS, *POWER_SEARCHES),
    *(name for name in POOL_METHODS if name != "samples"),
)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_method_has_a_group_words_and_a_look(family):
    assert get_method_group(family) != OTHER and describe_method(family)
    assert get_css_color(family).startswith("var(--")


def test_methods_of_one_group_differ_in_color_and_marker():
    for group, families in group_methods(METHOD_STYLES).items():
        looks = [(get_style(family).color, get_style(family).marker) for family in families]
        assert len(set(looks)) == len(looks), group.title


def test_groups_are_those_of_names():
    assert get_method_group("best_of_1") == SINGLE_PASS and get_method_group("best_of_2") == VOTES
    assert all(get_method_group(f"{label}_best_of_8") == TRAINED for label in POLICY_LABELS)
    assert get_method_group("something_new_4") == OTHER and describe_method("something_new_4") == ""
    groups = group_methods(["nabla", "sft_greedy", "greedy", "nabla@0.33"])
    assert list(groups) == [group for group in METHOD_GROUPS if group in groups]
    assert list(groups.values()) == [["greedy"], ["nabla", "nabla@0.33"], ["sft_greedy"]]


def test_names_are_spread_out_near_their_lines():
    assert spread_out([0.5, 0.1], 0.1, 1.0) == [0.5, 0.1], "far enough apart"
    assert spread_out([0.5, 0.5, 0.5], 0.2, 1.0) == pytest.approx([0.3, 0.5, 0.7])
    assert spread_out([0.99, 1.0], 0.2, 1.0) == pytest.approx([0.8, 1.0]), "within the height"
    assert spread_out([0.3, 0.3, 0.3], 1.0, 1.0) == pytest.approx([0.0, 0.5, 1.0]), "more than fit"
