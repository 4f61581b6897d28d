"""Traces as people and programs see them."""

from __future__ import annotations

import copy
import json
import math
import pickle
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
import worlds
from refined_traces import END, STORY, decode, trace_of

from nabla_trl.models.flops import Cost
from nabla_trl.traces.schema import Trace
from nabla_trl.traces.storage import TraceWriter, read_traces
from nabla_trl.traces.texts import TextDecoder


def test_a_trace_prints_as_an_answer_that_is_refined() -> None:
    text = repr(STORY)
    assert "1+2=4;#4   reward 0.000" in text and "1+2?" in text
    assert "1+2=[-4-]{+3+};#9   reward 0.000 -> 1.000" in text
    assert "1+2=3;[-#-]{+#+}7" in text and "2 of 4 proposals accepted" in text and "1.2 GFLOPs" in text
    assert "[-1-]" not in text  # rejected


def test_html_is_escaped_and_needs_nothing_else() -> None:
    page = trace_of("1<b>2", (1, "<script>x", True), prompt="<i>&")._repr_html_()
    assert "&lt;script&gt;" not in page.replace("&lt;", "", 1) or "<script" not in page
    assert "<script" not in page and "<i>" not in page and "http" not in page and "&lt;i&gt;&amp;" in page
    assert "<del" in page and "<ins" in page


def test_control_characters_of_a_response_stay_out_of_both() -> None:
    trace = trace_of("a\x1b[2J", (1, "\x1b]0;t\x07", True), prompt="q\u202e")
    for text in (repr(trace), trace._repr_html_()):
        assert not any(character in text for character in "\x1b\x07\u202e")


def test_a_failed_problem_prints_its_error() -> None:
    failed = trace_of("", error="the prompt is too long", reward=math.nan, reward_initial=math.nan)
    assert "the prompt is too long" in repr(failed) and "the prompt is too long" in failed._repr_html_()


def test_json_and_back_is_the_same_trace_with_its_texts() -> None:
    result = json.loads(json.dumps(STORY.to_dict(), allow_nan=False))
    assert result["initial"] == "1+2=4;#4" and result["cost"]["tokens"] == {"policy/decode": 3}
    third = result["revisions"][2]
    assert (third["old_text"], third["new_text"], third["suffix_text"]) == ("4", "3", "3;#9")
    again = Trace.from_dict(result)
    assert again == STORY and again.decoder is None and repr(again) == repr(STORY)
    assert again.to_dict() == STORY.to_dict() and again._repr_html_() == STORY._repr_html_()


def test_numbers_that_are_not_finite_come_back() -> None:
    unread = replace(STORY.revisions[0], reward_after=-math.inf)
    trace = replace(STORY, revisions=[unread, *STORY.revisions[1:]], cost=Cost(1.0, math.nan, {}))
    data = trace.to_dict()
    assert data["revisions"][0]["reward_after"] == "-inf" and data["cost"]["seconds"] is None
    plain = trace.to_dict(infinite_as_none=True)  # as solve --json writes it
    assert plain["revisions"][0]["reward_after"] is None and plain["initial"] == data["initial"]
    assert Trace.from_dict(json.loads(json.dumps(data, allow_nan=False))).revisions[0].reward_after == -math.inf


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"reword": 1}, "unknown key 'reword'"),
        ({"revisions": [{"round": 0}]}, "no trace"),
        ({"revisions": 3}, "no trace"),
        ({"cost": 3}, "no trace"),
        ({"reward": "much"}, "no trace"),
        ({"response_ids": [7]}, "do not turn initial_ids into response_ids"),
    ],
)
def test_what_is_no_trace_is_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Trace.from_dict(STORY.to_dict() | change)


def test_copies_and_pickles_leave_the_tokenizer_behind() -> None:
    class Heavy:
        def __deepcopy__(self, memo: Any) -> None:
            raise AssertionError("copied")

        def __reduce__(self) -> None:
            raise AssertionError("pickled")

    trace = replace(STORY, decoder=TextDecoder(decode, Heavy()))
    assert copy.deepcopy(trace) == trace == pickle.loads(pickle.dumps(trace))
    assert asdict(trace)["reward"] == trace.reward
    assert "[-⟨52⟩-]{+⟨51⟩+}" in repr(pickle.loads(pickle.dumps(trace)))


def test_traces_of_a_search_know_their_texts(policy: Any, scalar_reward: Any) -> None:
    from nabla_trl.search.loop import run_search

    config = worlds.search_config(max_rounds=3, max_new_tokens=8)
    [trace] = run_search(worlds.tiny_problems()[:1], policy=policy, reward=scalar_reward, config=config)
    assert trace.decoder is not None and trace.decoder(trace.initial_ids) == policy.decode(trace.initial_ids)
    assert Trace.from_dict(trace.to_dict()) == trace and "⟨" not in repr(trace).replace("⟨end⟩", "").replace(
        "⟨special⟩", ""
    )


def test_a_table_of_another_tokenizer_gives_no_texts(tmp_path: Path) -> None:
    texts = [chr(index) for index in range(128)]
    for name in ("mine", "other"):
        with TraceWriter(tmp_path / name) as writer:
            writer.add(replace(STORY, meta={"tokenizer_hash": "mine"}))
        table = {"tokenizer": name, "special": [END], "tokens": texts}
        (tmp_path / name / "tokens.json").write_text(json.dumps(table), encoding="utf-8")
    assert "1+2=[-4-]{+3+}" in repr(read_traces(tmp_path / "mine"))
    assert "[-⟨52⟩-]{+⟨51⟩+}" in repr(read_traces(tmp_path / "other"))
    (tmp_path / "mine" / "tokens.json").write_text("{", encoding="utf-8")
    assert "[-⟨52⟩-]{+⟨51⟩+}" in repr(read_traces(tmp_path / "mine"))
