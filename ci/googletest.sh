#!/usr/bin/env bash
# Prints the path of a source tree of GoogleTest, fetching it at first:
#
#   cmake ... -DFASTGEN_BUILD_TESTS=ON -DFASTGEN_GOOGLETEST="$(ci/googletest.sh)"
#
# It comes out of a source distribution on the package index that carries it, pinned and hashed in
# ci/lock/googletest.txt, and goes to .venv/googletest.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  "") ;;
  *) echo "ci/googletest.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
esac

lock=ci/lock/googletest.txt
tree=.venv/googletest
mkdir -p .venv
exec {lock_fd}>.venv/googletest.lock
flock "$lock_fd"
if [[ ! -f "$tree/.lock" ]] || ! cmp -s "$lock" "$tree/.lock"; then
  ci/env.sh build build
  rm -rf "$tree" "$tree.tmp"
  mkdir -p "$tree.tmp"
  .venv/build/bin/python -m pip download -qq --disable-pip-version-check --no-input --no-deps \
    --no-build-isolation --no-binary :all: --require-hashes -r "$lock" -d "$tree.tmp/download" >&2
  tar -xzf "$tree.tmp"/download/*.tar.gz -C "$tree.tmp" --strip-components=3 \
    --wildcards '*/deps/googletest-*'
  rm -r "$tree.tmp/download"
  [[ -f "$tree.tmp/googletest/src/gtest-all.cc" ]] || {
    echo "ci/googletest.sh: the distribution in $lock carries no sources of GoogleTest" >&2
    exit 1
  }
  cp "$lock" "$tree.tmp/.lock"
  mv "$tree.tmp" "$tree"
fi
echo "$PWD/$tree"
