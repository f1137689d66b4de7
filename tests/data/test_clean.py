import dataclasses
import unicodedata

import pytest

pytest.importorskip("hypothesis")
from hypothesis import given
from hypothesis import strategies as st

from fastlm.data.clean import CleaningReport, chance, clean_text, fingerprint

anything = st.text(st.characters(codec=None), max_size=60)


def cleaned(text, **options):
    return clean_text(text, CleaningReport(), **options)


def test_unicode_normalisation():
    assert cleaned("e\u0301") == "\u00e9"
    assert cleaned("e\u0301", normalization="none") == "e\u0301"
    assert cleaned("\ufb01 \u2460") == "\ufb01 \u2460"
    assert cleaned("\ufb01 \u2460", normalization="NFKC") == "fi 1"


def test_control_characters_and_surrogates_go_and_the_rest_stays():
    report = CleaningReport()
    text = "a\x00b\x07\x0c\x1b\x7f\x85\ud800c\n\td\u200d\u00a0\U0001f600"
    assert clean_text(text, report) == "abc\n\td\u200d\u00a0\U0001f600"
    assert report.control_characters_removed == 7


def test_line_endings():
    report = CleaningReport()
    assert clean_text("a\r\nb\rc\n", report) == "a\nb\nc\n"
    assert report.line_endings_changed == 2


def test_lowercase():
    assert cleaned("\u00c4B", lowercase=True) == "\u00e4b"
    assert cleaned("\u00c4B") == "\u00c4B"
    assert cleaned("\u210c", normalization="NFKC", lowercase=True) == "h"


def test_changed_documents_are_counted():
    report = CleaningReport()
    for text in ("plain", "e\u0301", "e\u0301e\u0301"):
        clean_text(text, report)
    assert report.documents_normalized == 2


@pytest.mark.parametrize("normalization", ["NFC", "NFKC", "none"])
@pytest.mark.parametrize("lowercase", [False, True])
@given(text=anything)
def test_cleaning_twice_changes_nothing_more(normalization, lowercase, text):
    options = {"normalization": normalization, "lowercase": lowercase}
    once = cleaned(text, **options)
    assert cleaned(once, **options) == once
    once.encode("utf-8")
    assert all(c in "\n\t" or unicodedata.category(c) not in ("Cc", "Cs") for c in once)


def test_report_is_a_small_table():
    report = CleaningReport(files_read=1234, documents_kept=7)
    report.skip("files_binary", "a.png: binary")
    for n in range(9):
        report.skip("lines_malformed", f"x:{n}")
    assert report.lines_malformed == 9
    assert len(report.examples) == 5
    assert report.skipped() == "1 binary files, 9 malformed JSON lines"
    lines = str(report).splitlines()
    assert any(line.split() == ["files", "read", "1,234"] for line in lines)
    assert not any("empty" in line for line in lines)
    labels = {f.name for f in dataclasses.fields(report)} - {"examples"}
    assert len(CleaningReport(**dict.fromkeys(labels, 1)).rows()) == len(labels), "every count has a label"


def test_chance_is_seeded_uniform_and_the_documents_own():
    draws = [chance(fingerprint(f"document {n}"), 1, "split") for n in range(2000)]
    assert 0 <= min(draws) < max(draws) < 1
    assert abs(sum(draws) / 2000 - 0.5) < 0.03
    assert draws[5] == chance(fingerprint("document 5"), 1, "split")
    assert draws[5] != chance(fingerprint("document 5"), 2, "split") != chance(fingerprint("document 5"), 2, "weight")
