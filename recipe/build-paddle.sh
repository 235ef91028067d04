#!/usr/bin/env bash
# Output fastgen-paddle: the op library, built as FasterGPT builds it on first use, and put where FasterGPT looks
# before it compiles.
set -euo pipefail

export FASTGEN_CACHE="$PWD/build-paddle"
library="$("$PYTHON" -c 'import fastgen.jit; print(fastgen.jit.build_op_library())')"
install -D -m 755 "$library" "$SP_DIR/fastgen/lib/libdecoding_op.so"
