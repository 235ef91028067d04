"""FasterGPT inside of programs: traced, saved, loaded and run by Paddle Inference."""

from __future__ import annotations

import gc
import zlib  # noqa: F401

import numpy as np
import pytest

pytest.importorskip("paddlenlp")

import paddle

from fastgen import FasterGPT
from fastgen.jit import load_op_library


class _Exported(paddle.nn.Layer):
    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def forward(self, input_ids, seq_len, top_k, temperature, max_length, seed):
        return self.layer(
            input_ids,
            seq_len=seq_len,
            top_k=top_k,
            temperature=temperature,
            max_length=max_length,
            seed=seed,
        )


class _WithOption(paddle.nn.Layer):
    def __init__(self, layer, **options):
        super().__init__()
        self.layer, self.options = layer, options

    def forward(self, input_ids):
        return self.layer(input_ids, **self.options)


@pytest.mark.parametrize("name", ["top_k", "min_length", "seq_len"])
def test_a_tensor_from_outside_of_a_program_is_a_sentence(make_model, name):
    layer = _WithOption(FasterGPT(make_model()), **{name: paddle.to_tensor([3])})
    specs = [paddle.static.InputSpec([None, None], "int64", "input_ids")]
    with pytest.raises(ValueError, match=f"{name} is a tensor from outside of the program"):
        _ = paddle.jit.to_static(layer, input_spec=specs, full_graph=True).forward.concrete_program


def test_saved_program_gives_the_same_tokens(make_model, prompts, tmp_path):
    library = load_op_library()
    layer = FasterGPT(make_model())
    feeds = {
        "input_ids": prompts.astype("int64"),
        "seq_len": np.array([5, 2, 3], "int32"),
        "top_k": np.array([8], "int32"),
        "temperature": np.array([1.0, 2.0, 0.7], "float32"),
        "max_length": np.array([10, 12, 4], "int64"),
        "seed": np.array([5, 6, 7], "int64"),
    }
    tensors = {name: paddle.to_tensor(value) for name, value in feeds.items()}
    expected = [output.numpy() for output in layer(**tensors)]
    specs = [
        paddle.static.InputSpec([None] * value.ndim, str(value.dtype), name)
        for name, value in feeds.items()
    ]
    program = paddle.jit.to_static(_Exported(layer), input_spec=specs, full_graph=True)
    path = str(tmp_path / "gpt")
    paddle.jit.save(program, path)

    loaded = None
    if paddle.__version__.startswith("2.5."):
        # It asks every op of a program for a gradient when it loads it; an op of a library cannot
        # say that it has none.
        with pytest.raises(RuntimeError, match="GradOpMaker"):
            paddle.jit.load(path)
    else:
        loaded = paddle.jit.load(path)
        for actual, value in zip(loaded(*tensors.values()), expected):
            np.testing.assert_array_equal(actual.numpy(), value)

    suffix = ".json" if (tmp_path / "gpt.json").exists() else ".pdmodel"
    config = paddle.inference.Config(path + suffix, path + ".pdiparams")
    config.disable_glog_info()
    predictor = paddle.inference.create_predictor(config)

    def predict(predictor, values):
        for name in predictor.get_input_names():
            predictor.get_input_handle(name).copy_from_cpu(values[name])
        predictor.run()
        return [
            predictor.get_output_handle(name).copy_to_cpu() for name in predictor.get_output_names()
        ]

    for actual, value in zip(predict(predictor, feeds), expected):
        np.testing.assert_array_equal(actual, value)
    built = library.engines_built()
    for _ in range(3):
        predict(predictor, feeds)
    assert library.engines_built() == built
    with pytest.raises(ValueError, match=r"seq_len\[0\] is 9: it must be between 1 and 5"):
        predict(predictor, {**feeds, "seq_len": np.array([9, 2, 3], "int32")})
    # The engines of programs go with the programs' weights.
    gc.collect()
    held, programs = library.engine_count(), 1 if loaded is None else 2
    del predictor, loaded
    gc.collect()
    assert library.engine_count() == held - programs
