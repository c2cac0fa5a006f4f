"""Who stands out, as the report says it: marked in the page, in a warning, and only those."""

from __future__ import annotations

import pytest

from cloister.evaluation.outliers import fits_of
from cloister.report import fits
from cloister.report.html import render_html

from .fake import run_report, slice_report

HONEST = {"a": (100, 1.0, 0.02), "b": (100, 1.2, 0.025), "c": (100, 0.9, 0.03), "d": (100, 1.1, 0.022)}


def test_whoever_stands_out_is_named_and_nobody_else() -> None:
    found = fits_of({**HONEST, "odd": (100, 3.1, 0.9)})
    said = fits.warnings(found)
    assert [text.partition(":")[0] for text in said] == ["odd", "odd"]
    assert "loss stands out: 3.1" in said[0]
    assert "gradient stands out: 0.9" in said[1]
    assert fits.headline(found) == "odd stands out."
    assert fits.warnings(fits_of(HONEST)) == []
    assert fits.headline(fits_of(HONEST)) == "Nobody stands out."


def test_a_low_loss_is_no_fault() -> None:
    assert fits.warnings(fits_of({**HONEST, "easy": (100, 0.01, 1e-6)})) == []


def test_of_two_parties_nobody_is_judged() -> None:
    found = fits_of({"a": (100, 1.0, 0.1), "b": (100, 9.0, 0.9)})
    assert fits.warnings(found) == []
    assert "fewer than three" in fits.headline(found)


@pytest.mark.parametrize(("value", "marked"), [(1.15, False), (4.0, True)])
def test_the_page_marks_it(value: float, marked: bool) -> None:
    found = fits_of({**HONEST, "odd": (100, value, 0.02)})
    page = render_html(run_report().model_copy(update={"fits": found}))
    section = page.split("<h2>Who stands out</h2>")[1].split("</section>")[0]
    assert section.count('class="bar out"') == marked
    assert ("odd stands out." in section) == marked
    assert section.count("<rect") == 2 * len(found)


def test_rounds_say_it_for_slice() -> None:
    assert "Who stands out" not in render_html(slice_report())
