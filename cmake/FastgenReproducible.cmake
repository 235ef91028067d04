# What is built must not tell where or when: the same sources, compiler and flags give the same bytes in
# every directory. ci/reproduce.sh shows it.
include(CheckCXXCompilerFlag)

# fastgen_map_paths(<directory> <name>): in __FILE__ and debug information the directory is called <name>.
# For every target of the calling directory, so it comes before them.
function(fastgen_map_paths directory name)
  check_cxx_compiler_flag("-ffile-prefix-map=/a=b" FASTGEN_COMPILER_HAS_PREFIX_MAP)
  if(FASTGEN_COMPILER_HAS_PREFIX_MAP)
    set_property(DIRECTORY APPEND PROPERTY COMPILE_OPTIONS
                 "$<$<COMPILE_LANGUAGE:CXX>:-ffile-prefix-map=${directory}=${name}>")
  endif()
endfunction()

# Archives without times, users and modes of their members. Not every ar does so unasked.
macro(fastgen_deterministic_archives)
  if(NOT DEFINED FASTGEN_AR_HAS_D)
    set(fastgen_probe "${CMAKE_CURRENT_BINARY_DIR}/CMakeFiles/fastgen_probe")
    file(WRITE "${fastgen_probe}.txt" "")
    file(REMOVE "${fastgen_probe}.a")
    execute_process(COMMAND "${CMAKE_AR}" qcD "${fastgen_probe}.a" "${fastgen_probe}.txt"
                    RESULT_VARIABLE fastgen_ar_status OUTPUT_QUIET ERROR_QUIET)
    if(fastgen_ar_status EQUAL 0)
      set(fastgen_ar_status ON)
    else()
      set(fastgen_ar_status OFF)
    endif()
    set(FASTGEN_AR_HAS_D "${fastgen_ar_status}" CACHE INTERNAL "ar has the modifier D")
  endif()
  if(FASTGEN_AR_HAS_D)
    # The archive's index is written by q, so ranlib, whose -D is not everywhere, has nothing to add.
    set(CMAKE_CXX_ARCHIVE_CREATE "<CMAKE_AR> qcsD <TARGET> <LINK_FLAGS> <OBJECTS>")
    set(CMAKE_CXX_ARCHIVE_APPEND "<CMAKE_AR> qsD <TARGET> <LINK_FLAGS> <OBJECTS>")
    set(CMAKE_CXX_ARCHIVE_FINISH "")
  endif()
endmacro()

# A program of the build tree finds its libraries from where it lies: an absolute path there would leave
# its length behind in what is installed.
set(CMAKE_BUILD_RPATH_USE_ORIGIN ON)
