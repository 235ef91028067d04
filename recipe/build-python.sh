#!/usr/bin/env bash
# Output fastgen: the Python package without a library of its own; it finds the one of the package libfastgen
# through a link, and libfastgen finds libfastgen_cuda beside itself.
set -euo pipefail

pip() { "$PYTHON" -m pip "$@" --no-deps --no-index --no-cache-dir; }
# wheel.cmake: nothing is compiled. By way of a wheel and its name, because pip writes down the place of what it
# installs from one.
pip wheel . --no-build-isolation --config-settings=wheel.cmake=false -w "$SRC_DIR/wheel"
pip install --no-compile --find-links "$SRC_DIR/wheel" "fastgen==$PKG_VERSION"
package="$SP_DIR/fastgen"
# The command's first line names the prefix and is another one wherever it is installed, and so would its sum be.
sed -i -E 's|^([./]*bin/fastgen),.*|\1,,|' "$SP_DIR/fastgen-$PKG_VERSION.dist-info/RECORD"
grep -qE '^[./]*bin/fastgen,,$' "$SP_DIR/fastgen-$PKG_VERSION.dist-info/RECORD"
# Byte code that tells neither where nor when it was made: Python asks for the source's sum instead.
"$PYTHON" -m compileall -q --invalidation-mode checked-hash -s "$SP_DIR" "$package"
# What CMake would install into a wheel: the sources of the op, for a Paddle that has no fastgen-paddle.
mkdir -p "$package/lib" "$package/share/paddle" "$package/include/fastgen"
cp csrc/paddle/*.cc csrc/paddle/*.h "$package/share/paddle/"
cp csrc/include/fastgen/*.h csrc/include/fastgen/*.hpp "$package/include/fastgen/"
ln -s "$("$PYTHON" -c 'import os, sys; print(os.path.relpath(sys.argv[1], sys.argv[2]))' \
  "$PREFIX/lib/libfastgen.so" "$package/lib")" "$package/lib/libfastgen.so"
