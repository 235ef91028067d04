"""FasterGPT in a loop: one engine, and memory that stays where it is."""

from __future__ import annotations

import pytest

pytest.importorskip("paddlenlp")

CALLS = 10_000
# Of the allocators and of Paddle's profiler; a leak of one output a call would be over 1 MB.
ALLOWED_BYTES = 1 << 20


@pytest.mark.slow
def test_memory_is_flat_over_many_calls(run_python):
    out, _ = run_python(
        f"""
        import psutil
        from fastgen import FasterGPT
        layer = FasterGPT(make_model(), max_out_len=3)
        rng = np.random.default_rng(0)
        inputs = [
            paddle.to_tensor(rng.integers(8, 97, (batch, length)))
            for batch, length in ((1, 4), (2, 9), (4, 2))
        ]
        process = psutil.Process()
        for call in range(1, {CALLS} + 1):
            strategy = "greedy_search" if call % 2 else "sampling"
            layer(inputs[call % 3], decode_strategy=strategy)
            if call % 50 == 0:
                try:
                    layer(inputs[0] + 97)
                except ValueError:
                    pass
                else:
                    raise AssertionError("a token outside of the vocabulary was accepted")
            if call == 100:
                before = process.memory_info().rss
        print(process.memory_info().rss - before, layer._library.engines_built())
        """,
        timeout=600,
    )
    grown, built = map(int, out.split())
    assert built == 1
    assert grown <= ALLOWED_BYTES, f"{grown} bytes in {CALLS} calls"


def test_engines_come_and_go(run_python):
    out, _ = run_python(
        """
        import psutil
        from fastgen import FasterGPT
        shape = GPTShape(4000, 64, 128, 2, 4, 512)
        ids = paddle.to_tensor([[1, 2]])
        process = psutil.Process()
        sizes = []
        model = make_model(shape)
        for turn in range(40):
            layer = FasterGPT(model, max_out_len=2)
            layer(ids)
            del layer
            gc.collect()
            sizes.append(process.memory_info().rss)
        from fastgen.jit import load_op_library
        print(sizes[-1] - sizes[9], load_op_library().engine_count())
        """
    )
    grown, held = map(int, out.split())
    assert held == 0
    # An engine of this shape holds 3.8 MB: thirty of them would be 114 MB.
    assert grown < 8 << 20
