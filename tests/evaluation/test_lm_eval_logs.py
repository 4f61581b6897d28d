"""Logs of lm-eval as rows: the latest run, one filter, and costs as far as they are known."""

import json
import math

import pytest

from nabla_trl.evaluation.lm_eval_logs import has_lm_eval_logs, read_lm_eval_rows

OLD, NEW = "2026-11-01T10-00-00.000001", "2026-11-02T10-00-00.000001"


def write_log(folder, verdicts, *, date=NEW, task="gsm8k", results=None, filters=("strict-match", "flexible-extract")):
    """Write what lm-eval writes. The second filter accepts every answer."""
    folder.mkdir(parents=True, exist_ok=True)
    samples = [
        {
            "doc_id": number,
            "doc": {"question": "?"},
            "target": "7",
            "filter": name,
            "metrics": ["exact_match"],
            "doc_hash": f"hash{number}" + "0" * 60,
            "exact_match": float(verdict) if name == filters[0] else 1.0,
        }
        for name in filters
        for number, verdict in enumerate(verdicts)
    ]
    (folder / f"samples_{task}_{date}.jsonl").write_text("".join(json.dumps(one) + "\n" for one in samples))
    content = {"results": {task: {}}, "config": {}, "total_evaluation_time_seconds": "12.0"} | (results or {})
    (folder / f"results_{date}.json").write_text(json.dumps(content))
    return folder


def test_the_latest_run_is_read_by_its_first_filter(tmp_path):
    write_log(tmp_path / "org__model", [1, 1, 1, 1], date=OLD)
    write_log(tmp_path / "org__model", [1, 0, 0, 1])
    rows = read_lm_eval_rows(tmp_path, "base")
    assert [row.correct for row in rows] == [1, 0, 0, 1] and rows[0].problem == "0/hash00000000"
    assert {(row.method, row.task, row.seconds) for row in rows} == {("base", "gsm8k", 3.0)}
    assert all(math.isnan(row.flops) for row in rows)
    lenient = read_lm_eval_rows(tmp_path, filter_name="flexible-extract")
    assert [row.correct for row in lenient] == [1, 1, 1, 1] and lenient[0].method == tmp_path.name


def test_the_model_nabla_names_its_method_and_costs(tmp_path):
    costs = {"gsm8k": {"flops_per_answer": 5e9, "seconds_per_answer": 0.5}}
    write_log(tmp_path, [1, 0], results={"config": {"nabla": {"method": "nabla@best_of_8", "costs": costs}}})
    rows = read_lm_eval_rows(tmp_path)
    assert {(row.method, row.flops, row.seconds) for row in rows} == {("nabla@best_of_8", 5e9, 0.5)}


def test_seconds_of_several_tasks_cannot_be_told_apart(tmp_path):
    write_log(tmp_path, [1, 0], results={"results": {"gsm8k": {}, "svamp": {}}})
    assert math.isnan(read_lm_eval_rows(tmp_path)[0].seconds)
    write_log(tmp_path, [1, 0], task="svamp")
    with pytest.raises(ValueError, match=r"holds 2 tasks \(gsm8k, svamp\): name one"):
        read_lm_eval_rows(tmp_path)
    assert read_lm_eval_rows(tmp_path, task="svamp")[0].task == "svamp"


@pytest.mark.parametrize(
    "results",
    [
        {"config": None, "total_evaluation_time_seconds": None},
        {"config": {"nabla": {"costs": {"gsm8k": {"flops_per_answer": "many"}}}}},
        {"config": {"nabla": []}, "results": [], "total_evaluation_time_seconds": "soon"},
    ],
)
def test_costs_that_cannot_be_read_are_not_known(tmp_path, results):
    write_log(tmp_path, [1, 0], results=results)
    [row, _] = read_lm_eval_rows(tmp_path)
    assert math.isnan(row.flops) and math.isnan(row.seconds)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"task": "aime"}, "no samples of task 'aime': choose from gsm8k"),
        ({"metric": "bleu"}, "metric bleu is no number from 0 to 1.*choose from exact_match"),
        ({"filter_name": "none"}, "no samples of filter 'none': choose from flexible-extract, strict-match"),
    ],
)
def test_what_is_not_there_is_named(tmp_path, options, words):
    write_log(tmp_path, [1, 0])
    with pytest.raises(ValueError, match=words):
        read_lm_eval_rows(tmp_path, **options)


def test_other_files_are_no_samples(tmp_path):
    assert not has_lm_eval_logs(tmp_path) and not has_lm_eval_logs(tmp_path / "missing")
    with pytest.raises(ValueError, match="--log_samples"):
        read_lm_eval_rows(tmp_path)
    (tmp_path / f"samples_gsm8k_{NEW}.jsonl").write_text('{"text": "no sample"}\n')
    assert has_lm_eval_logs(tmp_path)
    with pytest.raises(ValueError, match="line 1: no sample of lm-eval"):
        read_lm_eval_rows(tmp_path)


def test_a_log_without_samples_and_one_with_a_repeated_document_are_refused(tmp_path):
    path = write_log(tmp_path, []) / f"samples_gsm8k_{NEW}.jsonl"
    with pytest.raises(ValueError, match="holds no samples"):
        read_lm_eval_rows(tmp_path)
    write_log(tmp_path, [1, 0])
    path.write_text(path.read_text() * 2)
    with pytest.raises(ValueError, match="line 5: document 0 stands twice"):
        read_lm_eval_rows(tmp_path)
