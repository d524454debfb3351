"""What the modes that rewrite calls of ``forward`` share: they answer some calls and count them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

from torch.overrides import TorchFunctionMode


def arguments(names: Sequence[str], args: Sequence[Any], kwargs: Mapping[str, Any]) -> dict[str, Any]:
    """A call's arguments by name; a method's ``self`` is called ``input``, as the function's first argument is."""
    given = dict(zip(names, args, strict=False)) | dict(kwargs)
    if "self" in given:
        given["input"] = given.pop("self")
    return given


class Rewriting(TorchFunctionMode):
    """Answers some of the calls made inside ``forward`` in another form; all others run as they are.

    Attributes:
        line: For the manifest, with {} in the place of the count.
        count: How many calls were answered.
    """

    line: ClassVar[str]

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None) -> Any:
        """Called by torch for every function."""
        kwargs = kwargs or {}
        made = self.answer(func, args, kwargs)
        if made is NotImplemented:
            return func(*args, **kwargs)
        self.count += 1
        return made

    def answer(self, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The call's result in the other form; NotImplemented for a call that is to run as it is."""
        raise NotImplementedError
