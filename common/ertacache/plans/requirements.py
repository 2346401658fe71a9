"""What a run is made under: what binds a plan, and what may differ with a warning."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Conditions:
    """Steps, model, scheduler and settings of a run.

    Steps, model and scheduler (class and public config, as JSON values) bind a plan: another one is refused.
    The settings (guidance, height, width, dtype, …) may differ, with one warning.
    """

    steps: int
    model: Mapping[str, Any]
    scheduler: Mapping[str, Any]
    settings: Mapping[str, Any] = field(default_factory=dict)

    @classmethod
    def of(cls, pipe, steps: int, settings: Mapping[str, Any]) -> "Conditions":
        """The conditions of a diffusers pipeline with a `transformer` and a `scheduler`."""
        return cls(steps, _describe(pipe.transformer), _describe(pipe.scheduler), json.loads(json.dumps(settings)))


def _describe(component) -> dict[str, Any]:
    """Class and config; how the weights are kept (quantized or not) is left out, it binds no plan."""
    config = dict(component.config)
    public = {k: v for k, v in config.items() if not k.startswith("_") and k != "quantization_config"}
    return json.loads(json.dumps({"class": type(component).__name__, **public}, default=str))


def differences(mine: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Keys that both have, with different values; what only one has (of another library version) is let be."""
    return [key for key in mine if key in other and mine[key] != other[key]]
