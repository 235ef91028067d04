#!/usr/bin/env bash
# Builds libfastgen and the C++ tests and runs them with ctest:
#
#   ci/ctest.sh plain [<ctest argument>...]      as they are, with applications of the installed tree
#   ci/ctest.sh address [<ctest argument>...]    with AddressSanitizer (leaks too) and
#                                                UndefinedBehaviorSanitizer
#   ci/ctest.sh thread [<ctest argument>...]     with ThreadSanitizer: the tests that have threads
#
# e.g. ci/ctest.sh address -R readers. Needs Python 3.11 (with venv) and g++; without pkg-config its part
# of the applications is left out, with a word. Build trees are .venv/ctest/<kind>; FASTGEN_JOBS is how
# many compilers run at once (default: as Ninja likes).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

kind="${1:-}"
case "$kind" in
  -h | --help) usage; exit 0 ;;
  plain) sanitizers="" ;;
  address) sanitizers=address,undefined ;;
  thread) sanitizers=thread ;;
  *) usage >&2; exit 2 ;;
esac
shift

ci/env.sh build build
googletest="$(ci/googletest.sh)"
export PATH="$PWD/.venv/build/bin:$PATH"
tree=".venv/ctest/$kind"
mkdir -p .venv/ctest
# -O1: half the time of compiling, and stack traces that can be read.
cmake -S . -B "$tree" -G Ninja -DCMAKE_BUILD_TYPE=Debug -DCMAKE_CXX_FLAGS=-O1 -DFASTGEN_WERROR=ON \
  -DFASTGEN_BUILD_TESTS=ON "-DFASTGEN_GOOGLETEST=$googletest" "-DFASTGEN_SANITIZE=$sanitizers" \
  "-DFASTGEN_BUILD_APPS=$([[ $kind == plain ]] && echo ON || echo OFF)" >"$tree.log" 2>&1 ||
  { cat "$tree.log" >&2; exit 1; }
cmake --build "$tree" ${FASTGEN_JOBS:+--parallel "$FASTGEN_JOBS"}

# Addresses as the older run-time libraries of the sanitizers expect them, where that is allowed.
fixed=()
if [[ $kind != plain ]] && setarch "$(uname -m)" -R true 2>/dev/null; then
  fixed=(setarch "$(uname -m)" -R)
fi
"${fixed[@]}" ctest --test-dir "$tree" --output-on-failure "$@"
