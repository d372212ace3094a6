"""The rules of the house, read off the source: floors, imports, docstrings, the public face."""

from __future__ import annotations

import ast
import dataclasses
import functools
import re
import subprocess
import sys
from pathlib import Path

import pytest

import fewstep
from fewstep import solvers

ROOT = Path(fewstep.__file__).parent
FILES = sorted(ROOT.rglob("*.py"))

DESIGN = Path(__file__).parents[1] / "docs" / "design.md"


def rooms() -> list[str]:
    """The rooms in their order, as the design prints them."""
    text = DESIGN.read_text(encoding="utf-8")
    table = text[text.index("## The rooms") : text.index("## Decisions")]
    return re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE)


ORDER = {name: number for number, name in enumerate(rooms())}


def part(path):
    """The room that a file belongs to."""
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def module_of(path):
    """The dotted name of a file, without the package's."""
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts).removesuffix(".__init__")


MODULES = {module_of(path) for path in FILES}


@functools.cache
def tree_of(path):
    return ast.parse(path.read_text(encoding="utf-8"))


@functools.cache
def imports(path):
    """(module, the name taken from it or None, inside a function) for each import of a file."""
    imported = []

    def walk(node, late):
        if isinstance(node, ast.Import):
            imported.extend((alias.name, None, late) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import"
            imported.extend((node.module, alias.name, late) for alias in node.names)
        is_late = late or isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef))
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            is_late = True
        for child in ast.iter_child_nodes(node):
            walk(child, is_late)

    walk(tree_of(path), False)
    return imported


def inner(path):
    """(module of ours, the name taken from it) for each import, early or late."""
    for module, name, _ in imports(path):
        if module == "fewstep":
            yield name, None
        elif module.startswith("fewstep."):
            home = module.removeprefix("fewstep.")
            yield (f"{home}.{name}", None) if f"{home}.{name}" in MODULES else (home, name)


LIBRARY = [path for path in FILES if part(path) != "__init__"]


def test_every_room_is_in_the_design():
    assert {part(path) for path in LIBRARY} == set(ORDER)


def test_rooms_import_from_rooms_above():
    wrong = []
    for path in LIBRARY:
        own = part(path)
        for module, name in inner(path):
            other = module.split(".")[0]
            if other in ORDER and ORDER[other] > ORDER[own]:
                wrong.append(f"{module_of(path)} imports {module}, of a room below it")
            private = name is not None and name.startswith("_") and not name.startswith("__")
            if other != own and private:
                wrong.append(f"{module_of(path)} imports {module}.{name}, which is private")
    assert not wrong, "\n".join(wrong)


def test_no_circles():
    graph: dict[str, set[str]] = {}
    for path in LIBRARY:
        graph[module_of(path)] = {module for module, _ in inner(path)} - {module_of(path)}
    done: set[str] = set()

    def visit(module, trail):
        assert module not in trail, f"a circle of imports: {' -> '.join([*trail, module])}"
        if module in done or module not in graph:
            return
        for other in sorted(graph[module]):
            visit(other, [*trail, module])
        done.add(module)

    for module in graph:
        visit(module, [])
    assert len(done) == len(graph)


AT_RUN_TIME = {"diffusion.noise", "diffusion.brownian", "plans.execute"}
DEFINITIONS = [
    path
    for path in FILES
    if part(path) in ("diffusion", "plans", "solvers") and module_of(path) not in AT_RUN_TIME
]


def test_definitions_know_no_network_and_no_device():
    for path in DEFINITIONS:
        used = {module.split(".")[0] for module, _ in inner(path)}
        assert not used & {"models", "sampling", "cli"}, path
        text = path.read_text(encoding="utf-8")
        assert "cuda" not in text, path
        assert ".to(device" not in text, path


OPTIONAL = {
    "diffusers": {"adapters"},
    "transformers": {"adapters"},
    "accelerate": {"adapters"},
    "rich": {"cli"},
    "cyclopts": {"cli"},
    "PIL": {"reporting"},
    "matplotlib": set(),
    "scipy": set(),
    "nicegui": {"studio"},
}


def test_optional_dependencies_are_imported_late():
    for path in FILES:
        for module, _, late in imports(path):
            top = module.split(".")[0]
            fits = late or top not in OPTIONAL or part(path) in OPTIONAL[top]
            assert fits, f"{path} imports {module} at the top"


def calls(path):
    for node in ast.walk(tree_of(path)):
        if isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute):
            yield ast.unparse(node.func), node


def test_nothing_prints_and_nothing_runs_code():
    for path in FILES:
        modules = {module.split(".")[0] for module, _, _ in imports(path)}
        assert not modules & {"pickle", "dill", "marshal"}, path
        for name, node in calls(path):
            runs = name in ("eval", "exec", "torch.load", "torch.save", "__import__")
            assert not runs, f"{path} calls {name}"
            assert name != "print" or part(path) == "cli", f"{path} prints"
            if name == "numpy.load":
                assert "allow_pickle=False" in ast.unparse(node), path


CLASSES = [
    item
    for item in vars(solvers).values()
    if isinstance(item, type) and issubclass(item, solvers.Solver) and item is not solvers.Solver
]


@pytest.mark.parametrize("item", CLASSES, ids=lambda item: item.__name__)
def test_docstrings_of_solvers(item):
    text = item.__doc__
    assert ".. math::" in text
    assert re.search(r"References:\n +\| .+\n +\| https://", text)
    assert "Cost: " in text
    assert "Order: " in text
    options = [field.name for field in dataclasses.fields(item)]
    assert ("Arguments:" in text) == bool(options)
    for name in options:
        assert re.search(rf"^ +{name}: \S", text, re.MULTILINE), f"{name} is not explained"


def test_every_solver_class_is_registered():
    registered = {type(build()) for build in fewstep.SOLVERS.values()}
    assert registered == set(CLASSES)
    assert len(CLASSES) > 20


# The contract: users' scripts name these.
NAMES = (
    "ddim gddim ddpm euler euler-maruyama ei-score tab0 tab1 tab2 tab3 rhoab0 rhoab1 rhoab2 "
    "rhoab3 logrhoab0 logrhoab1 logrhoab2 logrhoab3 rho-midpoint rho-heun rho-kutta3 rho-rk4 "
    "ipndm pndm analytic-ddim accelerated-ddim accelerated-ddim-theory accelerated-ddim-lagged "
    "ddim-theory accelerated-ddpm ddpm-theory heun edm-stochastic dpm2 dpm3 dpmpp-2m dpmpp-3m "
    "dpmpp-2m-sde unipc2 unipc3 dopri5"
).split()


def test_the_solvers_of_the_contract():
    assert not set(NAMES) - set(fewstep.SOLVERS)
    assert [fewstep.SOLVERS[name]().name for name in NAMES] == NAMES


def test_the_schedules_and_grids_of_the_contract():
    assert set(fewstep.SCHEDULES) >= {
        "vp-linear",
        "vp-cosine",
        "sub-vp",
        "ve",
        "edm",
        "flow",
        "ddpm-linear",
        "ddpm-scaled-linear",
        "ddpm-cosine",
        "tabulated",
    }
    assert set(fewstep.GRIDS) >= {
        "uniform",
        "quadratic",
        "power",
        "log-rho",
        "lambda",
        "karras",
        "explicit",
    }


def test_registries_are_read_only():
    for registry in (fewstep.SOLVERS, fewstep.SCHEDULES, fewstep.GRIDS):
        with pytest.raises(TypeError, match="item assignment"):
            registry["x"] = None
        assert [] not in registry
        assert "x" not in registry


def test_no_public_function_is_named_as_a_module():
    """``import fewstep.x`` would replace it."""
    modules = {part(path) for path in FILES}
    functions = [name for name in fewstep.__all__ if callable(getattr(fewstep, name))]
    assert "sample" in functions
    assert not modules & set(functions)


def test_the_face_is_whole():
    for name in fewstep.__all__:
        assert getattr(fewstep, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = fewstep.nothing


def test_import_costs_nothing():
    code = (
        "import fewstep, sys; print(sorted({'torch', 'numpy', 'rich', 'PIL'} & set(sys.modules)))"
    )
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    assert result.stdout.strip() == "[]"


def test_types_ship():
    assert (ROOT / "py.typed").is_file()
