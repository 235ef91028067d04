#!/usr/bin/env bash
# Output fastgen: the Python package without a library of its own; it finds the one of the package libfastgen
# through a link, and libfastgen finds libfastgen_cuda beside itself.
set -euo pipefail

# wheel.cmake: nothing is compiled.
"$PYTHON" -m pip install . --no-deps --no-build-isolation --no-index --no-cache-dir \
  --config-settings=wheel.cmake=false
package="$SP_DIR/fastgen"
# What CMake would install into a wheel: the sources of the op, for a Paddle that has no fastgen-paddle.
mkdir -p "$package/lib" "$package/share/paddle" "$package/include/fastgen"
cp csrc/paddle/*.cc csrc/paddle/*.h "$package/share/paddle/"
cp csrc/include/fastgen/*.h csrc/include/fastgen/*.hpp "$package/include/fastgen/"
ln -s "$("$PYTHON" -c 'import os, sys; print(os.path.relpath(sys.argv[1], sys.argv[2]))' \
  "$PREFIX/lib/libfastgen.so" "$package/lib")" "$package/lib/libfastgen.so"
