"""The closed-form denoiser as ComfyUI gives models to sampler functions."""

import contextlib

import torch

from conftest import ROOT
from ertacache.calibration.budget import BudgetCalibration
from ertacache.calibration.session import CalibrationSession
from ertacache.demos import closed_form
from ertacache.demos.model_folder import load_model_folder

STEPS, CALLS = 12, 4
folder = load_model_folder(ROOT / "scripts/bench/closed_form")
PIPE = folder.load()


class FlowModel:
    """model(x, sigma) returns denoised latents [B, C, H, W], x = (1 − sigma) · data + sigma · noise; a `Pupil`.

    Args:
        inputs: Of the model folder: captions and guidance.
    """

    space, description, settings = "flow", {"class": "ClosedForm", "spread": 0.1}, {"cfg": 3.5}
    dtype, unrepeatable = torch.float32, None

    def __init__(self, inputs):
        self.inputs, self.calls, self.parameters = inputs, 0, list(PIPE.transformer.parameters())

    def __call__(self, x, sigma):
        self.calls += 1
        assert sigma.shape == (len(x),)
        return x - sigma[0] * folder.velocity(PIPE, self.inputs, x, sigma[0])

    def velocity(self, x, t):
        """As a sampler function makes it of what the model returns."""
        return (x - self(x, t * x.new_ones([len(x)]))) / t

    def keep(self):
        return self.inputs

    @contextlib.contextmanager
    def given(self, kept):
        self.inputs, own = kept, self.inputs
        yield
        self.inputs = own


class SigmaModel(FlowModel):
    """The same in sigma space, x = data + sigma · noise."""

    space = "sigma"

    def __call__(self, x, sigma):
        self.calls += 1
        s = sigma[0] / (1 + sigma[0])
        return x / (1 + sigma[0]) - s * folder.velocity(PIPE, self.inputs, x / (1 + sigma[0]), s)


def prompts_and_seeds(count, first=0):
    return closed_form.sample_captions(count, first), list(range(first, first + count))


def calibrated(count, work, effort="quick", **options):
    """The library's plan for some prompts, one in a batch."""
    prompts, seeds = prompts_and_seeds(count)
    options |= {"settings": {"steps": STEPS, "guidance": 3.5}, "batch_size": 1, "work": work, "progress": False}
    calibration = BudgetCalibration(CalibrationSession(folder, PIPE, prompts, seeds, **options))
    plan = calibration.plans([CALLS], effort)[CALLS]
    calibration.finish()
    return plan
