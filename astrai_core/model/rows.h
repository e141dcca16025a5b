// Norms, rotations and gates of single rows: a row's result depends on that row alone.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>
#endif

#include <cmath>
#include <cstdint>
#include <type_traits>

#include "exponential.h"

namespace astrai {

constexpr int kLanes = 16;

// The root mean square's inverse; sixteen running sums, whatever the width.
template <class T>
float inverse_rms(const T* x, int64_t width, double eps) {
  float lane[kLanes] = {}, sum = 0;
  int64_t d = 0;
  for (; d + kLanes <= width; d += kLanes)
    for (int i = 0; i < kLanes; ++i) {
      const float value = static_cast<float>(x[d + i]);
      lane[i] += value * value;
    }
  for (float one : lane) sum += one;
  for (; d < width; ++d) sum += static_cast<float>(x[d]) * static_cast<float>(x[d]);
  return 1.0f / std::sqrt(sum / static_cast<float>(width) + static_cast<float>(eps));
}

template <class T, class W, class Out>
void normalize(const T* x, const W* weight, int64_t width, double eps, Out* out) {
  const float factor = inverse_rms(x, width, eps);
  for (int64_t d = 0; d < width; ++d)
    out[d] = static_cast<Out>(static_cast<float>(x[d]) * factor * static_cast<float>(weight[d]));
}

#ifdef __AVX512F__
// silu(gate) * up of sixteen, the same sums as below; the quotient is off by its last bit at most.
inline __m512 silu_times(__m512 gate, __m512 up) {
  const __m512 one = _mm512_set1_ps(1.0f), zero = _mm512_setzero_ps();
  const __m512 least = _mm512_min_ps(gate, _mm512_sub_ps(zero, gate));  // what is no number stays so
  const __m512 x = _mm512_max_ps(_mm512_set1_ps(-87.0f), least);
  const __m512 n = _mm512_roundscale_ps(_mm512_mul_ps(x, _mm512_set1_ps(1.44269504f)), 8);
  __m512 r = _mm512_fnmadd_ps(n, _mm512_set1_ps(0.693359375f), x);
  r = _mm512_fmadd_ps(n, _mm512_set1_ps(2.12194440e-4f), r);
  __m512 y = _mm512_set1_ps(1.0f / 5040);
  for (float c : {1.0f / 720, 1.0f / 120, 1.0f / 24, 1.0f / 6, 0.5f, 1.0f, 1.0f})
    y = _mm512_fmadd_ps(y, r, _mm512_set1_ps(c));
  const __m512 e = _mm512_scalef_ps(y, n), whole = _mm512_add_ps(one, e);
  __m512 inverse = _mm512_rcp14_ps(whole);
  inverse = _mm512_mul_ps(inverse, _mm512_fnmadd_ps(whole, inverse, _mm512_set1_ps(2.0f)));
  const __mmask16 below = _mm512_cmp_ps_mask(gate, zero, _CMP_LT_OQ);
  const __m512 part = _mm512_mask_mul_ps(gate, below, gate, e);
  return _mm512_mul_ps(_mm512_mul_ps(part, inverse), up);
}
#endif

// silu(gate) * up
template <class T, class Out>
void gate(const T* gates, const T* ups, int64_t width, Out* out) {
  int64_t f = 0;
#ifdef __AVX512F__
  if constexpr (std::is_same_v<T, float> && std::is_same_v<Out, float>)
    for (; f + 16 <= width; f += 16)
      _mm512_storeu_ps(out + f, silu_times(_mm512_loadu_ps(gates + f),
                                             _mm512_loadu_ps(ups + f)));
#endif
  for (; f < width; ++f) {
    const float g = static_cast<float>(gates[f]);
    const float e = exponential(g < 0 ? g : -g);  // never overflows
    out[f] = static_cast<Out>((g < 0 ? g * e : g) / (1.0f + e) * static_cast<float>(ups[f]));
  }
}

// Norm a head where there is a weight, and turn its pairs of channels; D <= 1024 channels.
template <class T, class W, class Out>
void turn(const T* x, const W* weight, const float* cos, const float* sin, int64_t D, double eps,
          bool interleaved, Out* out) {
  float row[1024];
  if (weight)
    normalize(x, weight, D, eps, row);
  else
    for (int64_t d = 0; d < D; ++d) row[d] = static_cast<float>(x[d]);
  const int64_t half = D / 2;
  if (!interleaved) {
    for (int64_t d = 0; d < half; ++d) {
      const float a = row[d], b = row[d + half];
      out[d] = static_cast<Out>(a * cos[d] - b * sin[d]);
      out[d + half] = static_cast<Out>(b * cos[d] + a * sin[d]);
    }
    return;
  }
  for (int64_t d = 0; d < half; ++d) {
    const float a = row[2 * d], b = row[2 * d + 1];
    out[d] = static_cast<Out>(a * cos[d] - b * sin[d]);
    out[d + half] = static_cast<Out>(b * cos[d] + a * sin[d]);
  }
}

}  // namespace astrai
