from __future__ import annotations

import contextlib
import inspect
import io
import json
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support.scripts import DOCS, documentation_script
from torch import nn
from torch._ops import OpOverload
from torch.export import ExportedProgram

from custom_quantizer.config import file as config_file
from custom_quantizer.config.file import (
    SchemeOptions,
    dump_config,
    json_schema,
    load_config,
    save_config,
)
from custom_quantizer.config.rules import Config, Rule, Scope
from custom_quantizer.core import schemes
from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.schemes import (
    FORMAT_PATTERN,
    SCHEME_PATTERN,
    SUFFIXES,
    OpScheme,
    TensorScheme,
    scheme,
)
from custom_quantizer.errors import ConfigError, InputError, SchemeError
from custom_quantizer.ops import known_targets
from custom_quantizer.planning.quantizer import IntegerQuantizer


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 8, 3)
        self.layer3 = nn.Sequential(nn.Conv2d(8, 8, 3, padding=1), nn.ReLU())
        self.head = nn.Linear(8, 32)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = self.layer3(torch.relu(self.stem(x)))
        return self.head(x.mean((2, 3)))  # type: ignore[no-any-return]


@pytest.fixture(scope="module")
def exported() -> ExportedProgram:
    return torch.export.export(Net().eval(), (torch.randn(1, 3, 8, 8),))


def write(folder: Path, text: str, name: str = "mixed.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


# -- what a file says ---------------------------------------------------------------------------

MIXED = """\
version: 1
global: a8w8
rules:            # later wins within one scope
  - module_name: layer3.*
    scheme: a16w8
  - operator_type: aten.linear.default
    scheme: {activations: 8, weights: 4, weight_granularity: per_group, group_size: 32}
  - node_name: conv2d_3
    scheme: null        # stay in float
  - module_type: torch.nn.modules.conv.Conv2d
    scheme: a8w8-per_tensor
inputs: a8
outputs: {0: a16, 1: a8-symmetric}
"""


def test_file_equals_the_setters(tmp_path: Path) -> None:
    quantizer = (
        IntegerQuantizer()
        .set_global("a8w8")
        .set_module_name("layer3.*", "a16w8")
        .set_operator_type(torch.ops.aten.linear.default, "a8w4g32")
        .set_node_name("conv2d_3", None)
        .set_module_type(nn.Conv2d, scheme("a8w8", weight_granularity="per_tensor"))
        .set_io(inputs="a8", outputs={"0": "a16", "1": "a8-symmetric"})
    )
    config = load_config(write(tmp_path, MIXED))
    assert dump_config(config) == quantizer.to_config()
    assert config == load_config(quantizer.to_config())
    assert [rule.source for rule in config.rules] == [
        f"{tmp_path}/mixed.yaml:{line}" for line in (2, 4, 6, 8, 10)
    ]
    assert config.io_sources == {
        ("inputs", "*"): f"{tmp_path}/mixed.yaml:12",
        ("outputs", "0"): f"{tmp_path}/mixed.yaml:13",
        ("outputs", "1"): f"{tmp_path}/mixed.yaml:13",
    }


def test_json_says_the_same_with_tabs_and_a_byte_order_mark(tmp_path: Path) -> None:
    config = load_config(write(tmp_path, MIXED))
    text = json.dumps({"$schema": "config.schema.json", **dump_config(config)}, indent="\t")
    path = tmp_path / "mixed.json"
    path.write_text(text, encoding="utf-8-sig")
    again = load_config(path)
    assert again == config
    assert again.rules[1].source == f"{path}:6"


def test_plan_of_a_round_trip_is_equal(exported: ExportedProgram, tmp_path: Path) -> None:
    text = """\
version: 1
global: a8w8
rules:
  - module_name: layer3
    scheme: a16w8
  - operator_type: aten.linear.default
    scheme: {activations: 8, weights: 4}
  - node_name: mean
    scheme: null
"""
    from_file = IntegerQuantizer.from_config(write(tmp_path, text))
    in_code = (
        IntegerQuantizer()
        .set_global("a8w8")
        .set_module_name("layer3", "a16w8")
        .set_operator_type("aten.linear.default", "a8w4")
        .set_node_name("mean", None)
    )
    plan = from_file.plan(exported)
    assert [(op.node, op.scheme) for op in plan.ops] == [
        ("conv2d", "a8w8"),
        ("conv2d_1", "a16w8"),
        ("mean", None),
        ("linear", "a8w4"),
    ]
    for other in (
        in_code,
        IntegerQuantizer.from_config(from_file.to_config()),
        IntegerQuantizer.from_config(in_code.to_config()),
    ):
        assert other.plan(exported) == plan


def test_aliases_are_read(tmp_path: Path) -> None:
    text = """\
version: 1
global: &wide {activations: 16, weights: 8}
rules:
  - module_name: head
    scheme: *wide
"""
    config = load_config(write(tmp_path, text))
    assert [rule.scheme for rule in config.rules] == [scheme("a16w8")] * 2


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({"activations": 8, "weights": 8}, "a8w8"),
        ({"activations": 8, "weights": 4, "group_size": 32}, "a8w4g32"),
        ({"activations": 8, "weights": 8, "dynamic": True}, "dyn8w8"),
        ({"activations": 8, "weights": 8, "dynamic": True, "bias": "float"}, "dyn8w8"),
        ({"activations": 8, "weights": 8, "symmetric_activations": True}, "a8w8-symmetric"),
        ({"activations": 8, "weights": 8, "narrow_activations": True}, "a8w8-narrow"),
        ({"activations": 8, "weights": 8, "full_range_weights": True}, "a8w8-full"),
        ({"activations": 4, "weights": 2, "bias": 8}, "a4w2-bias8"),
        ({"activations": 16, "weights": 8, "bias": "float"}, "a16w8-biasfloat"),
        ({"activations": 8, "weights": 8, "observer": "histogram"}, "a8w8-histogram"),
        ({"activations": 8, "weights": 8, "weight_granularity": "per_tensor"}, "a8w8-per_tensor"),
    ],
)
def test_spelled_out_schemes(options: dict[str, Any], name: str) -> None:
    (rule,) = load_config({"version": 1, "global": options}).rules
    assert rule.scheme == scheme(name)
    assert dump_config(Config([rule]))["global"] == name


def test_a_scheme_mapping_has_every_keyword_of_scheme() -> None:
    keywords = set(inspect.signature(scheme).parameters) - {"name"}
    assert set(SchemeOptions.model_fields) == keywords | {"activations", "weights", "dynamic"}


def test_null_is_not_the_absence_of_a_rule() -> None:
    assert load_config({"version": 1}).rules == []
    assert load_config({"version": 1, "global": None}).rules == [Rule(Scope.GLOBAL, "", None)]


# -- round trips --------------------------------------------------------------------------------

observers = st.sampled_from(schemes.OBSERVERS)


@st.composite
def op_schemes(draw: st.DrawFn) -> OpScheme:
    dynamic = draw(st.booleans())
    act = 8 if dynamic else draw(st.integers(2, 16))
    granularity = draw(st.sampled_from(["per_tensor", "per_channel", "per_group"]))
    bias = st.one_of(st.none(), st.builds(IntFormat, st.integers(4, 32)))
    return OpScheme(
        TensorScheme(
            IntFormat(act, draw(st.booleans())),
            symmetric=act > 8 or draw(st.booleans()),
            observer=draw(observers),
        ),
        TensorScheme(
            IntFormat(draw(st.integers(2, 16)), draw(st.booleans())),
            symmetric=True,
            granularity=granularity,  # type: ignore[arg-type]
            group_size=draw(st.integers(1, 256)) if granularity == "per_group" else None,
        ),
        bias=None if dynamic else draw(bias),
        dynamic=dynamic,
    )


@st.composite
def formats(draw: st.DrawFn) -> TensorScheme:
    bits = draw(st.integers(2, 16))
    symmetric = bits > 8 or draw(st.booleans())
    fmt = IntFormat(bits, draw(st.booleans()))
    return TensorScheme(fmt, symmetric=symmetric, observer=draw(observers))


# Whatever YAML might take for something else: numbers, booleans, nulls, dates, syntax.
names = st.one_of(
    st.text(min_size=1),
    st.from_regex(r"[a-z_]{1,8}(\.[a-z0-9*]{1,3}){0,3}", fullmatch=True),
    st.sampled_from(
        ["0", "1e5", "on", "null", "~", "*", "*.conv", "<<", "2024-01-01", "- a", "a:"]
    ),
)
operators = st.sampled_from(sorted(str(op) for op in known_targets() if isinstance(op, OpOverload)))
values = st.one_of(st.none(), op_schemes())


@st.composite
def rules(draw: st.DrawFn) -> Rule:
    scope = draw(st.sampled_from([scope for scope in Scope if scope is not Scope.GLOBAL]))
    key = draw(operators if scope is Scope.OPERATOR_TYPE else names)
    return Rule(scope, key, draw(values))


@st.composite
def configs(draw: st.DrawFn) -> Config:
    first = [Rule(Scope.GLOBAL, "", draw(values))] if draw(st.booleans()) else []
    return Config(
        first + draw(st.lists(rules(), max_size=5)),
        inputs=draw(st.dictionaries(names, formats(), max_size=2)),
        outputs=draw(st.dictionaries(st.sampled_from(["*", "0", "1"]), formats(), max_size=2)),
    )


@settings(deadline=None)
@given(config=configs())
def test_round_trip_through_a_dict(config: Config) -> None:
    data = dump_config(config)
    assert load_config(data) == config
    assert load_config(json.loads(json.dumps(data))) == config


@settings(deadline=None)  # a disk may be slow
@given(config=configs(), suffix=st.sampled_from(["yaml", "yml", "json"]))
def test_round_trip_through_a_file(
    tmp_path_factory: pytest.TempPathFactory, config: Config, suffix: str
) -> None:
    path = tmp_path_factory.getbasetemp() / f"round_trip.{suffix}"
    save_config(config, path)
    assert load_config(path) == config


@given(value=op_schemes())
def test_names_of_schemes_round_trip_and_match_the_schema(value: OpScheme) -> None:
    assert scheme(value.name) == value
    choices = json_schema()["properties"]["global"]["anyOf"][0]["oneOf"][0]["anyOf"]
    assert re.search(choices[1]["pattern"], value.name)


def test_schemes_that_editors_offer_are_legal() -> None:
    choices = json_schema()["properties"]["global"]["anyOf"][0]["oneOf"][0]["anyOf"]
    for name in choices[0]["enum"]:
        assert scheme(name).name == name
        assert re.search(choices[1]["pattern"], name)


def test_every_suffix_is_read_and_offered() -> None:
    """One table of suffixes: what is parsed, and what editors and messages are told of."""
    with pytest.raises(SchemeError) as caught:
        scheme("w")
    for suffix, said in SUFFIXES.items():
        name = f"a8w8-{suffix}"
        assert scheme(name) == scheme("a8w8", **said)
        assert re.search(SCHEME_PATTERN, name)
        assert f"-{suffix}" in str(caught.value)
        about_activations = scheme(name).weight == scheme("a8w8").weight and "bias" not in said
        about_activations &= suffix != "per_channel"  # says what is so anyway, of the weight
        assert (re.search(FORMAT_PATTERN, f"a8-{suffix}") is not None) == about_activations


def test_a_file_is_parsed_once(monkeypatch: pytest.MonkeyPatch) -> None:
    read = []

    def counted(name: str, **options: Any) -> OpScheme:
        read.append(name)
        return scheme(name, **options)

    monkeypatch.setattr(config_file, "scheme", counted)
    rules = [{"module_name": "m", "scheme": {"activations": 4, "weights": 4}}]
    load_config({"version": 1, "global": "a8w8", "rules": rules})
    assert sorted(read) == ["a4w4", "a8w8"]


@settings(deadline=None)
@given(text=st.text())
def test_no_text_crashes_the_reader(tmp_path_factory: pytest.TempPathFactory, text: str) -> None:
    for suffix in ("yaml", "json"):
        path = tmp_path_factory.getbasetemp() / f"any.{suffix}"
        path.write_bytes(text.encode())
        with contextlib.suppress(ConfigError):
            load_config(path)


json_values = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-1, 40), st.floats(), st.text(max_size=3)),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
)
config_keys = ["version", "global", "rules", "scheme", "module_name", "activations", "weights"]


@settings(deadline=None)
@given(
    data=st.dictionaries(
        st.sampled_from(["global", "rules", "inputs", "outputs"]),
        st.one_of(
            json_values,
            st.dictionaries(st.sampled_from(config_keys), json_values),
            st.lists(st.dictionaries(st.sampled_from(config_keys), json_values), max_size=3),
        ),
    )
)
def test_no_data_crashes_the_reader(data: dict[str, Any]) -> None:
    message = ""
    try:
        load_config({"version": 1, **data})
    except ConfigError as exc:
        message = str(exc)
    # Nothing is left to pydantic's own words.
    assert "Input should" not in message
    assert "validation error" not in message


def test_only_the_last_global_rule_is_kept() -> None:
    quantizer = IntegerQuantizer().set_global("a8w8").set_node_name("x", None).set_global("a8w4")
    assert quantizer.to_config() == {
        "version": 1,
        "global": "a8w4",
        "rules": [{"node_name": "x", "scheme": None}],
    }


def test_a_filter_function_cannot_be_written(tmp_path: Path) -> None:
    def only_convolutions(node: torch.fx.Node) -> bool:
        return "conv" in node.name

    quantizer = IntegerQuantizer().set_global("a8w8").set_filter_function(only_convolutions)
    with pytest.raises(ConfigError, match=r"only_convolutions cannot be written to a file"):
        quantizer.to_config()


def test_a_scheme_that_its_name_does_not_say_cannot_be_written() -> None:
    act = TensorScheme(IntFormat(8), granularity="per_channel")
    odd = OpScheme(act, TensorScheme(IntFormat(8, True), True, "per_channel"))
    with pytest.raises(ConfigError, match=r"its name 'a8w8' does not say all of it"):
        IntegerQuantizer().set_global(odd).to_config()
    with pytest.raises(ConfigError, match=r"'a8' would lose a part of it"):
        dump_config(Config(inputs={"x": TensorScheme(IntFormat(8), granularity="per_channel")}))


def test_saving_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\n")
    with pytest.raises(ConfigError):
        save_config(Config(filter_function=lambda _: True), path)
    assert path.read_text() == "version: 1\n"
    with pytest.raises(InputError, match=r"config\.toml: a config file is YAML or JSON"):
        save_config(Config(), tmp_path / "config.toml")
    assert [p.name for p in tmp_path.iterdir()] == ["mixed.yaml"]


# -- mistakes -----------------------------------------------------------------------------------


def rule(*lines: str) -> str:
    return "rules:\n  - " + "\n    ".join(lines) + "\n"


MISTAKES = [
    # keys
    ("globl: a8w8\n", "2:1", "globl: unknown key; did you mean global?"),
    ("x: 1\n", "2:1", "x: unknown key; the keys here are $schema, version, global, rules, inputs,"),
    ("global: a8w8\nglobal: a8w4\n", "3:1", "the key 'global' is already in line 2"),
    ("global:\n", "2:1", "'global' has no value; write one (or null), or leave it out"),
    ("global: {[a]: b}\n", "2:10", "a key must be a word"),
    ("global: &a\n  <<: {x: 1}\n", "3:3", "merge keys (<<) are not read"),
    # schemes
    ("global: w8a8\n", "2:9", "'w8a8' is no scheme name"),
    ("global: w4a8-pertensor\n", "2:9", "; did you mean a8w4-per_tensor?"),
    ("global: a8w8_per_tensor\n", "2:9", "; did you mean a8w8-per_tensor?"),
    ("global: A8W8\n", "2:9", "; did you mean a8w8?"),
    ("global: a8w8-histgram\n", "2:9", "; did you mean a8w8-histogram?"),
    ("global: a8w4-per_group\n", "2:9", "; did you mean a8w4g32?"),
    ("global: 'a8w8 '\n", "2:9", "; did you mean a8w8?"),
    ("global: None\n", "2:9", "; to leave ops in float, write null"),
    ("global: banana\n", "2:9", "a name is a<bits>w<bits> or dyn8w<bits>, 2 to 16 bits each"),
    ("global: a99w8\n", "2:9", "'a99w8': "),
    ("global: a17w8\n", "2:9", "activations have 2 to 16 bits, not 17"),
    ("global: dyn8w8-bias16\n", "2:9", "leave it float"),
    ("global: 8\n", "2:9", "must be the name of a scheme, a mapping or null, not 8"),
    ("global: [a8w8]\n", "2:9", "must be the name of a scheme, a mapping or null, not a list"),
    ("global: {activations: 8}\n", "2:9", "'weights' is missing"),
    (
        "global: {activations: 8, weights: 17}\n",
        "2:35",
        "global.weights: must be at most 16, not 17",
    ),
    ("global: {activations: 1, weights: 8}\n", "2:23", "must be at least 2, not 1"),
    ("global: {activations: 8.0, weights: 8}\n", "2:23", "must be a whole number, not 8.0"),
    ("global: {activations: '8', weights: 8}\n", "2:23", "must be a whole number, not '8'"),
    ("global: {activations: 8, weights: 8, dynamic: 1}\n", "2:47", "must be true or false, not 1"),
    ("global: {activations: 8, weights: 8, group: 32}\n", "2:38", "did you mean group_size?"),
    (
        "global: {activations: 8, weights: 8, bias: 33}\n",
        "2:44",
        "must be 4 to 32 bits or the word",
    ),
    ("global: {activations: 8, weights: 8, bias: yes}\n", "2:44", "the word float, not true"),
    ("global: {activations: 8, weights: 8, observer: minmx}\n", "2:48", "did you mean minmax?"),
    (
        "global: {activations: 8, weights: 8, weight_granularity: per_chanel}\n",
        "2:58",
        "must be 'per_tensor', 'per_channel' or 'per_group', not per_chanel",
    ),
    (
        "global: {activations: 8, weights: 8, weight_granularity: per_group}\n",
        "2:9",
        "a group size goes with weight_granularity='per_group'",
    ),
    (
        "global: {activations: 16, weights: 8, symmetric_activations: false}\n",
        "2:9",
        "int16 activations are symmetric",
    ),
    # rules
    ("rules: a8w8\n", "2:8", "rules: must be a list of rules, not a8w8"),
    ("improve: gptq\n", "2:10", "improve: must be a list of algorithms, not gptq"),
    ("rules: null\n", "2:8", "rules: must be a list of rules, not null"),
    ("rules:\n  module_name: x\n", "3:3", "rules: must be a list of rules, not a mapping"),
    ("rules:\n  - a8w8\n", "3:5", "rules[0]: must be a mapping, not a8w8"),
    (rule("module_name: x"), "3:5", "rules[0]: 'scheme' is missing: name one, or write null"),
    (rule("scheme: a8w8"), "3:5", "rules[0]: a rule selects by exactly one of node_name,"),
    (
        rule("node_name: x", "module_name: y", "scheme: a8w8"),
        "3:5",
        "this has node_name and module_name: write one rule for each",
    ),
    (
        rule("module_nam: x", "scheme: a8w8"),
        "3:5",
        "rules[0].module_nam: unknown key; did you mean module_name",
    ),
    (
        rule("module_name: 0", "scheme: a8w8"),
        "3:18",
        'rules[0].module_name: must be text, not 0; write it in quotes: "0"',
    ),
    (rule("module_name: on", "scheme: a8w8"), "3:18", 'not on; write it in quotes: "on"'),
    (rule("module_name: ''", "scheme: a8w8"), "3:18", "must be a name, not ''"),
    (
        rule("operator_type: aten.liner.default", "scheme: a8w8"),
        "3:20",
        "aten.liner.default is not an operator this quantizer knows; did you mean "
        "aten.linear.default",
    ),
    (rule("node_name: x", "scheme: a8w8-pertensr"), "4:13", "rules[0].scheme: "),
    # formats
    ("inputs: a8w8\n", "2:9", "'a8w8' is no format of activations"),
    ("inputs: a8w8\n", "2:9", "; did you mean a8?"),
    ("inputs: a8-per_tensor\n", "2:9", "is no format of activations"),
    ("inputs: {'': a8}\n", "2:10", "a name is not empty"),
    ("inputs: null\n", "2:9", "must be the name of a format, or a mapping from names to formats"),
    ("outputs: {0: a16, 1: 3}\n", "2:22", "outputs.1: must be text, not 3"),
    ("outputs: {0: b8}\n", "2:14", "outputs.0: 'b8' is no format"),
    # YAML
    (rule("module_name: *.conv", "scheme: a8w8"), "3:19", 'stands in quotes: "*.conv1"'),
    (rule("module_name: *conv", "scheme: a8w8"), "3:18", 'stands in quotes: "*.conv1"'),
    ("rules:\n\t- module_name: x\n", "3:1", "indent with spaces, not tabs"),
    ("---\nversion: 1\n", "2:1", "a config file is one document"),
    ("global: 'a8w8\n", "3:1", "not YAML: found unexpected end of stream"),
    ("global: !scheme a8w8\n", "2:9", "not YAML: "),
    ("global: 2024-99-99\n", "2:9", "2024-99-99 is not a legal timestamp"),
    ("rules: &a [*a]\n", "2:8", "this anchor contains itself"),
    ("global: a8\x07w8\n", "2", "not YAML: character '\\x07'"),
]


@pytest.mark.parametrize(("text", "place", "message"), MISTAKES)
def test_mistakes_have_file_line_and_column(
    tmp_path: Path, text: str, place: str, message: str
) -> None:
    path = write(tmp_path, f"version: 1\n{text}")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}:{place}: ")
    assert message in str(raised.value)
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ("", "1:1", "the file is empty; begin with `version: 1`"),
        ("# a comment\n", "1:1", "the file is empty"),
        ("- a\n", "1:1", "must be a mapping, not a list; begin with `version: 1`"),
        ("global: a8w8\n", "1:1", "'version' is missing; begin with `version: 1`"),
        # Another version may mean anything: its other mistakes are not reported.
        ("x: 1\nversion: 2\n", "2:10", "version: 2 is newer than what this custom_quantizer reads"),
        ("version: 0\n", "1:10", "version: there never was a version 0"),
        ("version: '1'\n", "1:10", "version: must be the number 1, not '1'"),
        ("version: true\n", "1:10", "version: must be the number 1, not true"),
        ("version: 1.0\n", "1:10", "version: must be the number 1, not 1.0"),
    ],
)
def test_the_version_comes_first(tmp_path: Path, text: str, place: str, message: str) -> None:
    path = write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}:{place}: {message}")
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("text", "place", "message"),
    [
        ('{"version": 1,\n\t"global": "w8a8"}', "2:12", "did you mean a8w8?"),
        ('{"version": 1,}', "1:15", "not JSON: "),
        ('{"version": 1,\n"version": 1}', "2:1", "the key 'version' is already in line 1"),
        ("{'version': 1}", "1:2", "not JSON: "),
        ("", "1:1", "not JSON: "),
    ],
)
def test_mistakes_in_json(tmp_path: Path, text: str, place: str, message: str) -> None:
    path = write(tmp_path, text, "mixed.json")
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    assert str(raised.value).startswith(f"{path}:{place}: ")
    assert message in str(raised.value)


def test_all_mistakes_are_listed_in_the_order_of_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, "version: 1\nrules:\n" + "  - modul: x\n    scheme: w8a8\n" * 15)
    with pytest.raises(ConfigError) as raised:
        load_config(path)
    head, *lines = str(raised.value).splitlines()
    assert head == f"{path} has 30 mistakes:"
    assert [line.split(": ")[0] for line in lines] == [
        *(f"  {path}:{3 + i}:{13 if i % 2 else 5}" for i in range(20)),
        "  ... and 10 more",
    ]


@pytest.mark.parametrize("text", ["rules: " + "[" * 3000, "global: " + "{a: " * 3000])
def test_deep_nesting_is_refused(tmp_path: Path, text: str) -> None:
    with pytest.raises(ConfigError, match=r"nested too deeply"):
        load_config(write(tmp_path, f"version: 1\n{text}\n"))


def test_many_aliases_are_read_once(tmp_path: Path) -> None:
    levels = "".join(f"a{i + 1}: &a{i + 1} [{', '.join([f'*a{i}'] * 10)}]\n" for i in range(30))
    with pytest.raises(ConfigError, match=r"31 mistakes"):
        load_config(write(tmp_path, f"version: 1\na0: &a0 [x]\n{levels}"))


def test_text_that_is_not_utf8(tmp_path: Path) -> None:
    path = tmp_path / "latin.yaml"
    path.write_bytes(b"version: 1\n# gr\xfc\xdfe\n")
    with pytest.raises(ConfigError, match=r"latin\.yaml:2: not UTF-8 text"):
        load_config(path)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("mixd.yaml", "there is no such file; did you mean mixed.yaml?"),
        ("folder/mixed.yaml", "there is no directory"),
        ("mixed.toml", "its name ends in .yaml, .yml, .json"),
        ("directory.yaml", "it is a directory"),
    ],
)
def test_files_that_cannot_be_read(tmp_path: Path, name: str, message: str) -> None:
    write(tmp_path, "version: 1\n")
    (tmp_path / "directory.yaml").mkdir()
    with pytest.raises(InputError) as raised:
        load_config(tmp_path / name)
    assert name in str(raised.value)
    assert message in str(raised.value)


@pytest.mark.parametrize(
    ("data", "message"),
    [
        ({}, "config: 'version' is missing"),
        ({"version": 1, 3: 4}, "config: 3: unknown key"),
        ({"version": 1, "rules": [{"node_name": 3, "scheme": None}]}, "must be text, not 3"),
        ({"version": 1, "global": b"a8w8"}, "must be the name of a scheme, a mapping or null"),
        (3, "a config is a path or a mapping, not int"),
    ],
)
def test_mistakes_in_a_mapping(data: Any, message: str) -> None:
    with pytest.raises(ConfigError) as raised:
        load_config(data)
    assert message in str(raised.value)


# -- rules against a model ----------------------------------------------------------------------


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        (
            "module_name: layr3",
            '4: set_module_name("layr3", "a16w8"): the model has no module \'layr3\'; '
            "did you mean layer3",
        ),
        (
            "node_name: conv2d_7",
            '4: set_node_name("conv2d_7", "a16w8"): the graph has no node named \'conv2d_7\'; '
            "did you mean conv2d_1",
        ),
    ],
)
def test_names_the_model_does_not_have(
    exported: ExportedProgram, tmp_path: Path, selector: str, message: str
) -> None:
    path = write(tmp_path, f"version: 1\nglobal: a8w8\nrules:\n  - {selector}\n    scheme: a16w8\n")
    with pytest.raises(ConfigError) as raised:
        IntegerQuantizer.from_config(path).plan(exported)
    assert f"{path}:{message}" in str(raised.value)


@pytest.mark.parametrize(
    ("selector", "message"),
    [
        ("module_type: Conv2d", "did you mean torch.nn.Conv2d or torch.nn.modules.conv.Conv2d?"),
        ("module_type: torch.nn.modules.conv.Conv3d", "did you mean torch.nn.modules.conv.Conv2d"),
        ("operator_type: aten.conv1d.default", "did you mean aten.conv2d.default"),
    ],
)
def test_types_the_model_does_not_have(
    exported: ExportedProgram, tmp_path: Path, selector: str, message: str
) -> None:
    path = write(tmp_path, f"version: 1\nglobal: a8w8\nrules:\n  - {selector}\n    scheme: a16w8\n")
    (warning,) = IntegerQuantizer.from_config(path).plan(exported).warnings
    assert warning.startswith(f"{path}:4: set_")
    assert "selects nothing" in warning
    assert message in warning


@pytest.mark.parametrize(
    "selector",
    [
        "module_type: torch.nn.Conv2d",
        "operator_type: torch.ops.aten.conv2d.default",
        "operator_type: aten.conv2d.default",
    ],
)
def test_types_by_the_names_that_users_import(
    exported: ExportedProgram, tmp_path: Path, selector: str
) -> None:
    path = write(tmp_path, f"version: 1\nglobal: a8w8\nrules:\n  - {selector}\n    scheme: a16w8\n")
    quantizer = IntegerQuantizer.from_config(path)
    plan = quantizer.plan(exported)
    convolutions = [op for op in plan.ops if op.node.startswith("conv2d")]
    assert convolutions
    assert {op.scheme for op in convolutions} == {"a16w8"}
    assert plan.warnings == ()
    assert IntegerQuantizer.from_config(quantizer.to_config()).plan(exported).ops == plan.ops


@pytest.mark.parametrize("text", ["inputs: {x: a8, y: a8}", "outputs:\n  1: a8"])
def test_inputs_and_outputs_the_model_does_not_have(
    exported: ExportedProgram, tmp_path: Path, text: str
) -> None:
    path = write(tmp_path, f"version: 1\nglobal: a8w8\n{text}\n")
    line = 2 + len(text.splitlines())
    with pytest.raises(
        ConfigError, match=rf"{path}:{line}: the model has no (input 'y'|output '1')"
    ):
        IntegerQuantizer.from_config(path).plan(exported)


def test_a_wrong_scheme_is_the_same_mistake_in_code_and_in_a_file() -> None:
    with pytest.raises(SchemeError) as in_code:
        IntegerQuantizer().set_global("a8w8-x")
    with pytest.raises(ConfigError) as in_file:
        load_config({"version": 1, "global": "a8w8-x"})
    assert str(in_code.value) in str(in_file.value)


@pytest.mark.parametrize("name", ["a8-per_tensor", "a8-bias16", "a16-full", "a8w8", "dyn8"])
def test_a_format_says_nothing_about_weights_in_code_and_in_a_file(name: str) -> None:
    with pytest.raises(SchemeError, match=re.escape(repr(name))):
        IntegerQuantizer().set_io(inputs=name)
    with pytest.raises(ConfigError, match=re.escape(repr(name))):
        load_config({"version": 1, "inputs": name})


# -- schema and documents -----------------------------------------------------------------------


@pytest.fixture(scope="module")
def generator() -> ModuleType:
    return documentation_script("make_config_reference.py")


def test_shipped_schema_and_reference_are_up_to_date(generator: ModuleType) -> None:
    text = generator.SCHEMA_FILE.read_text(encoding="utf-8")
    assert json.loads(text) == json_schema()
    assert text == generator.schema_text()
    reference = generator.REFERENCE_FILE.read_text(encoding="utf-8")
    assert reference == generator.reference_text(reference)


def test_the_schema_names_every_key_and_refuses_others() -> None:
    def objects(part: Any) -> Iterator[dict[str, Any]]:
        if isinstance(part, dict):
            if "properties" in part:
                yield part
            for value in part.values():
                yield from objects(value)

    found = list(objects(json_schema()))
    assert len(found) == 3
    for part in found:
        assert part["additionalProperties"] is False
        for value in part["properties"].values():
            assert value["description"]


def blocks(path: Path, *languages: str) -> list[tuple[str, str]]:
    fence = re.compile(rf"^```({'|'.join(languages)})\n(.*?)^```$", re.M | re.S)
    return [(match[1], match[2]) for match in fence.finditer(path.read_text(encoding="utf-8"))]


@pytest.mark.parametrize("document", ["config.md", "choosing_bit_widths.md"])
def test_config_files_in_documents_are_legal(tmp_path: Path, document: str) -> None:
    found = blocks(DOCS / document, "yaml", "json")
    assert found
    for suffix, text in found:
        load_config(write(tmp_path, text, f"example.{suffix}"))


def test_messages_in_documents_are_real(
    exported: ExportedProgram, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    mistakes, no_module = (text for _, text in blocks(DOCS / "config.md", "text"))
    text = (
        "version: 1\nglobal: 8\nrules:\n  - modul_name: x\n    scheme: a8w8\n"
        "  - node_name: y\n    scheme: {activations: 8, weights: 17}\n"
    )
    write(tmp_path, text)
    with pytest.raises(ConfigError) as raised:
        load_config("mixed.yaml")
    assert f"{raised.value}\n" == mistakes
    write(
        tmp_path,
        "version: 1\nglobal: a8w8\nrules:\n  - module_name: layr3.*\n    scheme: a16w8\n",
    )
    with pytest.raises(ConfigError) as raised:
        IntegerQuantizer.from_config("mixed.yaml").plan(exported)
    assert f"{raised.value}\n" == no_module


def test_examples_of_choosing_bit_widths_print_what_is_written() -> None:
    namespace: dict[str, Any] = {}
    printed, written = [], []
    for language, text in blocks(DOCS / "choosing_bit_widths.md", "python", "text"):
        if language == "text":
            written.append(text)
            continue
        out = io.StringIO()
        with contextlib.redirect_stdout(out):
            exec(text, namespace)
        if out.getvalue():
            printed.append(out.getvalue())
    assert printed == written
    assert len(printed) == 4


def test_the_first_example_is_the_same_as_a_file(tmp_path: Path) -> None:
    texts = [text for _, text in blocks(DOCS / "choosing_bit_widths.md", "python")]
    namespace: dict[str, Any] = {}
    with contextlib.redirect_stdout(io.StringIO()):
        for text in texts[:2]:
            exec(text, namespace)
    (_, text), *_ = blocks(DOCS / "choosing_bit_widths.md", "yaml")
    config = load_config(write(tmp_path, text))
    assert dump_config(config) == namespace["quantizer"].to_config()
