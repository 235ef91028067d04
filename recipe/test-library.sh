#!/usr/bin/env bash
# Recipe test of libfastgen and libfastgen-static: what is installed under a prefix, and the C++ application of
# tests/cpp/consumer built with it by find_package and by pkg-config.
#
#   test-library.sh <prefix> <version> <static: ON or OFF>
set -euo pipefail
prefix="$1" version="$2" static="$3"

fail() {
  echo "test-library.sh: $1" >&2
  exit 1
}

export PKG_CONFIG_PATH="$prefix/lib/pkgconfig"
found="$(pkg-config --modversion fastgen)"
[[ "$found" == "$version" ]] || fail "fastgen.pc has the version $found, not $version"

consumer=tests/cpp/consumer/cpp
# shellcheck disable=SC2086  # A list of words.
cmake -S "$consumer" -B application -G Ninja ${CMAKE_ARGS:-} "-DCMAKE_PREFIX_PATH=$prefix" \
  "-DVERSION=$version" -DCMAKE_FIND_USE_PACKAGE_REGISTRY=OFF
grep -q "^fastgen_DIR:PATH=$prefix/lib/cmake/fastgen\$" application/CMakeCache.txt ||
  fail "find_package(fastgen) found another one"
cmake --build application
# shellcheck disable=SC2046,SC2086  # Lists of words.
"${CXX:-c++}" ${CXXFLAGS:-} -std=c++17 -pthread "$consumer/main.cc" -o by_pkg_config \
  $(pkg-config --cflags --libs fastgen) ${LDFLAGS:-} "-Wl,-rpath,$prefix/lib"

for program in application/application ./by_pkg_config; do
  # Not by a pipe into grep -q, which ends before ldd has written all it has to say.
  if [[ "$(ldd "$program")" == *libfastgen.so* ]]; then linked=OFF; else linked=ON; fi
  [[ "$linked" == "$static" ]] || fail "$program: static is $linked, it should be $static"
  # There is no model in these packages: the library must be reached and say so.
  if output="$(env -i "$program" ./no-such-model 2>&1)"; then fail "$program did not fail"; fi
  [[ "$output" == *no-such-model* ]] || fail "$program said: $output"
done

if [[ "$static" == OFF ]]; then
  [[ -z "$(find "$prefix" -name 'libfastgen*.a')" ]] || fail "there is a static library in $prefix"
  output="$(env -i "$prefix/bin/fastgen-gpt" --version)"
  [[ "$output" == "fastgen-gpt $version" ]] || fail "fastgen-gpt --version printed: $output"
fi
