// Attention over keys and values in bfloat16, multiplied as they are and summed in float32.
//
// Sixteen queries are a group, one in each lane. Scores are taken key by key, so that the softmax
// never looks across lanes; a block is 64 positions from a multiple of 64 on. Both products are
//
//   sums (16 rows x 16 columns) += rows (16 x 32) times columns (32 x 16), in pairs
//
// which is one instruction of AMX. Queries and the softmax's weights are rounded to bfloat16 for it.
// By AVX512-BF16, whose sixteen lanes one token of a few heads cannot fill, it would be slower than in
// float32.

#pragma once

#include "quantization/tiles.h"

#ifdef ASTRAI_HAS_TILES

#include <immintrin.h>
#include <torch/csrc/stable/tensor.h>

#include <cstring>
#include <limits>

#include "attention_step.h"
#include "quantization/aligned.h"
#include "quantization/square.h"

namespace astrai::in_bfloat16 {

using torch::headeronly::BFloat16;

constexpr int64_t kBlock = 64, kHalf = 32;  // positions, and those of one product
constexpr int64_t kGroup = 16;              // queries, keys or channels of one product
constexpr int64_t kChannels = 32;           // of a query and a key in one product
constexpr float kHidden = -std::numeric_limits<float>::infinity();
constexpr float kLog2E = 1.44269504f;

inline int64_t padded(int64_t width, int64_t unit) { return (width + unit - 1) / unit * unit; }

// Memory that a thread keeps from call to call.
template <class T>
struct Kept {
  Aligned<T> all;
  T* of(int64_t size) {
    if (static_cast<int64_t>(all.size()) < size) all.resize(size);
    return all.data();
  }
};

// 2^x for x <= 0; what is no number stays so.
inline __m512 power_of_two(__m512 x) {
  x = _mm512_max_ps(_mm512_set1_ps(-150.0f), x);
  const __m512 n = _mm512_roundscale_ps(x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  const __m512 r = _mm512_sub_ps(x, n);  // |r| <= 1/2: Taylor's sixth term is below 3e-6
  __m512 y = _mm512_set1_ps(1.33335581e-3f);
  for (float c : {9.61812911e-3f, 5.55041087e-2f, 0.240226507f, 0.693147181f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  return _mm512_scalef_ps(y, n);
}

// What a block is to the queries of a tile.
struct Block {
  const BFloat16* keys[kBlock / kGroup];  // sixteen rows each; null where nobody sees one
  int64_t key_stride;
  const int32_t* values;  // (32 pairs of positions, padded Dv) pairs
  bool is_seen[2];        // halves
};

// The queries of a group.
struct Group {
  const int32_t* q;  // (padded Dk / 2, 16) pairs, times the scale and log2(e)
  __m512i position;
  float *largest, *totals;  // (16,)
  float* sums;              // (16, padded Dv)
};

// Scores of sixteen queries with the keys of a block, (64, 16).
inline void score(const Block& block, const Group& group, int64_t width, float* out) {
  const int64_t steps = width / kChannels, stride = block.key_stride * sizeof(BFloat16);
  for (int half = 0; half < 2; ++half) {
    if (!block.is_seen[half]) continue;
    const BFloat16 *a = block.keys[2 * half], *b = block.keys[2 * half + 1];
    a = a ? a : b, b = b ? b : a;  // the other's scores are not looked at
    tile_zero<0>(), tile_zero<1>();
    for (int64_t s = 0; s < steps; ++s) {
      tile_load<4>(group.q + s * kGroup * kGroup, kTileBytes);
      tile_load<5>(a + s * kChannels, stride);
      tile_load<6>(b + s * kChannels, stride);
      tile_add_bfloat16<0, 5, 4>();
      tile_add_bfloat16<1, 6, 4>();
    }
    tile_store<0>(out + half * kHalf * kGroup, kTileBytes);
    tile_store<1>(out + (half * kHalf + kGroup) * kGroup, kTileBytes);
  }
}

// Turn a group's scores (64 positions, 16) into weights (16, 64) of the softmax so far, and scale
// what has been summed by what the weights before have become.
template <bool kWhole>  // whole: each query sees each position
struct Softmax {
  int64_t first, end;    // positions of the block that are there
  int64_t base, window;  // window 0: no window

  __mmask16 seen(const Group& group, int64_t j) const {
    if constexpr (kWhole) return 0xffff;
    const __m512i at = _mm512_set1_epi32(static_cast<int32_t>(base + j));
    __mmask16 mask = _mm512_cmple_epi32_mask(at, group.position);
    if (window) {
      const __m512i far = _mm512_set1_epi32(static_cast<int32_t>(window));
      mask = _kand_mask16(
          mask, _mm512_cmplt_epi32_mask(_mm512_sub_epi32(group.position, at), far));
    }
    return mask;
  }

  void operator()(const float* scores, const Group& group, int64_t value_width,
                  BFloat16* weights) const {
    const __m512 before = _mm512_loadu_ps(group.largest);
    __m512 now = before;
    if constexpr (kWhole) {
      __m512 most[4] = {before, before, before, before};
      for (int64_t j = 0; j < kBlock; j += 4)
#pragma GCC unroll 4
        for (int i = 0; i < 4; ++i)
          most[i] = _mm512_max_ps(most[i], _mm512_loadu_ps(scores + (j + i) * kGroup));
      now = _mm512_max_ps(_mm512_max_ps(most[0], most[1]), _mm512_max_ps(most[2], most[3]));
    } else {
      for (int64_t j = first; j < end; ++j)
        now = _mm512_mask_max_ps(now, seen(group, j), now, _mm512_loadu_ps(scores + j * kGroup));
    }
    const __mmask16 is_larger = _mm512_cmp_ps_mask(now, before, _CMP_NEQ_UQ);
    __m512 total = _mm512_loadu_ps(group.totals);
    if (is_larger) {
      const __mmask16 any = _mm512_cmp_ps_mask(before, _mm512_set1_ps(kHidden), _CMP_NEQ_UQ);
      const __m512 shrink = _mm512_maskz_mov_ps(any, power_of_two(_mm512_sub_ps(before, now)));
      alignas(64) float factor[kGroup];
      _mm512_store_ps(factor, shrink);
      for (int r = 0; r < kGroup; ++r)
        if (is_larger >> r & 1)
          for (int64_t d = 0; d < value_width; d += kGroup) {
            float* at = group.sums + r * value_width + d;
            _mm512_storeu_ps(at, _mm512_mul_ps(_mm512_loadu_ps(at), _mm512_set1_ps(factor[r])));
          }
      total = _mm512_mask_mul_ps(total, is_larger, total, shrink);
      _mm512_storeu_ps(group.largest, now);
    }
    // in words: a number of the first row, one of the second, the next of the first
    static constexpr auto order = [] {
      struct alignas(64) Words { uint16_t of[32]; } words{};
      for (int i = 0; i < 32; ++i) words.of[i] = static_cast<uint16_t>(i / 2 + i % 2 * 16);
      return words;
    }();
    const __m512i interleaved = _mm512_load_si512(order.of);
    for (int64_t half = first / kHalf; half * kHalf < end; ++half) {
      __m512i pairs[kGroup];
#pragma GCC unroll 16
      for (int i = 0; i < kGroup; ++i) {
        const int64_t j = half * kHalf + 2 * i;
        const __m512 a = weight(scores, group, now, j), b = weight(scores, group, now, j + 1);
        total = _mm512_add_ps(_mm512_add_ps(total, a), b);
        const __m512i both = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(b, a));
        pairs[i] = _mm512_permutexvar_epi16(interleaved, both);
      }
      turn_square(pairs);
#pragma GCC unroll 16
      for (int r = 0; r < kGroup; ++r)
        _mm512_store_si512(weights + r * kBlock + half * kHalf, pairs[r]);
    }
    _mm512_storeu_ps(group.totals, total);
  }

 private:
  __m512 weight(const float* scores, const Group& group, __m512 now, int64_t j) const {
    if constexpr (!kWhole)
      if (j < first || j >= end) return _mm512_setzero_ps();
    const __m512 x = _mm512_sub_ps(_mm512_loadu_ps(scores + j * kGroup), now);
    if constexpr (kWhole) return power_of_two(x);
    return _mm512_maskz_mov_ps(seen(group, j), power_of_two(x));
  }
};

// Add a block's values, weighted, to a group's sums.
inline void mix(const Block& block, const BFloat16* weights, int64_t width, const Group& group) {
  const int64_t stride = width * sizeof(float);
  const auto add = [&]<int C>(const int32_t* values, int64_t half) {
    tile_load<6>(values + half * kGroup * width, stride);
    half ? tile_add_bfloat16<C, 5, 6>() : tile_add_bfloat16<C, 4, 6>();
  };
  if (block.is_seen[0]) tile_load<4>(weights, kBlock * sizeof(BFloat16));
  if (block.is_seen[1]) tile_load<5>(weights + kHalf, kBlock * sizeof(BFloat16));
  int64_t d = 0;
  for (; d + 4 * kGroup <= width; d += 4 * kGroup) {
    float* to = group.sums + d;
    tile_load<0>(to, stride), tile_load<1>(to + kGroup, stride);
    tile_load<2>(to + 2 * kGroup, stride), tile_load<3>(to + 3 * kGroup, stride);
    for (int64_t half = 0; half < 2; ++half)
      if (block.is_seen[half]) {
        add.operator()<0>(block.values + d, half);
        add.operator()<1>(block.values + d + kGroup, half);
        add.operator()<2>(block.values + d + 2 * kGroup, half);
        add.operator()<3>(block.values + d + 3 * kGroup, half);
      }
    tile_store<0>(to, stride), tile_store<1>(to + kGroup, stride);
    tile_store<2>(to + 2 * kGroup, stride), tile_store<3>(to + 3 * kGroup, stride);
  }
  for (; d < width; d += kGroup) {
    tile_load<0>(group.sums + d, stride);
    for (int64_t half = 0; half < 2; ++half)
      if (block.is_seen[half]) add.operator()<0>(block.values + d, half);
    tile_store<0>(group.sums + d, stride);
  }
}

// Sixteen rows of keys that lie one after the other as they should, or a copy that does.
inline const BFloat16* rows_of_keys(const BFloat16* base, const Seen<kBlock>& seen, int64_t part,
                                    int64_t page_size, int64_t dim, int64_t width,
                                    BFloat16* copy) {
  const int64_t begin = std::max(part * kGroup, seen.first);
  const int64_t end = std::min((part + 1) * kGroup, seen.first + seen.count);
  if (begin >= end) return nullptr;
  if (dim == width && page_size % kGroup == 0)
    return base + (seen.slot[begin - seen.first] - begin % kGroup) * dim;
  for (int64_t j = begin; j < end; ++j) {
    BFloat16* to = copy + j * width;
    std::memcpy(to, base + seen.slot[j - seen.first] * dim, dim * sizeof(BFloat16));
    std::memset(to + dim, 0, (width - dim) * sizeof(BFloat16));
  }
  return copy + part * kGroup * width;
}

// Values of two positions next to each other, channel by channel; 0 where nobody sees one.
inline void pair_values(const BFloat16* base, const Seen<kBlock>& seen, int64_t dim,
                        int64_t stride, int64_t width, int32_t* to) {
  const auto row = [&](int64_t j) {
    const int64_t place = j - seen.first;
    return place < 0 || place >= seen.count ? nullptr : base + seen.slot[place] * stride;
  };
  const auto read = [&](const BFloat16* from, int64_t d) {
    const auto mask = static_cast<__mmask16>(_bzhi_u32(0xffff, std::min<int64_t>(dim - d, 16)));
    const __m256i sixteen =
        from ? _mm256_maskz_loadu_epi16(mask, from + d) : _mm256_setzero_si256();
    return _mm512_cvtepu16_epi32(sixteen);
  };
  const int64_t from = seen.first / kHalf * kHalf;
  const int64_t end = padded(seen.first + seen.count, kHalf);
  for (int64_t j = from; j < end; j += 2) {
    const BFloat16 *a = row(j), *b = row(j + 1);
    for (int64_t d = 0; d < width; d += kGroup)
      _mm512_store_si512(to + j / 2 * width + d,
                         _mm512_or_si512(read(a, d), _mm512_slli_epi32(read(b, d), 16)));
  }
}

// Queries of a group as pairs of channels, (padded Dk / 2, 16).
inline void pair_queries(const float* const (&rows)[kGroup], int64_t dim, int64_t width,
                         float scale, int32_t* to) {
  for (int64_t d = 0; d < width; d += kChannels) {
    __m512i square[kGroup];
    for (int r = 0; r < kGroup; ++r) {
      const auto read = [&](int64_t at) {
        const int64_t left = std::clamp<int64_t>(dim - at, 0, 16);
        const auto mask = static_cast<__mmask16>(_bzhi_u32(rows[r] ? 0xffff : 0, left));
        return _mm512_mul_ps(_mm512_maskz_loadu_ps(mask, rows[r] + at), _mm512_set1_ps(scale));
      };
      square[r] = reinterpret_cast<__m512i>(_mm512_cvtne2ps_pbh(read(d + kGroup), read(d)));
    }
    turn_square(square);
    for (int p = 0; p < kGroup; ++p)
      _mm512_store_si512(to + (d / 2 + p) * kGroup, square[p]);
  }
}

// Only where `may_use_tiles()`.
inline void attend(const Step<BFloat16>& step, const Tile& tile, int64_t kv_head) {
  const TileScope scope;
  const int64_t per_token = step.heads / step.kv_heads, num_queries = tile.count * per_token;
  const int64_t num_groups = (num_queries + kGroup - 1) / kGroup;
  const int64_t key_width = padded(step.key_dim, kChannels);
  const int64_t value_width = padded(step.value_dim, kGroup);
  const int64_t q_size = key_width / 2 * kGroup, sums_size = kGroup * value_width;
  thread_local Kept<int32_t> kept_q, kept_values;
  thread_local Kept<float> kept_sums, kept_numbers, kept_scores;
  thread_local Kept<BFloat16> kept_keys, kept_weights;
  const BFloat16* key_base = step.keys + kv_head * step.slots * step.key_dim;
  const BFloat16* value_base = step.values + kv_head * step.slots * step.value_stride;
  const int64_t end = tile.position + tile.count;
  const int64_t begin = step.window ? std::max<int64_t>(0, tile.position - step.window + 1) : 0;
  int32_t* q = kept_q.of(num_groups * q_size);
  float* sums = kept_sums.of(num_groups * sums_size);
  float* largest = kept_numbers.of(2 * num_groups * kGroup);
  float* totals = largest + num_groups * kGroup;
  float* scores = kept_scores.of(kBlock * kGroup);
  int32_t* values = kept_values.of(kBlock / 2 * value_width);
  BFloat16* keys = kept_keys.of(kBlock * key_width);
  BFloat16* weights = kept_weights.of(kGroup * kBlock);
  std::fill_n(sums, num_groups * sums_size, 0.0f);
  std::fill_n(largest, num_groups * kGroup, kHidden);
  std::fill_n(totals, num_groups * kGroup, 0.0f);

  // a query's place is that of its token and head; those beyond the last one see nothing
  const auto place_of = [&](int64_t m) {
    return (tile.row + m / per_token) * step.heads + kv_head * per_token + m % per_token;
  };
  const auto group_of = [&](int64_t g) {
    alignas(64) int32_t position[kGroup];
    for (int64_t r = 0; r < kGroup; ++r) {
      const int64_t m = g * kGroup + r;
      position[r] = m < num_queries ? static_cast<int32_t>(tile.position + m / per_token) : -1;
    }
    return Group{q + g * q_size, _mm512_load_si512(position), largest + g * kGroup,
                 totals + g * kGroup, sums + g * sums_size};
  };
  for (int64_t g = 0; g < num_groups; ++g) {
    const float* rows[kGroup];
    for (int64_t r = 0; r < kGroup; ++r) {
      const int64_t m = g * kGroup + r;
      rows[r] = m < num_queries ? step.q + place_of(m) * step.key_dim : nullptr;
    }
    pair_queries(rows, step.key_dim, key_width, step.scale * kLog2E, q + g * q_size);
  }

  for (int64_t base = begin / kBlock * kBlock; base < end; base += kBlock) {
    const Seen<kBlock> seen(step, tile, base, begin, end);
    const int64_t last = seen.first + seen.count;
    Block block;
    block.values = values;
    block.is_seen[0] = seen.first < kHalf, block.is_seen[1] = last > kHalf;
    block.key_stride = key_width;
    for (int64_t part = 0; part < kBlock / kGroup; ++part)
      block.keys[part] = rows_of_keys(key_base, seen, part, step.page_size, step.key_dim,
                                      key_width, keys);
    pair_values(value_base, seen, step.value_dim, step.value_stride, value_width, values);
    const bool is_whole = last == kBlock && seen.first == 0 && base + kBlock <= tile.position + 1 &&
                          !step.window && num_queries % kGroup == 0;
    const Softmax<true> of_whole{0, kBlock, base, 0};
    const Softmax<false> of_part{seen.first, last, base, step.window};
    for (int64_t g = 0; g < num_groups; ++g) {
      const Group group = group_of(g);
      score(block, group, key_width, scores);
      is_whole ? of_whole(scores, group, value_width, weights)
               : of_part(scores, group, value_width, weights);
      mix(block, weights, value_width, group);
    }
  }
  for (int64_t m = 0; m < num_queries; ++m) {
    const int64_t g = m / kGroup, r = m % kGroup;
    const float* from = sums + g * sums_size + r * value_width;
    float* to = step.out + place_of(m) * step.value_dim;
    for (int64_t d = 0; d < step.value_dim; ++d) to[d] = from[d] / totals[m];
  }
}

}  // namespace astrai::in_bfloat16
#endif
