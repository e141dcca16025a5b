// Products of floats with weights whose outputs lie side by side.
//
// A register has sixteen outputs, whose sums run over the inputs from the first to the last. So no
// lane is ever summed with another, and a row's result does not depend on the rows beside it. Where
// inputs are few, as those of a head are, this is faster than the dot products of `rowwise.cpp`.
//
// N rows, H heads, I inputs, O outputs.

#pragma once

#include <immintrin.h>
#include <torch/headeronly/util/BFloat16.h>

#include <algorithm>
#include <cstdint>

#include "quantization/team.h"

#ifdef __AVX512BW__

namespace astrai {

template <class W>
struct FloatProduct {
  const float* x;     // (N, H, I), each row and each head a stride after the one before
  int64_t x_row, x_head;
  const W* weight;    // (H, I, O)
  float* out;         // (N, H, O), likewise
  int64_t out_row, out_head;
  int64_t heads, inputs, outputs;
};

inline __m512 load_floats(const float* x, __mmask16 mask) { return _mm512_maskz_loadu_ps(mask, x); }
inline __m512 load_floats(const torch::headeronly::BFloat16* x, __mmask16 mask) {
  const __m256i bits = _mm256_maskz_loadu_epi16(mask, x);
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}

// R rows by C registers of outputs, of which the mask says which exist.
template <int R, int C, class W>
void float_tile(const FloatProduct<W>& p, int64_t n, int64_t h, int64_t o, __mmask16 mask) {
  const float* x = p.x + n * p.x_row + h * p.x_head;
  const W* w = p.weight + h * p.inputs * p.outputs + o;
  __m512 sum[R][C];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) sum[r][c] = _mm512_setzero_ps();
  for (int64_t i = 0; i < p.inputs; ++i, w += p.outputs) {
    __m512 weight[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) weight[c] = load_floats(w + c * 16, mask);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512 input = _mm512_set1_ps(x[r * p.x_row + i]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = _mm512_fmadd_ps(input, weight[c], sum[r][c]);
    }
  }
  float* to = p.out + n * p.out_row + h * p.out_head + o;
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      _mm512_mask_storeu_ps(to + r * p.out_row + c * 16, mask, sum[r][c]);
}

template <int R, class W>
void float_rows(const FloatProduct<W>& p, int64_t n, int64_t h, int64_t o, int64_t end) {
  for (; o + 64 <= end; o += 64) float_tile<R, 4>(p, n, h, o, 0xffff);
  for (; o < end; o += 16)
    float_tile<R, 1>(p, n, h, o, _cvtu32_mask16(_bzhi_u32(0xffff, std::min<int64_t>(end - o, 16))));
}

template <class W>
void multiply_floats(const FloatProduct<W>& p, int64_t N) {
  constexpr int64_t kRows = 48, kOutputs = 64, kProductsPerPiece = 1 << 16;
  const int64_t row_blocks = (N + kRows - 1) / kRows;
  const int64_t output_blocks = (p.outputs + kOutputs - 1) / kOutputs;
  const int64_t of_block = std::min(N, kRows) * std::min(p.outputs, kOutputs) * p.inputs;
  share(row_blocks * p.heads * output_blocks, 1 + kProductsPerPiece / (of_block + 1),
        [&](int64_t item, int64_t last) {
          for (; item < last; ++item) {
            // rows innermost: a block of weights is read once
            int64_t n = item % row_blocks * kRows;
            const int64_t stop = std::min(n + kRows, N), h = item / row_blocks / output_blocks;
            const int64_t o = item / row_blocks % output_blocks * kOutputs;
            const int64_t end = std::min(o + kOutputs, p.outputs);
            for (; n + 6 <= stop; n += 6) float_rows<6>(p, n, h, o, end);
            for (; n + 2 <= stop; n += 2) float_rows<2>(p, n, h, o, end);
            if (n < stop) float_rows<1>(p, n, h, o, end);
          }
        });
}

}  // namespace astrai
#endif
