// Chooses how a recurrence is cut for a device (rnn_gpu.h), by what a step should take.
//
// The figures below are of an H100 and were not measured here; they decide between plans, nothing
// else. A step is the longest of what one block does in a row: wait for the state, read it,
// multiply, add up the warps' parts, work out the cell, send the result.
#include <algorithm>
#include <cmath>
#include <cstdio>

#include "rnn/rnn_gpu.h"

namespace encdec::rnn::gpu {
namespace {

constexpr double kClock = 1700;           // cycles a microsecond
constexpr double kMultiply = 8;           // cycles of a quarter multiprocessor for one m16n8k16
constexpr double kSharedBytes = 128;      // a cycle, of a multiprocessor
constexpr double kL2Bytes = 40;           // the same, while all read
constexpr double kRemoteBytes = 24;       // a cycle, into a block's shared memory from its cluster
constexpr double kClusterLatency = 0.25;  // microseconds, from a store to the end of the wait
constexpr double kGridLatency = 1.1;      // the same through L2, with its fence, count and copy
constexpr double kCell = 0.08;            // of loads, gates and their rounding, for each pass
// A step that is not resident: its launches, and its product by a library.
constexpr double kLaunches = 3.0;
constexpr double kLibrary[] = {300e6, 30e6};  // operations a microsecond: half precisions, float32

int64_t ceil_div(int64_t a, int64_t b) { return (a + b - 1) / b; }

constexpr int32_t kMaxSlices = 65535;  // the grid's second dimension
constexpr int32_t kTiles[] = {kTensorCoresTile, 1, 4};

double predict(const Shape& shape, const Plan& plan, const Limits& limits) {
  const SharedLayout at = shared_layout(shape, plan);
  const bool wide = shape.dtype == Format::kFloat32;
  const int gates = tiles_of_unit(shape.cell, shape.backward);
  const int warps = plan.row_groups * plan.k_groups;
  const double mine = ceil_div(at.tiles, plan.k_groups), chunks = ceil_div(plan.slice, plan.chunk);
  const double share = ceil_div(warps, 4);  // warps of a quarter
  double multiplies;
  if (plan.tile == kTensorCoresTile) {
    // Two for a tile of columns; TF32 has half the columns, needs three and its parts.
    multiplies = mine * gates * plan.chunk / plan.tile * 2 * (wide ? 5 : 1) * kMultiply * share;
  } else {
    multiplies = mine * gates * plan.chunk * 8 * share;  // 16 rows of 16 columns by 32 lanes
  }
  const double of_weights = static_cast<double>(plan.chunk / plan.tile) * warps * at.spilled *
                            gates * kUnits * kTileBytes;
  const double of_state = warps * mine * kTileBytes * plan.chunk;
  const double parts = 2.0 * warps * gates * plan.chunk * kUnits * 4;
  const double shared = (of_weights + of_state + parts) / kSharedBytes;
  const double passes = ceil_div(ceil_div(plan.chunk * kUnits, 32), plan.k_groups);
  // A layer above the first has as much again to multiply, all of it by weights in shared memory.
  const double twice = shape.layers > 1 ? 2 : 1;
  double time = chunks * (twice * std::max(multiplies, shared) / kClock + kCell * passes);
  const double message = static_cast<double>(plan.slice) * published(shape.cell, shape.backward) *
                         shape.H * element_bytes(shape.dtype);
  if (plan.cluster) {
    time += kClusterLatency + message / kRemoteBytes / kClock;
  } else {
    time += kGridLatency + message / kL2Bytes / kClock;
  }
  // Groups that have no place wait until others are done.
  const double groups = static_cast<double>(plan.slices(shape.B)) * shape.stacked();
  const double places =
      std::max(1, plan.cluster ? limits.clusters[plan.blocks] : limits.processors / plan.blocks);
  return time * std::ceil(groups / places);
}

// Of a step whose weights are read anew.
double predict_launched(const Shape& shape) {
  const double operations =
      2.0 * shape.B * gate_count(shape.cell) * shape.H * shape.H * shape.directions;
  return kLaunches + operations / kLibrary[shape.dtype == Format::kFloat32];
}

}  // namespace

std::string refuse(const Shape& shape, const Limits& limits, const Plan& plan) {
  if (shape.cell != Cell::kLstm && shape.cell != Cell::kGru) return "it has LSTM and GRU only";
  if (shape.dtype == Format::kInt8) return "it has no int8";
  if (limits.capability < 80) return "the device's compute capability is below 8.0";
  if (std::find(std::begin(kTiles), std::end(kTiles), plan.tile) == std::end(kTiles) ||
      plan.chunk < 1 || plan.chunk % plan.tile != 0) {
    return "there is no kernel for its tiles of sequences";
  }
  if (plan.tile != kTensorCoresTile && shape.dtype != Format::kFloat32) {
    return "plain multiply-adds are for float32";
  }
  if (plan.row_groups < 1 || plan.k_groups < 1 || plan.row_groups * plan.k_groups > kMaxWarps) {
    return "a block has from 1 to 8 warps";
  }
  if (plan.chunk * kUnits > 32 * kPasses * plan.k_groups) {
    return "its warps have more elements than passes";
  }
  if (static_cast<int64_t>(plan.blocks) * plan.row_groups * kUnits < shape.H) {
    return "its blocks do not have all hidden units";
  }
  if (plan.slice < 1 || plan.launch < plan.slice || plan.launch % plan.slice != 0) {
    return "a launch must be of whole slices";
  }
  if (plan.cluster && (plan.blocks > kMaxCluster || limits.clusters[plan.blocks] == 0)) {
    return "the device has no clusters of " + std::to_string(plan.blocks) + " blocks";
  }
  // The number of bytes that a barrier counts is limited.
  const int64_t message = static_cast<int64_t>(plan.slice) * round_up(shape.H, kRowMultiple) *
                          published(shape.cell, shape.backward) * element_bytes(shape.dtype);
  if (plan.cluster && message >= 1 << 20) return "a step's message is larger than a barrier counts";
  if (shape.layers > 1 && (shape.backward || shape.directions > 1)) {
    return "layers share a launch in one direction and forward only";
  }
  if (shape.layers > 1 && plan.launch < shape.B) {
    return "layers that share a launch have all sequences in it";
  }
  // All blocks of a grid wait for each other, and layers that share a launch.
  const int64_t groups = int64_t{shape.stacked()} * plan.slices(std::min(plan.launch, shape.B));
  const int64_t places =
      plan.cluster ? limits.clusters[plan.blocks] : limits.processors / plan.blocks;
  if ((!plan.cluster || shape.layers > 1) && groups > places) {
    return "its " + std::to_string(groups) + " groups of " + std::to_string(plan.blocks) +
           " blocks do not run at the same time";
  }
  if (plan.slices(std::min(plan.launch, shape.B)) > kMaxSlices) {
    return "a launch has at most " + std::to_string(kMaxSlices) + " slices";
  }
  // Before sizes are worked out in 32 bits.
  const int64_t state = int64_t{plan.slice} * published(shape.cell, shape.backward) *
                        round_up(shape.H, kRowMultiple) * element_bytes(shape.dtype);
  if (state > limits.shared_bytes) {
    return "a block needs more than the " + std::to_string(limits.shared_bytes) +
           " bytes of shared memory that there are for the state alone";
  }
  const int32_t bytes = shared_layout(shape, plan).bytes;
  if (bytes > limits.shared_bytes) {
    return "a block needs " + std::to_string(bytes) + " bytes of shared memory, and there are " +
           std::to_string(limits.shared_bytes);
  }
  return {};
}

bool make_plan(const Shape& shape, const Limits& limits, Plan& best, std::string& why_not) {
  bool found = false;
  why_not.clear();
  for (const bool cluster : {true, false}) {
    for (const int32_t tile : kTiles) {
      for (int32_t row_groups = 1; row_groups <= kMaxWarps; ++row_groups) {
        for (int32_t k_groups = 1; row_groups * k_groups <= kMaxWarps; ++k_groups) {
          Plan plan{};
          plan.cluster = cluster;
          plan.tile = tile;
          plan.row_groups = row_groups;
          plan.k_groups = k_groups;
          plan.blocks = static_cast<int32_t>(ceil_div(shape.H, row_groups * kUnits));
          const int32_t most = 32 * kPasses * k_groups / kUnits / tile * tile;  // of a chunk
          if (most == 0) continue;
          // Slices of one tile and more, up to the whole batch.
          for (int32_t slice = tile;; slice *= 2) {
            plan.slice = std::min(slice, shape.B);
            plan.chunk = std::min(most, static_cast<int32_t>(round_up(plan.slice, tile)));
            const int32_t slices = plan.slices(shape.B);
            plan.launch = plan.slice * std::min(slices, kMaxSlices);
            if (!cluster) {
              const int32_t places = limits.processors / plan.blocks / shape.stacked();
              plan.launch = plan.slice * std::max(1, std::min(slices, places));
            }
            const std::string reason = refuse(shape, limits, plan);
            if (reason.empty()) {
              plan.shared_bytes = shared_layout(shape, plan).bytes;
              plan.microseconds = predict(shape, plan, limits);
              if (!found || plan.microseconds < best.microseconds) best = plan;
              found = true;
            } else if (why_not.empty() || !cluster) {
              why_not = reason;
            }
            if (plan.slice == shape.B) break;
          }
        }
      }
    }
  }
  if (found) why_not.clear();
  return found;
}

std::string slower(const Shape& shape, const Plan& plan) {
  const double launched = predict_launched(shape);
  if (plan.microseconds <= launched) return {};
  char text[160];
  std::snprintf(text, sizeof text,
                "a step should take %.1f microseconds, more than the %.1f of one that reads its "
                "weights again",
                plan.microseconds, launched);
  return text;
}

std::string describe(const Shape& shape, const Plan& plan) {
  const SharedLayout at = shared_layout(shape, plan);
  const int gates = tiles_of_unit(shape.cell, shape.backward);
  const int all = static_cast<int>(ceil_div(at.tiles, plan.k_groups)) * gates;
  char text[512];
  std::snprintf(
      text, sizeof text,
      "one launch%s, %s: %d group(s) of %d blocks of %d warps, each group %d sequence(s)\n"
      "%s for %d sequence(s) at a time, %d of %d tiles of weights of a warp in registers, %d bytes "
      "of shared memory\n"
      "state exchanged through %s, %.2f microseconds a step predicted",
      plan.launch < shape.B ? " for each part of the batch" : "",
      plan.cluster ? "clusters" : "a cooperative grid",
      plan.slices(std::min(plan.launch, shape.B)) * shape.stacked(), plan.blocks,
      plan.row_groups * plan.k_groups, plan.slice,
      plan.tile == kTensorCoresTile ? "tensor cores" : "multiply-adds", plan.tile,
      all - at.spilled * gates, all, at.bytes, plan.cluster ? "distributed shared memory" : "L2",
      plan.microseconds);
  return text;
}

int64_t finished_bytes(const Shape& shape, const Plan& plan) {
  return static_cast<int64_t>(shape.layers - 1) * plan.slices(shape.B) * plan.blocks * 4;
}

int64_t exchange_bytes(const Shape& shape, const Plan& plan) {
  const int64_t finished = finished_bytes(shape, plan);
  if (plan.cluster) return finished;
  const SharedLayout at = shared_layout(shape, plan);
  const int64_t groups = static_cast<int64_t>(plan.slices(shape.B)) * shape.stacked();
  return groups * (kCounterBytes + 2ll * plan.slice * at.tiles * kTileBytes) + finished;
}

}  // namespace encdec::rnn::gpu
