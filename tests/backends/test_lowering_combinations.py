"""Combinations of ops that were lowered wrong, or refused, once."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from typing import Any

import pytest
import torch
import torch.nn.functional as F
import torch.utils._pytree as pytree
from support.graphs import (
    Function,
    differences,
    lowered_exactly,
    quantized,
    stress,
)
from support.models import conv
from support.selection import slow_but
from torch import Tensor, nn
from torch.fx import GraphModule
from torchvision.models.convnext import CNBlockConfig, ConvNeXt

import custom_quantizer as cq
from custom_quantizer.backends.xnnpack import lowering
from custom_quantizer.errors import (
    LoweringError,
    ProgramError,
)

aten = torch.ops.aten
IMAGE = (2, 4, 6, 6)


ONCE_WRONG: dict[str, Callable[..., Any]] = {
    "channel shuffle": lambda s, x: s.head(F.channel_shuffle(s.conv(x), 2)),
    "shuffle by views": lambda s, x: s.head(
        s.conv(x).view(2, 2, 2, 6, 6).transpose(1, 2).contiguous().view(IMAGE)
    ),
    "permute, contiguous, view": lambda s, x: (
        s.conv(x).permute(0, 2, 3, 1).contiguous().view(2, -1)
    ),
    "permute, reshape": lambda s, x: s.conv(x).permute(0, 2, 3, 1).reshape(2, -1),
    "expand, reshape": lambda s, x: s.conv(x)[:, :, :1].expand(2, 4, 3, 6).reshape(2, -1),
    "one tensor three times": lambda s, x: torch.cat([s.conv(x)] * 3, 1),
    "cat of a cat": lambda s, x: torch.cat([torch.cat([s.conv(x), x], 1), s.head(x)], 1),
    "splits used twice": lambda s, x: (lambda a, b: (a * 2, b, a))(*s.conv(x).split([1, 3], 1)),
    "sparse max pool": lambda s, x: F.max_pool2d(s.conv(x), 2, 3),
    "pool of one": lambda s, x: F.adaptive_avg_pool2d(s.conv(x), 6),
    "clamp behind relu": lambda s, x: F.relu6(F.relu(s.conv(x))),
    "activation used twice": lambda s, x: (lambda h: F.relu(h) + h)(s.conv(x)),
    "constant on the left": lambda s, x: 3 - s.conv(x),
    "times zero": lambda s, x: s.conv(x) * 0,
    "difference of equals": lambda s, x: s.conv(x - x),
    "convolution of tiny values": lambda s, x: s.head(s.conv(x * 1e-30)),
    "convolution of huge values": lambda s, x: s.head(s.conv(x * 1e30)),
    "sum of far scales": lambda s, x: s.conv(x) + s.head(x * 1e-6),
    "cat of far scales": lambda s, x: torch.cat([s.conv(x) * 1e-6, x * 1e6], 1),
    "slices of both ends": lambda s, x: s.conv(x)[:, -3:-1, 1:, :-1],
    "unsqueeze everywhere": lambda s, x: s.conv(x)[:, None, ..., None],
}
GROUPS = [sorted(ONCE_WRONG)[i::3] for i in range(3)]


@cache
def once_wrong(group: int) -> tuple[GraphModule, cq.LoweredProgram]:
    torch.manual_seed(0)
    model = Function(
        lambda s, *xs: [ONCE_WRONG[n](s, x) for n, x in zip(GROUPS[group], xs, strict=True)],
        conv=conv(),
        head=conv(),
    )
    inputs = tuple(torch.randn(IMAGE) for _ in GROUPS[group])
    graph = quantized(model, inputs)
    return graph, cq.lower(graph, inputs)


@pytest.mark.parametrize("group", range(len(GROUPS)))
def test_combinations_are_exact_and_inside_the_delegate(group: int) -> None:
    graph, lowered = once_wrong(group)
    assert lowered.report.fully_delegated
    reference = cq.integer_reference(graph)
    shapes = [IMAGE] * len(GROUPS[group])
    for given in stress(shapes):
        assert differences(lowered.run(*given), reference(*given)) == [], GROUPS[group]


def test_a_pad_by_another_value_keeps_it() -> None:
    """The value lies outside of what was calibrated: rounding it to the grid would clip it."""
    x = torch.rand(IMAGE)
    graph = quantized(
        Function(lambda s, x: F.pad(s.conv(x), (1, 1), value=-99.0), conv=conv()), (x,)
    )
    lowered = cq.lower(graph, (x,))
    got = lowered.run(x)
    assert bool((got[..., 0] == -99.0).all())
    assert torch.equal(got[..., 1:-1], cq.integer_reference(graph)(x)[..., 1:-1])


def test_float_ops_are_reported_with_their_reason_and_place() -> None:
    x = torch.randn(IMAGE)
    model = Function(
        lambda s, x: s.head(torch.where(x == x, torch.sin(s.conv(x)), x)), conv=conv(), head=conv()
    )
    lowered = cq.lower(quantized(model, (x,)), (x,))
    rows = {row.node: row for row in lowered.report.not_integer()}
    assert rows.keys() == {"eq", "sin", "where"}
    assert rows["sin"].backend.label == "xnnpack float"
    assert rows["where"].backend.label == "portable kernel, outside the delegate"
    for name, overload in {"eq": "Tensor", "sin": "default"}.items():
        assert rows[name].reason == f"no integer form of aten.{name}.{overload} is known"
    assert rows["where"].reason.startswith("XNNPACK has no where; maxima and minima compute it if")
    assert any("where" in kernel for kernel in lowered.report.outside)
    assert not lowered.report.fully_delegated


def test_an_op_left_in_float_runs_in_float_between_integer_ones() -> None:
    x = torch.randn(IMAGE)
    quantizer = cq.IntegerQuantizer().set_global("a8w8").set_module_name("conv", None)
    graph = quantized(
        Function(lambda s, x: s.head(s.conv(x + 1)), conv=conv(), head=conv()), (x,), quantizer
    )
    lowered = cq.lower(graph, (x,))
    (row,) = lowered.report.not_integer()
    assert (row.node, row.backend.label) == ("conv2d", "xnnpack float")
    assert lowered.report.fully_delegated
    assert list(lowered.integer_biases()) == ["conv2d_1"]


SIGNAL = (2, 8, 21)


FLOAT_CONVS: dict[str, tuple[Callable[[], nn.Module], tuple[int, ...]]] = {
    "conv1d": (lambda: nn.Conv1d(8, 8, 3, padding="same", groups=4), SIGNAL),
    "conv_transpose1d": (lambda: nn.ConvTranspose1d(8, 8, 3, groups=2, padding=1), SIGNAL),
    "unequal_padding": (lambda: nn.Conv2d(8, 8, (2, 4), padding="same"), (2, 8, 6, 21)),
}


@pytest.mark.parametrize(
    ("name", "scheme"),
    [
        # Every layer and every scheme once; all pairs are slow.
        pytest.param(name, scheme, marks=() if i == j else pytest.mark.slow)
        for i, name in enumerate(FLOAT_CONVS)
        for j, scheme in enumerate((None, "a8w13", "a8w13-narrow"))
    ],
)
def test_float_convolutions_between_integers(name: str, scheme: str | None) -> None:
    """ExecuTorch took what it inserts next to them for integer ops, and failed."""
    conv, shape = FLOAT_CONVS[name]
    torch.manual_seed(0)
    model = nn.Sequential(
        nn.Linear(21, 21), conv(), nn.Linear(21, 21), conv(), nn.ReLU(), nn.Linear(21, 5)
    )
    quantizer = cq.IntegerQuantizer().set_global("a8w8")
    for layer in ("1", "3", "4"):
        quantizer.set_module_name(layer, scheme)
    x = torch.randn(shape)
    lowered = cq.lower(quantized(model, (x,), quantizer), (x,))
    assert (lowered.report.delegates, lowered.report.outside) == (1, ()), str(lowered.report)
    assert lowered.report.passes["keep_convs_float"] >= 1


def test_a_pool_in_float_over_images_that_are_channels_last() -> None:
    torch.manual_seed(0)
    blocks = [CNBlockConfig(8, 8, 1), CNBlockConfig(8, None, 1)]
    x = torch.randn(1, 3, 16, 16)
    quantizer = cq.IntegerQuantizer().set_operator_type(aten.linear.default, "a8w8")
    lowered = cq.lower(quantized(ConvNeXt(blocks, num_classes=4), (x,), quantizer), (x,))
    assert "adaptive_avg_pool2d" in [row.node for row in lowered.report.not_integer()]
    assert lowered.report.fully_delegated


def cancelling() -> nn.Module:
    """A convolution whose result is next to nothing beside its weights."""
    layer = nn.Conv2d(8, 4, 1)
    nn.init.constant_(layer.weight[:, :4], 1e6)
    nn.init.constant_(layer.weight[:, 4:], -1e6)
    return layer


@pytest.mark.parametrize(
    ("function", "refused"),
    [
        (lambda s, x: F.relu(x / 1e-5 - x / 1e-5), {"sub"}),
        (lambda s, x: s.head(s.layer(torch.cat([x, x], 1))), {"conv2d"}),
        (lambda s, x: F.relu6(x * 1e9 * (x - x)), {"mul_1"}),
    ],
)
def test_an_op_whose_scales_no_kernel_takes_runs_in_float(
    function: Callable[..., Any], refused: set[str]
) -> None:
    """Reference, report and program agree about it."""
    torch.manual_seed(0)
    x = torch.randn(IMAGE)
    graph = quantized(Function(function, conv=conv(), head=conv(), layer=cancelling()), (x,))
    lowered = cq.lower(graph, (x,))
    assert lowered.report.fully_delegated
    rows = [row for row in lowered.report.not_integer() if "no integer kernel" in row.reason]
    assert {row.node for row in rows} >= refused
    assert lowered.report.passes["refused_to_float"] == len(rows)
    assert all(row.backend.label == "xnnpack float" for row in rows)
    assert {op.node.name for op in cq.integer_reference(graph).float_ops} >= refused


SIGNALS = (3, 6)

# What the function returns, beside an integer op; the node that is named, and its kernel.
WITHOUT_KERNEL: dict[str, tuple[Callable[[Tensor], Any], str, str]] = {
    "distinct values": (torch.unique, "_unique2", "aten::_unique2.out"),
    "a maximum so far": (lambda y: y.cummax(1)[0], "cummax", "aten::cummax.out"),
    "indices in another order": (torch.nonzero, "nonzero", "aten::nonzero.out"),
    "no out variant": (
        lambda y: torch.linalg.svdvals(y),
        "linalg_svdvals",
        "aten::_linalg_svd.U",
    ),
}


@pytest.mark.parametrize("name", slow_but(["a maximum so far", "no out variant"], WITHOUT_KERNEL))
def test_an_op_that_nothing_computes_is_named(name: str) -> None:
    function, node, kernel = WITHOUT_KERNEL[name]
    model = Function(lambda s, x: function(s.part(x)), part=nn.Linear(6, 4))
    x = torch.randn(SIGNALS)
    with pytest.raises(LoweringError) as error:
        cq.lower(quantized(model, (x,)), (x,))
    assert type(error.value) is LoweringError
    assert f"{node}: neither XNNPACK nor ExecuTorch's runtime has a kernel for it" in str(
        error.value
    )
    assert kernel in str(error.value)


def test_for_another_runtime_the_program_is_written_all_the_same() -> None:
    x = torch.randn(1025)  # more than can be compared with each other
    graph = quantized(Function(lambda s, x: torch.argsort(x + x)), (x,))
    program = cq.lower(graph, (x,), check=False)
    assert program.contents.kernels == ("aten::sort.values",)
    with pytest.raises(ProgramError, match="or the runtime lacks a kernel"):
        program.run(x)


def test_a_kernel_that_refuses_its_input_is_named() -> None:
    x = torch.randn(1, 2, 4, 4, 4)
    model = Function(lambda s, x: F.conv_transpose3d(x + x, x.transpose(0, 1)))
    with pytest.raises(LoweringError, match=r"outside the delegate run conv_transpose3d"):
        cq.lower(quantized(model, (x,)), (x,))


def test_a_tensor_of_more_dims_than_xnnpack_has_is_named() -> None:
    x = torch.randn(128, 2)
    # Of dims that are broadcast and of others in turn none are alike.
    model = Function(lambda s, x: (y := x.view(2, 2, 2, 2, 2, 2, 2, 2)) + y[:, :1, :, :1, :, :1])
    graph = quantized(model, (x,))
    with pytest.raises(LoweringError, match=r"add has 8 dims, and XNNPACK's tensors at most"):
        cq.lower(graph, (x,))


def test_constants_of_more_dims_than_xnnpack_has_are_expanded() -> None:
    """Stored as integers, and in float as the operand of what is in float."""
    x, constant = torch.randn(2, 2, 2, 2, 2, 2, 2, 3), torch.randn(2, 1, 2, 1, 2, 1, 2, 1)
    model = Function(lambda _s, x: ((x * 2 + constant).relu(), torch.round(x) / (constant**2 + 1)))
    graph = quantized(model, (x,))
    assert lowered_exactly(graph, (x,)).report.delegates == 1


def windows_of_a_video(s: Any, x: Tensor) -> Any:
    """Ops of all kinds over eight dims, from an input of as many to outputs of as many."""
    y = torch.relu(s.first(x))
    y = torch.cat([y, s.second(x[:, :1]) + y[..., :3, :] * s.factor], -2)
    scores = s.norm(y.transpose(1, 3)).unflatten(-1, (2, 4)).softmax(-1)
    tokens = F.pad(scores.flatten(-2)[:, 0], (0, 0, 1, 2))
    return tokens.mean((1, 3)), s.third(F.silu(y)), y.select(4, 1).expand(2, 2, 1, 2, 3, 6, 8)


@pytest.mark.parametrize("scheme", ["a8w8", pytest.param("dyn8w8", marks=pytest.mark.slow)])
def test_ops_over_more_dims_than_xnnpack_has_are_ops_over_fewer(scheme: str) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 2, 1, 2, 2, 1, 3, 6)
    layers = {"first": nn.Linear(6, 8), "second": nn.Linear(6, 8), "third": nn.Linear(8, 4)}
    model = Function(windows_of_a_video, **layers, norm=nn.LayerNorm(8))
    model.factor = nn.Parameter(torch.randn(3, 1))
    quantizer = cq.IntegerQuantizer().set_global(scheme)
    quantizer.set_operator_type("aten.mean.dim", scheme)  # returned, it would be float
    graph = quantized(model, (x,), quantizer)
    lowered = cq.lower(graph, (x,))
    assert lowered.report.delegates == 1
    assert set(lowered.report.outside) <= {"aten::view_copy.out"}  # of inputs and outputs
    reference = cq.integer_reference(graph)
    for given in ((x,), (x * 3,)):
        got, want = lowered.run(*given), reference(*given)
        if scheme == "a8w8":
            assert differences(got, want) == []
        torch.testing.assert_close(got, want, rtol=1e-5, atol=2e-6)  # norms in float


def patches_of_a_video(s: Any, x: Tensor) -> Any:
    """A view of 8 dims, their permute and a view, as einops writes them."""
    frames = s.conv(x).unflatten(0, (2, 6)).transpose(1, 2)
    patches = frames.reshape(2, 4, 3, 2, 3, 2, 3, 2).permute(0, 2, 4, 6, 3, 5, 7, 1)
    return s.fc(patches.reshape(2, 27, 32)), patches.flatten(4)


@pytest.mark.parametrize("floats", [False, True])
def test_a_permute_of_more_dims_than_xnnpack_has_is_several(floats: bool) -> None:
    x = torch.randn(12, 4, 6, 6)
    model = Function(patches_of_a_video, conv=conv(), fc=nn.Linear(32, 5))
    rules = cq.IntegerQuantizer().set_global("a8w8")
    graph = quantized(model, (x,), rules.set_module_name("conv", None) if floats else rules)
    lowered = cq.lower(graph, (x,))
    assert lowered.report.fully_delegated
    reference = cq.integer_reference(graph)
    for (given,) in stress([x.shape]):
        assert differences(lowered.run(given), reference(given)) == []


UNWRITABLE: dict[str, tuple[Callable[..., Any], str]] = {
    "complex numbers": (
        lambda s, x: torch.fft.rfft(x + x).tan().abs(),
        "tan gives complex numbers to abs_1",
    ),
    "complex results": (
        lambda s, x: torch.view_as_complex((x + x).unflatten(1, (3, 2))) * 1j,
        "mul gives complex numbers to the caller",
    ),
    "text": (lambda s, x: (x + x, "text"), "output 1 is 'text'; a program returns tensors"),
    "a size that values tell": (
        lambda s, x: torch.bincount((x + x).argmax(1)),
        "bincount: the size of its result depends on values",
    ),
    "a product of what values tell": (
        lambda s, x: (lambda rows: rows @ rows.mT)((x + x)[x[:, 0] > 0]),
        "index: the size of its result depends on values, and an op behind it needs to know it",
    ),
}


def test_what_is_joined_to_a_tensor_whose_size_values_tell_is_float() -> None:
    def forward(s: Any, x: Tensor) -> Tensor:
        x = s.linear(x)
        return s.linear(torch.cat([x[x[:, 0] > 0], x]))

    x = torch.randn(8, 6)
    graph = quantized(Function(forward, linear=nn.Linear(6, 6)), (x,))
    lowered, reference = cq.lower(graph, (x,)), cq.integer_reference(graph)
    assert "aten::cat.out" in lowered.report.outside
    for given in (x, -x, x.abs()):
        torch.testing.assert_close(lowered.run(given), reference(given))


@pytest.mark.parametrize("name", UNWRITABLE)
def test_what_no_program_holds(name: str) -> None:
    function, message = UNWRITABLE[name]
    x = torch.randn(SIGNALS)
    with pytest.raises(LoweringError, match=message):
        cq.lower(quantized(Function(function), (x,)), (x,))


@pytest.mark.slow
def test_products_of_dynamic_rows_are_right() -> None:
    """Dynamic rows by dynamic rows, a computed weight: float, in the delegate."""

    def forward(s: Any, x: Tensor) -> tuple[Tensor, ...]:
        y = s.conv1d(x)
        rows, weight = y[:, 0], y[0, :4, :2].reshape(2, 4)
        broadcast = y @ s.other(x)[0].transpose(0, 1)
        return torch.softmax(rows @ rows.T, -1), broadcast, F.linear(rows[:, :4], weight)

    layers = {"conv1d": nn.Conv1d(3, 4, 1), "other": nn.Conv1d(3, 4, 1)}
    torch.manual_seed(0)
    model, x = Function(forward, **layers), torch.randn(4, 3, 7)
    result = cq.quantize(Single(model), (x,), [(x,)], dynamic_batch=8, progress=False)
    assert result.lowered is not None
    assert result.lowered.report.outside == ()
    reference = cq.integer_reference(result.converted)
    for size in (4, 8, 1):
        given = torch.randn(size, 3, 7)
        for got, want in zip(result.lowered.run(given), reference(given), strict=True):
            # Sums of seven products, in another order.
            torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


# Arguments that are made of a dynamic batch n: the op runs in float, and says so.
SIZED: dict[str, Callable[[Tensor, Any], Tensor]] = {
    "clamp": lambda y, n: y.clamp(-n, n * 0.5),
    "clamp_max": lambda y, n: y.clamp(max=n - 2),
    "constant_pad_nd": lambda y, n: F.pad(y, (0, 0, n, 1)),
    "expand": lambda y, n: y[0].expand(n, 2, 7),
    "reshape": lambda y, n: y.reshape(n, 14),
    "mul": lambda y, n: y * n,
    "rsub": lambda y, n: n - y,
    "leaky_relu": lambda y, n: F.leaky_relu(y, 1 / n),
    "factor": lambda y, n: y * (torch.tensor([[0.5], [2.0]]) * n),
}


@pytest.mark.slow
def test_arguments_that_depend_on_a_dynamic_size() -> None:
    layers = {f"part{i}": nn.Conv1d(3, 2, 1) for i in range(len(SIZED))}

    def forward(s: Any, x: Tensor) -> list[Tensor]:
        parts = [getattr(s, f"part{i}")(x) for i in range(len(SIZED))]
        return [f(y, x.shape[0]) for f, y in zip(SIZED.values(), parts, strict=True)]

    torch.manual_seed(0)
    x = torch.randn(4, 3, 7)
    model = Single(Function(forward, **layers))
    result = cq.quantize(model, (x,), [(x,)], dynamic_batch=8, progress=False)
    reasons = {op.node: op.reason for op in result.plan.ops if op.scheme is None}
    for name in ("clamp", "clamp_1", "expand"):
        assert reasons[name] == "one of its arguments depends on a dynamic size"
    assert reasons["pad"] == "how much it pads depends on a dynamic size"
    assert "reshape" not in reasons
    assert result.lowered is not None
    reference = cq.integer_reference(result.converted)
    for size in (4, 8, 1):
        given = torch.randn(size, 3, 7)
        assert differences(result.lowered.run(given), reference(given)) == []


@pytest.mark.slow
@pytest.mark.parametrize(
    "function",
    [
        lambda y, n: y.abs() ** n,
        lambda y, n: F.celu(y, n * 0.5),
        pytest.param(lambda y, n: (y.abs() + 1) ** -n, marks=pytest.mark.slow),
        pytest.param(lambda y, n: F.softplus(y, n * 0.5), marks=pytest.mark.slow),
    ],
)
def test_functions_with_a_factor_that_depends_on_a_dynamic_size(
    function: Callable[[Tensor, Any], Tensor],
) -> None:
    torch.manual_seed(0)
    x = torch.randn(4, 3, 7)
    layer = nn.Conv1d(3, 2, 1)
    model = Single(Function(lambda s, x: function(s.layer(x), x.shape[0]), layer=layer))
    result = cq.quantize(model, (x,), [(x,)], dynamic_batch=8, progress=False)
    assert result.lowered is not None
    given = torch.rand(3, 3, 7)
    program, reference = result.lowered.run, cq.integer_reference(result.converted)
    want, got = (pytree.tree_leaves(run(given)) for run in (reference, program))
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-6)


class Single(nn.Module):
    """One input by name: its batch may vary."""

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model

    def forward(self, x: Tensor) -> Any:
        return self.model(x)


def steep_softplus(x: Tensor) -> Tensor:
    """Above the threshold it is its input; below it is not close to it."""
    return F.softplus(x, 1.0, 3.0)


def renormalized(x: Tensor) -> Tensor:
    return torch.renorm(x, 2, 1, 0.5)


def entropies(x: Tensor) -> Tensor:
    return torch.special.entr(x.relu() + 0.1)


COMPOSITES = (entropies, renormalized, steep_softplus, F.tanhshrink)


def test_composite_float_ops_of_images_are_right() -> None:
    """Some of their parts run inside the delegate, which keeps images channels last, some not."""
    x = torch.randn(IMAGE)
    layers = {f"conv{i}": conv() for i in range(len(COMPOSITES))}
    graph = quantized(
        Function(
            lambda s, x: [f(getattr(s, f"conv{i}")(x)) for i, f in enumerate(COMPOSITES)], **layers
        ),
        (x,),
    )
    lowered = cq.lower(graph, (x,))
    assert lowered.report.passes["shield_composites"] >= 1
    given = torch.randn(IMAGE)
    reference = cq.integer_reference(graph)(given)
    for got, want in zip(lowered.run(given), reference, strict=True):
        # Each is a few float32 operations on values below 10.
        torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)


def test_masks_of_what_is_large_are_in_the_delegate() -> None:
    def function(s: Any, x: Tensor) -> list[Tensor]:
        y = s.conv(x)
        kept = torch.where((y > -0.3) & (y < 0.4), y, 1.5 * y)
        return [F.softshrink(kept), F.hardshrink(y), F.threshold(y, 0.1, 20.0)]

    x = torch.randn(IMAGE)
    assert lowered_exactly(
        quantized(Function(function, conv=conv()), (x,)), (x,)
    ).report.fully_delegated


def test_parameters_that_are_written_are_refused() -> None:
    """ExecuTorch would hand them back as further outputs."""

    def forward(s: Any, x: Tensor) -> Tensor:
        s.c.weight.div_(1.0)
        result: Tensor = s.c(x) + s.d(x)
        return result

    x = torch.randn(IMAGE)
    graph = quantized(Function(forward, c=conv().requires_grad_(False), d=conv()), (x,))
    with pytest.raises(LoweringError, match=r"writes into its parameter c\.weight in every call"):
        cq.lower(graph, (x,))


def test_what_executorch_cannot_lower_is_an_error_of_ours(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_args: Any, **_options: Any) -> None:
        raise KeyError("aten.unheard_of\nand a page of graph")

    monkeypatch.setattr(lowering, "to_edge", refuse)
    x = torch.randn(4, 6, 6)
    graph = quantized(Function(lambda s, x: x + x), (x,))
    message = r"ExecuTorch could not partition the graph: KeyError: 'aten.unheard_of.*"
    with pytest.raises(LoweringError, match=message):
        cq.lower(graph, (x,))


def test_one_image_without_a_batch() -> None:
    x = torch.randn(4, 6, 6)
    graph = quantized(Function(lambda s, x: F.max_pool2d(x + x, 2)), (x,))
    assert lowered_exactly(graph, (x,)).report.fully_delegated


@pytest.mark.parametrize("first", [None, "dyn8w8", "a16w8-biasfloat", "a8w8-biasfloat"])
def test_a_float_bias_is_rounded_to_the_scale_of_each_layer_that_adds_it(first: str | None) -> None:
    """Upstream writes a constant once, so the second layer had the first one's bias."""
    shared = conv()
    assert shared.bias is not None
    shared.bias.data *= 10
    x = torch.randn(IMAGE)
    rules = cq.IntegerQuantizer().set_global("a8w8-biasfloat").set_node_name("conv2d", first)
    graph = quantized(
        Function(lambda s, x: s.conv(F.relu(s.conv(x)) * 3.7), conv=shared), (x,), rules
    )
    checked = cq.verify(graph, cq.lower(graph, (x,)), [(torch.randn(IMAGE),)])
    (output,) = checked.outputs
    assert output.max_lsb is not None
    assert output.max_lsb <= 1.01, "an integer bias is rounded, a float one is not"


def test_a_layer_with_groups_of_weights_may_be_called_twice() -> None:
    """What stood between the calls could not be in their delegate, nor before or behind it."""
    x = torch.randn(4, 32)

    def forward(s: Any, x: Tensor) -> Tensor:
        product = s.layer(x).view(4, 4, 8) @ x.view(4, 8, 4)
        result: Tensor = s.layer(product.flatten(1).repeat(1, 2))
        return result

    layer = nn.Linear(32, 32)
    graph = quantized(Function(forward, layer=layer), (x,), "dyn8w4g32")
    lowered = cq.lower(graph, (x,))
    assert lowered.report.fully_delegated
    (output,) = cq.verify(graph, lowered, [(torch.randn(4, 32),)]).outputs
    assert output.max_abs < 1e-5
