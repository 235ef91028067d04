# libfastgen_cuda: the CUDA device, a library that libfastgen opens when device="cuda" is asked for.
#
#   -DFASTGEN_CUDA=ON                        builds it; needs nvcc (CMAKE_CUDA_COMPILER or on PATH), 10.2 or newer
#   -DFASTGEN_CUDA_ARCHITECTURES="80;90a"    instead of all that the toolkit and the kernels know

include_guard()

# Compute capabilities of this toolkit that the kernels serve; the last one is kept as PTX as well, for
# devices that come after it.
function(fastgen_cuda_architectures result version)
  set(list)
  if(version VERSION_LESS 13.0)
    list(APPEND list 70)
  endif()
  list(APPEND list 75)
  if(NOT version VERSION_LESS 11.1)
    list(APPEND list 80 86)
  endif()
  if(NOT version VERSION_LESS 11.8)
    list(APPEND list 89 90)
  endif()
  if(NOT version VERSION_LESS 12.8)
    list(APPEND list 100 120)
  endif()
  list(GET list -1 newest)
  list(TRANSFORM list APPEND "-real")
  list(APPEND list ${newest}-virtual)
  set(${result} ${list} PARENT_SCOPE)
endfunction()

# Makes the targets fastgen_cuda and, for the tests, fastgen_cuda_ops.
function(fastgen_add_cuda)
  if(NOT FASTGEN_CUDA_ARCHITECTURES)
    fastgen_cuda_architectures(architectures ${CMAKE_CUDA_COMPILER_VERSION})
  else()
    set(architectures ${FASTGEN_CUDA_ARCHITECTURES})
  endif()
  if(NOT CMAKE_CUDA_COMPILER_VERSION VERSION_LESS 12.0)
    # 90a is the same devices with the instructions that no later architecture has; PTX stays 90's.
    list(TRANSFORM architectures REPLACE "^90-real$" "90a-real")
    list(TRANSFORM architectures REPLACE "^90$" "90a-real;90-virtual")
  endif()
  message(STATUS "libfastgen_cuda: CUDA ${CMAKE_CUDA_COMPILER_VERSION}, architectures ${architectures}")
  file(GLOB kernels CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cu")
  file(GLOB host CONFIGURE_DEPENDS "${CMAKE_CURRENT_SOURCE_DIR}/csrc/cuda/*.cc")

  add_library(fastgen_cuda_kernels OBJECT ${kernels})
  set_target_properties(
    fastgen_cuda_kernels
    PROPERTIES CUDA_ARCHITECTURES "${architectures}"
               CUDA_STANDARD 14 # what nvcc of CUDA 10.2 takes
               CUDA_STANDARD_REQUIRED ON
               CUDA_EXTENSIONS OFF
               CUDA_VISIBILITY_PRESET hidden
               POSITION_INDEPENDENT_CODE ON)
  target_include_directories(fastgen_cuda_kernels PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc")
  if(FASTGEN_CUDA_STAMPS)
    target_compile_definitions(fastgen_cuda_kernels PRIVATE FASTGEN_CUDA_STAMPS=1)
  endif()

  add_library(fastgen_cuda SHARED ${host} $<TARGET_OBJECTS:fastgen_cuda_kernels>)
  target_include_directories(
    fastgen_cuda PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc" "${CMAKE_CURRENT_SOURCE_DIR}/csrc/include"
                         ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
  target_compile_definitions(fastgen_cuda PRIVATE FASTGEN_VERSION="${PROJECT_VERSION}")
  target_compile_options(fastgen_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Wall -Wextra>)
  if(FASTGEN_WERROR)
    target_compile_options(fastgen_cuda PRIVATE $<$<COMPILE_LANGUAGE:CXX>:-Werror>)
  endif()
  set(exports "${CMAKE_CURRENT_SOURCE_DIR}/cmake/fastgen_cuda.map")
  # The CUDA run-time library is inside, so that it may differ from the application's.
  set_target_properties(
    fastgen_cuda
    PROPERTIES CUDA_RUNTIME_LIBRARY Static
               LINKER_LANGUAGE CXX
               CXX_STANDARD 17
               CXX_STANDARD_REQUIRED ON
               CXX_EXTENSIONS OFF
               CXX_VISIBILITY_PRESET hidden
               VISIBILITY_INLINES_HIDDEN ON
               POSITION_INDEPENDENT_CODE ON
               LINK_DEPENDS "${exports}")
  find_package(CUDAToolkit REQUIRED)
  target_link_libraries(fastgen_cuda PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
  target_link_options(fastgen_cuda PRIVATE "-Wl,--version-script=${exports}" -Wl,--no-undefined)

  if(FASTGEN_CUDA_OPS)
    add_library(fastgen_cuda_ops SHARED "${CMAKE_CURRENT_SOURCE_DIR}/tests/cuda/ops.cc"
                                        $<TARGET_OBJECTS:fastgen_cuda_kernels>)
    target_include_directories(
      fastgen_cuda_ops PRIVATE "${CMAKE_CURRENT_SOURCE_DIR}/csrc"
                               ${CMAKE_CUDA_TOOLKIT_INCLUDE_DIRECTORIES})
    set_target_properties(fastgen_cuda_ops PROPERTIES LINKER_LANGUAGE CXX CXX_STANDARD 17)
    target_link_libraries(fastgen_cuda_ops PRIVATE CUDA::cudart_static ${CMAKE_DL_LIBS})
  endif()
endfunction()
