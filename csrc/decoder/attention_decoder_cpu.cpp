// The decoder's kernels of one instruction set: this file is compiled once for each.
#include "decoder/attention_feed.h"
#include "decoder/attention_feed_backward.h"
#include "rnn/rnn_backward.h"
#include "rnn/rnn_forward.h"

namespace encdec::decoder {
namespace ENCDEC_ISA_NAMESPACE {
namespace {

using rnn::ENCDEC_ISA_NAMESPACE::BackwardRun;
using rnn::ENCDEC_ISA_NAMESPACE::ForwardRun;

template <Cell cell, Format format>
void forward(const Forward& f) {
  using Feed = AttentionFeed<cell, format>;
  Barrier barrier;
  auto body = [&](int rank, int size) {
    Feed feed(f, barrier, rank, size);
    ForwardRun<cell, format, Feed>(f.rnn, f.rnn.direction[0], f.rnn.workspace, barrier, rank, size,
                                   &feed)
        .run();
  };
  run_team(f.rnn.threads, body);
}

template <Cell cell, Format format>
void backward(const Backward& f) {
  using Feed = AttentionFeedBackward<cell, format>;
  Barrier barrier;
  auto body = [&](int rank, int size) {
    Feed feed(f, barrier, rank, size);
    BackwardRun<cell, format, Feed>(f.rnn, f.rnn.direction[0], true, barrier, rank, size, &feed)
        .run();
  };
  run_team(f.rnn.threads, body);
}

// Calls visit with the cell (an LSTM or a GRU) and the format as constants.
template <class Visit>
void with_cell(Cell cell, Format format, const Visit& visit) {
  with_dtype(format, [&](auto f) {
    if (cell == Cell::kLstm) {
      visit(std::integral_constant<Cell, Cell::kLstm>{}, f);
    } else {
      visit(std::integral_constant<Cell, Cell::kGru>{}, f);
    }
  });
}

// There is no backward in float16.
template <class Visit>
void with_training_cell(const Backward& f, const Visit& visit) {
  with_cell(f.rnn.shape.cell, f.rnn.dtype, [&](auto cell, auto format) {
    if constexpr (decltype(format)::value != Format::kFloat16) visit(cell, format);
  });
}

}  // namespace

const DecoderKernels kDecoderKernels = {
    [](const Forward& f) {
      int64_t bytes = 0;
      with_cell(f.rnn.shape.cell, f.rnn.format, [&](auto cell, auto format) {
        bytes = feed_places<decltype(cell)::value, decltype(format)::value>(f).bytes;
      });
      return bytes;
    },
    [](const Forward& f) {
      with_cell(f.rnn.shape.cell, f.rnn.format, [&](auto cell, auto format) {
        forward<decltype(cell)::value, decltype(format)::value>(f);
      });
    },
    [](const Backward& f) {
      int64_t bytes = 0;
      with_training_cell(f, [&](auto cell, auto format) {
        bytes = feed_backward_places<decltype(cell)::value, decltype(format)::value>(f).bytes;
      });
      return bytes;
    },
    [](const Backward& f) {
      with_training_cell(f, [&](auto cell, auto format) {
        backward<decltype(cell)::value, decltype(format)::value>(f);
      });
    },
};

}  // namespace ENCDEC_ISA_NAMESPACE
}  // namespace encdec::decoder
