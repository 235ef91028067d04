"""The library's own tokenizer in use: time, threads, buffers, arguments."""

from __future__ import annotations

import ctypes
import threading
import time
from collections.abc import Callable
from ctypes import byref, c_char_p, c_int32, c_size_t, c_void_p
from pathlib import Path

import pytest
from fastgen_tests.native_tokenizer import CORPUS, Native, save_vocabulary, trained

from fastgen import _capi
from fastgen.errors import InvalidArgumentError


def seconds(call: Callable[[], object]) -> float:
    """The best of three, of this thread's own time: other processes do not count."""
    best = float("inf")
    for _ in range(3):
        begin = time.thread_time()
        call()
        best = min(best, time.thread_time() - begin)
    return best


@pytest.mark.parametrize(
    "unit",
    ["a", " ", "aaaa ", "\u4e2d", "\u0301", "'", "<|endof", "\xff", "word and 12 more.\n"],
    ids=ascii,
)
def test_time_is_linear_in_the_text(small: Native, unit: str) -> None:
    size = 60_000
    short = (unit * size)[:size].encode()
    long = short * 16
    small.encode(short)
    ratio = seconds(lambda: small.encode(long)) / seconds(lambda: small.encode(short))
    # 16 if linear, 256 if quadratic; caches and a busy machine take their share.
    assert ratio < 64
    assert len(small.encode(long)) <= len(long)


def test_threads_share_a_tokenizer(small: Native) -> None:
    texts = [text * (i + 1) for i, text in enumerate(CORPUS)]
    expected = [small.encode(text) for text in texts]
    wrong: list[int] = []

    def work(first: int) -> None:
        for step in range(60):
            i = (first + step) % len(texts)
            ids = small.encode(texts[i])
            if ids != expected[i] or small.decode(ids, False) != texts[i]:
                wrong.append(i)

    threads = [threading.Thread(target=work, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not wrong


def test_a_stream_outlives_its_tokenizer(tmp_path: Path) -> None:
    save_vocabulary(trained(400), tmp_path)
    native = Native(tmp_path)
    library = _capi.library()
    stream = c_void_p()
    _capi.check(library.fastgen_text_stream_create(native.handle, 1, byref(stream)))
    ids = native.encode("naïve")
    native.close()
    text, size = c_char_p(), c_size_t()
    tokens = (c_int32 * len(ids))(*ids)
    _capi.check(
        library.fastgen_text_stream_push(stream, tokens, len(ids), byref(text), byref(size))
    )
    assert text.value is not None
    assert text.value.decode() == "naïve"
    library.fastgen_text_stream_free(stream)


def test_buffers_that_are_too_small_are_filled(small: Native) -> None:
    library = _capi.library()
    ids = small.encode("one two three four")
    tokens = (c_int32 * 3)(-7, -7, -7)
    length = c_size_t()
    data = b"one two three four"
    arguments = (small.handle, data, len(data))
    _capi.check(library.fastgen_tokenizer_encode(*arguments, tokens, 2, byref(length)))
    assert (length.value, tokens[:]) == (len(ids), [*ids[:2], -7])
    native_ids = (c_int32 * len(ids))(*ids)
    text = ctypes.create_string_buffer(b"xxxxxx")
    _capi.check(
        library.fastgen_tokenizer_decode(
            small.handle, native_ids, len(ids), 1, text, 5, byref(length)
        )
    )
    assert (length.value, text.raw) == (len(data), b"one tx\0")


def test_arguments_are_checked(small: Native) -> None:
    library = _capi.library()
    length = c_size_t()
    for arguments, message in (
        ((None, b"a", 1, None, 0, byref(length)), "tokenizer is NULL"),
        ((small.handle, None, 1, None, 0, byref(length)), "text is NULL"),
        ((small.handle, b"a", 1, None, 1, byref(length)), "tokens is NULL"),
        ((small.handle, b"a", 1, None, 0, None), "length is NULL"),
    ):
        with pytest.raises(InvalidArgumentError, match=message):
            _capi.check(library.fastgen_tokenizer_encode(*arguments))
    with pytest.raises(InvalidArgumentError, match="skip_special_tokens is 2, it must be 0 or 1"):
        _capi.check(
            library.fastgen_tokenizer_decode(small.handle, None, 0, 2, None, 0, byref(length))
        )
    with pytest.raises(InvalidArgumentError, match="tokens has -5, a token id must be at least 0"):
        small.decode([1, -5])
    library.fastgen_tokenizer_free(None)
    library.fastgen_text_stream_free(None)
    assert library.fastgen_tokenizer_vocab_size(None) == 0
    assert small.encode("") == []
    assert small.decode([]) == ""
