"""The layers of ARCHITECTURE.md hold: imports point down, siblings stay apart, heavy imports have their places."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PACKAGE = ROOT / "megalm"

# From the bottom up. Modules of one line are siblings: none imports another.
LAYERS: tuple[frozenset[str], ...] = (
    frozenset({"errors"}),
    frozenset({"config", "program"}),
    frozenset({"topology", "kernels", "telemetry"}),
    frozenset({"parallel", "data", "tokenizers"}),
    frozenset({"models"}),
    frozenset({"checkpoint", "planning"}),
    frozenset({"train"}),
)
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# The few files that may name DeepSpeed, and the folders that need no torch at all.
DEEPSPEED_PLACES = ("topology/", "models/*/pipeline.py", "train/engine.py", "checkpoint/engine_files.py")
WITHOUT_TORCH = ("errors.py", "program.py", "config/")
# The one file that loads an optional library when it is imported, and lives without it; only kernels import that file.
OPTIONAL_PLACES = {"triton": ("kernels/triton_language.py",)}

Imports = list[tuple[str, int, bool]]


def sources() -> list[Path]:
    """Every module of the package."""
    return sorted(PACKAGE.rglob("*.py"))


def imports_of(path: Path) -> Imports:
    """Each import as (dotted name, line, whether it runs when the module is imported)."""
    return list(_walk(ast.parse(path.read_text(encoding="utf-8")), at_import=True))


def _walk(node: ast.AST, *, at_import: bool) -> Iterator[tuple[str, int, bool]]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.Import):
            for alias in child.names:
                yield alias.name, child.lineno, at_import
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"line {child.lineno}: relative imports hide the layer"
            for alias in child.names:
                yield f"{child.module}.{alias.name}", child.lineno, at_import
        elif isinstance(child, ast.If) and "TYPE_CHECKING" in ast.unparse(child.test):
            yield from _walk(ast.Module(body=child.orelse, type_ignores=[]), at_import=at_import)
        else:
            inside = at_import and not isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.Lambda)
            yield from _walk(child, at_import=inside)


def area(path: Path) -> str:
    """The layer member that a file belongs to: its folder below megalm, or `errors`."""
    relative = path.relative_to(PACKAGE)
    return relative.parts[0] if len(relative.parts) > 1 else relative.stem


def violations(path: Path, imports: Imports) -> list[str]:
    """The imports of one file that do not point down."""
    own = area(path)
    found = []
    for name, line, _ in imports:
        parts = name.split(".")
        if parts[0] != "megalm" or len(parts) < 2 or own == "__init__":
            continue
        target = parts[1]
        if target != own and LEVEL[target] >= LEVEL[own]:
            found.append(f"{path.relative_to(ROOT)}:{line} imports {name}: {own} may not import {target}")
    return found


def test_imports_point_down() -> None:
    assert [found for path in sources() for found in violations(path, imports_of(path))] == []


def test_every_folder_has_a_layer() -> None:
    areas = {area(path) for path in sources()} - {"__init__"}
    assert areas <= set(LEVEL)


def test_an_import_that_points_up_or_sideways_is_found() -> None:
    path = PACKAGE / "data" / "example.py"
    assert violations(path, [("megalm.train.loop", 1, True)])
    assert violations(path, [("megalm.tokenizers.build", 1, False)])
    assert not violations(path, [("megalm.errors.DataError", 1, True), ("megalm.data.indexed", 2, True)])


def test_package_files_stay_empty() -> None:
    filled = [str(path.relative_to(ROOT)) for path in PACKAGE.rglob("__init__.py") if path.read_text().strip()]
    assert filled == []


def test_deepspeed_is_named_in_its_few_places_only() -> None:
    strangers = []
    for path in sources():
        relative = path.relative_to(PACKAGE)
        allowed = any(relative.match(place) or str(relative).startswith(place) for place in DEEPSPEED_PLACES)
        if not allowed and any(name.split(".")[0] == "deepspeed" for name, _, _ in imports_of(path)):
            strangers.append(str(relative))
    assert strangers == []


@pytest.mark.parametrize("library", ["transformers", "matplotlib", "tensorboard", "wandb", "sentencepiece", "triton"])
def test_optional_libraries_are_imported_inside_functions_only(library: str) -> None:
    eager = [
        f"{path.relative_to(ROOT)}:{line}"
        for path in sources()
        for name, line, at_import in imports_of(path)
        if at_import and name.split(".")[0] == library
        if str(path.relative_to(PACKAGE)) not in OPTIONAL_PLACES.get(library, ())
    ]
    assert eager == []


def test_triton_is_loaded_by_kernel_files_alone_and_they_by_functions() -> None:
    eager = {
        ".".join(path.relative_to(ROOT).with_suffix("").parts): {name for name, _, now in imports_of(path) if now}
        for path in sources()
    }
    # Whatever loads Triton when it is imported, through however many files; names of objects follow names of modules.
    loaders = {"megalm.kernels.triton_language"}
    while True:
        found = {
            module
            for module, names in eager.items()
            if any(name == loader or name.startswith(loader + ".") for name in names for loader in loaders)
        }
        if found <= loaders:
            break
        loaders |= found
    assert [name for name in loaders if not name.startswith("megalm.kernels.") or "triton" not in name] == []


def test_configuration_does_not_name_torch() -> None:
    found = [
        str(path.relative_to(ROOT))
        for path in sources()
        if str(path.relative_to(PACKAGE)).startswith(WITHOUT_TORCH)
        and any(name.split(".")[0] in {"torch", "numpy", "deepspeed"} for name, _, _ in imports_of(path))
    ]
    assert found == []
