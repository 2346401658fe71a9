"""The model card of a plan, and the image of its schedule. Both show what the plan's fields hold, and nothing else."""

import io
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from keyword import iskeyword
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageDraw, ImageFont

from ertacache.plans.names import HUB_ID, HUB_PREFIX, TARGETS
from ertacache.utils.errors import printable
from ertacache.utils.tables import MISSING, code, escaped, markdown

if TYPE_CHECKING:
    from huggingface_hub import ModelCard

SCHEDULE_IMAGE = "schedule.png"
ARGUMENT_NAMES = {"guidance": "guidance_scale", "frames": "num_frames"}  # setting of a model folder → pipeline argument
OTHER_PIPELINES = {"STDiT3Transformer3DModel": ("opensora12", "OpenSoraPipeline")}  # not in diffusers; by transformer
NO_ARGUMENTS = ("dtype", "pipeline", "steps", "latents", "text_length")  # settings that a call does not take
HASHED_INPUT = re.compile(r"\w+ [0-9a-f]{16}")  # type and hash: how a plan records an image or a tensor of its calls
DTYPES = ("float32", "float16", "bfloat16", "float64")
MARGIN, INK, FILLED = 36, "#2b2b28", "#2563eb"  # pixels; colours


@dataclass(frozen=True)
class KindFacts:
    """What the card takes from one kind of plan only.

    Attributes:
        rule: What happens between computed steps, a sentence.
        schedule: The computed or skipped steps, a sentence.
        error: Mean squared error of the final latents on the fitted calibration prompts.
        held_out_error: The same on calibration prompts left out of the fit.
        intervals: Intervals of the plan's own grid; 0 on the run's native grid.
    """

    rule: str
    schedule: str
    error: float | None
    held_out_error: float | None
    intervals: int


def _budget_facts(plan) -> KindFacts:
    intervals = max(0, len(plan.sigmas) - 1)
    grid = f" of the plan's own grid of {intervals} intervals" if intervals else ""
    steps = ", ".join(map(str, plan.computed))
    return KindFacts(
        rule="Between two computed steps the latents jump: a sum of the last velocities, with weights that were "
        "fitted by least squares.",
        schedule=f"It aims at {TARGETS[plan.target]}. Computed steps{grid}: {steps}.",
        error=plan.predicted_error,
        held_out_error=plan.held_out_error,
        intervals=intervals,
    )


def _threshold_facts(plan) -> KindFacts:
    calibration = plan.provenance.get("calibration", {})
    skipped = ", ".join(map(str, plan.cached)) or "none"
    return KindFacts(
        rule="On a skipped step the residual of the last computed step is used again.",
        schedule=f"λ = {plan.threshold:g}, cached at site `{plan.site}`; skipped steps: {skipped}.",
        error=calibration.get("errors", {}).get(calibration.get("chosen")),
        held_out_error=None,
        intervals=0,
    )


FACTS = {"budget": _budget_facts, "threshold": _threshold_facts}  # by kind of plan


def model_card(
    plan, source: str, license: str | None = None, results: str | None = None, others: Sequence = ()
) -> "ModelCard":
    """Return the card of a plan, a huggingface_hub ModelCard.

    Args:
        plan: A plan of any kind.
        source: What the snippet gives to `enable`, a Hub id or a folder's name.
        license: Of the plan.
        results: Markdown table of measured quality.
        others: Further plans of the set that it is the first of.
    """
    from huggingface_hub import ModelCard, ModelCardData

    facts = FACTS[plan.kind](plan)
    model = str(plan.provenance.get("model", ""))
    base = model if HUB_ID.fullmatch(model) and not Path(model).exists() else None
    tags = ["ertacache", "diffusers", "caching", "acceleration", f"{plan.kind}-plan"]
    data = ModelCardData(base_model=base, library_name="ertacache", license=license, tags=tags)
    paragraphs = [f"# {_title(plan)}", _introduction(plan, facts), f"![computed and skipped steps]({SCHEDULE_IMAGE})"]
    paragraphs += ["## Use it", _usage(plan, source, others), "## Quality", _quality(plan, facts)]
    paragraphs += [results] if results else []
    paragraphs += ["## Provenance", _provenance(plan), "## How it was chosen", _choice(plan)]
    return ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(paragraphs) + "\n")


def _title(plan) -> str:
    model = escaped(plan.provenance.get("model", "a transformer"))
    return f"{plan.nfe} of {plan.steps} steps: a {plan.kind} plan for {model}"


def _introduction(plan, facts: KindFacts) -> str:
    """Return the paragraph on model, scheduler, speed-up and computed steps."""
    requirements = plan.requirements
    model = escaped(str(requirements.model.get("class", "transformer")))
    scheduler = escaped(str(requirements.scheduler.get("class", "its scheduler")))
    checkpoint = f" of {code(plan.provenance['model'])}" if "model" in plan.provenance else ""
    calls = f"{plan.nfe} of {plan.steps} model calls, a speed-up of {plan.speedup:.2f}× in calls"
    text = f"An ERTACache {plan.kind} plan for the {model}{checkpoint} with {scheduler}: **{calls}**."
    return f"{text} {facts.rule} {facts.schedule}"


def _usage(plan, source: str, others: Sequence) -> str:
    """Return how to follow the plan, with a snippet that runs as it is."""
    model = plan.provenance.get("model")
    model = "path/to/the/model" if model in (None, plan.requirements.settings.get("pipeline")) else model
    code = "\n".join(_snippet(plan, source, model))
    checks = "Another transformer, scheduler or number of steps is refused before the first model call"
    text = f"With ERTACache and diffusers installed:\n\n```python\n{code}\n```"
    text = f"{text}\n\n{checks}; other weights or another dtype are a warning."
    if others:
        kinds = ", ".join(f"{other.nfe} of {other.steps} ({other.speedup:.2g}×)" for other in others)
        switch = f"`ertacache.speedup(pipe, {others[0].speedup:.2g})`"
        text += f"\n\nThe set has other numbers of model calls too, {kinds}: {switch} switches between calls."
    return text


def _snippet(plan, source: str, model: str) -> list[str]:
    """Return the lines of a script; the reader fills in images and tensors that the calibration's calls took.

    The plan may be a stranger's: whatever of it is neither a name nor a value of Python is left out.
    """
    source = HUB_PREFIX + source if HUB_ID.fullmatch(source) else source
    settings = plan.requirements.settings
    model_class = str(plan.requirements.model.get("class"))
    library, pipeline = OTHER_PIPELINES.get(model_class, ("diffusers", _pipeline(settings)))
    dtype = f", dtype=torch.{settings['dtype']}" if settings.get("dtype") in DTYPES else ""
    arguments = {ARGUMENT_NAMES.get(k, k): v for k, v in settings.items() if k not in NO_ARGUMENTS}
    if type(settings.get("text_length")) is int and not {"pipeline", "max_sequence_length"}.intersection(settings):
        arguments["max_sequence_length"] = settings["text_length"]  # the default of pipelines is another
    arguments = {name: value for name, value in arguments.items() if name.isidentifier() and not iskeyword(name)}
    hashed = [name for name, value in arguments.items() if isinstance(value, str) and HASHED_INPUT.fullmatch(value)]
    words = [f"{name}={name if name in hashed else _quoted(value)}" for name, value in arguments.items()]
    call = ", ".join(['"a prompt"', f"num_inference_steps={plan.steps}", *words])
    return [
        *(["import torch"] if dtype else []),
        f"from {library} import {pipeline}",
        "",
        "import ertacache",
        "",
        f"pipe = {pipeline}.from_pretrained({_quoted(model)}{dtype})",
        f"ertacache.enable(pipe, {_quoted(source)})",
        *(f"{name} = ...  # your input" for name in hashed),
        f"result = pipe({call})",
        "print(ertacache.summary(pipe))",
    ]


def _pipeline(settings: Mapping[str, Any]) -> str:
    """Return the pipeline class of the calibration, or DiffusionPipeline where diffusers lacks it."""
    import diffusers

    name = settings.get("pipeline")
    known = isinstance(name, str) and name.endswith("Pipeline") and hasattr(diffusers, name)
    return name if known else "DiffusionPipeline"


def _quoted(value) -> str:
    """Return a value as Python source, texts in double quotes."""
    return printable(json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value))


def _quality(plan, facts: KindFacts) -> str:
    """Return the table of the calibration's errors."""
    prompts = plan.provenance.get("prompts", {})
    count = prompts.get("count")
    fitted = prompts.get("fitted", count)
    held_out = None if count is None or fitted is None else count - fitted
    rows = [["calibration", fitted, facts.error], ["held out of the fit", held_out, facts.held_out_error]]
    calibration = plan.provenance.get("calibration", {})
    metric = calibration.get("error_metric", calibration.get("metric", "mean squared error of the final latents"))
    text = f"{escaped(metric[:1].upper() + metric[1:])} to {TARGETS[plan.target]}:"
    return f"{text}\n\n" + _table(["prompts", "count", "error"], rows)


def _provenance(plan) -> str:
    """Return the table of the plan's provenance and requirements."""
    facts = {name: fact for name, fact in plan.provenance.items() if name != "calibration"}
    facts = {"weights, fingerprint" if name == "weights" else name: fact for name, fact in facts.items()}
    required = plan.requirements
    facts |= {"settings": required.settings, "transformer": required.model, "scheduler": required.scheduler}
    return _table(["what", "value"], facts.items())


def _choice(plan) -> str:
    """Return the table of the candidates that calibration tried, best first."""
    calibration = plan.provenance.get("calibration")
    if not calibration:
        return "The plan does not say."
    errors = sorted(calibration.get("errors", {}).items(), key=lambda pair: pair[1])
    chosen, metric = calibration.get("chosen", MISSING), calibration.get("metric", "error")
    text = f"Calibration chose **{escaped(chosen)}** of these, by the {escaped(metric)}."
    return f"{text}\n\n" + _table(["candidate", "error"], errors)


def _table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table of a plan's values."""
    return markdown(head, [map(_formatted, row) for row in rows])


def _formatted(value) -> str:
    """Return a human-readable value: None as a dash, consecutive integers as a range."""
    if value is None or value == "":
        return MISSING if value is None else '""'
    if isinstance(value, Mapping):
        return ", ".join(f"{escaped(name)} {_formatted(item)}" for name, item in value.items()) or MISSING
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 0.01 else f"{value:g}"
    if isinstance(value, list | tuple):
        integers = len(value) > 2 and all(type(item) is int for item in value)
        if integers and list(value) == list(range(value[0], value[0] + len(value))):
            return f"{value[0]} to {value[-1]}"
        return "[" + ", ".join(map(_formatted, value)) + "]"
    return escaped(str(value))


# --- the image -----------------------------------------------------------------------------------------------------


def schedule_image(plan) -> Image.Image:
    """Return a row of cells, one per step: computed ones filled, with their numbers above and noise levels below.

    The panel is opaque and light, so that it is legible on white and on dark pages.
    """
    computed, grid = plan.computed, plan.sigmas or plan.native_sigmas
    count = len(grid) - 1
    cell = min(56, max(4, 1400 // count))
    panel = Image.new("RGBA", (max(700, cell * count) + 2 * MARGIN, 240))
    draw = ImageDraw.Draw(panel)
    draw.rounded_rectangle((0, 0, panel.width - 1, panel.height - 1), 18, "#fbfbfa", "#b8b8b4", 2)
    _legend(draw, f"{plan.nfe} of {plan.steps} model calls", FACTS[plan.kind](plan).intervals > 0)
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
    """Draw the title, the colours and the meaning of the numbers."""
    font = ImageFont.load_default(size=24)
    draw.text((MARGIN, 22), title, INK, font)
    x = MARGIN + draw.textlength(title, font) + 48
    for fill, text in ((FILLED, "computed"), ("white", "skipped")):
        draw.rectangle((x, 26, x + 22, 48), fill, INK, 2)
        draw.text((x + 32, 22), text, INK, font)
        x += 32 + draw.textlength(text, font) + 36
    step = "step on the plan's own grid" if own_grid else "step"
    draw.text((MARGIN, 56), f"above: {step}, below: noise level", "#5f5f5a", ImageFont.load_default(size=18))


def _labels(draw: ImageDraw.ImageDraw, labels: Sequence[tuple[float, str]], y: float) -> list[float]:
    """Draw centred texts, leaving out those that would overlap earlier ones; return the x of those drawn."""
    font, drawn = ImageFont.load_default(size=18), []
    for x, text in labels:
        half_width = draw.textlength(text, font) / 2 + 3
        if all(abs(x - other) >= half_width + other_half for other, other_half in drawn):
            draw.text((x, y), text, INK, font, anchor="ma")
            drawn.append((x, half_width))
    return [x for x, _ in drawn]


def png(image: Image.Image) -> bytes:
    """Return an image as the bytes of a PNG file."""
    buffer = io.BytesIO()
    image.save(buffer, format="PNG")
    return buffer.getvalue()
