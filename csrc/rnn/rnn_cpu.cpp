// The recurrent kernels of one instruction set: this file is compiled once for each.
#include "rnn/rnn_backward.h"
#include "rnn/rnn_forward.h"

namespace encdec::rnn {
namespace ENCDEC_ISA_NAMESPACE {
namespace {

// Calls visit with the cell and the format as constants.
template <Cell cell, class Visit>
auto with_format(Format format, const Visit& visit) {
  switch (format) {
    case Format::kFloat32:
      return visit.template operator()<cell, Format::kFloat32>();
    case Format::kBfloat16:
      return visit.template operator()<cell, Format::kBfloat16>();
    case Format::kFloat16:
      return visit.template operator()<cell, Format::kFloat16>();
    default:
      return visit.template operator()<cell, Format::kInt8>();
  }
}

template <class Visit>
auto with_cell(Cell cell, Format format, const Visit& visit) {
  switch (cell) {
    case Cell::kLstm:
      return with_format<Cell::kLstm>(format, visit);
    case Cell::kGru:
      return with_format<Cell::kGru>(format, visit);
    case Cell::kTanh:
      return with_format<Cell::kTanh>(format, visit);
    default:
      return with_format<Cell::kRelu>(format, visit);
  }
}

struct PackedBytes {
  const Shape& s;
  template <Cell cell, Format format>
  int64_t operator()() const {
    return layout<cell>(s, format).bytes;
  }
};

struct Pack {
  const Shape& s;
  const Weights& w;
  int threads;
  bool matrices;
  char* packed;
  template <Cell cell, Format format>
  void operator()() const {
    pack<cell, format>(s, w, threads, matrices, packed);
  }
};

struct RowsBeside {
  const Shape& s;
  int members;
  template <Cell cell, Format format>
  int operator()() const {
    using Bl = Blocking<cell>;
    constexpr int kRows = kBesideRows<Bl::kVectors>;
    // The matrix unit makes input products in no time.
    if (!has_beside<format> || s.B != 1 || s.T < 2 * kRows ||
        (has_amx(format, Bl::kVectors) && amx_chosen))
      return 0;
    // W_ih is read anew for each chunk: a cache must hold it beside W_hh.
    const int64_t bytes = layout<cell>(s, format).bytes;
    if (bytes > static_cast<int64_t>(cache_sizes().l3) / 4 * 3) return 0;
    const bool enough = Bl::blocks(s.H) * Bl::kPanels / members >= kBesidePanels<Bl::kVectors>;
    return enough ? kRows : 0;
  }
};

struct ForwardWorkspace {
  const Forward& f;
  template <Cell cell, Format format>
  int64_t operator()() const {
    return forward_workspace<cell, format>(f);
  }
};

struct RunForward {
  const Forward& f;
  template <Cell cell, Format format>
  void operator()() const {
    run_forward<cell, format>(f);
  }
};

struct BackwardWorkspace {
  const Backward& f;
  template <Cell cell, Format format>
  int64_t operator()() const {
    return backward_places<cell, format>(f).bytes;
  }
};

struct RunBackward {
  const Backward& f;
  template <Cell cell, Format format>
  void operator()() const {
    run_backward<cell, format>(f);
  }
};

// Training is for the two formats that gradients are computed in.
template <class Visit>
auto with_training_cell(Cell cell, Format format, const Visit& visit) {
  const auto pick = [&](auto constant) {
    constexpr Cell c = decltype(constant)::value;
    return format == Format::kBfloat16 ? visit.template operator()<c, Format::kBfloat16>()
                                       : visit.template operator()<c, Format::kFloat32>();
  };
  switch (cell) {
    case Cell::kLstm:
      return pick(std::integral_constant<Cell, Cell::kLstm>{});
    case Cell::kGru:
      return pick(std::integral_constant<Cell, Cell::kGru>{});
    case Cell::kTanh:
      return pick(std::integral_constant<Cell, Cell::kTanh>{});
    default:
      return pick(std::integral_constant<Cell, Cell::kRelu>{});
  }
}

}  // namespace

const Kernels kKernels = {
    [](const Shape& s, Format format) { return with_cell(s.cell, format, PackedBytes{s}); },
    [](const Shape& s, const Weights& w, Format format, int threads, bool matrices, char* packed) {
      with_cell(s.cell, format, Pack{s, w, threads, matrices, packed});
    },
    [](const Shape& s, Format format, int members) {
      return with_cell(s.cell, format, RowsBeside{s, members});
    },
    [](const Forward& f) { return with_cell(f.shape.cell, f.format, ForwardWorkspace{f}); },
    [](const Forward& f) { with_cell(f.shape.cell, f.format, RunForward{f}); },
    [](const Backward& f) {
      return with_training_cell(f.shape.cell, f.dtype, BackwardWorkspace{f});
    },
    [](const Backward& f) { with_training_cell(f.shape.cell, f.dtype, RunBackward{f}); },
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::rnn
