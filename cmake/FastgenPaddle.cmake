# The op library for Paddle, and the C++ program that runs an export with it.
#
#   -DFASTGEN_PADDLE=ON             the target decoding_op: lib/libdecoding_op.so
#   -DON_INFER=ON                   and the target gpt_paddle: bin/fastgen-gpt-paddle
#   -DPADDLE_LIB=<dir>              against Paddle's C++ inference package (it holds paddle/include
#                                   and paddle/lib) ...
#   -DPY_CMD=<python>               ... or else against the Paddle wheel of this Python
#
# Both builds have the same sources. Python needs none of this: fastgen.jit builds the op on first
# use.
set(PADDLE_LIB "" CACHE PATH "Directory of Paddle's C++ inference package")
set(PY_CMD "python3" CACHE STRING "Python whose Paddle wheel is used without PADDLE_LIB")
option(FASTGEN_PADDLE "Build the Paddle op library" OFF)
option(ON_INFER "Build the op library and the C++ program that runs exports with Paddle" OFF)

# Sets in the caller's scope: paddle_include (list), paddle_library, paddle_common, paddle_build and
# paddle_headers, which tells the two C++ interfaces apart: "inference" or "jit".
function(fastgen_find_inference_package)
  set(include "${PADDLE_LIB}/paddle/include")
  set(library "${PADDLE_LIB}/paddle/lib/libpaddle_inference.so")
  foreach(file IN ITEMS "${include}/paddle_inference_api.h" "${library}")
    if(NOT EXISTS "${file}")
      message(FATAL_ERROR "PADDLE_LIB is '${PADDLE_LIB}': a C++ inference package of Paddle has "
                          "${file}")
    endif()
  endforeach()
  set(commit "unknown")
  if(EXISTS "${PADDLE_LIB}/version.txt")
    file(STRINGS "${PADDLE_LIB}/version.txt" commit REGEX "GIT COMMIT ID" LIMIT_COUNT 1)
    string(REGEX REPLACE "^.*: *" "" commit "${commit}")
  endif()
  set(common "${PADDLE_LIB}/paddle/lib/libcommon.so")
  if(NOT EXISTS "${common}")
    set(common "${library}")
  endif()
  set(paddle_include "${include}" "${include}/third_party" PARENT_SCOPE)
  set(paddle_library "${library}" PARENT_SCOPE)
  set(paddle_common "${common}" PARENT_SCOPE)
  set(paddle_build "paddle=inference;commit=${commit};cuda=False" PARENT_SCOPE)
  set(paddle_headers inference PARENT_SCOPE)
endfunction()

function(fastgen_find_wheel)
  # One fact a line. Paddle itself is not imported, which would take seconds.
  set(script
      "import importlib.util, pathlib, runpy, sysconfig"
      "folder = pathlib.Path(importlib.util.find_spec('paddle').submodule_search_locations[0])"
      "version = runpy.run_path(str(folder / 'version' / '__init__.py'))"
      "print(folder)"
      "print('paddle=%s;commit=%s;cuda=%s' % tuple("
      "    version[name] for name in ('full_version', 'commit', 'cuda_version')))"
      "get = sysconfig.get_config_var"
      "print(pathlib.Path(get('LIBDIR')) / get('INSTSONAME'))")
  string(REPLACE ";" "\n" script "${script}")
  # The list separator inside the strings above was turned into a line break too.
  string(REPLACE "%s\ncommit=%s\ncuda=%s" "%s;commit=%s;cuda=%s" script "${script}")
  execute_process(
    COMMAND "${PY_CMD}" -c "${script}"
    RESULT_VARIABLE status
    OUTPUT_VARIABLE output
    ERROR_VARIABLE error)
  if(NOT status EQUAL 0)
    message(FATAL_ERROR "PY_CMD is '${PY_CMD}': it must be a Python with Paddle, or PADDLE_LIB must "
                        "name a C++ inference package: ${status} ${error}")
  endif()
  string(REPLACE ";" "\\;" output "${output}")
  string(REGEX REPLACE "\n+$" "" output "${output}")
  string(REPLACE "\n" ";" lines "${output}")
  list(GET lines 0 folder)
  list(GET lines 1 build)
  list(GET lines 2 python)
  # Paddle 2.5 has its core in paddle/fluid, and nothing of it in a library of its own.
  set(library "${folder}/base/libpaddle.so")
  if(NOT EXISTS "${library}")
    set(library "${folder}/fluid/libpaddle.so")
  endif()
  set(common "${folder}/libs/libcommon.so")
  if(NOT EXISTS "${common}")
    set(common "${library}")
  endif()
  set(paddle_include "${folder}/include" "${folder}/include/third_party" PARENT_SCOPE)
  set(paddle_library "${library}" PARENT_SCOPE)
  set(paddle_common "${common}" PARENT_SCOPE)
  set(paddle_build "${build}" PARENT_SCOPE)
  set(paddle_python "${python}" PARENT_SCOPE)
  set(paddle_libs "${folder}/libs" PARENT_SCOPE)
  set(paddle_headers jit PARENT_SCOPE)
endfunction()

# Which std::string Paddle was built with.
function(fastgen_paddle_abi library result)
  file(STRINGS "${library}" found REGEX "__cxx1112basic_string" LIMIT_COUNT 1)
  if(found STREQUAL "")
    set(${result} 0 PARENT_SCOPE)
  else()
    set(${result} 1 PARENT_SCOPE)
  endif()
endfunction()

if(FASTGEN_PADDLE OR ON_INFER)
  if(PADDLE_LIB)
    fastgen_find_inference_package()
  else()
    fastgen_find_wheel()
  endif()
  fastgen_paddle_abi("${paddle_common}" paddle_abi)
  message(STATUS "Paddle: ${paddle_library} (${paddle_build}, C++11 ABI ${paddle_abi})")

  # Paddle's checks keep the names of its headers.
  list(GET paddle_include 0 paddle_include_root)
  fastgen_map_paths("${paddle_include_root}" paddle/include)

  add_library(fastgen_paddle INTERFACE)
  target_include_directories(fastgen_paddle SYSTEM INTERFACE ${paddle_include})
  target_compile_definitions(
    fastgen_paddle INTERFACE "_GLIBCXX_USE_CXX11_ABI=${paddle_abi}" PADDLE_WITH_CUSTOM_KERNEL)
  target_compile_features(fastgen_paddle INTERFACE cxx_std_17)

  file(GLOB op_sources CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/paddle/*.cc")
  add_library(decoding_op MODULE ${op_sources})
  # By a file, because a definition cannot have semicolons here.
  set(build_header "${CMAKE_CURRENT_BINARY_DIR}/fastgen_paddle_build.h")
  file(CONFIGURE OUTPUT "${build_header}" CONTENT "#define FASTGEN_PADDLE_BUILD \"${paddle_build}\"\n")
  target_compile_options(decoding_op PRIVATE "SHELL:-include '${build_header}'")
  # -w: the warnings are those of Paddle's headers.
  target_compile_options(decoding_op PRIVATE -w)
  set_target_properties(decoding_op PROPERTIES PREFIX lib CXX_VISIBILITY_PRESET hidden)
  target_link_libraries(
    decoding_op PRIVATE fastgen_paddle fastgen "-Wl,--no-as-needed" "${paddle_library}"
                        "-Wl,--as-needed" ${CMAKE_DL_LIBS})
  install(TARGETS decoding_op LIBRARY DESTINATION "${CMAKE_INSTALL_LIBDIR}")
endif()

if(ON_INFER)
  # fastgen.json is read by the engine's own reader, which libfastgen does not export, and text by the
  # tokenizer that comes with it: whole rooms, so that a new file in one of them is linked too.
  file(GLOB gpt_paddle_rooms CONFIGURE_DEPENDS
       "${CMAKE_CURRENT_SOURCE_DIR}/csrc/base/*.cc" "${CMAKE_CURRENT_SOURCE_DIR}/csrc/io/*.cc"
       "${CMAKE_CURRENT_SOURCE_DIR}/csrc/text/*.cc")
  add_executable(
    gpt_paddle
    csrc/apps/gpt_paddle.cc
    csrc/apps/paddle_program.cc
    csrc/apps/paddle_program_${paddle_headers}.cc
    csrc/engine/config.cc
    ${gpt_paddle_rooms})
  add_dependencies(gpt_paddle decoding_op)
  set_target_properties(gpt_paddle PROPERTIES OUTPUT_NAME fastgen-gpt-paddle)
  target_include_directories(gpt_paddle PRIVATE csrc csrc/include)
  target_compile_options(gpt_paddle PRIVATE -Wall -Wextra)
  target_compile_definitions(gpt_paddle PRIVATE FASTGEN_STATIC)
  set_source_files_properties(
    csrc/apps/gpt_paddle.cc PROPERTIES COMPILE_DEFINITIONS
                                       "FASTGEN_OP_LIBRARY=\"$<TARGET_FILE:decoding_op>\"")
  target_link_libraries(gpt_paddle PRIVATE fastgen_paddle "${paddle_library}" Threads::Threads
                                           ${CMAKE_DL_LIBS})
  if(paddle_headers STREQUAL jit)
    # libpaddle.so is a Python extension, which takes the interpreter's symbols from the process.
    target_link_libraries(gpt_paddle PRIVATE "-Wl,--no-as-needed" "${paddle_python}"
                                             "-Wl,--as-needed" "-Wl,-rpath-link,${paddle_libs}")
    # Builds for GPUs have much of libpaddle.so in a library of its own.
    if(EXISTS "${paddle_libs}/libphi.so")
      target_link_libraries(gpt_paddle PRIVATE "${paddle_libs}/libphi.so")
    endif()
  endif()
  install(TARGETS gpt_paddle RUNTIME DESTINATION "${CMAKE_INSTALL_BINDIR}")
endif()
