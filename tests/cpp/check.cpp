// The main() of every C++ test. It is compiled for any x86-64, and runs tests of one instruction
// set (ENCDEC_TEST_ISA, a name) only where the processor has it.
#include "check.h"

#include <atomic>
#include <cstdio>
#include <cstring>

#include "core/cpu_features.h"

namespace {

std::atomic<long> passed{0};
std::atomic<long> failed{0};
constexpr long kMaxPrinted = 20;  // one broken kernel fails in every element: the first few say it

bool count(bool ok) {
  if (ok) {
    ++passed;
    return false;
  }
  return ++failed <= kMaxPrinted;
}

#ifdef ENCDEC_TEST_ISA
bool has_isa(const char* name) {
  for (const encdec::Isa isa : encdec::kAllIsas) {
    if (std::strcmp(encdec::isa_name(isa), name) == 0) return encdec::isa_supported(isa);
  }
  return false;
}
#endif

}  // namespace

void check::record(bool ok, const char* file, int line, const char* what) {
  if (count(ok)) std::printf("%s:%d: FAILED: %s\n", file, line, what);
}

void check::record_values(bool ok, const char* file, int line, const char* what, double a, double b,
                          double tolerance) {
  if (!count(ok)) return;
  std::printf("%s:%d: FAILED: %s: %.9g and %.9g differ by %.3g", file, line, what, a, b, a - b);
  if (tolerance > 0) std::printf(", allowed %.3g", tolerance);
  std::printf("\n");
}

int main() {
#ifdef ENCDEC_TEST_ISA
  if (!has_isa(ENCDEC_TEST_ISA)) {
    std::printf("skipped: this processor has no %s\n", ENCDEC_TEST_ISA);
    return 0;
  }
#endif
  run_tests();
  std::printf("%ld passed, %ld failed\n", passed.load(), failed.load());
  return failed == 0 && passed > 0 ? 0 : 1;
}
