#include "generation/projections.h"

#include <new>

namespace encdec::generation {

void grow(AlignedBuffer& buffer, int64_t bytes) {
  if (!buffer.grow(bytes)) throw std::bad_alloc();
}

void project(const Projection& p, Format format, const float* x, int64_t rows, int threads,
             AlignedBuffer& work, float* to, int64_t to_stride) {
  if (rows == 0) return;
  const linear::Kernels& kernels = linear::kernels(chosen_isa());
  linear::Linear f{};
  f.dtype = Format::kFloat32;
  f.M = rows;
  f.N = p.N;
  f.K = p.K;
  f.packed = p.packed;
  f.input = reinterpret_cast<const char*>(x);
  f.input_stride = p.K * 4;
  f.bias = reinterpret_cast<const char*>(p.bias);
  f.output = reinterpret_cast<char*>(to);
  f.output_stride = to_stride * 4;
  linear::plan(f, format, threads);
  grow(work, kernels.workspace(f));
  f.workspace = work.data();
  kernels.run(f);
}

}  // namespace encdec::generation
