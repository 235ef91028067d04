"""A soak of the CUDA device: python -m tests.cuda.soak [--requests 20000]

Requests of random prompt, length, batch and options; at the end a fixed request must be as fast as
at the start, and memory of device and host what it was after half of them. The exit status says so.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import sys
import time
from pathlib import Path

import torch

from fastgen.options import GenerationOptions
from fastgen.testing.engine import EngineModel
from fastgen.testing.models import GPTShape, WeightRecipe, make_tensors

SHAPE = GPTShape(50257, 512, 256, 4, 4, 1024)
FIXED = GenerationOptions(
    max_length=64, decode_strategy="sampling", top_k=40, top_p=0.9, eos_token_id=-1
)
LATENCY_ROUNDS = 60


def memory() -> tuple[float, float]:
    """MiB in use on the device, and of this process."""
    free, total = torch.cuda.mem_get_info()
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    resident = next(int(line.split()[1]) for line in lines if line.startswith("VmRSS"))
    return (total - free) / 2**20, resident / 2**10


def latency(model: EngineModel) -> float:
    """Median seconds of the fixed request."""
    seconds = []
    for _ in range(LATENCY_ROUNDS):
        begin = time.perf_counter()
        model.generate([list(range(20))], FIXED, seed=3)
        seconds.append(time.perf_counter() - begin)
    return statistics.median(seconds)


def random_options(rng: random.Random) -> GenerationOptions:
    """Any options."""
    sampling = rng.random() < 0.8
    return GenerationOptions(
        decode_strategy="sampling" if sampling else "greedy_search",
        max_length=rng.randint(1, 40),
        min_length=rng.choice([0, 0, 3]),
        top_k=rng.choice([0, 1, 4, 40, 1000]),
        top_p=rng.choice([1.0, 0.9, 0.3]),
        temperature=rng.choice([1.0, 0.5, 1.5]),
        repetition_penalty=rng.choice([1.0, 1.2]),
        no_repeat_ngram_size=rng.choice([0, 0, 2]),
        num_return_sequences=rng.choice([1, 1, 3]) if sampling else 1,
        eos_token_id=rng.choice([-1, 5, 70]),
    )


def main() -> int:
    """Runs the soak and prints one JSON object."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--requests", type=int, default=20_000)
    parser.add_argument("--weight_dtype", default="float16")
    arguments = parser.parse_args()
    rng = random.Random(1)
    tensors = make_tensors(SHAPE, WeightRecipe(1))
    done = tokens = 0
    after_half = None
    begin = time.perf_counter()
    with EngineModel(SHAPE, tensors, device="cuda", weight_dtype=arguments.weight_dtype) as model:
        latency(model)
        at_start = latency(model)
        while done < arguments.requests:
            with model.session(rng.choice([0, 1, 7, 64])) as session:
                ids = []
                for _ in range(rng.randint(1, 64)):
                    prompt = [rng.randrange(50257) for _ in range(rng.randint(1, 300))]
                    ids += session.submit(prompt, random_options(rng), seed=rng.getrandbits(60))
                    done += 1
                session.run()
                tokens += sum(len(session.get(i).tokens) for i in ids)
            if after_half is None and done >= arguments.requests / 2:
                after_half = memory()
        at_end = latency(model)
        now = memory()
    assert after_half is not None
    result = {
        "requests": done,
        "tokens": tokens,
        "seconds": time.perf_counter() - begin,
        "device_mib": [after_half[0], now[0]],
        "host_mib": [after_half[1], now[1]],
        "latency_ms": [1e3 * at_start, 1e3 * at_end],
    }
    print(json.dumps(result))
    flat = now[0] <= after_half[0] + 1 and now[1] <= 1.02 * after_half[1]
    return 0 if flat and at_end <= 1.05 * at_start else 1


if __name__ == "__main__":
    sys.exit(main())
