#!/usr/bin/env bash
# Output fastgen-paddle: the op library, built as FasterGPT builds it on first use, and put where FasterGPT looks
# before it compiles.
set -euo pipefail

# From a directory of its own: the one of the sources has a package fastgen, without a library.
mkdir build-paddle
cd build-paddle
# Without the map Paddle's headers leave the directory of this build in messages. The build id would be made of the run
# path, which is absolute until the tools write another one.
CXX="${CXX:-c++} -ffile-prefix-map=$SP_DIR/= -Wl,--build-id=none" FASTGEN_CACHE="$PWD" "$PYTHON" -c 'import fastgen.jit; print(fastgen.jit.build_op_library())' | tee path
install -D -m 755 "$(tail -n 1 path)" "$SP_DIR/fastgen/lib/libdecoding_op.so"
