// What operators on packed weights have in common: tensors in and out, rows rounded to int8, and
// several products at once.

#pragma once

#include <vector>

#include "quantization/packed.h"
#include "rows.h"
#include "tensors.h"

#ifdef ASTRAI_HAS_PACKED

namespace astrai {

constexpr int64_t kNumbersPerPiece = 1 << 11;  // fewer are not worth a thread's attention
constexpr int64_t kRowsOfChunk = 96;

template <class F>
void for_rows(int64_t N, int64_t width, F&& f) {
  share(N, 1 + kNumbersPerPiece / width, [&](int64_t n, int64_t end) {
    for (; n < end; ++n) f(n);
  });
}

// Many rows pass through an operator a few at a time, on one thread each, so that what stands between
// its steps stays in that core's cache; few rows are shared by their channels. Chunks are whole
// squares of rows, alike but for one square, and as many for each thread, which then end together.
template <class F>
void in_chunks(int64_t N, F&& f) {
  if (N < 2 * kRowsOfChunk) return f(0, N);
  const int64_t threads = Team::get().threads(), squares = (N + kSide - 1) / kSide;
  const int64_t fewest = (N + kRowsOfChunk - 1) / kRowsOfChunk;
  const int64_t alike = (fewest + threads - 1) / threads * threads;
  const int64_t chunks = std::min(alike, std::max(fewest, 2 * N / kRowsOfChunk));
  share(chunks, 1, [&](int64_t chunk, int64_t last) {
    for (; chunk < last; ++chunk)
      f(chunk * squares / chunks * kSide, std::min(N, (chunk + 1) * squares / chunks * kSide));
  });
}

// One of `count` matrices (O, K) that lie packed one after the other.
inline Packed packed_of(const Tensor& packed, const Tensor& scale, int64_t K, int64_t number = 0,
                        int64_t count = 1) {
  STD_TORCH_CHECK(packed.is_contiguous() && scale.is_contiguous() &&
                      packed.scalar_type() == ScalarType::Byte &&
                      scale.scalar_type() == ScalarType::Float && scale.numel() % count == 0,
                  "weights must be packed, scales float32");
  const int64_t O = scale.numel() / count, steps = steps_of(K);
  const int64_t bytes = panels_of(O) * steps * kPanelStep;
  STD_TORCH_CHECK(packed.numel() == count * bytes, "shapes of x, weight and scale do not fit");
  return {static_cast<const uint8_t*>(packed.data_ptr()) + number * bytes,
          scale.const_data_ptr<float>() + number * O, O, steps};
}

// Memory that a thread keeps from call to call.
template <int kUse>
std::vector<float>& scratch(int64_t size) {
  thread_local std::vector<float> kept;
  if (static_cast<int64_t>(kept.size()) < size) kept.resize(size);
  return kept;
}

inline Rows& rows_of(int64_t N, int64_t K) {
  thread_local Rows kept;
  kept.resize(N, K);
  return kept;
}

template <class T>
void quantize(const T* x, int64_t N, int64_t K, Rows& rows) {
  for_rows(N, K, [&](int64_t n) {
    if constexpr (std::is_same_v<T, float>) {
      rows.quantize(n, x + n * K, K);
    } else {
      float* row = scratch<0>(K).data();
      for (int64_t k = 0; k < K; ++k) row[k] = static_cast<float>(x[n * K + k]);
      rows.quantize(n, row, K);
    }
  });
}

template <class T, class W>
void quantize_normed(const T* x, const W* weight, double eps, int64_t N, int64_t K, Rows& rows) {
  for_rows(N, K, [&](int64_t n) {
    float* row = scratch<0>(K).data();
    normalize(x + n * K, weight, K, eps, row);
    rows.quantize(n, row, K);
  });
}

// silu(gate) * up of row n of (gate | up), F numbers wide each.
inline void quantize_gated(const float* both, int64_t F, int64_t n, Rows& rows) {
  float* row = scratch<0>(F).data();
  gate(both + n * 2 * F, both + n * 2 * F + F, F, row);
  rows.quantize(n, row, F);
}

// Sixteen bfloat16, rounded to the nearest, to the even one of two; what is no number stays none.
inline __m256i rounded(__m512 x) {
  const __m512i bits = _mm512_castps_si512(x);
  const __m512i odd = _mm512_and_si512(_mm512_srli_epi32(bits, 16), _mm512_set1_epi32(1));
  const __m512i up = _mm512_add_epi32(bits, _mm512_add_epi32(odd, _mm512_set1_epi32(0x7fff)));
  const __mmask16 is_nan = _mm512_cmp_ps_mask(x, x, _CMP_UNORD_Q);
  const __m512i half = _mm512_srli_epi32(up, 16);
  return _mm512_cvtepi32_epi16(_mm512_mask_mov_epi32(half, is_nan, _mm512_set1_epi32(0x7fc0)));
}

// Products into rows of `width` numbers, added to those of `base` where there is one.
template <class T>
auto into(T* out, int64_t width, const T* base) {
  return [=](int64_t n, int64_t o, __m512 value, __mmask16 mask) {
    const int64_t at = n * width + o;
    if constexpr (std::is_same_v<T, float>) {
      if (base) value = _mm512_add_ps(_mm512_maskz_loadu_ps(mask, base + at), value);
      _mm512_mask_storeu_ps(out + at, mask, value);
    } else {
      if (base) {
        const __m256i bits = _mm256_maskz_loadu_epi16(mask, base + at);
        const __m512i wide = _mm512_slli_epi32(_mm512_cvtepu16_epi32(bits), 16);
        value = _mm512_add_ps(_mm512_castsi512_ps(wide), value);
      }
      _mm256_mask_storeu_epi16(out + at, mask, rounded(value));
    }
  };
}

// Rows by a packed matrix, to (N, channels).
struct Product {
  const Rows* rows;
  Packed weight;
  int64_t N;
  float* out;

  int64_t panels() const { return panels_of(weight.channels); }
  // Of a panel, in rows by steps: reading its weights takes about as long as sixteen rows.
  int64_t cost() const { return (N + 16) * weight.steps; }

  void multiply_panels(int64_t first, int64_t end) const {
    const int64_t o = first * kPanel;
    const Packed part{weight.data + first * weight.steps * kPanelStep, weight.scale + o,
                      std::min(weight.channels, end * kPanel) - o, weight.steps};
    multiply(*rows, part, N, into<float>(out + o, weight.channels, nullptr));
  }
};

// All of them as one loop, cut into pieces of about one cost, at whichever panels that is.
inline void multiply_all(const std::vector<Product>& products) {
  int64_t total = 0;
  for (const Product& p : products) total += p.cost() * p.panels();
  const int64_t threads = Team::get().threads();
  const int64_t worth = total * kPanelStep / kProductsPerPiece;
  const int64_t pieces = threads < 2 ? 1 : std::clamp<int64_t>(worth, 1, 8 * threads);
  struct Place {
    size_t product;
    int64_t panel;
  };
  const auto place_of = [&](int64_t piece) {
    int64_t left = total * piece / pieces;
    for (size_t n = 0; n < products.size(); ++n) {
      const int64_t cost = products[n].cost(), panels = products[n].panels();
      if (left < cost * panels) return Place{n, left / cost};
      left -= cost * panels;
    }
    return Place{products.size(), 0};
  };
  Team::get().run(pieces, threads, [&](int64_t piece) {
    Place at = place_of(piece);
    const Place end = place_of(piece + 1);
    for (; at.product < end.product; at = {at.product + 1, 0})
      products[at.product].multiply_panels(at.panel, products[at.product].panels());
    if (at.panel < end.panel) products[at.product].multiply_panels(at.panel, end.panel);
  });
}

}  // namespace astrai
#endif
