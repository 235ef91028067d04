"""Times what tensors on the device cost: a model made of them, their checksum, prompts and tokens.

python -m tests.cuda.bench_tensors
"""

from __future__ import annotations

import ctypes
import time
from collections.abc import Callable
from typing import Any

import torch

from fastgen import _capi
from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel, native_tensors
from fastgen.testing.models import GPTShape
from tests.cuda.torch_tensors import on_host, view, views

MEDIUM = GPTShape(50257, 1024, 1024, 24, 16, 4096)
KIND = {"device": "cuda", "weight_dtype": "float16"}


def best(call: Callable[[], Any], passes: int = 3) -> float:
    """Milliseconds of the fastest of some calls."""
    times = []
    for _ in range(passes):
        begin = time.perf_counter()
        call()
        times.append(time.perf_counter() - begin)
    return 1e3 * min(times)


def read_bandwidth(model: EngineModel) -> float:
    """Bytes per second."""
    result = ctypes.c_double()
    status = _capi.library().fastgen_measure_read_bandwidth(
        model._handle, 1 << 30, 5, ctypes.byref(result)
    )
    _capi.check(status)
    return result.value


def main() -> None:
    tensors = {
        name: (torch.randn(size, device="cuda") * 0.02).half()
        for name, size in MEDIUM.tensor_shapes().items()
    }
    size = sum(2 * tensor.numel() for tensor in tensors.values())
    arrays, given = on_host(tensors), views(tensors)
    host = best(lambda: EngineModel(MEDIUM, arrays, **KIND).close(), 2)
    device = best(lambda: EngineModel(MEDIUM, given, **KIND, tensor_device="cuda").close())
    print(f"{torch.cuda.get_device_name()}: GPT-2 medium, float16, {len(given)} tensors")
    print(f"model of arrays on the host   {host:8.2f} ms")
    print(f"model of tensors on the device{device:8.2f} ms")
    native, _ = native_tensors(given)
    call = _capi.library().fastgen_checksum
    result = ctypes.c_uint64()
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    kernels = []

    def summing() -> None:
        begin.record()
        _capi.check(call(native, len(given), b"cuda", 0, ctypes.byref(result)))
        end.record()
        end.synchronize()
        kernels.append(begin.elapsed_time(end))

    summed = best(summing, 30)
    large = torch.zeros(size // 2, dtype=torch.float16, device="cuda")
    native_large, _ = native_tensors(views({"large": large}))
    one = best(lambda: call(native_large, 1, b"cuda", 0, ctypes.byref(result)), 30)
    prompts = torch.randint(0, 50257, (8, 128), device="cuda")
    options = GenerationOptions(max_length=2, eos_token_id=-1)
    with EngineModel(MEDIUM, given, **KIND, tensor_device="cuda") as model:
        bandwidth = read_bandwidth(model)
        share = size / (summed * 1e-3) / bandwidth
        print(
            f"checksum of {size >> 20} MiB         {summed:8.3f} ms, {share:.0%} of the bandwidth, "
        )
        print(f"  between events              {min(kernels):8.3f} ms")
        print(f"  of one tensor of that size  {one:8.3f} ms")
        with model.session() as session:
            submitted: list[int] = []
            place = {"device": "cuda"}
            read = best(
                lambda: submitted.extend(session.submit_batch(view(prompts), [options], **place)),
                10,
            )
            ids = submitted[-8:]
            session.run()
            output = torch.zeros((8, 2), dtype=torch.int64, device="cuda")
            write = best(lambda: session.get_batch(ids, view(output), **place), 10)
        print(f"prompts, 8 x 128              {read:8.3f} ms")
        print(f"tokens, 8 x 2                 {write:8.3f} ms")


if __name__ == "__main__":
    main()
