"""`FasterGPT`: a PaddleNLP GPT decoded by fastgen's engine inside Paddle, through the custom op."""

from __future__ import annotations

import itertools
import os
import secrets
import weakref
import zlib  # noqa: F401  Paddle's bundled zlib breaks later imports unless Python's comes first.
from collections.abc import Sequence
from typing import Any, Union

import numpy as np
import paddle

from fastgen._paddle_compat import LayerHelper, convert_into_variable, core
from fastgen.errors import InvalidArgumentError
from fastgen.jit import OP_NAME, OpLibrary, load_op_library
from fastgen.options import GenerationOptions

__all__ = ["FasterGPT"]

Scalars = Union[int, float, Sequence[Any], np.ndarray, paddle.Tensor, None]

_WEIGHT_CHECKS = ("content", "identity")
_DTYPES = ("float32", "float16", "bfloat16", "int8", "int4")
_CACHE_DTYPES = _DTYPES[:-1]
# What a value of the op's inputs is, and its name there.
_PER_ROW = {
    "top_k": ("TopK", "int64"),
    "top_p": ("TopP", "float32"),
    "temperature": ("Temperature", "float32"),
    "max_length": ("MaxLength", "int64"),
}
_owners = itertools.count(1)


class FasterGPT(paddle.nn.Layer):
    """Generates with a PaddleNLP `GPTLMHeadModel`, faster, and with the same tokens.

    The layer shares the parameters of `model`, which is not changed. An engine is built of them at
    the first call and reused; it is built again when they have changed, and freed with this object.

    Args:
        model: a `paddlenlp.transformers.GPTLMHeadModel`. Where its weights are the engine runs and
            the results are: on the CPU, or on an NVIDIA GPU, for which `libfastgen_cuda` is needed.
        topk: keep the k most probable tokens; 0: off.
        topp: keep the smallest set of tokens whose mass exceeds p; 0 or 1: off.
        max_out_len: new tokens at most.
        bos_id, eos_id, pad_id: special tokens; None: as `model.generate` has them; -1: none.
        temperature: divides the logits before the softmax; > 0.
        decoding_lib: a built `libdecoding_op.so`; None: it is built on first use.
        use_fp16_decoding: the same as weight_dtype "float16".
        weight_check: how changed weights are noticed. "content" reads all of them at each call and
            notices everything; "identity" looks only at where they lie and at Paddle's count of
            in-place operations, which neither optimizers nor `Tensor.set_value` add to.
        weight_dtype: what the engine keeps the weights as: "float32", "float16", "bfloat16", "int8"
            or "int4"; None: float32 on the CPU, on a GPU the type that most of the model's weights
            have.
        cache_dtype: what it keeps keys and values as: on the CPU "float32", "float16", "bfloat16"
            or "int8"; None: as the weights are, beside integers bfloat16 (on a GPU float16).

    Attributes:
        last_seed: the seed of the last call that sampled, given or drawn: an int, or a list of one
            int for each row; None before.

    Raises:
        ValueError: an argument is outside what is allowed.
        RuntimeError: the op library cannot be built or loaded.
    """

    def __init__(
        self,
        model: Any,
        topk: int = 4,
        topp: float = 0.0,
        max_out_len: int = 256,
        bos_id: int | None = None,
        eos_id: int | None = None,
        pad_id: int | None = None,
        temperature: float = 1.0,
        decoding_lib: str | os.PathLike[str] | None = None,
        use_fp16_decoding: bool = False,
        weight_check: str = "content",
        weight_dtype: str | None = None,
        cache_dtype: str | None = None,
    ) -> None:
        super().__init__()
        _check_model(model)
        self._weight_dtype = _weight_dtype(weight_dtype, use_fp16_decoding)
        if cache_dtype not in (None, *_CACHE_DTYPES):
            raise InvalidArgumentError(
                f"cache_dtype is {cache_dtype!r}: it must be one of {', '.join(_CACHE_DTYPES)}, or "
                "None"
            )
        self._cache_dtype = "auto" if cache_dtype is None else cache_dtype
        if weight_check not in _WEIGHT_CHECKS:
            raise InvalidArgumentError(
                f"weight_check is {weight_check!r}: it must be 'content' or 'identity'"
            )
        self._defaults = GenerationOptions(
            decode_strategy="sampling",
            top_k=topk,
            top_p=topp,
            max_length=max_out_len,
            temperature=temperature,
            eos_token_id=eos_id,
            pad_token_id=pad_id,
        )
        self._bos_id = bos_id
        self._weight_check = weight_check
        self.model = model
        self.last_seed: int | list[int] | None = None
        self._library: OpLibrary = load_op_library(decoding_lib)
        self._owner = next(_owners)
        weakref.finalize(self, self._library.release, self._owner)

    @paddle.jit.not_to_static
    def forward(
        self,
        input_ids: Any = None,
        seq_len: Any = None,
        attention_mask: Any = None,
        top_k: Scalars = None,
        top_p: Scalars = None,
        max_length: Scalars = None,
        min_length: int | None = None,
        bos_token_id: int | None = None,
        eos_token_id: int | None = None,
        pad_token_id: int | None = None,
        forced_bos_token_id: int | None = None,
        forced_eos_token_id: int | None = None,
        temperature: Scalars = None,
        decode_strategy: str | None = None,
        repetition_penalty: float | None = None,
        no_repeat_ngram_size: int | None = None,
        num_return_sequences: int = 1,
        seed: int | Sequence[int] | np.ndarray | paddle.Tensor | None = None,
    ) -> tuple[paddle.Tensor, paddle.Tensor]:
        """Generates. What is None is as the constructor, else as `model.generate` has it.

        Args:
            input_ids: [batch, length], int32 or int64: prompts, padded on the right (or the left,
                with an attention_mask). None: one row of bos_token_id.
            seq_len: [batch], length of each prompt; None: all are full, or as attention_mask says.
            attention_mask: [batch, length] of 0 and 1, the ones of a row side by side and touching
                one of its ends.
            top_k, top_p, max_length, temperature: one value, or [batch] values.
            decode_strategy: "sampling" (or "sample"; the default) or "greedy_search".
            seed: 0 to 2^64 - 1. One for all rows is spread over them by index; [batch] seeds give
                each row the samples that it gets alone; None: drawn, see `last_seed`.

        Returns:
            What `model.generate` returns: ids [batch * num_return_sequences, longest], int64, new
            tokens only, eos and then pad; scores [batch * num_return_sequences, 1], float32.

        Raises:
            ValueError: an option or input is outside what is allowed.
            KeyboardInterrupt: ctrl-C; the object stays usable.
        """
        given: dict[str, Any] = {
            "top_k": top_k,
            "top_p": top_p,
            "max_length": max_length,
            "temperature": temperature,
        }
        per_row = {name: value for name, value in given.items() if _is_vector(value)}
        options = self._options(
            **{name: value for name, value in given.items() if name not in per_row},
            min_length=min_length,
            eos_token_id=eos_token_id,
            pad_token_id=pad_token_id,
            forced_bos_token_id=forced_bos_token_id,
            forced_eos_token_id=forced_eos_token_id,
            decode_strategy=decode_strategy,
            repetition_penalty=repetition_penalty,
            no_repeat_ngram_size=no_repeat_ngram_size,
            num_return_sequences=num_return_sequences,
        )
        if input_ids is None:
            input_ids = np.array([[self._bos(bos_token_id)]], dtype=np.int64)
        if _is_static():
            ids, lengths = _static_prompts(input_ids, seq_len, attention_mask)
        else:
            ids, lengths = _prompts(input_ids, seq_len, attention_mask)
        inputs = {"Input": ids, "StartLength": lengths}
        for name, (op_name, dtype) in _PER_ROW.items():
            if name in per_row:
                inputs[op_name] = _vector(name, per_row[name], dtype)
            else:
                inputs[op_name] = _constant(getattr(options, name), dtype)
        inputs["Seed"], draw_seed = self._seed(seed, options, ids)
        names, weights = self._weights()
        inputs["Weight"] = weights
        attributes = {
            "weight_names": names,
            **self._shape(),
            "decode_strategy": options.decode_strategy,
            "min_length": options.min_length,
            "repetition_penalty": options.repetition_penalty,
            "no_repeat_ngram_size": options.no_repeat_ngram_size,
            "num_return_sequences": options.num_return_sequences,
            "eos_token_id": _or_none(options.eos_token_id),
            "pad_token_id": _or_none(options.pad_token_id),
            "forced_bos_token_id": _or_none(options.forced_bos_token_id),
            "forced_eos_token_id": _or_none(options.forced_eos_token_id),
            "draw_seed": draw_seed,
            "weight_check": self._weight_check,
            # A program outlives this object, its engine lives as long as the program's weights.
            "owner": 0 if _is_static() else self._owner,
            "weight_dtype": self._weight_dtype,
            "cache_dtype": self._cache_dtype,
        }
        ids, scores, _ = self._run(inputs, attributes)
        return ids, scores

    def _options(self, **given: Any) -> GenerationOptions:
        """Checked options: those given, else the constructor's, else those of `model.generate`."""
        for name, value in given.items():
            _check_inside(name, value)
        reference = _ReferenceDefaults(self.model)
        changes = {name: value for name, value in given.items() if value is not None}
        for name in ("eos_token_id", "pad_token_id"):
            if name not in changes and getattr(self._defaults, name) is None:
                changes[name] = reference.token(name)
        for name in ("forced_bos_token_id", "forced_eos_token_id"):
            changes.setdefault(name, reference.token(name))
        changes.setdefault("no_repeat_ngram_size", reference.ngrams())
        changes.setdefault("repetition_penalty", reference.get("repetition_penalty", 1.0))
        if "min_length" not in changes:
            # The second is PaddleNLP's name of it up to 2.7.
            new_tokens = reference.get("min_new_tokens") or reference.get("min_new_token")
            changes["min_length"] = new_tokens or reference.get("min_length", 0)
        options = GenerationOptions.from_kwargs(self._defaults, **changes)
        if options.pad_token_id is None and options.eos_token_id is not None:
            options = GenerationOptions.from_kwargs(options, pad_token_id=options.eos_token_id)
        return options

    def _bos(self, given: int | None) -> int:
        bos = given if given is not None else self._bos_id
        if bos is None:
            bos = _ReferenceDefaults(self.model).get("bos_token_id")
        if bos is None:
            raise InvalidArgumentError(
                "input_ids and bos_token_id are None and the model names no bos_token_id: give one "
                "of them"
            )
        return int(bos)

    def _seed(self, seed: Any, options: GenerationOptions, ids: Any) -> tuple[paddle.Tensor, bool]:
        """Seeds as int64 with the bits of uint64, and whether the op is to draw them itself."""
        if _is_static():
            if seed is None:
                return _constant(0, "int64"), True
            if isinstance(seed, _static_types()):
                return paddle.reshape(paddle.cast(seed, "int64"), [-1]), False
        elif seed is None:
            seed = secrets.randbits(64)
        if isinstance(seed, (paddle.Tensor, np.ndarray)):
            seed = np.asarray(seed)
            seed = seed.item() if seed.ndim == 0 else seed.reshape(-1).tolist()
        checked = GenerationOptions(seed=seed).seed
        one = isinstance(checked, int)
        seeds: list[int] = [checked] if isinstance(checked, int) else list(checked or ())
        if not one and not _is_static() and len(seeds) != ids.shape[0]:
            raise InvalidArgumentError(
                f"seed has {len(seeds)} values: it must be one integer or one for each of the "
                f"{ids.shape[0]} rows"
            )
        if options.decode_strategy == "sampling" and not _is_static():
            self.last_seed = seeds[0] if one else seeds
        bits = np.array(seeds, dtype=np.uint64).view(np.int64)
        return _tensor(bits), False

    def _weights(self) -> tuple[list[str], list[Any]]:
        """Names and parameters; a tied head, being the embedding, appears once."""
        named = list(self.model.named_parameters())
        weights = [parameter for _, parameter in named]
        if _is_static():
            weights = [convert_into_variable(weight) for weight in weights]
        return [name for name, _ in named], weights

    def _shape(self) -> dict[str, Any]:
        config = self.model.config
        return {
            "vocab_size": int(config.vocab_size),
            "max_positions": int(config.max_position_embeddings),
            "hidden_size": int(config.hidden_size),
            "num_layers": int(config.num_hidden_layers),
            "num_heads": int(config.num_attention_heads),
            "intermediate_size": int(config.intermediate_size),
            "layer_norm_eps": float(self.model.gpt.decoder.norm._epsilon),
        }

    def _run(self, inputs: dict[str, Any], attributes: dict[str, Any]) -> Any:
        if paddle.in_dynamic_mode():
            try:
                with paddle.no_grad():
                    return _run_custom_op()(OP_NAME, *inputs.values(), *attributes.values())
            except Exception:
                error = self._library.last_error()
                if error is None:
                    raise
            # Outside of the handler: the sentence alone, without Paddle's wrapping of it.
            raise error
        if _in_pir_mode():
            return _run_custom_op()(OP_NAME, *inputs.values(), *attributes.values())
        helper = LayerHelper(OP_NAME)
        outputs = {
            "OutputIds": helper.create_variable_for_type_inference("int64"),
            "OutputScores": helper.create_variable_for_type_inference("float32"),
            "OutputSeed": helper.create_variable_for_type_inference("int64"),
        }
        helper.append_op(
            type=OP_NAME,
            inputs={
                ("Weight@VECTOR" if name == "Weight" else name): value
                for name, value in inputs.items()
            },
            outputs=outputs,
            attrs=attributes,
        )
        return list(outputs.values())


class _ReferenceDefaults:
    """Options that `model.generate` falls back to: its generation config, else its config."""

    def __init__(self, model: Any) -> None:
        self._config = model.config
        generation = getattr(model, "generation_config", None)
        # Made from the configuration, it follows that one, as PaddleNLP has it.
        self._generation = None if getattr(generation, "_from_model_config", True) else generation

    def get(self, name: str, default: Any = None) -> Any:
        for source in (self._generation, self._config):
            value = getattr(source, name, None)
            if value is not None:
                return value
        return default

    def token(self, name: str) -> Any:
        """A special token; PaddleNLP also takes lists, of which one of a single token is that."""
        value = self.get(name)
        if not isinstance(value, (list, tuple)):
            return value
        if len(value) == 1:
            return value[0]
        raise InvalidArgumentError(
            f"the model's {name} is {list(value)}: fastgen takes one token, give {name}"
        )

    def ngrams(self) -> Any:
        """no_repeat_ngram_size, for which PaddleNLP looks in one place only."""
        source = self._config if self._generation is None else self._generation
        return getattr(source, "no_repeat_ngram_size", None)


def _check_model(model: Any) -> None:
    from paddlenlp.transformers import GPTLMHeadModel

    if not isinstance(model, GPTLMHeadModel):
        raise InvalidArgumentError(
            f"model is a {type(model).__name__}: it must be a paddlenlp.transformers.GPTLMHeadModel"
        )
    config = model.config
    if config.hidden_activation != "gelu":
        raise InvalidArgumentError(
            f"the model's hidden_activation is {config.hidden_activation!r}: it must be 'gelu'"
        )
    if not config.normalize_before:
        raise InvalidArgumentError(
            "the model's normalize_before is false: it must be true, as the engine runs pre-norm "
            "blocks"
        )
    if config.scale_qk_coeff != 1.0:
        raise InvalidArgumentError(
            f"the model's scale_qk_coeff is {config.scale_qk_coeff}: it must be 1"
        )
    if config.tensor_parallel_degree > 1:
        raise InvalidArgumentError(
            f"the model's tensor_parallel_degree is {config.tensor_parallel_degree}: it must be 1"
        )


def _weight_dtype(weight_dtype: str | None, use_fp16_decoding: bool) -> str:
    """What the op is told; "auto": it decides by the weights, wherever a program is run."""
    if use_fp16_decoding:
        if weight_dtype not in (None, "float16"):
            raise InvalidArgumentError(
                f"use_fp16_decoding is True and weight_dtype is {weight_dtype!r}: only one of them "
                "may be given"
            )
        return "float16"
    if weight_dtype is None:
        return "auto"
    if weight_dtype not in _DTYPES:
        raise InvalidArgumentError(
            f"weight_dtype is {weight_dtype!r}: it must be one of {', '.join(_DTYPES)}, or None"
        )
    return weight_dtype


def _prompts(input_ids: Any, seq_len: Any, attention_mask: Any) -> tuple[Any, Any]:
    """Prompts padded on the right and their lengths, of what forward() was given."""
    ids = input_ids if isinstance(input_ids, paddle.Tensor) else np.asarray(input_ids)
    if _dtype(ids) not in ("int32", "int64"):
        raise InvalidArgumentError(f"input_ids is {_dtype(ids)}: it must be int32 or int64")
    if len(ids.shape) != 2 or 0 in ids.shape:
        raise InvalidArgumentError(
            f"input_ids has shape {list(ids.shape)}: it must be [batch, length] with at least one "
            "row and one token"
        )
    batch, length = ids.shape
    lengths: np.ndarray | None = None
    if seq_len is not None:
        lengths = np.asarray(seq_len).reshape(-1)
        if lengths.dtype.kind not in "iu" or lengths.shape != (batch,):
            raise InvalidArgumentError(
                f"seq_len is {lengths.dtype} of shape {list(np.shape(seq_len))}: it must be "
                f"integers, one for each of the {batch} rows"
            )
    if attention_mask is not None:
        begins, masked = _mask_ranges(attention_mask, batch, length)
        if lengths is not None and not np.array_equal(lengths, masked):
            raise InvalidArgumentError(
                f"seq_len is {lengths.tolist()} and attention_mask says {masked.tolist()}: they "
                "must agree, or one must be left out"
            )
        lengths = masked
        if begins.any():
            rows = np.asarray(ids)
            columns = (np.arange(length)[None, :] + begins[:, None]) % length
            ids = np.take_along_axis(rows, columns, axis=1)
    if lengths is None:
        lengths = np.full([batch], length)
    return _tensor(ids), _tensor(lengths.astype(np.int64))


def _mask_ranges(attention_mask: Any, batch: int, length: int) -> tuple[np.ndarray, np.ndarray]:
    """Begin and length [batch] of each row's ones."""
    mask = np.asarray(attention_mask)
    shape = list(mask.shape)
    if mask.ndim == 4 and mask.shape[1:3] == (1, 1):
        mask = mask[:, 0, 0, :]
    if mask.shape != (batch, length):
        raise InvalidArgumentError(
            f"attention_mask has shape {shape}: it must be that of input_ids, [{batch}, {length}]"
        )
    if not np.isin(mask, (0, 1)).all():
        raise InvalidArgumentError(
            "attention_mask has values other than 0 and 1: it must be 1 for a prompt's tokens and "
            "0 for padding"
        )
    ones = mask.astype(bool)
    begins = ones.argmax(axis=1)
    lengths = ones.sum(axis=1)
    columns = np.arange(length)[None, :]
    solid = (columns >= begins[:, None]) & (columns < (begins + lengths)[:, None])
    touching = (begins == 0) | (begins + lengths == length)
    for row in np.flatnonzero((ones != solid).any(axis=1) | ~touching | (lengths == 0)):
        raise InvalidArgumentError(
            f"attention_mask[{row}] is not that of a prompt padded on one side: its ones must be "
            "side by side and touch one end of the row"
        )
    return begins, lengths


def _is_vector(value: Any) -> bool:
    """Whether an option is given as a tensor or a list, of one value or one for each row."""
    if isinstance(value, (list, tuple, np.ndarray)):
        return True
    return isinstance(value, _static_types() if _is_static() else paddle.Tensor)


def _vector(name: str, value: Any, dtype: str) -> Any:
    if _is_static() and isinstance(value, _static_types()):
        return paddle.reshape(paddle.cast(value, dtype), [-1])
    values = np.asarray(value).reshape(-1)
    for item in values.tolist():
        # For its check: a sentence that names the option, the value and the limit.
        GenerationOptions(**{name: item})
    return _tensor(values.astype(dtype))


def _check_inside(name: str, value: Any) -> None:
    """That a program is not given a tensor with data: it could be neither an input nor read."""
    if _is_static() and isinstance(value, paddle.Tensor) and not isinstance(value, _static_types()):
        raise InvalidArgumentError(
            f"{name} is a tensor from outside of the program: give a number, a list, an array or "
            "an input of the program"
        )


def _constant(value: Any, dtype: str) -> Any:
    if _is_static():
        return paddle.full([1], value, dtype=dtype)
    return _tensor(np.array([value], dtype=dtype))


def _tensor(value: Any) -> Any:
    """`value` as a tensor, on the CPU unless it is one already."""
    if isinstance(value, (paddle.Tensor, *_static_types())):
        return value
    array = np.ascontiguousarray(value)
    if _is_static():
        return paddle.assign(array)
    # Not paddle.to_tensor: that of Paddle 3.3 leaks 100 bytes each time it is given an array.
    tensor = paddle.empty(array.shape, str(array.dtype))
    tensor.get_tensor().set(array, paddle.CPUPlace())
    return tensor


def _dtype(tensor: Any) -> str:
    return str(tensor.dtype).rsplit(".", 1)[-1]


def _or_none(token: int | None) -> int:
    """A token id as the op has it: -1 is none."""
    return -1 if token is None else int(token)


# ---- Programs: FasterGPT inside paddle.jit.to_static ------------------------------------------


def _in_pir_mode() -> bool:
    check = getattr(paddle.framework, "in_pir_mode", None)
    return bool(check is not None and check())


def _is_static() -> bool:
    return not paddle.in_dynamic_mode()


def _static_types() -> tuple[type, ...]:
    types: list[type] = [paddle.static.Variable]
    pir = getattr(paddle, "pir", None)
    if pir is not None and hasattr(pir, "Value"):
        types.append(pir.Value)
    return tuple(types)


def _static_prompts(input_ids: Any, seq_len: Any, attention_mask: Any) -> tuple[Any, Any]:
    if attention_mask is not None:
        raise InvalidArgumentError(
            "attention_mask is given inside a program: there it must be None, give seq_len"
        )
    ids = _tensor(input_ids)
    _check_inside("seq_len", seq_len)
    if seq_len is not None:
        return ids, paddle.reshape(paddle.cast(_tensor(seq_len), "int64"), [-1])
    length = paddle.shape(ids)[1:2]
    return ids, paddle.cast(length, "int64")


def _run_custom_op() -> Any:
    # Paddle 3 has it in _C_ops, Paddle 2 in the core.
    run = getattr(paddle._C_ops, "_run_custom_op", None)
    return run if run is not None else core.eager._run_custom_op
