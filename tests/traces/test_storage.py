"""traces: records that hold together, shards that survive anything, and the trainers' rows."""

from __future__ import annotations

import json
import math
import os
import random
import subprocess
import sys
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import worlds

from nabla_trl.models.flops import Cost
from nabla_trl.traces.datasets import build_preference_rows, build_sft_rows
from nabla_trl.traces.schema import VERSION_KEY, Revision, SoftTargets, Trace
from nabla_trl.traces.storage import TraceWriter, read_finished_meta, read_traces

AWKWARD_FLOATS = [0.1 + 0.2, -0.0, 5e-324, 1.7976931348623157e308, 1e16 + 2]
AWKWARD_TEXTS = ["", "∇β → 7 🙂", "a\x00b\r\n", "\u202eright to left", '"quoted", {json}']


def values(traces: Sequence[Trace]) -> list[str]:
    """All fields of traces as text. It tells -0.0 from 0.0 and a float from its neighbor, and nan equals nan."""
    return [repr(vars(trace)) for trace in traces]


def make_trace(number: int, *, seed: int = 0, rounds: int = 4) -> Trace:
    """A consistent trace, the same for the same arguments: two proposals a round, some rounds accept one."""
    draw = random.Random(1000 * number + seed)
    incumbent = initial = [draw.randrange(50) for _ in range(draw.randint(3, 9))]
    reward = reward_initial = draw.gauss(0, 1)
    revisions = []
    for turn in range(rounds):
        accept = draw.choice([0, 1, None])
        outcome = (incumbent, reward)
        for branch in range(2):
            position = draw.randrange(len(incumbent))
            suffix = tuple(draw.randrange(50, 100) for _ in range(draw.randint(1, 5)))
            accepted = branch == accept
            after = reward + (1 if accepted else -1) * draw.random()
            revisions.append(
                Revision(turn, position, incumbent[position], suffix[0], suffix, reward, after, accepted, 1e3 * turn)
            )
            if accepted:
                outcome = (incumbent[:position] + list(suffix), after)
        incumbent, reward = outcome
    return Trace(
        problem_id=f"chains/train/{number:06d}",
        task="digit_chains",
        method="nabla",
        seed=seed,
        prompt="3+4=?",
        response=draw.choice(AWKWARD_TEXTS),
        prompt_ids=[draw.randrange(100) for _ in range(draw.randint(1, 6))],
        initial_ids=initial,
        response_ids=incumbent,
        reward_initial=reward_initial,
        reward=reward,
        answer=draw.choice([None, *AWKWARD_TEXTS]),
        gold=draw.choice([None, "7"]),
        correct=draw.choice([None, True, False]),
        revisions=revisions,
        cost=Cost(draw.choice(AWKWARD_FLOATS), draw.random(), {"policy/decode": number, "reward/backward": 3}),
        stop_reason="max_rounds",
        finished=True,
        meta={"policy": "tiny/∇", "config_hash": "ab12"},
    )


def plain_trace(number: int) -> Trace:
    """A method without reward and revisions."""
    kept = make_trace(number, rounds=0)
    return replace(kept, method="greedy", reward=math.nan, reward_initial=math.nan, stop_reason="single")


def failed_trace(number: int) -> Trace:
    return replace(plain_trace(number), prompt_ids=[], error="ValueError: prompt longer than the context")


def write(folder: Path, traces: list[Trace], **options: int) -> None:
    with TraceWriter(folder, **options) as writer:
        for trace in traces:
            writer.add(trace)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def worked_trace() -> Trace:
    """Two accepted revisions and a rejected one between them, by hand."""
    revisions = [
        Revision(0, 1, 11, 21, (21, 22), 0.0, 1.0, True, 1.0),
        Revision(1, 2, 22, 30, (30, 31, 32), 1.0, 0.5, False, 2.0),
        Revision(2, 0, 10, 40, (40,), 1.0, 2.0, True, 3.0),
    ]
    ids = {"prompt_ids": [1, 2], "initial_ids": [10, 11, 12, 13], "response_ids": [40]}
    return replace(make_trace(0, rounds=0), **ids, reward_initial=0.0, reward=2.0, revisions=revisions)


# --- the record


def test_incumbents_follow_the_accepted_revisions() -> None:
    expected = [([10, 11, 12, 13], 0.0), ([10, 21, 22], 1.0), ([40], 2.0)]
    assert worked_trace().list_incumbents() == expected


def test_proposals_of_one_round_share_the_incumbent_at_its_start() -> None:
    batch = [
        Revision(0, 1, 11, 21, (21,), 0.0, 1.0, True, 1.0),
        Revision(0, 3, 13, 33, (33,), 0.0, -1.0, False, 1.0),  # position 3 is gone once the first is accepted
    ]
    trace = replace(worked_trace(), revisions=batch, response_ids=[10, 21], reward=1.0)
    trace.validate()
    assert [base for _, base in trace.replay_revisions()] == [[10, 11, 12, 13]] * 2
    assert build_preference_rows([trace]).rows[1] == {
        "prompt_ids": [1, 2, 10, 11, 12],
        "chosen_ids": [13],
        "rejected_ids": [33],
    }


def test_consistent_traces_pass() -> None:
    for number in range(30):
        make_trace(number).validate()
    plain_trace(0).validate()
    failed_trace(0).validate()
    worked_trace().validate()


def _revised(number: int, **changes: object) -> Trace:
    trace = worked_trace()
    trace.revisions[number] = replace(trace.revisions[number], **changes)
    return trace


@pytest.mark.parametrize(
    ("trace", "message"),
    [
        (replace(worked_trace(), response_ids=[40, 41]), "do not turn initial_ids into response_ids"),
        (_revised(2, accepted=False), "do not turn initial_ids into response_ids"),
        (replace(worked_trace(), prompt_ids=[]), "empty prompt"),
        (replace(worked_trace(), reward=math.nan), "not finite"),
        (replace(worked_trace(), reward=math.inf), "not finite"),
        (replace(plain_trace(0), reward=1.0), "not finite"),
        (replace(worked_trace(), reward=math.nan, reward_initial=math.nan), "not finite"),
        (_revised(0, reward_after=math.nan), "was accepted with reward nan"),
        (_revised(0, old_token=12), "does not fit the incumbent: token 12 is not there"),
        (_revised(0, position=4), "does not fit the incumbent"),
        (_revised(0, position=-3), "does not fit the incumbent"),
        (_revised(1, new_token=31), "does not begin with the new token 31"),
        (_revised(1, suffix=()), "does not begin with the new token"),
        (_revised(0, round=5), "rounds must not decrease"),
        (_revised(1, round=0, accepted=True), "may accept one revision each"),
    ],
)
def test_contradictions_are_refused_and_not_written(trace: Trace, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message) as refusal:
        trace.validate()
    assert str(refusal.value).startswith(f"trace '{trace.problem_id}' (seed 0, {trace.method})")
    with TraceWriter(tmp_path) as writer:
        writer.add(make_trace(7))
        with pytest.raises(ValueError, match=message):
            writer.add(trace)
    assert values(read_traces(tmp_path)) == values([make_trace(7)])


# --- on disk


def test_round_trip_is_exact(tmp_path: Path) -> None:
    traces = [make_trace(number, seed=seed) for number in range(20) for seed in range(2)]
    traces += [plain_trace(100), failed_trace(101), replace(make_trace(102), answer=None, correct=None)]
    traces += [
        replace(make_trace(200 + number), response=text, cost=Cost(value, value))
        for number, (text, value) in enumerate(zip(AWKWARD_TEXTS, AWKWARD_FLOATS, strict=True))
    ]
    shuffled = random.Random(0).sample(traces, len(traces))
    write(tmp_path, shuffled, chunk_size=8)
    assert len(names(tmp_path)) == math.ceil(len(traces) / 8)
    # repr tells -0.0 from 0.0, 7 from 7.0 and every float from its neighbour, and nan equals nan
    assert values(read_traces(tmp_path)) == values(traces)


def test_a_value_that_fits_no_column_costs_only_its_own_trace(tmp_path: Path) -> None:
    with TraceWriter(tmp_path) as writer:
        writer.add(make_trace(0))
        for bad in (replace(make_trace(1), response="\ud800"), replace(make_trace(1), prompt_ids=[2**31])):
            with pytest.raises(ValueError, match=r"'chains/train/000001'.* does not fit the trace columns"):
                writer.add(bad)
        writer.add(make_trace(2))
    assert set(read_finished_meta(tmp_path)) == {("chains/train/000000", 0), ("chains/train/000002", 0)}


def test_load_dataset_reads_the_shards(tmp_path: Path) -> None:
    from datasets import load_dataset

    traces = [make_trace(0), plain_trace(1), failed_trace(2)]
    write(tmp_path / "shards", traces, chunk_size=2)
    files = str(tmp_path / "shards" / "*.parquet")
    rows = load_dataset("parquet", data_files=files, split="train", cache_dir=str(tmp_path / "cache"))
    for row, trace in zip(rows, traces, strict=True):
        for name in ("problem_id", "seed", "prompt_ids", "response_ids", "answer", "correct", "error"):
            assert row[name] == getattr(trace, name)
        for found, revision in zip(row["revisions"], trace.revisions, strict=True):
            assert Revision(**{**found, "suffix": tuple(found["suffix"])}) == revision
        assert row["flops"] == trace.cost.flops
    assert math.isnan(rows[1]["reward"])


def test_columns_read_what_is_asked_and_the_key(tmp_path: Path) -> None:
    write(tmp_path, [make_trace(0)])
    (trace,) = read_traces(tmp_path, columns=["reward", "cost", "revisions"])
    whole = make_trace(0)
    assert (trace.problem_id, trace.seed, trace.method) == (whole.problem_id, whole.seed, whole.method)
    assert (trace.reward, trace.cost, trace.revisions) == (whole.reward, whole.cost, whole.revisions)
    assert (trace.prompt, trace.prompt_ids, trace.meta) == ("", [], {})
    with pytest.raises(ValueError, match="no such trace column: rewards; choose from: problem_id, "):
        read_traces(tmp_path, columns=["reward", "rewards"])
    (unasked,) = read_traces(tmp_path, columns=["response_ids", "finished"])
    with pytest.raises(ValueError, match="read without that column"):
        build_sft_rows([unasked])


def test_shards_are_numbered_by_rank_and_go_on(tmp_path: Path) -> None:
    write(tmp_path, [make_trace(number) for number in range(3)], chunk_size=2)
    write(tmp_path, [make_trace(10)], rank=1)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    write(tmp_path, [make_trace(3)])
    write(tmp_path, [])
    assert names(tmp_path) == [
        "traces-00000-00000.parquet",
        "traces-00000-00001.parquet",
        "traces-00000-00002.parquet",
        "traces-00001-00000.parquet",
    ]
    assert all(path.read_bytes() == content for path, content in before.items())
    assert [trace.problem_id[-2:] for trace in read_traces(tmp_path)] == ["00", "01", "02", "03", "10"]


def test_stale_temporary_files_go_with_their_own_rank_only(tmp_path: Path) -> None:
    mine, other = (tmp_path / f"traces-{rank:05d}-00004.parquet.tmp" for rank in (0, 1))
    mine.write_bytes(b"PAR1 half a shard")
    other.write_bytes(b"PAR1 being written")
    assert read_traces(tmp_path) == []
    TraceWriter(tmp_path, rank=0)
    assert names(tmp_path) == [other.name]


def test_two_writers_of_one_rank_are_noticed_and_nothing_is_lost(tmp_path: Path) -> None:
    first, second = TraceWriter(tmp_path), TraceWriter(tmp_path)
    first.add(make_trace(0))
    first.flush()
    second.add(make_trace(1))
    with pytest.raises(FileExistsError, match="give each process its own rank"):
        second.flush()
    assert set(read_finished_meta(tmp_path)) == {("chains/train/000000", 0)}


@pytest.mark.parametrize("interruption", [KeyboardInterrupt, RuntimeError])
def test_an_interrupted_block_keeps_what_was_added(tmp_path: Path, interruption: type[BaseException]) -> None:
    with pytest.raises(interruption), TraceWriter(tmp_path, chunk_size=2) as writer:
        for number in range(3):
            writer.add(make_trace(number))
        raise interruption
    assert len(read_finished_meta(tmp_path)) == 3


@pytest.mark.parametrize("step", ["fsync", "replace"])
def test_an_interrupted_write_shows_no_part_of_a_shard(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: str
) -> None:
    write(tmp_path, [make_trace(0)])
    writer = TraceWriter(tmp_path)
    writer.add(make_trace(1))

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(os, step, interrupt)
        with pytest.raises(KeyboardInterrupt):
            writer.flush()
    assert names(tmp_path) == ["traces-00000-00000.parquet"]
    writer.flush()
    assert values(read_traces(tmp_path)) == values([make_trace(0), make_trace(1)])


def test_a_full_disk_keeps_earlier_shards_and_pending_traces(tmp_path: Path) -> None:
    write(tmp_path, [make_trace(0)])
    with TraceWriter(tmp_path, chunk_size=2) as writer:
        writer.add(make_trace(1))
        with worlds.full_disk(free=1000), pytest.raises(OSError, match=r"free disk.*traces-00000-00001\.parquet"):
            writer.add(make_trace(2))
        assert names(tmp_path) == ["traces-00000-00000.parquet"]
    assert values(read_traces(tmp_path)) == values([make_trace(number) for number in range(3)])


CHILD = """
import sys
from test_storage import make_trace
from nabla_trl.traces.storage import TraceWriter, read_finished_meta
done = read_finished_meta(sys.argv[1])
with TraceWriter(sys.argv[1], chunk_size=2) as writer:
    for number in range(100_000):
        trace = make_trace(number)
        if (trace.problem_id, trace.seed) not in done:
            writer.add(trace)
            print(number, flush=True)
"""


def _write_until_killed(folder: Path, draw: random.Random) -> int:
    """Let a child write until kill -9; returns the number of the last trace it said it had added."""
    here = Path(__file__).parent
    env = {**os.environ, "PYTHONPATH": os.pathsep.join([str(here), str(here.parent), str(here.parents[1])])}
    command = [sys.executable, "-c", CHILD, str(folder)]
    with subprocess.Popen(command, env=env, stdout=subprocess.PIPE, text=True) as child:
        assert child.stdout is not None
        for _ in range(draw.randint(1, 30)):
            assert child.stdout.readline()
        try:
            child.wait(timeout=draw.uniform(0, 0.01))  # somewhere within the next few shards
        except subprocess.TimeoutExpired:
            child.kill()
        said = child.stdout.read().split()  # what it added meanwhile
    assert child.returncode == -9
    return int(said[-1]) if said else -1


def test_kill_9_leaves_whole_shards_and_resume_gives_the_same_rows(tmp_path: Path) -> None:
    draw = random.Random(0)
    reached = 0
    for _ in range(2):
        last = _write_until_killed(tmp_path, draw)
        kept = read_traces(tmp_path)
        assert [trace.problem_id for trace in kept] == [make_trace(n).problem_id for n in range(len(kept))]
        assert len(kept) > reached and len(kept) >= last - 1  # at most the pending half of a chunk is lost
        reached = len(kept)
    total = reached + 5
    done = read_finished_meta(tmp_path)
    missing = [make_trace(n) for n in range(total) if (make_trace(n).problem_id, 0) not in done]
    assert len(missing) == 5
    write(tmp_path, missing)
    assert not [name for name in names(tmp_path) if name.endswith(".tmp")]
    assert values(read_traces(tmp_path)) == values([make_trace(number) for number in range(total)])


def test_damaged_and_foreign_files_are_named(tmp_path: Path) -> None:
    write(tmp_path, [make_trace(number) for number in range(20)])
    whole = (tmp_path / "traces-00000-00000.parquet").read_bytes()
    broken = tmp_path / "traces-00000-00001.parquet"
    flipped = bytearray(whole)
    flipped[len(whole) // 3] ^= 0xFF  # within a data page, where only a checksum can tell
    for content in (whole[:-20], whole[: len(whole) // 2], b"", bytes(flipped)):
        broken.write_bytes(content)
        with pytest.raises(ValueError, match=r"traces-00000-00001\.parquet: damaged trace shard"):
            read_traces(tmp_path)
    with pytest.raises(ValueError, match=r"damaged trace shard .*No such file"):
        read_traces([tmp_path / "traces-00009-00000.parquet"])
    pq.write_table(pa.table({"problem_id": ["a"], "seed": [0]}), broken)
    for read in (read_traces, read_finished_meta):
        with pytest.raises(ValueError, match=r"00001\.parquet: not a trace shard of format 2 .*none"):
            read(tmp_path)


def test_duplicates_are_named(tmp_path: Path) -> None:
    write(tmp_path, [make_trace(3), make_trace(1), replace(make_trace(1), method="control")])
    assert len(read_traces(tmp_path)) == 3  # another method is another trace
    write(tmp_path, [make_trace(3), make_trace(1)])
    with pytest.raises(ValueError, match=r"'chains/train/000001' \(seed 0, nabla\) is there twice"):
        read_traces(tmp_path)


def test_what_to_read_can_be_a_folder_a_file_or_files(tmp_path: Path) -> None:
    write(tmp_path, [make_trace(0), make_trace(1)], chunk_size=1)
    first, second = sorted(tmp_path.iterdir())
    assert [trace.problem_id[-1] for trace in read_traces([second, str(first)])] == ["0", "1"]
    assert [trace.problem_id[-1] for trace in read_traces(str(second))] == ["1"]
    with pytest.raises(ValueError, match="no such folder or trace file"):
        read_traces(tmp_path / "nowhere")
    assert read_finished_meta(tmp_path / "nowhere") == {}
    assert set(read_finished_meta(tmp_path)) == {("chains/train/000000", 0), ("chains/train/000001", 0)}


# --- rows for the trainers


def test_sft_labels_mask_exactly_the_prompt() -> None:
    traces = [make_trace(number) for number in range(20)]
    rows, skipped = build_sft_rows(traces)
    assert not skipped
    for row, trace in zip(rows, traces, strict=True):
        assert row["input_ids"] == trace.prompt_ids + trace.response_ids  # ids as they are, whatever the text
        split = len(trace.prompt_ids)
        assert set(row["labels"][:split]) == {-100}
        assert row["labels"][split:] == trace.response_ids


def test_sft_rows_skip_and_count_what_is_no_sample() -> None:
    whole = plain_trace(0)
    empty = replace(whole, initial_ids=[], response_ids=[])
    cut = replace(whole, finished=False)
    rows, skipped = build_sft_rows([failed_trace(1), whole, empty, cut, replace(cut)])
    assert [row["input_ids"] for row in rows] == [whole.prompt_ids + whole.response_ids]
    assert skipped == Counter(error=1, empty=1, unfinished=2)


def test_preference_rows_of_a_worked_trace() -> None:
    rows, skipped = build_preference_rows([worked_trace()])
    assert rows == [
        {"prompt_ids": [1, 2, 10], "chosen_ids": [21, 22], "rejected_ids": [11, 12, 13]},
        {"prompt_ids": [1, 2, 10, 21], "chosen_ids": [22], "rejected_ids": [30, 31, 32]},
        {"prompt_ids": [1, 2], "chosen_ids": [40], "rejected_ids": [10, 21, 22]},
    ]
    assert not skipped


def test_preference_rows_skip_and_count_what_decides_nothing() -> None:
    def changed(**values: object) -> Trace:
        return replace(_revised(1, **values), problem_id=str(values))

    undecided = [
        changed(reward_after=1.0),
        changed(reward_after=math.nan),
        changed(reward_after=1.5),  # rejected although better
        replace(worked_trace(), error="RuntimeError: killed"),
    ]
    rows, skipped = build_preference_rows([worked_trace(), *undecided])
    assert len(rows) == 3
    assert skipped == Counter({"tie": 1, "non-finite": 1, "against the reward": 1, "error": 1, "duplicate": 2 * 3})
    accepted_though_worse = _revised(0, reward_after=-1.0)
    assert build_preference_rows([accepted_though_worse]).skipped == Counter({"against the reward": 1})
    with pytest.raises(ValueError, match="does not fit the incumbent"):
        build_preference_rows([_revised(0, old_token=12)])


def test_preference_rows_rebuild_the_two_responses() -> None:
    for number in range(20):
        trace = make_trace(number)
        rows, skipped = build_preference_rows([trace])
        assert len(rows) + skipped["duplicate"] == len(trace.revisions)
        pairs = [{tuple(row["prompt_ids"] + row[side]) for side in ("chosen_ids", "rejected_ids")} for row in rows]
        for revision, base in trace.replay_revisions():
            proposal = base[: revision.position] + list(revision.suffix)
            assert {tuple(trace.prompt_ids + ids) for ids in (base, proposal)} in pairs
        chosen = [row["prompt_ids"] + row["chosen_ids"] for row in rows]
        for ids, _ in trace.list_incumbents()[1:]:
            assert trace.prompt_ids + ids in chosen


# --- columns of other versions, and what a trace may lack ------------------------------------------------------


def test_the_predicted_gain_can_be_read_alone_and_no_column_may_be_missing(tmp_path: Path) -> None:
    traces = [
        replace(make_trace(number), predicted_gain=[[0.5] * len(make_trace(number).initial_ids)])
        for number in range(3)
    ]
    write(tmp_path, traces)
    assert read_traces(tmp_path) == traces
    assert read_traces(tmp_path, columns=["predicted_gain"])[0].predicted_gain == traces[0].predicted_gain
    assert read_traces(tmp_path, columns=["reward"])[0].predicted_gain == []
    path = tmp_path / names(tmp_path)[0]
    whole = pq.read_table(path)
    for column in ("gold", "predicted_gain"):
        pq.write_table(whole.drop_columns([column]), path)
        with pytest.raises(ValueError, match="not a trace shard of format 2"):
            read_traces(tmp_path)


def test_soft_targets_are_stored_and_shards_without_them_are_read(tmp_path: Path) -> None:
    trace = make_trace(0)
    length = len(trace.initial_ids)
    targets = SoftTargets.from_arrays([[number, 7] for number in range(length)], [[-0.5, -math.inf]] * length)
    stored = replace(trace, soft_targets=[targets])
    write(tmp_path / "new", [stored])
    [read] = read_traces(tmp_path / "new")
    assert read == stored and read.soft_targets[0].to_arrays()[0].tolist()[-1] == [length - 1, 7]
    assert read_traces(tmp_path / "new", columns=["reward"])[0].soft_targets == []
    assert Trace.from_dict(json.loads(json.dumps(stored.to_dict()))).soft_targets == [targets]
    with pytest.raises(ValueError, match="soft_targets do not fit its incumbents"):
        write(tmp_path / "new", [replace(trace, soft_targets=[SoftTargets.from_arrays([[1]], [[0.0]])])])

    write(tmp_path / "old", [trace])
    path = tmp_path / "old" / names(tmp_path / "old")[0]
    pq.write_table(pq.read_table(path).drop_columns(["soft_targets"]), path)  # as earlier versions wrote it
    assert read_traces(tmp_path / "old") == [trace]
    assert read_traces(tmp_path / "old", columns=["soft_targets", "reward"])[0].soft_targets == []


def test_a_shard_of_format_1_is_refused_in_one_line(tmp_path: Path) -> None:
    write(tmp_path, [make_trace(0)])
    path = tmp_path / names(tmp_path)[0]
    table = pq.read_table(path).rename_columns({"stop_reason": "stop", "predicted_gain": "pull"})
    pq.write_table(table.replace_schema_metadata({VERSION_KEY: b"1"}), path)
    for read in (read_traces, read_finished_meta):
        with pytest.raises(ValueError, match=r"00000\.parquet: a trace shard of format 1, .*CHANGELOG\.md") as refusal:
            read(tmp_path)
        assert "\n" not in str(refusal.value)


def test_incumbents_after_each_number_of_rounds() -> None:
    """A round without an acceptance keeps the incumbent, and a search that ended its last one."""
    first, second, last = worked_trace().list_incumbents()
    assert worked_trace().list_incumbents_at([0, 1, 2, 3, 16]) == [first, second, second, last, last]


def test_a_predicted_gain_of_other_lengths_is_refused(tmp_path: Path) -> None:
    trace = make_trace(0)
    with pytest.raises(ValueError, match="predicted_gain does not fit its incumbents"):
        write(tmp_path, [replace(trace, predicted_gain=[[0.5] * (len(trace.initial_ids) + 1)])])
    with pytest.raises(ValueError, match="predicted_gain does not fit its incumbents"):
        write(
            tmp_path,
            [replace(trace, predicted_gain=[[0.5] * len(ids) for ids, _ in trace.list_incumbents()] + [[0.5]])],
        )
