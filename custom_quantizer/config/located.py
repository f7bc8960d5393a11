"""YAML and JSON as plain data that knows where in the file each part of it stands."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn, cast

import yaml

from custom_quantizer.core.files import printable, read_bytes
from custom_quantizer.errors import ConfigError, InputError, nearest

__all__ = [
    "MOST_BYTES",
    "MOST_CHARACTERS",
    "MOST_MISTAKES",
    "DataPath",
    "Document",
    "Mistake",
    "check_suffix",
    "read_document",
    "shown",
]

DataPath = tuple[str | int, ...]
"""Keys and indices that lead from the whole of the data to a part of it."""

_SUFFIXES = (".yaml", ".yml", ".json")

MOST_MISTAKES = 20
"""Mistakes that an error lists."""

MOST_BYTES = 2**18
"""Size of a config file: PyYAML takes a second for 100 KB."""

MOST_CHARACTERS = 1000
"""Length of a key or a value."""


@dataclass(frozen=True)
class Mistake:
    """What is wrong with the value at ``path``, or with its key."""

    path: DataPath
    text: str
    key: bool = False


@dataclass(frozen=True)
class Document:
    """Plain data, and where it stands.

    Attributes:
        name: of the file, as the user wrote it.
        data: dicts, lists and scalars.
        root: the YAML node of ``data``; ``None`` when there is no file.
    """

    name: str
    data: Any
    root: yaml.Node | None = None

    def source(self, path: DataPath) -> str | None:
        """``mixed.yaml:7`` for the key or item at ``path``; ``None`` without a file."""
        if self.root is None:
            return None
        return f"{self.name}:{_mark(self.root, path, key=True).line + 1}"

    def shown(self, path: DataPath) -> str:
        """The value at ``path`` as its author wrote it."""
        plain = self._plain_scalar(path)
        if plain is not None:
            return plain
        value = self.data
        for part in path:
            value = value[part]
        return shown(value)

    def quote_hint(self, path: DataPath) -> str:
        """Advice for a plain YAML scalar that was meant as text; else nothing."""
        plain = self._plain_scalar(path)
        return "" if plain is None else f'; write it in quotes: "{plain}"'

    def _plain_scalar(self, path: DataPath) -> str | None:
        node = None if self.root is None else _node(self.root, path)
        return node.value if isinstance(node, yaml.ScalarNode) and node.style is None else None

    def fail(
        self, mistakes: Sequence[Mistake], cause: Exception | None = None, total: int = 0
    ) -> NoReturn:
        """Raise one error that lists the mistakes in the order of the file.

        Args:
            mistakes: all, or the first of them.
            cause: what found them.
            total: how many there are, if these are not all.

        Raises:
            ConfigError: always.
        """
        placed: list[tuple[int, int, str]] = []
        for mistake in mistakes:
            line, column, where = 0, 0, self.name
            if self.root is not None:
                mark = _mark(self.root, mistake.path, key=mistake.key)
                line, column = mark.line + 1, mark.column + 1
                where = f"{self.name}:{line}:{column}"
            subject = _path_name(mistake.path)
            text = f"{subject}: {mistake.text}" if subject else mistake.text
            placed.append((line, column, f"{where}: {text}"))
        lines = [text for *_, text in sorted(placed, key=lambda item: item[:2])]
        _fail(self.name, lines, cause, total)


def shown(value: object) -> str:
    """A value as an error message shows it: short, and in the words of YAML and JSON."""
    if isinstance(value, (dict, list, tuple)):
        return "a mapping" if isinstance(value, dict) else "a list"
    if value is None or isinstance(value, bool):
        return json.dumps(value)
    text = repr(value)
    return text if len(text) <= 60 else f"{text[:57]}..."


def _fail(
    name: str, lines: Sequence[str], cause: Exception | None = None, total: int = 0
) -> NoReturn:
    lines = list(dict.fromkeys(map(printable, lines)))
    total = max(total, len(lines))
    if total == 1:
        raise ConfigError(lines[0]) from cause
    listed = lines[:MOST_MISTAKES]
    if total > len(listed):
        listed.append(f"... and {total - len(listed)} more")
    raise ConfigError("\n  ".join([f"{name} has {total} mistakes:", *listed])) from cause


def _path_name(path: DataPath) -> str:
    """``rules[1].scheme.weights``."""
    text = ""
    for part in path:
        text += f"[{part}]" if isinstance(part, int) else f".{part}" if text else part
    return text


def _node(root: yaml.Node, path: DataPath) -> yaml.Node:
    """The node of the value at ``path``, or of the innermost part of it that exists."""
    node = root
    for part in path:
        if isinstance(node, yaml.SequenceNode) and isinstance(part, int):
            node = node.value[part]
            continue
        entry = _entry(node, part)
        if entry is None:
            return node
        node = entry[1]
    return node


def _entry(node: yaml.Node, key: str | int) -> tuple[yaml.Node, yaml.Node] | None:
    if not isinstance(node, yaml.MappingNode):
        return None
    return next(((k, v) for k, v in node.value if _key(k) == key), None)


def _mark(root: yaml.Node, path: DataPath, *, key: bool) -> yaml.Mark:
    if key and path:
        entry = _entry(_node(root, path[:-1]), path[-1])
        if entry is not None:
            return cast(yaml.Mark, entry[0].start_mark)
    return cast(yaml.Mark, _node(root, path).start_mark)


# -- reading ------------------------------------------------------------------------------------


def check_suffix(path: Path) -> None:
    """Refuse what is neither YAML nor JSON by its name.

    Raises:
        InputError: with the legal suffixes.
    """
    if path.suffix.lower() not in _SUFFIXES:
        raise InputError(
            f"{path}: a config file is YAML or JSON, and its name ends in {', '.join(_SUFFIXES)}"
        )


def read_document(source: str | os.PathLike[str], *, if_empty: str) -> Document:
    """Read a ``.yaml``, ``.yml`` or ``.json`` file.

    Args:
        source: its path.
        if_empty: advice for an empty file.

    Raises:
        ConfigError: it is not YAML, or not JSON, or has keys twice; with line and column.
        InputError: it cannot be read.
    """
    path = Path(source)
    name = os.fspath(path)
    check_suffix(path)
    if not path.exists():
        raise _missing(path)
    try:
        text = read_bytes(path, MOST_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError as exc:
        line = exc.object[: exc.start].count(b"\n") + 1
        raise ConfigError(f"{name}:{line}: not UTF-8 text; save the file as UTF-8") from exc
    try:
        if path.suffix.lower() == ".json":
            # YAML reads JSON except for tabs, which in valid JSON never stand inside a string.
            json.loads(text)
            text = text.replace("\t", " ")
        root, data, mistakes = _compose(text)
    except json.JSONDecodeError as exc:
        raise ConfigError(f"{name}:{exc.lineno}:{exc.colno}: not JSON: {exc.msg}") from exc
    except yaml.MarkedYAMLError as exc:
        raise ConfigError(f"{name}:{_syntax(exc, text)}") from exc
    except ValueError as exc:
        raise ConfigError(f"{name}: a number in it has thousands of digits") from exc
    except yaml.reader.ReaderError as exc:
        line = text.count("\n", 0, exc.position) + 1
        raise ConfigError(f"{name}:{line}: not YAML: character {chr(exc.character)!r}") from exc
    except RecursionError as exc:
        raise ConfigError(f"{name}: nested too deeply to be a config file") from exc
    if root is None:
        raise ConfigError(f"{name}:1:1: the file is empty; {if_empty}")
    if mistakes:
        _fail(name, [f"{name}:{m.line + 1}:{m.column + 1}: {text}" for m, text in mistakes])
    return Document(name, data, root)


def _missing(path: Path) -> InputError:
    try:
        there = [other.name for other in path.parent.iterdir() if _is_config(other)]
    except (OSError, ValueError):
        return InputError(f"Cannot read {path}: there is no directory {path.parent}")
    return InputError(f"Cannot read {path}: there is no such file{nearest(path.name, there)}")


def _is_config(path: Path) -> bool:
    return path.suffix.lower() in _SUFFIXES and path.is_file()


_Marked = list[tuple[yaml.Mark, str]]


def _compose(text: str) -> tuple[yaml.Node | None, Any, _Marked]:
    """Parse YAML into nodes, which know their place, into plain data, and into mistakes."""
    loader = yaml.SafeLoader(text)
    try:
        root = loader.get_single_node()
        reader = _Reader(loader)
        data = None if root is None else reader.plain(root)
        return root, data, reader.mistakes
    finally:
        loader.dispose()


class _Reader:
    """Turns nodes into plain data; collects what YAML allows but would only be an accident."""

    def __init__(self, loader: yaml.SafeLoader) -> None:
        self.mistakes: _Marked = []
        self._loader = loader
        self._done: dict[int, Any] = {}  # an alias is its anchor's node: read once
        self._open: set[int] = set()

    def plain(self, node: yaml.Node) -> Any:
        if id(node) not in self._done:
            if id(node) in self._open:
                self._add(node, "this anchor contains itself")
                return None
            self._open.add(id(node))
            self._done[id(node)] = self._plain(node)
            self._open.discard(id(node))
        return self._done[id(node)]

    def _plain(self, node: yaml.Node) -> Any:
        if isinstance(node, yaml.MappingNode):
            return self._mapping(node)
        if isinstance(node, yaml.SequenceNode):
            return [self.plain(item) for item in node.value]
        if len(node.value) > MOST_CHARACTERS:
            self._add(
                node, f"{len(node.value):,} characters, and at most {MOST_CHARACTERS:,} are read"
            )
            return None
        try:
            value = self._loader.construct_object(node)
        except yaml.MarkedYAMLError:
            raise
        # A tag that does not fit its text (!!bool maybe) is a KeyError, AttributeError, IndexError.
        except Exception:
            self._add(node, f"{node.value} is not a legal {node.tag.rpartition(':')[2]}")
            return None
        return _join_surrogates(value) if isinstance(value, str) else value

    def _mapping(self, node: yaml.MappingNode) -> dict[str, Any]:
        result: dict[str, Any] = {}
        first: dict[str, yaml.Node] = {}
        for key_node, value_node in node.value:
            key = _key(key_node)
            if key is None:
                self._add(key_node, "a key must be a word")
                continue
            if len(key) > MOST_CHARACTERS:
                self._add(key_node, f"a key has at most {MOST_CHARACTERS:,} characters")
                continue
            if key in first:
                line = first[key].start_mark.line + 1
                self._add(key_node, f"the key {key!r} is already in line {line}")
            elif key_node.tag == "tag:yaml.org,2002:merge":
                self._add(key_node, "merge keys (<<) are not read; write the keys out")
            elif isinstance(value_node, yaml.ScalarNode) and _is_blank(value_node):
                self._add(key_node, f"{key!r} has no value; write one (or null), or leave it out")
            first.setdefault(key, key_node)
            result[key] = self.plain(value_node)
        return result

    def _add(self, node: yaml.Node, text: str) -> None:
        self.mistakes.append((node.start_mark, text))


def _key(node: yaml.Node) -> str | None:
    """A key as written: ``0: a8`` has the key ``"0"``, whatever YAML 1.1 makes of it."""
    return _join_surrogates(node.value) if isinstance(node, yaml.ScalarNode) else None


def _is_blank(node: yaml.ScalarNode) -> bool:
    """Nothing is written, which YAML reads as null: too easily an accident to mean "float"."""
    return node.style is None and not node.value


def _join_surrogates(text: str) -> str:
    r"""JSON may write a character above U+FFFF as two escapes, which YAML takes for two."""
    if text.isascii():
        return text
    return text.encode("utf-16-le", "surrogatepass").decode("utf-16-le", "replace")


def _syntax(exc: yaml.MarkedYAMLError, text: str) -> str:
    mark = exc.problem_mark or exc.context_mark
    line, column = (mark.line, mark.column) if mark is not None else (0, 0)
    lines = text.splitlines()
    written = lines[line] if line < len(lines) else ""
    what, hint = str(exc.problem or exc.context), ""
    if re.search(r"[:\-]\s+\*", written):
        hint = '; a glob that begins with * stands in quotes: "*.conv1"'
    elif "\t" in written:
        hint = "; indent with spaces, not tabs"
    elif "single document" in str(exc.context):
        what, hint = "a second document begins here", "; a config file is one document"
    return f"{line + 1}:{column + 1}: not YAML: {what}{hint}"
