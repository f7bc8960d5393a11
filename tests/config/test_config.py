"""Formats, scheme names, rules: what a user writes, as values."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
from executorch.backends.xnnpack.quantizer.xnnpack_quantizer import (
    get_symmetric_quantization_config,
)
from hypothesis import given
from hypothesis import strategies as st
from support.graphs import Function, calls, capture
from torch import nn
from torch.fx import Node
from torchao.quantization.pt2e import HistogramObserver, MinMaxObserver, ObserverBase
from torchao.quantization.pt2e.quantizer import QuantizationConfig, QuantizationSpec

from custom_quantizer.config.rules import Config, Rule, Scope, nearest, operator_names
from custom_quantizer.core.formats import IntFormat
from custom_quantizer.core.schemes import (
    OBSERVERS,
    Granularity,
    OpScheme,
    TensorScheme,
    activation_scheme,
    coerce_scheme,
    scheme,
)
from custom_quantizer.errors import ConfigError, SchemeError

# ---------------------------------------------------------------------------------------------
# Formats
# ---------------------------------------------------------------------------------------------


@given(st.integers(2, 32), st.booleans())
def test_all_of_a_format_follows_from_its_width(bits: int, narrow: bool) -> None:
    fmt = IntFormat(bits, narrow)
    levels = fmt.quant_max - fmt.quant_min + 1
    assert levels == 2**bits - narrow
    assert fmt.quant_max + fmt.quant_min == (0 if narrow else -1)
    info = torch.iinfo(fmt.storage_dtype)
    assert info.min <= fmt.quant_min <= fmt.quant_max <= info.max
    assert info.bits == min(b for b in (8, 16, 32) if b >= bits)
    assert str(fmt) == f"int{bits}"


@pytest.mark.parametrize("bits", [1, 0, -8, 33, 8.0, "8", None])
def test_widths_that_do_not_exist(bits: Any) -> None:
    with pytest.raises(SchemeError, match=r"has 2 to 32 bits, not"):
        IntFormat(bits)


# ---------------------------------------------------------------------------------------------
# Scheme names
# ---------------------------------------------------------------------------------------------


GRANULARITIES: tuple[Granularity, ...] = ("per_tensor", "per_channel", "per_group")


@st.composite
def schemes(draw: st.DrawFn) -> OpScheme:
    """Every scheme that is legal."""
    dynamic = draw(st.booleans())
    activation_bits = 8 if dynamic else draw(st.integers(2, 16))
    granularity = draw(st.sampled_from(GRANULARITIES))
    percent = st.integers(50_0000, 100_0000).map(lambda n: f"percentile{n / 10_000}")
    return OpScheme(
        activation=TensorScheme(
            IntFormat(activation_bits, narrow=draw(st.booleans())),
            symmetric=activation_bits > 8 or draw(st.booleans()),
            observer=draw(st.one_of(st.sampled_from(OBSERVERS), percent)),
        ),
        weight=TensorScheme(
            IntFormat(draw(st.integers(2, 16)), narrow=draw(st.booleans())),
            symmetric=True,
            granularity=granularity,
            group_size=draw(st.integers(1, 256)) if granularity == "per_group" else None,
        ),
        bias=None if dynamic else draw(st.one_of(st.none(), st.integers(4, 32).map(IntFormat))),
        dynamic=dynamic,
    )


@given(schemes())
def test_a_name_is_all_of_a_scheme(given: OpScheme) -> None:
    assert scheme(given.name) == given
    assert str(given) == given.name
    assert coerce_scheme(given.name) == given == coerce_scheme(given)


@pytest.mark.parametrize(
    ("name", "keywords", "canonical"),
    [
        ("a8w8", {}, "a8w8"),
        ("a8w8-per_channel", {}, "a8w8"),
        ("a8w8-minmax", {}, "a8w8"),
        ("a8w8-bias32", {}, "a8w8"),
        ("a16w8-symmetric", {}, "a16w8"),
        ("a8w4", {"weight_granularity": "per_tensor"}, "a8w4-per_tensor"),
        ("a8w4-per_tensor", {"weight_granularity": "per_channel"}, "a8w4"),
        ("a8w8", {"symmetric_activations": True}, "a8w8-symmetric"),
        ("a8w8", {"narrow_activations": True}, "a8w8-narrow"),
        ("a8w8", {"full_range_weights": True}, "a8w8-full"),
        ("a8w8", {"bias": 16}, "a8w8-bias16"),
        ("a8w8", {"bias": "float"}, "a8w8-biasfloat"),
        ("a8w8", {"observer": "histogram"}, "a8w8-histogram"),
        ("dyn8w4g32", {}, "dyn8w4g32"),
        ("dyn8w4", {"group_size": 64}, "dyn8w4g64"),
        ("dyn8w8-biasfloat", {}, "dyn8w8"),
        ("a8w8-histogram-per_tensor-bias16", {}, "a8w8-per_tensor-bias16-histogram"),
    ],
)
def test_canonical_names(name: str, keywords: dict[str, Any], canonical: str) -> None:
    assert scheme(name, **keywords).name == canonical


def test_what_the_plain_name_means() -> None:
    """int8 affine activations, int8 symmetric weights in [-127, 127], int32 bias."""
    plain = scheme("a8w8")
    assert (plain.activation.format.quant_min, plain.activation.format.quant_max) == (-128, 127)
    assert not plain.activation.symmetric
    assert (plain.weight.format.quant_min, plain.weight.format.quant_max) == (-127, 127)
    assert plain.weight.symmetric
    assert plain.weight.granularity == "per_channel"
    assert plain.bias == IntFormat(32)
    assert not plain.dynamic


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("", "'' is no scheme name"),
        ("int8", "'int8' is no scheme name; did you mean a8w8?; a name is a<bits>w<bits>"),
        ("a8", "'a8' is no scheme name"),
        ("A8W8", "is no scheme name"),
        ("a8w8 ", "is no scheme name"),
        ("a8w8-", "'' says nothing about a scheme"),
        ("a8w8-fast", "'fast' says nothing about a scheme"),
        ("a8w8-bias", "'bias' says nothing"),
        ("a1w8", "activations have 2 to 16 bits, not 1"),
        ("a8w44", "weights have 2 to 16 bits, not 44; did you mean a8w4"),
        ("int8", "; did you mean a8w8?"),
        ("w4a8", "; did you mean a8w4?"),
        ("a8w17", "weights have 2 to 16 bits, not 17"),
        ("a24w8", "activations have 2 to 16 bits, not 24"),
        ("a8w8-bias3", "a bias has 4 to 32 bits"),
        ("a8w8-bias33", "2 to 32 bits, not 33"),
        ("dyn16w8", "activations quantized at run time have 8 bits"),
        ("dyn8w8-bias32", "only known at run time"),
        ("a8w4g0", "at least 1 input channel"),
        ("a8w8-bias8-bias16", "'bias16' contradicts or repeats"),
        ("a8w8-per_tensor-per_channel", "'per_channel' contradicts or repeats"),
        ("a8w8-minmax-histogram", "'histogram' contradicts or repeats"),
        (8, "8 is no scheme name"),
        ("a8w8-percentile20", "50 to 100 percent"),
        ("a8w8-percentile101", "50 to 100 percent"),
    ],
)
def test_names_that_mean_nothing(name: Any, message: str) -> None:
    with pytest.raises(SchemeError) as error:
        scheme(name)
    assert message in str(error.value)


@pytest.mark.parametrize(
    ("keywords", "message"),
    [
        ({"name": "a16w8", "symmetric_activations": False}, "activations are symmetric"),
        ({"name": "a8w8", "weight_granularity": "per_group"}, "a group size goes with"),
        ({"name": "a8w4g32", "weight_granularity": "per_channel"}, "a group size goes with"),
        ({"name": "a8w8", "observer": "mse"}, "unknown observer 'mse'; legal: minmax"),
    ],
)
def test_combinations_that_do_not_exist(keywords: dict[str, Any], message: str) -> None:
    with pytest.raises(SchemeError, match=message):
        scheme(**keywords)


def test_the_activation_half_of_a_name() -> None:
    assert activation_scheme("a8") == scheme("a8w8").activation
    assert activation_scheme("a16-histogram").observer == "histogram"
    for name in ("a8w8", "8", "a8-per_tensor", "a8-bias16"):
        with pytest.raises(SchemeError):
            activation_scheme(name)


# ---------------------------------------------------------------------------------------------
# torchao's QuantizationConfig
# ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "name"),
    [
        ({}, "a8w8-per_tensor-histogram"),
        ({"is_per_channel": True}, "a8w8-histogram"),
        ({"is_qat": True}, "a8w8-per_tensor-moving_average"),
        ({"is_per_channel": True, "is_qat": True}, "a8w8-moving_average"),
        ({"is_dynamic": True}, "dyn8w8-per_tensor"),
        ({"is_per_channel": True, "is_dynamic": True}, "dyn8w8"),
        ({"is_per_channel": True, "weight_qmin": -8, "weight_qmax": 7}, "a8w4-full-histogram"),
        ({"is_per_channel": True, "weight_qmin": -128}, "a8w8-full-histogram"),
        ({"act_qmin": -127}, "a8w8-per_tensor-narrow-histogram"),
        ({"act_qmin": -8, "act_qmax": 7}, "a4w8-per_tensor-histogram"),
    ],
)
def test_every_variant_of_xnnpacks_config(options: dict[str, Any], name: str) -> None:
    found = coerce_scheme(get_symmetric_quantization_config(**options))
    assert found is not None
    assert found.name == name


def _spec(**changes: Any) -> QuantizationSpec:
    options: dict[str, Any] = {
        "dtype": torch.int8,
        "observer_or_fake_quant_ctr": MinMaxObserver,
        "quant_min": -128,
        "quant_max": 127,
        "qscheme": torch.per_tensor_affine,
    }
    return QuantizationSpec(**{**options, **changes})


WEIGHT = _spec(quant_min=-127, qscheme=torch.per_channel_symmetric, ch_axis=0)


class OwnObserver(ObserverBase):  # type: ignore[misc]
    """Something this package cannot know."""


@pytest.mark.parametrize(
    ("activation", "weight", "output", "message"),
    [
        (None, WEIGHT, None, "has no integer kernel; set both"),
        (_spec(), None, None, "has no integer kernel; set both"),
        (_spec(dtype=torch.uint8, quant_min=0, quant_max=255), WEIGHT, None, "torch.uint8"),
        (_spec(), _spec(dtype=torch.float16), None, "weight dtype torch.float16"),
        (_spec(quant_min=-100), WEIGHT, None, r"range \[-100, 127\]"),
        (_spec(), WEIGHT, _spec(quant_min=-127), "must have the same range"),
        (_spec(), _spec(), None, "weights are symmetric"),
        (_spec(observer_or_fake_quant_ctr=OwnObserver), WEIGHT, None, "OwnObserver"),
    ],
)
def test_configs_that_are_no_scheme(
    activation: Any, weight: Any, output: Any, message: str
) -> None:
    with pytest.raises(SchemeError, match=message):
        coerce_scheme(QuantizationConfig(activation, output, weight, None))


def test_a_config_written_by_hand() -> None:
    observed = _spec(observer_or_fake_quant_ctr=HistogramObserver.with_args(bins=64))
    found = coerce_scheme(QuantizationConfig(observed, observed, WEIGHT, None))
    assert found == scheme("a8w8-histogram")
    implicit = _spec(quant_min=None, quant_max=None)
    assert coerce_scheme(QuantizationConfig(implicit, None, WEIGHT, None)) == scheme("a8w8")


@pytest.mark.parametrize("value", [8, 8.0, ["a8w8"], True, torch.int8, object()])
def test_what_is_no_scheme_at_all(value: Any) -> None:
    with pytest.raises(SchemeError, match="expected a scheme, a scheme name"):
        coerce_scheme(value)


# ---------------------------------------------------------------------------------------------
# Rules
# ---------------------------------------------------------------------------------------------


def test_a_rule_reads_like_the_call_that_set_it() -> None:
    a8w8 = scheme("a8w8")
    assert str(Rule(Scope.GLOBAL, "", a8w8)) == 'set_global("a8w8")'
    assert str(Rule(Scope.MODULE_NAME, "l.*", None)) == 'set_module_name("l.*", None)'
    assert str(Rule(Scope.NODE_NAME, "conv2d", a8w8)) == 'set_node_name("conv2d", "a8w8")'


def test_what_no_rule_selects_stays_in_float_for_lack_of_a_rule() -> None:
    graph = capture(Function(lambda s, x: x + x), (torch.randn(2),))
    (node,) = calls(graph, torch.ops.aten.add.Tensor)
    decision = Config().resolve(node)
    assert (decision.scheme, decision.explicit) == (None, False)
    assert decision.reason == "no rule selects it"
    by_default = Config([Rule(Scope.GLOBAL, "", None)]).resolve(node)
    assert (by_default.explicit, by_default.reason) == (False, "set_global(None)")
    by_name = Config([Rule(Scope.NODE_NAME, "add", None)]).resolve(node)
    assert by_name.explicit


def test_module_types_match_every_module_around_an_op_and_not_by_substring() -> None:
    class Block(nn.Sequential):
        pass

    model = nn.Sequential(Block(nn.Linear(4, 4)), nn.Linear(4, 4))
    graph = capture(model, (torch.randn(2, 4),))
    inner, outer = calls(graph, torch.ops.aten.linear.default)
    kind = f"{Block.__module__}.{Block.__qualname__}"
    rule = Rule(Scope.MODULE_TYPE, kind, None)
    assert [rule.matches(inner), rule.matches(outer)] == [True, False]
    linear = Rule(Scope.MODULE_TYPE, "torch.nn.modules.linear.Linear", None)
    assert [linear.matches(inner), linear.matches(outer)] == [True, True]
    assert not Rule(Scope.MODULE_TYPE, "linear.Linear", None).matches(inner)


def test_operator_names() -> None:
    aten = torch.ops.aten
    assert operator_names(aten.conv2d.default) == ["aten.conv2d.default"]
    assert operator_names("aten.relu_.default") == ["aten.relu_.default"]
    assert operator_names("torch.ops.aten.relu.default") == ["aten.relu.default"]
    assert set(operator_names(aten.conv2d)) == {"aten.conv2d.default", "aten.conv2d.padding"}
    with pytest.raises(ConfigError, match=r"did you mean .*aten\.conv2d"):
        operator_names("aten.conv2.default")
    with pytest.raises(ConfigError, match=r"did you mean .*aten\.linear\.default"):
        operator_names("aten.linear")  # no overload
    with pytest.raises(ConfigError, match=r"aten\.sin\.default is not an operator"):
        operator_names(aten.sin.default)


def test_nearest_names() -> None:
    names = ["layer1.conv", "layer2.conv", "head"]
    assert nearest("layer1.cnv", names, count=1) == "; did you mean layer1.conv?"
    assert nearest("layer3.conv", names) == "; did you mean layer2.conv or layer1.conv?"
    assert nearest("zzz", names) == ""


# Many rules: those that name what they select are found without trying each.

KEYS = {
    Scope.GLOBAL: [""],
    Scope.OPERATOR_TYPE: ["aten.conv2d.default", "aten.relu.default", "aten.*"],
    Scope.MODULE_TYPE: ["torch.nn.modules.conv.Conv2d", "torch.nn.modules.*"],
    Scope.MODULE_NAME: ["0", "0.0", "0.*", "*", "[01].1", "?", "1"],
    Scope.NODE_NAME: ["conv2d", "conv2d_1", "conv*", "*_1", "x"],
}
RULES = st.lists(
    st.sampled_from([(scope, key) for scope, keys in KEYS.items() for key in keys]), max_size=8
)


@pytest.fixture(scope="module")
def small_calls() -> list[Node]:
    block = nn.Sequential(nn.Conv2d(1, 1, 1), nn.ReLU())
    graph = capture(nn.Sequential(block, nn.Conv2d(1, 1, 1)), (torch.randn(1, 1, 2, 2),))
    return [node for node in graph.graph.nodes if node.op == "call_function"]


@given(given=RULES)
def test_the_last_rule_of_the_highest_scope_wins(
    given: list[tuple[Scope, str]], small_calls: list[Node]
) -> None:
    schemes = [scheme(f"a{2 + index}w8") for index in range(len(given))]
    rules = [Rule(*named, value) for named, value in zip(given, schemes, strict=True)]
    config = Config(rules)
    for node in small_calls:
        best = None
        for rule in rules:
            if rule.matches(node) and (best is None or rule.scope >= best.scope):
                best = rule
        decision = config.resolve(node)
        assert decision.scheme == (None if best is None else best.scheme)
        assert decision.reason == ("no rule selects it" if best is None else str(best))


def test_a_rule_that_is_added_later_counts(small_calls: list[Node]) -> None:
    config = Config([Rule(Scope.GLOBAL, "", scheme("a8w8"))])
    assert config.resolve(small_calls[0]).scheme == scheme("a8w8")
    config.rules.append(Rule(Scope.GLOBAL, "", scheme("a4w4")))
    assert config.resolve(small_calls[0]).scheme == scheme("a4w4")
    config.rules[1] = Rule(Scope.GLOBAL, "", scheme("a2w2"))
    assert config.resolve(small_calls[0]).scheme == scheme("a2w2")


def test_thousands_of_rules_take_no_time(small_calls: list[Node]) -> None:
    rules = [Rule(Scope.MODULE_NAME, f"layer{i}.conv", None) for i in range(10_000)]
    config = Config([*rules, Rule(Scope.MODULE_NAME, "0", scheme("a8w8"))])
    begin = time.perf_counter()
    for _ in range(100):
        for node in small_calls:
            config.resolve(node)
    # One after the other they take half a second for each pass over the three calls.
    assert time.perf_counter() - begin < 5


def test_nothing_is_near_a_word_of_thousands_of_letters() -> None:
    assert nearest("conv2d" * 10_000, ["conv2d"] * 10_000) == ""
