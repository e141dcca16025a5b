// Norms, rotations and gates of single rows: a row's result depends on that row alone.

#pragma once

#include <cmath>
#include <cstdint>

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

// silu(gate) * up
template <class T, class Out>
void gate(const T* gates, const T* ups, int64_t width, Out* out) {
  for (int64_t f = 0; f < width; ++f) {
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
