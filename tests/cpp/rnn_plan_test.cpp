// The order of unequal sentences, and the bounds of a plan.
#include "rnn/rnn_plan.h"

#include "check.h"

using namespace encdec;
using namespace encdec::rnn;

void run_tests() {
  const int64_t lengths[] = {2, 5, 1, 5, 3};
  SequenceOrder order;
  const Sequences q = order.from_lengths(lengths, 5, 7);
  CHECK_EQ(q.T, 5);  // nothing runs at the last two of the seven steps
  CHECK_EQ(q.B, 5);
  const int64_t sizes[] = {5, 4, 3, 2, 2}, rows[] = {1, 3, 4, 0, 2};
  for (int i = 0; i < 5; ++i) {
    CHECK_EQ(q.active(i), sizes[i]);
    CHECK_EQ(q.position(i), rows[i]);  // equal lengths keep their order
  }
  CHECK_EQ(q.rows(), 16);
  CHECK_EQ(q.row_start(2), 9);

  SequenceOrder packed_order;
  const Sequences packed = packed_order.from_batch_sizes(sizes, 5);
  CHECK(packed.packed && packed.B == 5 && packed.rows() == 16);
  char memory[1];
  const StepTensor tensor{memory, 100, 8};
  CHECK_EQ(tensor.at(packed, 2, 1) - memory, 10 * 8);
  CHECK_EQ(tensor.at(q, 2, 1) - memory, 2 * 100 + 3 * 8);

  // The rows of one member of three: 1 and 4 of the first step, 1 of the second and third.
  Sequences own = q;
  own.first = 1;
  own.every = 3;
  const int64_t own_sizes[] = {2, 1, 1, 1, 1};
  for (int i = 0; i < 5; ++i) CHECK_EQ(own.active(i), own_sizes[i]);
  CHECK_EQ(own.position(1), rows[4]);
  own = packed;
  own.first = 1;
  own.every = 3;
  CHECK_EQ(tensor.at(own, 0, 1) - memory, 4 * 8);

  // Sequences over threads: enough of them, as many for each, and weights that L2 holds.
  const auto apart = [](int64_t T, int64_t B, int64_t H, int directions, int threads) {
    const Shape s{Cell::kLstm, T, B, H, H, H, false};
    return make_plan(s, T * B, directions, Format::kFloat32, threads).apart;
  };
  CHECK(apart(50, 8, 64, 1, 2) && apart(50, 33, 64, 1, 2) && apart(50, 12, 64, 1, 3));
  CHECK(!apart(50, 8, 64, 2, 2) && !apart(50, 8, 64, 1, 1));
  CHECK(!apart(50, 6, 64, 1, 2) && !apart(50, 9, 64, 1, 2));
  CHECK(!apart(1, 64, 64, 1, 2) && !apart(50, 64, 2048, 1, 2));
  const auto backward_apart = [](int64_t B, int64_t H) {
    const Shape s{Cell::kLstm, 50, B, H, H, H, false};
    return make_backward_plan(s, 50 * B, Format::kFloat32, 2).apart;
  };
  CHECK(backward_apart(16, 64) && !backward_apart(2, 64) && !backward_apart(16, 2048));

  for (const Cell cell : {Cell::kLstm, Cell::kGru, Cell::kTanh}) {
    for (const int64_t B : {1, 8, 5000}) {
      for (const int64_t H : {1, 16, 1024}) {
        for (const int threads : {1, 2, 64}) {
          const Shape s{cell, 20, B, H, H, H, false};
          const Plan p = make_plan(s, 20 * B, 2, Format::kFloat32, threads);
          CHECK(p.threads >= 1 && p.threads <= threads);
          CHECK(p.chunk_rows >= B && p.chunk_rows <= 20 * B);
          CHECK(p.beside_rows == 0 || (B == 1 && p.chunk_rows == 2 * p.beside_rows));
          const Plan b = make_backward_plan(s, 20 * B, Format::kFloat32, threads);
          CHECK(b.threads >= 1 && b.threads <= threads);
          CHECK(b.chunk_rows >= B && b.chunk_rows <= 20 * B);
        }
      }
    }
  }
}
