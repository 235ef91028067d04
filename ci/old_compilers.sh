#!/usr/bin/env bash
# Keeps the C++ sources within what old compilers take; the oldest one meant is gcc 8.2.
#
#   ci/old_compilers.sh                all of this:
#   ci/old_compilers.sh rules [<dir>]  looks for what gcc 8.2 and its library lack (default: csrc)
#   ci/old_compilers.sh isa            as if the compiler had no AVX-512, and no AVX2: the kernels that are
#                                      left build, and the library tells just these
#   ci/old_compilers.sh compilers      libfastgen and fastgen-gpt with the oldest gcc and clang that
#                                      Debian 12 packages, warnings being errors; fastgen-gpt then generates
#
# gcc 8.2 itself is in no package of Debian 12, so its library is stood in for by the rules. Compilers
# that are not installed are said to be skipped; --install, before the word above, gets them with apt-get.
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '2,/^set /{/^#/s/^# \{0,1\}//p}' "$0"; }

install=0
if [[ "${1:-}" == --install ]]; then
  install=1
  shift
fi
part="${1:-all}"
case "$part" in
  -h | --help) usage; exit 0 ;;
  all | isa | compilers) (($# <= 1)) || { usage >&2; exit 2; } ;;
  rules) (($# <= 2)) || { usage >&2; exit 2; } ;;
  *) echo "ci/old_compilers.sh: '$part' is none of rules, isa, compilers; see -h" >&2; exit 2 ;;
esac

status=0

# rule <why> <extended regular expression> [<more of grep's arguments>...]: no line of code matches. Comments
# of a whole line are left alone. csrc/cuda has a rule of its own, C++14, see ci/cuda_floor.sh.
rule() {
  local why="$1" pattern="$2" found
  found="$(grep -rnE --include='*.h' --include='*.hpp' --include='*.cc' --exclude-dir=cuda "$pattern" "$sources" |
    grep -vE '^[^:]+:[0-9]+:\s*(//|\*|/\*)' || true)"
  if [[ -n "$found" ]]; then
    printf '%s\n' "$found" >&2
    echo "ci/old_compilers.sh: above: $why" >&2
    status=1
  fi
}

rules() {
  sources="${1:-csrc}"
  rule "<filesystem> needs -lstdc++fs before gcc 9" '#include <(experimental/)?filesystem>'
  rule "these headers came with C++20 or gcc 9 to 11" \
    '#include <(version|bit|span|concepts|ranges|numbers|compare|coroutine|format|source_location|execution|memory_resource|barrier|latch|semaphore|stop_token|syncstream)>'
  rule "floating point in <charconv> came with gcc 11" '(from|to)_chars.*(float|double|chars_format)'
  rule "these parallel algorithms came with gcc 9" 'std::(reduce|transform_reduce|(transform_)?(in|ex)clusive_scan)\b'
  rule "came with gcc 12" 'hardware_(destructive|constructive)_interference_size'
  rule "__builtin_bit_cast came with gcc 11, __has_builtin with gcc 10" '__builtin_bit_cast|__has_builtin|std::bit_cast'
  rule "attributes of C++20" '\[\[(un)?likely\]\]|\[\[no_unique_address\]\]'
  rule "std::pmr came with gcc 9" 'std::pmr\b'
  rule "these intrinsics came after gcc 8, or are not known to be older" \
    '_mm(256|512)?_(loadu|storeu)_si(16|32|64)\b|_mm512_(loadu|storeu)_epi(8|16|32|64)\b|_mm256_(loadu2|storeu2|set_m128)|_mm(256|512)_zext|_mm(256|512)?_reduce_(add|max|min)_(epi8|epi16|ph)\b|_mm512_set_epi(8|16)\b|_mm512_cvtsi512_si32\b|_mm512_cvtss_f32\b'
}

# configure_and_build <name> <cmake argument>...: builds libfastgen and fastgen-gpt.
configure_and_build() {
  local tree=".venv/old/$1"
  shift
  rm -rf "$tree"
  mkdir -p "$tree"
  { cmake -S . -B "$tree" -G Ninja -DCMAKE_BUILD_TYPE=Release -DCMAKE_CXX_FLAGS=-pedantic -DFASTGEN_WERROR=ON "$@" &&
    cmake --build "$tree" ${FASTGEN_JOBS:+--parallel "$FASTGEN_JOBS"}; } >"$tree.log" 2>&1 ||
    { tail -n 60 "$tree.log" >&2; echo "ci/old_compilers.sh: $tree could not be built" >&2; return 1; }
  # It generates with the kernels that it has.
  "$tree/fastgen-gpt" --model_dir fastgen/models/gpt2-docstrings --prompt "Return a list of" --max_length 8 \
    --seed 7 >"$tree.txt" 2>&1 || { cat "$tree.txt" >&2; return 1; }
}

# kernels <tree>: the sets that the library tells, e.g. "generic avx2".
kernels() {
  sed 's/.*"kernels": {\([^}]*\)}.*/\1/' ".venv/old/$1/build_info/fastgen_build_info.h" |
    grep -oE '"[a-z0-9]+":' | tr -d '":' | xargs
}

isa() {
  local without expected name
  for without in AVX512 "AVX512 AVX2"; do
    name="without-${without// /-}"
    expected="generic avx2"
    [[ "$without" == AVX512 ]] || expected="generic"
    # shellcheck disable=SC2086 # a list of words
    configure_and_build "$name" $(printf -- '-DFASTGEN_WITHOUT_%s=ON ' $without) || { status=1; continue; }
    if [[ "$(kernels "$name")" != "$expected" ]]; then
      echo "ci/old_compilers.sh: $name: kernels $(kernels "$name"), not $expected" >&2
      status=1
      continue
    fi
    echo "isa: $name: kernels $expected, generates"
  done
}

compilers() {
  local pair compiler package
  for pair in g++-11:g++-11 clang++-13:clang-13; do
    compiler="${pair%%:*}" package="${pair##*:}"
    if ! command -v "$compiler" >/dev/null && ((install)); then
      apt-get install -y --no-install-recommends "$package" >&2 || true
    fi
    if ! command -v "$compiler" >/dev/null; then
      echo "ci/old_compilers.sh: SKIPPED: there is no $compiler (package $package), so nothing was compiled with it" >&2
      continue
    fi
    configure_and_build "$compiler" "-DCMAKE_CXX_COMPILER=$compiler" || { status=1; continue; }
    echo "compilers: $("$compiler" --version | head -n 1): kernels $(kernels "$compiler"), generates"
  done
}

if [[ "$part" == rules || "$part" == all ]]; then
  rules "${2:-csrc}"
  ((status)) || echo "rules: kept"
fi
if [[ "$part" != rules ]]; then
  ci/env.sh build build
  export PATH="$PWD/.venv/build/bin:$PATH"
  [[ "$part" == compilers ]] || isa
  [[ "$part" == isa ]] || compilers
fi
exit "$status"
