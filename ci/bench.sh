#!/usr/bin/env bash
# The CPU benchmark with all of its peers: makes the environments, builds fastgen, measures.
#
#   ci/bench.sh --preset goals      arguments go to `python -m benchmarks.cpu`; --help lists them
#   ci/bench.sh --environments      only makes the environments
#
# .venv/bench has all peers but PaddleNLP, which lives in .venv/paddle26. llama.cpp is compiled for
# this machine the first time. PyTorch is not locked: pip must find a CPU build of the version below
# (PIP_FIND_LINKS or PIP_EXTRA_INDEX_URL say where), or brings its own index's, which is large.
# FASTGEN_LIBRARY names a library to measure instead of the one that is built here.
set -euo pipefail
cd "$(dirname "$0")/.."

torch=2.13.0

case "${1:-}" in
  -h) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
esac

ci/env.sh bench build bench
ci/env.sh paddle26 build paddle26
env=.venv/bench
if [[ "$(cat "$env/.torch" 2>/dev/null)" != "$torch" ]]; then
  "$env/bin/python" -m pip install -qq --disable-pip-version-check --no-input "torch==$torch"
  echo "PyTorch is there; that torchvision is missing is meant" >&2
  echo "$torch" >"$env/.torch"
fi
if [[ -z "${FASTGEN_LIBRARY:-}" ]]; then
  ci/env.sh --project bench
  # Modules come from the checkout, the library from the wheel that was built of it.
  libraries=("$PWD/$env"/lib/python3.11/site-packages/fastgen/lib/libfastgen.so)
  export FASTGEN_LIBRARY="${libraries[0]}"
fi
[[ "${1:-}" == --environments ]] || exec "$env/bin/python" -m benchmarks.cpu "$@"
