"""`FasterGPT` with a Paddle for GPUs, on one: skipped, with a reason, where there is none.

The engine's side of it, memory and streams, is tested with PyTorch in `tests/cuda/test_tensors.py`.
"""

from __future__ import annotations

import zlib  # noqa: F401
from collections.abc import Iterator

import numpy as np
import pytest

pytest.importorskip("paddle")

import paddle

from fastgen import FasterGPT

if not paddle.is_compiled_with_cuda():
    pytest.skip("this Paddle is built without CUDA", allow_module_level=True)
if paddle.device.cuda.device_count() == 0:
    pytest.skip("there is no GPU", allow_module_level=True)

PROMPTS = np.array([[5, 6, 7, 8], [9, 8, 7, 6]])


@pytest.fixture(autouse=True)
def devices() -> Iterator[None]:
    """Models are made on the GPU unless a test says otherwise."""
    paddle.set_device("gpu:0")
    yield
    paddle.set_device("cpu")


def on_cpu(make_model, **options):
    paddle.set_device("cpu")
    layer = FasterGPT(make_model(), max_out_len=8)
    ids, scores = layer(paddle.to_tensor(PROMPTS), seed=3, **options)
    paddle.set_device("gpu:0")
    return ids.numpy(), scores.numpy()


@pytest.mark.parametrize("strategy", ["greedy_search", "sampling"])
def test_float32_gives_the_tokens_of_the_cpu(make_model, strategy):
    expected, expected_scores = on_cpu(make_model, decode_strategy=strategy)
    layer = FasterGPT(make_model(), max_out_len=8)
    for prompts in (paddle.to_tensor(PROMPTS), PROMPTS, paddle.to_tensor(PROMPTS).cpu()):
        ids, scores = layer(prompts, seed=3, decode_strategy=strategy)
        assert ids.place.is_gpu_place()
        assert scores.place.is_gpu_place()
        assert ids.numpy().tolist() == expected.tolist()
        np.testing.assert_allclose(scores.numpy(), expected_scores, rtol=1e-4, atol=1e-5)


def test_weights_on_the_cpu_are_decoded_there(make_model):
    paddle.set_device("cpu")
    layer = FasterGPT(make_model(), max_out_len=4)
    paddle.set_device("gpu:0")
    ids, _ = layer(paddle.to_tensor(PROMPTS), decode_strategy="greedy_search")
    assert ids.place.is_cpu_place()


def test_changed_weights_are_noticed(make_model):
    model = make_model()
    layer = FasterGPT(model, max_out_len=8)
    before = layer(PROMPTS, decode_strategy="greedy_search")[0].numpy()
    other = make_model(seed=4)
    for name, parameter in model.named_parameters():
        parameter.set_value(dict(other.named_parameters())[name])
    after = layer(PROMPTS, decode_strategy="greedy_search")[0].numpy()
    expected = FasterGPT(other, max_out_len=8)(PROMPTS, decode_strategy="greedy_search")[0]
    assert after.tolist() == expected.numpy().tolist()
    assert after.tolist() != before.tolist()


def test_paddles_stream_is_waited_for(make_model):
    layer = FasterGPT(make_model(), max_out_len=8)
    expected = layer(PROMPTS, decode_strategy="greedy_search")[0].numpy()
    real = paddle.to_tensor(PROMPTS)
    large = paddle.ones([4096, 4096])
    paddle.device.cuda.synchronize()
    for _ in range(5):
        work = large
        for _ in range(20):
            work = paddle.matmul(work, large) / 4096
        prompts = real + (work[0, 0] * 0).astype("int64")
        ids, _ = layer(prompts, decode_strategy="greedy_search")
        assert (ids + 0).numpy().tolist() == expected.tolist()


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "int8", "int4"])
def test_other_types_of_weights(make_model, dtype):
    layer = FasterGPT(make_model(), max_out_len=8, weight_dtype=dtype)
    ids, _ = layer(PROMPTS, decode_strategy="greedy_search")
    assert (ids.numpy() >= 0).all()
    with pytest.raises(ValueError, match="weight_dtype is 'float64'"):
        FasterGPT(make_model(), weight_dtype="float64")
