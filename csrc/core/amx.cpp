#include "core/amx.h"

#include <cstring>

namespace encdec {

bool amx_chosen = false;

namespace {

constexpr int64_t kLine = 64;  // bytes of k in a tile's row; 16 sums

// The tile registers: 0 to 3 hold sums, 4 and 5 rows, 6 and 7 weights. Written in assembly, because
// the intrinsics of the compilers take the register's number as a literal only.
template <int tile>
inline void zero_tile() {
  asm volatile("tilezero %%tmm%c0" : : "i"(tile));
}
template <int tile>
inline void load_tile(const char* from, int64_t stride) {
  asm volatile("tileloadd (%0,%1,1), %%tmm%c2" : : "r"(from), "r"(stride), "i"(tile) : "memory");
}
template <int tile>
inline void store_tile(char* to, int64_t stride) {
  asm volatile("tilestored %%tmm%c2, (%0,%1,1)" : : "r"(to), "r"(stride), "i"(tile) : "memory");
}
template <bool int8, int sums, int rows, int weights>
inline void multiply_tiles() {
  if constexpr (int8) {  // unsigned rows, signed weights
    asm volatile("tdpbusd %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(weights));
  } else {
    asm volatile("tdpbf16ps %%tmm%c2, %%tmm%c1, %%tmm%c0" : : "i"(sums), "i"(rows), "i"(weights));
  }
}

// What LDTILECFG reads (Intel 64 and IA-32 Architectures Software Developer's Manual, volume 1,
// section 18.3).
struct alignas(64) TileConfig {
  uint8_t palette = 1, start_row = 0;
  uint8_t reserved[14] = {};
  uint16_t row_bytes[16] = {};
  uint8_t rows[16] = {};
};

// Rows that this thread's tiles are configured for; 0: they are not. A configuration takes as long
// as some ten instructions on tiles, so it stays until other rows come.
thread_local int configured __attribute__((tls_model("initial-exec"))) = 0;

void configure(int rows) {
  TileConfig c;
  const int upper = rows < kAmxTile ? rows : kAmxTile;
  const int lower = rows > kAmxTile ? rows - kAmxTile : rows;
  const int of[8] = {upper, upper, lower, lower, upper, lower, kAmxTile, kAmxTile};
  for (int i = 0; i < 8; ++i) {
    c.rows[i] = static_cast<uint8_t>(of[i]);
    c.row_bytes[i] = kLine;
  }
  asm volatile("ldtilecfg %0" : : "m"(c));
  configured = rows;
}

// The last groups of k, fewer than a step, with zeros behind them.
struct Rest {
  alignas(64) char x[2 * kAmxTile * kLine];
  alignas(64) char weights[kAmxStepGroups * 3 * kLine];

  Rest(const AmxProduct& p, int64_t done) {
    const size_t left = static_cast<size_t>(p.groups - done) * 4;
    std::memset(x, 0, static_cast<size_t>(p.rows * kLine));
    for (int r = 0; r < p.rows; ++r) {
      std::memcpy(x + r * kLine, p.x + r * p.x_stride + done * 4, left);
    }
    const size_t there = static_cast<size_t>((p.groups - done) * p.vectors * kLine);
    std::memcpy(weights, p.weights + done * p.vectors * kLine, there);
    std::memset(weights + there, 0, sizeof(weights) - there);
  }
};

// How a product is laid over the tiles: `step` adds the products of one step to the sums. Up to 16
// rows, two of a panel's `vectors` of columns:
template <bool int8, int vectors = 2>
struct OneByTwo {
  static void step(const char* x, int64_t stride, const char* w) {
    load_tile<6>(w, vectors * kLine);
    load_tile<4>(x, stride);
    multiply_tiles<int8, 0, 4, 6>();
    load_tile<7>(w + kLine, vectors * kLine);
    multiply_tiles<int8, 1, 4, 7>();
  }
  static void store(char* out, int64_t stride) {
    store_tile<0>(out, stride);
    store_tile<1>(out + kLine, stride);
  }
};

template <bool int8>
struct TwoByTwo {  // up to 32 rows
  static void step(const char* x, int64_t stride, const char* w) {
    OneByTwo<int8>::step(x, stride, w);
    load_tile<5>(x + kAmxTile * stride, stride);
    multiply_tiles<int8, 2, 5, 6>();
    multiply_tiles<int8, 3, 5, 7>();
  }
  static void store(char* out, int64_t stride) {
    OneByTwo<int8>::store(out, stride);
    store_tile<2>(out + kAmxTile * stride, stride);
    store_tile<3>(out + kAmxTile * stride + kLine, stride);
  }
};

template <bool int8>
struct OneByThree {
  static void step(const char* x, int64_t stride, const char* w) {
    OneByTwo<int8, 3>::step(x, stride, w);
    load_tile<6>(w + 2 * kLine, 3 * kLine);
    multiply_tiles<int8, 2, 4, 6>();
  }
  static void store(char* out, int64_t stride) {
    OneByTwo<int8, 3>::store(out, stride);
    store_tile<2>(out + 2 * kLine, stride);
  }
};

template <class Tiling>
void run(const AmxProduct& p) {
  zero_tile<0>();
  zero_tile<1>();
  zero_tile<2>();
  zero_tile<3>();
  const int64_t whole = p.groups / kAmxStepGroups * kAmxStepGroups;
  const int64_t weight_bytes = p.vectors * kLine;
  for (int64_t g = 0; g < whole; g += kAmxStepGroups) {
    for (int line = p.ahead_first; line < p.ahead_end; ++line) {
      __builtin_prefetch(p.ahead + g * weight_bytes + line * kLine, 0, 2);
    }
    Tiling::step(p.x + g * 4, p.x_stride, p.weights + g * weight_bytes);
  }
  if (whole < p.groups) {
    const Rest rest(p, whole);
    Tiling::step(rest.x, kLine, rest.weights);
  }
  Tiling::store(p.out, p.out_stride);
}

template <bool int8>
void run_any(const AmxProduct& p) {
  if (p.vectors == 3) {
    run<OneByThree<int8>>(p);
  } else if (p.rows <= kAmxTile) {
    run<OneByTwo<int8>>(p);
  } else {
    run<TwoByTwo<int8>>(p);
  }
}

template <bool int8>
void probe(int64_t rounds) {
  for (int64_t i = 0; i < rounds; ++i) {
    multiply_tiles<int8, 0, 4, 6>();
    multiply_tiles<int8, 1, 4, 7>();
    multiply_tiles<int8, 2, 5, 6>();
    multiply_tiles<int8, 3, 5, 7>();
  }
}

#if defined(__SANITIZE_ADDRESS__)
// The sanitizer does not see what instructions in assembly touch: the ends of all that they do.
void touch(const AmxProduct& p) {
  const auto read = [](const char* at) { (void)*static_cast<const volatile char*>(at); };
  for (int r = 0; r < p.rows; ++r) {
    volatile char* const out = p.out + r * p.out_stride;
    out[0] = out[p.vectors * kLine - 1] = 0;
    if (p.groups == 0) continue;
    read(p.x + r * p.x_stride);
    read(p.x + r * p.x_stride + p.groups * 4 - 1);
  }
  if (p.groups == 0) return;
  read(p.weights);
  read(p.weights + p.groups * p.vectors * kLine - 1);
}
#endif

}  // namespace

void amx_multiply(const AmxProduct& p) {
#if defined(__SANITIZE_ADDRESS__)
  touch(p);
#endif
  if (configured != p.rows) configure(p.rows);
  p.int8 ? run_any<true>(p) : run_any<false>(p);
}

void amx_release() {
  if (configured == 0) return;
  asm volatile("tilerelease");
  configured = 0;
}

int64_t amx_probe(bool int8, int64_t rounds) {
  configure(2 * kAmxTile);  // its tiles are zeros
  int8 ? probe<true>(rounds) : probe<false>(rounds);
  return rounds * 4 * kAmxTile * kAmxTile * (int8 ? kLine : kLine / 2);
}

}  // namespace encdec
