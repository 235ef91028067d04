"""The Paddle program of an export: `FasterGPT` through `paddle.jit.save`."""

from __future__ import annotations

import contextlib
import zlib  # noqa: F401  Paddle's bundled zlib breaks later imports unless Python's comes first.
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import paddle

from fastgen._export import PARAMETERS, scan_records, stored_array
from fastgen.errors import ModelFileError, UnsupportedError
from fastgen.faster_gpt import FasterGPT
from fastgen.options import GenerationOptions

__all__ = ["INPUTS", "RUNTIME_INPUTS", "program_file", "save_program"]

#: Feeds of every program: name, type and shape.
INPUTS = (("input_ids", "int64", (None, None)), ("seq_len", "int32", (None,)))
#: Those of a program whose options are given at run time, one value for each row.
RUNTIME_INPUTS = (
    ("top_k", "int32", (None,)),
    ("top_p", "float32", (None,)),
    ("temperature", "float32", (None,)),
    ("seed", "int64", (None,)),
    ("max_length", "int32", (None,)),
)


class _FixedOptions(paddle.nn.Layer):
    """The decoder with its options inside."""

    def __init__(self, gpt: FasterGPT, arguments: dict[str, Any]) -> None:
        super().__init__()
        self.gpt = gpt
        self._arguments = arguments
        # Of each parameter its number, under its name. Made here, where Paddle computes at once.
        self._numbered = [value.name for value in super().to_static_state_dict().values()]
        self._numbers = {}
        for number, name in enumerate(self._numbered):
            self._numbers[name] = paddle.full([1], number, dtype="float32")
            self._numbers[name].name = name

    def to_static_state_dict(self, *arguments: Any, **options: Any) -> dict[str, Any]:
        """What `paddle.jit.save` writes as parameters: their numbers.

        Paddle makes two copies of all that it writes. So it is given no tensors, and the numbers in
        its file tell where which tensor belongs.
        """
        state = super().to_static_state_dict(*arguments, **options)
        return {key: self._numbers[value.name] for key, value in state.items()}

    def saved_names(self, parameters: Path) -> list[str]:
        """Paddle's names of the parameters, in the order of the file that it wrote.

        Raises:
            ModelFileError: the file is not one of numbers.
        """
        data = np.fromfile(parameters, dtype=np.uint8)
        numbers = [stored_array(data, record) for record in scan_records(parameters)]
        if any(
            number.shape != (1,) or not 0 <= number[0] < len(self._numbered) for number in numbers
        ):
            raise ModelFileError(
                f"{parameters} does not hold what Paddle was given to save: release "
                f"{paddle.__version__} of Paddle saves in a way that is not known"
            )
        return [self._numbered[int(number[0])] for number in numbers]

    def forward(self, input_ids: Any, seq_len: Any) -> Any:
        return self.gpt(input_ids, seq_len=seq_len, **self._arguments)


class _RuntimeOptions(_FixedOptions):
    """The decoder with the options of sampling and length as inputs."""

    def forward(  # type: ignore[override]
        self,
        input_ids: Any,
        seq_len: Any,
        top_k: Any,
        top_p: Any,
        temperature: Any,
        seed: Any,
        max_length: Any,
    ) -> Any:
        arguments = dict(self._arguments)
        arguments.update(
            top_k=top_k, top_p=top_p, temperature=temperature, seed=seed, max_length=max_length
        )
        return self.gpt(input_ids, seq_len=seq_len, **arguments)


def _saves_pir() -> bool:
    """Whether this release saves programs as PIR (`.json`), not as ProgramDesc (`.pdmodel`)."""
    use_pir = getattr(paddle.framework, "use_pir_api", None)
    return bool(use_pir is not None and use_pir())


def program_file(program_format: str | None) -> str:
    """File name of a saved program.

    Args:
        program_format: "pdmodel", "json" or None for what this release saves.

    Raises:
        UnsupportedError: this release cannot save that form.
    """
    native = "json" if _saves_pir() else "pdmodel"
    wanted = program_format or native
    if wanted == "json" and native != "json":
        raise UnsupportedError(
            f"program_format is 'json': Paddle {paddle.__version__} saves 'pdmodel' only"
        )
    return f"gpt.{wanted}"


@contextlib.contextmanager
def _saving(name: str) -> Iterator[None]:
    if name == "gpt.pdmodel" and _saves_pir():
        with paddle.pir_utils.OldIrGuard():
            yield
    else:
        yield


def save_program(
    model: Any,
    options: GenerationOptions,
    folder: Path,
    *,
    runtime_options: bool,
    program_format: str | None,
    decoding_lib: str | None,
) -> tuple[str, list[str]]:
    """Saves the program of a PaddleNLP GPT as `folder`/gpt.*, without its parameters: what stands
    in gpt.pdiparams is to be replaced by them.

    Returns:
        File name of the program, and Paddle's names of the parameters in the order in which the
        program loads them.
    """
    name = program_file(program_format)
    gpt = FasterGPT(model, decoding_lib=decoding_lib)
    arguments: dict[str, Any] = {
        field: getattr(options, field)
        for field in (
            "decode_strategy", "max_length", "min_length", "top_k", "top_p", "temperature",
            "repetition_penalty", "no_repeat_ngram_size", "num_return_sequences", "eos_token_id",
            "pad_token_id", "forced_bos_token_id", "forced_eos_token_id", "seed",
        )
    }  # fmt: skip
    inputs = INPUTS + RUNTIME_INPUTS if runtime_options else INPUTS
    layer = (_RuntimeOptions if runtime_options else _FixedOptions)(gpt, arguments)
    layer.eval()
    with _saving(name):
        specs = [paddle.static.InputSpec(list(shape), dtype, feed) for feed, dtype, shape in inputs]
        program = paddle.jit.to_static(layer, input_spec=specs, full_graph=True)
        paddle.jit.save(program, str(folder / "gpt"))
    return name, layer.saved_names(folder / PARAMETERS)
