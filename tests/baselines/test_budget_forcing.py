"""Budget forcing: thoughts that go on, thoughts that are cut, and what they cost."""

from __future__ import annotations

from dataclasses import replace

import pytest
import worlds

from nabla_trl.baselines.budget_forcing import run_budget_forcing
from nabla_trl.baselines.config import BaselineConfig
from nabla_trl.evaluation.method import parse_methods
from nabla_trl.evaluation.plan import EvaluationSetup, check_methods, get_baseline_settings
from nabla_trl.models.options import Sampling
from nabla_trl.models.policy import Policy
from nabla_trl.rewards.reward import Reward
from nabla_trl.search.config import SearchConfig
from nabla_trl.tasks.problem import Problem
from nabla_trl.traces.schema import Trace

OPEN, CLOSE = "<think>", "</think>"
TOKENS = ["1", "2", "a", "b", OPEN, CLOSE, worlds.PAD, worlds.USER, worlds.ASSISTANT, worlds.END, worlds.UNK]
LIMIT = 40
CONFIG = BaselineConfig(wait_text="ab")
PROBLEMS = [Problem(id=f"p{number}", question=text, answer="1") for number, text in enumerate(("12", "1", "221"))]


@pytest.fixture(scope="module")
def thinker() -> Policy:
    """A policy whose prompt opens a thought. It closes thoughts often, and rarely ends its turn in them."""
    template = worlds.TEMPLATE + "{% if add_generation_prompt %}<think>{% endif %}"
    policy = worlds.tiny_policy(tokenizer=worlds.char_tokenizer(TOKENS, template=template), seed=0)
    assert policy.thought_closings == (CLOSE,)
    return policy


def force(policy: Policy, size: int | None, **options) -> list[Trace]:
    how = {"sampling": Sampling(max_new_tokens=LIMIT), "config": CONFIG, "method_name": "x", **options}
    return run_budget_forcing(PROBLEMS, size=size, policy=policy, **how)


def write(trace: Trace) -> str:
    return "".join({CLOSE: "/", worlds.END: "."}.get(TOKENS[token], TOKENS[token][:1]) for token in trace.response_ids)


def test_the_end_of_a_thought_is_suppressed_as_often_as_asked(thinker: Policy) -> None:
    """The first thought closes at once, so that the response begins with the text that goes on."""
    counts = [write(force(thinker, size)[0]).partition("/")[0].count("ab") for size in (1, 2, 3)]
    assert 1 <= counts[0] < counts[1] <= counts[2] + 1, counts
    for size in (1, 3):
        for trace in force(thinker, size):
            thought, closing, answer = write(trace).partition("/")
            assert len(trace.response_ids) <= LIMIT and trace.error is None
            assert (closing and answer) or thought.endswith("."), (
                "answered, or the policy ended its turn in the thought"
            )


def test_a_thought_at_its_limit_is_closed_and_answered(thinker: Policy) -> None:
    close = TOKENS.index(CLOSE)
    for trace in force(thinker, 50, config=replace(CONFIG, max_thinking_tokens=6)):
        ids = trace.response_ids
        assert close not in ids or ids.index(close) <= 6
        assert close not in ids or len(ids) > ids.index(close) + 1, "an answer follows"


def test_what_is_drawn_does_not_depend_on_the_batch_and_every_token_is_charged_once(thinker: Policy) -> None:
    together, alone = force(thinker, 2), force(thinker, 2, batch_size=1)
    for one, other in zip(together, alone, strict=True):
        assert (one.response_ids, one.cost.flops) == (other.response_ids, other.cost.flops)
        # The tokens of the response, and the closing tags that were taken back: none that is written twice.
        num_tokens = len(one.response_ids)
        assert num_tokens <= one.cost.tokens["policy/decode"] <= num_tokens + 2
        assert set(one.cost.tokens) == {"policy/prefill", "policy/decode"}


def test_it_runs_at_sizes_and_budgets(thinker: Policy) -> None:
    names = parse_methods("best_of_2,best_of_4,budget_forcing_1,budget_forcing@best_of_2,budget_forcing@best_of_4")
    reward: Reward = worlds.tiny_scalar(thinker)
    setup = EvaluationSetup(thinker, reward, SearchConfig(max_new_tokens=LIMIT, batch_size=4), (0,),
                            baseline_config=CONFIG)  # fmt: skip
    flops, _, _ = worlds.run_plan(names, setup, PROBLEMS)
    assert flops["budget_forcing@best_of_4"] >= flops["budget_forcing@best_of_2"]
    assert flops["budget_forcing@best_of_4"] < 1.1 * flops["best_of_4"]
    assert get_baseline_settings(["budget_forcing_1"], setup)["thinking"]["wait_text"] == "ab"


def test_an_answer_stays_within_the_budget_that_cut_its_thought(thinker: Policy) -> None:
    """A policy that hardly ever ends its turn would answer up to the longest response."""
    talker = worlds.tiny_policy(tokenizer=thinker.tokenizer, seed=5)
    free = force(talker, 1, sampling=Sampling(max_new_tokens=200))
    assert max(len(trace.response_ids) for trace in free) > 100
    max_flops = 70 * talker.size.compute_forward_flops(20, 1)  # 50 tokens are left for the answer
    for trace in force(talker, None, sampling=Sampling(max_new_tokens=200), max_flops=max_flops):
        assert trace.cost.flops <= 1.15 * max_flops


def test_a_policy_that_does_not_think_is_refused(policy: Policy, thinker: Policy, scalar_reward: Reward) -> None:
    setup = EvaluationSetup(policy, scalar_reward, SearchConfig(), (0,))
    worlds.refused(lambda: check_methods(["budget_forcing_1"], setup, {}), "needs a policy that thinks")
    worlds.refused(lambda: force(thinker, 1, config=BaselineConfig()), "cannot write 'Wait'", "wait_text")
    worlds.refused(lambda: force(thinker, None), "a size or a budget")
    for options in ({"wait_text": " "}, {"max_thinking_tokens": -1}):
        worlds.refused(lambda options=options: BaselineConfig(**options), next(iter(options)))
