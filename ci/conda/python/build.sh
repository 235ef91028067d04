#!/usr/bin/env bash
# Copies the CPython at $HOST_PYTHON_BASE into $PREFIX so that it runs from wherever the package is installed.
set -euo pipefail

cd "$HOST_PYTHON_BASE"
stdlib="lib/python$XY"
parts=("$stdlib" "bin/python$XY")
for part in "include/python$XY" "bin/python$XY-config" lib/libpython"$XY".so* lib/libpython3.so; do
  [[ ! -e "$part" ]] || parts+=("$part")
done
tar -c --exclude=__pycache__ --exclude='*/test' --exclude='*/tests' --exclude='*/idlelib' \
  --exclude='*/turtledemo' --exclude='*/site-packages' --exclude='*/dist-packages' --exclude='*/ensurepip' \
  --exclude='config-*/*.[ao]' --exclude=EXTERNALLY-MANAGED --exclude=sitecustomize.py "${parts[@]}" | tar -x -C "$PREFIX"
cd "$PREFIX"
for name in python python3; do ln -sf "python$XY" "bin/$name"; done
mkdir -p "$stdlib/site-packages"
echo "Packages are installed here." >"$stdlib/site-packages/README.txt"

if [[ "$HOST_PYTHON_BASE" == /usr ]]; then
  # Debian's CPython looks for packages elsewhere unless it is a virtual environment, and installs them elsewhere.
  # Its site.py is frozen into the program, so the folder is added by what site.py imports last.
  cat >"$stdlib/sitecustomize.py" <<'PYTHON'
import site
import sys

site.addsitedir(f"{sys.prefix}/lib/python{sys.version_info.major}.{sys.version_info.minor}/site-packages")
PYTHON
  sed -i "s/^\( *\)prefix_scheme = 'posix_local'/\1prefix_scheme = 'posix_prefix'/" "$stdlib/sysconfig.py"
else
  # The place in texts is the package's from now on; the installer puts the real one there.
  grep -rlIZ -- "$HOST_PYTHON_BASE" . | xargs -0 -r sed -i "s#$HOST_PYTHON_BASE#$PREFIX#g"
fi

if [[ -e "lib/libpython$XY.so.1.0" ]]; then
  find "$stdlib/lib-dynload" -name '*.so' \
    -exec "$HOST_PATCHELF" --force-rpath --set-rpath '$ORIGIN/../..' {} \;
  "$HOST_PATCHELF" --force-rpath --set-rpath '$ORIGIN/../lib' "bin/python$XY"
fi
# Without byte code every package that is built on this Python would sweep up what Python writes on first use. A
# few files of the library are no valid sources on purpose.
"bin/python$XY" -m compileall -q -j2 --invalidation-mode unchecked-hash -s "$PREFIX" -p /conda "$stdlib" || true
