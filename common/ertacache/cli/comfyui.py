"""`ertacache comfyui`: the node folder in a ComfyUI checkout, which imports the nodes from the installed package."""

import contextlib
import hashlib
import json
from pathlib import Path

from ertacache.utils.errors import UserError
from ertacache.utils.files import unwritable, write_atomically

NAME = "ertacache"  # of the node folder
RECORD = "installed.json"  # in it: the files that were written, with their SHA-256
EXAMPLES = "example_workflows"  # a folder whose files ComfyUI offers as templates
WORKFLOWS = Path(__file__).parents[1] / "comfyui" / "workflows"
API_SUFFIX = "-api.json"
INIT = '''"""Written by `ertacache comfyui install`; `ertacache comfyui remove` deletes it."""

from ertacache.comfyui.nodes import comfy_entrypoint  # noqa: F401
'''


def install(checkout: str | Path) -> Path:
    """Write the node folder, in place of an earlier one.

    Args:
        checkout: Folder of ComfyUI.

    Returns:
        The node folder.

    Raises:
        UserError: No checkout, a folder of this name that was not written here, or files changed since.
    """
    folder = node_folder(checkout)
    files = {"__init__.py": INIT.encode()}
    for path in sorted(WORKFLOWS.glob("*.json")):
        if not path.name.endswith(API_SUFFIX):
            files[f"{EXAMPLES}/{path.name}"] = path.read_bytes()
    earlier = written(folder)
    for name in files:
        refuse_foreign(folder / name, earlier.get(name))
    try:
        for name, content in files.items():
            write_atomically(folder / name, content)
        for name in earlier.keys() - files.keys():
            _delete(folder / name, earlier[name])
        record = {name: _digest(content) for name, content in files.items()}
        write_atomically(folder / RECORD, (json.dumps(record, indent=1) + "\n").encode())
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder


def remove(checkout: str | Path) -> tuple[Path, list[Path]]:
    """Delete what `install` has written.

    Args:
        checkout: Folder of ComfyUI.

    Returns:
        The node folder, and the files left in it, which are others' or were changed.

    Raises:
        UserError: No checkout, or no node folder that was written here.
    """
    folder = node_folder(checkout)
    if not folder.exists():
        raise UserError(f"no node folder {folder}: nothing to remove")
    try:
        for name, digest in written(folder).items():
            _delete(folder / name, digest)
        (folder / RECORD).unlink(missing_ok=True)
        for path in folder.glob("__pycache__/__init__.*.pyc"):
            path.unlink()
        for inner in (folder / "__pycache__", folder / EXAMPLES, folder):
            with contextlib.suppress(OSError):  # not there, or not empty
                inner.rmdir()
    except OSError as error:
        raise unwritable(folder, error) from error
    return folder, sorted(path for path in folder.rglob("*") if path.is_file())


def node_folder(checkout: str | Path) -> Path:
    """Return the node folder's path in a checkout of ComfyUI.

    Raises:
        UserError: The folder is none.
    """
    checkout = Path(checkout).expanduser()
    if not checkout.is_dir():
        raise UserError(f"{checkout} is no folder: give that of ComfyUI, with main.py and custom_nodes")
    missing = [name for name in ("custom_nodes", "comfy", "main.py") if not (checkout / name).exists()]
    if missing:
        raise UserError(
            f"{checkout} is not ComfyUI's folder, there is no {missing[0]} in it: give the one with main.py"
        )
    return checkout / "custom_nodes" / NAME


def written(folder: Path) -> dict[str, str]:
    """Return the files that were written to a node folder, with their SHA-256.

    Raises:
        UserError: A folder, or a file of its name, that was not written here.
    """
    if not folder.exists() and not folder.is_symlink():
        return {}
    try:
        record = json.loads((folder / RECORD).read_text("utf-8"))
        names = [name for name, digest in record.items() if isinstance(digest, str)]
        known = len(names) == len(record) and not any(Path(name).is_absolute() or ".." in name for name in names)
    except (OSError, ValueError, RecursionError, AttributeError):
        known = False
    if folder.is_symlink() or not known:
        raise UserError(f"{folder} was not written by ertacache: move it away first")
    return record


def refuse_foreign(path: Path, digest: str | None) -> None:
    """Refuse to write over a file that is another than the one of this SHA-256."""
    if path.exists() and (not path.is_file() or _digest(path.read_bytes()) != digest):
        raise UserError(f"{path} was not written by ertacache, or was changed: move it away first")


def _delete(path: Path, digest: str) -> None:
    if path.is_file() and _digest(path.read_bytes()) == digest:
        path.unlink()


def _digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()
