// What the library was built from. The text is made by cmake/FastgenBuildInfo.cmake.
#include "fastgen/fastgen.h"
#include "fastgen_build_info.h"

const char* fastgen_build_info(void) { return FASTGEN_BUILD_INFO; }
