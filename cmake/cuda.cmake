# CUDA kernels: csrc/*/*_cuda.cu and their bindings, as libencdec_ops_cuda.so. Neither a GPU nor a
# CUDA build of torch is needed to build it; a CUDA build of torch is to load it.
#
#   ENCDEC_CUDA=ON    built and installed; an error without nvcc
#   AUTO              the same where there is an nvcc and torch is a CUDA build; where there is only
#                     an nvcc, `cmake --build DIR --target encdec_ops_cuda` builds it, for tests
#   OFF               no such target
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*/*_cuda.cu)
file(GLOB cuda_binding_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*/*_cuda_binding.cpp)
set(ENCDEC_CUDA_FOUND OFF)
# Binaries of these, and PTX of 9.0 for what is newer than the toolkit. Compute capability 9.0a and
# 10.0a are those of Hopper and of the Blackwell of data centers.
set(ENCDEC_CUDA_ARCHITECTURES 80-real 86-real 89-real 90a-real 100a-real 120-real 90-virtual
    CACHE STRING "What CUDA kernels are compiled for, as in CMAKE_CUDA_ARCHITECTURES")

if(NOT ENCDEC_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "ENCDEC_CUDA is '${ENCDEC_CUDA}'; it must be AUTO, ON or OFF.")
endif()
if(ENCDEC_CUDA STREQUAL "ON" OR (ENCDEC_CUDA STREQUAL "AUTO" AND ENCDEC_BUILD_PYTHON))
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER)
    set(CMAKE_CUDA_ARCHITECTURES ${ENCDEC_CUDA_ARCHITECTURES})
    enable_language(CUDA)
  elseif(ENCDEC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ENCDEC_CUDA=ON needs nvcc, and there is none in PATH or CUDACXX. "
                        "Install the CUDA toolkit, or build with ENCDEC_CUDA=OFF.")
  endif()
endif()
if(CMAKE_CUDA_COMPILER AND EXISTS ${ENCDEC_TORCH}/version.py)
  file(STRINGS ${ENCDEC_TORCH}/version.py torch_cuda REGEX "^cuda.*=.*'[0-9.]+'")
  if(ENCDEC_CUDA STREQUAL "ON" OR torch_cuda)
    set(ENCDEC_CUDA_FOUND ON)
    string(REGEX MATCH "^[0-9]+\\.[0-9]+" ENCDEC_CUDA_VERSION ${CMAKE_CUDA_COMPILER_VERSION})
  endif()
endif()

# What `make test` compiles; nothing without nvcc.
add_custom_target(cuda_kernels)
if(CMAKE_CUDA_COMPILER AND ENCDEC_TORCH)
  add_dependencies(cuda_kernels encdec_ops_cuda)
  set(CMAKE_CUDA_STANDARD 17)
  set(CMAKE_CUDA_STANDARD_REQUIRED ON)
  set(CMAKE_CUDA_FLAGS_RELEASE "-O3 -DNDEBUG")
  # A CPU build of torch has none of these two libraries. Empty ones stand for them while linking:
  # what counts is that the loader is told their names, and finds torch's own.
  file(CONFIGURE OUTPUT ${CMAKE_BINARY_DIR}/generated/empty.cpp CONTENT "")
  foreach(name IN ITEMS torch_cuda c10_cuda)
    add_library(encdec_stub_${name} SHARED EXCLUDE_FROM_ALL ${CMAKE_BINARY_DIR}/generated/empty.cpp)
    set_target_properties(encdec_stub_${name} PROPERTIES OUTPUT_NAME ${name}
                          LIBRARY_OUTPUT_DIRECTORY ${CMAKE_BINARY_DIR}/stubs)
  endforeach()
  add_library(encdec_ops_cuda SHARED ${cuda_sources} ${cuda_binding_sources})
  encdec_torch_library(encdec_ops_cuda)
  target_include_directories(encdec_ops_cuda PRIVATE ${CMAKE_SOURCE_DIR}/csrc)
  target_compile_definitions(encdec_ops_cuda PRIVATE USE_CUDA)
  target_compile_options(encdec_ops_cuda PRIVATE
    $<$<COMPILE_LANGUAGE:CUDA>:--expt-relaxed-constexpr -Xcompiler -fvisibility=hidden>
    $<$<COMPILE_LANGUAGE:CXX>:-fvisibility=hidden>)
  # -z defs would ask the empty libraries for what torch's have.
  target_link_libraries(encdec_ops_cuda PRIVATE -Wl,--no-as-needed encdec_stub_torch_cuda
                        encdec_stub_c10_cuda)
  set_target_properties(encdec_ops_cuda PROPERTIES CUDA_RUNTIME_LIBRARY Static)
  if(ENCDEC_CUDA_FOUND)
    install(TARGETS encdec_ops_cuda LIBRARY DESTINATION lib)
  else()
    set_target_properties(encdec_ops_cuda PROPERTIES EXCLUDE_FROM_ALL ON)
  endif()
endif()
