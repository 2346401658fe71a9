"""Image-to-image, inpainting and video-to-video with a plan, at several strengths, against as many plain steps.

    .venv/bin/python scripts/bench/strength.py --cases flux inpaint --work runs/strength --out strength.json

| case | pipeline | plans |
|---|---|---|
| flux | FluxImg2ImgPipeline of the trained FLUX demo | of its text-to-image pipeline |
| inpaint | FluxInpaintPipeline, a rectangle over a third of the image | the same |
| inpaint-own | the same, at strength 0.7 | of that call, with the picture of one calibration prompt |
| wan | WanVideoToVideoPipeline of the trained Wan2.1 demo | of its text-to-video pipeline |
| wan-own | the same, at strength 0.9 | of that call, with the videos of calibration prompts |
| sd3, qwenimage | image-to-image pipelines of common/tests | of that call at strength 1 |

The weights of sd3 and qwenimage are random, at tiny size, with random text states: there is no trained demo of these
models. Prompts are those of the demos' prompts/, and further captions of the demo's grammar where there are too few;
the demos start from their own uncached pictures of the prompts.

A row compares with the uncached run at the same strength, with the same seeds. "steps" are denoising steps, computed of
those that the strength leaves. "plain" is an uncached run with the num_inference_steps that leaves as many denoising
steps as the plan computes; of several such numbers, the one that begins nearest to the uncached run's noise level.
PSNR is in dB, mean and worst over the prompts: of whole images or videos in [0, 1], inpainting too, and for random
weights of latents, with the largest minus the least value of the uncached ones as peak. Equal results have 120 dB.
"""

if __name__ == "__main__":
    import ertacache.utils.interrupts

import json
import sys
import tempfile
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image

import ertacache
from ertacache import Plan
from ertacache.cli.arguments import ArgumentParser
from ertacache.demos.model_folder import load_model_folder
from ertacache.evaluation.table import facts
from ertacache.pipelines.enable import originals
from ertacache.pipelines.uncached import CALL_NAMES, text_length
from ertacache.utils.errors import run_program
from ertacache.utils.files import read_prompts, writable_files, write_atomically
from ertacache.utils.tables import markdown

ROOT = Path(__file__).resolve().parents[2]
STRENGTHS, SPEEDUPS = (1.0, 0.9, 0.7, 0.5, 0.3), (2, 3)
CALIBRATION, BATCH = 16, 8  # prompts, and prompts per call of a calibration
STARTS, RUNS = 100, 7  # first seed of the pictures to start from, and of the runs that are compared
STEPS = 30  # of the tiny pipelines
BOX = (16, 12, 48, 56)  # mask, left, top, right and bottom: 34 % of 64 × 64


@dataclass(frozen=True)
class Case:
    """A pipeline with `strength`, and where its plans come from.

    Args:
        pipe: The pipeline.
        call: Arguments of its call, but for prompts, generators and strength; with num_inference_steps.
        prompts: To measure on.
        plans: Name of the plans' files.
        source: The pipeline that they are calibrated on.
        source_call: Arguments of its call, but for prompts.
        calibration: Prompts of the calibration.
        pixels: Whether to compare decoded pixels, in [0, 1]; else latents.
        strengths: To measure at.
    """

    pipe: Any
    call: dict[str, Any]
    prompts: list[str]
    plans: str
    source: Any
    source_call: dict[str, Any]
    calibration: list[str]
    pixels: bool = True
    strengths: tuple[float, ...] = STRENGTHS


# --- the cases -------------------------------------------------------------------------------------------------------


class Demo:
    """A trained demo: its pipeline from text alone, the call, prompts, and uncached pictures of prompts.

    Args:
        folder: Name of the model folder.
        count: Prompts to measure on.
    """

    def __init__(self, folder: str, count: int):
        self.sampler = load_model_folder(ROOT / folder)
        self.pipe = self.sampler.load("demo")
        settings = self.sampler.settings_of(self.pipe)
        self.call = {CALL_NAMES.get(name, name): value for name, value in settings.items()}
        self.call["max_sequence_length"] = text_length(self.pipe)
        self.calibration = self.captions("calibration-demo.txt", CALIBRATION, held_out=False)
        self.prompts = self.captions("demo.txt", count, held_out=True)

    def captions(self, file: str, count: int, held_out: bool) -> list[str]:
        """Return `count` prompts of a file, and further captions of the grammar where it has fewer."""
        prompts = read_prompts(self.sampler.FOLDER / "prompts" / file)
        further = self.sampler.grammar.sample_captions(count, seed=0, held_out=held_out)
        return list(dict.fromkeys([*prompts, *further]))[:count]

    def pictures(self, prompts: list[str]) -> np.ndarray:
        """Return uncached images or videos, float32 [B, …, H, W, 3] in [0, 1]."""
        generators = generators_from(STARTS, len(prompts))
        return self.pipe(prompts, generator=generators, output_type="np", return_dict=False, **self.call)[0]

    def case(self, pipeline: type, plans: str, picture: str, **changes) -> Case:
        """Return the case of a pipeline of the same components, which is given a picture under this name."""
        pipe = pipeline.from_pipe(self.pipe)
        pipe.set_progress_bar_config(disable=True)
        call = {name: value for name, value in self.call.items() if name != "num_frames"}  # those of the video
        call |= {picture: self.pictures(self.prompts), **changes}
        return Case(pipe, call, self.prompts, plans, self.pipe, self.call, self.calibration)


def flux() -> Case:
    from diffusers import FluxImg2ImgPipeline

    return Demo("ERTACache4FLUX", 8).case(FluxImg2ImgPipeline, "flux", "image")


def inpaint() -> Case:
    return _inpaint(Demo("ERTACache4FLUX", 8))


def inpaint_own() -> Case:
    demo, strength = Demo("ERTACache4FLUX", 8), 0.7
    case = _inpaint(demo)
    own = {**case.call, "image": demo.pictures(case.calibration[:1]), "strength": strength}
    return replace(case, plans="inpaint-own", source=case.pipe, source_call=own, strengths=(strength,))


def _inpaint(demo: Demo) -> Case:
    from diffusers import FluxInpaintPipeline

    mask = Image.new("L", (demo.call["width"], demo.call["height"]))
    mask.paste(255, BOX)
    return demo.case(FluxInpaintPipeline, "flux", "image", mask_image=mask)


def wan() -> Case:
    from diffusers import WanVideoToVideoPipeline

    return Demo("ERTACache4Wan2.1", 4).case(WanVideoToVideoPipeline, "wan", "video")


def wan_own() -> Case:
    from diffusers import WanVideoToVideoPipeline

    demo, strength = Demo("ERTACache4Wan2.1", 4), 0.9
    case = demo.case(WanVideoToVideoPipeline, "wan", "video")
    own = {**case.call, "video": demo.pictures(case.calibration[:BATCH]), "strength": strength}
    return replace(case, plans="wan-own", source=case.pipe, source_call=own, strengths=(strength,))


def sd3() -> Case:
    return _tiny("sd3")


def qwenimage() -> Case:
    """The text states of a prompt, and of "" for guidance: its pipeline asks for each of them by itself."""
    case = _tiny("qwenimage", negative_prompt=[""] * BATCH)
    both = case.pipe.encode_prompt
    case.pipe.encode_prompt = lambda **options: both(**options)[:2]
    return case


def _tiny(name: str, **changes) -> Case:
    """Return the case of an image-to-image pipeline of common/tests with random weights."""
    sys.path.insert(0, str(ROOT / "common" / "tests"))
    import helpers
    import tiny_pipelines

    tiny = helpers.with_prompts(getattr(tiny_pipelines, f"{name}_img2img")())
    call = {**tiny.arguments, "num_inference_steps": STEPS, **changes}
    call["image"] = [call["image"]] * BATCH  # SD3 wants one for each generator
    del call["strength"]
    prompts, calibration = ([f"{part} {i}" for i in range(n)] for part, n in (("prompt", BATCH), ("text", CALIBRATION)))
    return Case(tiny.pipe, call, prompts, name, tiny.pipe, {**call, "strength": 1.0}, calibration, pixels=False)


CASES = {
    "flux": flux,
    "inpaint": inpaint,
    "inpaint-own": inpaint_own,
    "wan": wan,
    "wan-own": wan_own,
    "sd3": sd3,
    "qwenimage": qwenimage,
}
TITLES = {
    "flux": "FLUX image-to-image",
    "inpaint": "FLUX inpainting",
    "inpaint-own": "… with a plan of that call",
    "wan": "Wan video-to-video",
    "wan-own": "… with a plan of that call",
    "sd3": "SD3",
    "qwenimage": "Qwen-Image",
}


# --- the measurement -------------------------------------------------------------------------------------------------


def plans_of(case: Case, work: Path) -> dict[float, Plan]:
    """Return a plan for each speed-up: stored ones, or new ones that are stored."""
    paths = {speedup: work / f"{case.plans}-{speedup}.json" for speedup in SPEEDUPS}
    missing = [speedup for speedup, path in paths.items() if not path.exists()]
    if missing:
        options = {"batch_size": BATCH, "progress": False, "work": work}
        plans = ertacache.calibrate(case.source, case.calibration, missing, **options, **case.source_call)
        for speedup, plan in plans.items():
            plan.save(paths[speedup])
    return {speedup: Plan.load(path) for speedup, path in paths.items()}


@dataclass
class Run:
    """One call of a case's pipeline, as it is or with the plan that is enabled on it.

    Attributes:
        steps, calls: Denoising steps that the pipeline made, and calls of its transformer.
        results: Images, videos or latents, [B, …].
    """

    case: Case
    strength: float
    num_inference_steps: int
    steps: int = 0
    calls: int = 0
    results: np.ndarray = field(init=False)

    def __post_init__(self):
        case, generators = self.case, generators_from(RUNS, len(self.case.prompts))
        changes = {"num_inference_steps": self.num_inference_steps, "strength": self.strength}
        changes["output_type"] = "np" if case.pixels else "latent"
        watch = {"generator": generators, "callback_on_step_end": self.count_step, "return_dict": False}
        hook = denoiser_of(case.pipe).register_forward_pre_hook(self.count_call)
        try:
            self.results = np.asarray(case.pipe(prompt=case.prompts, **{**case.call, **changes, **watch})[0])
        finally:
            hook.remove()

    def count_step(self, pipe, step, timestep, tensors):
        self.steps += 1
        return tensors

    def count_call(self, *_):
        self.calls += 1

    def psnr(self, other: "Run") -> np.ndarray:
        """Return the PSNR of this run's results to another's in dB, [B]."""
        found, wanted = (run.results.reshape(len(run.results), -1).astype(np.float64) for run in (self, other))
        peak = 1.0 if self.case.pixels else np.ptp(wanted, axis=1)
        return -10 * np.log10(np.maximum(np.square(found - wanted).mean(1) / np.square(peak), 1e-12))


def denoiser_of(pipe):
    """Return the transformer itself, which with a plan has a stand-in in the pipeline."""
    return originals(pipe)["transformer"]


def generators_from(seed: int, count: int) -> list[torch.Generator]:
    return [torch.Generator().manual_seed(seed + i) for i in range(count)]


def rows_of(name: str, case: Case, work: Path):
    """Yield a row for each strength and speed-up."""
    plans, steps = plans_of(case, work), case.call["num_inference_steps"]
    for strength in case.strengths:
        uncached = Run(case, strength, steps)
        for speedup, plan in plans.items():
            ertacache.enable(case.pipe, plan)
            planned = Run(case, strength, steps)
            computed = ertacache.summary(case.pipe).computed
            ertacache.disable(case.pipe)
            plain = Run(case, strength, plain_steps(case.pipe, strength, computed, uncached.steps / steps))
            check_counts(uncached, planned, plain, computed)
            row = {"case": name, "speed-up": speedup, "strength": strength, "computed": computed}
            row |= {"of": uncached.steps, "plain num_inference_steps": plain.num_inference_steps}
            for title, run in (("plan", planned), ("plain", plain)):
                psnr = run.psnr(uncached)
                row |= {title: float(psnr.mean()), f"{title}, worst": float(psnr.min())}
            yield row | {"difference": row["plan"] - row["plain"]}


def plain_steps(pipe, strength: float, left: int, share: float) -> int:
    """Return the num_inference_steps of which `strength` leaves this many denoising steps.

    Args:
        pipe: The pipeline; it has been called, and follows no plan.
        strength: Of the call.
        left: Denoising steps.
        share: Part of the steps that the uncached run makes, in (0, 1]; the result's is the nearest to it.
    """
    candidates = range(left, int(2 * left / strength) + 2)
    fitting = [steps for steps in candidates if steps_left(pipe, steps, strength) == left]
    return min(fitting, key=lambda steps: abs(left / steps - share))


def steps_left(pipe, steps: int, strength: float) -> int:
    """Return how many denoising steps a pipeline makes, by its own rounding."""
    arguments = {"num_inference_steps": steps, "strength": strength, "device": None}
    if "Wan" in type(pipe).__name__:
        arguments["timesteps"] = range(steps)
    return pipe.get_timesteps(**arguments)[1]


def check_counts(uncached: Run, planned: Run, plain: Run, computed: int) -> None:
    """Check by the transformer's calls that plan and plain run computed as many steps as the row says."""
    branches = uncached.calls / uncached.steps
    counts = {"planned": planned.calls / branches, "plain": plain.calls / branches, "plain steps": plain.steps}
    wrong = {name: count for name, count in counts.items() if count != computed}
    if wrong or planned.steps != uncached.steps:
        raise RuntimeError(f"{computed} of {uncached.steps} steps, but counted {wrong}, {planned.steps} with the plan")


def table(rows: list[dict[str, Any]]) -> str:
    """Return the rows as a Markdown table."""
    head = ["call", "speed-up", "strength", "computed", "plan, dB", "worst", "plain steps, dB", "worst", "difference"]
    lines = [
        [TITLES[row["case"]], f"{row['speed-up']:g}×", row["strength"], f"{row['computed']} of {row['of']}"]
        + [f"{row[name]:.1f}" for name in ("plan", "plan, worst", "plain", "plain, worst")]
        + [f"{row['difference']:+.1f}"]
        for row in rows
    ]
    return markdown(head, lines, ["---"] + ["--:"] * 8)


def main():
    parser = ArgumentParser(description=__doc__)
    text = f"of {', '.join(CASES)} (default: all)"
    parser.add_argument("--cases", nargs="+", choices=CASES, default=list(CASES), metavar="CASE", help=text)
    parser.add_argument("--work", type=Path, help="folder of the plans; default: a temporary one")
    parser.add_argument("--out", type=Path, metavar="FILE", help="where to write the rows, as JSON")
    args, rows = parser.parse_args(), []
    with writable_files(args.out), tempfile.TemporaryDirectory() as temporary:
        for name in args.cases:
            for row in rows_of(name, CASES[name](), args.work or Path(temporary)):
                rows.append(row)
                print(json.dumps(row), flush=True)
                if args.out:
                    write_atomically(args.out, (json.dumps(rows, indent=1) + "\n").encode())
    print(f"\n{table(rows)}\n\n{facts()}")


if __name__ == "__main__":
    run_program(main)
