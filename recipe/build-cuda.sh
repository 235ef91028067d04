#!/usr/bin/env bash
# Output libfastgen-cuda: that one library, beside libfastgen, which looks for it there.
set -euo pipefail
source "$RECIPE_DIR/inputs.sh"

# shellcheck disable=SC2086  # CMAKE_ARGS, which conda's compilers set, is a list of words.
cmake -S . -B build-cuda -G Ninja ${CMAKE_ARGS:-} "${run_path[@]}" -DCMAKE_BUILD_TYPE=Release -DFASTGEN_CUDA=ON \
  -DFASTGEN_BUILD_APPS=OFF "-DCMAKE_INSTALL_PREFIX=$PREFIX" -DCMAKE_INSTALL_LIBDIR=lib
cmake --build build-cuda --target fastgen_cuda --parallel "$CPU_COUNT"
install -D -m 755 build-cuda/libfastgen_cuda.so "$PREFIX/lib/libfastgen_cuda.so"
