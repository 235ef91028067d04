"""The Paddle op library: found, or built against the running Paddle on first use, and registered.

Paddle's C++ interface belongs to one build of Paddle, so the op `fusion_gpt` is compiled where it
is used. That takes a C++17 compiler and some seconds, once: the result is kept in
`$FASTGEN_CACHE/op` (or `~/.cache/fastgen/op`) under a key of everything it depends on.
"""

from __future__ import annotations

import ctypes
import fcntl
import hashlib
import mmap
import os
import shlex
import shutil
import struct
import subprocess
import sys
import tempfile
import threading
import time
import zlib  # noqa: F401  Paddle's bundled zlib breaks later imports unless Python's comes first.
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from operator import itemgetter
from pathlib import Path
from typing import IO, Any

import paddle
from tqdm import tqdm

from fastgen import _capi
from fastgen._paddle_compat import OpProtoHolder, core, core_library
from fastgen.errors import InternalError, LibraryError, NotFoundError

__all__ = [
    "OP_NAME",
    "OpLibrary",
    "PaddleBuild",
    "build_op_library",
    "find_compiler",
    "load_op_library",
    "read_build_info",
    "running_paddle",
]

OP_NAME = "fusion_gpt"
LIBRARY_NAME = "libdecoding_op.so"

_SOURCES = ("fusion_gpt.cc", "engine_cache.cc", "gpu_stream.cc", "python_interpreter.cc")
# The same for every build of Paddle: without PADDLE_WITH_CUDA its headers ask for none of CUDA's,
# see csrc/paddle/gpu_stream.h.
_FLAGS = ("-std=c++17", "-O2", "-fPIC", "-shared", "-fvisibility=hidden", "-w")
_BUILD_INFO_MARKER = b"fastgen-op-build-info:"
# Elf64_Ehdr (entry, program headers at, section headers at, flags, own size, size and count of
# program headers, the same of section headers, index of names) and Elf64_Phdr.
_ELF_HEADER = struct.Struct("<16sHHIQQQIHHHHHH")
_ELF_SEGMENT = struct.Struct("<IIQQQQQQ")


@dataclass(frozen=True)
class PaddleBuild:
    """What binds an op library to one build of Paddle."""

    version: str
    commit: str
    cuda: str
    cxx11_abi: str

    @property
    def definition(self) -> str:
        """Value of the macro FASTGEN_PADDLE_BUILD."""
        return f"paddle={self.version};commit={self.commit};cuda={self.cuda}"

    def __str__(self) -> str:
        return (
            f"Paddle {self.version} (commit {self.commit[:12]}, CUDA {self.cuda}, "
            f"C++11 ABI {self.cxx11_abi})"
        )


def running_paddle() -> PaddleBuild:
    """The Paddle of this process."""
    return PaddleBuild(
        version=str(paddle.version.full_version),
        commit=str(paddle.version.commit),
        cuda=str(paddle.version.cuda()),
        cxx11_abi=_cxx11_abi(),
    )


def _cxx11_abi() -> str:
    """Which std::string Paddle was built with: "1" is the one of C++11."""
    libraries = Path(paddle.sysconfig.get_lib())
    whole = core_library()
    candidates = [path for path in (libraries / "libcommon.so", whole) if path.is_file()]
    if not candidates:
        raise LibraryError(f"Paddle's libraries were not found in {libraries} nor at {whole}")
    with _mapped(candidates[0]) as data:
        return "1" if data.find(b"__cxx1112basic_string") >= 0 else "0"


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as data:
        yield data


def read_build_info(path: str | os.PathLike[str]) -> PaddleBuild:
    """What an op library was built for, read from the file without loading it.

    Raises:
        FileNotFoundError: there is no such file.
        LibraryError: it is not a fastgen op library.
    """
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"the op library {path} does not exist")
    foreign = LibraryError(
        f"{path} is not a fastgen op library: build one with fastgen's sources, or leave "
        "decoding_lib out to have it built"
    )
    if path.stat().st_size < _ELF_HEADER.size:
        raise foreign
    with _mapped(path) as data:
        begin = data.find(_BUILD_INFO_MARKER)
        if data[:6] != b"\x7fELF\x02\x01" or begin < 0:
            raise foreign
        if _elf_size(data) > len(data):
            raise LibraryError(
                f"the op library {path} is truncated: it has {len(data)} bytes of {_elf_size(data)}"
            )
        text = data[begin + len(_BUILD_INFO_MARKER) : begin + 4096].split(b"\0", 1)[0]
    fields = dict(
        item.split("=", 1) for item in text.decode("utf-8", "replace").split(";") if "=" in item
    )
    try:
        return PaddleBuild(fields["paddle"], fields["commit"], fields["cuda"], fields["cxx11_abi"])
    except KeyError:
        raise foreign from None


def _elf_size(data: mmap.mmap) -> int:
    """Bytes that an ELF file has by its headers: loading a shorter one kills the process."""
    fields = _ELF_HEADER.unpack_from(data)
    table, sections, entry, count, section, section_count = itemgetter(5, 6, 9, 10, 11, 12)(fields)
    end = max(table + entry * count, sections + section * section_count)
    if entry != _ELF_SEGMENT.size or end > len(data):
        return int(end)
    for index in range(count):
        _, _, offset, _, _, size, _, _ = _ELF_SEGMENT.unpack_from(data, table + index * entry)
        end = max(end, offset + size)
    return int(end)


def _check_build(path: Path) -> None:
    built, running = read_build_info(path), running_paddle()
    if built != running:
        raise LibraryError(
            f"the op library {path} was built for {built}, this process runs {running}: build it "
            "against this Paddle, or leave decoding_lib out to have it built"
        )


# ---- Building -------------------------------------------------------------------------------


def find_compiler() -> list[str]:
    """The C++ compiler as a command: `$CXX`, else g++, c++ or clang++.

    Raises:
        LibraryError: there is none.
    """
    chosen = shlex.split(os.environ.get("CXX", ""))
    if chosen:
        if shutil.which(chosen[0]) is None:
            raise LibraryError(
                f"the C++ compiler {chosen[0]} that CXX names was not found: set CXX to a C++17 "
                "compiler, which the Paddle op is built with"
            )
        return chosen
    for name in ("g++", "c++", "clang++"):
        if shutil.which(name) is not None:
            return [name]
    raise LibraryError(
        "no C++ compiler (g++, c++ or clang++) was found, and the Paddle op is built with one on "
        "first use: install g++ (Debian and Ubuntu: apt-get install g++; conda: conda install "
        "gxx), set CXX, or give a built library as decoding_lib"
    )


def _sources() -> tuple[Path, Path]:
    """Folders of the op's sources and of fastgen.h's parent: installed, or of a source tree."""
    import fastgen

    candidates = []
    for entry in fastgen.__path__:
        package = Path(entry)
        candidates.append((package / "share" / "paddle", package / "include"))
        csrc = package.parent / "csrc"
        candidates.append((csrc / "paddle", csrc / "include"))
    for sources, include in candidates:
        if (sources / _SOURCES[0]).is_file() and (include / "fastgen" / "fastgen.h").is_file():
            return sources, include
    raise LibraryError(
        f"the sources of the Paddle op were not found in {candidates[0][0]}: install fastgen again"
    )


def cache_directory() -> Path:
    """Where built op libraries are kept: `$FASTGEN_CACHE/op`, else `~/.cache/fastgen/op`."""
    root = os.environ.get("FASTGEN_CACHE")
    return (Path(root) if root else Path.home() / ".cache" / "fastgen") / "op"


def _compiler_version(compiler: list[str]) -> str:
    try:
        found = subprocess.run(
            [*compiler, "--version"], capture_output=True, text=True, check=True, errors="replace"
        )
    except (OSError, subprocess.CalledProcessError) as error:
        raise LibraryError(
            f"the C++ compiler {shlex.join(compiler)} does not run: {error}"
        ) from error
    return found.stdout


def _command(compiler: list[str], build: PaddleBuild, output: Path) -> list[str]:
    sources, include = _sources()
    headers = Path(paddle.sysconfig.get_include())
    library = _capi.library_path()
    return [
        *compiler,
        *_FLAGS,
        f"-D_GLIBCXX_USE_CXX11_ABI={build.cxx11_abi}",
        "-DPADDLE_WITH_CUSTOM_KERNEL",
        f'-DFASTGEN_PADDLE_BUILD="{build.definition}"',
        f"-I{include}",
        f"-I{headers}",
        f"-I{headers / 'third_party'}",
        *(str(sources / name) for name in _SOURCES),
        "-o",
        str(output),
        str(library),
        f"-Wl,-rpath,{library.parent}",
        f"-L{core_library().parent}",
        "-Wl,--no-as-needed",
        "-l:libpaddle.so",
        "-Wl,--as-needed",
        "-ldl",
    ]


def _key(compiler: list[str], build: PaddleBuild) -> str:
    """Digest of everything that the built library depends on."""
    sources, include = _sources()
    digest = hashlib.sha256()
    parts: list[Any] = [
        build,
        _cxx_identity(compiler),
        _capi.library_version(),
        # The output's name must not enter its own key.
        _command(compiler, build, Path(LIBRARY_NAME)),
    ]
    for part in parts:
        digest.update(repr(part).encode() + b"\0")
    for path in sorted([*sources.glob("*.cc"), *sources.glob("*.h"), *include.rglob("*.h")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes() + b"\0")
    return digest.hexdigest()[:32]


def _cxx_identity(compiler: list[str]) -> tuple[str, str]:
    return shutil.which(compiler[0]) or compiler[0], _compiler_version(compiler)


def _is_usable(path: Path, build: PaddleBuild) -> bool:
    """Whether `path` is there and whole: a full disk or a crash may have left anything."""
    try:
        return read_build_info(path) == build
    except (LibraryError, NotFoundError):
        return False


def build_op_library() -> Path:
    """Builds the op library for the running Paddle unless it is in the cache.

    Several processes may call this at once: one builds, the others wait for it.

    Returns:
        Path of the library.

    Raises:
        LibraryError: no compiler, or it failed; the error names the file with its whole output.
    """
    build = running_paddle()
    compiler = find_compiler()
    folder = cache_directory() / _key(compiler, build)
    path = folder / LIBRARY_NAME
    if _is_usable(path, build):
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock = (folder / "lock").open("a")
    except OSError as error:
        raise LibraryError(
            f"the Paddle op cannot be kept in {folder}: {error.strerror or error}; set "
            "FASTGEN_CACHE to a folder that can be written"
        ) from error
    with lock:
        _acquire(lock)
        # The lock goes with the file: closing it, or the end of the process, gives it back.
        if not _is_usable(path, build):
            _compile(compiler, build, path)
    return path


def _acquire(lock: IO[str]) -> None:
    """Takes the lock, saying so when another process has it."""
    waiting = False
    while True:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return
        except BlockingIOError:
            if not waiting:
                _say("waiting for another process that is building the Paddle op")
                waiting = True
            time.sleep(0.1)


def _say(message: str) -> None:
    print(f"fastgen: {message}", file=sys.stderr, flush=True)


def _compile(compiler: list[str], build: PaddleBuild, path: Path) -> None:
    """Compiles into a temporary name beside `path` and renames it."""
    handle, name = tempfile.mkstemp(prefix="building-", suffix=".so", dir=path.parent)
    os.close(handle)
    output = Path(name)
    log = path.parent / "build.log"
    command = _command(compiler, build, output)
    _say(f"building the op {OP_NAME} for Paddle {build.version} (once, kept in {path.parent})")
    began = time.monotonic()
    try:
        with log.open("w") as log_file:
            log_file.write(shlex.join(command) + "\n")
            log_file.flush()
            code = _run(command, log_file)
        if code != 0:
            raise LibraryError(
                f"the Paddle op could not be built: {compiler[0]} failed with status {code}, its "
                f"output is in {log}"
            )
        if not _is_usable(output, build):
            raise LibraryError(
                f"the Paddle op could not be built: {compiler[0]} succeeded but wrote no op "
                f"library for {build}, its output is in {log}"
            )
        output.chmod(0o755)
        output.replace(path)
    finally:
        output.unlink(missing_ok=True)
    _say(f"built {path} in {time.monotonic() - began:.0f} s")


def _run(command: list[str], log: IO[str]) -> int:
    """Runs the compiler with the elapsed time on a terminal's stderr; returns its status."""
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=log, stderr=log)
    bar = tqdm(
        desc="fastgen: compiling",
        bar_format="{desc} {elapsed}",
        file=sys.stderr,
        disable=not sys.stderr.isatty(),
        leave=False,
    )
    try:
        with bar:
            while True:
                try:
                    return process.wait(timeout=0.2)
                except subprocess.TimeoutExpired:
                    bar.refresh()
    finally:
        if process.poll() is None:
            process.kill()
            process.wait()


# ---- Loading --------------------------------------------------------------------------------


class OpLibrary:
    """A registered op library and the functions it has beside the op.

    Attributes:
        path: the file.
        build: the Paddle it was built for.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.build = read_build_info(path)
        library = ctypes.CDLL(str(path))
        self._release = library.fastgen_op_release
        self._release.argtypes = [ctypes.c_int64]
        self._release.restype = None
        self._engine_count = library.fastgen_op_engine_count
        self._engine_count.restype = ctypes.c_uint64
        self._engines_built = library.fastgen_op_engines_built
        self._engines_built.restype = ctypes.c_uint64
        self._last_status = library.fastgen_op_last_status
        self._last_status.restype = ctypes.c_int
        self._last_error = library.fastgen_op_last_error
        self._last_error.restype = ctypes.c_char_p
        self._library_address = library.fastgen_op_library_address
        self._library_address.restype = ctypes.c_void_p
        # PyDLL keeps the interpreter's lock, and raises what the function has set.
        self._raise_interrupt = ctypes.PyDLL(str(path)).fastgen_op_raise_interrupt
        self._raise_interrupt.restype = ctypes.c_int

    def release(self, owner: int) -> None:
        """The object that gave `owner` to the op is gone: its engine is freed."""
        self._release(owner)

    def engine_count(self) -> int:
        """Engines held by the op now."""
        return int(self._engine_count())

    def engines_built(self) -> int:
        """Engines built by the op in this process."""
        return int(self._engines_built())

    def last_error(self) -> BaseException | None:
        """What this thread's last call of the op failed with, without Paddle's wrapping."""
        try:
            self._raise_interrupt()
        except BaseException as interrupt:
            return interrupt
        message = (self._last_error() or b"").decode("utf-8", "replace")
        if not message:
            return None
        return _capi._EXCEPTIONS.get(self._last_status(), InternalError)(message)

    def uses(self, library: ctypes.CDLL) -> bool:
        """Whether the op runs on this very instance of libfastgen."""
        address = ctypes.cast(library.fastgen_version, ctypes.c_void_p).value
        return bool(self._library_address() == address)


_lock = threading.Lock()
_loaded: OpLibrary | None = None


def load_op_library(decoding_lib: str | os.PathLike[str] | None = None) -> OpLibrary:
    """Registers the op `fusion_gpt` with Paddle, once for each process.

    Args:
        decoding_lib: a built `libdecoding_op.so`; None: the one installed with the package if it
            was built for this Paddle, else it is built now (or taken from the cache).

    Raises:
        FileNotFoundError: `decoding_lib` does not exist.
        LibraryError: it is no op library, was built for another Paddle, cannot be loaded, or the
            op has been registered from another file; or there is no compiler, or it failed.
    """
    global _loaded
    given = None if decoding_lib is None else Path(decoding_lib).absolute()
    if given is not None:
        _check_build(given)
    with _lock:
        if _loaded is not None:
            if given is not None and not given.samefile(_loaded.path):
                raise LibraryError(
                    f"the op {OP_NAME} has been registered from {_loaded.path} in this process, "
                    f"so {given} cannot be: Paddle allows one library for each op"
                )
            return _loaded
        # Loaded first, so that the op finds it in the process by its name.
        library = _capi.library()
        path = given or _installed() or build_op_library()
        _register(path)
        op_library = OpLibrary(path)
        if not op_library.uses(library):
            raise LibraryError(
                f"the op library {path} runs on another libfastgen than {_capi.library_path()}: "
                "build it against this one, or leave decoding_lib out to have it built"
            )
        _loaded = op_library
        return _loaded


def _installed() -> Path | None:
    """The op library inside the package, if it was built for this Paddle."""
    import fastgen

    for entry in fastgen.__path__:
        path = Path(entry) / "lib" / LIBRARY_NAME
        if path.is_file():
            if _is_usable(path, running_paddle()):
                return path
            _say(f"{path} was not built for {running_paddle()} and is not used")
    return None


def _register(path: Path) -> None:
    protos = OpProtoHolder.instance()
    if OP_NAME in protos.op_proto_map:
        raise LibraryError(
            f"the op {OP_NAME} has been registered in this process by another library, so {path} "
            "cannot be: Paddle allows one library for each op"
        )
    try:
        names = core.load_op_meta_info_and_register_op(str(path))
    except Exception as error:
        reason = str(error).strip().splitlines()[-1:] or [type(error).__name__]
        raise LibraryError(f"the op library {path} cannot be loaded: {reason[0]}") from error
    # Paddle 2 returns nothing and looks at all ops again.
    if names is None:
        protos.update_op_proto()
    else:
        protos.update_op_proto(names)
