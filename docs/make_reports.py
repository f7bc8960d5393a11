"""Write the example reports: pages, the records they are made from, and the picture in the README.

    CUSTOM_QUANTIZER_DATA=... python docs/make_reports.py            all of it; minutes
    python docs/make_reports.py --pages                              pages, from the stored records
    python docs/make_reports.py --picture                            picture, from the stored page

ResNet-20 needs the CIFAR-10 images and weights that the slow tests use, the picture needs Chromium
and selenium. A test fails while a page is not what its record says.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
from pathlib import Path

import torch

import custom_quantizer as cq
from custom_quantizer.core.files import write_bytes_atomic, write_text_atomic
from custom_quantizer.report.record import Report

DOCS = Path(__file__).resolve().parent
REPORTS = DOCS / "reports"
PICTURE = DOCS / "reports" / "resnet20.png"
TITLES = {"resnet20": "ResNet-20 on CIFAR-10", "two_heads": "A network with two heads"}

SCHEMES = ["a8w8", "a8w6", "a8w5", "a8w4", "a8w3"]
CALIBRATION, VALIDATION, TEST = 128, 256, 2000


def resnet20() -> Report:
    """Searched widths; accuracy on test images."""
    from support.cifar_models import cifar10_calibration, cifar10_test, resnet20

    model = resnet20()
    images, labels = cifar10_calibration(CALIBRATION + VALIDATION)
    data = [(images[:CALIBRATION], labels[:CALIBRATION])]
    held_back = [(images[CALIBRATION:], labels[CALIBRATION:])]
    found = cq.search(
        model,
        (images[:32],),
        data,
        {"weight_bits": 0.6},
        schemes=SCHEMES,
        validation=held_back,
    )
    calibration = images[:CALIBRATION]
    result = cq.quantize(model, (images[:1],), calibration.split(1), config=found.quantizer)
    assert result.lowered is not None
    diagnosis = cq.diagnose(result.exported, result.converted, images[CALIBRATION:][:64].split(1))
    test, answers = cifar10_test(TEST)
    models = {"float model": model, "resnet20.pte": result.lowered.run}
    accuracy = cq.evaluate(models, zip(test.split(100), answers.split(100), strict=True))
    return result.report.including(result.fidelity, diagnosis, accuracy, found)


def two_heads() -> Report:
    """16 bits in stem and heads, 4 in weights between; an op left in float, and a table."""
    from support.two_heads import SHAPE, TwoHeads, two_heads_quantizer

    images = torch.randn((64, *SHAPE[1:]), generator=torch.Generator().manual_seed(1)).split(1)
    result = cq.quantize(TwoHeads(), (images[0],), images[:32], config=two_heads_quantizer())
    diagnosis = cq.diagnose(result.exported, result.converted, images[32:])
    return result.report.including(result.fidelity, diagnosis)


MAKERS = {"resnet20": resnet20, "two_heads": two_heads}


def stored(name: str) -> Report:
    """The record that is stored."""
    return Report.from_json((REPORTS / f"{name}.json").read_text(encoding="utf-8"))


def page(name: str) -> str:
    """The page of a stored record."""
    return stored(name).to_html(TITLES[name])


def write_picture() -> None:
    """The top of ResNet-20's page as a browser shows it."""
    from PIL import Image
    from support.browser import open_page

    with open_page(REPORTS / "resnet20.html", width=1180, height=1500) as browser:
        browser.execute_script("document.getElementById('network').scrollIntoView()")
        taken = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
    few = io.BytesIO()
    taken.quantize(64).save(few, "png", optimize=True)
    write_bytes_atomic(PICTURE, few.getvalue())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--pages", action="store_true")
    parser.add_argument("--picture", action="store_true")
    asked = parser.parse_args()
    sys.path.insert(0, str(DOCS.parent / "tests"))
    if not asked.pages and not asked.picture:
        for name, make in MAKERS.items():
            # One line: these are read by programs, and their size counts.
            record = json.loads(make().to_json())
            text = json.dumps(record, separators=(",", ":"), sort_keys=True)
            write_text_atomic(REPORTS / f"{name}.json", text + "\n")
            print(f"{name}: {REPORTS / name}.json")
    if not asked.picture:
        for name in MAKERS:
            write_text_atomic(REPORTS / f"{name}.html", page(name))
    if not asked.pages:
        write_picture()


if __name__ == "__main__":
    main()
