"""Options from presets, YAML and flags: who wins, what is refused, and that a mistake is one line."""

from __future__ import annotations

import re
import signal
from dataclasses import dataclass, field
from pathlib import Path

import pytest
from trl import SFTConfig

from nabla_trl.cli.parsing import Parser, UsageError, parse_dataclasses, run_main
from nabla_trl.search.config import PRESETS, SearchConfig
from nabla_trl.utils.fields import coerce_fields
from nabla_trl.utils.interrupts import StoppedBySignal


@dataclass
class Options:
    name: str = field(metadata={"help": "a text"})
    count: int = field(default=3, metadata={"help": "a number"})
    share: float = field(default=0.5, metadata={"help": "a fraction"})
    flag: bool = field(default=False, metadata={"help": "yes or no"})
    maybe: bool | None = field(default=None, metadata={"help": "yes, no or neither"})
    seeds: list[int] = field(default_factory=lambda: [0], metadata={"help": "several"})
    place: str | None = field(default=None, metadata={"help": "a text or none"})


def yaml_file(folder: Path, text: str) -> str:
    path = folder / "options.yaml"
    path.write_text(text, encoding="utf-8")
    return str(path)


def options(*argv: str) -> Options:
    return parse_dataclasses([Options], ["--name", "x", *argv])[0]


def test_preset_then_file_then_flags(tmp_path):
    text = "preset: paper\nlr: 0.1\nsteps: 7\nrollouts: 5\n"
    argv = ["--config", yaml_file(tmp_path, text), "--ste_steps", "9"]
    found = parse_dataclasses([SearchConfig], argv, presets=PRESETS)[0]
    assert found == SearchConfig.from_preset("paper", ste_learning_rate=0.1, ste_steps=9, max_rollouts=5)


def test_the_preset_of_the_command_line_wins_over_the_one_of_the_file(tmp_path):
    argv = [f"--config={yaml_file(tmp_path, 'preset: paper')}", "--preset=default", "--max_rounds=2"]
    assert parse_dataclasses([SearchConfig], argv, presets=PRESETS)[0] == SearchConfig(max_rounds=2)


def test_a_file_that_repeats_the_defaults_changes_nothing(tmp_path):
    """Also the hash: YAML's `1` for a float must not tell two equal searches apart."""
    text = "kl: 2\ntemperature: 1\ntop_p: 1\nflops: 0\nrounds: 16"
    found = parse_dataclasses([SearchConfig], ["--config", yaml_file(tmp_path, text)])[0]
    assert found.hash() == SearchConfig().compute_hash()


def test_values_of_a_file_get_the_types_of_the_fields(tmp_path):
    text = "share: 1e-3\ncount: 4\nflag: true\nmaybe: false\nseeds: [1, 2]\nplace: null"
    found = options("--config", yaml_file(tmp_path, text))
    assert found == Options("x", 4, 0.001, True, False, [1, 2], None)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("count: many", "count must be a whole number, not 'many'"),
        ("count: 1.5", "count must be a whole number, not 1.5"),
        ("count: true", "count must be a whole number, not True"),
        ("count: null", "count must be a whole number, not None"),
        ("share: half", "share must be a number, not 'half'"),
        ("share: yes", "share must be a number, not True"),
        ("flag: 1", "flag must be true or false, not 1"),
        ("maybe: perhaps", "maybe must be true or false, not 'perhaps'"),
        ("seeds: 1", "seeds must be a list, each a whole number, not 1"),
        ("seeds: [1, a]", "seeds must be a list, each a whole number, not [1, 'a']"),
        ("name: no", "name must be text (in quotes), not False"),
        ("cuont: 3", "unknown key 'cuont' (did you mean count?)"),
        ("preset: paper", "unknown key 'preset'"),
        ("env: {A: 1}", "unknown key 'env'"),
        ("3: 4", "unknown key 3"),
        ("- 1", "must hold a mapping of options"),
        ("", "must hold a mapping of options"),
        ("[", "cannot read"),
    ],
)
def test_a_wrong_file_is_named_with_what_is_wrong(tmp_path, text, message):
    path = yaml_file(tmp_path, text)
    with pytest.raises(ValueError, match=re.escape(message)) as caught:
        options("--config", path)
    assert path in str(caught.value)


@pytest.mark.parametrize("content", [None, b"\xff\xfe"])
def test_a_file_that_cannot_be_read(tmp_path, content):
    path = tmp_path / "odd.yaml"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=f"cannot read {re.escape(str(path))}"):
        options("--config", str(path))


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["--coutn", "3"], "unknown option --coutn (did you mean --count?)"),
        (["--coun", "3"], "unknown option --coun (did you mean --count?)"),  # no abbreviations
        (["--preset", "paper"], "unknown option --preset"),
        (["stray"], "unexpected argument 'stray'"),
        (["--count", "many"], "argument --count: invalid int value: 'many'"),
        (["--count"], "argument --count: expected one argument"),
        (["--config"], "argument --config: expected one argument"),
        (["--maybe", "perhaps"], "Truthy value expected"),
    ],
)
def test_a_wrong_command_line_is_a_usage_error(argv, message):
    with pytest.raises(UsageError, match=re.escape(message)):
        options(*argv)


def test_a_misspelt_required_option_is_named_rather_than_called_missing():
    with pytest.raises(UsageError, match=r"--nmae \(did you mean --name\?\)"):
        parse_dataclasses([Options], ["--nmae", "x"])
    with pytest.raises(UsageError, match="required: --name"):
        parse_dataclasses([Options], [])


def test_flags_of_every_kind():
    argv = ["--count=4", "--share", "1", "--flag", "--maybe", "false", "--seeds", "1", "2", "--place", "here"]
    assert options(*argv) == Options("x", 4, 1.0, True, False, [1, 2], "here")


def test_the_file_may_hold_a_required_option(tmp_path):
    assert parse_dataclasses([Options], ["--config", yaml_file(tmp_path, "name: y")])[0].name == "y"


def test_arguments_added_by_hand_come_last():
    parser = Parser([Options])
    parser.add_argument("question")
    filled, extra = parser.parse_options(["--name", "x", "--", "-3+4"])
    assert (filled.name, extra.question) == ("x", "-3+4")


def test_unknown_preset():
    with pytest.raises(ValueError, match="unknown preset 'papr': choose from default, paper"):
        parse_dataclasses([SearchConfig], ["--preset", "papr"], presets=PRESETS)


def test_the_trainers_own_types_are_left_to_trl():
    """Enums, unions and mappings pass; plain fields are checked and converted like ours."""
    values = {"save_strategy": "no", "report_to": "none", "num_train_epochs": 6, "gradient_checkpointing_kwargs": {}}
    fitted = coerce_fields(values, [SFTConfig], source="f")
    assert fitted == values and isinstance(fitted["num_train_epochs"], float)
    with pytest.raises(ValueError, match="f: max_steps must be a whole number"):
        coerce_fields({"max_steps": "all"}, [SFTConfig], source="f")


def test_help_explains_every_option(capsys):
    with pytest.raises(SystemExit) as stop:
        parse_dataclasses([Options], ["--help"], presets=PRESETS)
    text = " ".join(capsys.readouterr().out.split())
    assert stop.value.code == 0
    assert "--config FILE YAML file of options" in text and "--preset NAME default, paper" in text
    assert "a number (default: 3)" in text and "a text (default" not in text


@pytest.mark.parametrize(
    ("error", "code", "line"),
    [
        (ValueError("a\n  b"), 1, "error: a b\n"),
        (PermissionError(13, "Permission denied", "/x"), 1, "error: [Errno 13] Permission denied: '/x'\n"),
        (UsageError("odd"), 2, "error: odd\n"),
        (KeyboardInterrupt(), 130, "stopped; to go on: do it again\n"),
        (StoppedBySignal(signal.SIGTERM, "nabla: 3 of 9"), 143, "stopped at nabla: 3 of 9; to go on: do it again\n"),
    ],
)
def test_exit_codes_and_one_line(capsys, error, code, line):
    def main(argv):
        raise error

    assert run_main(main, [], resume_command="do it again") == code
    assert capsys.readouterr() == ("", line)


def test_a_mistake_of_ours_is_not_hidden():
    def main(argv):
        raise KeyError("bug")

    with pytest.raises(KeyError):
        run_main(main, [])


def test_the_code_of_main_is_returned():
    assert [run_main(lambda argv, code=code: code, []) for code in (None, 0, 3)] == [0, 0, 3]
