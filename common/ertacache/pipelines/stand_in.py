"""Objects that stand in for a part of a pipeline: their class passes for the part's, also to `type()`."""

import functools


class EqualToItsOriginal(type):
    """Has the class of a stand-in equal that of the part, since `from_pipe` and some pipelines compare by `type()`."""

    def __eq__(cls, other) -> bool:
        return other is cls or other is vars(cls).get("stands_in_for")

    def __hash__(cls) -> int:
        return hash(vars(cls).get("stands_in_for", cls.__name__))


@functools.cache
def kind_for(base: type, kind: type) -> type:
    """Return the class of stand-ins for parts of a kind. base: of the stand-ins for any kind."""
    return EqualToItsOriginal(base.__name__, (base,), {"stands_in_for": kind})
