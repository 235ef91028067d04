#!/usr/bin/env bash
# Recipe test of fastgen-paddle: the installed op library is the one that is used, without a compiler.
set -euo pipefail

FASTGEN_CACHE="$PWD/cache" CXX=/nonexistent/compiler python - <<'PYTHON'
import zlib  # noqa: F401
from pathlib import Path

import fastgen
from fastgen import jit

op = jit.load_op_library()
expected = Path(fastgen.__file__).parent / "lib" / "libdecoding_op.so"
assert op.path.samefile(expected), op.path
assert op.build == jit.running_paddle(), op.build
print(op.path, op.build)
PYTHON
