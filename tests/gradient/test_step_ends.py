"""steps: where steps end, over tokenizers of the kinds there are, against the decoded text."""

from __future__ import annotations

import random
from collections.abc import Sequence

import pytest
import worlds
from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from nabla_trl.gradient.step_ends import StepEndDetector, StepFinder, check_delimiter, parse_delimiter

TEXT = "So 1+2=3\n\nThen é;\n \n\n\nAnd 数字\n\n\n\nend"


def byte_level() -> PreTrainedTokenizerFast:
    """Every byte, and tokens that hold a delimiter, its end, or more than it."""
    symbols = [*sorted(pre_tokenizers.ByteLevel.alphabet()), "ĊĊ", "ĊĊSo", ";Ċ", "ĊĊĊĊ", "ĠĊ"]
    inner = Tokenizer(models.BPE({symbol: index for index, symbol in enumerate(symbols)}, []))
    inner.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    inner.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<|end|>")


def sentence_pieces() -> PreTrainedTokenizerFast:
    """▁ for a space, one at the beginning added and dropped, bytes for what is not in the vocabulary (Llama 2)."""
    symbols = ["<unk>", *(f"<0x{byte:02X}>" for byte in range(256)), "▁", *"abcdSo;=+123", "▁;"]
    vocabulary = {symbol: index for index, symbol in enumerate(symbols)}
    inner = Tokenizer(models.BPE(vocabulary, [("▁", ";")], unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    inner.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    inner.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(tokenizer_object=inner, unk_token="<unk>")


def completed(tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], delimiter: str) -> list[int]:
    """Tokens after which the decoded text holds one more delimiter than before."""
    counts = [tokenizer.decode(ids[:end], skip_special_tokens=True).count(delimiter) for end in range(len(ids) + 1)]
    return [place for place in range(len(ids)) if counts[place + 1] > counts[place]]


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
@pytest.mark.parametrize("delimiter", ["\n\n", ";", "\n", "; ", "=3\n", "d"])
def test_steps_end_where_the_text_completes_a_delimiter(make, delimiter: str) -> None:
    tokenizer = make()
    steps, ids = StepFinder(tokenizer, delimiter), tokenizer(TEXT + " b; d")["input_ids"]
    assert steps.find_step_ends(ids) == completed(tokenizer, ids, delimiter) != []


@pytest.mark.parametrize("make", [byte_level, sentence_pieces])
def test_random_ids(make) -> None:
    """… which no tokenizer would make of their text. Bytes of cut characters lie around the delimiters; the decoder of
    sentence pieces takes a whole run of bytes for unreadable then, line breaks and all, so there they are left out."""
    tokenizer, rng = make(), random.Random(0)
    vocabulary = {t: index for t, index in tokenizer.get_vocab().items() if t == "<0x0A>" or not t.startswith("<0x")}
    breaks = [index for symbol, index in vocabulary.items() if "Ċ" in symbol or symbol in ("<0x0A>", "▁", "a", "Ġ")]
    steps, found = StepFinder(tokenizer, "\n\n"), 0
    for _ in range(100):
        ids = [rng.choice(breaks if rng.random() < 0.8 else [*vocabulary.values()]) for _ in range(12)]
        assert steps.find_step_ends(ids) == completed(tokenizer, ids, "\n\n")
        found += len(steps.find_step_ends(ids))
    assert found > 60


def test_a_prefix_ends_the_same_steps() -> None:
    tokenizer = byte_level()
    steps, ids = StepFinder(tokenizer, "\n\n"), tokenizer(TEXT)["input_ids"]
    whole = steps.find_step_ends(ids)
    assert len(whole) == 4
    for cut in range(len(ids) + 1):
        assert steps.find_step_ends(ids[:cut]) == [end for end in whole if end < cut]
    assert steps.find_step_ends([]) == []


def test_delimiters_in_across_and_beside_tokens() -> None:
    tokenizer = byte_level()
    ids = tokenizer.convert_tokens_to_ids
    steps = StepFinder(tokenizer, "\n\n")
    for tokens, ends in (
        (["a", "ĊĊSo", "b"], [1]),
        (["a", ";Ċ", "Ċ", "b"], [2]),
        (["Ċ", "Ċ", "Ċ"], [1]),  # delimiters do not overlap
        (["Ċ", "Ċ", "Ċ", "Ċ"], [1, 3]),
        (["Ċ", "ĊĊ", "Ċ"], [1, 2]),
        (["ĊĊĊĊ", "Ċ"], [0]),  # two in one token end one step
        (["Ċ", "ĠĊ", "Ċ"], [2]),
        (["Ċ", "Ġ", "Ċ"], []),
    ):
        assert steps.find_step_ends(ids(tokens)) == ends, tokens


def test_special_tokens_write_nothing_unless_one_is_the_delimiter() -> None:
    tokenizer = worlds.char_tokenizer()
    ids = tokenizer("1<|end|>;<|pad|>2;<|end|>", add_special_tokens=False)["input_ids"]
    assert StepFinder(tokenizer, ";").find_step_ends(ids) == [2, 5]
    assert StepFinder(tokenizer, "<|pad|>").find_step_ends(ids) == [3]
    assert StepFinder(tokenizer, "1;").find_step_ends(ids) == [2]  # as people read it
    assert StepFinder(tokenizer, "end").find_step_ends(ids) == []
    tokenizer.add_tokens([AddedToken("<step>", special=True)])
    assert StepFinder(tokenizer, "<step>").find_step_ends(tokenizer("1<step>2<step>")["input_ids"]) == [1, 3]


@pytest.mark.parametrize(
    ("written", "delimiter"),
    [(";", ";"), (r"\n\n", "\n\n"), (r"\x3a", ":"), (r"\x2c \t", ", \t"), (r"\\n", r"\n"), ("→ é", "→ é"), (" ", " ")],
)
def test_delimiters_as_specs_write_them(written: str, delimiter: str) -> None:
    assert parse_delimiter(written) == delimiter


@pytest.mark.parametrize("written", ["", "\\", r"a\d", r"\x3", r"\xgg", "\n", "a\tb"])
def test_delimiters_that_are_refused(written: str) -> None:
    worlds.refused(lambda: parse_delimiter(written), "step_delimiter")


@pytest.mark.parametrize("value", ["", None, 3, ["\n"]])
def test_values_that_are_no_delimiter(value: object) -> None:
    worlds.refused(lambda: check_delimiter(value), "step_delimiter", repr(value))


def test_read_on_across_continuations() -> None:
    """Wherever a response is cut, the ends found in its parts are those found in the whole."""
    tokenizer = byte_level()
    steps, ids = StepFinder(tokenizer, "\n\n"), tokenizer(TEXT + "\n\n\n \n\n")["input_ids"]
    for cut in range(len(ids)):
        first = StepEndDetector(steps)
        told = [first(token) for token in ids[:cut]]
        second = StepEndDetector(steps, first.pending_text)
        told += [second(token) for token in ids[cut:]]
        assert [place for place, ends in enumerate(told) if ends] == steps.find_step_ends(ids) != []
