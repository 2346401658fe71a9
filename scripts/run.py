"""What `cd FOLDER && sh run.sh` does, where there is no sh (Windows): set up .venv, then generate.

    python scripts/run.py ERTACache4FLUX
    python scripts/run.py ERTACache4FLUX --height 128

Defaults and the meaning of the variables are in FOLDER/run.sh; variables of the environment take their place, and
further words go to generate.py. Needs Python 3.10 and nothing else.
"""

import os
import re
import subprocess
import sys
import venv
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FLAGS = {  # by variable
    **{"MODEL": "--model", "SEED": "--seed", "STEPS": "--steps", "GUIDANCE": "--guidance", "EFFORT": "--effort"},
    **{"BATCH": "--batch-size", "FPS": "--fps", "OFFLOAD": "--offload", "OUT": "--out"},
    **{"PROMPT": "--prompt", "PROMPTS": "--prompts", "SPEEDUP": "--speedup", "BUDGET": "--budget"},
}
VARIABLE = re.compile(r"^([A-Z]+)=\$\{\1:-([^}]*)\}", re.M)


def refuse(text: str) -> None:
    print(f"error: {text}", file=sys.stderr)
    sys.exit(2)


def flags(folder: Path, environment: dict[str, str]) -> list[str]:
    """Return the words that run.sh gives to generate.py."""
    script = (folder / "run.sh").read_text("utf-8")
    values = {name: environment.get(name) or default for name, default in VARIABLE.findall(script)}
    by_budget = values["SPEEDUP"] or values["BUDGET"]
    if by_budget and (environment.get("LAMBDA") or environment.get("SITE")):
        refuse("LAMBDA and SITE are of threshold plans: leave them out beside SPEEDUP or BUDGET")
    if values["COMPARE"] not in ("yes", "no"):
        refuse(f"COMPARE={values['COMPARE']}: give yes or no")
    words = [word for name, flag in FLAGS.items() if values.get(name) for word in (flag, values[name])]
    words += [] if by_budget else ["--threshold", values["LAMBDA"], "--site", values["SITE"]]
    return words + (["--compare", "--repeats", values["REPEATS"]] if values["COMPARE"] == "yes" else [])


def python_of_venv() -> Path:
    """Return the Python of .venv, which is made and filled when it is not there."""
    folder = ROOT / ".venv"
    python = folder / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    if not (folder / ".ready").exists() and not list(folder.glob(".ready-base-*")):
        print(f"setting up {folder} (once, a few minutes)", file=sys.stderr)
        try:
            venv.create(folder, with_pip=True)
            pip = [python, "-m", "pip", "install", "-q", "--disable-pip-version-check"]
            subprocess.run([*pip, "-c", ROOT / "constraints.txt", "-e", ROOT], check=True)
        except (subprocess.CalledProcessError, OSError) as error:
            refuse(f"cannot set up {folder} ({error}): see what is said above")
        (folder / ".ready").touch()
    return python


def main() -> None:
    if sys.argv[1:2] in (["-h"], ["--help"]):
        print(__doc__.strip())
        return
    if len(sys.argv) < 2 or not (ROOT / sys.argv[1] / "run.sh").is_file():
        folders = ", ".join(sorted(path.parent.name for path in ROOT.glob("*/run.sh")))
        refuse(f"name a model folder: {folders}")
    folder = ROOT / sys.argv[1]
    words = [*flags(folder, dict(os.environ)), *sys.argv[2:]]
    done = subprocess.run([python_of_venv(), "generate.py", *words], cwd=folder)
    sys.exit(done.returncode)


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:  # of which generate.py has said what there is to say
        sys.exit(130)
