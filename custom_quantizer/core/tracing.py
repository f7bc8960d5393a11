"""What a call of a graph is made of, traced on its fake values alone."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, cast

import torch
from torch import Tensor
from torch.fx import GraphModule, Node
from torch.fx.experimental.proxy_tensor import make_fx
from torch.fx.node import map_arg

__all__ = ["parts_of"]


def parts_of(
    call: Node, table: Mapping[Any, Any], *, pre_dispatch: bool = False
) -> GraphModule | None:
    """What a call of one result becomes; ``None`` if that is more than calls, or nothing.

    Args:
        call: all that it reads are tensors.
        table: how ops are decomposed.
        pre_dispatch: as ``torch.export`` captures it: composite ops that are not in the table stay
            whole, and what writes into new memory is still a write.

    Returns:
        A graph whose placeholders stand for ``call.all_input_nodes``, in their order, and whose
        calls return one tensor each.
    """
    sources, value = call.all_input_nodes, call.meta.get("val")
    values = [source.meta.get("val") for source in sources]
    if not sources or not all(isinstance(given, Tensor) for given in (value, *values)):
        return None

    def apply(*given: Tensor) -> Any:
        args, kwargs = cast(
            Any,
            map_arg((call.args, call.kwargs), dict(zip(sources, given, strict=True)).__getitem__),
        )
        return cast(Any, call.target)(*args, **kwargs)

    with torch.no_grad(), cast(Any, value).fake_mode:
        traced = make_fx(apply, decomposition_table=cast(Any, table), pre_dispatch=pre_dispatch)(
            *values
        )
    traced.graph.eliminate_dead_code()
    *calls, output = [node for node in traced.graph.nodes if node.op != "placeholder"]
    plain = all(_is_plain(node, writes=pre_dispatch) for node in calls)
    return traced if plain and output.all_input_nodes[0] in calls else None


def _is_plain(node: Node, *, writes: bool) -> bool:
    """Whether a node is a call of an op that returns one tensor, and writes into none."""
    target = node.target
    return (
        node.op == "call_function"
        and isinstance(target, torch._ops.OpOverload)
        and (writes or not target._schema.is_mutable)
        and isinstance(node.meta.get("val"), Tensor)
    )
