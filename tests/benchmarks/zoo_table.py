"""The Markdown page of ``zoo.py``, from what it stored."""

from __future__ import annotations

from collections import Counter
from typing import Any

from torchvision_table import (
    before_lowering,
    latency_ratio,
    length,
    lowering,
    mean_line,
    number,
    ratio,
    table,
    what_is_not_integer,
    whole,
)

__all__ = ["render"]

Record = dict[str, Any]

HEADER = """# Models of timm and transformers

Made by `python tests/benchmarks/zoo.py --output docs/results`, with timm {timm} and transformers
{transformers}. Random weights, batch-norm statistics of random images, of blocks that repeat in a
stage the first two, small images and sentences; scheme `a8w8`, `minmax`. "Stock" is
`XNNPACKQuantizer` with one weight scale a channel and `XnnpackPartitioner`. Ratios are of CPU
seconds of one thread, stock = 1; a dash stands for what failed.

Stock observes histograms, ours the smallest and largest value. Some models lose up to 1 dB against
it; six of them were looked into, one exchange at a time: stock with smallest and largest values
has ours of visformer_tiny (23.1), mobilenetv4_conv_small, dla34 and fbnetc_100 within 0.3 dB, and
`a8w8-histogram` what stock has, or more. fasternet_t0 (0.3 dB with the same observer) keeps the
pieces of a split on the scale of the whole, which moves them for nothing.
dpn68 (0.6 dB, of which other images to calibrate on take 0.4) has the scales of stock, one for one.

Tensors that are joined have one scale in the stock flow, and where one of them is joined again
behind a pool, so have all blocks before. Of inception_v3 (149 pixels) that takes 5 dB: 24.7 dB, and
29.2 in ours, where a part that others read keeps its own scale if that of the join is more than
twice as coarse. With scales of their own for all such parts dpn68 would lose 0.9 dB and
cs3darknet_focus_s 0.3: what is requantized is rounded once more.
xcit_nano_12_p16_224 has a class token that is far smaller than the patches it is joined to; with
16-bit activations it has 40 dB.

mobilevitv2_050 has what stock has on eight other images (14.3 and 14.4).

Programs that are larger than stock's hold depthwise convolutions of more than 25 taps that are
joined for speed (`join_narrow_groups`: ConvNext, convmixer_768_32).

The stock flow observes sums of indices, too, which become floats: 26 models of transformers fail in
its calibration. With these random weights coat_lite_tiny magnifies last bits of float ops; `lower`
finds that each of its tensors follows from those before.

Our columns are of two days: what is measured again after a change keeps its seconds, which are
those next to stock's. Those of latency are older. Where a column of stock or of latency has a dash
and no failure is listed below, it was not measured.
"""


def render(results: Record) -> str:
    """Our flow against the stock one for each model, failures, and what is not integer."""
    models: Record = results["models"]
    run = {name: model for name, model in models.items() if model.get("ours") is not None}
    header = (
        "model",
        "delegates (stock)",
        "outside (stock)",
        "integer ops",
        "float ops",
        "SQNR to float in dB (stock)",
        "latency",
        "prepare to convert",
        "lower and check",
        "bytes",
    )
    lines = [HEADER.format(**results["libraries"]), *table(header, list(map(_row, run.items())))]
    lines += ["", *_summary(run), "", *_failures(run)]
    missing = [name for name in models if name not in run]
    lines += ["## Not run", "", ", ".join(missing), ""] if missing else []
    return "\n".join([*lines, *_float_ops(run), *what_is_not_integer(run, floating=False)])


def _row(item: tuple[str, Record]) -> tuple[str, ...]:
    name, model = item
    ours, stock = model["ours"], model.get("stock") or {}
    return (
        name,
        f"{whole(ours.get('delegates'))} ({whole(stock.get('delegates'))})",
        f"{whole(length(ours.get('outside')))} ({whole(length(stock.get('outside')))})",
        whole(ours.get("integer_ops")),
        whole(length(ours.get("float_ops"))),
        f"{number(ours.get('sqnr_float'), 1)} ({number(stock.get('sqnr_float'), 1)})",
        number(latency_ratio(model, "stock")),
        ratio(before_lowering(ours), before_lowering(stock)),
        ratio(lowering(ours), lowering(stock)),
        ratio(ours.get("bytes"), stock.get("bytes")),
    )


def _summary(models: Record) -> list[str]:
    done = {flow: [m[flow] for m in models.values() if m.get(flow)] for flow in ("ours", "stock")}
    counts = {
        flow: (sum("error" not in r for r in found), sum(r.get("delegates") == 1 for r in found))
        for flow, found in done.items()
    }
    return [
        *mean_line("latency", (latency_ratio(model, "stock") for model in models.values())),
        f"- programs: {counts['ours'][0]} of {len(done['ours'])} models "
        f"(stock: {counts['stock'][0]} of {len(done['stock'])})",
        f"- one delegate: {counts['ours'][1]} models (stock: {counts['stock'][1]})",
    ]


def _float_ops(models: Record) -> list[str]:
    """How often an op of a kind is float, over all models."""
    counts = Counter(
        kind for model in models.values() for _, kind, _ in model["ours"].get("float_ops") or ()
    )
    listed = ", ".join(f"`{kind}` {count}" for kind, count in counts.most_common())
    return ["## Ops that are float", "", f"{listed}.", ""]


def _failures(models: Record) -> list[str]:
    failed = [
        f"- {name}, {flow}: {model[flow]['error']}"
        for name, model in models.items()
        for flow in ("ours", "stock")
        if "error" in (model.get(flow) or {})
    ]
    return ["## Failures", "", *failed, ""] if failed else []
