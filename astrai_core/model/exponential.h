// e to the power of x, by arithmetic that compilers turn into vectors.
//
// What products and sums round to is the including file's choice: include it behind its pragmas.

#pragma once

#include <cmath>
#include <cstdint>
#include <cstring>

namespace astrai {

// x <= 0 where it matters: the caller bounds it from above
inline float exponential(float x) {
  x = x < -87.0f ? -87.0f : x;
  const float n = std::rint(x * 1.44269504f);
  const float r = x - n * 0.693359375f + n * 2.12194440e-4f;  // ln(2) in two parts
  float y = 1.0f / 5040;
  y = y * r + 1.0f / 720;
  y = y * r + 1.0f / 120;
  y = y * r + 1.0f / 24;
  y = y * r + 1.0f / 6;
  y = y * r + 0.5f;
  y = y * r + 1.0f;
  y = y * r + 1.0f;
  const int32_t bits = (static_cast<int32_t>(n) + 127) << 23;
  float power;
  std::memcpy(&power, &bits, sizeof power);
  return y * power;
}

}  // namespace astrai
