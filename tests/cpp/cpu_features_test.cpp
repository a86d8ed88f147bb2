#include "core/cpu_features.h"

#include <cstdlib>
#include <cstring>
#include <stdexcept>

#include "check.h"
#include "core/amx.h"

using encdec::Isa;

void run_tests() {
  CHECK(std::strcmp(encdec::isa_name(Isa::kAvx2), "avx2") == 0);
  CHECK(std::strcmp(encdec::isa_name(Isa::kAvx512), "avx512") == 0);
  CHECK(std::strcmp(encdec::isa_name(Isa::kAvx512Bf16), "avx512_bf16") == 0);
  CHECK(std::strcmp(encdec::isa_name(Isa::kAvx512Amx), "avx512_amx") == 0);

  // A newer instruction set contains the older ones.
  CHECK(!encdec::isa_supported(Isa::kAvx512) || encdec::isa_supported(Isa::kAvx2));
  CHECK(!encdec::isa_supported(Isa::kAvx512Bf16) || encdec::isa_supported(Isa::kAvx512));
  CHECK(!encdec::isa_supported(Isa::kAvx512Amx) || encdec::isa_supported(Isa::kAvx512Bf16));

  // The compiler's own runtime reads the same processor.
  CHECK_EQ(encdec::isa_supported(Isa::kAvx2),
           bool(__builtin_cpu_supports("avx2") && __builtin_cpu_supports("fma")));
  CHECK_EQ(encdec::isa_supported(Isa::kAvx512),
           bool(__builtin_cpu_supports("avx512f") && __builtin_cpu_supports("avx512bw") &&
                __builtin_cpu_supports("avx512vl") && __builtin_cpu_supports("avx512dq")));

  // A refused choice is not remembered; one that was made is.
  setenv("ENCDEC_FAST_ISA", "mmx", 1);
  CHECK_THROWS(encdec::chosen_isa(), std::runtime_error);
  setenv("ENCDEC_FAST_ISA", "", 1);
  Isa newest = Isa::kAvx2;
  for (const Isa isa : encdec::kAllIsas) {
    if (encdec::isa_supported(isa)) newest = isa;
  }
  if (encdec::isa_supported(Isa::kAvx2)) {
    CHECK(encdec::chosen_isa() == newest);
    CHECK_EQ(encdec::amx_chosen, newest == Isa::kAvx512Amx);
    setenv("ENCDEC_FAST_ISA", "mmx", 1);
    CHECK(encdec::chosen_isa() == newest);
  } else {
    CHECK_THROWS(encdec::chosen_isa(), std::runtime_error);
  }

  CHECK(!encdec::cpu_model().empty());
  CHECK(!encdec::cpu_flags_of_interest().empty());
  const encdec::CacheSizes caches = encdec::cache_sizes();
  CHECK(caches.l1d >= 8 << 10 && caches.l1d <= 1 << 20);
  CHECK(caches.l2 >= caches.l1d);
  CHECK(caches.l3 > 0);
}
