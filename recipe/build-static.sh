#!/usr/bin/env bash
# Output libfastgen-static: in a tree of its own, because its headers, CMake and pkg-config files have the names
# of libfastgen's, and both packages may be in one environment.
set -euo pipefail
source "$RECIPE_DIR/inputs.sh"

# shellcheck disable=SC2086  # CMAKE_ARGS, which conda's compilers set, is a list of words.
cmake -S . -B build-static -G Ninja ${CMAKE_ARGS:-} "${run_path[@]}" -DCMAKE_BUILD_TYPE=Release \
  -DBUILD_SHARED_LIBS=OFF -DFASTGEN_BUILD_APPS=OFF \
  "-DCMAKE_INSTALL_PREFIX=$PREFIX/lib/fastgen-static" -DCMAKE_INSTALL_LIBDIR=lib
cmake --build build-static --parallel "$CPU_COUNT"
cmake --install build-static
