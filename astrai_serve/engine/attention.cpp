// Attention over pages for one step: stores the step's keys and values, then each token attends.
//
// A token's context is walked in blocks of 32 positions that begin at multiples of 32, and every
// sum has an order of its own inside such a block. So a token's result depends on its query and on
// what it sees alone: not on the other tokens of the step, on how its prompt was cut into chunks,
// or on which pages hold it. Tokens of a chunk share a tile only to read each key once.
//
// N tokens, H query heads, KV key heads, G = H / KV, Dk and Dv widths of keys and values.

#include <immintrin.h>
#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <vector>

#include "quantization/team.h"

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kBlock = 32;                     // positions
constexpr int64_t kTile = 32;                      // queries that read a block together
constexpr int64_t kProductsPerThread = 1 << 18;    // fewer are not worth waking a thread
constexpr float kHidden = -std::numeric_limits<float>::infinity();

// The sum of eight lanes: neighbours first, then the halves, as `sums_of` does it for four.
float sum_of(__m256 x) {
  const __m256 pairs = _mm256_hadd_ps(x, x), fours = _mm256_hadd_ps(pairs, pairs);
  return _mm_cvtss_f32(
      _mm_add_ss(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1)));
}

__m128 sums_of(__m256 a, __m256 b, __m256 c, __m256 d) {
  const __m256 fours = _mm256_hadd_ps(_mm256_hadd_ps(a, b), _mm256_hadd_ps(c, d));
  return _mm_add_ps(_mm256_castps256_ps128(fours), _mm256_extractf128_ps(fours, 1));
}

// e^x for x <= 0: 2^n times a polynomial on what is left, |r| <= ln(2) / 2
__m256 exp_of(__m256 x) {
  x = _mm256_max_ps(_mm256_set1_ps(-87.0f), x);  // in this order what is no number stays so
  const __m256 n = _mm256_round_ps(_mm256_mul_ps(x, _mm256_set1_ps(1.44269504f)),
                                   _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
  __m256 r = _mm256_fnmadd_ps(n, _mm256_set1_ps(0.693359375f), x);  // ln(2) in two parts
  r = _mm256_fnmadd_ps(n, _mm256_set1_ps(-2.12194440e-4f), r);
  __m256 y = _mm256_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm256_fmadd_ps(y, r, _mm256_set1_ps(c));
  const __m256i power = _mm256_slli_epi32(
      _mm256_add_epi32(_mm256_cvtps_epi32(n), _mm256_set1_epi32(127)), 23);
  return _mm256_mul_ps(y, _mm256_castsi256_ps(power));
}

template <class T>
struct Step {
  const float* q;  // (N, H, Dk)
  T* keys;         // (KV, slots, Dk)
  T* values;       // (KV, slots, Dv), or the keys
  float* out;      // (N, H, Dv)
  const int64_t* pages;
  int64_t page_size, slots, heads, kv_heads, key_dim, value_dim, value_stride, window;
  float scale;
};

struct Tile {  // `count` tokens of a task from place `row` on, at positions from `position` on
  int64_t row, position, count, table;
};

int64_t padded(int64_t width) { return (width + 7) / 8 * 8; }

// Rows of a block as floats, in place where they are that already.
template <class T>
struct Block {
  std::vector<float> copied;
  const float* row[kBlock];

  void read(const T* base, const int64_t* slot, int64_t count, int64_t width, int64_t stride) {
    const int64_t wide = padded(width);
    if constexpr (std::is_same_v<T, float>)
      if (wide == width) {
        for (int64_t j = 0; j < count; ++j) row[j] = base + slot[j] * stride;
        return;
      }
    copied.resize(kBlock * wide);  // what pads a row stays zero: a width is a thread's for a call
    for (int64_t j = 0; j < count; ++j) {
      float* to = copied.data() + j * wide;
      const T* from = base + slot[j] * stride;
      for (int64_t d = 0; d < width; ++d) to[d] = static_cast<float>(from[d]);
      std::fill(to + width, to + wide, 0.0f);
      row[j] = to;
    }
  }
};

// Scores of R queries and C keys: eight lanes over the width, then their sum.
template <int R, int C>
void score(const float* q, int64_t width, const float* const* keys, float scale, float* out) {
  __m256 sum[R][C];
  for (auto& of_query : sum)
    for (auto& one : of_query) one = _mm256_setzero_ps();
  for (int64_t d = 0; d < width; d += 8) {
    __m256 key[C];
    for (int c = 0; c < C; ++c) key[c] = _mm256_loadu_ps(keys[c] + d);
    for (int r = 0; r < R; ++r) {
      const __m256 query = _mm256_loadu_ps(q + r * width + d);
      for (int c = 0; c < C; ++c) sum[r][c] = _mm256_fmadd_ps(query, key[c], sum[r][c]);
    }
  }
  int r = 0;
  if constexpr (C == 2)
    for (; r + 2 <= R; r += 2) {
      const __m128 four = _mm_mul_ps(
          sums_of(sum[r][0], sum[r][1], sum[r + 1][0], sum[r + 1][1]), _mm_set1_ps(scale));
      _mm_storel_pi(reinterpret_cast<__m64*>(out + r * kBlock), four);
      _mm_storeh_pi(reinterpret_cast<__m64*>(out + (r + 1) * kBlock), four);
    }
  for (; r < R; ++r)
    for (int c = 0; c < C; ++c) out[r * kBlock + c] = sum_of(sum[r][c]) * scale;
}

template <int R>
void scores(const float* q, int64_t width, const float* const* keys, int64_t count, float scale,
            float* out) {
  int64_t j = 0;
  for (; j + 2 <= count; j += 2) score<R, 2>(q, width, keys + j, scale, out + j);
  if (j < count) score<R, 1>(q, width, keys + j, scale, out + j);
}

// Add the values of a block, weighted, to the scaled sums of R queries, C registers wide.
template <int R, int C>
void mix(const float* weight, const float* const* values, int64_t count, const float* shrink,
         int64_t width, int64_t d, float* sums) {
  __m256 sum[R][C];
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c)
      sum[r][c] = _mm256_mul_ps(_mm256_loadu_ps(sums + r * width + d + 8 * c),
                                _mm256_set1_ps(shrink[r]));
  for (int64_t j = 0; j < count; ++j) {
    __m256 value[C];
    for (int c = 0; c < C; ++c) value[c] = _mm256_loadu_ps(values[j] + d + 8 * c);
    for (int r = 0; r < R; ++r) {
      const __m256 share = _mm256_broadcast_ss(weight + r * kBlock + j);
      for (int c = 0; c < C; ++c) sum[r][c] = _mm256_fmadd_ps(share, value[c], sum[r][c]);
    }
  }
  for (int r = 0; r < R; ++r)
    for (int c = 0; c < C; ++c) _mm256_storeu_ps(sums + r * width + d + 8 * c, sum[r][c]);
}

template <int R>
void mixed(const float* weight, const float* const* values, int64_t count, const float* shrink,
           int64_t width, float* sums) {
  int64_t d = 0;
  for (; d + 16 <= width; d += 16) mix<R, 2>(weight, values, count, shrink, width, d, sums);
  if (d < width) mix<R, 1>(weight, values, count, shrink, width, d, sums);
}

// Turn a query's scores into weights of the softmax so far; returns what the sums shrink by.
float weigh(float* score, float& largest, float& total) {
  __m256 most = _mm256_loadu_ps(score);
  for (int j = 8; j < kBlock; j += 8) most = _mm256_max_ps(most, _mm256_loadu_ps(score + j));
  float lane[8], now = largest;
  _mm256_storeu_ps(lane, most);
  for (float one : lane) now = std::max(now, one);
  if (now == kHidden) {
    std::fill_n(score, kBlock, 0.0f);
    return 1;
  }
  __m256 sum = _mm256_setzero_ps();
  const __m256 hidden = _mm256_set1_ps(kHidden);
  for (int j = 0; j < kBlock; j += 8) {
    const __m256 x = _mm256_loadu_ps(score + j);
    const __m256 is_seen = _mm256_cmp_ps(x, hidden, _CMP_NEQ_UQ);
    const __m256 y =
        _mm256_and_ps(exp_of(_mm256_sub_ps(x, _mm256_set1_ps(now))), is_seen);
    _mm256_storeu_ps(score + j, y);
    sum = _mm256_add_ps(sum, y);
  }
  const float shrink = largest == now ? 1.0f : std::exp(largest - now);
  total = total * shrink + sum_of(sum);
  largest = now;
  return shrink;
}

template <class T>
void attend(const Step<T>& step, const Tile& tile, int64_t kv_head) {
  const int64_t group = step.heads / step.kv_heads, num_queries = tile.count * group;
  const int64_t key_width = padded(step.key_dim), value_width = padded(step.value_dim);
  thread_local std::vector<float> q, sums, score, largest, total, shrink;
  thread_local Block<T> keys, values;
  q.assign(num_queries * key_width, 0.0f), sums.assign(num_queries * value_width, 0.0f);
  score.resize(num_queries * kBlock), shrink.resize(num_queries);
  largest.assign(num_queries, kHidden), total.assign(num_queries, 0.0f);
  for (int64_t m = 0; m < num_queries; ++m)
    std::copy_n(step.q + ((tile.row + m / group) * step.heads + kv_head * group + m % group) *
                             step.key_dim,
                step.key_dim, q.data() + m * key_width);
  const T* key_base = step.keys + kv_head * step.slots * step.key_dim;
  const T* value_base = step.values + kv_head * step.slots * step.value_stride;
  const int64_t end = tile.position + tile.count;
  const int64_t seen = step.window ? std::max<int64_t>(0, tile.position - step.window + 1) : 0;
  for (int64_t base = seen / kBlock * kBlock; base < end; base += kBlock) {
    // what nobody sees is not read: it may be another task's, and no number
    const int64_t first = std::max(base, seen), count = std::min(base + kBlock, end) - first;
    int64_t slot[kBlock];
    for (int64_t j = 0; j < count; ++j) {
      const int64_t p = first + j;
      slot[j] = step.pages[tile.table + p / step.page_size] * step.page_size + p % step.page_size;
    }
    keys.read(key_base, slot, count, step.key_dim, step.key_dim);
    values.read(value_base, slot, count, step.value_dim, step.value_stride);
    const int64_t skipped = first - base;
    std::fill(score.begin(), score.end(), kHidden);
    float* place = score.data() + skipped;
    int64_t m = 0;
    for (; m + 4 <= num_queries; m += 4)
      scores<4>(q.data() + m * key_width, key_width, keys.row, count, step.scale,
                place + m * kBlock);
    for (; m < num_queries; ++m)
      scores<1>(q.data() + m * key_width, key_width, keys.row, count, step.scale,
                place + m * kBlock);
    for (m = 0; m < num_queries; ++m) {
      const int64_t position = tile.position + m / group;
      float* of_query = score.data() + m * kBlock;
      for (int64_t p = std::max(base, position + 1); p < base + kBlock; ++p)
        of_query[p - base] = kHidden;
      if (step.window)
        for (int64_t p = base; p < std::min(base + kBlock, position - step.window + 1); ++p)
          of_query[p - base] = kHidden;
      shrink[m] = weigh(of_query, largest[m], total[m]);
    }
    for (m = 0; m + 4 <= num_queries; m += 4)
      mixed<4>(place + m * kBlock, values.row, count, shrink.data() + m, value_width,
               sums.data() + m * value_width);
    for (; m < num_queries; ++m)
      mixed<1>(place + m * kBlock, values.row, count, shrink.data() + m, value_width,
               sums.data() + m * value_width);
  }
  for (int64_t m = 0; m < num_queries; ++m) {
    float* to = step.out + ((tile.row + m / group) * step.heads + kv_head * group + m % group) *
                               step.value_dim;
    for (int64_t d = 0; d < step.value_dim; ++d) to[d] = sums[m * value_width + d] / total[m];
  }
}

template <class T>
void store(const float* x, const int64_t* slots, int64_t N, int64_t heads, int64_t width,
           int64_t num_slots, T* cache) {
  for (int64_t n = 0; n < N; ++n)
    for (int64_t h = 0; h < heads; ++h) {
      T* to = cache + (h * num_slots + slots[n]) * width;
      for (int64_t d = 0; d < width; ++d) to[d] = static_cast<T>(x[(n * heads + h) * width + d]);
    }
}

template <class T>
void run(Step<T> step, const Tensor& k, const std::optional<Tensor>& v, const Tensor& slots,
         const Tensor& spans) {
  const int64_t N = slots.size(0);
  const int64_t* at = slots.const_data_ptr<int64_t>();
  store(k.const_data_ptr<float>(), at, N, step.kv_heads, step.key_dim, step.slots, step.keys);
  if (v)
    store(v->const_data_ptr<float>(), at, N, step.kv_heads, step.value_dim, step.slots,
          step.values);
  const int64_t size = std::max<int64_t>(1, kTile * step.kv_heads / step.heads);
  std::vector<Tile> tiles;
  int64_t products = 0;
  const int64_t* span = spans.const_data_ptr<int64_t>();  // row, position, count, table
  for (int64_t s = 0; s < spans.size(0); ++s, span += 4)
    for (int64_t n = 0; n < span[2]; n += size) {
      tiles.push_back({span[0] + n, span[1] + n, std::min(size, span[2] - n), span[3]});
      const int64_t end = span[1] + n + tiles.back().count;
      products += tiles.back().count * (step.window ? std::min(end, step.window) : end);
    }
  const int64_t num_tiles = tiles.size(), num_items = num_tiles * step.kv_heads;
  products *= step.heads * (step.key_dim + step.value_dim);
  const int64_t grain = 1 + num_items * kProductsPerThread / (products + 1);
  // heads outermost: threads take equal shares although later tiles see more
  astrai::share(num_items, grain, [&](int64_t item, int64_t last) {
    for (; item < last; ++item) attend(step, tiles[item % num_tiles], item / num_tiles);
  });
}

Tensor paged_attention(Tensor q, Tensor k, std::optional<Tensor> v, Tensor key_cache,
                       std::optional<Tensor> value_cache, Tensor slots, Tensor spans,
                       Tensor pages, int64_t page_size, double scale, int64_t value_dim,
                       int64_t window) {
  const int64_t N = q.size(0), H = q.size(1), Dk = q.size(2), KV = k.size(1);
  STD_TORCH_CHECK(q.scalar_type() == ScalarType::Float && k.scalar_type() == ScalarType::Float,
                  "queries and keys must be float32");
  STD_TORCH_CHECK(q.is_contiguous() && k.is_contiguous() && key_cache.is_contiguous() &&
                      slots.is_contiguous() && spans.is_contiguous() && pages.is_contiguous(),
                  "tensors must be contiguous");
  STD_TORCH_CHECK(k.size(2) == Dk && k.size(0) == N && slots.size(0) == N && H % KV == 0 &&
                      key_cache.size(0) == KV && key_cache.size(2) == Dk && spans.size(1) == 4,
                  "shapes do not fit");
  STD_TORCH_CHECK(v.has_value() == value_cache.has_value(), "values and their cache go together");
  const int64_t size[] = {N, H, value_dim}, stride[] = {H * value_dim, value_dim, 1};
  AtenTensorHandle handle;
  aoti_torch_empty_strided(3, size, stride, aoti_torch_dtype_float32(),
                           aoti_torch_device_type_cpu(), -1, &handle);
  Tensor out(handle);
  auto on = [&]<class T>(T*) {
    T* keys = key_cache.mutable_data_ptr<T>();
    T* values = value_cache ? value_cache->mutable_data_ptr<T>() : keys;
    run<T>({q.const_data_ptr<float>(), keys, values, out.mutable_data_ptr<float>(),
            pages.const_data_ptr<int64_t>(), page_size, key_cache.size(1), H, KV, Dk, value_dim,
            value_cache ? value_dim : Dk, window, static_cast<float>(scale)},
           k, v, slots, spans);
  };
  if (key_cache.scalar_type() == ScalarType::Float) {
    on(static_cast<float*>(nullptr));
  } else {
    STD_TORCH_CHECK(key_cache.scalar_type() == ScalarType::BFloat16,
                    "the cache must be float32 or bfloat16");
    on(static_cast<BFloat16*>(nullptr));
  }
  return out;
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_attention, library) {
  library.def(
      "paged_attention(Tensor q, Tensor k, Tensor? v, Tensor(a!) key_cache, "
      "Tensor(b!)? value_cache, Tensor slots, Tensor spans, Tensor pages, int page_size, "
      "float scale, int value_dim, int window) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_attention, CPU, library) {
  library.impl("paged_attention", TORCH_BOX(&paged_attention));
}
