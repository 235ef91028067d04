#!/usr/bin/env bash
# Builds the CUDA device on a machine with an NVIDIA GPU and the CUDA toolkit, tests it and times it.
# Needs nvcc, CMake, ninja and a Python that has NumPy, PyTorch, hypothesis and pytest; no network, no Paddle.
#
#   ci/cuda.sh build              libfastgen and libfastgen_cuda for this GPU, in build-cuda/
#   ci/cuda.sh test [<arg>...]    tests/cuda; arguments go to pytest
#   ci/cuda.sh sanitize [<arg>...]  the small tests under compute-sanitizer; arguments go to pytest
#   ci/cuda.sh bench [<arg>...]   python -m benchmarks.cuda
#
# PYTHON names the interpreter (default: python3).
set -euo pipefail
cd "$(dirname "$0")/.."

python="${PYTHON:-python3}"
export PYTHONPATH="$PWD" FASTGEN_LIBRARY="$PWD/build-cuda/libfastgen.so"
export FASTGEN_CUDA_REQUIRED=1 FASTGEN_CUDA_OPS="$PWD/build-cuda/libfastgen_cuda_ops.so"

build() {
  local capability
  capability="${FASTGEN_CUDA_ARCHITECTURES:-$(nvidia-smi --query-gpu=compute_cap --format=csv,noheader | head -n 1 | tr -d .)}"
  cmake -S . -B build-cuda -G Ninja -DCMAKE_BUILD_TYPE=Release -DFASTGEN_CUDA=ON \
    -DFASTGEN_CUDA_OPS=ON -DFASTGEN_BUILD_APPS=OFF -DFASTGEN_CUDA_ARCHITECTURES="$capability" >build-cuda.log ||
    { cat build-cuda.log; return 1; }
  cmake --build build-cuda
}

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0" ;;
  build) build ;;
  test) shift; "$python" -m pytest -p no:cacheprovider tests/cuda "$@" ;;
  sanitize)
    shift
    for tool in memcheck synccheck racecheck; do
      echo "== $tool"
      # Barriers of a kernel's blocks that synccheck keeps apart: 132 blocks of the persistent step have 82 each.
      options=(--error-exitcode 1 --print-limit 20)
      if [ "$tool" = synccheck ]; then options+=(--num-cuda-barriers 16384); fi
      compute-sanitizer --tool "$tool" "${options[@]}" \
        "$python" -m pytest -p no:cacheprovider -v tests/cuda/test_sanitize.py "$@"
    done
    ;;
  bench) shift; "$python" -m benchmarks.cuda "$@" ;;
  *) echo "ci/cuda.sh: '${1:-}' is none of build, test, sanitize, bench; see -h" >&2; exit 2 ;;
esac
