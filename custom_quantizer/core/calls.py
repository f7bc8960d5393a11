"""How a captured graph is called: its arguments, what they nest, and the order of its placeholders.

All that takes inputs asks here: data of a calibration and an evaluation, examples, programs,
references. PyTorch flattens a dictionary in the order in which its keys were written, so only what
capture recorded says which tensor is which.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, cast

import torch.utils._pytree as pytree
from torch import Tensor
from torch.fx import GraphModule

from custom_quantizer.core.batch import Batch
from custom_quantizer.core.graph import why_lifted
from custom_quantizer.errors import InputError

__all__ = ["CallForm"]


@dataclass(frozen=True, eq=False)
class CallForm:
    """The arguments of a captured graph.

    Attributes:
        count: placeholders.
        names: of the arguments, positional ones first; empty where they are not known.
        structure: how ``(args, kwargs)`` nest tensors; ``None`` where the graph takes them flat.
    """

    count: int
    names: tuple[str, ...] = ()
    structure: Any = field(default=None, repr=False)

    @classmethod
    def of(cls, model: GraphModule) -> CallForm:
        """Read it off what ``torch.export`` recorded in ``model``.

        Raises:
            InputError: weights are inputs of the graph.
        """
        if lifted := why_lifted(model):
            raise InputError(lifted)
        inputs = [node.name for node in model.graph.nodes if node.op == "placeholder"]
        info = getattr(model.graph._codegen, "pytree_info", None)
        if info is None:
            return cls(len(inputs), tuple(inputs))
        return cls(len(inputs), tuple(info.orig_args), info.in_spec)

    @property
    def keys(self) -> frozenset[Any]:
        """Names of the arguments, and the keys of a dictionary that is the only one."""
        if self.structure is None or len(self.names) != 1:
            return frozenset(self.names)
        only = next(spec for side in self.structure.children() for spec in side.children())
        return frozenset((*self.names, *(_keys(only) or ())))

    def arguments(self, values: Iterable[Any]) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """Positional and keyword arguments from one value per placeholder."""
        if self.structure is None:
            return tuple(values), {}
        args, kwargs = pytree.tree_unflatten(values, self.structure)
        return tuple(args), dict(kwargs)

    def flat(self, inputs: tuple[Any, ...], named: Mapping[str, Any] | None = None) -> list[Any]:
        """The inputs of one call in the order of the placeholders; their number is left open.

        Args:
            inputs: positional inputs; those captured by keyword may stand here too, in their
                order, and so may one value for each placeholder.
            named: inputs by keyword.

        Raises:
            InputError: the keywords, or the keys of a dictionary, are not those of capture.
        """
        if named:
            return self._called(inputs, named)
        values = self._nested(inputs)
        if values is None:
            values = pytree.tree_leaves(inputs)
            if _has_dictionary(pytree.tree_structure(inputs)):
                raise InputError(
                    f"the inputs are nested as {_shown(inputs)}, and the model takes "
                    f"{self._wanted()}: give them as torch.export.export got them"
                )
        return values

    def sort(self, batch: object) -> list[Any] | str:
        """A batch of data in the order of the placeholders, or what is wrong with it.

        Args:
            batch: a tensor; a tuple or list of arguments; ``(args, kwargs)``; a dictionary by the
                names of arguments, or the only argument itself, which may have keys more; or a
                pair of any of these and labels.
        """
        if isinstance(batch, Batch):
            batch = batch.inputs
        if isinstance(batch, Mapping):
            return self._by_name(batch)
        inputs = tuple(batch) if isinstance(batch, (tuple, list)) else (batch,)
        values = self._positional(inputs)
        # Inputs and labels, as data loaders give them.
        if (
            isinstance(values, str)
            and len(inputs) == 2
            and not isinstance(first := self.sort(inputs[0]), str)
        ):
            return first
        return values

    def calls(self, inputs: Any) -> list[list[Any]]:
        """One value per placeholder for each of several calls.

        Args:
            inputs: of one call: a tensor, or a tuple or dictionary of what :meth:`sort` takes; or
                an iterable of these.

        Raises:
            InputError: they are no inputs of this graph.
        """
        if isinstance(inputs, (Tensor, Mapping)):
            return [self._call(inputs)]
        if isinstance(inputs, tuple):
            one = self._positional(inputs)
            if not isinstance(one, str):
                return [one]
            if any(isinstance(value, Tensor) for value in inputs):
                return [self._call(inputs)]
        if isinstance(inputs, (str, bytes)) or not isinstance(inputs, Iterable):
            raise InputError(
                f"inputs are those of one call, or an iterable of them, not {type(inputs).__name__}"
            )
        return [self._call(batch) for batch in inputs]

    def _call(self, batch: object) -> list[Any]:
        values = self.sort(batch)
        if not isinstance(values, str):
            return values
        given = len(pytree.tree_leaves(batch))
        if isinstance(batch, Mapping) or given == self.count:
            raise InputError(f"the input {values}")
        raise InputError(f"the program takes {self.count} inputs, got {given}")

    def _called(self, inputs: tuple[Any, ...], named: Mapping[str, Any]) -> list[Any]:
        known = [] if self.structure is None else list(self.structure.child(1).context)
        if set(named) != set(known):
            raise InputError(
                f"the model takes {', '.join(known) or 'no inputs'} by keyword, got "
                f"{', '.join(named)}: give each input the way torch.export.export got it"
            )
        values = _ordered(self.structure, (inputs, named))
        if values is None:
            values = [*self.flat(inputs), *pytree.tree_leaves([named[name] for name in known])]
        return values

    def _nested(self, inputs: tuple[Any, ...], extra: bool = False) -> list[Any] | None:
        """Values of arguments that nest as those of capture do; ``None``: they do not."""
        if self.structure is None:
            return None
        args, kwargs = self.structure.children()
        named = tuple(inputs[args.num_children :])
        forms: list[tuple[Any, Any]] = []
        if len(named) == kwargs.num_children:
            forms.append(
                (inputs[: args.num_children], dict(zip(kwargs.context, named, strict=True)))
            )
        if len(inputs) == 2 and isinstance(inputs[0], (tuple, list)):
            forms.append(inputs)  # (args, kwargs)
        for form in forms:
            values = _ordered(self.structure, form, extra)
            if values is not None:
                return values
        return None

    def _positional(self, inputs: tuple[Any, ...]) -> list[Any] | str:
        values = self._nested(inputs, extra=True)
        if values is not None:
            return values
        values = pytree.tree_leaves(inputs)
        if len(values) != self.count:
            return f"holds {len(values)} values where the graph takes {self.count}"
        if _has_dictionary(pytree.tree_structure(inputs)):
            return f"is nested as {_shown(inputs)} where the graph takes {self._wanted()}"
        return values

    def _by_name(self, batch: Mapping[Any, Any]) -> list[Any] | str:
        if self.structure is not None and len(self.names) == 1:
            values = self._nested((batch,), extra=True)
            if values is not None:
                return values
        if not self.names:
            return "is a dictionary, and the names of inputs are not known: give a tuple of them"
        if missing := [name for name in self.names if name not in batch]:
            given = ", ".join(map(str, batch)) or "no keys"
            return f"has no {' and no '.join(missing)}, only {given}"
        return self._positional(tuple(batch[name] for name in self.names))

    def _wanted(self) -> str:
        """What the graph takes, nested, with names of arguments in the place of tensors."""
        if self.structure is None:
            return f"{self.count} inputs"
        args, kwargs = self.structure.children()
        parts = [_pattern(child) for child in args.children()]
        parts += [
            f"{name}={_pattern(child)}"
            for name, child in zip(kwargs.context, kwargs.children(), strict=True)
        ]
        return f"({', '.join(parts)})"


_DICTIONARIES = (dict, defaultdict)


def _keys(spec: Any) -> list[Any] | None:
    """Keys of a dictionary in the order of its values; ``None`` for what is none."""
    if not (isinstance(spec.type, type) and issubclass(spec.type, _DICTIONARIES)):
        return None
    return list(spec.context[1] if spec.type is defaultdict else spec.context)


def _has_dictionary(spec: Any) -> bool:
    return _keys(spec) is not None or any(map(_has_dictionary, spec.children()))


def _ordered(spec: Any, value: Any, extra: bool = False) -> list[Any] | None:
    """The leaves of ``value`` in the order of ``spec``; ``None``: it nests otherwise.

    Lists and tuples stand for each other.

    Args:
        spec: of capture.
        value: what is given.
        extra: whether dictionaries may have keys more.
    """
    if spec.is_leaf():
        return None if isinstance(value, (tuple, list, Mapping)) else [value]
    keys = _keys(spec)
    given: list[Any]
    if keys is not None:
        if not isinstance(value, Mapping) or not all(key in value for key in keys):
            return None
        if len(value) != len(keys) and not extra:
            return None
        given = [value[key] for key in keys]
    elif spec.type in (tuple, list):
        if not isinstance(value, (tuple, list)) or len(value) != spec.num_children:
            return None
        given = list(value)
    else:  # a type of the user's
        leaves, structure = pytree.tree_flatten(value)
        return leaves if structure == spec else None
    found: list[Any] = []
    for child, part in zip(spec.children(), given, strict=True):
        values = _ordered(child, part, extra)
        if values is None:
            return None
        found += values
    return found


def _pattern(spec: Any) -> str:
    """A structure in words: ``*`` is a tensor or number."""
    if spec.is_leaf():
        return "*"
    parts = list(map(_pattern, spec.children()))
    keys = _keys(spec)
    if keys is not None:
        shown = (f"{key!r}: {part}" for key, part in zip(keys, parts, strict=True))
        return f"{{{', '.join(shown)}}}"
    if spec.type is tuple:
        return f"({', '.join(parts)}{',' * (len(parts) == 1)})"
    name = "" if spec.type is list else getattr(spec.type, "__name__", "")
    return f"{name}[{', '.join(parts)}]"


def _shown(inputs: Any) -> str:
    return _pattern(cast(Any, pytree.tree_structure(inputs)))
