"""Elements of HTML and SVG whose texts and attributes are escaped by construction."""

from __future__ import annotations

from collections.abc import Iterable

from markupsafe import Markup, escape

__all__ = ["element", "number"]


def number(value: float) -> str:
    """A coordinate with at most two decimals."""
    text = f"{value:.2f}".rstrip("0").rstrip(".")
    return "0" if text in ("", "-0") else text


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element with its end tag.

    Args:
        name: of the element.
        children: ``Markup`` is taken as it is, an iterable of children one by one, ``None`` is
            left out, and any other value is escaped text.
        attributes: a trailing ``_`` is cut off and each other ``_`` is a ``-``: ``class_``,
            ``data_op``. Floats are written as coordinates, and ``None`` is left out.
    """
    pairs = (
        f' {key.rstrip("_").replace("_", "-")}="{escape(_attribute(value))}"'
        for key, value in attributes.items()
        if value is not None
    )
    inside = "".join(_flat(children))
    return Markup(f"<{name}{''.join(pairs)}>{inside}</{name}>")  # all parts are escaped


def _attribute(value: object) -> object:
    return number(value) if isinstance(value, float) else value


def _flat(children: Iterable[object]) -> Iterable[str]:
    for child in children:
        if child is None:
            continue
        if isinstance(child, str) or not isinstance(child, Iterable):
            yield escape(child)
        else:
            yield from _flat(child)
