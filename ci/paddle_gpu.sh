#!/usr/bin/env bash
# The Paddle op against Paddle for GPUs: compiles csrc/paddle as FasterGPT does on first use, with the headers
# of paddlepaddle-gpu 2.6.2 (CUDA 11.8), looks for what it binds by name in that Paddle's libraries, and runs
# tests/paddle and tests/parity with it on the CPU; where there is a GPU, tests/paddle/test_gpu.py there too, for
# which FASTGEN_CUDA_LIBRARY names libfastgen_cuda.so.
#
#   ci/paddle_gpu.sh                 arguments go to pytest
#   ci/paddle_gpu.sh --build         compiles and looks only
#   ci/paddle_gpu.sh --paddle 2.5.2 ...    the Paddle of the user's pin, which the package index has for CUDA 11.8 only
#
# No part of ci/test.sh: the wheels have 760 and 540 MB, unpacked they take 3 GB each. No CUDA need be installed for
# them. Where the environment cannot be made nothing is compiled, and that is said.
set -euo pipefail
cd "$(dirname "$0")/.."

environment=.venv/paddle26gpu
case "${1:-}" in
  -h | --help) sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; exit 0 ;;
  --paddle)
    case "${2:-}" in
      2.6.2) ;;
      2.5.2) environment=.venv/paddle25gpu ;;
      *) echo "ci/paddle_gpu.sh: --paddle is '${2:-}', which must be 2.6.2 or 2.5.2" >&2; exit 2 ;;
    esac
    shift 2
    ;;
esac

skip() {
  echo "ci/paddle_gpu.sh: SKIPPED: $1, so nothing was compiled" >&2
  exit 0
}

name="${environment##*/}"
mkdir -p .venv
if [[ ! -f "$environment/.locks" ]]; then
  free="$(df -Pk .venv | awk 'NR == 2 {print int($4 / 1024 / 1024)}')"
  ((free >= 8)) || skip "there are $free GiB free and $environment takes 8 while it is made"
fi
ci/env.sh "$name" build "$name" || skip "$environment could not be made"
ci/env.sh --project "$name"

export FASTGEN_CACHE="$PWD/.venv/cache" PYTHONSAFEPATH=1 FASTGEN_TEST_INSTALLED=1 PYTHONDONTWRITEBYTECODE=1
"$environment/bin/python" - <<'PYTHON'
import ctypes
import zlib  # noqa: F401
from pathlib import Path

import paddle

from fastgen import _paddle_compat, jit

build = jit.running_paddle()
assert build.cuda == "11.8", build
print(f"op for {build}: {jit.build_op_library()}")
# What gpu_stream.cc binds weakly: a name that has changed would be missed only when there is a GPU.
phi = Path(paddle.sysconfig.get_lib()) / "libphi.so"
library = ctypes.CDLL(str(phi if phi.exists() else _paddle_compat.core_library()))
for name in (
    "_ZN3phi17DeviceContextPool8InstanceEv",
    "_ZN3phi17DeviceContextPool3GetERKNS_5PlaceE",
    "_ZNK3phi10GPUContext6streamEv",
):
    getattr(library, name)
    print("found", name)
PYTHON

[[ "${1:-}" == --build ]] && exit 0
tests() { PATH="$PWD/$environment/bin:$PATH" "$environment/bin/pytest" -p no:cacheprovider "$@"; }
CUDA_VISIBLE_DEVICES='' tests tests/paddle tests/parity "$@"
if nvidia-smi -L >/dev/null 2>&1; then
  tests tests/paddle/test_gpu.py
else
  echo "ci/paddle_gpu.sh: there is no GPU, so nothing was tried on one" >&2
fi
