"""Model directories of HuggingFace and of PaddleNLP, read into one form, and written in it.

That form is HuggingFace's: its configuration, and its names without `transformer.`. Linear weights
are `[in, out]` in both worlds, so only names differ, and q, k and v lie in one matrix (`c_attn`,
`[hidden, 3 * hidden]`: q, then k, then v).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from fastgen import _config, _export, _quantize
from fastgen._json import read_json
from fastgen._safetensors import (
    Tensors,
    is_buffer,
    read_safetensors,
    write_safetensors,
)
from fastgen.errors import (
    InvalidArgumentError,
    ModelFileError,
    NotFoundError,
    UnsupportedError,
)
from fastgen.tokenizer import TOKENIZER_FILES

#: Of PaddleNLP's code: its layers ignore `layer_norm_eps` of the configuration.
PADDLENLP_EPS = 1e-5
_HEAD_NAMES = ("lm_head.weight", "lm_head.decoder_weight", "lm_head.decoder.weight")

#: HuggingFace name within a layer -> PaddleNLP's.
LAYER_NAMES = {
    "ln_1": "norm1",
    "attn.c_proj": "self_attn.out_proj",
    "ln_2": "norm2",
    "mlp.c_fc": "linear1",
    "mlp.c_proj": "linear2",
}
#: HuggingFace name outside the layers -> PaddleNLP's.
END_NAMES = {
    "wte.weight": "embeddings.word_embeddings.weight",
    "wpe.weight": "embeddings.position_embeddings.weight",
    "ln_f.weight": "decoder.norm.weight",
    "ln_f.bias": "decoder.norm.bias",
}


# ---- Reading -----------------------------------------------------------------------------------


@contextlib.contextmanager
def _quiet_imports() -> Iterator[None]:
    """Without the deprecation warnings of what Paddle and PaddleNLP import."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def import_paddle() -> Any:
    """The `paddle` module.

    Raises:
        UnsupportedError: it is not installed.
    """
    import zlib  # noqa: F401  (before Paddle, whose bundled zlib breaks a later import)

    try:
        with _quiet_imports():
            import paddle
    except ImportError as error:
        raise UnsupportedError(
            f"this needs PaddlePaddle, which cannot be imported ({error}): install it with "
            "pip install 'fastgen[paddle]'"
        ) from error
    return paddle


def import_paddlenlp() -> Any:
    """The module `paddlenlp.transformers`.

    Raises:
        UnsupportedError: it is not installed, or broken.
    """
    import_paddle()
    try:
        with _quiet_imports():
            import paddlenlp.transformers
    except ImportError as error:
        raise UnsupportedError(
            f"this needs PaddleNLP, which cannot be imported ({error}): install it with "
            "pip install 'fastgen[paddle]'"
        ) from error
    return paddlenlp.transformers


def is_paddlenlp_directory(directory: Path) -> bool:
    """Whether a directory holds a checkpoint of PaddleNLP that has not been converted."""
    if any(directory.glob("model_state*.pdparams*")):
        return True
    if not (directory / "config.json").is_file():
        return (directory / "model_config.json").is_file()
    try:
        return read_json(directory / "config.json").get("model_type") == "gpt"
    except ModelFileError:
        return False


def load_directory(directory: Path) -> tuple[dict[str, Any], Tensors]:
    """Configuration and tensors of a model directory (HuggingFace's, PaddleNLP's or an export) in
    HuggingFace's form (names without `transformer.`).

    Raises:
        NotFoundError: the directory or one of its files is not there.
        ModelFileError: a file is not what it should be.
    """
    if not directory.is_dir():
        raise NotFoundError(f"{directory} is not a directory")
    if _export.is_export(directory):
        config, arrays = _export.read_tensors(directory)
        state = {name: to_numpy(array) for name, array in arrays.items()}
        return huggingface_form(config, state, str(directory))
    if is_paddlenlp_directory(directory):
        config = _paddlenlp_config(directory)
        return huggingface_form(config, _read_paddlenlp_weights(directory), str(directory))
    config = read_json(directory / "config.json")
    if config.get("model_type", "gpt2") != "gpt2":
        raise ModelFileError(
            f"{directory / 'config.json'}: model_type is {config['model_type']!r}: it must be "
            "'gpt2', or 'gpt' for a checkpoint of PaddleNLP"
        )
    stored = _quantize.stored_weight_dtype(config, directory / "config.json")
    if stored in ("int8", "int4"):
        raise ModelFileError(
            f"{directory} has weights that were rounded to {stored}, which only the engine reads: "
            "use the model that it was converted from"
        )
    config = _config.complete(config, str(directory / "config.json"))
    weights = _read_weights(directory, ("model.safetensors",))
    if weights is None:
        raise NotFoundError(
            f"{directory} has neither model.safetensors nor model.safetensors.index.json"
        )
    tensors = {
        name[len("transformer.") :] if name.startswith("transformer.") else name: array
        for name, array in weights.items()
        if not is_buffer(name)
    }
    _check_tensors(config, tensors, str(directory))
    return config, tensors


def tensor_shapes(config: Mapping[str, Any]) -> dict[str, tuple[int, ...]]:
    """Shapes of the tensors that a configuration asks for, by HuggingFace's names."""
    hidden, vocab = config["n_embd"], config["vocab_size"]
    inner = config.get("n_inner") or 4 * hidden
    shapes: dict[str, tuple[int, ...]] = {
        "wte.weight": (vocab, hidden),
        "wpe.weight": (config["n_positions"], hidden),
        "ln_f.weight": (hidden,),
        "ln_f.bias": (hidden,),
    }
    for i in range(config["n_layer"]):
        for name, rows, columns in (
            ("attn.c_attn", hidden, 3 * hidden),
            ("attn.c_proj", hidden, hidden),
            ("mlp.c_fc", hidden, inner),
            ("mlp.c_proj", inner, hidden),
        ):
            shapes[f"h.{i}.{name}.weight"] = (rows, columns)
            shapes[f"h.{i}.{name}.bias"] = (columns,)
        for name in ("ln_1", "ln_2"):
            shapes[f"h.{i}.{name}.weight"] = shapes[f"h.{i}.{name}.bias"] = (hidden,)
    return shapes


def _check_tensors(config: Mapping[str, Any], tensors: Tensors, where: str) -> None:
    """That the tensors of HuggingFace's names are there, of the sizes of the configuration."""
    for name, shape in tensor_shapes(config).items():
        if name not in tensors:
            raise ModelFileError(f"{where}: tensor {name} is missing")
        if tensors[name].shape != shape:
            raise ModelFileError(
                f"{where}: tensor {name} has shape {list(tensors[name].shape)}: the configuration "
                f"asks for {list(shape)}"
            )
    _config.check_head(config, tensors, where)


def _paddlenlp_config(directory: Path) -> dict[str, Any]:
    path = directory / "config.json"
    if not path.is_file():
        path = directory / "model_config.json"
    if not path.is_file():
        raise NotFoundError(
            f"{directory} has neither config.json nor model_config.json, one of which a checkpoint "
            "of PaddleNLP needs"
        )
    config = _find_sizes(read_json(path))
    if config is None:
        raise ModelFileError(f"{path} gives no vocab_size: it is not the configuration of a GPT")
    return config


def _find_sizes(value: Any) -> dict[str, Any] | None:
    """Old configurations nest: `{"init_args": [{"init_class": "GPTModel", "vocab_size": ...}]}`."""
    if isinstance(value, dict):
        if "vocab_size" in value:
            return value
        value = list(value.values())
    if isinstance(value, list):
        for member in value:
            found = _find_sizes(member)
            if found is not None:
                return found
    return None


def _read_paddlenlp_weights(directory: Path) -> Tensors:
    tensors = _read_weights(directory, ("model_state.pdparams", "model.safetensors"))
    if tensors is None:
        raise NotFoundError(
            f"{directory} has neither model_state.pdparams nor model.safetensors, one of which "
            "holds the weights"
        )
    return tensors


def _read_weights(directory: Path, names: Sequence[str]) -> Tensors | None:
    """The tensors of the first of these files that is there, whole or as parts with an index."""
    for name in names:
        index = directory / f"{name}.index.json"
        # As the library has it: of both, the whole file.
        if (directory / name).is_file():
            files = [name]
        elif index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise ModelFileError(f"{index} has no weight_map")
            files = sorted({str(file) for file in weight_map.values()})
            for file in files:
                if Path(file).name != file:
                    raise ModelFileError(f"{index} names {file!r}, which is not in its directory")
        else:
            continue
        tensors: Tensors = {}
        for file in files:
            path = directory / file
            is_pickle = path.suffix == ".pdparams"
            tensors.update(_read_pdparams(path) if is_pickle else read_safetensors(path))
        return tensors
    return None


def _read_pdparams(path: Path) -> Tensors:
    paddle = import_paddle()
    if not path.is_file():
        raise NotFoundError(f"{path} is not there")
    try:
        state = paddle.load(str(path))
    except Exception as error:  # whatever the pickle raises
        raise ModelFileError(f"{path} cannot be loaded by paddle.load: {error}") from error
    if not isinstance(state, dict):
        raise ModelFileError(f"{path} holds a {type(state).__name__}, not a dictionary of tensors")
    names = [name for name in state if name != "StructuredToParameterName@@"]
    # One tensor at a time leaves the source, so that memory does not hold the model twice.
    return {name: to_numpy(state.pop(name)) for name in names}


def to_numpy(value: Any) -> np.ndarray:
    """float16 stays, everything else becomes float32 (NumPy has no bfloat16)."""
    if not isinstance(value, np.ndarray):
        if "bfloat16" in str(value.dtype):
            value = value.astype("float32")
        value = value.numpy()
    if value.dtype == np.uint16:  # bfloat16 as Paddle saves it in NumPy form
        value = (value.astype("<u4") << np.uint32(16)).view(np.float32)
    if value.dtype not in (np.float16, np.float32):
        value = value.astype(np.float32)
    return np.ascontiguousarray(value)


# ---- Names and layouts -------------------------------------------------------------------------


def _first(config: Mapping[str, Any], where: str, *names: str) -> int:
    for name in names:
        if config.get(name) is not None:
            value = config[name]
            if isinstance(value, bool) or not isinstance(value, int) or value <= 0:
                raise ModelFileError(f"{where}: {name} is {value!r}: it must be a positive integer")
            return value
    raise ModelFileError(f"{where}: the configuration gives no {names[0]}")


def _huggingface_config(config: Mapping[str, Any], where: str) -> dict[str, Any]:
    """HuggingFace's GPT-2 configuration for one of PaddleNLP's."""
    activation = config.get("hidden_activation", config.get("hidden_act", "gelu"))
    if activation != "gelu":
        raise ModelFileError(f"{where}: hidden_activation is {activation!r}: it must be 'gelu'")
    if not config.get("normalize_before", True):
        raise ModelFileError(f"{where}: normalize_before is false: the engine runs pre-norm blocks")
    if config.get("scale_qk_coeff", 1.0) != 1.0:
        raise ModelFileError(f"{where}: scale_qk_coeff is {config['scale_qk_coeff']}: it must be 1")
    hidden = _first(config, where, "hidden_size", "n_embd")
    heads = _first(config, where, "num_attention_heads", "n_head")
    if hidden % heads:
        raise ModelFileError(
            f"{where}: hidden_size is {hidden}: it must be a multiple of num_attention_heads, "
            f"{heads}"
        )
    positions = _first(config, where, "max_position_embeddings", "n_positions")
    result: dict[str, Any] = {
        "model_type": "gpt2",
        "architectures": ["GPT2LMHeadModel"],
        "vocab_size": _first(config, where, "vocab_size"),
        "n_positions": positions,
        "n_ctx": positions,
        "n_embd": hidden,
        "n_layer": _first(config, where, "num_hidden_layers", "n_layer"),
        "n_head": heads,
        "n_inner": _first(config, where, "intermediate_size", "n_inner"),
        "activation_function": "gelu_new",
        "layer_norm_epsilon": config.get("_layer_norm_eps", PADDLENLP_EPS),
        "initializer_range": config.get("initializer_range", 0.02),
        "tie_word_embeddings": True,
    }
    # PaddleNLP's own defaults where the file is silent.
    for name, default in (("bos_token_id", 0), ("eos_token_id", 7), ("pad_token_id", 0)):
        result[name] = config.get(name, default)
    return result


def huggingface_form(
    config: Mapping[str, Any], state: Mapping[str, np.ndarray], where: str
) -> tuple[dict[str, Any], Tensors]:
    """PaddleNLP's configuration and tensors in HuggingFace's form; checks names and shapes."""
    result = _huggingface_config(config, where)
    hidden, heads, inner = result["n_embd"], result["n_head"], result["n_inner"]
    rest = {name[4:] if name.startswith("gpt.") else name: array for name, array in state.items()}

    def take(name: str, *shape: int) -> np.ndarray:
        array = rest.pop(name, None)
        if array is None:
            raise ModelFileError(f"{where}: tensor {name} is missing")
        if array.shape != shape:
            raise ModelFileError(
                f"{where}: tensor {name} has shape {list(array.shape)}: the configuration asks for "
                f"{list(shape)}"
            )
        return array

    tensors: Tensors = {
        "wte.weight": take(END_NAMES["wte.weight"], result["vocab_size"], hidden),
        "wpe.weight": take(END_NAMES["wpe.weight"], result["n_positions"], hidden),
        "ln_f.weight": take(END_NAMES["ln_f.weight"], hidden),
        "ln_f.bias": take(END_NAMES["ln_f.bias"], hidden),
    }
    widths = {
        "ln_1": None,
        "attn.c_proj": (hidden, hidden),
        "ln_2": None,
        "mlp.c_fc": (hidden, inner),
        "mlp.c_proj": (inner, hidden),
    }
    for i in range(result["n_layer"]):
        ours, theirs = f"h.{i}", f"decoder.layers.{i}"
        for name, shape in widths.items():
            source = f"{theirs}.{LAYER_NAMES[name]}"
            tensors[f"{ours}.{name}.weight"] = take(f"{source}.weight", *(shape or (hidden,)))
            tensors[f"{ours}.{name}.bias"] = take(f"{source}.bias", shape[1] if shape else hidden)
        fused = f"{theirs}.self_attn.qkv_proj"
        for kind, rows in (("weight", (hidden,)), ("bias", ())):
            if f"{fused}.{kind}" in rest:
                # The columns go head by head, each with its q, k and v.
                array = take(f"{fused}.{kind}", *rows, 3 * hidden)
                array = array.reshape(*rows, heads, 3, hidden // heads)
                array = np.moveaxis(array, -2, -3).reshape(*rows, 3 * hidden)
            else:
                parts = [
                    take(f"{theirs}.self_attn.{part}_proj.{kind}", *rows, hidden) for part in "qkv"
                ]
                array = np.concatenate(parts, axis=-1)
            tensors[f"{ours}.attn.c_attn.{kind}"] = np.ascontiguousarray(array)
    for name in _HEAD_NAMES:
        if name in rest:
            head = take(name, result["vocab_size"], hidden)
            if not np.array_equal(head, tensors["wte.weight"]):
                tensors["lm_head.weight"] = head
                result["tie_word_embeddings"] = False
    if rest:
        raise ModelFileError(
            f"{where}: tensor {sorted(rest)[0]} is not one of a GPT language model"
        )
    result["torch_dtype"] = str(tensors["wte.weight"].dtype)
    return result, tensors


# ---- Writing -----------------------------------------------------------------------------------


def write_directory(
    destination: Path,
    config: Mapping[str, Any],
    tensors: Mapping[str, np.ndarray],
    tokenizer_source: Path | None,
    *,
    weight_dtype: str | None = None,
    force: bool = False,
    progress: Callable[[int, int], None] | None = None,
) -> None:
    """Writes a model directory aside and renames it, so that it is there whole or not at all.

    Args:
        weight_dtype: type of the matrices, see :func:`fastgen.convert.convert`; None: every tensor
            as it is.
        progress: called with tensors written and tensors in all.

    Raises:
        InvalidArgumentError: `destination` exists, and `force` is off or it is not a model.
        OSError: it cannot be written.
    """
    config = {name: value for name, value in config.items() if name != _quantize.KEY}
    if weight_dtype is not None:
        scheme = _quantize.scheme(weight_dtype)
        if scheme is not None:
            config[_quantize.KEY] = scheme
        if weight_dtype.endswith(("float16", "float32")):
            config["torch_dtype"] = weight_dtype
    with new_directory(destination, force) as new:
        text = json.dumps(config, indent=2, sort_keys=True) + "\n"
        (new / "config.json").write_text(text, encoding="utf-8")
        sources = _quantize.sources(tensors, weight_dtype)
        write_safetensors(new / "model.safetensors", sources, progress)
        for name in TOKENIZER_FILES:
            if tokenizer_source is not None and (tokenizer_source / name).is_file():
                shutil.copyfile(tokenizer_source / name, new / name)


@contextlib.contextmanager
def new_directory(
    destination: Path, force: bool, marker: str = "config.json", kind: str = "a model directory"
) -> Iterator[Path]:
    """A folder to fill, which becomes `destination` when the block ends without an exception.

    The arguments, and what is raised, are those of :func:`check_destination`; OSError where nothing
    can be written.
    """
    check_destination(destination, force, marker, kind)
    try:
        destination.parent.mkdir(parents=True, exist_ok=True)
        aside = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    except OSError as error:
        raise type(error)(f"{destination} cannot be written: {error.strerror}") from error
    new, old = aside / "new", aside / "old"
    try:
        new.mkdir()
        yield new
        check_destination(destination, force, marker, kind)  # it may have come meanwhile
        try:
            if os.path.lexists(destination):
                destination.rename(old)
            new.rename(destination)
        except BaseException:  # Ctrl-C too: one of both has to be there
            if os.path.lexists(new) and os.path.lexists(old):
                _put_back(old, destination)
            raise
    finally:
        # What could not be put back is all that is left of it.
        if not (os.path.lexists(new) and os.path.lexists(old)):
            shutil.rmtree(aside, ignore_errors=True)


def _put_back(old: Path, destination: Path) -> None:
    try:
        old.rename(destination)
    except OSError as error:
        raise type(error)(
            f"{destination} cannot be replaced: {error.strerror}; what it held is in {old}"
        ) from error


def check_destination(
    destination: Path, force: bool, marker: str = "config.json", kind: str = "a model directory"
) -> None:
    """Raises InvalidArgumentError unless `destination` may be written.

    Args:
        force: it may be replaced if it is empty, or has the file `marker`, weights and no folders.
        kind: what that makes it, for the message.
    """
    if not os.path.lexists(destination):
        return
    if not force:
        raise InvalidArgumentError(f"{destination} exists: give --force to replace it")
    entries = sorted(destination.iterdir()) if destination.is_dir() else []
    if destination.is_dir() and not entries:
        return
    weights = (".safetensors", ".safetensors.index.json", ".pdparams", ".pdiparams")
    is_ours = (destination / marker).is_file() and any(e.name.endswith(weights) for e in entries)
    if not is_ours:
        raise InvalidArgumentError(f"{destination} is not {kind}, so --force does not replace it")
    for entry in entries:
        if entry.is_dir():
            raise InvalidArgumentError(
                f"{destination} has a folder, {entry.name}, which {kind} has not, so --force does "
                "not replace it"
            )
