"""What a plan requires of a run: what binds it, and what may differ with a warning."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from ertacache.utils.denoisers import denoiser_of


@dataclass(frozen=True)
class Requirements:
    """Steps, model, scheduler and settings of a run; those of the calibration are what a plan requires.

    Args:
        steps: T, steps of the uncached run.
        model: Class and public config of the denoiser, as JSON values.
        scheduler: The same of the scheduler.
        settings: Guidance, height, width, dtype, …

    Another number of steps, model or scheduler is refused. Other settings are one warning.
    """

    steps: int
    model: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe, steps: int, settings: Mapping[str, Any]) -> "Requirements":
        """Return those of a diffusers pipeline with a denoiser and a `scheduler`, also where it follows a plan."""
        model = denoiser_of(pipe)
        model = getattr(model, "_orig_mod", model)  # inside of torch.compile's wrapper
        return cls(steps, _describe(model), _describe(pipe.scheduler), json.loads(json.dumps(settings)))

    @classmethod
    def of_scheduler(cls, scheduler, steps: int) -> "Requirements":
        """Return those of a scheduler alone."""
        return cls(steps, {}, _describe(scheduler))


def _describe(component) -> dict[str, Any]:
    """Return class and config; how the weights are stored (quantised or not) binds no plan and is left out."""
    config = dict(component.config)
    public = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    return json.loads(json.dumps({"class": component.__class__.__name__, **public}, default=str))


def differences(required: Mapping[str, Any], present: Mapping[str, Any]) -> list[str]:
    """Return the keys that both have with different values; keys that only one has belong to another release."""
    return [key for key in required if key in present and required[key] != present[key]]
