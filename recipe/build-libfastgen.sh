#!/usr/bin/env bash
# Output libfastgen: configured, built and installed into $PREFIX. Run by conda-build or rattler-build.
set -euo pipefail
source "$RECIPE_DIR/inputs.sh"

# shellcheck disable=SC2086  # CMAKE_ARGS, which conda's compilers set, is a list of words.
cmake -S . -B build-shared -G Ninja ${CMAKE_ARGS:-} "${run_path[@]}" -DCMAKE_BUILD_TYPE=Release \
  "-DCMAKE_INSTALL_PREFIX=$PREFIX" -DCMAKE_INSTALL_LIBDIR=lib
cmake --build build-shared --parallel "$CPU_COUNT"
cmake --install build-shared
