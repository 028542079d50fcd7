"""What the documents say of files, commands and environment variables is so."""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "internals" / "environment.md"
# Folders of code that may read the environment, and of what documents speak.
PYTHON = ("bench", "build_tools", "ptxsim", "safnet", "safnet_ops", "simulated_gpu", "tests", "tools")
NATIVE = ("csrc", "simulated_gpu")
FOLDERS = (*PYTHON, "csrc", "docs", "examples")
NAME = re.compile(r"[A-Z][A-Z0-9_]+")


def documents() -> list[Path]:
    found = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *(ROOT / "docs").rglob("*.md")]
    return [*found, ROOT / "ptxsim" / "README.md", *(ROOT / "safnet" / "pretrained").glob("*.md")]


def without_code(text: str) -> str:
    return re.sub(r"(`+)[^`]+\1", "", re.sub(r"^```.*?^```", "", text, flags=re.M | re.S))


def python_files() -> Iterator[Path]:
    yield ROOT / "setup.py"
    for folder in PYTHON:
        yield from (ROOT / folder).rglob("*.py")


def in_python(source: str) -> set[str]:
    """Names in statements that use os.environ or os.getenv, and in constants of the module that such a statement uses."""
    tree = ast.parse(source)
    constants = {
        target.id: {text.value for text in ast.walk(node.value) if is_name(text)}
        for node in tree.body
        if isinstance(node, ast.Assign)
        for target in node.targets
        if isinstance(target, ast.Name)
    }
    found = set()
    for node in ast.walk(tree):
        if not isinstance(node, ast.stmt) or isinstance(node, ast.FunctionDef | ast.ClassDef):
            continue
        inside = list(ast.walk(node))
        if not any(isinstance(part, ast.Attribute) and part.attr in ("environ", "getenv") for part in inside):
            continue
        # The keys of {**os.environ, ...} are written.
        written = {key for part in inside if isinstance(part, ast.Dict) for key in part.keys if key}
        inside = [part for part in inside if part not in written]
        used = {part.id for part in inside if isinstance(part, ast.Name)}
        found |= {part.value for part in inside if is_name(part)}
        found |= {name for constant in used & constants.keys() for name in constants[constant]}
    return found


def is_name(node: ast.AST) -> bool:
    return isinstance(node, ast.Constant) and isinstance(node.value, str) and bool(NAME.fullmatch(node.value))


def in_make(source: str) -> set[str]:
    """Variables that a Makefile uses and does not set, or sets only where the environment does not; and the shell's."""
    defined = set(re.findall(rf"^({NAME.pattern}) *:?=", source, re.M))
    used = re.findall(rf"\$\(({NAME.pattern})[):]", source)
    overridable = re.findall(rf"^({NAME.pattern}) *\?=", source, re.M)
    return {*used, *overridable, *re.findall(rf"\$\$({NAME.pattern})", source)} - defined


def read_by_the_sources() -> set[str]:
    native = [path for folder in NATIVE for path in (ROOT / folder).rglob("*.*") if path.suffix != ".py"]
    found = {name for path in native for name in re.findall(r'getenv\("(\w+)"\)', path.read_text(errors="ignore"))}
    found |= in_make((ROOT / "Makefile").read_text())
    # Set by make and by launchers of several processes, and only taken out of a test's environment.
    others = {"MASTER_PORT", "MASTER_ADDR", "WORLD_SIZE", "RANK", "OS"}
    return found.union(*(in_python(path.read_text()) for path in python_files() if path != Path(__file__))) - others


def test_every_environment_variable_has_its_row():
    found = read_by_the_sources()
    assert {"SAFNET_OPS_ISA", "SAFNET_OPS_BUILD", "CUDA_PATH", "GLIBC_TUNABLES", "VENV", "CI", "GPU_OPTIONS"} <= found
    rows = {name for row in re.findall(r"^\| (`[^|]*) \|", PAGE.read_text(), re.M) for name in NAME.findall(row)}
    assert found - rows == set(), f"missing in {PAGE.name}"
    assert rows - found == set(), f"in {PAGE.name}, and read nowhere"


def test_links_lead_to_files():
    broken = [
        f"{path.relative_to(ROOT)}: {target}"
        for path in documents()
        for target in re.findall(r"\]\(([^)#\s]+)[^)]*\)", without_code(path.read_text()))
        if "://" not in target and not (path.parent / target).exists()
    ]
    assert broken == []


def test_files_that_are_named_exist():
    """`csrc/cpu/NAME.cpp` stands for each operator's, a star for anything."""
    pattern = re.compile(rf"(?<![\w./~-])((?:{'|'.join(FOLDERS)})/[\w./*<>-]+)")
    missing = [
        f"{path.relative_to(ROOT)}: {name}"
        for path in documents()
        for name in pattern.findall(path.read_text())
        if not any(ROOT.glob(re.sub(r"NAME|<\w+>", "*", name.rstrip("./").partition("::")[0])))
    ]
    assert missing == []


def test_modules_that_are_run_exist():
    named = {
        (path, module)
        for path in documents()
        for module in re.findall(r"python -m ([\w.]+)", path.read_text())
        if module.split(".")[0] in PYTHON
    }
    assert named
    missing = [
        f"{path.relative_to(ROOT)}: {module}"
        for path, module in sorted(named)
        if not any((ROOT / module.replace(".", "/")).with_suffix(end).exists() for end in (".py", ""))
    ]
    assert missing == []
