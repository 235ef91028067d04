"""Tensors and streams of another framework, PyTorch, given to the engine through the C API.

It is what the Paddle op does with Paddle's. PyTorch has a CUDA run-time library of its own, as
Paddle has.
"""

from __future__ import annotations

import ctypes
import json
import threading
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from fastgen import _capi
from fastgen.errors import FastgenError, InvalidArgumentError
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, checksum
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors
from tests.cuda.torch_tensors import fused, on_device, on_host, view, views, with_head

torch = pytest.importorskip("torch")

SHAPE = GPTShape(515, 96, 60, 2, 5, 121)  # nothing is a multiple of anything
GREEDY = GenerationOptions(max_length=8, eos_token_id=-1)
SAMPLING = replace(GREEDY, decode_strategy="sampling", top_k=20, top_p=0.9, max_length=12)
PROMPTS = [[5, 6, 7], [1], list(range(80))]
# Keeps a stream busy for 0.1 s or more: whoever does not wait for it is early.
BUSY_CYCLES = 200_000_000


FORMS = {
    "apart": lambda arrays: dict(arrays),
    "fused": lambda arrays: fused(arrays, SHAPE.num_attention_heads),
    "head": with_head,
}


@pytest.fixture(scope="module")
def arrays() -> dict[str, Any]:
    return dict(make_tensors(SHAPE, WeightRecipe(1)))


@pytest.mark.parametrize("weight_dtype", ["float32", "float16", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("source", [torch.float32, torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("form", FORMS)
def test_the_model_is_that_of_the_same_arrays(
    arrays: dict[str, Any], form: str, source: Any, weight_dtype: str
) -> None:
    tensors = on_device(FORMS[form](arrays), source)
    kind = {"device": "cuda", "weight_dtype": weight_dtype}
    stream = torch.cuda.current_stream().cuda_stream
    with (
        EngineModel(SHAPE, on_host(tensors), **kind) as host,
        EngineModel(SHAPE, views(tensors), **kind, tensor_device="cuda:0", stream=stream) as device,
    ):
        assert np.array_equal(device.logits(PROMPTS[2]), host.logits(PROMPTS[2]))
        theirs = host.generate(PROMPTS, SAMPLING, seed=3)
        ours = device.generate(PROMPTS, SAMPLING, seed=3)
    assert [s.tokens for s in ours] == [s.tokens for s in theirs]
    assert [s.score for s in ours] == [s.score for s in theirs]


def test_a_head_that_equals_the_embedding_is_not_kept_twice(arrays: dict[str, Any]) -> None:
    tensors = on_device(arrays, torch.float16)
    (name,) = [name for name in arrays if name.endswith("word_embeddings.weight")]

    def weight_bytes(tensors: Mapping[str, Any], stream: Any) -> int:
        info = _capi.ModelInfo()
        info.struct_size = ctypes.sizeof(info)
        with EngineModel(
            SHAPE, views(tensors), device="cuda", weight_dtype="float16", tensor_device="cuda",
            stream=stream.cuda_stream,
        ) as model:  # fmt: skip
            lib = _capi.library()
            _capi.check(lib.fastgen_model_get_info(model._handle, ctypes.byref(info)))
        return int(info.weight_bytes)

    stream = torch.cuda.Stream()
    tied = weight_bytes(tensors, stream)
    head = torch.zeros_like(tensors[name])
    torch.cuda.synchronize()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        head.copy_(tensors[name])
    assert weight_bytes({**tensors, "lm_head.weight": head}, stream) == tied
    for change in (0, head.numel() - 1):
        other = head.clone()
        torch.cuda.synchronize()
        other.view(-1)[change] += 1
        torch.cuda.synchronize()
        assert weight_bytes({**tensors, "lm_head.weight": other}, stream) > tied


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_weights_that_are_being_written(arrays: dict[str, Any], dtype: Any) -> None:
    """Packing waits for the stream, and what comes on it afterwards does not reach the model."""
    source = on_device(arrays, dtype)
    tensors = {name: torch.zeros_like(tensor) for name, tensor in source.items()}
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        for name, tensor in tensors.items():
            tensor.copy_(source[name])
    assert not stream.query(), "nothing was in flight: the test shows nothing"
    kind = {"device": "cuda", "weight_dtype": "float32"}
    with EngineModel(
        SHAPE, views(tensors), **kind, tensor_device="cuda", stream=stream.cuda_stream
    ) as model:
        with torch.cuda.stream(stream):
            for tensor in tensors.values():
                tensor.zero_()
        ours = model.generate(PROMPTS, SAMPLING, seed=5)
    with EngineModel(SHAPE, on_host(source), **kind) as host:
        theirs = host.generate(PROMPTS, SAMPLING, seed=5)
    assert [s.tokens for s in ours] == [s.tokens for s in theirs]


@pytest.mark.parametrize("dtype", [torch.int32, torch.int64], ids=str)
def test_prompts_and_tokens_on_a_busy_stream(arrays: dict[str, Any], dtype: Any) -> None:
    lengths = [len(prompt) for prompt in PROMPTS]
    rows = torch.full((3, max(lengths)), -5, dtype=dtype)
    for row, prompt in zip(rows, PROMPTS):
        row[: len(prompt)] = torch.tensor(prompt, dtype=dtype)
    real = rows.cuda()
    prompts = torch.zeros_like(real)
    output = torch.zeros((3, 12), dtype=dtype, device="cuda")
    scores = torch.zeros(3, device="cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with EngineModel(SHAPE, arrays, device="cuda") as model:
        each = [GREEDY, replace(SAMPLING, max_length=5), SAMPLING]
        expected = [
            model.generate([prompt], options, seed=9, first_sequence=row)[0]
            for row, (prompt, options) in enumerate(zip(PROMPTS, each))
        ]
        on = {"device": "cuda", "stream": stream.cuda_stream}
        with model.session() as session:
            with torch.cuda.stream(stream):
                torch.cuda._sleep(BUSY_CYCLES)
                prompts.copy_(real)
            assert not stream.query()
            ids = session.submit_batch(view(prompts), each, lengths, seed=9, **on)
            with torch.cuda.stream(stream):
                prompts.fill_(3)
            session.run()
            with torch.cuda.stream(stream):
                torch.cuda._sleep(BUSY_CYCLES)
                # What the memory's last owner still does with it.
                output.fill_(-7)
                scores.fill_(-7)
            session.get_batch(ids, view(output), 0, scores.data_ptr(), **on)
            with torch.cuda.stream(stream):
                seen, seen_scores = output.clone(), scores.clone()
                output.fill_(-8)
    stream.synchronize()
    for row, sequence in zip(seen.tolist(), expected):
        assert row == sequence.tokens + [0] * (12 - len(sequence.tokens))
    assert seen_scores.cpu().numpy().tolist() == [
        np.float32(sequence.score) for sequence in expected
    ]
    assert (output == -8).all()


def test_the_default_stream(arrays: dict[str, Any]) -> None:
    """NULL is the legacy default stream, which PyTorch uses unless told otherwise."""
    real = torch.tensor([[5, 6, 7]], device="cuda")
    prompts = torch.zeros_like(real)
    torch.cuda.synchronize()
    with EngineModel(SHAPE, arrays, device="cuda") as model, model.session() as session:
        torch.cuda._sleep(BUSY_CYCLES)
        prompts.copy_(real)
        ids = session.submit_batch(view(prompts), [GREEDY], device="cuda:0", stream=0)
        session.run()
        assert session.get(ids[0]).tokens == model.generate([[5, 6, 7]], GREEDY)[0].tokens


def test_threads_with_streams_of_their_own(arrays: dict[str, Any]) -> None:
    failures: list[BaseException] = []
    with EngineModel(SHAPE, arrays, device="cuda") as model:
        expected = model.generate(PROMPTS, SAMPLING, seed=1)

        def work(index: int) -> None:
            try:
                prompt, options = PROMPTS[index % 3], replace(SAMPLING, num_return_sequences=1)
                real = torch.tensor([prompt], device="cuda")
                torch.cuda.synchronize()
                stream = torch.cuda.Stream()
                for _ in range(20):
                    with torch.cuda.stream(stream), model.session() as session:
                        on = {"device": "cuda", "stream": stream.cuda_stream}
                        rows = real + 0
                        ids = session.submit_batch(view(rows), [options], seed=1, **on)
                        session.run()
                        output = torch.full((1, 12), -7, device="cuda")
                        session.get_batch(ids, view(output), 0, **on)
                        if index % 3 == 0:
                            assert output[0].tolist() == expected[0].tokens
                        assert output.min().item() >= 0
            except BaseException as error:
                failures.append(error)

        threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert failures == []


def test_others_wait_for_the_device_meanwhile(arrays: dict[str, Any]) -> None:
    """Threads that have nothing to do with the engine, while it makes graphs of new steps."""
    failures: list[BaseException] = []
    done = threading.Event()

    def wait_for_device() -> None:
        try:
            while not done.is_set():
                torch.cuda.synchronize()
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=wait_for_device) for _ in range(3)]
    for thread in threads:
        thread.start()
    try:
        for _ in range(10):
            with EngineModel(SHAPE, arrays, device="cuda") as model:
                for rows in range(1, 17):
                    model.generate([[1, 2, 3]] * rows, GREEDY)
    finally:
        done.set()
        for thread in threads:
            thread.join()
    assert failures == []


# ---- What is refused ---------------------------------------------------------------------------


def test_tensors_elsewhere(arrays: dict[str, Any]) -> None:
    tensors = views(on_device(arrays, torch.float32))  # freed, but PyTorch keeps the memory
    name = next(iter(tensors))
    with pytest.raises(InvalidArgumentError, match=r"device=cpu cannot take .* lie on cuda:0"):
        EngineModel(SHAPE, tensors, tensor_device="cuda")
    host = torch.zeros(tensors[name].shape)
    misplaced = {**tensors, name: view(host)}
    with pytest.raises(
        InvalidArgumentError, match=f"{name} does not lie on cuda:0: .* of the host"
    ):
        EngineModel(SHAPE, misplaced, device="cuda", tensor_device="cuda")
    with pytest.raises(InvalidArgumentError, match=f"{name} does not lie on cuda:0"):
        checksum(misplaced, "cuda")
    crooked = {**tensors, name: replace(tensors[name], pointer=tensors[name].pointer + 1)}
    with pytest.raises(
        InvalidArgumentError, match=f"{name} lies at an address that is no multiple"
    ):
        EngineModel(SHAPE, crooked, device="cuda", tensor_device="cuda")
    count = torch.cuda.device_count()
    with pytest.raises(
        InvalidArgumentError, match=f"device=cuda:{count}: this machine has {count}"
    ):
        EngineModel(SHAPE, tensors, device=f"cuda:{count}", tensor_device=f"cuda:{count}")


def test_freed_memory() -> None:
    gone = view(torch.zeros(64 << 20, device="cuda"))
    torch.cuda.empty_cache()
    with pytest.raises(InvalidArgumentError, match=r"gone does not lie on cuda:0: .* of nobody"):
        checksum({"gone": gone}, "cuda")


def test_prompts_and_outputs_elsewhere(arrays: dict[str, Any]) -> None:
    rows = torch.tensor([[1, 2]])
    with EngineModel(SHAPE, arrays, device="cuda") as model, model.session() as session:
        with pytest.raises(InvalidArgumentError, match=r"batch.tokens does not lie on cuda:0"):
            session.submit_batch(view(rows), [GREEDY], device="cuda")
        with pytest.raises(
            InvalidArgumentError, match=r"batch.device is cuda:1 and the model runs"
        ):
            session.submit_batch(view(rows), [GREEDY], device="cuda:1")
        ids = session.submit_batch(view(rows), [GREEDY])
        session.run()
        output = torch.zeros((1, 8), dtype=torch.int32)
        with pytest.raises(InvalidArgumentError, match=r"output.tokens does not lie on cuda:0"):
            session.get_batch(ids, view(output), device="cuda")
        session.get_batch(ids, view(output))
        assert output[0].tolist() == session.get(ids[0]).tokens


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="there is one device")
def test_two_devices(arrays: dict[str, Any]) -> None:
    tensors = on_device(arrays, torch.float32)
    name = next(iter(tensors))
    tensors[name] = tensors[name].to("cuda:1")
    with pytest.raises(InvalidArgumentError, match=f"{name} lies on cuda:1, not on cuda:0"):
        EngineModel(SHAPE, views(tensors), device="cuda", tensor_device="cuda")
    with torch.cuda.device(1):
        stream = torch.cuda.Stream()
    tensors[name] = tensors[name].to("cuda:0")
    with pytest.raises(InvalidArgumentError, match="stream is not one of the device"):
        EngineModel(
            SHAPE, views(tensors), device="cuda", tensor_device="cuda", stream=stream.cuda_stream
        )
    other = {key: tensor.to("cuda:1") for key, tensor in tensors.items()}
    torch.cuda.synchronize(1)
    kind = {"device": "cuda:1", "tensor_device": "cuda:1", "stream": stream.cuda_stream}
    assert torch.cuda.current_device() == 0
    with EngineModel(SHAPE, views(other), **kind) as model:
        ours = model.generate(PROMPTS, GREEDY)
    assert torch.zeros(1, device="cuda").device.index == 0
    with EngineModel(SHAPE, arrays, device="cuda") as model:
        assert [s.tokens for s in ours] == [s.tokens for s in model.generate(PROMPTS, GREEDY)]


def test_a_stream_that_captures_a_graph(arrays: dict[str, Any]) -> None:
    rows = torch.tensor([[1, 2]])
    with EngineModel(SHAPE, arrays, device="cuda") as model, model.session() as session:
        ids = session.submit_batch(view(rows), [GREEDY])
        session.run()
        output = torch.zeros((1, 8), dtype=torch.int32, device="cuda")
        stream = torch.cuda.Stream()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph, stream=stream, capture_error_mode="thread_local"):
            output.add_(1)
            with pytest.raises(InvalidArgumentError, match="stream is capturing a graph"):
                session.get_batch(
                    ids, view(output), device="cuda",
                    stream=torch.cuda.current_stream().cuda_stream,
                )  # fmt: skip
        graph.replay()
        torch.cuda.synchronize()
        assert (output == 1).all()


# ---- What a caller must not notice -------------------------------------------------------------


def current_context() -> int | None:
    context = ctypes.c_void_p()
    assert ctypes.CDLL("libcuda.so.1").cuCtxGetCurrent(ctypes.byref(context)) == 0
    return context.value


def test_the_context_of_a_thread_stays(arrays: dict[str, Any]) -> None:
    seen: list[Any] = []

    def work() -> None:
        seen.append(current_context())
        with EngineModel(SHAPE, arrays, device="cuda") as model:
            seen.append(current_context())
            seen.append(model.generate([[1, 2]], GREEDY)[0].finish_reason)
        seen.append(current_context())

    torch.zeros(1, device="cuda")
    mine = current_context()
    assert mine is not None
    work()
    assert seen == [mine, mine, "length", mine]
    seen.clear()
    thread = threading.Thread(target=work)  # a new thread has no context
    thread.start()
    thread.join()
    assert seen == [None, None, "length", None]


def test_weights_do_not_pass_through_the_host(tmp_path: Path) -> None:
    """Bytes of all copies between host and device while a model is made, by the profiler."""
    shape = GPTShape(5003, 256, 512, 4, 8, 2048)
    tensors = on_device(make_tensors(shape, WeightRecipe(1)), torch.float16)
    stream = torch.cuda.current_stream().cuda_stream
    kind = {"device": "cuda", "weight_dtype": "float16"}

    def copied(name: str, make: Any) -> int:
        activity = torch.profiler.ProfilerActivity.CUDA
        with torch.profiler.profile(activities=[activity]) as profile:
            make().close()
            torch.cuda.synchronize()
        path = tmp_path / f"{name}.json"
        profile.export_chrome_trace(str(path))
        events = json.loads(path.read_text())["traceEvents"]
        copies = [e for e in events if e.get("cat") == "gpu_memcpy"]
        return sum(
            int(e["args"]["bytes"]) for e in copies if "HtoD" in e["name"] or "DtoH" in e["name"]
        )

    size = sum(tensor.numel() * 2 for tensor in tensors.values())
    arrays = on_host(tensors)
    host = copied("host", lambda: EngineModel(shape, arrays, **kind))
    if host < size:
        pytest.skip("the profiler does not see the engine's copies here")
    device = copied(
        "device",
        lambda: EngineModel(shape, views(tensors), **kind, tensor_device="cuda", stream=stream),
    )
    assert device < 1 << 16


# ---- Checksums ---------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16], ids=str)
def test_the_checksum_sees_every_element(dtype: Any) -> None:
    """Of pieces whose beginnings and ends are not multiples of what the kernel loads."""
    backing = torch.randn(9000, device="cuda").to(dtype)
    tensors = {"a": backing[1:4098], "b": backing[4098:4099], "c": backing[4104:8993]}
    begin = checksum(views(tensors), "cuda")
    copies = {name: tensor.clone() for name, tensor in tensors.items()}  # elsewhere
    assert checksum(views(copies), "cuda") == begin
    seen = {begin}
    for tensor in tensors.values():
        for index in {0, 1, 7, 8, tensor.numel() // 2, tensor.numel() - 1}:
            if index >= tensor.numel():
                continue
            kept = tensor[index].clone()
            tensor[index] = kept + 1
            seen.add(checksum(views(tensors), "cuda"))
            tensor[index] = kept
    assert len(seen) == 1 + 6 + 1 + 6
    assert checksum(views(tensors), "cuda") == begin
    # Neighbours exchanged: position counts.
    tensors["c"][:2] = tensors["c"][:2].flip(0).clone()
    assert checksum(views(tensors), "cuda") != begin


def test_the_checksum_of_many_tensors_and_large_ones() -> None:
    tensors = {str(i): torch.randn(1 + 37 * i, device="cuda") for i in range(300)}
    tensors["large"] = torch.randn((1 << 24) + 3, device="cuda")
    begin = checksum(views(tensors), "cuda")
    for name, index in (("0", 0), ("127", 5), ("128", 5), ("299", -1), ("large", -1)):
        tensors[name][index] += 1
        changed = checksum(views(tensors), "cuda")
        assert changed != begin, name
        begin = changed


def test_the_checksum_waits_for_the_stream() -> None:
    tensor = torch.zeros(1000, device="cuda")
    later = checksum({"": view(tensor + 1)}, "cuda")
    torch.cuda.synchronize()
    stream = torch.cuda.Stream()
    with torch.cuda.stream(stream):
        torch.cuda._sleep(BUSY_CYCLES)
        tensor += 1
    assert checksum({"": view(tensor)}, "cuda", stream.cuda_stream) == later


def test_errors_leave_the_device_usable(arrays: dict[str, Any]) -> None:
    tensors = on_device(arrays, torch.float32)
    name = list(tensors)[-1]
    missing = {key: value for key, value in tensors.items() if key != name}
    with pytest.raises(FastgenError, match=f"tensor '{name}' is missing"):
        EngineModel(SHAPE, views(missing), device="cuda", tensor_device="cuda")
    with EngineModel(SHAPE, views(tensors), device="cuda", tensor_device="cuda") as model:
        assert model.generate([[1]], GREEDY)[0].finish_reason == "length"
