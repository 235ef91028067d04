#!/usr/bin/env bash
# Compiles the CUDA device on a machine without a GPU: the kernels as the nvcc of CUDA 10.2 would take
# them, and libfastgen_cuda as this machine's nvcc builds it.
#
#   ci/cuda_floor.sh
#
# The floor is C++14, sm_75 and none of what CUDA 10.2 lacks (-DFASTGEN_CUDA_FLOOR, see csrc/cuda/arch.h).
# libfastgen_cuda is left in .venv/cuda. Where there is no nvcc nothing is compiled, and that is said.
# FASTGEN_JOBS is how many compilers run at once (default: one for each core).
set -euo pipefail
cd "$(dirname "$0")/.."

case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  "") ;;
  *) echo "ci/cuda_floor.sh: unknown argument '$1'; see -h" >&2; exit 2 ;;
esac

if ! nvcc="$(command -v "${CUDACXX:-nvcc}")"; then
  echo "ci/cuda_floor.sh: SKIPPED: there is no nvcc, so nothing of csrc/cuda was compiled" >&2
  exit 0
fi
"$nvcc" --version | grep release

mkdir -p .venv/cuda/floor
floor() {
  echo "floor: $1"
  "$nvcc" -std=c++14 -arch=sm_75 -DFASTGEN_CUDA_FLOOR -Werror all-warnings -Xcompiler=-Wall,-Wextra \
    -Icsrc -c "$1" -o ".venv/cuda/floor/$(basename "$1").o"
}
export nvcc
export -f floor
printf '%s\0' csrc/cuda/*.cu | xargs -0 -n 1 -P "${FASTGEN_JOBS:-$(nproc)}" bash -c 'floor "$1"' floor  # 123 if one failed

ci/env.sh build build
export PATH="$PWD/.venv/build/bin:$PATH"
cmake -S . -B .venv/cuda/build -G Ninja -DCMAKE_BUILD_TYPE=Release "-DCMAKE_CUDA_COMPILER=$nvcc" \
  -DFASTGEN_WERROR=ON -DFASTGEN_BUILD_APPS=OFF -DFASTGEN_CUDA=ON \
  "-DFASTGEN_CUDA_ARCHITECTURES=${FASTGEN_CUDA_ARCHITECTURES:-75;90}" >.venv/cuda/build.log 2>&1 ||
  { cat .venv/cuda/build.log >&2; exit 1; }
cmake --build .venv/cuda/build ${FASTGEN_JOBS:+--parallel "$FASTGEN_JOBS"}

# Nothing but the entry and the hooks of tests is visible, and nothing of CUDA has to be installed to open it.
library=.venv/cuda/build/libfastgen_cuda.so
exported="$(nm -D --defined-only "$library" | awk '{print $3}' | LC_ALL=C sort | xargs)"
if [[ "$exported" != "fastgen_cuda_test_step_policy fastgen_cuda_test_steps fastgen_device_plugin" ]]; then
  echo "ci/cuda_floor.sh: $library exports: $exported" >&2
  exit 1
fi
if ldd "$library" | grep -E 'libcu|not found'; then
  echo "ci/cuda_floor.sh: $library needs the libraries above" >&2
  exit 1
fi
