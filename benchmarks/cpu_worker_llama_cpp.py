"""llama.cpp as a contestant of `python -m benchmarks.cpu`, through the C of llama-cpp-python."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import llama_cpp
import numpy as np

from benchmarks.cpu_worker import Clock, Load

_TYPES = {
    "float32": llama_cpp.LLAMA_FTYPE_ALL_F32,
    "bfloat16": llama_cpp.LLAMA_FTYPE_MOSTLY_BF16,
    "int8": llama_cpp.LLAMA_FTYPE_MOSTLY_Q8_0,
    "int4": llama_cpp.LLAMA_FTYPE_MOSTLY_Q4_0,
}
_PIECE = 512  # tokens that go through at once, all of the table's prompts


class Contestant:
    """A model and one context, whose cache is emptied before every sample."""

    def __init__(self, load: Load) -> None:
        llama_cpp.llama_backend_init()
        options = llama_cpp.llama_model_default_params()
        options.n_gpu_layers = 0
        path = str(_converted(load)).encode()
        self._model = llama_cpp.llama_model_load_from_file(path, options)
        if not self._model:
            raise RuntimeError("llama.cpp does not load the model; its log says why")
        self._threads = load.threads
        self._vocab = llama_cpp.llama_vocab_n_tokens(llama_cpp.llama_model_get_vocab(self._model))
        self._batch = llama_cpp.llama_batch_init(_PIECE, 0, 1)
        self._room = (0, 0)
        self._context: Any = None

    @staticmethod
    def convert(load: Load) -> None:
        """See cpu_worker.Peer."""
        _converted(load)

    def about(self) -> dict[str, Any]:
        """Version, and how it was compiled."""
        compiled = llama_cpp.llama_print_system_info().decode()
        return {"version": llama_cpp.__version__, "compiled": compiled}

    def make_room(self, rows: int, positions: int) -> None:
        """A context for so many, unless the last one was."""
        if self._room == (rows, positions):
            return
        if self._context:
            llama_cpp.llama_free(self._context)
        wanted = llama_cpp.llama_context_default_params()
        wanted.n_ctx = rows * _rounded(positions)
        wanted.n_seq_max = rows
        wanted.n_batch = wanted.n_ubatch = _PIECE
        wanted.n_threads = wanted.n_threads_batch = self._threads
        self._context = llama_cpp.llama_init_from_model(self._model, wanted)
        if not self._context:
            raise RuntimeError("llama.cpp makes no context; its log says why")
        self._room = (rows, positions)

    def decode(self, prompts: np.ndarray, steps: int, clock: Clock) -> None:
        """See cpu_worker.Peer."""
        tokens = self._begin(prompts)
        length = prompts.shape[1]
        while not clock.tick():
            tokens = self._feed(tokens[:, None], length, last=True)
            length += 1

    def prefill(self, prompts: np.ndarray) -> list[int]:
        """See cpu_worker.Peer."""
        return self._begin(prompts).tolist()

    def _begin(self, prompts: np.ndarray) -> np.ndarray:
        llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
        rows, length = prompts.shape
        piece = max(1, _PIECE // rows)
        for begin in range(0, length, piece):
            end = min(begin + piece, length)
            tokens = self._feed(prompts[:, begin:end], begin, last=end == length)
        return tokens

    def _feed(self, tokens: np.ndarray, past: int, last: bool) -> np.ndarray:
        """Feeds [rows, length] tokens after ``past`` others; the next ones [rows], where these are
        the last of the prompt."""
        rows, length = tokens.shape
        batch = self._batch
        batch.n_tokens = rows * length
        ends = []
        for row in range(rows):
            for column, token in enumerate(tokens[row].tolist()):
                at = row * length + column
                batch.token[at] = token
                batch.pos[at] = past + column
                batch.n_seq_id[at] = 1
                batch.seq_id[at][0] = row
                batch.logits[at] = last and column == length - 1
            ends.append(row * length + length - 1)
        status = llama_cpp.llama_decode(self._context, batch)
        if status != 0:
            raise RuntimeError(f"llama_decode answers {status}")
        if not last:
            return np.empty(0, dtype=np.int64)
        # Tokens are chosen in this process: reading the logits waits for them.
        return np.array([self._best(end) for end in ends])

    def _best(self, at: int) -> int:
        logits = llama_cpp.llama_get_logits_ith(self._context, at)
        return int(np.ctypeslib.as_array(logits, shape=(self._vocab,)).argmax())


def _rounded(positions: int) -> int:
    """llama.cpp's caches are multiples of 256 positions."""
    return -(-positions // 256) * 256


def _converted(load: Load) -> Path:
    """The GGUF file of a weight type, made of the float32 one by llama.cpp itself."""
    if load.dtype not in _TYPES:
        raise ValueError(f"llama.cpp has no {load.dtype} here")
    version = llama_cpp.__version__
    plain = load.made(
        f"llama_cpp-{version}-float32.gguf", lambda path: _write_gguf(load.source, path)
    )
    if load.dtype == "float32":
        return plain

    def quantize(path: Path) -> None:
        options = llama_cpp.llama_model_quantize_default_params()
        options.ftype = _TYPES[load.dtype]
        options.nthread = load.threads
        options.pure = True  # the head too, as all other contestants do
        status = llama_cpp.llama_model_quantize(str(plain).encode(), str(path).encode(), options)
        if status != 0:
            raise RuntimeError(f"llama_model_quantize answers {status}; its log says why")

    return load.made(f"llama_cpp-{version}-{load.dtype}.gguf", quantize)


def _write_gguf(source: Path, path: Path) -> None:
    """Writes the float32 weights under llama.cpp's names; matrices have a row for each output."""
    import gguf
    from safetensors.numpy import load_file

    config = json.loads((source / "config.json").read_text(encoding="utf-8"))
    writer = gguf.GGUFWriter(path, "gpt2")
    writer.add_block_count(config["n_layer"])
    writer.add_context_length(config["n_positions"])
    writer.add_embedding_length(config["n_embd"])
    writer.add_feed_forward_length(4 * config["n_embd"])
    writer.add_head_count(config["n_head"])
    writer.add_layer_norm_eps(config["layer_norm_epsilon"])
    writer.add_vocab_size(config["vocab_size"])
    writer.add_file_type(gguf.LlamaFileType.ALL_F32)
    writer.add_tokenizer_model("none")
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.GPT2, config["n_layer"])
    for name, values in load_file(source / "model.safetensors").items():
        found = names.get_name(f"transformer.{name}", try_suffixes=(".weight", ".bias"))
        if found is None:
            raise RuntimeError(f"gguf has no name for {name}")
        matrix = values.ndim == 2 and name.startswith("h.")
        writer.add_tensor(found, np.ascontiguousarray(values.T) if matrix else values)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
