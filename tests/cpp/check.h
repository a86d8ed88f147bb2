// A test file defines run_tests(), which calls its checks; main() is in check.cpp.
//
//   void run_tests() {
//     CHECK(team.size() > 0);
//     CHECK_EQ(packed.columns(), 48);
//     CHECK_NEAR(y[i], reference(i), 1e-6);
//     CHECK_THROWS(chosen(), std::runtime_error);
//   }
//
// A failed check prints its place and values and goes on. Checks may run in several threads. All
// functions here are static or defined in check.cpp: a test compiled for AVX-512 must not lend code
// to one that is not.
#pragma once

void run_tests();

namespace check {

// Counts the check; prints `what` and its place when it failed.
void record(bool ok, const char* file, int line, const char* what);
void record_values(bool ok, const char* file, int line, const char* what, double a, double b,
                   double tolerance);

// NaN is near nothing, infinities only to themselves.
static inline bool near(double a, double b, double tolerance) {
  const double difference = a > b ? a - b : b - a;
  return a == b || difference <= tolerance;
}

// Makes `worst` the larger of the two; a NaN stays, whatever comes behind it.
static inline void raise(double& worst, double error) {
  if (worst == worst && !(error <= worst)) worst = error;
}

}  // namespace check

#define CHECK(condition) check::record(bool(condition), __FILE__, __LINE__, #condition)

#define CHECK_NEAR(a, b, tolerance)                                                               \
  do {                                                                                            \
    const double check_a = double(a), check_b = double(b), check_t = double(tolerance);           \
    check::record_values(check::near(check_a, check_b, check_t), __FILE__, __LINE__, #a " ~ " #b, \
                         check_a, check_b, check_t);                                              \
  } while (false)

// Numbers are compared as they are and printed as doubles.
#define CHECK_EQ(a, b)                                                                          \
  do {                                                                                          \
    const auto check_a = (a);                                                                   \
    const auto check_b = (b);                                                                   \
    check::record_values(check_a == check_b, __FILE__, __LINE__, #a " == " #b, double(check_a), \
                         double(check_b), 0.0);                                                 \
  } while (false)

#define CHECK_THROWS(expression, Exception)                                             \
  do {                                                                                  \
    bool check_thrown = false;                                                          \
    try {                                                                               \
      (void)(expression);                                                               \
    } catch (const Exception&) {                                                        \
      check_thrown = true;                                                              \
    }                                                                                   \
    check::record(check_thrown, __FILE__, __LINE__, #expression " throws " #Exception); \
  } while (false)
