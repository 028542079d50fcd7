"""Which package may import which, that no imports run in circles, and that every operator stands in every place."""

import ast
import subprocess
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from operator_inputs import FUSION, MAKERS
from safnet_ops.operators import OPERATORS

ROOT = Path(__file__).resolve().parents[1]

PLACES = (
    "csrc/cpu/{}.cpp",
    "csrc/cuda/{}.cu",
    "safnet_ops/{}.py",
    "safnet_ops/triton/{}.py",
    "tests/safnet_ops/test_{}.py",
    "tests/safnet_ops/cuda/test_{}.py",
    "tests/safnet_ops/triton/test_{}.py",
    "bench/test_{}.py",
)

# Modules, and what they import nowhere, not even inside a function. A name stands for everything below it.
FORBIDDEN = [
    ("safnet_ops", ("safnet", "bench", "operator_inputs", "ptxsim", "simulated_gpu", "tests", "tools")),
    ("safnet", ("bench", "operator_inputs", "ptxsim", "simulated_gpu", "tests", "tools")),
    ("safnet.data", ("safnet.training", "safnet.evaluation")),
    ("safnet.training", ("safnet.evaluation",)),
    ("safnet.evaluation", ("safnet.training",)),
    ("ptxsim", ("bench", "operator_inputs", "safnet", "safnet_ops", "simulated_gpu", "tests", "tools")),
    ("operator_inputs", ("bench", "ptxsim", "safnet", "safnet_ops", "simulated_gpu", "tests", "tools")),
    ("simulated_gpu", ("bench", "safnet", "tests", "tools")),
    ("bench", ("tests", "tools")),
    ("tools", ("tests",)),
    ("tests", ("bench", "tools")),
]
OUTER_SAFNET = ("safnet.data", "safnet.training", "safnet.evaluation")
# Run as a script by build frontends that do not put its folder on the path.
EDITS_SYS_PATH = {"setup.py"}


@dataclass(frozen=True)
class Import:
    """`target` as far as it names a module of this repository, and whether it is imported with its importer."""

    target: str
    line: int
    at_once: bool


def python_files() -> list[Path]:
    listed = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "*.py"]
    done = subprocess.run(listed, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("not a git checkout, whose files could be told from others")
    return [Path(line) for line in done.stdout.splitlines() if (ROOT / line).is_file()]


def module_name(path: Path) -> str:
    return ".".join(path.with_suffix("").parts).removesuffix(".__init__")


def parse(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


@pytest.fixture(scope="module")
def imports() -> dict[str, list[Import]]:
    """Module -> what it imports."""
    paths = {module_name(path): path for path in python_files()}
    return {name: list(imports_of(name, path, paths)) for name, path in paths.items()}


def imports_of(name: str, path: Path, modules: dict[str, Path]) -> Iterator[Import]:
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    for node, at_once in statements(parse(path), at_once=True):
        if isinstance(node, ast.Import):
            targets = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            parents = package.split(".")[: len(package.split(".")) - node.level + 1] if node.level else []
            source = ".".join([*parents, *([node.module] if node.module else [])])
            found = [f"{source}.{alias.name}" for alias in node.names]
            targets = [target if target in modules else source for target in found]
        else:
            continue
        yield from (Import(target, node.lineno, at_once) for target in targets)


def statements(node: ast.AST, at_once: bool) -> Iterator[tuple[ast.AST, bool]]:
    """Every node below, and whether importing the module executes it."""
    for child in ast.iter_child_nodes(node):
        later = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda) or is_for_type_checkers(child)
        yield child, at_once
        yield from statements(child, at_once and not later)


def is_for_type_checkers(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def is_in(module: str, package: str) -> bool:
    return module == package or module.startswith(f"{package}.")


def uses(imports: dict[str, list[Import]], package: str, forbidden: tuple[str, ...]) -> list[str]:
    return [
        f"{module} imports {found.target} (line {found.line})"
        for module, several in imports.items()
        if is_in(module, package)
        for found in several
        if any(is_in(found.target, name) for name in forbidden)
    ]


@pytest.mark.parametrize(("package", "forbidden"), FORBIDDEN, ids=[package for package, _ in FORBIDDEN])
def test_imports_point_one_way(imports, package, forbidden):
    assert any(is_in(module, package) for module in imports)
    assert uses(imports, package, forbidden) == []


def test_what_fuses_pictures_does_without_data_training_and_evaluation(imports):
    """The command alone starts all of them."""
    others = (*OUTER_SAFNET, "safnet.cli")
    core = {name: found for name, found in imports.items() if not any(is_in(name, other) for other in others)}
    assert "safnet.fuse" in core
    assert uses(core, "safnet", OUTER_SAFNET) == []


def test_no_module_imports_itself_through_others(imports):
    """A circle works by the order in which modules are imported first, until somebody imports another one first."""
    graph = {
        name: {found.target for found in several if found.at_once} & imports.keys() for name, several in imports.items()
    }
    done: set[str] = set()

    def visit(module: str, chain: list[str]) -> None:
        assert module not in chain, " -> ".join([*chain[chain.index(module) :], module])
        if module not in done:
            for target in sorted(graph[module]):
                visit(target, [*chain, module])
            done.add(module)

    for module in sorted(graph):
        visit(module, [])


def test_nothing_edits_the_import_path():
    reading = {"join", "copy"}  # os.pathsep.join(sys.path)
    found = {
        f"{path}:{node.lineno}"
        for path in python_files()
        if str(path) not in EDITS_SYS_PATH
        for node in ast.walk(parse(path))
        if edits_sys_path(node, reading)
    }
    assert found == set()


def edits_sys_path(node: ast.AST, reading: set[str]) -> bool:
    if isinstance(node, ast.ImportFrom):
        return node.module == "sys" and any(alias.name == "path" for alias in node.names)
    if isinstance(node, ast.Call):
        target: ast.AST = node.func
        return isinstance(target, ast.Attribute) and is_sys_path(target.value) and target.attr not in reading
    if isinstance(node, ast.Subscript):
        return is_sys_path(node.value) and not isinstance(node.ctx, ast.Load)
    return is_sys_path(node) and not isinstance(node.ctx, ast.Load)


def is_sys_path(node: ast.AST) -> bool:
    return isinstance(node, ast.Attribute) and ast.unparse(node) == "sys.path"


@pytest.mark.parametrize("place", PLACES)
def test_every_operator_has_its_file(place):
    assert [name for name in OPERATORS if not (ROOT / place.format(name)).is_file()] == []


def test_every_operator_has_its_inputs():
    assert set(MAKERS) == set(OPERATORS)
    assert OPERATORS["fused_fuse"].differentiable[: len(FUSION)] == FUSION
