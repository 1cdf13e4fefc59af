"""Whatever is written on the command line composes, or ends in one line."""

import yaml
from hypothesis import example, given, settings
from hypothesis import strategies as st

from recipes import schema
from recipes.compose import compose, to_dict, to_yaml
from recipes.errors import ConfigError

KEYS = [*sorted(schema.keys_of(schema.run_schema(tuple(schema.GROUPS)))), "recipe", "engine"]
# What has a meaning in YAML, or in the grammars of Hydra and OmegaConf.
WORDS = (
    "null true [ ] { } ( ) ${ $ ' \" , : = ~ + ++ @ \\ # & * ??? 1e5 1_000 0x10 nan inf "
    "!!python/object ${seed} ${oc.env:HOME} ${now:%Y} ${train}"
)
SIGNS = st.sampled_from([*WORDS.split(), " ", "\n", "\x1b[2J", "\u2028", "\ud800", "\x00"])
NUMBERS = st.one_of(
    st.integers(), st.floats(), st.sampled_from([10**400, -(10**400), "9" * 5000])
).map(str)
VALUES = st.one_of(
    NUMBERS,
    st.text(max_size=12),
    st.lists(SIGNS, max_size=6).map("".join),
    st.recursive(
        NUMBERS | SIGNS,
        lambda inner: st.lists(inner, max_size=3).map(lambda items: f"[{','.join(items)}]"),
        max_leaves=5,
    ),
    st.sampled_from(["[" * 5000, "{a:" * 300 + "1" + "}" * 300, "${" * 200 + "}" * 200]),
)
NAMES = st.one_of(
    st.sampled_from(KEYS),
    st.text(max_size=8),
    st.tuples(SIGNS, st.sampled_from(KEYS)).map("".join),
)


@settings(max_examples=4 * settings.default.max_examples)
@given(st.lists(st.one_of(st.tuples(NAMES, VALUES).map("=".join), VALUES), min_size=1, max_size=2))
@example(["log.project=a\nb\x1b[2J"])
@example(["recipe=a\nb"])
@example(["engine=[]"])
@example(["train.lr=" + "9" * 5000])
@example([f"train.lr={10**400}"])
@example(["train.betas=" + "[" * 5000])
def test_any_override_composes_or_is_refused_in_one_line(overrides):
    try:
        config = compose(overrides)
    except ConfigError as error:
        assert str(error).isprintable()
        return
    assert yaml.safe_load(to_yaml(config)) == to_dict(config)
