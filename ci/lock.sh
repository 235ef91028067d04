#!/usr/bin/env bash
# Regenerates the lock files ci/lock/*.txt from ci/lock/*.in: every version pinned, with hashes.
#
#   ci/lock.sh              keeps the pins that still fit
#   ci/lock.sh --upgrade    takes the newest versions that ci/lock/constraints-paddle.in allows
#
# Needs the package index. Look at `git diff ci/lock` afterwards and run ci/test.sh.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  --upgrade) upgrade=(--upgrade) ;;
  "") upgrade=() ;;
  *) echo "ci/lock.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
esac

# The interpreter's own pip brings uv, at the version and hash that the last run wrote down.
if [[ -s ci/lock/uv.txt ]]; then
  ci/env.sh lock uv
else
  python3.11 -m venv .venv/lock
  .venv/lock/bin/python -m pip install --quiet -r ci/lock/uv.in
fi

# How far a lock may go: the set that PaddleNLP works with, or what the peers of the benchmark need.
with_paddle=(--constraints ci/lock/constraints-paddle.in)
beside_paddle=(--override ci/lock/override-bench.in)

# resolve <lock> <input>...
resolve() {
  local lock="ci/lock/$1.txt" inputs=() input
  shift
  for input in "$@"; do inputs+=("ci/lock/$input.in"); done
  .venv/lock/bin/uv pip compile --quiet --generate-hashes --python-version 3.11 \
    --no-emit-index-url --no-emit-find-links --no-emit-build-options \
    "${bounds[@]}" "${upgrade[@]}" \
    --custom-compile-command "ci/lock.sh" --output-file "$lock" "${inputs[@]}" >/dev/null
  # A lock file names packages, never where this machine got them.
  if grep -nE '://|^(-i|-f|--[a-z-]*(index|find-links))' "$lock"; then
    echo "ci/lock.sh: $lock holds the lines above, which name a place" >&2
    exit 1
  fi
  echo "$lock: $(grep -c '^[a-zA-Z0-9]' "$lock") packages"
}

bounds=("${with_paddle[@]}")
resolve uv uv
resolve build build
resolve googletest googletest
resolve conda run build conda
resolve release release
resolve installed run test
resolve run run
resolve lint run lint
resolve docs run docs
resolve paddle26 run test paddle26
resolve paddle33 run test paddle33
resolve paddle26gpu run test paddle26gpu
resolve paddle25gpu run test paddle25gpu
bounds=("${beside_paddle[@]}")
resolve bench run bench
