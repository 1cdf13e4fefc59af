"""The page of the compatibility matrix is what its results say, and they cover every family."""

import copy

from benchmarks.compatibility.families import FAMILIES
from benchmarks.compatibility.features import FEATURES
from benchmarks.compatibility.page import PAGE, page, results


def test_the_page_is_as_the_results_make_it():
    said = "run `python -m benchmarks.compatibility --page`"
    assert PAGE.read_text(encoding="utf-8") == page(results()), said


def test_every_family_has_every_feature():
    families = results()["families"]
    assert list(families) == list(FAMILIES)
    for name, stored in families.items():
        tried = [k for k, feature in FEATURES.items() if name in (feature.families or FAMILIES)]
        assert list(stored["features"]) == tried, name
        assert stored["date"] and stored["versions"]["transformers"]


def test_what_does_not_hold_is_named_with_its_reason():
    found = copy.deepcopy(results())
    found["families"]["llama"]["features"]["sft"] = {"holds": False, "what": "it fell over"}
    text = page(found)
    row = next(line for line in text.splitlines() if line.startswith("| Llama | yes | "))
    number = row.split("no (")[1].split(")")[0]
    assert f"\n{number}. it fell over\n" in text
