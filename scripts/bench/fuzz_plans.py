"""Coverage-guided fuzzing of plan files: whatever is read as a plan is refused in one line, or shown whole.

    .venv/bin/pip install atheris
    .venv/bin/python scripts/bench/fuzz_plans.py --minutes 10

An input is the JSON of a plan, a zero byte, and its arrays' file; the checksum is made right, so that changes get
behind it. The mutations come from atheris (libFuzzer), which keeps those that reach new code of `ertacache.plans`,
beginning with the shipped plans. Any exception but a UserError of one printable line ends the run and is kept in
runs/fuzz/. Not part of the test suite: scripts/bench/reliability.py has mutations that need no further package.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts  # noqa: F401 (Ctrl-C is one line from here on)

import hashlib
import json
import tempfile
from pathlib import Path

from ertacache.cli.arguments import ArgumentParser
from ertacache.utils.errors import UserError, run_program

ROOT = Path(__file__).resolve().parents[2]
WORK = ROOT / "runs" / "fuzz"


def packed(path: Path) -> bytes:
    """Return a plan's two files as one input."""
    return path.read_bytes() + b"\0" + path.with_suffix(".safetensors").read_bytes()


def unpack(data: bytes, folder: Path) -> Path:
    """Write an input as a plan's two files, with the right checksum where the first one is a JSON object."""
    text, _, arrays = data.partition(b"\0")
    path = folder / "plan.json"
    try:
        fields = json.loads(text)
        fields.pop("checksum", None)
        canonical = json.dumps(fields, sort_keys=True, ensure_ascii=False, separators=(",", ":"))
        digest = hashlib.sha256(canonical.encode(errors="surrogatepass") + arrays).hexdigest()
        text = json.dumps({**fields, "checksum": digest}).encode()
    except (ValueError, AttributeError, TypeError, RecursionError):
        pass  # written as it is
    path.write_bytes(text)
    path.with_suffix(".safetensors").write_bytes(arrays)
    return path


def try_plan(path: Path) -> None:
    """Load a plan, and show and describe it."""
    from ertacache.cli.inspect import as_values
    from ertacache.plans import Plan

    try:
        plan = Plan.load(path)
    except UserError as error:
        text = str(error)
        assert text.isprintable() and len(text) < 1100, text
        return
    json.dumps(as_values(plan))
    body = str(plan.generate_model_card(repo_id="someone/plan"))
    compile(body.split("```python\n")[1].split("```")[0], "card", "exec")


def main() -> None:
    parser = ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=10, help="how long")
    args = parser.parse_args()
    try:
        import atheris
    except ImportError as error:
        raise UserError("atheris is not installed: pip install atheris (Linux and macOS)") from error
    corpus = WORK / "corpus"
    corpus.mkdir(parents=True, exist_ok=True)
    for path in ROOT.glob("ERTACache4*/cache/*.json"):
        (corpus / f"{path.parent.parent.name}-{path.stem}").write_bytes(packed(path))
    with atheris.instrument_imports(include=["ertacache.plans", "ertacache.cli.inspect"]):
        import ertacache.cli.inspect
        import ertacache.plans.card  # noqa: F401
    folder = Path(tempfile.mkdtemp())
    seconds = f"-max_total_time={round(60 * args.minutes)}"
    flags = [seconds, "-timeout=5", "-rss_limit_mb=2000", f"-artifact_prefix={WORK}/", "-max_len=65536"]
    atheris.Setup(["fuzz_plans", *flags, str(corpus)], lambda data: try_plan(unpack(data, folder)))
    atheris.Fuzz()


if __name__ == "__main__":
    run_program(main)
