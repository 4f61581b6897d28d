"""Thoughts are no answers, whatever tags stand around them and whether or not these are special tokens."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import trl
import worlds
from transformers import PreTrainedTokenizerFast

from nabla_trl.grading.extraction import extract_answer, has_open_think_block
from nabla_trl.grading.notation import is_think_tag, normalize_think_tags
from nabla_trl.models.policy import Policy
from nabla_trl.search.batches import write_token_texts
from nabla_trl.tasks.problem import Problem

TRL = Path(trl.__file__).parent / "chat_templates"
# Name: (opening, closing, what opens an answer without a thought)
TAGS = {
    "qwen3": ("<think>", "</think>", ""),
    "magistral": ("[THINK]", "[/THINK]", ""),
    "seed-oss": ("<seed:think>", "</seed:think>", ""),
    "exaone-deep": ("<thought>", "</thought>", ""),
    "command-a": ("<|START_THINKING|>", "<|END_THINKING|>", ""),
    "open-thoughts": ("<|begin_of_thought|>", "<|end_of_thought|>", ""),
    "kimi-vl": ("◁think▷", "◁/think▷", ""),
    "gemma4": ("<|channel>thought\n", "<channel|>", ""),
    "gptoss": (
        "<|channel|>analysis<|message|>",
        "<|end|><|start|>assistant<|channel|>final<|message|>",
        "<|channel|>final<|message|>",
    ),
}


def text_tokenizer(template: str | None, tags: tuple[str, ...], special: bool) -> PreTrainedTokenizerFast:
    letters = sorted(set("abcdefghijklmnopqrstuvwxyz \n<>|/:_[]◁▷SEOFHCKTRABNGDIUMYL?.{}") - set(worlds.CHARS))
    tokenizer = worlds.char_tokenizer((*worlds.TOKENS, *letters), template=template)
    tokenizer.add_tokens([tag for tag in tags if tag not in tokenizer.get_vocab()], special_tokens=special)
    return tokenizer


def split_tags(*texts: str) -> tuple[str, ...]:
    import re

    return tuple(dict.fromkeys(tag for text in texts for tag in re.findall(r"[<\[◁][^<>\[\]◁▷]+[>\]▷]", text)))


def thinking_policy(name: str, special: bool, *, opened: bool = False) -> Policy:
    opening, closing, _ = TAGS[name]
    path = TRL / f"{name}.jinja"
    template = path.read_text() if name in ("gptoss", "qwen3") else worlds.TEMPLATE
    if opened:
        template += "{% if add_generation_prompt %}{{ " + repr(opening) + " }}{% endif %}"
    tokenizer = text_tokenizer(template, split_tags(*TAGS[name]), special)
    policy = worlds.tiny_policy(tokenizer=tokenizer, context=4096)
    assert len(policy.tokenizer(opening + closing, add_special_tokens=False)["input_ids"]) > 1
    return policy


@pytest.mark.parametrize("special", [True, False])
@pytest.mark.parametrize("name", TAGS)
def test_a_thought_is_no_answer(name: str, special: bool) -> None:
    opening, closing, plain = TAGS[name]
    policy, opened = thinking_policy(name, special), thinking_policy(name, special, opened=True)

    def answer(policy: Policy, text: str) -> str | None:
        ids = list(policy.tokenizer(text, add_special_tokens=False)["input_ids"])
        return extract_answer(policy.decode_response(ids))

    assert answer(policy, f"{opening}9-5=4;#4{closing}2+3=5;#5") == "5"
    assert answer(policy, f"{opening}9-5=4;#4{closing}2+3=5") == "5"
    assert answer(policy, f"{opening}9-5=4;#4") is None
    assert answer(policy, f"{plain}2+3=5;#5") == "5"
    assert answer(opened, f"9-5=4;#4{closing}2+3=5;#5") == "5"
    assert answer(opened, "9-5=4;#4") is None


def test_a_format_that_only_the_template_shows() -> None:
    """Nothing in these tags names a thought: the template says where it writes one."""
    template = (TRL / "muse_glimmer.jinja").read_text()
    opening, closing = " to=self<|message|>", "<|eom|><|start|>assistant to=user<|message|>"
    tokenizer = text_tokenizer(template, split_tags(closing), special=True)
    policy = worlds.tiny_policy(tokenizer=tokenizer, context=4096)

    def answer(text: str) -> str | None:
        return extract_answer(policy.decode_response(list(tokenizer(text, add_special_tokens=False)["input_ids"])))

    assert answer(f"{opening}9-5=4;#4{closing}2+3=5") == "5"
    assert answer(f"{opening}9-5=4;#4") is None
    assert answer(" to=user<|message|>2+3=5") == "5"


def test_a_system_prompt_may_explain_the_tags() -> None:
    template = "{{ '<think>a' }}" + worlds.TEMPLATE
    policy = worlds.tiny_policy(tokenizer=text_tokenizer(template, ("<think>", "</think>"), special=True))
    ids = list(policy.tokenizer("2+3=5;#5", add_special_tokens=False)["input_ids"])
    assert policy.decode_response(ids) == "2+3=5;#5"


def test_decoded_text_keeps_the_tags_and_no_other_special_token(tmp_path: Path) -> None:
    policy = thinking_policy("magistral", special=True)
    ids = [*policy.tokenizer("[THINK]1[/THINK]2", add_special_tokens=False)["input_ids"], *sorted(policy.stop_ids)]
    assert policy.decode(ids) == "[THINK]1[/THINK]2" and policy.decode_response(ids) == "<think>1</think>2"
    assert policy.decode(ids[:2]) == "[THINK]1"
    write_token_texts(tmp_path, policy)
    import json

    table = json.loads((tmp_path / "tokens.json").read_text())
    assert ids[0] not in table["special"] and ids[-1] in table["special"] and table["tokens"][ids[0]] == "[THINK]"


def test_few_shot_prompts_open_no_thought() -> None:
    policy = thinking_policy("qwen3", special=True, opened=True)
    assert policy.decode_response([]) == "<think>"
    shown = replace(policy, prompt_options=replace(policy.prompt_options, style="few_shot"))
    assert shown.decode_response([]) == ""
    assert shown.get_stop_strings(Problem("a", "b", few_shot_examples=(("c", "d"),)))


@pytest.mark.parametrize(
    ("text", "normalized"),
    [
        ("<THINK>a</Thinking>", "<think>a</think>"),
        ("Here is my thought process:\na\nHere is my response:\nb", "<think>\na\n</think>\nb"),
        ("<|channel|>commentary to=f <|constrain|>json<|message|>{}", "<think>{}"),
        ("a [x] <b> <thin> [THINKER] think", "a [x] <b> <thin> [THINKER] think"),
    ],
)
def test_tags_in_texts(text: str, normalized: str) -> None:
    assert normalize_think_tags(text) == normalized


def test_open_thoughts_in_texts() -> None:
    assert has_open_think_block("[THINK]a") and not has_open_think_block("[THINK]a[/THINK]")
    assert is_think_tag("[/THINK]") and not is_think_tag("[/INST]") and not is_think_tag("<think>a")
