"""Numbers in the documentation are the ones that a command measured and stored.

What looks like a measurement in a page stands in a block that is made from ``docs/results``, or is
checked by ``CLAIMS``, or was printed by the page's own script, or is no measurement and says so in
``NOT_MEASURED``. Anything else fails.
"""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Iterable
from functools import cache
from typing import Any

import pytest
import test_models
from scipy.stats import binomtest
from support.scripts import DOCS, documentation_script

import custom_quantizer as cq

ROOT = DOCS.parent
PAGES = {page.name: page for page in (ROOT / "README.md", *sorted(DOCS.glob("*.md")))}

BENCHMARKS = {
    "arm": "arm",
    "bit_widths": "bit_widths",
    "c_code": "c_code",
    "caches": "caches",
    "calibration_cost": "calibration_cost",
    "torchvision_models": "torchvision_table",
    **{f"calibration_{name}": "calibration_studies" for name in ("batches", "low_bits")},
    **{f"calibration_{name}": "calibration_studies" for name in ("networks", "observers")},
    "calibration_samples": "calibration_studies",
    **{f"qat_{name}": "qat_studies" for name in ("bias", "networks", "rates", "widths")},
    "qat_starts": "qat_studies",
    "file_sizes": "file_sizes",
    "improve": "improve",
    "chains": "chains",
    "learned_rounding": "learned_rounding",
    "long_graphs": "long_graphs",
    "memory": "memory",
    "mutation_score": "mutation_score",
    "onnxruntime_latency": "onnxruntime_latency",
    "packed_layers": "packed_layers",
    "peers": "peers",
    "search": "search",
    "second_scheme": "second_scheme",
    "shared_layers": "shared_layers",
    "tosa": "tosa_programs",
    "upstream_ops": "upstream_ops",
    "zoo": "zoo_table",
}
"""Which benchmark renders the page of a stored result."""


@cache
def results() -> Any:
    return documentation_script("make_results.py")


def rows(name: str) -> dict[str, Any]:
    found: dict[str, Any] = results().stored(name)["rows"]
    return found


def loss(name: str, *keys: str) -> list[float]:
    """Points below float, of each row."""
    return [-100 * rows(name)[key]["difference"] for key in keys]


# ---------------------------------------------------------------------------------------------
# Tables
# ---------------------------------------------------------------------------------------------


def test_every_stored_result_has_its_benchmark() -> None:
    assert {file.stem for file in results().RESULTS.glob("*.json")} == set(BENCHMARKS)
    assert {file.stem for file in results().RESULTS.glob("*.md")} == set(BENCHMARKS)


@pytest.mark.parametrize("name", BENCHMARKS)
def test_a_page_of_results_is_rendered_from_them(
    name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [str(ROOT / "tests" / "benchmarks"), *sys.path])
    benchmark = importlib.import_module(BENCHMARKS[name])
    page = (results().RESULTS / f"{name}.md").read_text(encoding="utf-8")
    assert page == benchmark.render(results().stored(name))


@pytest.mark.parametrize("page", PAGES)
def test_tables_of_a_page_are_up_to_date(page: str) -> None:
    """If not: ``python docs/make_results.py``."""
    text = PAGES[page].read_text(encoding="utf-8")
    assert text == results().page_text(text)


def test_every_table_is_shown() -> None:
    shown = [
        name
        for page in PAGES.values()
        for _, name, _ in results().BLOCK.findall(page.read_text(encoding="utf-8"))
    ]
    assert sorted(shown) == sorted(results().TABLES)


# ---------------------------------------------------------------------------------------------
# Sentences
# ---------------------------------------------------------------------------------------------


def claims() -> list[tuple[str, str]]:
    """Pages, and what they have to say, word by word."""
    network = rows("calibration_networks")
    graph = network["ResNet-20, converted graph"]
    exact = network["ResNet-20, integer reference"]
    assert exact["different_logits"] == 0
    logits = f"{graph['different_logits']:,}"
    images = f"{graph['samples']:,}"
    scales = [row["largest_relative_scale_difference"] for row in feeds()]
    widths = results().stored("bit_widths")
    one_image = f"one image is {100 / graph['samples']:.2f} points"
    four_bits = [
        100 * (widths["float_top1"] - row["pte_top1"])
        for row in widths["rows"]
        if row["scheme"].startswith("a8w4")
    ]
    saturated = [f"a8w8, bias saturated to {bits} bits of s_x s_w, PTQ" for bits in (16, 8)]
    coarse = "a4w4, PTQ, one scale a tensor, extremes"
    four = {
        how: loss("qat_widths", f"CNN with batch norm, a4w4, {how}", f"CNN, a4w4, {how}")
        for how in ("PTQ", "QAT")
    }
    gains = [ptq - qat for ptq, qat in zip(four["PTQ"], four["QAT"], strict=True)]
    eight = loss("qat_widths", "CNN with batch norm, a8w8, PTQ", "CNN with batch norm, a8w8, QAT")
    resnet, mobile = (
        [
            100 * (rows("qat_networks")[start]["top1"] - rows("qat_networks")[end]["top1"])
            for end in (f"{model}, a8w4, QAT", f"{model}, a4w4, QAT")
        ]
        for model, start in (
            ("ResNet-20", "ResNet-20, float, 300 more batches"),
            ("MobileNetV2", "MobileNetV2, float"),
        )
    )
    models = len(test_models.MODELS) * 4 * 20 * 1000
    found = {
        "accuracy.md": [
            f"on {images} test images ({one_image})",
            f"moves some scales by less than {upwards(max(scales))} of themselves",
        ],
        "choosing_bit_widths.md": [
            f"from noise on {images} images ({one_image})",
            f"4-bit weights cost {min(four_bits):.0f} to {max(four_bits):.0f} points",
        ],
        "device_arithmetic.md": [
            f"On a CIFAR-10 ResNet-20, {logits} of the {graph['logits']:,} logits of the {images} "
            "test images differ between the converted graph and the `.pte`",
            f"while the integer reference and the `.pte` agree in all {graph['logits']:,}",
            f"hence the {logits} logits above",
            f"0 of {models:,} output values differ",
        ],
        "qat.md": [
            "the same int8 network loses {:.1f} points; at 8 bits {:.1f}".format(
                *loss("qat_bias", *saturated)
            ),
            f"at 8 bits it costs {max(eight):.1f} points or nothing",
            "at 4 bits QAT is {:.1f} to {:.1f} points below float".format(*four["QAT"]),
            "4 bits lose {:.1f} points with batch norm and {:.1f} without".format(
                *loss("qat_widths", f"CNN with batch norm, {coarse}", f"CNN, {coarse}")
            ),
            "a range of least error, {:.1f} and {:.1f}".format(*four["PTQ"]),
            f"4 bits gain {gains[1]:.1f} points (CNN) and {gains[0]:.1f} (with batch norm)",
            "it is {:.1f} points below at a8w4 and {:.1f} at a4w4".format(*resnet),
            "it stays {:.1f} and {:.1f} points below float".format(*mobile),
        ],
    }
    return [(page, sentence) for page, sentences in found.items() for sentence in sentences]


def feeds() -> Iterable[dict[str, Any]]:
    """Rows of other batches than those of one image."""
    for row in rows("calibration_batches").values():
        if "largest_relative_scale_difference" in row:
            yield row


def upwards(value: float) -> str:
    """One digit, rounded up: ``4e-7`` for 3.6e-7."""
    digits, exponent = f"{value:e}".split("e")
    return f"{-int(-float(digits) // 1)}e{int(exponent)}"


def test_a_relative_difference_is_a_few_units_in_the_last_place() -> None:
    """Six, says calibration.md; a unit is more than ``2**-24`` of a value."""
    assert max(row["largest_relative_scale_difference"] for row in feeds()) * 2**24 < 7
    page = flat(PAGES["calibration.md"].read_text(encoding="utf-8"))
    assert "six units in the last place of a float32 or less" in page


def test_batches_beyond_one_image_give_one_accuracy() -> None:
    found: dict[str, set[float]] = {}
    for name, row in rows("calibration_batches").items():
        observer, feed = name.split(", ", 1)
        if feed not in results().FIRST_FEEDS:
            found.setdefault(observer, set()).add(row["top1"])
    assert [len(values) for values in found.values()] == [1] * 4


def test_sentences_say_what_was_measured() -> None:
    for page, sentence in claims():
        assert sentence in flat(PAGES[page].read_text(encoding="utf-8")), page


def test_the_smallest_differences_are_those_of_the_script() -> None:
    """The table of accuracy.md, computed by the lines of its script that print it."""
    page = PAGES["accuracy.md"].read_text(encoding="utf-8")
    script = page.split('tells from noise")\n', 1)[1].split("\nprint(", 1)[0]
    printed: list[str] = []
    names = {"binomtest": binomtest, "print": lambda *cells: printed.append(" | ".join(cells))}
    exec(script, names)
    table = [line.strip("| \n") for line in page.split("|---:|---:|---:|---:|\n")[1].split("\n")]
    assert [" | ".join(row.split(" | ")) for row in table[:4]] == [row.strip() for row in printed]


# ---------------------------------------------------------------------------------------------
# Everything else that looks like a measurement
# ---------------------------------------------------------------------------------------------

NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e-?\d+)?"
UNIT = r"(?:%|dB|ns|ms|s|min|minutes?|seconds?|[kMG]i?B|bytes|points?|times|x)"
MEASUREMENT = re.compile(
    rf"(?<![\w.^*]){NUMBER}(?:,? (?:to|and|or) {NUMBER})? ?{UNIT}(?![\w*])"
    rf"|(?<![\w.^*]){NUMBER} of (?:the )?{NUMBER}"
    r"|(?<![\w.^*-])\d+\.\d+(?![\w.]*\])"
)

NOT_MEASURED: dict[str, dict[str, str]] = {
    "README.md": {"Python 3.10 or later, PyTorch 2.15, ExecuTorch 1.5": "versions"},
    "accuracy.md": {
        "**95 % interval**": "the usual level of confidence",
        "From 5 % on": "the usual level of significance",
        "looks different at 5 %": "the same level",
        "91 % on one quarter of the digits and 99 % on another": "the slices above, rounded",
        "| 1 % differ | 3 % differ | 10 % differ |": "what the table is for",
        "6 dB are one bit": "20 log10(2)",
        "MobileNetV2 of width 0.5": "name of a model",
        "gains 14 points": "what a tutorial of PyTorch reports",
        "(torchao 0.18)": "version",
    },
    "bias.md": {
        "section 2.4": "of a paper",
        "steps 9.6 times as large": "x 9.641 in the output above it",
        "at most 0.375 of a unit": "derived, and tested in test_bias.py",
    },
    "calibration.md": {
        "less than 0.8 % of its values wide": "2**-7",
        "99.99 % of the values": "default of an option",
        "arxiv.org/abs/2004.09602": "address",
        "arxiv.org/abs/2106.08295": "address",
        "arxiv.org/abs/1712.05877": "address",
    },
    "device_arithmetic.md": {
        "sigmoid is up to 3.4 units of the last place off, tanh 4.6, exp 16": (
            "below the bounds that test_functions.py checks on the machine it runs on"
        ),
        "within 0.501 of a step": "derived, and tested in test_functions.py",
        "up to 2 % more": "a limit that the code sets",
        "up to 4.8e-4 away": "bound of the approximation, derived",
        "QEMU 7.2 emulates it wrongly": "version",
        "right in QEMU 10.0": "version",
        "weights take 4 bytes each": "size of a float32",
    },
    "flows.md": {"ExecuTorch 1.5.1": "version"},
    "files.md": {
        "multiples of 16 bytes, not of 128": "alignments",
        "grow by 16 times the size of the file (2 GiB at least": "limits that the code sets",
        "has 300 s to load": "the same",
        "A tensor above 4 GiB, more than 16 GiB at once": "the same",
    },
    "files_and_threads.md": {"torch 2.15": "version", "torchao 0.18": "version"},
    "improving_accuracy.md": {
        "arxiv.org/abs/2210.17323": "address",
        "arxiv.org/abs/2004.10568": "address",
        "arxiv.org/abs/2102.05426": "address",
        "arxiv.org/abs/2203.05740": "address",
        "arxiv.org/abs/2211.10438": "address",
        "arxiv.org/abs/2309.01885": "address",
        "arxiv.org/abs/2504.02692": "address",
        "arxiv.org/abs/1906.04721": "address",
    },
    "integer_bundle.md": {
        "an array of the largest size takes 2 GiB": "2**28 numbers of 8 bytes",
        "stands for 0.0": "definition",
        "0.009803921915590763": "the example that test_bundle.py computes",
        "0.007874015718698502": "the same",
        "7.719623681623489e-05": "the same",
        "0.006568627431988716": "the same",
        "The float network gives 1.1125; half a unit of the output is 0.0033": "the same",
    },
    "ops.md": {
        "whose kernel (1.5.1)": "version",
        "exponents 0.5, -0.5 and -1": "arguments",
        "for 8 times the weights": "blocks of 8 channels",
        "would take more than 3%": "a constant of the code",
    },
    "search.md": {
        "arxiv.org/abs/1911.03852": "address",
        "arxiv.org/abs/2011.10680": "address",
    },
    "qat.md": {
        "torchao 0.18": "version",
        "(weight 0.01 for a new batch)": "a constant of the code",
        "Nesterov momentum 0.9": "default of an option",
        "after 5 % warm-up": "the same",
    },
}


def flat(text: str) -> str:
    return " ".join(text.split())


def prose(text: str) -> str:
    """A page without code, output and blocks that are checked elsewhere."""
    text = re.sub(r"^```.*?^```$", "", text, flags=re.MULTILINE | re.DOTALL)
    text = re.sub(r"<!-- (\w+): .*?<!-- \1: end -->", "", text, flags=re.DOTALL)
    text = re.sub(r"^\|---:\|---:\|---:\|---:\|\n(\|.*\n)*", "", text, flags=re.MULTILINE)
    return flat(re.sub(r"`[^`]*`", "`code`", text))


@pytest.mark.parametrize("page", PAGES)
def test_nothing_looks_measured_that_is_not(page: str) -> None:
    text = PAGES[page].read_text(encoding="utf-8")
    printed = flat(" ".join(re.findall(r"^```text\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)))
    left = prose(text)
    for phrase in (*(s for p, s in claims() if p == page), *NOT_MEASURED.get(page, {})):
        before = left
        left = left.replace(prose(phrase), " ... ")
        assert left != before, f"{page} does not say {phrase!r} any more"
    unexplained = [
        left[max(0, match.start() - 40) : match.end() + 20]
        for match in MEASUREMENT.finditer(left)
        if match.group() not in printed
    ]
    assert unexplained == []


# ---------------------------------------------------------------------------------------------
# Docstrings
# ---------------------------------------------------------------------------------------------

REFERENCE = re.compile(r":(?:class|data|func|mod):`~?\.?([\w.]+)`")
SOURCES = {
    ".".join(path.relative_to(ROOT).with_suffix("").parts): path.read_text(encoding="utf-8")
    for path in sorted((ROOT / "custom_quantizer").rglob("*.py"))
}


def is_named(name: str, text: str) -> bool:
    """Whether a module defines a name, or imports it."""
    defined = rf"^\s*(?:def|class) {name}\b|^\s*{name}\b[^()\n]*?[:=]"
    imported = rf"^(?:from|import) .*\b{name}\b|^ +{name},$"
    return re.search(f"{defined}|{imported}", text, re.MULTILINE) is not None


def leads_somewhere(name: str, module: str) -> bool:
    parts = name.split(".")
    if len(parts) == 1:
        sibling = f"{module.rpartition('.')[0]}.{name}"
        return is_named(name, SOURCES[module]) or sibling in SOURCES
    if parts[0] != "custom_quantizer":
        return True  # of another package, or an attribute of a class
    if len(parts) == 2 and parts[1] in cq.__all__:
        return True
    for count in range(len(parts), 0, -1):
        found = ".".join(parts[:count])
        for source in (found, f"{found}.__init__"):
            if source in SOURCES:
                return count == len(parts) or is_named(parts[count], SOURCES[source])
    return False


def test_references_in_docstrings_lead_somewhere() -> None:
    wrong = [
        f"{module}: {name}"
        for module, text in SOURCES.items()
        for name in REFERENCE.findall(text)
        if not leads_somewhere(name, module)
    ]
    assert not wrong
