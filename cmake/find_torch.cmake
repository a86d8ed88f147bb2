# The Python that the build is for, and in ENCDEC_TORCH the folder of its torch, empty without one.
find_package(Python 3.10 REQUIRED COMPONENTS Interpreter Development.Module)

# Asks the Python found where one of its packages lies, without importing it.
function(encdec_package_dir package result)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; \
s = u.find_spec('${package}'); print(s.submodule_search_locations[0] if s else '')"
    OUTPUT_VARIABLE dir OUTPUT_STRIP_TRAILING_WHITESPACE)
  set(${result} "${dir}" PARENT_SCOPE)
endfunction()

set(ENCDEC_TORCH "${ENCDEC_TORCH_DIR}")
if(NOT ENCDEC_TORCH)
  encdec_package_dir(torch ENCDEC_TORCH)
endif()

# Compiles and links a library of ops over torch's stable ABI: any torch from the oldest one on.
function(encdec_torch_library target)
  target_include_directories(${target} SYSTEM PRIVATE ${ENCDEC_TORCH}/include)
  target_compile_definitions(${target} PRIVATE TORCH_TARGET_VERSION=0x020a000000000000)
  # torch is loaded before this library, so its SONAMEs are enough. The path to it, as it lies beside
  # an installed encdec_fast, is for tools such as ldd and auditwheel.
  target_link_libraries(${target} PRIVATE encdec_core ${ENCDEC_TORCH}/lib/libtorch.so
                        ${ENCDEC_TORCH}/lib/libtorch_cpu.so ${ENCDEC_TORCH}/lib/libc10.so)
  target_link_options(${target} PRIVATE -Wl,--as-needed)
  set_target_properties(${target} PROPERTIES BUILD_WITH_INSTALL_RPATH ON
                        INSTALL_RPATH "$ORIGIN;$ORIGIN/../../torch/lib")
endfunction()
