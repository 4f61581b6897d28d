"""The notebook runs from its first cell to its last, offline, and is kept without outputs."""

from __future__ import annotations

import ast
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import matplotlib
import pytest

import nabla_trl

ROOT = Path(__file__).parents[1]
NOTEBOOK = ROOT / "docs/tutorial.ipynb"
# Numbers that are smaller here, so that the test takes seconds.
SMALLER = {
    'split="train", max_problems=24': 'split="train", max_problems=6',
    "train_problems[:12]": "train_problems[:4]",
    "max_steps=20": "max_steps=1",
    'split="test", max_problems=24': 'split="test", max_problems=3',
}


@pytest.fixture
def cells(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[list[str]]:
    """The code of the notebook, in an empty folder with the embedded models."""
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    code = [cell for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(not cell["outputs"] and cell["execution_count"] is None for cell in code), "strip the outputs"
    (tmp_path / "data").symlink_to(ROOT / "data")
    monkeypatch.chdir(tmp_path)
    matplotlib.use("Agg")
    yield ["".join(cell["source"]) for cell in code]
    nabla_trl.enable_progress()


def test_the_cells_run_one_after_another(cells: list[str], capsys) -> None:
    namespace: dict[str, Any] = {"__name__": "notebook"}
    shown: list[Any] = []
    for number, cell in enumerate(cells):
        for text, smaller in SMALLER.items():
            cell = cell.replace(text, smaller)
        *statements, last = ast.parse(cell).body
        exec(compile(ast.Module(statements, []), f"cell {number}", "exec"), namespace)
        if isinstance(last, ast.Expr):  # what a notebook shows
            shown.append(eval(compile(ast.Expression(last.value), f"cell {number}", "eval"), namespace))
        else:
            exec(compile(ast.Module([last], []), f"cell {number}", "exec"), namespace)
    trace, result = namespace["trace"], namespace["result"]
    assert (
        "<" in trace._repr_html_()
        and "nabla@best_of_4" in result._repr_html_()
        and {id(trace), id(result)} <= {*map(id, shown)}
    )
    assert "distilled_greedy" in result.methods and namespace["trainer"].state.global_step == 1
    out = capsys.readouterr().out
    assert "the reward ranks" in out and "['README.md', 'preference', 'sft', 'traces']" in out
    assert all(text in "".join(cells) for text in SMALLER)
