"""Tables of a program's constants that are made once, not for every node.

``ExportGraphSignature`` (torch 2.15) makes ``inputs_to_parameters``, ``inputs_to_buffers``,
``inputs_to_lifted_tensor_constants``, ``non_persistent_buffers`` and ``user_inputs`` anew whenever
they are read, and ExecuTorch reads them for every node that its partitioner, its passes and its
serializer look at: their time grows with the square of the number of layers.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any, cast

from torch.export import ExportedProgram, ExportGraphSignature
from torch.export.graph_signature import InputSpec

__all__ = ["RememberingSignature", "remember_constants"]

_TABLES = "_tables"
Table = Mapping[str, str]


class _Watched(list[InputSpec]):
    """A list that counts the changes that its length does not show."""

    changes = 0

    def __setitem__(self, *args: Any) -> None:
        super().__setitem__(*args)
        self.changes += 1


class RememberingSignature(ExportGraphSignature):
    """A signature that keeps its tables until its inputs change.

    They change where the list is exchanged (``_unsafe_adjust_original_program`` and the pass that
    copies constants do), where it gets longer or shorter (``create_constant_placeholder``), where
    one of its items is exchanged, and where an input is renamed by ``replace_all_uses``.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        """Forget the tables of other inputs."""
        super().__setattr__(name, _Watched(value) if name == "input_specs" else value)
        self.__dict__.pop(_TABLES, None)

    def __getstate__(self) -> dict[str, Any]:
        """Copies make tables of their own: a mapping that nobody may change has no copy."""
        return {name: value for name, value in self.__dict__.items() if name != _TABLES}

    def replace_all_uses(self, old: str, new: str) -> None:
        """Rename an input or output."""
        super().replace_all_uses(old, new)
        self.__dict__.pop(_TABLES, None)

    def _remembered(self, name: str) -> Any:
        tables: dict[tuple[str, int, int], Any] = self.__dict__.setdefault(_TABLES, {})
        specs = cast(_Watched, self.input_specs)
        key = name, len(specs), specs.changes
        if key not in tables:
            tables[key] = getattr(super(), name)
        return tables[key]

    @property
    def inputs_to_parameters(self) -> Table:
        """Names of parameters, by placeholder."""
        return cast(Table, self._remembered("inputs_to_parameters"))

    @property
    def inputs_to_buffers(self) -> Table:
        """Names of buffers, by placeholder."""
        return cast(Table, self._remembered("inputs_to_buffers"))

    @property
    def inputs_to_lifted_tensor_constants(self) -> Table:
        """Names of other constants, by placeholder."""
        return cast(Table, self._remembered("inputs_to_lifted_tensor_constants"))

    @property
    def non_persistent_buffers(self) -> Collection[str]:
        """Names of buffers that are not in the state dict."""
        return cast(Collection[str], self._remembered("non_persistent_buffers"))

    @property
    def user_inputs(self) -> Collection[int | float | bool | str | None]:
        """Names of placeholders of inputs, and inputs that are numbers."""
        return cast(Collection[str], self._remembered("user_inputs"))


def remember_constants(program: ExportedProgram) -> None:
    """Give a program a :class:`RememberingSignature` of the same specs."""
    signature = program.graph_signature
    if not isinstance(signature, RememberingSignature):
        program._graph_signature = RememberingSignature(
            signature.input_specs, signature.output_specs
        )
