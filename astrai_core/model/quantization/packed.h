// Products of int8 rows with int8 weights that were packed for AVX512-VNNI and AMX.
//
// Four inputs are a step, sixteen steps a block. A square is a block of sixteen channels: for each
// step, four bytes of each of the channels, plus 128, because the instructions multiply unsigned by
// signed bytes. It is one of AMX's registers and sixteen of AVX-512's, whose lanes are never summed
// with each other. A panel is 64 channels: first two squares of each block, then the other two.
// Rows lie in squares as well, sixteen rows of a block in each. So whatever is read lies as it is read.
//
// The sums are exact: a token's result depends neither on the tokens beside it nor on the
// instructions.
//
// N tokens, O output channels, K inputs, B blocks.

#pragma once

#include <immintrin.h>

#include <cmath>
#include <cstdint>
#include <cstring>
#include <vector>

#include "aligned.h"
#include "square.h"
#include "team.h"
#include "tiles.h"

#if defined(__AVX512VNNI__) && defined(__AVX512BW__)
#define ASTRAI_HAS_PACKED 1

namespace astrai {

constexpr int64_t kPanel = 64, kStep = 4, kPanelStep = kPanel * kStep;
constexpr int64_t kSide = 16, kSquare = kSide * kSide * kStep;  // bytes
constexpr int64_t kBlockInputs = kSide * kStep;
constexpr int64_t kStripe = 6;  // rows by four registers of channels: 24 sums, 4 weights, 1 input
constexpr int64_t kProductsPerPiece = 1 << 17;

inline int64_t steps_of(int64_t inputs) {
  return (inputs + kBlockInputs - 1) / kBlockInputs * kSide;
}
inline int64_t panels_of(int64_t channels) { return (channels + kPanel - 1) / kPanel; }

// Where a square of a panel begins; `steps` is those of a whole channel.
inline int64_t square_at(int64_t steps, int64_t block, int64_t quarter) {
  return (quarter / 2 * (steps / kSide) + block) * 2 * kSquare + quarter % 2 * kSquare;
}

// Where the weight of a channel and an input lies.
inline int64_t weight_at(int64_t steps, int64_t channel, int64_t input) {
  const int64_t c = channel % kPanel;
  return channel / kPanel * steps * kPanelStep +
         square_at(steps, input / kBlockInputs, c / kSide) +
         input % kBlockInputs / kStep * kSide * kStep + c % kSide * kStep + input % kStep;
}

// `rows` holds where the weights of each channel begin.
inline void pack(const std::vector<const int8_t*>& rows, int64_t inputs, uint8_t* packed) {
  const int64_t steps = steps_of(inputs), channels = rows.size();
  share(panels_of(channels) * 4, 1, [&](int64_t quarter, int64_t last) {
    for (; quarter < last; ++quarter) {
      uint8_t* to = packed + quarter / 4 * steps * kPanelStep;
      const int64_t first = quarter * kSide;
      const int64_t count = std::clamp<int64_t>(channels - first, 0, kSide);
      for (int64_t block = 0; block < steps / kSide; ++block) {
        const int64_t k = block * kBlockInputs;
        const __mmask64 exists = _bzhi_u64(~0ull, std::min(inputs - k, kBlockInputs));
        __m512i square[kSide];
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSide; ++i)
          square[i] = i < count ? _mm512_maskz_loadu_epi8(exists, rows[first + i] + k)
                                : _mm512_setzero_si512();
        turn_square(square);
        uint8_t* at = to + square_at(steps, block, quarter % 4);
#pragma GCC unroll 16
        for (int64_t i = 0; i < kSide; ++i)
          _mm512_storeu_si512(at + i * kSide * kStep,
                              _mm512_xor_si512(square[i], _mm512_set1_epi8(-128)));
      }
    }
  });
}

// Rows in int8, each by its own largest value. Beside the last there is room for sixteen, of whatever
// numbers.
struct Rows {
  Aligned<int8_t> values;
  std::vector<float> scale;
  std::vector<int32_t> excess;  // what the 128 add to every product with the row
  int64_t steps = 0;

  void resize(int64_t N, int64_t K) {
    steps = steps_of(K);
    values.resize((N + kSide - 1) / kSide * steps * kSide * kStep);
    scale.resize(N), excess.resize(N);
  }

  // The first of a row's blocks; the next one is a square further.
  int8_t* row(int64_t n) {
    return values.data() + n / kSide * steps * kSide * kStep + n % kSide * kBlockInputs;
  }
  const int8_t* row(int64_t n) const { return const_cast<Rows*>(this)->row(n); }

  // Let row n be another's row m, of the same width.
  void take(int64_t n, const Rows& other, int64_t m) {
    const int8_t* from = other.row(m);
    int8_t* to = row(n);
    for (int64_t block = 0; block < steps / kSide; ++block)
      std::memcpy(to + block * kSquare, from + block * kSquare, kBlockInputs);
    scale[n] = other.scale[m], excess[n] = other.excess[m];
  }

  // The largest is sought among bit patterns, where that of a number that is none is the largest
  // of all and thus not lost.
  void quantize(int64_t n, const float* x, int64_t K) {
    __m512i most = _mm512_setzero_si512();
    const __m512i absolute = _mm512_set1_epi32(0x7fffffff);
    for (int64_t k = 0; k < K; k += 16)
      most = _mm512_max_epi32(
          most, _mm512_and_si512(absolute, _mm512_castps_si512(sixteen(x, k, K))));
    const int32_t largest = _mm512_reduce_max_epi32(most);
    float by;
    std::memcpy(&by, &largest, sizeof by);
    by = by == 0 ? 1 : by / 127;
    const __m512 divisor = _mm512_set1_ps(by), inverse = _mm512_set1_ps(1 / by);
    int8_t* to = row(n);
    __m512i sum = _mm512_setzero_si512();
    for (int64_t block = 0; block < steps / kSide; ++block)
      for (int64_t k = 0; k < kBlockInputs; k += 16) {
        // a quotient by its inverse and one correction is what a division rounds to, in less time
        const __m512 number = sixteen(x, block * kBlockInputs + k, K);
        const __m512 near = _mm512_mul_ps(number, inverse);
        const __m512 left = _mm512_fnmadd_ps(near, divisor, number);
        const __m512i whole = _mm512_cvtps_epi32(_mm512_fmadd_ps(left, inverse, near));
        sum = _mm512_add_epi32(sum, whole);
        _mm_storeu_si128(reinterpret_cast<__m128i*>(to + block * kSquare + k),
                         _mm512_cvtepi32_epi8(whole));
      }
    scale[n] = by, excess[n] = 128 * _mm512_reduce_add_epi32(sum);
  }

 private:
  static __m512 sixteen(const float* x, int64_t k, int64_t K) {
    if (k + 16 <= K) return _mm512_loadu_ps(x + k);
    return _mm512_maskz_loadu_ps(_bzhi_u32(0xffff, std::max<int64_t>(0, K - k)), x + k);
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
  const uint8_t* data = w.data + panel * w.steps * kPanelStep;
  const int64_t half = square_at(w.steps, 0, 2);
  const int8_t* x[R];
  __m512i sum[R][4];
#pragma GCC unroll 6
  for (int r = 0; r < R; ++r) {
    x[r] = rows.row(n + r);
#pragma GCC unroll 4
    for (int c = 0; c < 4; ++c) sum[r][c] = _mm512_setzero_si512();
  }
  for (int64_t at = 0; at < w.steps / kSide * kSquare; at += kSquare, data += 2 * kSquare)
    for (int64_t s = 0; s < kBlockInputs; s += kStep) {
      const uint8_t* from = data + s * kSide;
      const __m512i weight[4] = {
          _mm512_loadu_si512(from), _mm512_loadu_si512(from + kSquare),
          _mm512_loadu_si512(from + half), _mm512_loadu_si512(from + half + kSquare)};
#pragma GCC unroll 6
      for (int r = 0; r < R; ++r) {
        int32_t four;
        std::memcpy(&four, x[r] + at + s, sizeof four);
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
  const int64_t half = square_at(w.steps, 0, 2), next = w.steps * kSide * kStep;
  const int8_t* x = rows.row(n);
  const uint8_t* data = w.data + panel * w.steps * kPanelStep + square_at(w.steps, 0, c);
  tile_zero<0>(), tile_zero<1>(), tile_zero<2>(), tile_zero<3>();
  for (int64_t block = 0; block < w.steps / kSide; ++block, x += kSquare, data += 2 * kSquare) {
    tile_load<4>(x, kTileBytes);
    tile_load<6>(data, kTileBytes);
    tile_add_bytes<0, 4, 6>();
    tile_load<7>(data + kSquare, kTileBytes);
    tile_add_bytes<1, 4, 7>();
    if constexpr (A == 2) {
      tile_load<5>(x + next, kTileBytes);
      tile_add_bytes<2, 5, 6>();
      tile_add_bytes<3, 5, 7>();
    } else {
      tile_load<6>(data + half, kTileBytes);
      tile_add_bytes<2, 4, 6>();
      tile_load<7>(data + half + kSquare, kTileBytes);
      tile_add_bytes<3, 4, 7>();
    }
    for (int64_t line = kSquare; line < 2 * kSquare; line += 64) {  // what comes next
      _mm_prefetch(x + line, _MM_HINT_T0);
      if constexpr (A == 2) _mm_prefetch(x + next + line, _MM_HINT_T0);
    }
  }
  alignas(64) int32_t sums[4][kSide][kSide];
  tile_store<0>(sums[0], kTileBytes), tile_store<1>(sums[1], kTileBytes);
  tile_store<2>(sums[2], kTileBytes), tile_store<3>(sums[3], kTileBytes);
  for (int column = 0; column < kColumns; ++column) {
    const int64_t o = panel * kPanel + (c + column) * 16;
    const __mmask16 mask = mask_of(w, o);
    const __m512 scale = _mm512_maskz_loadu_ps(mask, w.scale + o);
    for (int a = 0; a < A; ++a)
      for (int64_t r = 0; r < std::min(kSide, end - n - a * kSide); ++r)
        give(_mm512_load_si512(sums[a * kColumns + column][r]), rows, n + a * kSide + r, o,
             scale, mask, sink);
  }
}

template <class Sink>
void tiled(const Rows& rows, const Packed& w, int64_t n, int64_t end, int64_t panel,
           const Sink& sink) {
  for (; end - n > kSide; n += 2 * kSide)
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
