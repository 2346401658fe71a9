"""Each package of the library imports only from the layers below it, and no module imports in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import ertacache

LIBRARY = Path(ertacache.__file__).parent
LAYERS = [  # from the top
    {"cli"},
    {"evaluation"},
    {"calibration", "caches"},
    {"pipelines"},
    {"plans", "demos", "numerics"},
    {"algorithm", "utils"},
]


def is_for_types(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"


def nodes(tree: ast.AST):
    """All nodes, in functions too, but not what only a type checker reads."""
    for child in ast.iter_child_nodes(tree):
        if not is_for_types(child):
            yield child
            yield from nodes(child)


def arrows(library: Path) -> dict[str, set[str]]:
    """Module → the modules of the library that it imports, anywhere in its text."""
    modules = {path.relative_to(library.parent).with_suffix("").as_posix(): path for path in library.rglob("*.py")}
    modules = {name.removesuffix("/__init__").replace("/", "."): path for name, path in modules.items()}
    found: dict[str, set[str]] = {}
    for name, path in modules.items():
        imports = [node for node in nodes(ast.parse(path.read_text("utf-8"))) if isinstance(node, ast.ImportFrom)]
        asked = [(node.module, f"{node.module}.{alias.name}") for node in imports for alias in node.names]
        found[name] = {whole if whole in modules else module for module, whole in asked if module in modules} - {name}
    return found


def layer(module: str) -> int | None:
    """Number of a module's layer, 0 at the top; None for the package itself, which looks names up when asked."""
    package = [*module.split("."), ""][1]
    return next((number for number, packages in enumerate(LAYERS) if package in packages), None)


def test_imports_lead_downwards():
    upward = []
    for module, imported in arrows(LIBRARY).items():
        for other in imported:
            same = module.split(".")[:2] == other.split(".")[:2]
            if None not in (layer(module), layer(other)) and not same and layer(module) >= layer(other):
                upward.append(f"{module} → {other}")
    assert upward == []


def test_every_module_is_in_a_layer():
    modules = set(arrows(LIBRARY)) - {"ertacache", "ertacache.__main__"}
    assert {module for module in modules if layer(module) is None} == set()


def test_no_module_imports_in_a_circle():
    TopologicalSorter(arrows(LIBRARY)).prepare()  # raises CycleError with the circle
