// A square of sixteen registers turned, so that its rows become its columns.

#pragma once

#ifdef __AVX512F__
#include <immintrin.h>

namespace astrai {

inline __attribute__((always_inline)) void turn_square(__m512 (&x)[16]) {
  __m512 a[16], b[16];
#pragma GCC unroll 8
  for (int i = 0; i < 8; ++i) {
    a[2 * i] = _mm512_unpacklo_ps(x[2 * i], x[2 * i + 1]);
    a[2 * i + 1] = _mm512_unpackhi_ps(x[2 * i], x[2 * i + 1]);
  }
#pragma GCC unroll 4
  for (int i = 0; i < 4; ++i) {
    const auto low = [&](int p, int q) {
      return _mm512_castpd_ps(
          _mm512_unpacklo_pd(_mm512_castps_pd(a[4 * i + p]), _mm512_castps_pd(a[4 * i + q])));
    };
    const auto high = [&](int p, int q) {
      return _mm512_castpd_ps(
          _mm512_unpackhi_pd(_mm512_castps_pd(a[4 * i + p]), _mm512_castps_pd(a[4 * i + q])));
    };
    b[4 * i] = low(0, 2), b[4 * i + 1] = high(0, 2);
    b[4 * i + 2] = low(1, 3), b[4 * i + 3] = high(1, 3);
  }
#pragma GCC unroll 4
  for (int c = 0; c < 4; ++c) {  // quarters of four rows each
    const __m512 ab_low = _mm512_shuffle_f32x4(b[c], b[4 + c], 0x88);
    const __m512 ab_high = _mm512_shuffle_f32x4(b[c], b[4 + c], 0xdd);
    const __m512 cd_low = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0x88);
    const __m512 cd_high = _mm512_shuffle_f32x4(b[8 + c], b[12 + c], 0xdd);
    x[c] = _mm512_shuffle_f32x4(ab_low, cd_low, 0x88);
    x[8 + c] = _mm512_shuffle_f32x4(ab_low, cd_low, 0xdd);
    x[4 + c] = _mm512_shuffle_f32x4(ab_high, cd_high, 0x88);
    x[12 + c] = _mm512_shuffle_f32x4(ab_high, cd_high, 0xdd);
  }
}

inline __attribute__((always_inline)) void turn_square(__m512i (&x)[16]) {
  __m512 numbers[16];
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) numbers[i] = _mm512_castsi512_ps(x[i]);
  turn_square(numbers);
#pragma GCC unroll 16
  for (int i = 0; i < 16; ++i) x[i] = _mm512_castps_si512(numbers[i]);
}

}  // namespace astrai
#endif
