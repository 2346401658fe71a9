"""Each package of the library imports only from the layers below it, and no module imports in a circle."""

import ast
from graphlib import TopologicalSorter
from pathlib import Path

import ertacache

LAYERS = (  # from the top
    {"cli", "comfyui"},
    {"evaluation"},
    {"calibration", "caches"},
    {"pipelines"},
    {"plans", "demos", "numerics"},
    {"algorithm", "utils"},
)
LAYER_OF = {package: number for number, packages in enumerate(LAYERS) for package in packages}
ROOT = Path(ertacache.__file__).parents[1]
PATHS = {".".join(p.relative_to(ROOT).with_suffix("").parts): p for p in ROOT.glob("ertacache/**/*.py")}
MODULES = {name.removesuffix(".__init__"): path for name, path in PATHS.items()}


def imported_names(node: ast.AST):
    """What the code imports, in functions too; what only a type checker reads is left out."""
    if isinstance(node, ast.ImportFrom):
        assert node.level == 0, "relative imports are not read"
        yield from ((node.module, alias.name) for alias in node.names)
    elif isinstance(node, ast.Import):
        yield from ((alias.name, "") for alias in node.names)
    elif not (isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING"):
        for child in ast.iter_child_nodes(node):
            yield from imported_names(child)


def imports_of(path: Path) -> set[str]:
    names = imported_names(ast.parse(path.read_text("utf-8")))
    return {f"{a}.{b}" if f"{a}.{b}" in MODULES else a for a, b in names} & MODULES.keys()


IMPORTS = {module: imports_of(path) - {module} for module, path in MODULES.items()}
ENTRANCES = {"ertacache", "ertacache.__main__"}  # they look names up when asked, and start the command


def package(module: str) -> str:
    return module.split(".")[1]


def test_imports_lead_downwards():
    arrows = [(a, b) for a, imported in IMPORTS.items() for b in imported if not ENTRANCES & {a, b}]
    between = [(a, b) for a, b in arrows if package(a) != package(b)]
    assert [(a, b) for a, b in between if LAYER_OF[package(a)] >= LAYER_OF[package(b)]] == [] and len(between) > 100


def test_every_module_is_in_a_layer():
    assert {package(module) for module in MODULES.keys() - ENTRANCES} == LAYER_OF.keys()


def test_no_module_imports_in_a_circle():
    TopologicalSorter(IMPORTS).prepare()  # raises CycleError with the circle
