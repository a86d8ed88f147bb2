# What Python loads: _C, and the ops that register themselves with torch.
set(PYBIND11_FINDPYTHON ON)
encdec_package_dir(pybind11 pybind11_package)
find_package(pybind11 2.13 CONFIG REQUIRED HINTS ${pybind11_package}/share/cmake/pybind11)

pybind11_add_module(_C MODULE NO_EXTRAS csrc/python/module.cpp csrc/python/generation.cpp)
target_link_libraries(_C PRIVATE encdec_core)

# What build_info() says, as a header.
string(TOUPPER "${CMAKE_BUILD_TYPE}" build_type)
string(STRIP "${CMAKE_CXX_FLAGS} ${CMAKE_CXX_FLAGS_${build_type}}" ENCDEC_ALL_FLAGS)
foreach(isa IN LISTS ENCDEC_ISAS)
  list(JOIN ENCDEC_FLAGS_${isa} " " flags)
  string(APPEND ENCDEC_ALL_FLAGS ", ${isa}: ${flags}")
endforeach()
configure_file(csrc/python/build_config.h.in generated/build_config.h)
target_include_directories(_C PRIVATE ${CMAKE_BINARY_DIR}/generated)
set_target_properties(_C PROPERTIES BUILD_WITH_INSTALL_RPATH ON INSTALL_RPATH "$ORIGIN/lib")
install(TARGETS encdec_core LIBRARY DESTINATION lib)
install(TARGETS _C LIBRARY DESTINATION .)

file(GLOB binding_sources CONFIGURE_DEPENDS ${CMAKE_SOURCE_DIR}/csrc/*/*_binding.cpp)
list(FILTER binding_sources EXCLUDE REGEX "_cuda_binding\\.cpp$")
if(binding_sources)
  if(NOT EXISTS "${ENCDEC_TORCH}/include/torch/csrc/stable/library.h")
    message(FATAL_ERROR
      "The ops of encdec_fast are compiled against torch >= 2.10 (any later one can load them), and "
      "${Python_EXECUTABLE} has none. Install torch there and build with "
      "`pip install --no-build-isolation`, or set ENCDEC_TORCH_DIR. "
      "The core alone needs no torch: -DENCDEC_BUILD_PYTHON=OFF.")
  endif()
  add_library(encdec_ops SHARED ${binding_sources})
  encdec_torch_library(encdec_ops)
  target_compile_options(encdec_ops PRIVATE -fvisibility=hidden)
  target_link_options(encdec_ops PRIVATE -Wl,-z,defs)
  install(TARGETS encdec_ops LIBRARY DESTINATION lib)
endif()
