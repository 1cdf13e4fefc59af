"""The pages that are made from the code are what the code makes."""

import pytest

from recipes.compose import recipes, schema_keys
from recipes.schema import GROUPS, keys_of, run_schema
from scripts.document import DOCS, config_page, metrics_page, pages
from trainers.core.metric_names import Metric


@pytest.mark.parametrize("name, text", pages().items(), ids=pages().keys())
def test_a_page_is_as_the_code_makes_it(name, text):
    assert (DOCS / name).read_text(encoding="utf-8") == text, "run `python -m scripts.document`"


def test_the_page_of_keys_has_every_key_and_recipe():
    page = config_page()
    for name in (*keys_of(run_schema(tuple(GROUPS))), *recipes()):
        assert f"| `{name}` |" in page
    assert keys_of(run_schema(tuple(GROUPS))).keys() <= schema_keys()


def test_the_page_of_metrics():
    loss = Metric("nats", "Loss | of a step.", "every step")
    assert metrics_page({"train/loss": loss}).endswith(
        "| `train/loss` | nats | Loss \\| of a step. | every step |\n"
    )
