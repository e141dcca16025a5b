// Attention in float32, over keys and values in float32 or bfloat16.
//
// A token's context is walked in blocks of 32 positions that begin at multiples of 32, and every
// sum has an order of its own inside such a block.

#pragma once

#include <immintrin.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <limits>
#include <type_traits>
#include <vector>

#include "attention_step.h"
#include "quantization/square.h"

namespace astrai::in_float32 {

using torch::headeronly::BFloat16;

constexpr int64_t kBlock = 32;  // positions
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// A register of floats, as wide as this processor has them.
#ifdef __AVX512F__
using Lanes = __m512;
constexpr int kLanes = 16;
inline Lanes load(const float* x) { return _mm512_loadu_ps(x); }
void save(float* to, Lanes x) { _mm512_storeu_ps(to, x); }
inline Lanes all(float x) { return _mm512_set1_ps(x); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm512_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm512_max_ps(a, b); }
inline Lanes rounded(Lanes x) { return _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT); }
inline Lanes power_of_two(Lanes n) {
  const __m512i e = _mm512_add_epi32(_mm512_cvtps_epi32(n), _mm512_set1_epi32(127));
  return _mm512_castsi512_ps(_mm512_slli_epi32(e, 23));
}
inline Lanes where_seen(Lanes x, Lanes y) {  // y, but 0 where x is hidden
  return _mm512_maskz_mov_ps(_mm512_cmp_ps_mask(x, all(kHidden), _CMP_NEQ_UQ), y);
}
inline float largest_of(Lanes x) { return _mm512_reduce_max_ps(x); }
inline Lanes load(const BFloat16* x) {
  const __m256i bits = _mm256_loadu_si256(reinterpret_cast<const __m256i*>(x));
  return _mm512_castsi512_ps(_mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16));
}
#else
using Lanes = __m256;
constexpr int kLanes = 8;
inline Lanes load(const float* x) { return _mm256_loadu_ps(x); }
void save(float* to, Lanes x) { _mm256_storeu_ps(to, x); }
inline Lanes all(float x) { return _mm256_set1_ps(x); }
inline Lanes fma(Lanes a, Lanes b, Lanes c) { return _mm256_fmadd_ps(a, b, c); }
inline Lanes larger(Lanes a, Lanes b) { return _mm256_max_ps(a, b); }
inline Lanes rounded(Lanes x) {
  return _mm256_round_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
}
inline Lanes power_of_two(Lanes n) {
  const __m256i e = _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127));
  return _mm256_castsi256_ps(_mm256_slli_epi32(e, 23));
}
inline Lanes where_seen(Lanes x, Lanes y) {  // y, but 0 where x is hidden
  return _mm256_and_ps(y, _mm256_cmp_ps(x, all(kHidden), _CMP_NEQ_UQ));
}
inline float largest_of(Lanes x) {
  float lane[kLanes];
  save(lane, x);
  return *std::max_element(lane, lane + kLanes);
}
inline Lanes load(const BFloat16* x) {
  const __m128i bits = _mm_loadu_si128(reinterpret_cast<const __m128i*>(x));
  return _mm256_castsi256_ps(_mm256_slli_epi32(_mm256_cvtepu16_epi32(bits), 16));
}
#endif

// e^x for x <= 0: 2^n times a polynomial on what is left, |r| <= ln(2) / 2
inline Lanes exp_of(Lanes x) {
  x = larger(all(-87.0f), x);  // in this order what is no number stays so
  const Lanes n = rounded(x * all(1.44269504f));
  Lanes r = fma(n, all(-0.693359375f), x);  // ln(2) in two parts
  r = fma(n, all(2.12194440e-4f), r);
  Lanes y = all(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = fma(y, r, all(c));
  return y * power_of_two(n);
}

// Turn a square of registers: rows become columns.
inline __attribute__((always_inline)) void turn(Lanes (&x)[kLanes]) {
#ifdef __AVX512F__
  astrai::turn_square(x);
#else
  float square[kLanes][kLanes];
  for (int i = 0; i < kLanes; ++i) save(square[i], x[i]);
  for (int i = 0; i < kLanes; ++i) {
    float column[kLanes];
    for (int j = 0; j < kLanes; ++j) column[j] = square[j][i];
    x[i] = load(column);
  }
#endif
}

inline int64_t padded(int64_t width) { return (width + kLanes - 1) / kLanes * kLanes; }

// The first entries of a row, 0 where there are none.
template <class T>
inline Lanes part_of(const T* row, int64_t d, int64_t width) {
  if (d + kLanes <= width) return load(row + d);
  float numbers[kLanes] = {};
  for (int64_t i = 0; d + i < width; ++i) numbers[i] = static_cast<float>(row[d + i]);
  return load(numbers);
}

// Keys of a block with their channels outermost, (padded width, 32): a register has one channel of
// several positions, so that no score is ever a sum of neighbours.
template <class T>
void read_keys(const T* base, const Seen<kBlock>& seen, int64_t width, float* to) {
  static constexpr T nothing[1024] = {};
  const T* row[kBlock];
  for (int64_t j = 0; j < kBlock; ++j) {
    const int64_t place = j - seen.first;
    row[j] = place < 0 || place >= seen.count ? nothing : base + seen.slot[place] * width;
  }
  for (int64_t d = 0; d < width; d += kLanes)
    for (int64_t j = 0; j < kBlock; j += kLanes) {
      Lanes square[kLanes];
      if (d + kLanes <= width) {
#pragma GCC unroll 16
        for (int i = 0; i < kLanes; ++i) square[i] = load(row[j + i] + d);
      } else {
        for (int i = 0; i < kLanes; ++i) square[i] = part_of(row[j + i], d, width);
      }
      turn(square);
#pragma GCC unroll 16
      for (int i = 0; i < kLanes; ++i) save(to + (d + i) * kBlock + j, square[i]);
    }
}

// Values of a block as floats, in place where they are that already.
template <class T>
struct Values {
  std::vector<float> copied;
  const float* row[kBlock];

  void read(const T* base, const Seen<kBlock>& seen, int64_t width, int64_t stride) {
    const int64_t wide = padded(width);
    if constexpr (std::is_same_v<T, float>)
      if (wide == width) {
        for (int64_t j = 0; j < seen.count; ++j) row[j] = base + seen.slot[j] * stride;
        return;
      }
    copied.resize(kBlock * wide);
    for (int64_t j = 0; j < seen.count; ++j) {
      float* to = copied.data() + j * wide;
      for (int64_t d = 0; d < width; d += kLanes)
        save(to + d, part_of(base + seen.slot[j] * stride, d, width));
      row[j] = to;
    }
  }
};

// Scores of R queries with the keys of a block, channel by channel.
template <int R>
void scores(const float* q, int64_t width, const float* keys, float* out) {
  constexpr int C = 2;
  for (int64_t j = 0; j < kBlock; j += C * kLanes) {
    Lanes sum[R][C];
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) sum[r][c] = all(0);
    for (int64_t d = 0; d < width; ++d) {
      Lanes key[C];
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) key[c] = load(keys + d * kBlock + j + c * kLanes);
#pragma GCC unroll 8
      for (int r = 0; r < R; ++r) {
        const Lanes query = all(q[r * width + d]);
#pragma GCC unroll 2
        for (int c = 0; c < C; ++c) sum[r][c] = fma(query, key[c], sum[r][c]);
      }
    }
#pragma GCC unroll 8
    for (int r = 0; r < R; ++r)
#pragma GCC unroll 2
      for (int c = 0; c < C; ++c) save(out + r * kBlock + j + c * kLanes, sum[r][c]);
  }
}

// Add the values of a block, weighted, to the scaled sums of R queries, C registers wide.
template <int R, int C>
void mix(const float* weight, const float* const* values, int64_t count, const float* shrink,
         int64_t width, int64_t d, float* sums) {
  Lanes sum[R][C];
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c)
      sum[r][c] = load(sums + r * width + d + c * kLanes) * all(shrink[r]);
  for (int64_t j = 0; j < count; ++j) {
    Lanes value[C];
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) value[c] = load(values[j] + d + c * kLanes);
#pragma GCC unroll 4
    for (int r = 0; r < R; ++r) {
      const Lanes share = all(weight[r * kBlock + j]);
#pragma GCC unroll 4
      for (int c = 0; c < C; ++c) sum[r][c] = fma(share, value[c], sum[r][c]);
    }
  }
#pragma GCC unroll 4
  for (int r = 0; r < R; ++r)
#pragma GCC unroll 4
    for (int c = 0; c < C; ++c) save(sums + r * width + d + c * kLanes, sum[r][c]);
}

template <int R>
void mixed(const float* weight, const float* const* values, int64_t count, const float* shrink,
           int64_t width, float* sums) {
  constexpr int C = kLanes == 16 ? 4 : 2;
  int64_t d = 0;
  for (; d + C * kLanes <= width; d += C * kLanes)
    mix<R, C>(weight, values, count, shrink, width, d, sums);
  for (; d < width; d += kLanes) mix<R, 1>(weight, values, count, shrink, width, d, sums);
}

// Turn a query's scores into weights of the softmax so far; returns what the sums shrink by.
inline float weigh(float* score, float& largest, float* totals) {
  Lanes most = load(score);
  for (int j = kLanes; j < kBlock; j += kLanes) most = larger(most, load(score + j));
  const float now = std::max(largest, largest_of(most));
  if (now == kHidden) {
    std::fill_n(score, kBlock, 0.0f);
    return 1;
  }
  const Lanes shrink = where_seen(all(largest), exp_of(all(largest) - all(now)));
  Lanes sum = load(totals) * shrink;
  for (int j = 0; j < kBlock; j += kLanes) {
    const Lanes x = load(score + j), y = where_seen(x, exp_of(x - all(now)));
    save(score + j, y);
    sum = sum + y;
  }
  save(totals, sum);
  largest = now;
  return shrink[0];
}

template <class T>
void attend(const Step<T>& step, const Tile& tile, int64_t kv_head) {
  const int64_t group = step.heads / step.kv_heads, num_queries = tile.count * group;
  const int64_t key_width = padded(step.key_dim), value_width = padded(step.value_dim);
  thread_local std::vector<float> q, sums, score, largest, totals, shrink, keys;
  thread_local Values<T> values;
  q.assign(num_queries * key_width, 0.0f), sums.assign(num_queries * value_width, 0.0f);
  score.resize(num_queries * kBlock), shrink.resize(num_queries);
  largest.assign(num_queries, kHidden), totals.assign(num_queries * kLanes, 0.0f);
  keys.resize(key_width * kBlock);
  for (int64_t m = 0; m < num_queries; ++m) {
    const float* from =
        step.q + ((tile.row + m / group) * step.heads + kv_head * group + m % group) * step.key_dim;
    for (int64_t d = 0; d < step.key_dim; ++d) q[m * key_width + d] = from[d] * step.scale;
  }
  const T* key_base = step.keys + kv_head * step.slots * step.key_dim;
  const T* value_base = step.values + kv_head * step.slots * step.value_stride;
  const int64_t end = tile.position + tile.count;
  const int64_t begin = step.window ? std::max<int64_t>(0, tile.position - step.window + 1) : 0;
  for (int64_t base = begin / kBlock * kBlock; base < end; base += kBlock) {
    const Seen<kBlock> seen(step, tile, base, begin, end);
    read_keys(key_base, seen, step.key_dim, keys.data());
    values.read(value_base, seen, step.value_dim, step.value_stride);
    int64_t m = 0;
    for (; m + 4 <= num_queries; m += 4)
      scores<4>(q.data() + m * key_width, key_width, keys.data(), score.data() + m * kBlock);
    for (; m < num_queries; ++m)
      scores<1>(q.data() + m * key_width, key_width, keys.data(), score.data() + m * kBlock);
    for (m = 0; m < num_queries; ++m) {
      const int64_t position = tile.position + m / group;
      float* of_query = score.data() + m * kBlock;
      const int64_t from = step.window ? position - step.window + 1 : 0;
      for (int64_t p = std::max(base, position + 1); p < base + kBlock; ++p)
        of_query[p - base] = kHidden;
      for (int64_t p = base; p < std::min(base + kBlock, from); ++p) of_query[p - base] = kHidden;
      shrink[m] = weigh(of_query, largest[m], totals.data() + m * kLanes);
    }
    const float* place = score.data() + seen.first;
    for (m = 0; m + 4 <= num_queries; m += 4)
      mixed<4>(place + m * kBlock, values.row, seen.count, shrink.data() + m, value_width,
               sums.data() + m * value_width);
    for (; m < num_queries; ++m)
      mixed<1>(place + m * kBlock, values.row, seen.count, shrink.data() + m, value_width,
               sums.data() + m * value_width);
  }
  for (int64_t m = 0; m < num_queries; ++m) {
    float* to = step.out + ((tile.row + m / group) * step.heads + kv_head * group + m % group) *
                               step.value_dim;
    float total = 0;
    for (int i = 0; i < kLanes; ++i) total += totals[m * kLanes + i];
    for (int64_t d = 0; d < step.value_dim; ++d) to[d] = sums[m * value_width + d] / total;
  }
}

}  // namespace astrai::in_float32
