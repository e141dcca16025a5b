// Products of int8 rows with int8 weights that were packed for AVX512-VNNI.
//
// Packed: 64 channels are a panel, and a panel holds, for every four inputs, four bytes of each of
// its channels, plus 128, because the instruction multiplies unsigned by signed bytes. One register
// then has 16 channels, no lane is ever summed with another, and a panel is read from one end to the
// other. The sums are exact, so a token's result does not depend on the tokens beside it.
//
// N tokens, O output channels, K inputs, S = K / 4 steps.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "team.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define ASTRAI_HAS_PACKED 1

namespace astrai {

constexpr int64_t kPanel = 64, kStep = 4, kPanelStep = kPanel * kStep;
constexpr int64_t kTileRows = 6;  // by four registers of channels: 24 sums, 4 weights, 1 input
constexpr int64_t kProductsPerPiece = 1 << 17;

inline int64_t steps_of(int64_t inputs) { return (inputs + kStep - 1) / kStep; }
inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

inline void pack(const int8_t* weight, int64_t channels, int64_t inputs, uint8_t* packed) {
  const int64_t steps = steps_of(inputs);
  share(panels_of(channels), 1, [&](int64_t panel, int64_t last) {
    for (; panel < last; ++panel) {
      uint8_t* to = packed + panel * steps * kPanelStep;
      std::memset(to, 128, steps * kPanelStep);
      for (int64_t c = 0; c < kPanel && panel * kPanel + c < channels; ++c) {
        const int8_t* from = weight + (panel * kPanel + c) * inputs;
        for (int64_t k = 0; k < inputs; ++k)
          to[k / kStep * kPanelStep + c * kStep + k % kStep] = static_cast<uint8_t>(from[k] + 128);
      }
    }
  });
}

// Rows in int8, each by its own largest value, as wide as whole steps.
struct Rows {
  std::vector<int8_t> values;
  std::vector<float> scale;
  std::vector<int32_t> excess;  // what the 128 add to every product with the row
  int64_t steps = 0;

  void resize(int64_t N, int64_t K) {
    steps = steps_of(K);
    values.resize(N * steps * kStep), scale.resize(N), excess.resize(N);
  }

  // The largest is sought among bit patterns, where that of a number that is none is the largest
  // of all and thus not lost.
  void quantize(int64_t n, const float* x, int64_t K) {
    int32_t largest = 0, sum = 0;
    for (int64_t k = 0; k < K; ++k) {
      int32_t bits;
      std::memcpy(&bits, x + k, sizeof bits);
      largest = std::max(largest, bits & 0x7fffffff);
    }
    float by;
    std::memcpy(&by, &largest, sizeof by);
    by = by == 0 ? 1 : by / 127;
    int8_t* to = values.data() + n * steps * kStep;
    for (int64_t k = 0; k < K; ++k) {
      const int32_t value = static_cast<int32_t>(std::rint(x[k] / by));
      to[k] = static_cast<int8_t>(value);
      sum += to[k];
    }
    for (int64_t k = K; k < steps * kStep; ++k) to[k] = 0;
    scale[n] = by, excess[n] = 128 * sum;
  }
};

struct Packed {
  const uint8_t* data;  // (panels, S, 64, 4)
  const float* scale;   // (O,)
  int64_t channels, steps;
};

// By hand, because GCC 12 copies the sums of a tile around the intrinsic, at half the speed.
inline __attribute__((always_inline)) void add_products(__m512i& sum, __m512i w, __m512i x) {
  asm("vpdpbusd %2, %1, %0" : "+v"(sum) : "v"(w), "v"(x));
}

template <int R, class Sink>
void tile(const Rows& rows, const Packed& w, int64_t n, int64_t panel, const Sink& sink) {
  const int64_t steps = w.steps, width = steps * kStep;
  const int8_t* x = rows.values.data() + n * width;
  const uint8_t* data = w.data + panel * steps * kPanelStep;
  __m512i sum[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_si512();
  for (int64_t s = 0; s < steps; ++s, data += kPanelStep) {
    __m512i weight[4];
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) weight[c] = _mm512_loadu_si512(data + c * 64);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      int32_t four;
      std::memcpy(&four, x + r * width + s * kStep, sizeof four);
      const __m512i input = _mm512_set1_epi32(four);
#pragma GCC unroll 4
      for (int c = 0; c < 4; ++c) add_products(sum[r][c], weight[c], input);
    }
  }
  // unrolled to the end, or the sums would not be registers
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {
    const int64_t o = panel * kPanel + c * 16, left = w.channels - o;
    const __mmask16 mask = _cvtu32_mask16(_bzhi_u32(0xffff, std::clamp<int64_t>(left, 0, 16)));
    const __m512 scale = _mm512_maskz_loadu_ps(mask, w.scale + o);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) {
      const __m512i total = _mm512_sub_epi32(sum[r][c], _mm512_set1_epi32(rows.excess[n + r]));
      const __m512 value = _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), scale),
                                         _mm512_set1_ps(rows.scale[n + r]));
      sink(n + r, o, value, mask);
    }
  }
}

// Give each product of N rows to sink(row, first channel, 16 values, which of them exist).
template <class Sink>
void multiply(const Rows& rows, const Packed& w, int64_t N, const Sink& sink) {
  const int64_t per_panel = N * w.steps * kPanelStep;
  share(panels_of(w.channels), 1 + kProductsPerPiece / (per_panel + 1),
        [&](int64_t panel, int64_t last) {
          for (; panel < last; ++panel) {
            int64_t n = 0;
            for (; N - n >= kTileRows; n += kTileRows) tile<kTileRows>(rows, w, n, panel, sink);
            switch (N - n) {
              case 5: tile<5>(rows, w, n, panel, sink); break;
              case 4: tile<4>(rows, w, n, panel, sink); break;
              case 3: tile<3>(rows, w, n, panel, sink); break;
              case 2: tile<2>(rows, w, n, panel, sink); break;
              case 1: tile<1>(rows, w, n, panel, sink); break;
            }
          }
        });
}

}  // namespace astrai
#endif
