"""Write what is generated from the config format: its JSON schema, and the tables of config.md.

Run it after a change of the format: ``python docs/make_config_reference.py``. A test fails while
the files are out of date.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from custom_quantizer.config import file as config_file
from custom_quantizer.core.files import write_text_atomic

ROOT = Path(__file__).resolve().parent.parent
SCHEMA_FILE = ROOT / "custom_quantizer" / "config.schema.json"
REFERENCE_FILE = ROOT / "docs" / "config.md"
BEGIN, END = "<!-- generated: begin -->\n", "<!-- generated: end -->\n"


def schema_text() -> str:
    return json.dumps(config_file.json_schema(), indent=2) + "\n"


def reference_text(current: str) -> str:
    """``current`` with fresh tables between the markers."""
    before, rest = current.split(BEGIN)
    _, after = rest.split(END)
    return before + BEGIN + tables(config_file.json_schema()) + END + after


def tables(schema: dict[str, Any]) -> str:
    parts = [table("The file", schema, schema)]
    parts += [table(f"A {part['title']}", part, schema) for part in schema["$defs"].values()]
    return "\n".join(parts)


def table(title: str, part: dict[str, Any], schema: dict[str, Any]) -> str:
    lines = [f"### {title}", "", "| key | value | default | meaning |", "| --- | --- | --- | --- |"]
    for key, value in part["properties"].items():
        default = "required" if key in part.get("required", ()) else ""
        if "default" in value:
            default = f"`{json.dumps(value['default'])}`".replace('"', "")
        lines.append(f"| `{key}` | {kind(value, schema)} | {default} | {value['description']} |")
    return "\n".join([*lines, ""])


def kind(value: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a value may be, in words."""
    if "$ref" in value:
        return kind(schema["$defs"][value["$ref"].rpartition("/")[2]], schema)
    if "title" in value:
        return str(value["title"])
    if "const" in value:
        return f"`{value['const']}`"
    if "enum" in value:
        return ", ".join(f"`{word}`" for word in value["enum"])
    for union in ("anyOf", "oneOf"):
        if union in value:
            return " or ".join(kind(choice, schema) for choice in value[union])
    if value["type"] == "integer":
        low, high = value["minimum"], value.get("maximum")
        return f"integer, {low} or more" if high is None else f"integer, {low} to {high}"
    if value["type"] == "array":
        return f"list of {kind(value['items'], schema)}s"
    if value["type"] == "object":
        return "mapping from names to formats"
    return {"boolean": "`true`, `false`", "string": "text", "null": "`null`"}[value["type"]]


def main() -> None:
    write_text_atomic(SCHEMA_FILE, schema_text())
    write_text_atomic(REFERENCE_FILE, reference_text(REFERENCE_FILE.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
