"""The model card of a plan, and the picture of its schedule. Both say what the plan says, and nothing else."""

import io
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ertacache.plans.names import HUB_ID

PICTURE = "schedule.png"
MISSING = "–"
RENAMED = {"guidance": "guidance_scale", "frames": "num_frames"}  # a model folder's settings → a pipeline's arguments
OWN_PIPELINES = {"STDiT3Transformer3DModel": ("opensora12", "OpenSoraPipeline")}  # which diffusers does not know
GIVEN = re.compile(r"\w+ [0-9a-f]{16}")  # type and hash: how a plan records a picture or a tensor of its calls
TARGETS = {"reference": "the uncached run", "exact": "the exact solution, which the uncached run approximates"}
MARGIN, INK, FILLED = 36, "#2b2b28", "#2563eb"  # pixels; colours
RULES = {
    "budget": "Between two computed steps the latents jump: a sum of the last velocities, with weights that were "
    "fitted by least squares.",
    "threshold": "On a skipped step the residual of the last computed step is used again.",
}


def model_card(plan, where: str, license: str | None, results: str | None):
    """where: what the snippet gives to `enable`, a Hub id or a folder's name. results: Markdown, measured quality."""
    from huggingface_hub import ModelCard, ModelCardData

    model = str(plan.provenance.get("model", ""))
    base = model if HUB_ID.fullmatch(model) and not Path(model).exists() else None
    tags = ["ertacache", "diffusers", "caching", "acceleration", f"{plan.kind}-plan"]
    data = ModelCardData(base_model=base, library_name="ertacache", license=license, tags=tags)
    parts = [f"# {_title(plan)}", _sentence(plan), f"![computed and skipped steps]({PICTURE})"]
    parts += ["## Use it", _usage(plan, where), "## Quality", _quality(plan), *([results] if results else [])]
    parts += ["## Provenance", _provenance(plan), "## How it was chosen", _choice(plan)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n")


def _title(plan) -> str:
    return f"{plan.nfe} of {plan.steps} steps: a {plan.kind} plan for {plan.provenance.get('model', 'a transformer')}"


def _sentence(plan) -> str:
    """What the plan is."""
    made = plan.conditions
    model, scheduler = made.model.get("class", "transformer"), made.scheduler.get("class", "its scheduler")
    named = f" of `{plan.provenance['model']}`" if "model" in plan.provenance else ""
    sped = f"{plan.nfe} of {plan.steps} model calls, a speed-up of {plan.steps / plan.nfe:.2f}× in calls"
    text = f"An ERTACache {plan.kind} plan for the {model}{named} with {scheduler}: **{sped}**. {RULES[plan.kind]}"
    steps = ", ".join(map(str, plan.computed))
    if plan.kind == "threshold":
        cached = ", ".join(map(str, plan.cached)) or "none"
        return f"{text} λ = {plan.threshold:g}, cached at site `{plan.site}`; skipped steps: {cached}."
    grid = f" of the plan's own grid of {len(plan.sigmas) - 1} intervals" if plan.sigmas else ""
    return f"{text} It aims at {TARGETS[plan.target]}. Computed steps{grid}: {steps}."


def _usage(plan, where: str) -> str:
    """How the plan is followed, with a snippet that runs as it is."""
    model = plan.provenance.get("model")
    model = "path/to/the/model" if model in (None, plan.conditions.settings.get("pipeline")) else model
    if plan.kind == "threshold" and plan.site == "blocks":
        text = "Plans at site `blocks` are followed by `generate.py` in the model's folder of ERTACache, called there:"
        fetch, folder = (f"hf download {where} --local-dir plan\n", "plan") if HUB_ID.fullmatch(where) else ("", where)
        command = f"{fetch}python generate.py --model {model} --steps {plan.steps} --plan {folder}/plan.json"
        return f"{text}\n\n```sh\n{command}\n```"
    text = "With ERTACache and diffusers installed:\n\n```python\n" + "\n".join(_snippet(plan, where, model)) + "\n```"
    bound = "Another transformer, scheduler or number of steps is refused before the first model call"
    return f"{text}\n\n{bound}; other weights or another dtype are a warning."


def _snippet(plan, where: str, model: str) -> list[str]:
    """The lines of a script. Pictures and tensors that the calibration's calls were given are the reader's own."""
    made = plan.conditions.settings
    library, pipeline = OWN_PIPELINES.get(plan.conditions.model.get("class"), ("diffusers", _pipeline(made)))
    dtype = f", dtype=torch.{made['dtype']}" if "dtype" in made else ""
    settings = {RENAMED.get(k, k): v for k, v in made.items() if k not in ("dtype", "pipeline", "steps")}
    given = [name for name, value in settings.items() if isinstance(value, str) and GIVEN.fullmatch(value)]
    arguments = [f"{name}={name if name in given else _quoted(value)}" for name, value in settings.items()]
    call = ", ".join(['"a prompt"', f"num_inference_steps={plan.steps}", *arguments])
    return [
        *(["import torch"] if dtype else []),
        f"from {library} import {pipeline}",
        "",
        "import ertacache",
        "",
        f"pipe = {pipeline}.from_pretrained({_quoted(model)}{dtype})",
        f"ertacache.enable(pipe, {_quoted(where)})",
        *(f"{name} = ...  # yours" for name in given),
        f"result = pipe({call})",
        "print(ertacache.summary(pipe))",
    ]


def _pipeline(settings: Mapping[str, Any]) -> str:
    """The class that the plan was calibrated with, where diffusers has it."""
    import diffusers

    name = settings.get("pipeline")
    return name if name and hasattr(diffusers, name) else "DiffusionPipeline"


def _quoted(value) -> str:
    """As Python source, texts in double quotes."""
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _quality(plan) -> str:
    """What the plan says about its error."""
    found, prompts = plan.provenance.get("calibration", {}), plan.provenance.get("prompts", {})
    count = prompts.get("count")
    fitted = prompts.get("fitted", count)
    if plan.kind == "budget":
        target, errors = TARGETS[plan.target], (plan.predicted_error, plan.held_out_error)
    else:
        target, errors = TARGETS["reference"], (found.get("errors", {}).get(found.get("chosen")), None)
    left = None if count is None else count - fitted
    table = [["calibration", fitted, errors[0]], ["held out of the fit", left, errors[1]]]
    return f"Mean squared error of the final latents to {target}:\n\n" + _table(["prompts", "count", "error"], table)


def _provenance(plan) -> str:
    made = plan.conditions
    facts = {name: fact for name, fact in plan.provenance.items() if name != "calibration"}
    facts = {"weights, fingerprint" if name == "weights" else name: fact for name, fact in facts.items()}
    facts |= {"settings": made.settings, "transformer": made.model, "scheduler": made.scheduler}
    return _table(["what", "value"], facts.items())


def _choice(plan) -> str:
    """The candidates that calibration tried."""
    found = plan.provenance.get("calibration")
    if not found:
        return "The plan does not say."
    errors = sorted(found.get("errors", {}).items(), key=lambda pair: pair[1])
    text = f"Calibration chose **{found.get('chosen', MISSING)}** of these, by the {found.get('metric', 'error')}."
    return f"{text}\n\n" + _table(["candidate", "error"], errors)


def _table(head: Sequence[str], rows) -> str:
    """Markdown."""
    lines = [[_shown(value).replace("|", "\\|").replace("\n", " ") for value in row] for row in rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in [head, ["---"] * len(head), *lines])


def _shown(value) -> str:
    """A value as people read it; None as a dash, consecutive numbers by their ends."""
    if value is None or value == "":
        return MISSING if value is None else '""'
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_shown(part)}" for name, part in value.items()) or MISSING
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:g}"
    if isinstance(value, list | tuple):
        whole = len(value) > 2 and all(type(part) is int for part in value)
        if whole and list(value) == list(range(value[0], value[0] + len(value))):
            return f"{value[0]} to {value[-1]}"
        return "[" + ", ".join(map(_shown, value)) + "]"
    return str(value)


# --- the picture -----------------------------------------------------------------------------------------------------


def picture(plan) -> Image.Image:
    """A row of cells, one a step, computed ones filled, with their numbers above and noise levels below.

    The panel is opaque and light, so that it reads on white and on dark pages.
    """
    computed, grid = plan.computed, plan.sigmas or plan.native_sigmas
    count = len(grid) - 1
    cell = min(56, max(4, 1400 // count))
    panel = Image.new("RGBA", (max(700, cell * count) + 2 * MARGIN, 240))
    draw = ImageDraw.Draw(panel)
    draw.rounded_rectangle((0, 0, panel.width - 1, panel.height - 1), 18, "#fbfbfa", "#b8b8b4", 2)
    _legend(draw, f"{plan.nfe} of {plan.steps} model calls", plan.kind == "budget" and bool(plan.sigmas))
    left, top, bottom = (panel.width - cell * count) // 2, 120, 176
    for i in range(count):
        fill = FILLED if i in computed else "white"
        draw.rectangle((left + i * cell, top, left + (i + 1) * cell, bottom), fill, INK if cell > 12 else None)
    draw.rectangle((left, top, left + cell * count, bottom), None, INK, 2)
    _labels(draw, [(left + (i + 0.5) * cell, str(i)) for i in computed], top - 28)
    ticks = [(left + i * cell, f"{grid[i]:.2f}") for i in (count, *computed)]
    for x in _labels(draw, ticks, bottom + 14):
        draw.line((x, bottom, x, bottom + 10), INK, 2)
    return panel


def _legend(draw: ImageDraw.ImageDraw, title: str, own_grid: bool) -> None:
    font = ImageFont.load_default(size=24)
    draw.text((MARGIN, 22), title, INK, font)
    x = MARGIN + draw.textlength(title, font) + 48
    for fill, text in ((FILLED, "computed"), ("white", "skipped")):
        draw.rectangle((x, 26, x + 22, 48), fill, INK, 2)
        draw.text((x + 32, 22), text, INK, font)
        x += 32 + draw.textlength(text, font) + 36
    text = f"above: {'place on the own grid' if own_grid else 'step'}, below: noise level"
    draw.text((MARGIN, 56), text, "#5f5f5a", ImageFont.load_default(size=18))


def _labels(draw: ImageDraw.ImageDraw, places: Sequence[tuple[float, str]], y: float) -> list[float]:
    """Write the texts, centred, that have room beside those before them. Returns where."""
    font, written = ImageFont.load_default(size=18), []
    for x, text in places:
        half = draw.textlength(text, font) / 2 + 3
        if all(abs(x - other) >= half + room for other, room in written):
            draw.text((x, y), text, INK, font, anchor="ma")
            written.append((x, half))
    return [x for x, _ in written]


def png(image: Image.Image) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
