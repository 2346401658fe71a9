"""A denoiser that is not called on skipped steps."""

from ertacache.pipelines.enabled import Enabled
from ertacache.pipelines.stand_in import EqualToItsOriginal, kind_for
from ertacache.utils.denoisers import DENOISERS

SKIPPED = (*DENOISERS, "controlnet")  # attributes of a pipeline whose calls a plan skips
DYNAMO = ("_torchdynamo_orig_callable", "_torchdynamo_wrapper_id")


class PlannedDenoiser(metaclass=EqualToItsOriginal):
    """Stands in for a denoiser of a pipeline, to which it delegates whatever is not defined here.

    On a skipped step of a call that follows a plan it returns what the last computed step returned for the same call,
    without a computation; the scheduler does not look at it. In all other cases it calls the denoiser. Nothing is
    hooked into the denoiser, which need not be an `nn.Module`. To `isinstance` its class is the denoiser's;
    `is_stand_in` distinguishes them.

    Args:
        denoiser: What it stands in for.
        enabled: Shared with the scheduler's stand-in.
    """

    def __new__(cls, denoiser, enabled: Enabled):
        return super().__new__(kind_for(PlannedDenoiser, type(denoiser)))

    def __init__(self, denoiser, enabled: Enabled):
        vars(self).update(_denoiser=denoiser, _enabled=enabled, __module__=type(denoiser).__module__)

    @property
    def __class__(self):
        return type(self._denoiser)

    def __reduce__(self):
        return PlannedDenoiser, (self._denoiser, self._enabled)

    def __getattr__(self, name: str):
        if (name.startswith("__") and name.endswith("__")) or name == "_denoiser":
            raise AttributeError(name)
        if name in DYNAMO:  # torch.compile of the stand-in compiles the denoiser
            return self._denoiser if name == DYNAMO[0] else id(self)
        if name == "cache_context" and hasattr(self._denoiser, name):
            return self._cache_context
        return getattr(self._denoiser, name)

    def __setattr__(self, name: str, value) -> None:
        setattr(self._denoiser, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self._denoiser, name)

    def __dir__(self):
        return dir(self._denoiser)

    def __repr__(self) -> str:
        return repr(self._denoiser)

    def __call__(self, *args, **kwargs):
        course = self._enabled.course
        if course is None or not course.takes(args, kwargs):
            return self._denoiser(*args, **kwargs)
        if course.step is None:
            self._enabled.look(course, args, kwargs)
        return course.outputs.of(course, self._denoiser, args, kwargs)

    def _cache_context(self, name: str, **where):
        return self._denoiser.cache_context(self._enabled.context(name), **where)


def put_back(enabled: Enabled) -> None:
    """Put stand-ins before denoisers that the pipeline was given since, as `torch.compile` does; or another plan's."""
    pipe = enabled.pipe()
    if pipe is None or getattr(pipe.scheduler, "enabled", None) is not enabled:
        return
    for name in SKIPPED:
        part = getattr(pipe, name, None)
        stands_in = is_stand_in(part)
        if part is None or (stands_in and part._enabled is enabled):
            continue
        setattr(pipe, name, PlannedDenoiser(part._denoiser if stands_in else part, enabled))


def is_stand_in(part) -> bool:
    """Return whether a part of a pipeline is a stand-in for a denoiser."""
    return issubclass(type(part), PlannedDenoiser)
