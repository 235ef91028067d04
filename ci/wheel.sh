#!/usr/bin/env bash
# Makes the sdist and the wheel for other people's machines, and tries them: dist/fastgen-<version>.tar.gz
# and dist/fastgen-<version>-py3-none-manylinux_2_28_x86_64.whl.
#
#   ci/wheel.sh                  both, into dist/
#   ci/wheel.sh --host           the wheel that this machine's compiler makes, and what auditwheel says
#
# The sdist is unpacked, and the wheel is compiled from there without the package index (and without any
# network where that can be taken away), by the clang of the pinned distribution ziglang, which links
# against glibc 2.28 whatever glibc this machine has. auditwheel says whether it kept to that. The wheel is
# then installed into an environment of its own and tested from outside the sources.
# docs/packaging-wheels.md says why. Needs Python 3.11 (with venv) and git.
set -euo pipefail
cd "$(dirname "$0")/.."

host=0
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  --host) host=1 ;;
  "") ;;
  *) echo "ci/wheel.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
esac
[[ "$(uname -m)" == x86_64 ]] || { echo "ci/wheel.sh: only x86_64 has been tried, this is $(uname -m)" >&2; exit 1; }

ci/env.sh release build release
root="$PWD" environment="$PWD/.venv/release" work="$PWD/.venv/wheel"
platform=manylinux_2_28_x86_64
rm -rf "$work"
mkdir -p "$work/sdist" "$work/source" "$work/built" "$work/repaired" "$work/tests"

export PATH="$environment/bin:$PATH" PYTHONDONTWRITEBYTECODE=1
export SOURCE_DATE_EPOCH="${SOURCE_DATE_EPOCH:-$(git log -1 --format=%ct)}"
if [[ -z "${FASTGEN_COMMIT:-}" && -z "$(git status --porcelain)" ]]; then
  FASTGEN_COMMIT="$(git rev-parse HEAD)"
fi
export FASTGEN_COMMIT="${FASTGEN_COMMIT:-}"

# The modes of files in the wheel are those of the sources.
umask 022
python -c 'import sys; from scikit_build_core.build import build_sdist; build_sdist(sys.argv[1])' "$work/sdist"
tar -xzf "$work"/sdist/*.tar.gz -C "$work/source" --strip-components=1

offline=()
if unshare --map-root-user --net true 2>/dev/null; then
  offline=(unshare --map-root-user --net)
else
  echo "ci/wheel.sh: the network cannot be taken away here; pip is told not to use it" >&2
fi
if ((!host)); then
  # A program of one word for CMake. zig compiles its C++ library once, into the cache.
  printf '#!/bin/sh\nexec "%s" -m ziglang c++ -target x86_64-linux-gnu.2.28 "$@"\n' "$environment/bin/python" \
    >"$work/zig-c++"
  chmod +x "$work/zig-c++"
  export CXX="$work/zig-c++" ZIG_GLOBAL_CACHE_DIR="$PWD/.venv/zig" ZIG_LOCAL_CACHE_DIR="$PWD/.venv/zig"
fi
echo "== the wheel, from the sdist, without the package index"
(cd "$work/source" && "${offline[@]}" python -m pip wheel -q --disable-pip-version-check --no-input \
  --no-index --no-build-isolation --no-deps --no-cache-dir -w "$work/built" .)
wheel="$(echo "$work"/built/*.whl)"
echo "${wheel##*/}"
if ((host)); then
  exec auditwheel show "$wheel"
fi

echo "== auditwheel"
# Fails where a symbol is newer than the platform's glibc; nothing is copied into the wheel.
auditwheel repair --plat "$platform" --only-plat -w "$work/repaired" "$wheel"
wheel="$(echo "$work"/repaired/*.whl)"
if [[ "$wheel" != *-py3-none-"$platform".whl ]]; then
  echo "ci/wheel.sh: ${wheel##*/} is not tagged py3-none-$platform" >&2
  exit 1
fi
auditwheel show "$wheel"
python ci/artifacts.py search "$work/repaired" "$root" "$HOME/"

echo "== the installed wheel"
ci/env.sh installed installed
"$root/.venv/installed/bin/python" -m pip install -qq --disable-pip-version-check --no-input --no-deps --no-index \
  --force-reinstall "$wheel"
# A copy of some tests and nothing else of the sources.
cp -R tests/lib tests/conftest.py "$work/tests"
mkdir "$work/tests/unit"
cp tests/unit/conftest.py tests/unit/test_{capi,batch,generator,kernels,options,philox,tokenizer_use}.py "$work/tests/unit"
cp pyproject.toml "$work/tests/pyproject.toml"
sed -i 's|"tests/lib"|"lib"|' "$work/tests/pyproject.toml"
run() {
  (cd "$work/tests" && env -u CXX -u PYTHONPATH -u FASTGEN_LIBRARY PYTHONSAFEPATH=1 "$@")
}
run "$root/.venv/installed/bin/python" -c '
import sys, fastgen
from fastgen import _capi
assert _capi.library_path().is_relative_to(sys.prefix), _capi.library_path()'
run "$root/.venv/installed/bin/pytest" -q -p no:cacheprovider -m "not slow" unit
run "$root/.venv/installed/bin/fastgen" info --build
run "$root/.venv/installed/bin/fastgen" infer --prompt "Return True if" --max_length 32 --seed 7

mkdir -p dist
cp "$work"/sdist/*.tar.gz "$wheel" dist/
echo "== dist"
ls -l dist
