"""A denoiser that is not called on skipped steps."""

from ertacache.pipelines.enabled import Enabled

DENOISERS = ("transformer", "transformer_2", "unet", "controlnet")  # attributes of a pipeline
DYNAMO = ("_torchdynamo_orig_callable", "_torchdynamo_wrapper_id")


class PlannedDenoiser:
    """Stands in for a denoiser of a pipeline, to which it delegates whatever is not defined here.

    On a skipped step of a call that follows a plan it returns what the last computed step returned for the same call,
    without a computation; the scheduler does not look at it. In all other cases it calls the denoiser. Nothing is
    hooked into the denoiser, which need not be an `nn.Module`. To `isinstance` its class is the denoiser's; `type()`
    distinguishes them.

    Args:
        module: The denoiser.
        enabled: Shared with the scheduler's stand-in.
    """

    def __init__(self, module, enabled: Enabled):
        vars(self).update(module=module, enabled=enabled, __module__=type(module).__module__)

    @property
    def __class__(self):
        return type(self.module)

    def __reduce__(self):
        return PlannedDenoiser, (self.module, self.enabled)

    def __getattr__(self, name: str):
        if name.startswith("__") and name.endswith("__") or name == "module":
            raise AttributeError(name)
        if name in DYNAMO:  # torch.compile of the stand-in compiles the denoiser
            return self.module if name == DYNAMO[0] else id(self)
        found = getattr(self.module, name)
        return (lambda context: found(self.enabled.context(context))) if name == "cache_context" else found

    def __setattr__(self, name: str, value) -> None:
        setattr(self.module, name, value)

    def __delattr__(self, name: str) -> None:
        delattr(self.module, name)

    def __dir__(self):
        return dir(self.module)

    def __repr__(self) -> str:
        return repr(self.module)

    def __call__(self, *args, **kwargs):
        course = self.enabled.course
        if course is None or course.step == course.steps:
            return self.module(*args, **kwargs)
        return course.outputs.of(course, self.module, args, kwargs)


def put_back(enabled: Enabled) -> None:
    """Put stand-ins before denoisers that the pipeline was given since, as `torch.compile` does."""
    pipe = enabled.pipe()
    if pipe is None or getattr(pipe.scheduler, "enabled", None) is not enabled:
        return
    for name in DENOISERS:
        part = getattr(pipe, name, None)
        if part is not None and type(part) is not PlannedDenoiser:
            setattr(pipe, name, PlannedDenoiser(part, enabled))
