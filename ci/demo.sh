#!/usr/bin/env bash
# The main job on a CPU, from a fresh clone: makes .venv/demo, builds and installs fastgen, and lets
# the embedded model continue a prompt. Needs Python 3.11 (with venv), git and g++; no Paddle.
#
#   ci/demo.sh                     a prompt of our own
#   ci/demo.sh <option>...         options of `fastgen infer`, e.g. ci/demo.sh --prompt "Open a file"
#
# Generated text and tokens per second are printed; a second run takes seconds.
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
esac

ci/env.sh demo run
ci/env.sh --project demo

if [[ $# -eq 0 ]]; then
  set -- --prompt "Return True if" --max_length 96 --topk 8 --temperature 0.8 --seed 7
fi
# From outside the checkout, so that the installed package is what runs.
fastgen="$PWD/.venv/demo/bin/fastgen"
cd .venv
"$fastgen" infer "$@"
