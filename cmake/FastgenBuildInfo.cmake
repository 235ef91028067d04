# fastgen_build_info.h: what fastgen_build_info() tells, as one JSON object. Inputs of the build only: no
# time, no path, no name of a machine or user.
#
#   -DFASTGEN_COMMIT=<hash>     the commit that is built, else $FASTGEN_COMMIT, else it is unknown:
#                               asking git here would record a commit in spite of changes to its files
set(FASTGEN_COMMIT "" CACHE STRING "Hash of the commit that is built, for fastgen_build_info()")

# Flags without those that name a place, which the compiler does not keep either (see fastgen_map_paths).
function(fastgen_flags_without_paths result)
  set(kept)
  set(takes_path FALSE)
  foreach(flag IN LISTS ARGN)
    if(takes_path)
      set(takes_path FALSE)
    elseif(flag MATCHES "^(-I|-L|-B|-isystem|-iquote|-idirafter|-include|--sysroot)$")
      set(takes_path TRUE)
    elseif(NOT flag MATCHES "/")
      list(APPEND kept "${flag}")
    endif()
  endforeach()
  string(REPLACE ";" " " kept "${kept}")
  set(${result} "${kept}" PARENT_SCOPE)
endfunction()

function(fastgen_json_string result value)
  string(REPLACE "\\" "\\\\" value "${value}")
  string(REPLACE "\"" "\\\"" value "${value}")
  set(${result} "\"${value}\"" PARENT_SCOPE)
endfunction()

# fastgen_write_build_info(<target> <source>): for the source of the target that includes it.
function(fastgen_write_build_info target source)
  set(commit "${FASTGEN_COMMIT}")
  if(commit STREQUAL "")
    set(commit "$ENV{FASTGEN_COMMIT}")
  endif()
  if(commit STREQUAL "")
    set(commit null)
  elseif(commit MATCHES "^[0-9a-f]+$")
    set(commit "\"${commit}\"")
  else()
    message(FATAL_ERROR "FASTGEN_COMMIT is '${commit}': it must be the hash of a commit")
  endif()

  set(epoch "$ENV{SOURCE_DATE_EPOCH}")
  if(epoch STREQUAL "")
    set(epoch null)
  elseif(NOT epoch MATCHES "^(0|[1-9][0-9]*)$")
    message(FATAL_ERROR "SOURCE_DATE_EPOCH is '${epoch}': it must be a number of seconds")
  endif()

  string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
  get_target_property(options ${target} COMPILE_OPTIONS)
  separate_arguments(flags UNIX_COMMAND "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}")
  # Not joined before: a path may hold spaces.
  fastgen_flags_without_paths(flags ${flags} -std=c++17 ${options})
  fastgen_json_string(flags "${flags}")
  fastgen_json_string(build_type "${CMAKE_BUILD_TYPE}")
  fastgen_json_string(system "${CMAKE_SYSTEM_NAME} ${CMAKE_SYSTEM_PROCESSOR}")

  get_property(isas GLOBAL PROPERTY FASTGEN_ISAS)
  set(kernels "")
  foreach(isa IN LISTS isas)
    string(REPLACE ";" " " isa_flags "${FASTGEN_FLAGS_${isa}}")
    string(APPEND kernels ", \"${isa}\": \"${isa_flags}\"")
  endforeach()
  string(SUBSTRING "${kernels}" 2 -1 kernels)

  set(cuda null)
  if(FASTGEN_CUDA)
    set(cuda "\"${CMAKE_CUDA_COMPILER_VERSION}\"")
  endif()
  set(shared false)
  if(BUILD_SHARED_LIBS)
    set(shared true)
  endif()

  set(folder "${CMAKE_CURRENT_BINARY_DIR}/build_info")
  file(
    CONFIGURE
    OUTPUT "${folder}/fastgen_build_info.h"
    CONTENT
      "#define FASTGEN_BUILD_INFO R\"json({\"version\": \"${PROJECT_VERSION}\", \"commit\": ${commit}, \
\"source_date_epoch\": ${epoch}, \"compiler\": \"${CMAKE_CXX_COMPILER_ID} ${CMAKE_CXX_COMPILER_VERSION}\", \
\"cmake\": \"${CMAKE_VERSION}\", \"system\": ${system}, \"build_type\": ${build_type}, \
\"flags\": ${flags}, \"shared\": ${shared}, \"kernels\": {${kernels}}, \"cuda\": ${cuda}})json\"\n"
    @ONLY)
  set_property(SOURCE "${source}" APPEND PROPERTY INCLUDE_DIRECTORIES "${folder}")
endfunction()
