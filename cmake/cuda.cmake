# CUDA kernels: csrc/*/*_cuda.cu, for libencdec_ops_cuda.so. There are none yet; this decides whether
# they will be built, in ENCDEC_CUDA_FOUND, so that build_info() and setup.py can already speak of it.
file(GLOB cuda_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*/*_cuda.cu)
set(ENCDEC_CUDA_FOUND OFF)

if(NOT ENCDEC_CUDA MATCHES "^(AUTO|ON|OFF)$")
  message(FATAL_ERROR "ENCDEC_CUDA is '${ENCDEC_CUDA}'; it must be AUTO, ON or OFF.")
endif()
if(ENCDEC_CUDA STREQUAL "ON" OR (ENCDEC_CUDA STREQUAL "AUTO" AND cuda_sources))
  include(CheckLanguage)
  check_language(CUDA)
  if(CMAKE_CUDA_COMPILER AND cuda_sources)
    enable_language(CUDA)
    set(ENCDEC_CUDA_FOUND ON)
  elseif(CMAKE_CUDA_COMPILER)
    message(STATUS "encdec_fast: there is an nvcc, but this version has no CUDA kernels")
  elseif(ENCDEC_CUDA STREQUAL "ON")
    message(FATAL_ERROR "ENCDEC_CUDA=ON needs nvcc, and there is none in PATH or CUDACXX. "
                        "Install the CUDA toolkit, or build with ENCDEC_CUDA=OFF.")
  endif()
endif()
