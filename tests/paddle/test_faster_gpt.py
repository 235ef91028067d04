"""FasterGPT returns what model.generate returns, notices changed weights and frees its engine."""

from __future__ import annotations

import gc
import signal
import threading
import time
import zlib  # noqa: F401

import numpy as np
import pytest

pytest.importorskip("paddlenlp")

import paddle

from fastgen import FasterGPT
from fastgen.jit import load_op_library
from fastgen.testing.models import GPTShape
from fastgen.testing.paddlenlp import GREEDY_BY_LOGITS

EOS, PAD = 7, 0


def reference(model, ids, max_length=20, **options):
    """PaddleNLP's greedy search."""
    with paddle.no_grad():
        ids, scores = model.generate(
            paddle.to_tensor(ids),
            decode_strategy="greedy_search",
            max_length=max_length,
            max_new_tokens=max_length,
            eos_token_id=EOS,
            pad_token_id=PAD,
            **options,
        )
    return ids.numpy(), scores.numpy()


def greedy(layer, ids, max_length=20, **options):
    ids, scores = layer(
        paddle.to_tensor(ids), decode_strategy="greedy_search", max_length=max_length, **options
    )
    return ids.numpy(), scores.numpy()


def assert_same(layer, model, ids):
    expected, expected_scores = reference(model, ids)
    actual, actual_scores = greedy(layer, ids)
    np.testing.assert_array_equal(actual, expected)
    if GREEDY_BY_LOGITS:
        np.testing.assert_allclose(actual_scores, expected_scores, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize(
    "shape",
    [
        GPTShape(97, 64, 32, 2, 4, 64),
        GPTShape(50, 40, 24, 1, 3, 96),
        GPTShape(301, 48, 64, 3, 1, 128),
    ],
)
def test_greedy_is_the_reference(make_model, shape, seed):
    model = make_model(shape, seed)
    layer = FasterGPT(model)
    rng = np.random.default_rng(seed)
    for batch, length in ((1, 1), (2, 9), (5, 4)):
        assert_same(layer, model, rng.integers(0, shape.vocab_size, (batch, length)))


def test_fused_attention_weights(prompts):
    from paddlenlp.transformers import GPTConfig, GPTLMHeadModel

    config = GPTConfig(
        vocab_size=97,
        hidden_size=32,
        num_hidden_layers=2,
        num_attention_heads=4,
        intermediate_size=64,
        max_position_embeddings=64,
        fuse_attention_qkv=True,
    )
    model = GPTLMHeadModel(config)
    model.eval()
    rng = np.random.default_rng(1)
    for parameter in model.parameters():
        value = parameter.numpy() + 0.3 * rng.standard_normal(parameter.shape)
        parameter.set_value(value.astype("float32"))
    assert any("qkv_proj" in name for name, _ in model.named_parameters())
    assert_same(FasterGPT(model), model, prompts)


def test_shapes_and_types_are_the_reference(make_model, prompts):
    model = make_model()
    layer = FasterGPT(model)
    expected = model.generate(
        paddle.to_tensor(prompts),
        decode_strategy="greedy_search",
        max_length=6,
        max_new_tokens=6,
        eos_token_id=EOS,
        pad_token_id=PAD,
    )
    actual = layer(paddle.to_tensor(prompts), decode_strategy="greedy_search", max_length=6)
    assert isinstance(actual, tuple)
    for ours, theirs in zip(actual, expected):
        assert ours.dtype == theirs.dtype
        assert list(ours.shape) == list(theirs.shape)
    ids, scores = layer(paddle.to_tensor(prompts), max_length=6, num_return_sequences=3, seed=1)
    assert list(ids.shape) == [9, 6] or ids.shape[1] < 6
    assert list(scores.shape) == [9, 1]


def test_eos_then_pad_and_trimmed(make_model, prompts):
    model = make_model()
    layer = FasterGPT(model)
    free, _ = greedy(layer, prompts, 20, eos_token_id=-1)
    # A token that ends the rows at different steps.
    candidates = [t for t in np.unique(free[:, :10]) if len({_first(r, t) for r in free}) > 1]
    eos = int(candidates[0])
    actual, _ = greedy(layer, prompts, 20, eos_token_id=eos, pad_token_id=PAD)
    ends = [min(_first(row, eos) + 1, 20) for row in free]
    assert actual.shape == (3, max(ends))
    for row, whole, end in zip(actual, free, ends):
        np.testing.assert_array_equal(row[:end], whole[:end])
        assert (row[end:] == PAD).all()


def _first(row, token):
    found = np.flatnonzero(row == token)
    return int(found[0]) if len(found) else len(row)


def test_ragged_prompts_equal_single_ones(make_model):
    layer = FasterGPT(make_model())
    rng = np.random.default_rng(3)
    lengths = np.array([1, 7, 4, 9])
    ids = rng.integers(0, 97, (4, 9))
    alone = [greedy(layer, ids[i : i + 1, :n], 12) for i, n in enumerate(lengths)]
    right = np.arange(9)[None, :] < lengths[:, None]
    left = np.zeros_like(ids)
    for row, n in enumerate(lengths):
        left[row, 9 - n :] = ids[row, :n]
    for given, options in (
        (ids, {"seq_len": paddle.to_tensor(lengths, dtype="int32")}),
        (ids, {"attention_mask": paddle.to_tensor(right.astype("int64"))}),
        (ids, {"seq_len": lengths, "attention_mask": right[:, None, None, :].astype("float32")}),
        (left, {"attention_mask": right[:, ::-1].astype("int64")}),
    ):
        actual, scores = greedy(layer, given, 12, **options)
        for row, (expected, score) in enumerate(alone):
            np.testing.assert_array_equal(actual[row, : expected.shape[1]], expected[0])
            assert (actual[row, expected.shape[1] :] == PAD).all()
            assert scores[row, 0] == score[0, 0]


def test_sampling_is_a_function_of_the_seed(make_model, prompts):
    layer = FasterGPT(make_model(), topk=0, temperature=2.0, max_out_len=12, eos_id=-1)
    same = paddle.to_tensor(np.repeat(prompts[:1], 4, axis=0))
    first, _ = layer(same, seed=2**64 - 3)
    assert layer.last_seed == 2**64 - 3
    again, _ = layer(same, seed=2**64 - 3)
    other, _ = layer(same, seed=4)
    np.testing.assert_array_equal(first.numpy(), again.numpy())
    assert (first.numpy() != other.numpy()).any()
    # One seed is spread over equal prompts, whose samples then differ; so it is over sequences.
    assert len({tuple(row) for row in first.numpy().tolist()}) == 4
    spread, _ = layer(same[:1], seed=2**64 - 3, num_return_sequences=4)
    np.testing.assert_array_equal(spread.numpy(), first.numpy())
    # A row with a seed of its own is what it is alone.
    rows, _ = layer(same, seed=[9, 9, 5, 2**63])
    assert layer.last_seed == [9, 9, 5, 2**63]
    np.testing.assert_array_equal(rows.numpy()[0], rows.numpy()[1])
    alone, _ = layer(same[:1], seed=2**63)
    np.testing.assert_array_equal(rows.numpy()[3], alone.numpy()[0])
    # A drawn seed is reported and repeats the call.
    drawn, _ = layer(same)
    repeated, _ = layer(same, seed=layer.last_seed)
    np.testing.assert_array_equal(drawn.numpy(), repeated.numpy())


def test_options_of_each_row(make_model, prompts):
    layer = FasterGPT(make_model(), eos_id=-1, pad_id=PAD)
    ids = paddle.to_tensor(prompts)
    options = {
        "top_k": [0, 3, 1],
        "top_p": np.array([0.5, 1.0, 0.0], np.float32),
        "temperature": paddle.to_tensor([3.0, 1.0, 0.5]),
        "max_length": paddle.to_tensor([4, 9, 6]),
    }
    together, _ = layer(ids, seed=[1, 2, 3], **options)
    assert together.shape[1] == 9
    for row in range(3):
        alone, _ = layer(
            ids[row : row + 1],
            seed=row + 1,
            **{name: np.asarray(value)[row].item() for name, value in options.items()},
        )
        width = alone.shape[1]
        assert width == (4, 9, 6)[row]
        np.testing.assert_array_equal(together.numpy()[row, :width], alone.numpy()[0])
        assert (together.numpy()[row, width:] == PAD).all()


def test_prompt_of_bos_without_input(make_model):
    model = make_model()
    layer = FasterGPT(model)
    expected, _ = greedy(layer, np.array([[model.config.bos_token_id]]))
    ids, _ = layer(decode_strategy="greedy_search", max_length=20)
    np.testing.assert_array_equal(ids.numpy(), expected)


def test_source_model_is_not_changed(make_model, prompts):
    model = make_model()
    model.train()
    before = {name: (id(p), p.numpy()) for name, p in model.named_parameters()}
    layer = FasterGPT(model)
    layer(paddle.to_tensor(prompts), max_length=4)
    assert all(sublayer.training for sublayer in model.sublayers(include_self=True))
    assert {id(p) for p in layer.parameters()} == {identity for identity, _ in before.values()}
    for name, parameter in model.named_parameters():
        identity, value = before[name]
        assert id(parameter) == identity
        assert parameter.dtype == paddle.float32
        np.testing.assert_array_equal(parameter.numpy(), value)


# ---- Weights ----------------------------------------------------------------------------------


def _set_array(model):
    weight = model.gpt.decoder.layers[1].linear1.weight
    weight.set_value(weight.numpy() * 2)


def _set_one_element(model):
    weight = model.gpt.decoder.norm.bias
    value = weight.numpy()
    value[-1] += 3.0
    weight.set_value(value)


def _set_tensor(model):
    weight = model.gpt.embeddings.word_embeddings.weight
    weight.set_value(-weight)


def _step(optimizer, learning_rate):
    def change(model):
        ids = paddle.to_tensor(np.arange(10).reshape(2, 5))
        model(ids).square().mean().backward()
        steps = optimizer(learning_rate=learning_rate, parameters=model.parameters())
        steps.step()
        steps.clear_grad()

    return change


def _in_place(model):
    with paddle.no_grad():
        model.gpt.decoder.layers[0].linear2.weight.scale_(-1.5)


def _new_parameter(model):
    old = model.gpt.decoder.layers[0].self_attn.q_proj.weight
    new = paddle.create_parameter(old.shape, "float32")
    model.gpt.decoder.layers[0].self_attn.q_proj.weight = new


def _untied_head(model):
    head = paddle.create_parameter(model.lm_head.weight.shape, "float32")
    head.set_value(np.random.default_rng(5).standard_normal(head.shape).astype("float32"))
    model.lm_head.weight = head


@pytest.mark.parametrize(
    "change",
    [
        _set_array,
        _set_one_element,
        _set_tensor,
        _step(paddle.optimizer.SGD, 5.0),
        _step(paddle.optimizer.AdamW, 0.1),
        _in_place,
        _new_parameter,
        _untied_head,
    ],
    ids=["array", "element", "tensor", "sgd", "adamw", "in-place", "new", "untied"],
)
def test_changed_weights_are_noticed(make_model, prompts, change):
    library = load_op_library()
    gc.collect()
    held = library.engine_count()
    model = make_model()
    layer = FasterGPT(model)
    assert_same(layer, model, prompts)
    before = [parameter.numpy() for parameter in model.parameters()]
    built = library.engines_built()
    assert_same(layer, model, prompts)
    assert library.engines_built() == built
    change(model)
    after = [parameter.numpy() for parameter in model.parameters()]
    assert len(before) != len(after) or any((a != b).any() for a, b in zip(before, after))
    model.eval()
    assert_same(layer, model, prompts)
    assert library.engines_built() == built + 1
    assert library.engine_count() == held + 1


def test_identity_check_notices_paddle_s_in_place_operations(make_model, prompts):
    library = load_op_library()
    model = make_model()
    layer = FasterGPT(model, weight_check="identity")
    assert_same(layer, model, prompts)
    built = library.engines_built()
    _in_place(model)
    assert_same(layer, model, prompts)
    _new_parameter(model)
    assert_same(layer, model, prompts)
    assert library.engines_built() == built + 2


def test_models_in_turn_are_built_once_and_freed(make_model, prompts):
    library = load_op_library()
    gc.collect()
    held, built = library.engine_count(), library.engines_built()
    models = [make_model(seed=1), make_model(seed=2)]
    layers = [FasterGPT(model) for model in models]
    assert library.engine_count() == held
    for _ in range(3):
        for layer, model in zip(layers, models):
            assert_same(layer, model, prompts)
    assert library.engine_count() == held + 2
    assert library.engines_built() == built + 2
    # Two layers of one model share its engine, which goes with the last of them.
    twin = FasterGPT(models[0])
    assert_same(twin, models[0], prompts)
    assert library.engines_built() == built + 2
    del layer, layers
    gc.collect()
    assert library.engine_count() == held + 1
    del twin
    gc.collect()
    assert library.engine_count() == held
    # The models live on.
    assert_same(FasterGPT(models[1]), models[1], prompts)


def test_half_precision_weights(make_model, prompts):
    rounded = make_model()
    half = make_model()
    for parameter in rounded.parameters():
        parameter.set_value(parameter.numpy().astype("float16").astype("float32"))
    half.to(dtype="float16")
    expected, _ = greedy(FasterGPT(rounded), prompts)
    actual, _ = greedy(FasterGPT(half), prompts)
    np.testing.assert_array_equal(actual, expected)
    assert half.lm_head.weight.dtype == paddle.float16


# ---- Errors -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"temperature": 0}, "temperature is 0: it must be greater than 0"),
        ({"temperature": float("nan")}, "temperature is NaN"),
        ({"temperature": [1.0, 0.0, 1.0]}, "temperature is 0: it must be greater than 0"),
        ({"temperature": [1.0, 2.0]}, "temperature has 2 values.*3 rows"),
        ({"top_k": -1}, "top_k is -1"),
        ({"top_p": 1.5}, "top_p is 1.5"),
        ({"max_length": 0}, "max_length is 0"),
        ({"max_length": 60}, "max_length.*60.*64 positions"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": [1, 2]}, "seed has 2 values.*3 rows"),
        ({"decode_strategy": "beam_search"}, "decode_strategy is 'beam_search'"),
        (
            {"decode_strategy": "greedy_search", "num_return_sequences": 2},
            "num_return_sequences is 2",
        ),
        ({"seq_len": [1, 6, 2]}, r"seq_len\[1\] is 6: it must be between 1 and 5"),
        ({"seq_len": [1, 2]}, "seq_len is int64 of shape.*3 rows"),
        ({"attention_mask": np.eye(3, 5)}, r"attention_mask\[1\] is not that of a prompt"),
        ({"attention_mask": np.full((3, 5), -1e4)}, "values other than 0 and 1"),
        ({"attention_mask": np.ones((3, 4))}, r"attention_mask has shape \[3, 4\]"),
        (
            {"attention_mask": np.ones((3, 5)), "seq_len": [1, 2, 3]},
            "seq_len is .* and attention_mask says",
        ),
    ],
)
def test_bad_options_are_sentences(make_model, prompts, options, sentence):
    model = make_model()
    layer = FasterGPT(model, max_out_len=4)
    with pytest.raises(ValueError, match=sentence) as caught:
        layer(paddle.to_tensor(prompts), **options)
    assert "\n" not in str(caught.value)
    assert_same(layer, model, prompts)


@pytest.mark.parametrize(
    ("changes", "sentence"),
    [
        ({"normalize_before": False}, "normalize_before is false: it must be true"),
        ({"scale_qk_coeff": 2.0}, r"scale_qk_coeff is 2\.0: it must be 1"),
        ({"hidden_activation": "relu"}, "hidden_activation is 'relu': it must be 'gelu'"),
    ],
)
def test_models_that_compute_otherwise_are_refused(make_model, changes, sentence):
    model = make_model()
    for name, value in changes.items():
        setattr(model.config, name, value)
    with pytest.raises(ValueError, match=sentence):
        FasterGPT(model)


def test_lists_of_special_tokens(make_model, prompts):
    """PaddleNLP stops at any of several; of one the list is that one."""
    model = make_model()
    free, _ = greedy(FasterGPT(model, max_out_len=6), prompts)
    end = int(free[0, 2])
    expected, _ = greedy(FasterGPT(model, max_out_len=6, eos_id=end), prompts)
    model.config.eos_token_id = [end]
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = [end]
    actual, _ = greedy(FasterGPT(model, max_out_len=6), prompts)
    np.testing.assert_array_equal(actual, expected)
    model.config.eos_token_id = [end, 5]
    if getattr(model, "generation_config", None) is not None:
        model.generation_config.eos_token_id = [end, 5]
    with pytest.raises(
        ValueError, match=r"the model's eos_token_id is .*: fastgen takes one token"
    ):
        greedy(FasterGPT(model, max_out_len=6), prompts)


def test_ngrams_are_looked_for_where_generate_does(make_model, prompts):
    """In a generation configuration of its own, or else in the model's."""
    model = make_model()
    free, _ = greedy(FasterGPT(model), prompts)
    model.config.no_repeat_ngram_size = 1
    if getattr(model, "generation_config", None) is None:
        pytest.skip("this PaddleNLP has no generation configuration")
    model.generation_config._from_model_config = False
    model.generation_config.no_repeat_ngram_size = None
    assert_same(FasterGPT(model), model, prompts)
    actual, _ = greedy(FasterGPT(model), prompts)
    np.testing.assert_array_equal(actual, free)
    model.generation_config._from_model_config = True
    other, _ = greedy(FasterGPT(model), prompts)
    assert not np.array_equal(other, free)


@pytest.mark.parametrize(
    ("ids", "sentence"),
    [
        (np.array([[3, 97]]), r"97, token ids must be from 0 to 96"),
        (np.array([[1, 2], [3, -1]]), "row 1 of the batch.*-1"),
        (np.array([[2**40]]), r"prompt\[0\] is 1099511627776, token ids must fit in 32 bits"),
        (np.zeros([0, 3], np.int64), r"input_ids has shape \[0, 3\]"),
        (np.zeros([2, 0], np.int64), r"input_ids has shape \[2, 0\]"),
        (np.array([1, 2]), r"input_ids has shape \[2\]"),
        (np.array([[1.0]]), "input_ids is float64: it must be int32 or int64"),
    ],
)
def test_bad_prompts_are_sentences(make_model, ids, sentence):
    layer = FasterGPT(make_model(), max_out_len=4)
    with pytest.raises(ValueError, match=sentence):
        layer(ids)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_weights_of_other_types(make_model, prompts, dtype):
    """They come through the op: other scores than float32's, near them."""
    model = make_model()
    options = {"decode_strategy": "greedy_search", "max_length": 1}
    inputs = paddle.to_tensor(prompts)
    _, exact = FasterGPT(model)(inputs, **options)
    ids, scores = FasterGPT(model, weight_dtype=dtype)(inputs, **options)
    difference = np.abs(scores.numpy() - exact.numpy())
    # Of raw logits, whose standard deviation is about 3.
    most = {"float16": 0.02, "bfloat16": 0.1, "int8": 0.3, "int4": 2.0}
    assert 0 < difference.max() < most[dtype]
    if dtype == "float16":
        same_ids, same_scores = FasterGPT(model, use_fp16_decoding=True)(inputs, **options)
        assert same_ids.numpy().tolist() == ids.numpy().tolist()
        assert same_scores.numpy().tolist() == scores.numpy().tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8"])
def test_caches_of_other_types(make_model, prompts, dtype):
    """They come through the op, to an engine of their own; "float32" is what there is without."""
    model = make_model()
    options = {"decode_strategy": "greedy_search", "max_length": 4}
    inputs = paddle.to_tensor(prompts)
    _, exact = FasterGPT(model)(inputs, **options)
    _, named = FasterGPT(model, cache_dtype="float32")(inputs, **options)
    assert named.numpy().tolist() == exact.numpy().tolist()
    _, scores = FasterGPT(model, cache_dtype=dtype)(inputs, **options)
    difference = np.abs(scores.numpy() - exact.numpy())
    most = {"float16": 0.01, "bfloat16": 0.05, "int8": 0.15}
    assert 0 < difference.max() < most[dtype]


def test_bad_arguments_of_the_constructor(make_model):
    model = make_model()
    with pytest.raises(
        ValueError, match="cache_dtype is 'int4': it must be one of float32, float16"
    ):
        FasterGPT(model, cache_dtype="int4")
    with pytest.raises(ValueError, match="temperature is 0"):
        FasterGPT(model, temperature=0)
    with pytest.raises(ValueError, match="top_k is -4"):
        FasterGPT(model, topk=-4)
    with pytest.raises(ValueError, match="use_fp16_decoding is True and weight_dtype is 'int8'"):
        FasterGPT(model, use_fp16_decoding=True, weight_dtype="int8")
    with pytest.raises(ValueError, match="weight_dtype is 'float8': it must be one of float32"):
        FasterGPT(model, weight_dtype="float8")
    with pytest.raises(ValueError, match="model is a Linear: it must be a paddlenlp"):
        FasterGPT(paddle.nn.Linear(2, 2))
    with pytest.raises(ValueError, match="weight_check is 'none'"):
        FasterGPT(model, weight_check="none")


def test_config_that_contradicts_the_weights(make_model, prompts):
    model = make_model()
    layer = FasterGPT(model, max_out_len=4)
    model.config.vocab_size = 98
    with pytest.raises(ValueError, match="word_embeddings"):
        layer(paddle.to_tensor(prompts))
    model.config.vocab_size = 97
    assert_same(layer, model, prompts)


# ---- Threads and signals ----------------------------------------------------------------------

BIG = GPTShape(2000, 1024, 256, 6, 4, 1024)


def test_threads_share_a_layer(make_model, prompts):
    library = load_op_library()
    layer = FasterGPT(make_model(seed=3), max_out_len=30, eos_id=-1)
    ids = paddle.to_tensor(prompts)
    built = library.engines_built()
    results = {}

    def work(seed):
        results[seed] = layer(ids, seed=seed)[0].numpy()

    threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert library.engines_built() == built + 1
    for seed in range(6):
        np.testing.assert_array_equal(results[seed], layer(ids, seed=seed)[0].numpy())


def test_other_threads_run_during_a_call(make_model):
    layer = FasterGPT(make_model(BIG), max_out_len=400, eos_id=-1)
    layer(paddle.to_tensor([[1]]), max_length=1)
    ticks = []
    done = threading.Event()

    def tick():
        while not done.wait(0.002):
            ticks.append(time.monotonic())

    thread = threading.Thread(target=tick)
    thread.start()
    begin = time.monotonic()
    layer(paddle.to_tensor([[1]] * 4))
    end = time.monotonic()
    done.set()
    thread.join()
    within = [at for at in ticks if begin < at < end]
    assert end - begin > 0.05
    assert len(within) > 5


def test_ctrl_c_ends_a_call_and_the_layer_stays_usable(start_python):
    process = start_python(
        f"""
        from fastgen import FasterGPT
        layer = FasterGPT(make_model({BIG!r}), eos_id=-1)
        before, _ = layer(paddle.to_tensor([[1]]), max_length=8, seed=1)
        print("ready", flush=True)
        try:
            while True:
                layer(paddle.to_tensor([[1]] * 64), max_length=1000)
        except KeyboardInterrupt:
            print("interrupted", time.time(), flush=True)
        after, _ = layer(paddle.to_tensor([[1]]), max_length=8, seed=1)
        assert (before.numpy() == after.numpy()).all()
        assert layer._library.engines_built() == 1
        print("usable", flush=True)
        """
    )
    assert process.stdout is not None
    try:
        assert process.stdout.readline() == "ready\n", process.stderr.read()
        time.sleep(2)
        sent = time.time()
        process.send_signal(signal.SIGINT)
        word, at = process.stdout.readline().split()
        assert word == "interrupted"
        assert float(at) - sent < 2
        out, err = process.communicate(timeout=60)
        assert out == "usable\n", err
        assert process.returncode == 0
    finally:
        process.kill()
        process.communicate()


def test_a_handler_s_own_exception_gets_through(start_python):
    process = start_python(
        f"""
        import signal
        from fastgen import FasterGPT

        class Stop(Exception):
            pass

        def handler(number, frame):
            raise Stop("from the handler")

        signal.signal(signal.SIGALRM, handler)
        layer = FasterGPT(make_model({BIG!r}), eos_id=-1)
        layer(paddle.to_tensor([[1]]), max_length=1)
        signal.alarm(1)
        try:
            layer(paddle.to_tensor([[1]] * 64), max_length=1000)
        except Stop as stop:
            print(stop)
        """
    )
    out, err = process.communicate(timeout=120)
    assert out == "from the handler\n", err
