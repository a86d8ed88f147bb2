// The decode step in one launch, run on the CPU with threads in random order: every barrier and
// fence is needed. What it computes is compared with torch in tests/test_decode_step.py.
#include "generation/decode_step_gpu.h"

#include <cmath>
#include <cstdio>
#include <string>
#include <vector>

#include "buffers.h"
#include "check.h"
#include "core/gpu.cuh"

using namespace encdec;
using namespace encdec::generation::gpu;
namespace on_cpu = encdec::gpu::cpu;

namespace {

struct Decoder {
  static constexpr int kR = 2, kS = 5, kE = 8, kH = 16, kM = 8, kA = 8, kV = 13, kLayers = 2;
  std::vector<float> embedding = random_floats(kV * kE), query = random_floats(kA * kH),
                     score = random_floats(kA), keys = random_floats(kR * kS * kA),
                     values = random_floats(kR * kS * kM), output = random_floats(kV * (kH + kM)),
                     h0 = random_floats(kLayers * kR * kH), c0 = random_floats(kLayers * kR * kH),
                     context0 = random_floats(kR * kM);
  std::vector<float> input[kLayers] = {random_floats(4 * kH * (kE + kM)),
                                       random_floats(4 * kH * (kH + kM))};
  std::vector<float> hidden[kLayers] = {random_floats(4 * kH * kH), random_floats(4 * kH * kH)};
  std::vector<int64_t> tokens = {3, 11}, parents = {1, 0}, lengths = {5, 2};

  struct Results {
    std::vector<float> h, c, context, logits, weights;
  };

  Results run(int blocks) {
    Results r{h0, c0, context0, std::vector<float>(kR * kV), std::vector<float>(kR * kS)};
    DecodeStep s{};
    s.cell = rnn::Cell::kLstm;
    s.attention = Attention::kAdditive;
    s.context_in_output = true;
    s.layers = kLayers, s.R = kR, s.K = 1, s.S = kS, s.E = kE, s.H = kH, s.M = kM, s.A = kA;
    s.V = kV;
    s.tokens = tokens.data(), s.parents = parents.data(), s.lengths = lengths.data();
    s.embedding = embedding.data();
    for (int i = 0; i < kLayers; ++i) {
      s.layer[i].input = input[i].data(), s.layer[i].hidden = hidden[i].data();
    }
    s.query = query.data(), s.score = score.data(), s.keys = keys.data(), s.values = values.data();
    s.output = output.data();
    s.h = r.h.data(), s.c = r.c.data(), s.context = r.context.data();
    s.logits = r.logits.data(), s.weights = r.weights.data();
    uint32_t arrived = 0;
    std::vector<float> left(static_cast<size_t>(between(s).count), NAN);
    s.arrived = &arrived, s.between = left.data();
    decode_step(s, Format::kFloat32, blocks, nullptr);
    return r;
  }
};

bool same(const Decoder::Results& a, const Decoder::Results& b) {
  const std::vector<float>*mine[] = {&a.h, &a.c, &a.context, &a.logits, &a.weights},
        *theirs[] = {&b.h, &b.c, &b.context, &b.logits, &b.weights};
  for (int i = 0; i < 5; ++i) {
    for (size_t j = 0; j < mine[i]->size(); ++j) {
      if (!check::near((*mine[i])[j], (*theirs[i])[j], 1e-6)) return false;
    }
  }
  return true;
}

void test_every_order_gives_the_same() {
  Decoder decoder;
  on_cpu::options() = {};
  const auto expected = decoder.run(3);
  for (uint64_t seed = 2; seed < 20; ++seed) {
    on_cpu::options().seed = seed;
    CHECK(same(expected, decoder.run(1 + static_cast<int>(seed % 4))));
  }
}

// That every barrier and fence is needed, on three blocks or on one, which has both rows' attention
// to do, one after the other.
void test_mutations() {
  Decoder decoder;
  on_cpu::options() = {};
  const auto expected = decoder.run(3);
  const auto right = [&] {
    return same(expected, decoder.run(on_cpu::options().seed % 2 == 0 ? 3 : 1));
  };
  for (const std::string& site : on_cpu::not_needed(right, 60)) {
    std::printf("nothing shows that %s is needed\n", site.c_str());
    CHECK(false);
  }
  CHECK(on_cpu::options().sites.size() >= 8);
  on_cpu::options() = {};
}

void test_refusals() {
  DecodeStep s{};
  s.cell = rnn::Cell::kLstm;
  s.layers = 1, s.R = 8, s.K = 1, s.S = 100, s.E = s.H = s.M = s.A = 512, s.V = 1000;
  s.attention = Attention::kDot;
  CHECK(refuse(s, 232448).empty());
  CHECK(refuse(s, 1024).find("shared memory") != std::string::npos);
  s.R = 9;
  CHECK(refuse(s, 232448).find("at most 8 rows") != std::string::npos);
  s.R = 1, s.E = 12;
  CHECK(refuse(s, 232448).find("multiples of 8") != std::string::npos);
  s.E = 8, s.cell = rnn::Cell::kTanh;
  CHECK(refuse(s, 232448).find("LSTM and GRU") != std::string::npos);
}

}  // namespace

void run_tests() {
  test_refusals();
  test_every_order_gives_the_same();
  test_mutations();
}
