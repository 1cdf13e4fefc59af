"""Families of models: every one as a tiny random model in this process, four of them in vLLM, and
what is refused. `python -m benchmarks.compatibility` takes them through whole runs."""

import pytest
import torch
from transformers import AttentionInterface, AutoConfig, AutoModelForCausalLM, AutoTokenizer

from benchmarks.compatibility.families import FAMILIES, make
from benchmarks.compatibility.features import FAST, FEATURES, Subject
from recipes.compose import compose
from recipes.errors import ConfigError, ModelError
from rollouts.engines.vllm import VllmEngine
from rollouts.pretrained import context_length
from rollouts.sync import sync_weights
from trainers.core.attention import packed_attention
from trainers.core.attention_kernels import capped_attention
from trainers.core.packed_row import PackedRow
from trainers.core.policy import Policy, load_policy
from trainers.prepare import check_engine, prepare
from trainers.run import Run

CPU = torch.device("cpu")


@pytest.fixture(scope="module")
def tokenizer(tiny_models):
    return AutoTokenizer.from_pretrained(tiny_models["student"])


@pytest.fixture(scope="module", params=FAMILIES)
def subject(request, tokenizer, tmp_path_factory):
    return Subject(request.param, tmp_path_factory.mktemp(request.param), tokenizer)


@pytest.mark.parametrize("feature", FAST)
def test_a_family_works_with(subject, feature):
    FEATURES[feature].check(subject)


def test_a_family_loads_in_16_bits(subject):
    load_policy(str(subject.model), torch.bfloat16, CPU)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["qwen3-moe", "gemma2", "gpt2", "olmo2"])
def test_vllm_takes_a_family_and_its_weights(name, tokenizer, tmp_path):
    subject = Subject(name, tmp_path, tokenizer)
    for feature in ("vllm_sampler", "vllm_sync"):
        FEATURES[feature].check(subject)
    subject.vllm.close()


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_that_vllm_packed_are_found_again(dtype):
    from vllm import _custom_ops

    from rollouts.engines.vllm import _packed_places

    experts = torch.randn(3, 64, 96).to(dtype)
    assert experts.numel() < 2**16 or dtype is torch.float32
    packed = _custom_ops.cpu_prepack_moe_weight(experts, "vec")
    assert not torch.equal(packed, experts)
    found = torch.empty_like(packed).flatten()
    found[_packed_places(packed, "vec")] = packed.flatten()
    assert torch.equal(found, experts.flatten())


@pytest.mark.slow
def test_experts_arrive_in_vllm_in_16_bits(tokenizer, tmp_path):
    subject = Subject("qwen3-moe", tmp_path, tokenizer)
    engine = VllmEngine(str(subject.model), compose([]), CPU, torch.bfloat16, max_length=64)

    def weights():
        return ((name, 1.5 * tensor.bfloat16()) for name, tensor in subject.weights())

    sync_weights(engine, weights, salt=1)
    engine.close()


def attention_inputs(length):
    torch.manual_seed(0)
    return (torch.randn(1, heads, length, 4, dtype=torch.float64) for heads in (4, 2, 2))


@pytest.mark.parametrize("window", [None, 3])
def test_a_soft_cap_bounds_the_scores_of_each_packed_sequence(window):
    query, key, value = attention_inputs(11)
    found, _ = packed_attention(
        torch.nn.Module().eval(),
        query,
        key,
        value,
        None,
        scaling=0.9,
        softcap=1.5,
        sliding_window=window,
        packed_row=PackedRow([0, 4, 11], None, CPU),
    )
    for start, end in ((0, 4), (4, 11)):
        for head in range(4):
            for row in range(start, end):
                low = start if window is None else max(start, row - window + 1)
                keys = key[0, head // 2, low : row + 1]
                scores = 1.5 * torch.tanh(keys @ query[0, head, row] * 0.9 / 1.5)
                expected = scores.softmax(0) @ value[0, head // 2, low : row + 1]
                torch.testing.assert_close(found[0, row, head], expected)


def test_a_wide_soft_cap_is_none():
    query, key, value = attention_inputs(9)
    found = capped_attention(query, key, value, None, 1e6)
    expected = torch.nn.functional.scaled_dot_product_attention(
        query, key, value, is_causal=True, enable_gqa=True
    )
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize(
    ("name", "packed"), [("s_aux", True), ("alibi", True), ("s_aux", False), ("softcap", False)]
)
def test_what_packed_attention_does_not_know_is_an_error(name, packed):
    query, key, value = attention_inputs(4)
    row = PackedRow([0, 4], None, CPU) if packed else None
    arguments = {"position_ids": torch.arange(4), "use_cache": False, name: torch.ones(4)}
    with pytest.raises(ModelError, match=f"passes {name} to its attention") as caught:
        packed_attention(torch.nn.Module(), query, key, value, None, packed_row=row, **arguments)
    assert "\n" not in str(caught.value)


def empty(folder, tokenizer, model_type, **options):
    """A folder with a config and a tokenizer, without any weights."""
    AutoConfig.for_model(model_type, **options).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("key", ["model__path", "teacher__path"])
@pytest.mark.parametrize(
    ("model_type", "said"),
    [
        ("gemma3", "(text_config); save its text model by itself, as Gemma3ForCausalLM"),
        ("qwen2_vl", "qwen2_vl is a text model inside a larger one (text_config); not supported"),
        ("t5", "t5 is no causal language model"),
        ("mamba", "mamba has linear_attention layers, in which packed sequences would see"),
        ("rwkv", "rwkv has layers with a state, in which packed sequences would see"),
        ("qwen3_next", "qwen3_next has linear_attention layers"),
        ("llama4_text", "llama4_text has chunked_attention layers"),
        ("bloom", "bloom computes its attention in its own way; use model.attn_impl"),
        ("gpt_oss", "use model.attn_implementation=eager"),
    ],
)
def test_a_model_is_refused_before_a_weight_is_read(
    overrides, tokenizer, tmp_path, key, model_type, said
):
    folder = empty(tmp_path / "model", tokenizer, model_type)
    with pytest.raises(ModelError) as caught:
        prepare(compose(overrides(rollout__engine="hf", **{key: folder})))
    message = str(caught.value)
    assert message.startswith(f"{key.replace('__', '.')}={folder}: ") and "\n" not in message
    assert said in message


def test_sdpa_is_refused_where_attention_is_capped(overrides, tokenizer, tmp_path):
    folder = empty(tmp_path / "model", tokenizer, "gemma2")
    arguments = overrides(model__path=folder, model__attn_implementation="sdpa")
    with pytest.raises(ModelError, match="caps its attention scores, which .*=sdpa cannot"):
        prepare(compose(arguments))


@pytest.mark.parametrize("changes", [{}, {"model__dtype": "bfloat16", "teacher__dtype": "float32"}])
def test_flash_attention_is_refused_in_32_bits(overrides, changes):
    arguments = overrides(model__attn_implementation="flash_attention_2", **changes)
    with pytest.raises(ConfigError, match=r"computes in 16 bits, and \w+\.dtype=float32"):
        prepare(compose(arguments))


def test_vllm_is_refused_for_cohere2_past_its_window():
    config = AutoConfig.for_model("cohere2", sliding_window=8)
    with pytest.raises(ModelError, match="use rollout.engine=hf, or sequences of up to 8 tokens"):
        check_engine(Run(config=compose([]), mode=None, max_length=9), config)
    VllmEngine.check_model("model", config, 8)


class TwiceTheLogits(torch.nn.Linear):
    def forward(self, hidden):
        return 2 * super().forward(hidden)


def test_a_head_that_does_more_is_refused(tiny_models):
    model = load_policy(str(tiny_models["student"]), torch.float32, CPU).model
    head = TwiceTheLogits(*model.lm_head.weight.T.shape, bias=False)
    head.weight = model.lm_head.weight
    model.lm_head = head
    with pytest.raises(ModelError, match="does more than a linear head"):
        Policy(model)


def test_a_window_that_attention_is_not_told_of_is_refused(tokenizer, tmp_path):
    """Qwen2-MoE puts its window into the mask alone, which packed attention does not make."""
    config = AutoConfig.for_model(
        "qwen2_moe",
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=2,
        moe_intermediate_size=16,
        shared_expert_intermediate_size=16,
        num_experts=2,
        num_experts_per_tok=1,
        use_sliding_window=True,
        sliding_window=8,
        max_window_layers=2,
    )
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path)
    with pytest.raises(ModelError, match="has sliding_attention that .*=packed is not told of"):
        load_policy(str(tmp_path), torch.float32, CPU)
    load_policy(str(tmp_path), torch.float32, CPU, "sdpa")


def test_packed_sequences_are_compared_with_eager_attention(tokenizer, tmp_path):
    """transformers' sdpa drops the soft-cap, and so did packed attention."""
    folder = make(FAMILIES["gemma2"], tmp_path, tokenizer)
    with pytest.raises(ModelError, match="than in single ones with eager"):
        load_policy(str(folder), torch.float32, CPU, "sdpa")


def sixteen_bits_only(module, query, key, value, mask, *, position_ids, **arguments):
    """Stands for the flash kernels: what transformers would give them must have 16 bits."""
    from transformers.integrations.flash_attention import get_target_dtype

    dtype = get_target_dtype(query, module) or query.dtype
    if dtype == torch.float32:
        raise RuntimeError("FlashAttention only supports fp16 and bf16 data type")
    starts = (position_ids[0] == 0).nonzero().flatten().tolist()
    rows = (x.to(dtype) for x in (query, key, value))
    row = PackedRow([*starts, position_ids.shape[1]], None, CPU)
    return packed_attention(module, *rows, None, packed_row=row, **arguments)


def test_a_policy_in_32_bits_is_checked_with_kernels_that_take_16(tiny_models):
    AttentionInterface.register("flash_test", sixteen_bits_only)
    model = load_policy(str(tiny_models["student"]), torch.float32, CPU).model

    def select(name):
        model.config._attn_implementation = name

    # transformers looks for a package of any name with "flash" in it.
    model.set_attn_implementation = select
    select("flash_test")
    Policy(model)


@pytest.mark.parametrize(
    ("model_type", "options", "length"),
    [
        ("gpt2", {"n_positions": 77}, 77),
        ("mpt", {"max_seq_len": 78}, 78),
        ("gemma3", {"text_config": {"max_position_embeddings": 79}}, 79),
        ("mamba", {}, None),
    ],
)
def test_the_context_by_any_name(model_type, options, length):
    assert context_length(AutoConfig.for_model(model_type, **options)) == length


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_that_sees_the_sequence_before_is_refused(tiny_models, dtype):
    """Also where the rounding of 16 bits leaves room."""

    def leaks(module, query, key, value, mask, *, packed_row=None, **arguments):
        row = PackedRow([0, query.shape[2]], None, CPU)
        return packed_attention(module, query, key, value, None, packed_row=row)

    AttentionInterface.register("leaks", leaks)
    with pytest.raises(ModelError, match="computes something else in packed sequences"):
        load_policy(str(tiny_models["student"]), dtype, CPU, "leaks")
