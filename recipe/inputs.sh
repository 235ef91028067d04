# shellcheck shell=bash
# Read by the build scripts. What compiles records SOURCE_DATE_EPOCH (fastgen info --build), and the build tools set it
# to the time of the build, so that no two builds would be the same: only the time that the recipe was given is kept,
# as it is, and where none was given the library says that it is unknown.
if [[ -n "${FASTGEN_SOURCE_DATE_EPOCH:-}" ]]; then
  export SOURCE_DATE_EPOCH="$FASTGEN_SOURCE_DATE_EPOCH"
else
  unset SOURCE_DATE_EPOCH
fi

# conda's compilers have the prefix of the build as run path. The tools would write a relative one into what was linked,
# but the linker's build id is made of the first. With a relative one from the start nothing is left of the prefix.
export LDFLAGS="${LDFLAGS:-}"
LDFLAGS="${LDFLAGS//-Wl,-rpath,$PREFIX\/lib/}"
unset LD_RUN_PATH
# shellcheck disable=SC2016,SC2034  # $ORIGIN is the loader's; the scripts use the list.
run_path=(-DCMAKE_BUILD_WITH_INSTALL_RPATH=ON '-DCMAKE_INSTALL_RPATH=$ORIGIN/../lib')
