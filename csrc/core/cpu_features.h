// What the processor can do, and which of the compiled instruction sets is used.
#pragma once

#include <cstddef>
#include <cstdint>
#include <string>
#include <vector>

namespace encdec {

// The instruction sets that kernels are compiled for, from the oldest to the newest. The build
// (cmake/isa.cmake) compiles each kernel once for each, in the namespace that isa_name() says.
// The last one has no kernels of its own: those of kAvx512Bf16 then hand products of bf16 and int8
// to the matrix unit (amx.h), which reads the same packed matrices.
enum class Isa { kAvx2, kAvx512, kAvx512Bf16, kAvx512Amx };

constexpr Isa kAllIsas[] = {Isa::kAvx2, Isa::kAvx512, Isa::kAvx512Bf16, Isa::kAvx512Amx};

// "avx2", "avx512", "avx512_bf16" or "avx512_amx".
const char* isa_name(Isa isa);

// The instruction set whose compiled kernels, and packed matrices, `isa` uses.
constexpr Isa compiled_isa(Isa isa) { return isa == Isa::kAvx512Amx ? Isa::kAvx512Bf16 : isa; }

// Whether this processor has everything that `isa` is compiled for, and the operating system saves
// its registers: those of the matrix unit only for a process that asked, as this function does.
bool isa_supported(Isa isa);

// The newest supported instruction set, or the one that the environment variable ENCDEC_FAST_ISA
// names. The variable is read in the first call; an empty one counts as unset. Throws
// std::runtime_error when it names none of them or one that is not supported, and when the
// processor has not even AVX2: there is nothing to run then, and asking again throws again.
Isa chosen_isa();

// As the processor calls itself: "AMD EPYC 9755 128-Core Processor".
std::string cpu_model();

// Those features that matter to a kernel and that this processor has: {"avx2", "fma", …}.
std::vector<std::string> cpu_flags_of_interest();

// Bytes of the caches that the first core sees. Where the system does not say, small usual sizes,
// so that a plan may divide by them.
struct CacheSizes {
  size_t l1d;
  size_t l2;
  size_t l3;
};
CacheSizes cache_sizes();

// A size that was chosen for an L2 of 1 MB: less where this processor's is smaller, in proportion.
int64_t within_l2(int64_t bytes);

}  // namespace encdec
