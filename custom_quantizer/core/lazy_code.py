"""Python code of graphs, written when somebody asks for it."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from threading import get_ident
from typing import Any, cast

from torch.fx import GraphModule
from torch.fx._lazy_graph_module import _LazyGraphModule
from torch.fx.graph import _PyTreeCodeGen

from custom_quantizer.core.exchange import exchanged
from custom_quantizer.core.threads import exclusive

__all__ = ["lazy_code"]

WRITTEN = ("forward", "_code", "_lineno_map", "_prologue_start")
"""What ``GraphModule.recompile`` (PyTorch 2.15) sets."""


@contextmanager
def lazy_code() -> Iterator[None]:
    """Write the Python code of a graph when it is called, or asked for its code.

    ``GraphModule.recompile`` writes a ``forward`` whenever a graph is made, copied or changed:
    some sixty times from a converted graph to a program, for graphs that nobody calls. That is a
    fifth to a third of a lowering. PyTorch has a class that waits (``_LazyGraphModule``), but
    upstream's passes make plain ones, so the method is exchanged, for this thread.

    A graph that outlives the block does what it does in it; only to be pickled it has to be
    recompiled before.
    """
    with (
        exclusive(),
        exchanged(GraphModule, "recompile", _LazyRecompile(GraphModule.recompile, get_ident())),
    ):
        yield


class _LazyRecompile:
    """In the place of ``GraphModule.recompile``: what it would set is set when it is read."""

    def __init__(self, write: Callable[[GraphModule], Any], thread: int) -> None:
        self._write = write
        self._thread = thread

    def __get__(self, module: GraphModule | None, owner: type) -> Callable[..., Any]:
        """As a function that is a method."""
        return self if module is None else lambda: self(module)

    def __call__(self, module: GraphModule) -> Any:
        """Recompile a module that this thread has, later."""
        if get_ident() != self._thread or isinstance(module, _LazyGraphModule):
            return self._write(module)
        codegen = module.graph._codegen
        if isinstance(codegen, _PyTreeCodeGen):
            module._in_spec = codegen.pytree_info.in_spec
            module._out_spec = codegen.pytree_info.out_spec
        for name in WRITTEN:
            module.__dict__.pop(name, None)
            # Each graph module has a class of its own (``GraphModule.__new__``).
            setattr(type(module), name, _LazyAttribute(module, name, self._write))
        return None


class _LazyAttribute:
    """An attribute of a graph module that has no code yet."""

    def __init__(self, module: GraphModule, name: str, write: Callable[[GraphModule], Any]) -> None:
        self._module = weakref.ref(module)  # the class would keep itself alive
        self._name = name
        self._write = write

    def __get__(self, module: GraphModule | None, owner: type) -> Any:
        """Write the code, which sets all these attributes."""
        for name in WRITTEN:
            if isinstance(vars(owner).get(name), _LazyAttribute):
                delattr(owner, name)
        self._write(cast(GraphModule, self._module()))
        return getattr(owner if module is None else module, self._name)
