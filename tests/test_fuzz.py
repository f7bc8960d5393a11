"""Random models of registry ops under random schemes: our errors, or right answers.

What must hold of each is in ``support/fuzz.py``. The slow tests are cut into chunks, each with a
seed of its own, so that they can be run piecewise::

    pytest -m slow tests/test_fuzz.py -k "converted and 17-"
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, given, seed, settings
from support import fuzz
from support.fuzz import CASES, NothingToQuantizeError, Sample, Step
from support.selection import slow_but

from custom_quantizer.ops import REGISTRY


def explore(
    check: Callable[[Sample], Any], chunk: int, count: int, most_steps: int
) -> Counter[str]:
    """Check ``count`` samples that follow from the seed ``chunk``.

    What fails is not made smaller when it has to be lowered, which takes seconds a try; the sample
    is printed in full.
    """
    outcomes: Counter[str] = Counter()
    shrinks = () if check is fuzz.check_lowered else (Phase.shrink,)

    @settings(
        max_examples=count,
        database=None,
        deadline=None,
        derandomize=False,  # the seed decides
        phases=(Phase.generate, *shrinks),
        suppress_health_check=list(HealthCheck),
    )
    @seed(chunk)
    @given(fuzz.samples(most_steps))
    def run(sample: Sample) -> None:
        try:
            check(sample)
            outcomes["checked"] += 1
        except NothingToQuantizeError:
            outcomes["nothing to quantize"] += 1
        except Exception as error:
            error.add_note(repr(sample))
            raise

    run()
    return outcomes


def test_random_models_compute_what_their_converted_graph_says() -> None:
    outcomes = explore(fuzz.check_converted, chunk=0, count=15, most_steps=6)
    assert outcomes["checked"] >= 8, outcomes


def test_random_programs_run_where_and_what_was_predicted() -> None:
    outcomes = explore(fuzz.check_lowered, chunk=3, count=2, most_steps=4)
    assert outcomes["checked"] >= 1, outcomes


# What random samples found, reduced. The check that failed is the one that runs here.
FOUND_LOWERED = {
    # XNNPACK kept the image channels last and took the softmax over its channels.
    "softmax over the rows of an image behind a convolution": Sample(
        ((2, 8, 5, 7),),
        (
            Step("conv", "2d_relu6"),
            Step("softmax", "last", behind="hardtanh"),
            Step("conv_transpose", "1d", fit="first"),
        ),
    ),
    "softmax over the channels of an image behind a convolution": Sample(
        ((2, 8, 5, 7),), (Step("conv", "2d"), Step("softmax", "channels"), Step("add", "itself"))
    ),
    # The partitioner counts the distinct inputs of a cat, and refuses a single one.
    "cat of a wide tensor with itself": Sample(
        ((3, 16),), (Step("linear", "plain", fit="layer"),), default="a10w8"
    ),
    # The partitioner takes pools of single images and fails on them.
    "average pool of an image without a batch": Sample(
        ((8, 10, 9),),
        (Step("avg_pool2d", "counted_padding"), Step("avg_pool2d", "2x2"), Step("linear", "plain")),
    ),
    # ExecuTorch takes its moves around a convolution of one dimension for integer ops.
    "wide weights of a convolution of one dimension": Sample(
        ((2, 8, 21),), (Step("conv", "1d", fit="layer", behind="relu in place"),), default="a8w13"
    ),
    # The clamp that keeps an op in float as its fallback was taken for an activation behind it.
    "an add whose scales no kernel takes": Sample(
        ((5, 16),), (Step("div", "broadcast", fit="layer"),)
    ),
    # ExecuTorch looked for the first entry of a tensor without dims.
    "a quantized mean over all dims": Sample(
        ((2, 8, 10, 9), (2, 8, 21), (5, 16)),
        (
            Step("mean", "negative_dims", sources=(3,), fit="first"),
            Step("unknown", "sin", sources=(5,), fit="layer", behind="relu in place"),
            Step("cat", "two", sources=(1, 2), fit="first", behind="clamp"),
        ),
        seed=91,
    ),
    # A chain of exactly 10 functions: the process was aborted.
    "functions of narrow integers in a row": Sample(
        ((2, 8, 5, 7),),
        (
            Step("add", "itself"),
            Step("sigmoid", "image"),
            Step("tanh", "image"),
            Step("add", "itself"),
        ),
        default="a4w8",
    ),
    # The same, with a tensor that is read at the start of the chain and in it.
    "functions of narrow integers and of what they read": Sample(
        ((2, 3, 5, 8),),
        (
            Step("silu", "in_place", (1,), behind="clamp_min"),
            Step("relu", "plain", (3, 1), behind="relu6"),
            Step("floor", "rank2", (5,), fit="layer", behind="relu6"),
            Step("add", "relu6", (2,), fit="first", behind="relu6"),
            Step("add", "relu6", (4,), fit="layer", behind="hardtanh"),
        ),
        default="a5w12-per_tensor-bias27-moving_average",
        rules=(
            ("node", 0, "a8w8-symmetric-narrow-bias6-histogram"),
            ("module", 3, "a14w5-bias12-lsq"),
        ),
        outputs_as="a8",
        seed=246,
    ),
    # Pointwise convolutions that quantize at run time: the plan named another kernel.
    "a pointwise convolution of 4-bit weights behind a slice": Sample(
        ((2, 8, 6, 4),),
        (Step("conv", "2d_pointwise"), Step("split", "unbind", (1,), fit="layer", behind="relu")),
        default="dyn8w4",
    ),
}

FOUND_CONVERTED = {
    # The bound that keeps the norm of a row of zeros from being 0 was rounded to 0.
    "normalized rows of zeros": Sample(
        ((2, 8, 5, 7),),
        (Step("floor", "image", behind="relu"), Step("vector_norm", "normalize", fit="first")),
        outputs_as="a8",
    ),
}


# Tests of lowering hold the others, too: softmaxes of images, float convolutions between integers,
# scales that no kernel takes.
QUICK = (
    "cat of a wide tensor with itself",
    "average pool of an image without a batch",
    "functions of narrow integers in a row",
)


@pytest.mark.parametrize("name", slow_but(QUICK, FOUND_LOWERED))
def test_findings_stay_fixed(name: str) -> None:
    fuzz.check_lowered(FOUND_LOWERED[name])


@pytest.mark.parametrize("name", FOUND_CONVERTED)
def test_findings_before_lowering_stay_fixed(name: str) -> None:
    fuzz.check_converted(FOUND_CONVERTED[name])


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [f"{i}-of-40" for i in range(1, 41)])
def test_many_converted(chunk: str) -> None:
    outcomes = explore(fuzz.check_converted, int(chunk.split("-")[0]), count=50, most_steps=10)
    assert outcomes["checked"] >= 40, outcomes


@pytest.mark.slow
@pytest.mark.parametrize("chunk", [f"{i}-of-30" for i in range(1, 31)])
def test_many_lowered(chunk: str) -> None:
    number = 1000 + int(chunk.split("-")[0])
    outcomes = explore(fuzz.check_lowered, number, count=10, most_steps=8)
    assert outcomes["checked"] >= 7, outcomes


SMALL = Sample(
    ((2, 8, 5, 7),),
    (
        Step("conv", "2d", behind="relu"),
        Step("sigmoid", "image"),
        Step("add", "same_shape", (0, 1)),
    ),
)


def test_a_tensor_that_is_two_units_off_is_noticed() -> None:
    done = fuzz.converted(SMALL)
    graph = fuzz.check_plan(done)
    reference = fuzz.Recorded(graph)
    reference(*done.example)
    assert len(reference.stored) >= 4
    for node, stored in reference.stored.items():
        for off in (-2, 2):
            compared = fuzz.Compared(graph, {**reference.stored, node: stored + off})
            compared.run(*done.example)
            assert any(line.startswith(f"{node.args[0].name} ") for line in compared.wrong), node


def test_an_op_that_is_float_against_the_plan_is_noticed() -> None:
    done = fuzz.converted(SMALL)
    (conv,) = (
        node for node in done.graph.graph.nodes if node.target is torch.ops.aten.conv2d.default
    )
    real = next(node for node in done.graph.graph.nodes if node.op == "placeholder")
    conv.args = (real, *conv.args[1:])
    with pytest.raises(AssertionError, match=r"conv2d is float: its input .* is in float"):
        fuzz.check_plan(done)


def test_every_case_of_the_registry_can_be_drawn() -> None:
    drawn = {case for family, case in CASES if family != "unknown"}
    assert {case.name for rule in REGISTRY for case in rule.cases} == drawn
    for family, case in CASES:
        built = fuzz.Model(Sample(((2, 8, 5, 7),), (Step(family, case, (0,), "moves"),)))
        assert len(built.wiring) == 1, (family, case)
