# The instruction sets that kernels are compiled for, from the oldest to the newest. The names are
# those of encdec::Isa (csrc/core/cpu_features.h), and each is the namespace of its code.
set(ENCDEC_ISAS avx2 avx512 avx512_bf16)
set(ENCDEC_FLAGS_avx2 -mavx2 -mfma -mf16c)
set(ENCDEC_FLAGS_avx512 -mavx512f -mavx512bw -mavx512vl -mavx512dq -mfma -mf16c
                        -mprefer-vector-width=512)
set(ENCDEC_FLAGS_avx512_bf16 ${ENCDEC_FLAGS_avx512} -mavx512bf16 -mavx512vnni)

# Compiles sources for one instruction set. The definition names the namespace that all their code
# must live in; tests/test_build.py looks for what escapes from it.
function(encdec_isa_objects target isa)
  add_library(${target} OBJECT ${ARGN})
  target_link_libraries(${target} PRIVATE encdec_options)
  target_compile_definitions(${target} PRIVATE ENCDEC_ISA_NAMESPACE=${isa})
  # Loops start at a cache line: one of 85 bytes that lies across three lines of decoded instructions
  # instead of two is slower by a fifth to a third where two threads share a core (Zen 3).
  # What is silenced is noise here: vector types as template arguments and their ABI, and GCC's own
  # intrinsics, which start from a register that they leave undefined on purpose.
  target_compile_options(${target} PRIVATE ${ENCDEC_FLAGS_${isa}} -fvisibility=hidden
                         -falign-loops=64
                         -Wno-psabi -Wno-ignored-attributes
                         -Wno-uninitialized -Wno-maybe-uninitialized)
endfunction()
