// Attention over pages for one step: stores the step's keys and values, then each token attends.
//
// A token's context is walked in blocks that begin at multiples of their length, and every sum has
// an order of its own inside such a block. So a token's result depends on its query and on what it
// sees alone: not on the other tokens of the step, on how its prompt was cut into chunks, or on which
// pages hold it. Tokens of a chunk share a tile only to read each key once.
//
// A cache in bfloat16 is multiplied in bfloat16 where the processor has AMX.
//
// N tokens, H query heads, KV key heads, G = H / KV, Dk and Dv widths of keys and values.

#include <algorithm>
#include <cstdint>
#include <cstring>
#include <optional>
#include <type_traits>
#include <vector>

#include "attention_bfloat16.h"
#include "attention_float32.h"
#include "attention_step.h"
#include "quantization/team.h"
#include "tensors.h"

namespace {

using namespace astrai;

constexpr int64_t kTile = 128;                   // queries that read a block together
constexpr int64_t kProductsPerThread = 1 << 16;  // fewer are not worth waking a thread
constexpr int64_t kNumbersPerThread = 1 << 12;

template <class T>
void store(const float* x, const int64_t* slots, int64_t N, int64_t heads, int64_t width,
           int64_t num_slots, T* cache) {
  share(N, 1 + kNumbersPerThread / (heads * width), [&](int64_t n, int64_t last) {
    for (; n < last; ++n)
      for (int64_t h = 0; h < heads; ++h) {
        const float* from = x + (n * heads + h) * width;
        T* to = cache + (h * num_slots + slots[n]) * width;
        int64_t d = 0;
#ifdef __AVX512BF16__
        if constexpr (std::is_same_v<T, BFloat16>)
          for (; d + 16 <= width; d += 16) {
            const __m256bh half = _mm512_cvtneps_pbh(_mm512_loadu_ps(from + d));
            std::memcpy(to + d, &half, sizeof half);
          }
#endif
        for (; d < width; ++d) to[d] = static_cast<T>(from[d]);
      }
  });
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
  share(num_items, grain, [&](int64_t item, int64_t last) {
    for (; item < last; ++item) {
      const Tile& tile = tiles[item % num_tiles];
#ifdef ASTRAI_HAS_TILES
      if constexpr (std::is_same_v<T, BFloat16>)
        if (may_use_tiles()) {
          in_bfloat16::attend(step, tile, item / num_tiles);
          continue;
        }
#endif
      in_float32::attend(step, tile, item / num_tiles);
    }
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
  STD_TORCH_CHECK(Dk <= 1024, "heads must be at most 1024 wide");
  STD_TORCH_CHECK(v.has_value() == value_cache.has_value(), "values and their cache go together");
  Tensor out = empty({N, H, value_dim}, aoti_torch_dtype_float32());
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
