#include "core/cpu_features.h"

#include <cpuid.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <cstdint>
#include <cstdlib>
#include <fstream>
#include <stdexcept>

#include "core/amx.h"

namespace encdec {
namespace {

struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};

// Zeros where the processor has no such leaf.
Registers cpuid(uint32_t leaf, uint32_t subleaf) {
  Registers r;
  if (__get_cpuid_count(leaf, subleaf, &r.eax, &r.ebx, &r.ecx, &r.edx) == 0) return Registers{};
  return r;
}

// The register states that the operating system saves when it switches threads (XCR0).
uint64_t saved_states() {
  constexpr uint32_t kOsxsave = 1u << 27;
  if ((cpuid(1, 0).ecx & kOsxsave) == 0) return 0;
  uint32_t low = 0, high = 0;
  __asm__ volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return (static_cast<uint64_t>(high) << 32) | low;
}

struct Feature {
  const char* name;
  bool present;
};

enum FeatureIndex {
  kSse42,
  kF16c,
  kFma,
  kAvx2Feature,
  kAvx512f,
  kAvx512dq,
  kAvx512bw,
  kAvx512vl,
  kAvx512vnni,
  kAvx512bf16,
  kAvx512fp16,
  kAvxVnni,
  kAmxTile,
  kAmxBf16,
  kAmxInt8,
  kFeatureCount
};

struct Features {
  Feature list[kFeatureCount];

  bool has(FeatureIndex index) const { return list[index].present; }
};

Features read_features() {
  const Registers one = cpuid(1, 0);
  const Registers seven = cpuid(7, 0);
  const Registers seven_one = seven.eax >= 1 ? cpuid(7, 1) : Registers{};
  const uint64_t saved = saved_states();
  const bool ymm = (saved & 0x6) == 0x6;            // SSE and AVX state
  const bool zmm = ymm && (saved & 0xe0) == 0xe0;   // masks, upper halves, registers 16 to 31
  const bool tiles = (saved & 0x60000) == 0x60000;  // AMX configuration and data
  const auto bit = [](uint32_t word, int n) { return ((word >> n) & 1u) != 0; };
  Features f{};
  f.list[kSse42] = {"sse4_2", bit(one.ecx, 20)};
  f.list[kF16c] = {"f16c", ymm && bit(one.ecx, 29)};
  f.list[kFma] = {"fma", ymm && bit(one.ecx, 12)};
  f.list[kAvx2Feature] = {"avx2", ymm && bit(seven.ebx, 5)};
  f.list[kAvx512f] = {"avx512f", zmm && bit(seven.ebx, 16)};
  f.list[kAvx512dq] = {"avx512dq", zmm && bit(seven.ebx, 17)};
  f.list[kAvx512bw] = {"avx512bw", zmm && bit(seven.ebx, 30)};
  f.list[kAvx512vl] = {"avx512vl", zmm && bit(seven.ebx, 31)};
  f.list[kAvx512vnni] = {"avx512_vnni", zmm && bit(seven.ecx, 11)};
  f.list[kAvx512bf16] = {"avx512_bf16", zmm && bit(seven_one.eax, 5)};
  f.list[kAvx512fp16] = {"avx512_fp16", zmm && bit(seven.edx, 23)};
  f.list[kAvxVnni] = {"avx_vnni", ymm && bit(seven_one.eax, 4)};
  f.list[kAmxTile] = {"amx_tile", tiles && bit(seven.edx, 24)};
  f.list[kAmxBf16] = {"amx_bf16", tiles && bit(seven.edx, 22)};
  f.list[kAmxInt8] = {"amx_int8", tiles && bit(seven.edx, 25)};
  return f;
}

const Features& features() {
  static const Features found = read_features();
  return found;
}

// The registers of the matrix unit take 8 kB of every signal's frame, so Linux gives them only to
// processes that ask (Documentation/arch/x86/xstate.rst), and refuses where a thread's alternative
// signal stack has no room for that.
bool tiles_permitted() {
  constexpr long kRequestPermission = 0x1023, kTileData = 18;
  static const bool permitted = syscall(SYS_arch_prctl, kRequestPermission, kTileData) == 0;
  return permitted;
}

std::string names_of_isas(bool only_supported) {
  std::string names;
  for (const Isa isa : kAllIsas) {
    if (only_supported && !isa_supported(isa)) continue;
    if (!names.empty()) names += ", ";
    names += isa_name(isa);
  }
  return names.empty() ? "none of them" : names;
}

Isa choose_isa() {
  const char* forced = std::getenv("ENCDEC_FAST_ISA");
  if (forced != nullptr && *forced != '\0') {
    for (const Isa isa : kAllIsas) {
      if (std::string(forced) != isa_name(isa)) continue;
      if (isa_supported(isa)) return isa;
      throw std::runtime_error("ENCDEC_FAST_ISA=" + std::string(forced) + ": this processor (" +
                               cpu_model() + ") does not support it; it supports " +
                               names_of_isas(true));
    }
    throw std::runtime_error("ENCDEC_FAST_ISA=" + std::string(forced) +
                             ": unknown instruction set; it must be one of " +
                             names_of_isas(false));
  }
  for (int i = static_cast<int>(sizeof(kAllIsas) / sizeof(kAllIsas[0])) - 1; i >= 0; --i) {
    if (isa_supported(kAllIsas[i])) return kAllIsas[i];
  }
  throw std::runtime_error("the kernels of encdec_fast need a processor with AVX2, FMA and F16C; " +
                           cpu_model() + " lacks them");
}

// The size of the first core's cache of that level (and not one for instructions), 0 if unknown.
size_t cache_size(int wanted_level) {
  for (int index = 0; index < 8; ++index) {
    const std::string folder =
        "/sys/devices/system/cpu/cpu0/cache/index" + std::to_string(index) + "/";
    int level = 0;
    std::string type;
    size_t size = 0;
    char unit = '\0';
    std::ifstream(folder + "level") >> level;
    std::ifstream(folder + "type") >> type;
    std::ifstream(folder + "size") >> size >> unit;
    if (level != wanted_level || type == "Instruction") continue;
    return size << (unit == 'K' ? 10 : unit == 'M' ? 20 : 0);
  }
  return 0;
}

}  // namespace

const char* isa_name(Isa isa) {
  switch (isa) {
    case Isa::kAvx2:
      return "avx2";
    case Isa::kAvx512:
      return "avx512";
    case Isa::kAvx512Bf16:
      return "avx512_bf16";
    case Isa::kAvx512Amx:
      return "avx512_amx";
  }
  return "unknown";
}

bool isa_supported(Isa isa) {
  const Features& f = features();
  const bool avx2 = f.has(kAvx2Feature) && f.has(kFma) && f.has(kF16c);
  const bool avx512 =
      avx2 && f.has(kAvx512f) && f.has(kAvx512dq) && f.has(kAvx512bw) && f.has(kAvx512vl);
  const bool bf16 = avx512 && f.has(kAvx512bf16) && f.has(kAvx512vnni);
  switch (isa) {
    case Isa::kAvx2:
      return avx2;
    case Isa::kAvx512:
      return avx512;
    case Isa::kAvx512Bf16:
      return bf16;
    case Isa::kAvx512Amx:
      return bf16 && f.has(kAmxBf16) && f.has(kAmxInt8) && tiles_permitted();
  }
  return false;
}

Isa chosen_isa() {
  static const Isa chosen = [] {
    const Isa found = choose_isa();
    amx_chosen = found == Isa::kAvx512Amx;
    return found;
  }();
  return chosen;
}

std::string cpu_model() {
  std::string model;
  if (cpuid(0x80000000u, 0).eax >= 0x80000004u) {
    for (uint32_t leaf = 0x80000002u; leaf <= 0x80000004u; ++leaf) {
      const Registers r = cpuid(leaf, 0);
      for (const uint32_t word : {r.eax, r.ebx, r.ecx, r.edx}) {
        for (int byte = 0; byte < 4; ++byte) {
          const char c = static_cast<char>((word >> (8 * byte)) & 0xff);
          if (c != '\0') model += c;
        }
      }
    }
  }
  const size_t first = model.find_first_not_of(' ');
  if (first == std::string::npos) return "an unnamed x86-64 processor";
  return model.substr(first, model.find_last_not_of(' ') - first + 1);
}

std::vector<std::string> cpu_flags_of_interest() {
  std::vector<std::string> names;
  for (const Feature& feature : features().list) {
    if (feature.present) names.emplace_back(feature.name);
  }
  return names;
}

CacheSizes cache_sizes() {
  const auto known_or = [](size_t size, size_t usual) { return size != 0 ? size : usual; };
  static const CacheSizes found{known_or(cache_size(1), size_t{32} << 10),
                                known_or(cache_size(2), size_t{512} << 10),
                                known_or(cache_size(3), size_t{8} << 20)};
  return found;
}

int64_t within_l2(int64_t bytes) {
  constexpr int64_t kChosenFor = int64_t{1} << 20;
  const int64_t l2 = static_cast<int64_t>(cache_sizes().l2);
  return l2 < kChosenFor ? bytes * l2 / kChosenFor : bytes;
}

}  // namespace encdec
