"""The paper's headline, judged on rows whose calls and answers are made by hand."""

import pytest
import worlds

from nabla_trl.evaluation.grids import build_grids
from nabla_trl.report.paper_claim import CLAIM_NOTE, compute_paper_claims, describe_paper_claims, list_claim_intervals

PROBLEMS = 60


def make_grids(**methods):
    """Each method: problems solved (the first so many), decoded tokens per problem, and whether calls were counted."""
    return build_grids(
        [
            worlds.result_row(
                method.replace("__", "@"),
                number,
                correct=number < right,
                flops=1.0,
                seconds=1.0,
                calls={"policy/decode": tokens + number % 3, "reward/forward": 8, "policy/prefill": 99}
                if tokens
                else {},
            )
            for method, (right, tokens) in methods.items()
            for number in range(PROBLEMS)
        ]
    )


def test_a_search_with_fewer_calls_and_more_accuracy_holds_the_claim():
    grids = make_grids(greedy=(20, 30), best_of_8=(40, 240), nabla=(40, 150))
    [claim] = compute_paper_claims(grids)
    assert claim.has_fewer_calls and claim.has_more_accuracy
    assert claim.calls_ratio is not None and claim.calls_ratio.value == pytest.approx(159 / 249)
    note, sentence = describe_paper_claims([claim])
    assert note == CLAIM_NOTE and sentence.endswith("the paper's headline holds here.")
    assert set(list_claim_intervals([claim])) == {"calls_ratio.nabla-best_of_8", "accuracy_ratio.nabla-greedy"}


@pytest.mark.parametrize(
    ("greedy", "search", "missing"),
    [
        (20, (40, 240), "fewer calls at no lower accuracy"),
        (38, (40, 100), "1.2 times greedy's accuracy"),
        (20, (22, 100), "fewer calls at no lower accuracy, 1.2 times greedy's accuracy"),
    ],
)
def test_each_half_of_the_claim_can_fail(greedy, search, missing):
    claims = compute_paper_claims(make_grids(greedy=(greedy, 30), best_of_8=(40, 240), paper=search))
    sentence = describe_paper_claims(claims)[1]
    assert sentence.endswith(f"the paper's headline is not shown here (missing beyond chance: {missing}).")


def test_the_baseline_is_the_smallest_best_of_n_that_is_as_accurate():
    """If none is, it is the most accurate one."""
    sizes = {"best_of_1": (20, 30), "best_of_4": (30, 120), "best_of_16": (40, 480), "best_of_32": (45, 960)}
    grids = make_grids(greedy=(20, 30), **sizes, paper=(30, 60), released=(31, 60), nabla=(50, 100))
    found = {claim.search: claim.baseline for claim in compute_paper_claims(grids)}
    assert found == {"paper": "best_of_4", "released": "best_of_16", "nabla": "best_of_32"}
    assert compute_paper_claims(make_grids(greedy=(20, 30), best_of_1=(20, 30), nabla=(40, 150))) == []


def test_rows_without_calls_say_nothing():
    assert compute_paper_claims(make_grids(greedy=(20, 30), best_of_8=(40, 0), nabla=(40, 150))) == []
    assert compute_paper_claims(make_grids(greedy=(20, 30), best_of_8=(40, 240), nabla=(40, 0))) == []
    assert compute_paper_claims(make_grids(best_of_8=(40, 240), nabla=(40, 150))) == []
    assert describe_paper_claims([]) == []


def test_greedy_without_a_right_answer_has_no_ratio():
    [claim] = compute_paper_claims(make_grids(greedy=(0, 30), best_of_8=(40, 240), nabla=(40, 150)))
    assert claim.accuracy_ratio is None and not claim.has_more_accuracy
    assert "greedy decoding has no right answer" in describe_paper_claims([claim])[1]


def test_other_searches_make_no_claim():
    grids = make_grids(greedy=(20, 30), best_of_8=(40, 240), control=(40, 150), sft_nabla=(40, 150))
    assert compute_paper_claims(grids) == []
