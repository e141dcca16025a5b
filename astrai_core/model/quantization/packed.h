// Products of int8 rows with int8 weights that were packed for AVX512-VNNI and AMX.
//
// Packed: 64 channels are a panel, and a panel holds, for every four inputs, four bytes of each of
// its channels, plus 128, because the instruction multiplies unsigned by signed bytes. One register
// then has 16 channels, no lane is ever summed with another, and a panel is read from one end to the
// other. Sixteen steps of 16 channels are what AMX takes as one of its registers. The sums are exact,
// so a token's result depends neither on the tokens beside it nor on the instructions.
//
// N tokens, O output channels, K inputs, S steps of 4 inputs.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "square.h"
#include "team.h"
#include "tiles.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define ASTRAI_HAS_PACKED 1

namespace astrai {

constexpr int64_t kPanel = 64, kStep = 4, kPanelStep = kPanel * kStep;
constexpr int64_t kStripe = 6;  // rows by four registers of channels: 24 sums, 4 weights, 1 input
constexpr int64_t kProductsPerPiece = 1 << 17;
#ifdef ASTRAI_HAS_TILES
constexpr int64_t kWholeSteps = 16;  // so that no tile is ever half empty
constexpr int64_t kRowsAtOnce = 16;
#else
constexpr int64_t kWholeSteps = 1;
constexpr int64_t kRowsAtOnce = 1;
#endif

inline int64_t rounded_up(int64_t x, int64_t unit) { return (x + unit - 1) / unit * unit; }
inline int64_t steps_of(int64_t inputs) {
  return rounded_up((inputs + kStep - 1) / kStep, kWholeSteps);
}
inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

inline void pack(const int8_t* weight, int64_t channels, int64_t inputs, uint8_t* packed) {
  constexpr int64_t kSquare = 16;  // channels by steps
  const int64_t steps = steps_of(inputs), whole = inputs / kStep / kSquare * kSquare;
  share(panels_of(channels), 1, [&](int64_t panel, int64_t last) {
    for (; panel < last; ++panel) {
      uint8_t* to = packed + panel * steps * kPanelStep;
      for (int64_t c = 0; c < kPanel; c += kSquare) {
        const int64_t first = panel * kPanel + c;
        const int64_t count = std::clamp<int64_t>(channels - first, 0, kSquare);
        for (int64_t s = 0; s < whole; s += kSquare) {
          __m512i square[kSquare];
#pragma GCC unroll 16
          for (int64_t i = 0; i < kSquare; ++i)
            square[i] = i < count ? _mm512_loadu_si512(weight + (first + i) * inputs + s * kStep)
                                  : _mm512_setzero_si512();
          turn_square(square);
#pragma GCC unroll 16
          for (int64_t i = 0; i < kSquare; ++i)
            _mm512_storeu_si512(to + (s + i) * kPanelStep + c * kStep,
                                _mm512_xor_si512(square[i], _mm512_set1_epi8(-128)));
        }
        for (int64_t i = 0; i < kSquare; ++i)
          for (int64_t k = whole * kStep; k < steps * kStep; ++k) {
            const bool exists = i < count && k < inputs;
            const int value = exists ? weight[(first + i) * inputs + k] : 0;
            to[k / kStep * kPanelStep + (c + i) * kStep + k % kStep] =
                static_cast<uint8_t>(value + 128);
          }
      }
    }
  });
}

// Rows in int8, each by its own largest value, as wide as whole steps. Behind the last there is room
// for as many as are multiplied at once, of whatever numbers.
struct Rows {
  std::vector<int8_t> values;
  std::vector<float> scale;
  std::vector<int32_t> excess;  // what the 128 add to every product with the row
  int64_t steps = 0;

  void resize(int64_t N, int64_t K) {
    steps = steps_of(K);
    values.resize(rounded_up(N, kRowsAtOnce) * steps * kStep);
    scale.resize(N), excess.resize(N);
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

// The sums of 16 channels with row n as numbers, to the sink.
template <class Sink>
inline __attribute__((always_inline)) void give(__m512i sum, const Rows& rows, int64_t n,
                                                int64_t o, __m512 scale, __mmask16 mask,
                                                const Sink& sink) {
  const __m512i total = _mm512_sub_epi32(sum, _mm512_set1_epi32(rows.excess[n]));
  sink(n, o,
       _mm512_mul_ps(_mm512_mul_ps(_mm512_cvtepi32_ps(total), scale),
                     _mm512_set1_ps(rows.scale[n])),
       mask);
}

inline __mmask16 mask_of(const Packed& w, int64_t o) {
  return _cvtu32_mask16(_bzhi_u32(0xffff, std::clamp<int64_t>(w.channels - o, 0, 16)));
}

template <int R, class Sink>
void stripe(const Rows& rows, const Packed& w, int64_t n, int64_t panel, const Sink& sink) {
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
    const int64_t o = panel * kPanel + c * 16;
    const __mmask16 mask = mask_of(w, o);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, w.scale + o);
#pragma GCC unroll 6
    for (int r = 0; r < R; ++r) give(sum[r][c], rows, n + r, o, scale, mask, sink);
  }
}

template <class Sink>
void stripes(const Rows& rows, const Packed& w, int64_t n, int64_t end, int64_t panel,
             const Sink& sink) {
  for (; end - n >= kStripe; n += kStripe) stripe<kStripe>(rows, w, n, panel, sink);
  switch (end - n) {
    case 5: return stripe<5>(rows, w, n, panel, sink);
    case 4: return stripe<4>(rows, w, n, panel, sink);
    case 3: return stripe<3>(rows, w, n, panel, sink);
    case 2: return stripe<2>(rows, w, n, panel, sink);
    case 1: return stripe<1>(rows, w, n, panel, sink);
  }
}

#ifdef ASTRAI_HAS_TILES
constexpr int64_t kFewestForTiles = 4;  // fewer rows are as fast without, for memory bounds them

// Up to 32 rows by 32 channels (A = 2) or 16 by 64 (A = 1): four registers of sums.
template <int A, class Sink>
void tiles(const Rows& rows, const Packed& w, int64_t n, int64_t end, int64_t panel, int64_t c,
           const Sink& sink) {
  constexpr int kColumns = A == 2 ? 2 : 4;
  const int64_t width = w.steps * kStep;
  const int8_t* x = rows.values.data() + n * width;
  const uint8_t* data = w.data + panel * w.steps * kPanelStep + c * kTileBytes;
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t s = 0; s < w.steps; s += kTileRows, x += kTileBytes, data += 16 * kPanelStep) {
    tile_load<4>(x, width);
    tile_load<6>(data, kPanelStep);
    tile_load<7>(data + kTileBytes, kPanelStep);
    tile_add_bytes<0, 4, 6>();
    tile_add_bytes<1, 4, 7>();
    if constexpr (A == 2) {
      tile_load<5>(x + kTileRows * width, width);
      tile_add_bytes<2, 5, 6>();
      tile_add_bytes<3, 5, 7>();
    } else {
      tile_load<6>(data + 2 * kTileBytes, kPanelStep);
      tile_load<7>(data + 3 * kTileBytes, kPanelStep);
      tile_add_bytes<2, 4, 6>();
      tile_add_bytes<3, 4, 7>();
    }
  }
  alignas(64) int32_t sums[4][kTileRows][16];
  tile_store<0>(sums[0], kTileBytes), tile_store<1>(sums[1], kTileBytes);
  tile_store<2>(sums[2], kTileBytes), tile_store<3>(sums[3], kTileBytes);
  for (int column = 0; column < kColumns; ++column) {
    const int64_t o = panel * kPanel + (c + column) * 16;
    const __mmask16 mask = mask_of(w, o);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, w.scale + o);
    for (int a = 0; a < A; ++a)
      for (int64_t r = 0; r < std::min(kTileRows, end - n - a * kTileRows); ++r)
        give(_mm512_load_si512(sums[a * kColumns + column][r]), rows, n + a * kTileRows + r, o,
             scale, mask, sink);
  }
}

template <class Sink>
void tiled(const Rows& rows, const Packed& w, int64_t n, int64_t end, int64_t panel,
           const Sink& sink) {
  for (; end - n > kTileRows; n += 2 * kTileRows)
    for (int64_t c = 0; c < 4; c += 2) tiles<2>(rows, w, n, end, panel, c, sink);
  if (n < end) tiles<1>(rows, w, n, end, panel, 0, sink);
}
#endif

// Give each product of N rows to sink(row, first channel, 16 values, which of them exist).
//
// Rows are taken so many at a time that they stay in a core's cache while the panels pass by.
template <class Sink>
void multiply(const Rows& rows, const Packed& w, int64_t N, const Sink& sink) {
  constexpr int64_t kBytesAtOnce = 1 << 19;
  const int64_t at_once = std::max<int64_t>(96, kBytesAtOnce / (w.steps * kStep) / 96 * 96);
  const int64_t panels = panels_of(w.channels), chunks = (N + at_once - 1) / at_once;
  const int64_t per_item = std::min(N, at_once) * w.steps * kPanelStep;
  share(chunks * panels, 1 + kProductsPerPiece / (per_item + 1), [&](int64_t item, int64_t last) {
#ifdef ASTRAI_HAS_TILES
    if (N >= kFewestForTiles && may_use_tiles()) {
      const TileScope scope;
      for (; item < last; ++item) {
        const int64_t n = item / panels * at_once;
        tiled(rows, w, n, std::min(N, n + at_once), item % panels, sink);
      }
      return;
    }
#endif
    for (; item < last; ++item) {
      const int64_t n = item / panels * at_once;
      stripes(rows, w, n, std::min(N, n + at_once), item % panels, sink);
    }
  });
}

}  // namespace astrai
#endif
