"""The rules of a quantizer as a YAML or JSON file.

A file says what the setters of ``IntegerQuantizer`` say, under the same names. Reading one either
gives a :class:`~custom_quantizer.config.rules.Config` or an error that lists every mistake with
file, line and column. The pydantic models below are the format: the JSON schema and the reference
in ``docs/config.md`` are generated from them.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Any, Literal, cast

import yaml
from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Discriminator,
    Field,
    Tag,
    ValidationError,
    WithJsonSchema,
    model_validator,
)
from pydantic.json_schema import GenerateJsonSchema
from pydantic_core import CoreSchema, ErrorDetails, PydanticCustomError

from custom_quantizer.config.improvement import (
    ACCURACIES,
    ALGORITHMS,
    check_accuracy,
    check_algorithms,
)
from custom_quantizer.config.located import (
    MOST_CHARACTERS,
    MOST_MISTAKES,
    DataPath,
    Document,
    Mistake,
    check_suffix,
    read_document,
    shown,
)
from custom_quantizer.config.rules import (
    BORDER_KINDS,
    Config,
    Rule,
    Scope,
    border_kind,
    operator_names,
)
from custom_quantizer.core.files import write_text_atomic
from custom_quantizer.core.schemes import (
    COMMON_SCHEMES,
    FORMAT_PATTERN,
    OBSERVERS,
    PERCENTILE_PATTERN,
    SCHEME_PATTERN,
    Granularity,
    OpScheme,
    TensorScheme,
    activation_scheme,
    observer_name,
    scheme,
)
from custom_quantizer.errors import ConfigError, SchemeError, nearest

__all__ = ["FORMAT_VERSION", "dump_config", "json_schema", "load_config", "save_config"]

FORMAT_VERSION = 1
"""Version of the file format that is read and written."""

MOST_RULES = 10_000
"""Rules that a file may have."""

MOST_FORMATS = 1_000
"""Inputs, or outputs, that a file may name."""

_BEGIN = f"begin with `version: {FORMAT_VERSION}`"

# -- names of schemes and formats ---------------------------------------------------------------


def _parse_scheme(name: str) -> OpScheme:
    """Parse ``name``; an error also says which name it is about."""
    try:
        return scheme(name)
    except SchemeError as exc:
        text = str(exc)
        raise SchemeError(text if repr(name) in text else f"{name!r}: {text}") from None


def _parse_format(name: str) -> TensorScheme:
    """Parse ``a8``, ``a16-histogram``; an error also says what it may have been meant to be."""
    try:
        return activation_scheme(name)
    except SchemeError as exc:
        half = re.match(r"a\d+(?=w\d)", name)
        hint = f"; did you mean {half[0]}?" if half else nearest(name, ("a4", "a8", "a16"))
        raise SchemeError(f"{exc}{hint}") from None


def _format_name(fmt: TensorScheme) -> str:
    """The name that :func:`_parse_format` reads.

    Raises:
        ConfigError: no name says all of ``fmt``.
    """
    name = replace(scheme("a8w8"), activation=fmt).name.replace("w8", "", 1)
    if _parse_format(name) != fmt:
        raise ConfigError(f"{fmt} cannot be written to a file: {name!r} would lose a part of it")
    return name


def _scheme_name(value: OpScheme | None) -> str | None:
    if value is None:
        return None
    if scheme(value.name) != value:
        raise ConfigError(
            f"{value!r} cannot be written to a file: its name {value.name!r} does not say all of it"
        )
    return value.name


# -- the format ---------------------------------------------------------------------------------


def _problem(exc: ConfigError) -> PydanticCustomError:
    return PydanticCustomError("custom_quantizer", "{text}", {"text": str(exc)})


def _parsed_by(parse: Callable[[Any], object]) -> AfterValidator:
    """The value is what ``parse`` makes of it; its error becomes the error of the field."""

    def parsed(value: Any) -> object:
        try:
            return parse(value)
        except ConfigError as exc:
            raise _problem(exc) from None

    return AfterValidator(parsed)


def _parse_observer(name: str) -> str:
    try:
        return observer_name(name)
    except SchemeError as exc:
        raise ConfigError(f"{exc}{nearest(name, OBSERVERS)}") from None


def _check_operator(name: str) -> str:
    (known,) = operator_names(name)
    return known


def _check_bias(value: object) -> object:
    if value == "float" or (type(value) is int and 4 <= value <= 32):
        return value
    raise _problem(ConfigError(f"must be 4 to 32 bits or the word float, not {shown(value)}"))


_BORDER_DTYPES = BORDER_KINDS[1:-1]


def _parse_border(value: object) -> str:
    try:
        return border_kind(value)
    except ConfigError as exc:
        raise _problem(exc) from None


def _kind(value: object) -> str | None:
    """Whether a value is a name or a mapping; ``None`` for all else."""
    if isinstance(value, (dict, BaseModel)):
        return "mapping"
    return "name" if isinstance(value, str) else None


def _without_default(schema: dict[str, Any]) -> None:
    """For fields whose absence means something that no value says."""
    schema.pop("default")


def _choices(names: Sequence[str]) -> Callable[[dict[str, Any]], None]:
    """For a name, or a list of names, one of these, without a default."""

    def only(schema: dict[str, Any]) -> None:
        _without_default(schema)
        (kind,) = (entry for entry in schema.pop("anyOf") if entry["type"] != "null")
        schema.update(kind)
        schema.get("items", schema)["enum"] = list(names)

    return only


class _Model(BaseModel):
    # The limit is that of files; what a mapping holds is bounded here.
    model_config = ConfigDict(
        strict=True, extra="forbid", frozen=True, str_max_length=MOST_CHARACTERS
    )


class SchemeOptions(_Model):
    """A scheme spelled out; keys are the keyword arguments of ``scheme()``."""

    model_config = ConfigDict(title="scheme mapping")

    activations: int = Field(ge=2, le=16, description="Bits of inputs and output.")
    weights: int = Field(ge=2, le=16, description="Bits of the weight.")
    dynamic: bool = Field(
        False,
        description="Quantize activations at run time (8 bits; linear layers, and convolutions "
        "over two dims without groups); the bias stays float.",
    )
    weight_granularity: Granularity = Field(
        "per_channel",
        description="One weight scale for the tensor, for each output channel, or for each group "
        "of `group_size` input channels (the default when `group_size` is given).",
    )
    group_size: int = Field(
        0,
        ge=1,
        description="Input channels that share a weight scale. Goes with `per_group` only.",
        json_schema_extra=_without_default,
    )
    symmetric_activations: bool = Field(
        False,
        description="Zero point 0. Default: `true` above 8 bits, where nothing else is legal.",
        json_schema_extra=_without_default,
    )
    narrow_activations: bool = Field(
        False, description="Leave out the most negative activation value."
    )
    full_range_weights: bool = Field(
        False,
        description="Use the most negative weight value too; the depthwise int8 kernels overflow "
        "on -128 * -128.",
    )
    bias: Annotated[int | Literal["float"], BeforeValidator(_check_bias)] = Field(
        32,
        description="Bits of the derived bias, or `float`. Default: 32; `float` when `dynamic`.",
        json_schema_extra={
            "anyOf": [
                {"type": "integer", "minimum": 4, "maximum": 32},
                {"type": "string", "const": "float"},
            ]
        },
    )
    observer: Annotated[str, _parsed_by(_parse_observer)] = Field(
        OBSERVERS[0],
        description="Which statistics decide the range of activations.",
        json_schema_extra={
            "anyOf": [
                {"enum": list(OBSERVERS)},
                {"title": "`percentile99.9` and the like", "pattern": f"^{PERCENTILE_PATTERN}$"},
            ]
        },
    )
    weight_observer: Literal["minmax", "lsq"] = Field(
        "minmax",
        description="Weight scales by the largest weight, or learned in quantization-aware "
        "training.",
    )

    def to_scheme(self) -> OpScheme:
        """The scheme; keys that are not in the file keep the defaults of ``scheme()``."""
        kind = "dyn" if self.dynamic else "a"
        own = {"activations", "weights", "dynamic"}
        given = {key: getattr(self, key) for key in self.model_fields_set - own}
        return scheme(f"{kind}{self.activations}w{self.weights}", **given)


_SchemeValue = (
    Annotated[
        Annotated[
            str,
            _parsed_by(_parse_scheme),
            WithJsonSchema(
                {
                    "title": "scheme name",
                    "anyOf": [
                        {"enum": list(COMMON_SCHEMES)},
                        {"type": "string", "pattern": SCHEME_PATTERN},
                    ],
                }
            ),
            Tag("name"),
        ]
        | Annotated[SchemeOptions, _parsed_by(SchemeOptions.to_scheme), Tag("mapping")],
        Discriminator(
            _kind, custom_error_type="scheme_kind", custom_error_message="neither name nor mapping"
        ),
    ]
    | None
)
_Name = Annotated[str, Field(min_length=1)]
_Format = Annotated[
    str,
    _parsed_by(_parse_format),
    WithJsonSchema({"title": "activation format", "type": "string", "pattern": FORMAT_PATTERN}),
]
_Formats = Annotated[
    Annotated[_Format, Tag("name")]
    | Annotated[dict[_Name, _Format], Field(max_length=MOST_FORMATS), Tag("mapping")],
    Discriminator(
        _kind, custom_error_type="format_kind", custom_error_message="neither name nor mapping"
    ),
]

_BorderKind = Annotated[
    Any,
    BeforeValidator(_parse_border),
    WithJsonSchema(
        {
            "title": "`true`, `false` or " + ", ".join(f"`{kind}`" for kind in _BORDER_DTYPES),
            "anyOf": [{"type": "boolean"}, {"enum": list(_BORDER_DTYPES)}],
        }
    ),
]
_BorderKinds = Annotated[
    Annotated[_BorderKind, Tag("name")]
    | Annotated[dict[_Name, _BorderKind], Field(max_length=MOST_FORMATS), Tag("mapping")],
    Discriminator(lambda value: "mapping" if _kind(value) == "mapping" else "name"),
]

_SELECTORS = {scope.name.lower(): scope for scope in Scope if scope is not Scope.GLOBAL}


def _selector(description: str, *examples: str) -> Any:
    """A field that may be absent; its default says so and is never used."""
    return Field(
        "",
        description=description,
        examples=list(examples),
        json_schema_extra=_without_default,
    )


class RuleEntry(_Model):
    """One rule: exactly one of the four selectors, and a scheme."""

    model_config = ConfigDict(
        title="rule",
        json_schema_extra={"oneOf": [{"required": [name]} for name in reversed(_SELECTORS)]},
    )

    node_name: _Name = _selector("A node of the captured graph; globs select several.", "conv2d_3")
    module_name: _Name = _selector(
        "A module path, as `model.named_modules()` has it; globs select several.", "layer3.*"
    )
    module_type: _Name = _selector(
        "Qualified name of a module class, for layers of PyTorch also the short one, "
        "`torch.nn.Conv2d`; ops captured anywhere inside such modules.",
        "torch.nn.modules.conv.Conv2d",
    )
    operator_type: Annotated[_Name, _parsed_by(_check_operator)] = _selector(
        "An aten overload.", "aten.linear.default"
    )
    scheme: _SchemeValue = Field(
        description="What the selected ops become: a name, the scheme spelled out, or `null` to "
        "leave them in float."
    )

    @model_validator(mode="after")
    def _selects_by_one(self) -> RuleEntry:
        given = [name for name in reversed(_SELECTORS) if name in self.model_fields_set]
        if len(given) != 1:
            legal = ", ".join(reversed(_SELECTORS))
            found = f"has {' and '.join(given)}: write one rule for each" if given else "has none"
            raise _problem(ConfigError(f"a rule selects by exactly one of {legal}; this {found}"))
        return self


class ConfigFile(_Model):
    """Config file of custom-quantizer: which scheme which op gets."""

    schema_: str = Field(
        "",
        alias="$schema",
        description="Where editors find this schema (JSON files); otherwise ignored.",
        json_schema_extra=_without_default,
    )
    version: Literal[1] = Field(description="Version of the file format.")
    global_: _SchemeValue = Field(
        None,
        alias="global",
        description="Scheme of all ops that no rule selects. Default: they stay in float, as "
        "with `null`.",
        json_schema_extra=_without_default,
    )
    rules: list[RuleEntry] = Field(
        [],
        max_length=MOST_RULES,
        description="Rules; node names win over module names, these over module types, these over "
        "operator types, and within one scope the later rule wins.",
    )
    inputs: _Formats = Field(
        {},
        description="Format of all model inputs (`a8`, `a16`, `a8-symmetric`), or a mapping from "
        'input names to formats, `"*"` for all others. Default: what the ops that read an input '
        "want.",
        examples=["a8", "a16"],
        json_schema_extra=_without_default,
    )
    outputs: _Formats = Field(
        {},
        description="The same for model outputs, which are named by position: `{0: a16}`. "
        "Default: what the op that makes an output gives.",
        examples=["a8", "a16"],
        json_schema_extra=_without_default,
    )
    integer_inputs: _BorderKinds = Field(
        {},
        description="Whether the program takes integers in place of float32: for all inputs, or a "
        "mapping from input names. `true` is int8, or int16 above 8 bits; `uint8` is int8 with 128 "
        "added, as images have it. Default: float32.",
        examples=[True, "uint8"],
        json_schema_extra=_without_default,
    )
    integer_outputs: _BorderKinds = Field(
        {},
        description="Likewise, whether it returns integers; outputs are named by position.",
        examples=[True],
        json_schema_extra=_without_default,
    )

    accuracy: Annotated[str | None, _parsed_by(check_accuracy)] = Field(
        None,
        description="What `quantize` does beyond rounding to nearest: nothing (`plain`), what is "
        "free (`fast`), or what seconds to minutes buy (`best`). Default: `fast`.",
        json_schema_extra=_choices(ACCURACIES),
    )
    improve: Annotated[list[str] | None, _parsed_by(check_algorithms)] = Field(
        None,
        description="Algorithms that `quantize` improves the rounding with, instead of those that "
        "`accuracy` stands for.",
        json_schema_extra=_choices(ALGORITHMS),
    )


class _Schema(GenerateJsonSchema):
    """JSON schema without a title for every field."""

    def field_title_should_be_set(self, schema: Any) -> bool:
        return False

    def generate(self, schema: CoreSchema, mode: Any = "validation") -> dict[str, Any]:
        result = super().generate(schema, mode)
        result["title"] = "custom-quantizer config"
        return {"$schema": self.schema_dialect, **result}


def json_schema() -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a config file, for editors.

    It is shipped next to this module as ``config.schema.json``. It cannot say all that
    :func:`load_config` checks: which operators exist, and which combinations are legal.
    """
    return ConfigFile.model_json_schema(by_alias=True, schema_generator=_Schema)


# -- reading ------------------------------------------------------------------------------------


def load_config(source: str | os.PathLike[str] | Mapping[str, Any]) -> Config:
    """Read the rules of a quantizer.

    Args:
        source: path of a ``.yaml``, ``.yml`` or ``.json`` file, or the same as a mapping.

    Returns:
        The rules, ``global`` first and then in the order of the file. Rules from a file know the
        line they stand in, and messages about them name it.

    Raises:
        ConfigError: what the file says is not legal. Every mistake is listed, with file, line and
            column.
        InputError: the file cannot be read.
    """
    if isinstance(source, Mapping):
        document = Document("config", _plain(source))
    elif isinstance(source, (str, os.PathLike)):
        document = read_document(source, if_empty=_BEGIN)
    else:
        raise ConfigError(f"a config is a path or a mapping, not {type(source).__name__}")
    if not isinstance(document.data, dict):
        document.fail([Mistake((), f"must be a mapping, not {document.shown(())}; {_BEGIN}")])
    _check_version(document)
    try:
        file = ConfigFile.model_validate(document.data)
    except ValidationError as exc:
        errors = exc.errors(include_url=False, include_input=False)
        # Five times what is shown, since they are listed in another order and once each: to find
        # the places of all takes minutes in a file that is wrong everywhere.
        found = [_translate(error, document) for error in errors[: 5 * MOST_MISTAKES]]
        document.fail(found, cause=exc, total=len(errors) if len(errors) > len(found) else 0)
    return _to_config(file, document)


_IO_FIELDS = ("inputs", "outputs", "integer_inputs", "integer_outputs")


def _to_config(file: ConfigFile, document: Document) -> Config:
    rules: list[Rule] = []
    if "global_" in file.model_fields_set:
        overall = cast("OpScheme | None", file.global_)
        rules.append(Rule(Scope.GLOBAL, "", overall, document.source(("global",))))
    for index, entry in enumerate(file.rules):
        (selector,) = entry.model_fields_set - {"scheme"}
        line = document.source(("rules", index))
        key: str = getattr(entry, selector)
        rules.append(Rule(_SELECTORS[selector], key, cast("OpScheme | None", entry.scheme), line))
    config = Config(rules)
    for kind in _IO_FIELDS:
        given, target = getattr(file, kind), getattr(config, kind)
        for name, value in (given if isinstance(given, dict) else {"*": given}).items():
            target[name] = value
            # Without a mapping this is the line of the key itself.
            line = document.source((kind, name))
            if line is not None:
                config.io_sources[kind, name] = line
    config.accuracy = file.accuracy
    config.improve = cast("tuple[str, ...] | None", file.improve)
    return config


def _check_version(document: Document) -> None:
    """Files of other versions may mean anything: nothing else is said about them."""
    if "version" not in document.data:
        document.fail([Mistake((), f"'version' is missing; {_BEGIN}")])
    found = document.data["version"]
    if type(found) is int and found == FORMAT_VERSION:
        return
    if type(found) is not int:
        text = f"must be the number {FORMAT_VERSION}, not {document.shown(('version',))}"
    elif found > FORMAT_VERSION:
        text = (
            f"{found} is newer than what this custom_quantizer reads ({FORMAT_VERSION}); upgrade "
            f"it, or write the file in version {FORMAT_VERSION}"
        )
    else:
        text = f"there never was a version {found}; {_BEGIN}"
    document.fail([Mistake(("version",), text)])


def _plain(value: Any) -> Any:
    """Mappings and sequences of any kind as dicts with text keys and lists, as a file has them."""
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    return [_plain(item) for item in value] if isinstance(value, (list, tuple)) else value


# -- what pydantic says, in our words -----------------------------------------------------------


def _translate(error: ErrorDetails, document: Document) -> Mistake:
    path = _data_path(error["loc"])
    if path[2:] == ("[key]",):  # of inputs or outputs
        return Mistake(path[:2], "a name is not empty", key=True)
    kind, context = error["type"], error.get("ctx", {})
    if kind == "extra_forbidden":
        key, legal = str(path[-1]), _legal_keys(path)
        hint = nearest(key, legal, count=2) or f"; the keys here are {', '.join(legal)}"
        return Mistake(path, f"unknown key{hint}", key=True)
    if kind == "missing":
        return Mistake(path[:-1], f"{path[-1]!r} is missing{_MISSING.get(str(path[-1]), '')}")
    if kind == "custom_quantizer":
        return Mistake(path, str(context["text"]))
    shown = document.shown(path)
    if kind == "string_type":
        hint = document.quote_hint(path) if path[-1] in _SELECTORS else ""
        return Mistake(path, f"must be text, not {shown}{hint}")
    if kind == "too_long" and context["actual_length"] is None:
        context = {**context, "actual_length": "more"}
    if kind in _SAID:
        entries = "algorithms" if path == ("improve",) else "rules"
        return Mistake(path, _SAID[kind].format(**context, shown=shown, entries=entries))
    text = error["msg"]
    return Mistake(path, f"{text[:1].lower()}{text[1:]}, got {shown}")


_SAID = {
    "greater_than_equal": "must be at least {ge}, not {shown}",
    "less_than_equal": "must be at most {le}, not {shown}",
    "literal_error": "must be {expected}, not {shown}",
    "too_long": "at most {max_length:,} entries are read, not {actual_length}",
    "string_too_long": "at most {max_length:,} characters are read",
    "bool_type": "must be true or false, not {shown}",
    "int_type": "must be a whole number, not {shown}",
    "list_type": "must be a list of {entries}, not {shown}",
    "model_type": "must be a mapping, not {shown}",
    "scheme_kind": "must be the name of a scheme, a mapping or null, not {shown}",
    "format_kind": "must be the name of a format, or a mapping from names to formats, not {shown}",
    "string_too_short": "must be a name, not {shown}",
}
_MISSING = {"scheme": ": name one, or write null to leave the selected ops in float"}


def _data_path(loc: tuple[int | str, ...]) -> DataPath:
    """Without the tag that pydantic puts where a value is a name or a mapping."""
    tag = 3 if loc[:1] == ("rules",) else 1
    return loc[:tag] + loc[tag + 1 :]


def _legal_keys(path: DataPath) -> list[str]:
    if len(path) == 1:
        return [field.alias or name for name, field in ConfigFile.model_fields.items()]
    in_rule = path[0] == "rules" and len(path) == 3
    return list((RuleEntry if in_rule else SchemeOptions).model_fields)


# -- writing ------------------------------------------------------------------------------------


def dump_config(config: Config) -> dict[str, Any]:
    """The rules as plain data; ``load_config`` makes an equal config of it.

    Schemes are written by name. Of several global rules only the last one, which wins, is kept.

    Raises:
        ConfigError: there is a filter function, which no file can hold, or a scheme whose name
            does not say all of it.
    """
    if config.filter_function is not None:
        name = getattr(config.filter_function, "__qualname__", repr(config.filter_function))
        raise ConfigError(
            f"the filter function {name} cannot be written to a file: leave the nodes it refuses "
            "in float by name (scheme: null), or set it in code after from_config"
        )
    data: dict[str, Any] = {"version": FORMAT_VERSION}
    for rule in config.rules:
        if rule.scope is Scope.GLOBAL:
            data["global"] = _scheme_name(rule.scheme)
    rules = [
        {rule.scope.name.lower(): rule.key, "scheme": _scheme_name(rule.scheme)}
        for rule in config.rules
        if rule.scope is not Scope.GLOBAL
    ]
    if rules:
        data["rules"] = rules
    for key in _IO_FIELDS:
        written = _format_name if key in ("inputs", "outputs") else _border_value
        names = {name: written(value) for name, value in getattr(config, key).items()}
        if names:
            data[key] = names["*"] if list(names) == ["*"] else names
    if config.accuracy is not None:
        data["accuracy"] = config.accuracy
    if config.improve is not None:
        data["improve"] = list(config.improve)
    return data


def _border_value(kind: str) -> bool | str:
    """What :func:`~custom_quantizer.config.rules.border_kind` reads."""
    return {"integer": True, "float": False}.get(kind, kind)


def save_config(config: Config, path: str | os.PathLike[str]) -> None:
    """Write the rules to a YAML or JSON file, by its suffix, in one step.

    Raises:
        ConfigError: as :func:`dump_config`.
        InputError: another suffix, or the file cannot be written.
    """
    target = Path(path)
    check_suffix(target)
    data = dump_config(config)
    if target.suffix.lower() == ".json":
        text = json.dumps(data, indent=2) + "\n"
    else:
        # A name stays in one line; PyYAML's allow_unicode=True would lose some line separators.
        text = yaml.safe_dump(data, sort_keys=False, width=1 << 20)
    write_text_atomic(target, text)
