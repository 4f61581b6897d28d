"""The packages of nabla_trl: imports run one way, no cycles, and every package says what it is for."""

from __future__ import annotations

import ast
import importlib
import inspect
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "nabla_trl"
# From the bottom to the top: a package may import those before it, and no others.
LAYERS = (
    "utils",
    "grading",
    "tasks",
    "states",
    "models",
    "gradient",
    "rewards",
    "engine",
    "traces",
    "search",
    "baselines",
    "training",
    "planning",
    "reward_training",
    "audit",
    "evaluation",
    "report",
    "exporting",
    "pipeline",
    "serving",
    "lm_eval",
    "cli",
)
TOP_MODULES = ("distill",)  # what `python -m` runs, above all packages
MAX_FILES = 10  # of a folder, __init__.py aside

# module -> [(imported module, imported name, line)], lazy and type-only imports included
Imports = dict[str, list[tuple[str, str, int]]]


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


@pytest.fixture(scope="module")
def imports() -> Imports:
    paths = {module_name(path): path for path in SOURCE.rglob("*.py")}
    edges: Imports = {}
    for module, path in paths.items():
        edges[module] = []
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.ImportFrom) and (node.module or "").split(".")[0] == "nabla_trl":
                for alias in node.names:
                    submodule = f"{node.module}.{alias.name}"
                    target = submodule if submodule in paths else str(node.module)
                    edges[module].append((target, alias.name, node.lineno))
    return edges


def package(module: str) -> str:
    """Return the package or module below nabla_trl, and an empty text for nabla_trl itself."""
    return module.split(".")[1] if "." in module else ""


def test_the_layers_are_the_packages() -> None:
    assert {path.parent.name for path in SOURCE.glob("*/__init__.py")} == set(LAYERS)
    assert {path.stem for path in SOURCE.glob("*.py")} == {"__init__", *TOP_MODULES}


def test_no_package_imports_from_one_above_it(imports: Imports) -> None:
    height = {name: index for index, name in enumerate((*LAYERS, *TOP_MODULES))}
    upwards = [
        f"{module}:{line} imports {name} from {target}: {package(target)} stands above {package(module)}, "
        f"so move {name} down, or its user up"
        for module, targets in imports.items()
        for target, name, line in targets
        if package(module) and package(target) and height[package(target)] > height[package(module)]
    ]
    assert not upwards, "\n".join(upwards)


def test_no_module_imports_itself_in_a_circle(imports: Imports) -> None:
    graph = {module: {target for target, _, _ in targets if package(target)} for module, targets in imports.items()}
    circles = {circle for module in graph if (circle := find_circle(module, graph))}
    names = {
        (module, target): sorted({name for found, name, _ in imports[module] if found == target})
        for module, targets in graph.items()
        for target in targets
    }
    told = [
        "\n".join(
            f"{module} takes {', '.join(names[module, target])} from {target}"
            for module, target in zip(circle, [*circle[1:], circle[0]], strict=True)
        )
        for circle in sorted(circles)
    ]
    assert not told, "move one of these names:\n" + "\n\n".join(told)


def find_circle(start: str, graph: dict[str, set[str]]) -> tuple[str, ...]:
    """Return the shortest chain of imports that leads from a module back to itself, smallest name first."""
    paths, seen = [(start,)], {start}
    while paths:
        path = paths.pop(0)
        for target in sorted(graph.get(path[-1], ())):
            if target == start:
                smallest = path.index(min(path))
                return path[smallest:] + path[:smallest]
            if target not in seen:
                seen.add(target)
                paths.append((*path, target))
    return ()


def test_a_circle_would_be_found() -> None:
    graph = {"a.x": {"a.y"}, "a.y": {"a.z", "a.w"}, "a.z": {"a.x"}, "a.w": set()}
    assert find_circle("a.y", graph) == find_circle("a.z", graph) == ("a.x", "a.y", "a.z")
    assert find_circle("a.w", graph) == ()


@pytest.mark.parametrize("name", LAYERS)
def test_a_package_says_what_it_is_for(name: str, imports: Imports) -> None:
    text = inspect.cleandoc(ast.get_docstring(ast.parse((SOURCE / name / "__init__.py").read_text())) or "")
    match = re.fullmatch(r"(\S[^\n]*\.)\n\n(?:.+\n\n)?Hands out: (.+)\.\nMay import: (.+)\.", text, re.DOTALL)
    assert match, f"nabla_trl/{name}/__init__.py needs a sentence, a line 'Hands out: …' and a line 'May import: …'"
    allowed = set() if match[3] == "nothing of nabla_trl" else set(re.split(r",\s+", match[3]))
    used = {
        package(target)
        for module, targets in imports.items()
        for target, _, _ in targets
        if package(module) == name and package(target) not in ("", name)
    }
    assert used == allowed, f"{name} imports {sorted(used)}, and says {sorted(allowed)}"
    defined = {
        node.name
        for path in (SOURCE / name).rglob("*.py")
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.FunctionDef | ast.ClassDef)
    }
    handed_out = re.findall(r"`(\w+)`", match[2])
    assert handed_out and set(handed_out) <= defined, set(handed_out) - defined


def test_no_folder_is_crowded() -> None:
    crowded = {
        str(folder.relative_to(ROOT)): len(files)
        for folder in [SOURCE, *(path for path in SOURCE.rglob("*") if path.is_dir())]
        if len(files := [path for path in folder.glob("*.py") if path.name != "__init__.py"]) > MAX_FILES
    }
    assert not crowded, f"more than {MAX_FILES} files: {crowded}"


def test_tests_stand_where_their_package_does() -> None:
    folders = {path.parent.relative_to(ROOT / "tests").parts[0] for path in (ROOT / "tests").glob("*/**/test_*.py")}
    assert folders <= {*LAYERS, "recipes", "research"}


def test_the_door_offers_public_names_and_loads_nothing_heavy() -> None:
    code = (
        "import sys, nabla_trl; assert dir(nabla_trl) == sorted(nabla_trl.__all__), dir(nabla_trl);"
        "sys.exit(bool({'torch', 'transformers', 'trl', 'vllm', 'matplotlib'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT).returncode == 0
    door = importlib.import_module("nabla_trl")
    assert all(getattr(door, name) is not None for name in door.__all__)
