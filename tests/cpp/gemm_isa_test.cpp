// The matrix product against sums in double: every tile height, every format, ragged sizes, sources
// in any orientation. int8 results are integers and must be exact.
#include <cmath>
#include <cstring>
#include <vector>

#include "check.h"
#include "core/gemm.h"
#include "isas.h"

using namespace encdec;
using namespace encdec::ENCDEC_ISA_NAMESPACE;

namespace {

uint32_t state = 1;
float next() {  // in [-1, 1)
  state = state * 1664525u + 1013904223u;
  return static_cast<float>(static_cast<int32_t>(state)) / 2147483648.0f;
}

char* aligned(std::vector<char>& v) {
  return reinterpret_cast<char*>((reinterpret_cast<uintptr_t>(v.data()) + 63) & ~uintptr_t{63});
}

template <Format format>
double as_stored(float x) {  // what a number is after packing, int8 aside
  if (format == Format::kFloat32 || format == Format::kInt8) return x;
  alignas(64) float out[kLanes];
  store(out, format == Format::kBfloat16 ? from_bf16(to_bf16(set1(x))) : from_f16(to_f16(set1(x))));
  return out[0];
}

template <Format format, int NV>
void test_product(int64_t k, bool transposed) {
  const int columns = NV * kLanes - 3;  // the last vector is not full
  std::vector<float> w(static_cast<size_t>(columns * k));
  for (float& x : w) x = next();
  const auto weight = [&](int64_t c, int64_t i) {
    return w[static_cast<size_t>(transposed ? i * columns + c : c * k + i)];
  };
  std::vector<char> memory(static_cast<size_t>(packed_panel_bytes(format, k, NV)) + 64, 0x7f);
  std::vector<float> scale(NV * kLanes);
  std::vector<int32_t> start(NV * kLanes);
  PackedView view;
  view.data = aligned(memory);
  view.groups = round_up(k, group_size(format)) / group_size(format);
  view.panel_bytes = packed_panel_bytes(format, k, NV);
  view.start = start.data();
  view.scale = scale.data();
  const bool biased = format != Format::kInt8 && k % 3 != 0;
  std::vector<float> bias(NV * kLanes, 0.0f);
  if (biased) {
    for (float& b : bias) b = next();
    view.bias = bias.data();
  }
  const int64_t vector_bytes = kLanes * weight_group_bytes(format);
  for (int v = 0; v < NV; ++v) {
    const int64_t c = v * kLanes;
    pack_columns<format>(
        {reinterpret_cast<const char*>(w.data() + (transposed ? c : c * k)), Format::kFloat32,
         transposed ? 1 : k, transposed ? columns : 1, lanes_left(c, columns)},
        k, aligned(memory) + v * vector_bytes, NV * vector_bytes, scale.data() + c,
        start.data() + c);
  }

  for (int rows = 1; rows <= tile_rows(format, NV); ++rows) {
    std::vector<float> x(static_cast<size_t>(rows * k));
    for (float& value : x) value = next();
    const int64_t stride = staged_row_bytes(format, k);
    std::vector<char> staged(static_cast<size_t>(rows * stride) + 64, 0x7f);
    std::vector<float> row_scale(static_cast<size_t>(rows));
    for (int r = 0; r < rows; ++r) {
      row_scale[r] = stage_row<format>(reinterpret_cast<const char*>(x.data() + r * k),
                                       Format::kFloat32, k, aligned(staged) + r * stride);
    }
    std::vector<float> out(static_cast<size_t>(rows * NV * kLanes), NAN);
    multiply_rows<format, NV>(rows, view, 0, {aligned(staged), stride}, out.data(), NV * kLanes);
    // To ask for a panel, which need not be there, changes nothing.
    std::vector<float> asking(out.size(), NAN);
    multiply_rows<format, NV>(rows, view, 0, {aligned(staged), stride}, asking.data(), NV * kLanes,
                              false, {rows % 3, 3, rows % 2 == 0 ? 1 : -1});
    CHECK(std::memcmp(out.data(), asking.data(), out.size() * 4) == 0);
    for (int r = 0; r < rows; ++r) {
      for (int c = 0; c < NV * kLanes; ++c) {
        double sum = bias[c], size = std::fabs(sum);
        for (int64_t i = 0; i < k && c < columns; ++i) {
          double a = as_stored<format == Format::kFloat16 ? Format::kFloat32 : format>(
              x[static_cast<size_t>(r * k + i)]);
          double b = as_stored<format>(weight(c, i));
          if (format == Format::kInt8) {
            a = std::nearbyint(a * (1 / row_scale[r]));
            b = std::nearbyint(b / scale[c]);
          }
          sum += a * b;
          size += std::fabs(a * b);
        }
        // int8: a number within an ulp of a half may round either way in the model above.
        CHECK_NEAR(out[r * NV * kLanes + c], sum,
                   format == Format::kInt8 ? 254.5 : size * 2e-6 + 1e-30);
      }
    }
  }
}

template <Format format>
void test_format() {
  for (const int64_t k : {1, 2, 3, 4, 5, 31, 32, 33, 64, 100, 257}) {
    test_product<format, 2>(k, false);
    test_product<format, 3>(k, false);
    test_product<format, 2>(k, true);
  }
  test_product<format, 2>(2102, false);  // longer than one run of sums
}

// bfloat16 is packed without being widened: what comes out is what its numbers as floats give.
void test_bfloat16_as_it_lies() {
  for (const int64_t k : {1, 2, 15, 16, 17, 31, 32, 33, 47, 64, 129}) {
    for (const int lanes : {kLanes, kLanes - 3, 0}) {
      for (const bool transposed : {false, true}) {
        const size_t numbers = static_cast<size_t>(kLanes * k);
        std::vector<uint16_t> halves(numbers);
        std::vector<float> floats(numbers);
        for (size_t i = 0; i < numbers; ++i) {
          alignas(64) float wide[kLanes];
          const Half h = to_bf16(set1(next()));
          alignas(64) uint16_t narrow[kLanes];
          store_half(narrow, h);
          store(wide, from_bf16(h));
          halves[i] = narrow[0];
          floats[i] = wide[0];
        }
        std::vector<char> memory[2];
        for (int i = 0; i < 2; ++i) {
          memory[i].assign(static_cast<size_t>(packed_panel_bytes(Format::kBfloat16, k, 1)) + 64,
                           0x7f);
          const void* const from =
              i ? static_cast<const void*>(floats.data()) : static_cast<const void*>(halves.data());
          pack_columns<Format::kBfloat16>(
              {static_cast<const char*>(from), i ? Format::kFloat32 : Format::kBfloat16,
               transposed ? 1 : k, transposed ? kLanes : 1, lanes},
              k, aligned(memory[i]), kLanes * 4, nullptr, nullptr);
        }
        const size_t bytes = static_cast<size_t>(round_up(k, 2) * kLanes * 2);
        CHECK(std::memcmp(aligned(memory[0]), aligned(memory[1]), bytes) == 0);
      }
    }
  }
}

// Whole numbers have exact int8 forms, so the sums must be exact, saturation included: 255 x 127,
// with every pair of signs.
void test_int8_is_exact() {
  constexpr int64_t k = 1000;
  std::vector<float> w(kLanes * k);  // columns of 127 and of -127 in turn
  for (size_t i = 0; i < w.size(); ++i) w[i] = i / k % 2 == 0 ? 127.0f : -127.0f;
  std::vector<char> memory(static_cast<size_t>(packed_panel_bytes(Format::kInt8, k, 2)) + 64);
  std::vector<float> scale(2 * kLanes);
  std::vector<int32_t> start(2 * kLanes);
  for (int v = 0; v < 2; ++v) {
    pack_columns<Format::kInt8>(
        {reinterpret_cast<const char*>(w.data()), Format::kFloat32, k, 1, kLanes}, k,
        aligned(memory) + v * kLanes * 4, 2 * kLanes * 4, scale.data() + v * kLanes,
        start.data() + v * kLanes);
  }
  PackedView view{aligned(memory), k / 4, packed_panel_bytes(Format::kInt8, k, 2), start.data(),
                  scale.data()};
  std::vector<char> row(static_cast<size_t>(staged_row_bytes(Format::kInt8, k)) + 64);
  std::vector<float> x;
  for (const float number : {127.0f, -127.0f}) {
    x.assign(k, number);
    const float s = stage_row<Format::kInt8>(reinterpret_cast<const char*>(x.data()),
                                             Format::kFloat32, k, aligned(row));
    CHECK_EQ(s, 1.0f);
    for (const int rows : {1, tile_rows(Format::kInt8, 2)}) {
      std::vector<float> out(static_cast<size_t>(rows * 2 * kLanes));
      multiply_rows<Format::kInt8, 2>(rows, view, 0, {aligned(row), 0}, out.data(), 2 * kLanes);
      for (size_t i = 0; i < out.size(); ++i) {
        CHECK_EQ(out[i], (i % 2 == 0 ? number : -number) * 127.0f * k);
      }
    }
  }

  // A NaN or an infinity makes the row's scale NaN; a row of zeros has none.
  x[3] = INFINITY;
  CHECK(std::isnan(stage_row<Format::kInt8>(reinterpret_cast<const char*>(x.data()),
                                            Format::kFloat32, k, aligned(row))));
  x.assign(k, 0.0f);
  CHECK_EQ(stage_row<Format::kInt8>(reinterpret_cast<const char*>(x.data()), Format::kFloat32, k,
                                    aligned(row)),
           0.0f);
}

// With `onto` the product is added to what is there, however long it is.
template <Format format>
void test_onto() {
  for (const int64_t k : {40, 1100}) {
    std::vector<char> memory(static_cast<size_t>(packed_panel_bytes(format, k, 2)) + 64);
    const std::vector<float> ones(static_cast<size_t>(kLanes * k), 1.0f);
    for (int v = 0; v < 2; ++v) {
      pack_columns<format>(
          {reinterpret_cast<const char*>(ones.data()), Format::kFloat32, k, 1, kLanes}, k,
          aligned(memory) + v * kLanes * 4, 2 * kLanes * 4, nullptr, nullptr);
    }
    PackedView view{aligned(memory), round_up(k, group_size(format)) / group_size(format),
                    packed_panel_bytes(format, k, 2)};
    const std::vector<float> bias(2 * kLanes, 2.0f);
    if (k > 1000) view.bias = bias.data();
    const int rows = tile_rows(format, 2);
    std::vector<char> row(static_cast<size_t>(staged_row_bytes(format, k)) + 64);
    stage_row<format>(reinterpret_cast<const char*>(ones.data()), Format::kFloat32, k,
                      aligned(row));
    std::vector<float> out(static_cast<size_t>(rows * 2 * kLanes), 0.5f);
    multiply_rows<format, 2>(rows, view, 0, {aligned(row), 0}, out.data(), 2 * kLanes, true);
    const float before = view.bias ? 2.5f : 0.5f;
    for (const float value : out) CHECK_EQ(value, before + static_cast<float>(k));
  }
}

// Both products of multiply_beside are those of multiply_rows, bit for bit, however long each is.
template <Format format, int NV>
void test_beside(int64_t k, int64_t tile_k) {
  if constexpr (has_beside<format>) {
    struct Matrix {
      std::vector<char> memory;
      std::vector<float> scale;
      std::vector<int32_t> start;
      PackedView view;
      Matrix(int64_t panels, int64_t k) : scale(panels * NV * kLanes), start(panels * NV * kLanes) {
        const int64_t panel_bytes = packed_panel_bytes(format, k, NV);
        memory.resize(static_cast<size_t>(panels * panel_bytes) + 64);
        view = {aligned(memory), round_up(k, group_size(format)) / group_size(format), panel_bytes,
                start.data(), scale.data()};
        const int64_t vector_bytes = kLanes * weight_group_bytes(format);
        std::vector<float> w(static_cast<size_t>(kLanes * k) + 1);
        for (int64_t v = 0; v < panels * NV; ++v) {
          for (float& x : w) x = next();
          pack_columns<format>(
              {reinterpret_cast<const char*>(w.data()), Format::kFloat32, k, 1, kLanes}, k,
              aligned(memory) + v / NV * panel_bytes + v % NV * vector_bytes, NV * vector_bytes,
              scale.data() + v * kLanes, start.data() + v * kLanes);
        }
      }
    };
    constexpr int kPanels = kBesidePanels<NV>, kRows = kBesideRows<NV>, kWidth = NV * kLanes;
    Matrix w(kPanels + 1, k), tile_w(2, tile_k);
    std::vector<float> bias(w.scale.size());
    for (float& b : bias) b = next();
    if (format != Format::kInt8 && k % 2 == 1) w.view.bias = tile_w.view.bias = bias.data();
    const auto staged = [](std::vector<char>& room, int rows, int64_t k) {
      const int64_t stride = staged_row_bytes(format, k);
      room.resize(static_cast<size_t>(rows * stride) + 64);
      std::vector<float> x(static_cast<size_t>(k) + 1);
      for (int r = 0; r < rows; ++r) {
        for (float& value : x) value = next();
        stage_row<format>(reinterpret_cast<const char*>(x.data()), Format::kFloat32, k,
                          aligned(room) + r * stride);
      }
      return RowsView{aligned(room), stride};
    };
    std::vector<char> row_room, rows_room;
    const RowsView row = staged(row_room, 1, k), rows = staged(rows_room, kRows, tile_k);
    std::vector<float> out(kPanels * kWidth, NAN), tile_out(kRows * kWidth, NAN);
    multiply_beside<format, NV>(w.view, 1, row.data, out.data(),
                                {tile_w.view, 1, rows, tile_out.data(), kWidth});
    std::vector<float> alone(kPanels * kWidth, NAN), tile_alone(kRows * kWidth, NAN);
    for (int p = 0; p < kPanels; ++p) {
      multiply_rows<format, NV>(1, w.view, 1 + p, row, alone.data() + p * kWidth, kWidth);
    }
    multiply_rows<format, NV>(kRows, tile_w.view, 1, rows, tile_alone.data(), kWidth);
    CHECK(std::memcmp(out.data(), alone.data(), out.size() * 4) == 0);
    const bool same_order = !(amx_chosen && has_amx(format, NV));  // the matrix unit has its own
    if (same_order || format == Format::kInt8) {
      CHECK(std::memcmp(tile_out.data(), tile_alone.data(), tile_out.size() * 4) == 0);
    }
  }
}

template <Format format>
void test_beside() {
  const int64_t sizes[][2] = {{1, 1},    {5, 100},   {100, 5},     {33, 32},   {257, 1300},
                              {1300, 7}, {600, 600}, {1100, 2100}, {2100, 40}, {9, 0}};
  for (const auto& [k, tile_k] : sizes) {
    test_beside<format, 2>(k, tile_k);
    test_beside<format, 3>(k, tile_k);
  }
}

void test_row_tiles(int most, bool one_size) {
  for (int64_t rows = 0; rows < 200; ++rows) {
    const RowTiles tiles(rows, most, one_size);
    CHECK_EQ(tiles.count, (rows + most - 1) / most);
    CHECK_EQ(tiles.begin(tiles.count), rows);
    for (int64_t i = 0; i < tiles.count; ++i) {
      const int64_t n = tiles.begin(i + 1) - tiles.begin(i);
      const bool last = i + 1 == tiles.count;
      CHECK(n >= 1 && n <= most);
      CHECK(n == tiles.size || (one_size ? last : n == tiles.size + 1));
    }
  }
}

void test_row_tiles() {
  for (const int most : {6, 14, 32}) {
    for (const bool one_size : {false, true}) test_row_tiles(most, one_size);
  }
  // Only what the matrix unit multiplies has one size.
  for (const Format format : {Format::kFloat32, Format::kBfloat16, Format::kInt8}) {
    const int most = tile_rows(format, 2);
    const RowTiles tiles(3 * most + 1, format, 2);
    CHECK_EQ(tiles.count, 4);
    CHECK_EQ(tiles.longer > 0, !amx_multiplies(format));
  }
}

void test_products() {
  test_format<Format::kFloat32>();
  test_format<Format::kBfloat16>();
  test_format<Format::kFloat16>();
  test_format<Format::kInt8>();
  test_bfloat16_as_it_lies();
  test_int8_is_exact();
  test_onto<Format::kFloat32>();
  test_onto<Format::kBfloat16>();
  test_beside<Format::kFloat32>();
  test_beside<Format::kBfloat16>();
  test_beside<Format::kFloat16>();
  test_beside<Format::kInt8>();
}

}  // namespace

void run_tests() {
  test_products();
  test_row_tiles();
  if (kIsa == Isa::kAvx512Bf16 && use_isa(Isa::kAvx512Amx)) {
    test_products();
    amx_release();
  }
}
