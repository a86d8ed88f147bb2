// The persistent kernel of recurrent layers: all steps in one launch. rnn_gpu.h says how it is cut.
//
// An Op is a cell in one direction, and tells what is its own:
//
//   Number, Call            its dtype, its arguments (Forward or Backward)
//   kGates                  products per hidden unit; kPublished: numbers per unit sent around
//   weights(gate, segment, unit)     a unit's weights for that product, of that segment's H numbers
//   Inputs, load(element)   what an element needs beside the products: asked for ahead of time
//   finish(element, sums, inputs, previous, carry, published)   the cell itself
//   is_above, is_below, input_row, handed   of layers that share a launch; forward only
//
// An element is one hidden unit of one sequence. `carry` is a float of it that stays in the block:
// the cell state, or its gradient.
#pragma once

#include <stdexcept>
#include <string>

#include "core/gpu.cuh"
#include "core/gpu_launch.cuh"
#include "rnn/recurrence_exchange.cuh"
#include "rnn/recurrence_products.cuh"
#include "rnn/rnn_gpu.h"

namespace encdec::rnn::gpu {

struct Element {
  int unit;      // hidden unit
  int sequence;  // in the order of lengths
  int t;
  int length;
  bool real;    // the sequence has a step t
  bool inside;  // there are such a unit and such a sequence
  int64_t row, place;
  int64_t
      place_ahead;  // of the step that the kernel takes next: in backward, where its state is from
};

// Where a group is in its steps. Reading starts[] for a step ahead keeps one load off the chain.
class Walk {
 public:
  __device__ Walk(const Steps& steps, int longest, bool ascending)
      : steps_(steps), longest_(longest), ascending_(ascending), next_(start_of(t(0))) {
    advance(0);
  }

  __device__ int t(int step) const { return ascending_ ? step : longest_ - 1 - step; }

  __device__ void advance(int step) {
    now_ = next_;
    next_ = start_of(t(step + 1));
  }

  // own: the sequence's number in the caller's order.
  __device__ int64_t row(int step, int sequence, int own) const {
    return steps_.starts == nullptr ? padded(t(step), own) : now_ + sequence;
  }

  // Of this step, or (ahead = 1) of the one that follows in the kernel's order.
  __device__ int64_t place(int step, int sequence, int own, int ahead) const {
    const bool packed = steps_.starts != nullptr && steps_.order == nullptr;
    return packed ? (ahead ? next_ : now_) + sequence : padded(t(step + ahead), own);
  }

 private:
  __device__ int64_t padded(int t, int own) const {
    return t * steps_.step + own * steps_.sequence;
  }

  __device__ int64_t start_of(int t) const {
    return steps_.starts != nullptr && t >= 0 && t < steps_.T ? steps_.starts[t] : 0;
  }

  const Steps& steps_;
  const int longest_;
  const bool ascending_;
  int64_t now_ = 0, next_;
};

// Sixteen bytes of the numbers that neighbouring lanes have, for each of these lanes.
template <class T>
__device__ inline Quad gather(T value, int lane) {
  uint32_t first;
  if constexpr (sizeof(T) == 4) {
    first = float_to_bits(value);
  } else {
    const uint32_t own = value.bits, other = shuffle_xor(own, 1);
    first = lane & 1 ? other | own << 16 : own | other << 16;
    lane >>= 1;
  }
  constexpr int kNear = sizeof(T) == 4 ? 1 : 2;
  const uint32_t second = shuffle_xor(first, kNear);
  const uint32_t low = lane & 1 ? second : first, high = lane & 1 ? first : second;
  const uint32_t low2 = shuffle_xor(low, 2 * kNear), high2 = shuffle_xor(high, 2 * kNear);
  return lane & 2 ? Quad{{low2, high2, low, high}} : Quad{{low, high, low2, high2}};
}

// A lane's part of a tile of weights, of the rows that row(segment, unit) finds. Rows are whole
// quads, so that a quad lies in one row, or past its end.
template <class T, class Products, class Row>
__device__ inline Tile fetch(int H, int first_unit, int tile, int segment_width, int lane,
                             Row row) {
  Tile found;
#pragma unroll
  for (int part = 0; part < 2; ++part) {
    const int unit = first_unit + Products::row(lane, part);
    const int column =
        (tile * kTileBytes + Products::byte(lane, part)) / static_cast<int>(sizeof(T));
    const int segment = column / segment_width, k = column % segment_width;
    found.part[part] = Quad{};
    if (unit < H && k < H) {
      found.part[part] = *reinterpret_cast<const Quad*>(row(segment, unit) + k);
    }
  }
  return found;
}

// Tiles that a warp keeps in shared memory, a lane's parts of each; `stored` is the lane's place.
__device__ inline void store_tile(Quad* stored, int i, const Tile& w) {
  stored[2 * i * kWarp] = w.part[0];
  stored[(2 * i + 1) * kWarp] = w.part[1];
}
template <int kGates>
__device__ inline void load_tiles(Tile (&w)[kGates], const Quad* stored, int i) {
#pragma unroll
  for (int g = 0; g < kGates; ++g) {
    const int at = 2 * (i * kGates + g);
    w[g] = {{stored[at * kWarp], stored[(at + 1) * kWarp]}};
  }
}

// A number of a unit, added up over the warps of its row group.
__device__ inline float add_parts(const float* part, int warps, int stride) {
  float sum = 0.0f;
  for (int k = 0; k < warps; ++k) sum += part[k * stride];
  return sum;
}

// What one block does.
template <class Op, class Products, class Exchange>
__device__ inline void run_block(const typename Op::Call& call, const Plan& plan,
                                 const SharedLayout& at, char* exchange_memory,
                                 int first_sequence) {
  using T = typename Op::Number;
  constexpr int kGates = Op::kGates;
  constexpr int kKept = resident_tiles(sizeof(T)) / kGates;
  constexpr int kPeers = 16 / sizeof(T);  // lanes that share a quad
  const Steps& steps = call.steps;
  const int lane = threadIdx.x % kWarp, warp = threadIdx.x / kWarp;
  const int row_group = warp / plan.k_groups, k_group = warp % plan.k_groups;
  const int units = plan.row_groups * kUnits, q = blockIdx.z;
  const int d = Op::direction_of(call, q);
  const int gate_stride = plan.chunk * kPartialStride;  // of partial sums
  const int base = first_sequence + blockIdx.y * plan.slice;
  const int rows = min(plan.slice, steps.B - base);
  const int block_unit = blockIdx.x * units, first_unit = block_unit + row_group * kUnits;
  const int segment_width = at.width / Op::kPublished;
  const Op op(call, q, d);

  char* const memory = shared_memory();
  float* const partials = reinterpret_cast<float*>(memory + at.partials);
  float* const partials_below = reinterpret_cast<float*>(memory + at.partials_below);
  float* const carries = reinterpret_cast<float*>(memory + at.carry);
  int* const lengths = reinterpret_cast<int*>(memory + at.sequences);
  int* const own_numbers = lengths + plan.slice;
  const int slices = (steps.B + plan.slice - 1) / plan.slice;
  const Group group{memory,
                    exchange_memory,
                    q * slices + base / plan.slice,
                    slices * static_cast<int>(gridDim.z),
                    plan.blocks,
                    rows,
                    plan.slice,
                    Op::kPublished * ((steps.H + kPeers - 1) / kPeers) * 16};
  Exchange exchange(group, at);

  // Everything that stays: lengths, the first state, the weights.
  const int buffers = Exchange::kCluster ? 2 : 1;
  for (int i = threadIdx.x; i < buffers * at.state_bytes / 16; i += blockDim.x) {
    reinterpret_cast<Quad*>(memory + at.state)[i] = Quad{};
  }
  for (int n = threadIdx.x; n < rows; n += blockDim.x) {
    lengths[n] = steps.lengths == nullptr ? steps.T : min(steps.lengths[base + n], steps.T);
    own_numbers[n] = steps.order == nullptr ? base + n : static_cast<int>(steps.order[base + n]);
  }
  for (int i = threadIdx.x; i < rows * units; i += blockDim.x) {
    const int unit = block_unit + i % units;
    const int64_t own = (static_cast<int64_t>(q) * steps.B + base + i / units) * steps.H + unit;
    carries[i] = unit < steps.H && op.carry() != nullptr ? op.carry()[own] : 0.0f;
  }
  sync_block();
  if (op.first_state() != nullptr) {
    const T* const from = op.first_state() + (static_cast<int64_t>(q) * steps.B + base) * steps.H;
    for (int i = threadIdx.x; i < rows * steps.H; i += blockDim.x) {
      char* const row = memory + at.state + i / steps.H * at.row_bytes;
      reinterpret_cast<T*>(row)[i % steps.H] = from[i];
    }
  }
  const int mine = (at.tiles - k_group + plan.k_groups - 1) / plan.k_groups;  // tiles of this warp
  const auto fetch_of = [&](int i, int g) {
    const auto row = [&](int segment, int unit) { return op.weights(g, segment, unit); };
    const int tile = k_group + i * plan.k_groups;
    return fetch<T, Products>(steps.H, first_unit, tile, segment_width, lane, row);
  };
  Tile kept[kKept][kGates];
#pragma unroll
  for (int i = 0; i < kKept; ++i) {
#pragma unroll
    for (int g = 0; g < kGates; ++g) kept[i][g] = i < mine ? fetch_of(i, g) : Tile{};
  }
  Quad* const spilled = reinterpret_cast<Quad*>(memory + at.weights) +
                        warp * (at.spilled + at.below) * kGates * 2 * kWarp + lane;
  for (int i = kKept; i < mine; ++i) {
    for (int g = 0; g < kGates; ++g) store_tile(spilled, (i - kKept) * kGates + g, fetch_of(i, g));
  }
  // What is left of a launch of layers: the weights of the product with the layer below.
  Quad* const below = spilled + at.spilled * kGates * 2 * kWarp;
  char* const handed = memory + at.handed;
  // Worked out where they are used: there are no registers to keep them in.
  const auto is_above = [&] {
    if constexpr (Op::kBackward)
      return false;
    else
      return op.is_above();
  };
  const auto is_below = [&] {
    if constexpr (Op::kBackward)
      return false;
    else
      return op.is_below();
  };
  if constexpr (!Op::kBackward) {
    if (op.is_above()) {
      for (int i = 0; i < mine; ++i) {
        for (int g = 0; g < kGates; ++g) {
          const auto row = [&](int, int unit) { return op.input_row(kGates, g, unit); };
          const int tile = k_group + i * plan.k_groups;
          const Tile w = fetch<T, Products>(steps.H, first_unit, tile, segment_width, lane, row);
          store_tile(below, i * kGates + g, w);
        }
      }
      for (int i = threadIdx.x; i < at.state_bytes / 16; i += blockDim.x) {
        reinterpret_cast<Quad*>(handed)[i] = Quad{};
      }
    }
  }
  exchange.start();

  const int longest = lengths[0];
  int count = longest + op.extra_steps();
  // A row group past the last unit sends nothing, so nobody would wait for it: it could sleep
  // through a phase of its barrier and then wait for ever. (Elsewhere all threads meet in each
  // step.)
  if (Exchange::kCluster && !is_above() && !is_below() && first_unit >= steps.H) count = 0;
  Walk walk(steps, longest, Op::kBackward == (d == 1));
  // Worked out where it is used, twice: what it consists of would not fit beside the weights.
  const auto number_of = [&](int pass) {
    return static_cast<int>(opaque((k_group + pass * plan.k_groups) * kWarp + lane));
  };
  const auto element_of = [&](int step, int chunk, int e) {
    const int n = chunk + e / kUnits;
    Element element;
    element.unit = first_unit + e % kUnits;
    element.inside = e < plan.chunk * kUnits && n < rows && element.unit < steps.H;
    const int own = element.inside ? own_numbers[n] : 0;
    element.sequence = base + n;
    element.t = walk.t(step);
    element.length = element.inside ? lengths[n] : 0;
    element.real = element.t >= 0 && element.t < element.length;
    element.row = walk.row(step, element.sequence, own);
    element.place = walk.place(step, element.sequence, own, 0);
    element.place_ahead = walk.place(step, element.sequence, own, 1);
    return element;
  };
  // The states that the layer below had in a step, once it has had it.
  const auto take_handed = [&](int step) {
    if constexpr (!Op::kBackward) {
      const uint32_t* const done = op.finished(q - 1, slices, base / plan.slice, plan.blocks);
      for (int block = threadIdx.x; block < plan.blocks; block += blockDim.x) {
        wait_for(done + block, static_cast<uint32_t>(step + 1));
      }
      sync_block();
      const int quads = (steps.H + kPeers - 1) / kPeers;
      for (int i = threadIdx.x; i < rows * quads; i += blockDim.x) {
        const int n = i / quads;
        if (walk.t(step) >= lengths[n]) continue;
        const T* const from = op.handed(q - 1, walk.row(step, base + n, own_numbers[n]));
        copy_async(handed + n * at.row_bytes + i % quads * 16, from + i % quads * kPeers);
      }
      wait_for_copies();
      sync_block();
    }
  };
  for (int step = 0; step < count; ++step) {
    for (int chunk = 0; chunk < rows; chunk += plan.chunk) {
      typename Op::Inputs inputs[kPasses];
#pragma unroll
      for (int p = 0; p < kPasses; ++p) inputs[p] = op.load(element_of(step, chunk, number_of(p)));
      if (chunk == 0 && is_above()) take_handed(step);

      // The weights stay where they are, so a tile of sequences after the other costs no more than
      // all at once, and needs fewer registers.
#pragma unroll 1
      for (int j = 0; j < plan.chunk && chunk + j < rows; j += Products::kRows) {
        if (is_above()) {
          Products products;
          const char* state = handed + (chunk + j) * at.row_bytes + k_group * kTileBytes;
          for (int i = 0; i < mine; ++i) {
            Tile w[kGates];
            load_tiles(w, below, i);
            products.multiply_tile(w, state, at.row_bytes, lane);
            state += plan.k_groups * kTileBytes;
          }
          products.write(partials_below + warp * gate_stride * kGates + j * kPartialStride,
                         gate_stride, lane);
        }
        // What the layer below does not delay, and the state of this one is waited for last.
        if (chunk == 0 && j == 0) exchange.wait(step, step + 1 < count);
        Products products;
        const char* state =
            exchange.state(step) + (chunk + j) * at.row_bytes + k_group * kTileBytes;
#pragma unroll
        for (int i = 0; i < kKept; ++i) {
          if (i >= mine) break;
#pragma unroll
          for (int g = 0; g < kGates; ++g) make_opaque(kept[i][g]);
          products.multiply_tile(kept[i], state, at.row_bytes, lane);
          state += plan.k_groups * kTileBytes;
        }
        for (int i = kKept; i < mine; ++i) {
          Tile w[kGates];
          load_tiles(w, spilled, i - kKept);
          products.multiply_tile(w, state, at.row_bytes, lane);
          state += plan.k_groups * kTileBytes;
        }
        products.write(partials + warp * gate_stride * kGates + j * kPartialStride, gate_stride,
                       lane);
      }
      sync_threads_of(1 + row_group, kWarp * plan.k_groups);

#pragma unroll
      for (int p = 0; p < kPasses; ++p) {
        if ((k_group + p * plan.k_groups) * kWarp >= plan.chunk * kUnits) break;
        const int e = number_of(p);
        const Element element = element_of(step, chunk, e);
        const int n = chunk + e / kUnits, u = row_group * kUnits + e % kUnits;
        T published[Op::kPublished] = {};
        if (element.inside) {
          float sums[kGates];
          const int at_part = row_group * plan.k_groups * kGates * gate_stride +
                              e / kUnits * kPartialStride + e % kUnits;
#pragma unroll
          for (int g = 0; g < kGates; ++g) {
            const int own = at_part + g * gate_stride;
            sums[g] = add_parts(partials + own, plan.k_groups, kGates * gate_stride);
            if constexpr (!Op::kBackward) {
              if (is_above()) {
                inputs[p].products[g] +=
                    add_parts(partials_below + own, plan.k_groups, kGates * gate_stride);
              }
            }
          }
          const T previous = reinterpret_cast<const T*>(
              exchange.state(step) + n * at.row_bytes)[Op::kBackward ? 0 : element.unit];
          op.finish(element, sums, inputs[p], previous, carries[n * units + u], published);
        }
        if (step + 1 == count && !is_below()) continue;
#pragma unroll
        for (int s = 0; s < Op::kPublished; ++s) {
          const Quad quad = gather(published[s], lane);
          const int first = element.unit / kPeers * kPeers, column = s * segment_width + first;
          if (first >= steps.H || e >= plan.chunk * kUnits || n >= rows) continue;
          if (step + 1 < count) {
            exchange.publish(step, n, column * static_cast<int>(sizeof(T)), quad, lane % kPeers,
                             kPeers);
          }
          if constexpr (!Op::kBackward) {
            if (is_below() && lane % kPeers == 0 && element.t < lengths[n]) {
              store_released(reinterpret_cast<Quad*>(op.handed(q, element.row) + first), quad);
            }
          }
        }
      }
      // The next chunk's products take the place of this one's.
      if (chunk + plan.chunk < rows) sync_threads_of(1 + row_group, kWarp * plan.k_groups);
    }
    uint32_t* count_above = nullptr;
    if constexpr (!Op::kBackward) {
      if (op.is_below())
        count_above = op.finished(q, slices, base / plan.slice, plan.blocks) + blockIdx.x;
    }
    exchange.arrive(step + 1 < count, count_above);
    walk.advance(step + 1);
  }

  sync_block();
  if (op.carry() == nullptr) return;
  for (int i = threadIdx.x; i < rows * units; i += blockDim.x) {
    const int unit = block_unit + i % units;
    const int64_t own = (static_cast<int64_t>(q) * steps.B + base + i / units) * steps.H + unit;
    if (unit < steps.H) op.carry()[own] = carries[i];
  }
}

template <class Op, class Products, class Exchange>
__global__ void __launch_bounds__(kWarp* kMaxWarps, 1)
    recurrence(const __grid_constant__ typename Op::Call call, const __grid_constant__ Plan plan,
               const __grid_constant__ SharedLayout at, char* exchange_memory, int first_sequence) {
  if constexpr (kHasClusters || !Exchange::kCluster) {
    run_block<Op, Products, Exchange>(call, plan, at, exchange_memory, first_sequence);
  }
}

// All sequences of a call: as many launches as the plan needs to have each group resident.
template <class Op, class Products, class Exchange>
void launch_all(const typename Op::Call& call, const Shape& shape, const Plan& plan, void* exchange,
                void* stream) {
  const SharedLayout at = shared_layout(shape, plan);
  for (int first = 0; first < shape.B; first += plan.launch) {
    const int sequences = shape.B - first < plan.launch ? shape.B - first : plan.launch;
    Launch launch;
    launch.grid[0] = plan.blocks;
    launch.grid[1] = plan.slices(sequences);
    launch.grid[2] = shape.stacked();
    launch.threads = plan.threads();
    launch.shared_bytes = at.bytes;
    launch.cluster = Exchange::kCluster ? plan.blocks : 0;
    launch.cooperative = shape.layers > 1 || !Exchange::kCluster;
    launch.stream = stream;
    encdec::gpu::launch(launch, &recurrence<Op, Products, Exchange>, call, plan, at,
                        static_cast<char*>(exchange), first);
  }
}

template <template <class> class Op, class T, class Call>
void choose_products(const Call& call, const Shape& shape, const Plan& plan, void* exchange,
                     void* stream) {
  constexpr int kGates = Op<T>::kGates;
  const auto run = [&](auto products) {
    using Products = decltype(products);
    if (plan.cluster) {
      launch_all<Op<T>, Products, ThroughCluster>(call, shape, plan, exchange, stream);
    } else {
      launch_all<Op<T>, Products, ThroughL2>(call, shape, plan, exchange, stream);
    }
  };
  if (plan.tile == kTensorCoresTile) return run(TensorCores<T, kGates>());
  if constexpr (sizeof(T) == 4) {
    if (plan.tile == 1) return run(PlainFma<T, kGates, 1>());
    if (plan.tile == 4) return run(PlainFma<T, kGates, 4>());
  }
  throw std::runtime_error("recurrence: there is no kernel for tiles of " +
                           std::to_string(plan.tile) + " sequences");
}

template <template <class> class Op, class Call>
void run_recurrence(const Call& call, const Shape& shape, const Plan& plan, void* exchange,
                    void* stream) {
  if (shape.dtype == Format::kFloat32) {
    choose_products<Op, float>(call, shape, plan, exchange, stream);
  } else if (shape.dtype == Format::kBfloat16) {
    choose_products<Op, Bfloat16>(call, shape, plan, exchange, stream);
  } else {
    choose_products<Op, Float16>(call, shape, plan, exchange, stream);
  }
}

}  // namespace encdec::rnn::gpu
