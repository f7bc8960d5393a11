"""Pages of reports, read as a program reads them."""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

VOID = frozenset({"meta", "br", "input"})


@dataclass
class Element:
    tag: str
    attributes: dict[str, str]
    children: list[Element | str] = field(default_factory=list)

    @property
    def text(self) -> str:
        """All of it, without markup."""
        return "".join(c if isinstance(c, str) else c.text for c in self.children)

    def all(self, tag: str, **wanted: str) -> list[Element]:
        """Elements below it: ``all("g", class_="box")`` finds those of that class, among others."""
        found = []
        for child in self.children:
            if isinstance(child, Element):
                if child.tag == tag and all(
                    value in child.attributes.get(key.rstrip("_").replace("_", "-"), "").split()
                    for key, value in wanted.items()
                ):
                    found.append(child)
                found += child.all(tag, **wanted)
        return found

    def one(self, tag: str, **wanted: str) -> Element:
        (found,) = self.all(tag, **wanted)
        return found


class _Reader(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Element("", {})
        self.open = [self.root]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        element = Element(tag, {key: value or "" for key, value in attrs})
        self.open[-1].children.append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag

    def handle_data(self, data: str) -> None:
        self.open[-1].children.append(data)


def page_of(text: str) -> Element:
    """The root of a page, in which every element is closed by its own end tag."""
    reader = _Reader()
    reader.feed(text)
    reader.close()
    assert reader.open == [reader.root]
    return reader.root


def details_of(body: Element) -> dict[str, list[str]]:
    """Label -> texts of an op."""
    found: dict[str, list[str]] = {}
    parts = body.one("dl").children
    for label, value in zip(parts[::2], parts[1::2], strict=True):
        assert isinstance(label, Element)
        assert isinstance(value, Element)
        found.setdefault(label.text, []).append(value.text)
    return found
