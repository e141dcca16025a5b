// What stands between a block's matrix products, each as one pass over the rows.
//
// A row's result depends on that row alone. N tokens; H and KV heads of width D; F width of the MLP.

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>

#include <algorithm>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <optional>
#include <tuple>

using torch::headeronly::BFloat16;
using torch::headeronly::ScalarType;
using torch::stable::Tensor;

namespace {

constexpr int64_t kNumbersPerThread = 1 << 15;  // fewer are not worth waking a thread
constexpr int kLanes = 8;

Tensor empty(std::initializer_list<int64_t> size, ScalarType dtype) {
  int64_t stride[4], next = 1;
  for (int64_t d = static_cast<int64_t>(size.size()) - 1; d >= 0; next *= size.begin()[d--])
    stride[d] = next;
  AtenTensorHandle handle;
  const int32_t code =
      dtype == ScalarType::Float ? aoti_torch_dtype_float32() : aoti_torch_dtype_bfloat16();
  aoti_torch_empty_strided(size.size(), size.begin(), stride, code, aoti_torch_device_type_cpu(),
                           -1, &handle);
  return Tensor(handle);
}

template <class F>
void for_type(const Tensor& x, F&& f) {
  STD_TORCH_CHECK(x.is_contiguous(), "tensors must be contiguous");
  if (x.scalar_type() == ScalarType::Float) return f(static_cast<float*>(nullptr));
  STD_TORCH_CHECK(x.scalar_type() == ScalarType::BFloat16, "x must be float32 or bfloat16");
  f(static_cast<BFloat16*>(nullptr));
}

template <class F>
void for_rows(int64_t N, int64_t width, F&& f) {
  torch::stable::parallel_for(0, N, 1 + kNumbersPerThread / width, [&](int64_t n, int64_t end) {
    for (; n < end; ++n) f(n);
  });
}

// The root mean square's inverse; eight running sums, whatever the width.
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

template <class T>
void normalize(const T* x, const T* weight, int64_t width, double eps, T* out) {
  const float factor = inverse_rms(x, width, eps);
  for (int64_t d = 0; d < width; ++d)
    out[d] = static_cast<T>(static_cast<float>(x[d]) * factor * static_cast<float>(weight[d]));
}

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

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t width = weight.size(0), N = x.numel() / width;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == width && weight.scalar_type() == x.scalar_type(),
                  "x and weight do not fit");
  Tensor out = empty({N, width}, x.scalar_type());
  for_type(x, [&]<class T>(T*) {
    const T *from = x.const_data_ptr<T>(), *w = weight.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_rows(N, width,
             [&](int64_t n) { normalize(from + n * width, w, width, eps, to + n * width); });
  });
  return out;
}

// silu(gate) * up of rows (gate | up)
Tensor gated(Tensor x) {
  const int64_t N = x.size(0), F = x.size(1) / 2;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) % 2 == 0, "x must be (N, 2F)");
  Tensor out = empty({N, F}, x.scalar_type());
  for_type(x, [&]<class T>(T*) {
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_rows(N, F, [&](int64_t n) {
      const T *gate = from + n * 2 * F, *up = gate + F;
      T* row = to + n * F;
      for (int64_t f = 0; f < F; ++f) {
        const float g = static_cast<float>(gate[f]);
        const float e = exponential(g < 0 ? g : -g);  // never overflows
        row[f] = static_cast<T>((g < 0 ? g * e : g) / (1.0f + e) * static_cast<float>(up[f]));
      }
    });
  });
  return out;
}

// Norm a head where there is a weight, and turn its pairs of channels.
template <class T>
void turn(const T* x, const T* weight, const float* cos, const float* sin, int64_t D, double eps,
          bool interleaved, T* out) {
  if (weight) {
    normalize(x, weight, D, eps, out);
    x = out;
  }
  const int64_t half = D / 2;
  if (!interleaved) {
    for (int64_t d = 0; d < half; ++d) {
      const float a = static_cast<float>(x[d]), b = static_cast<float>(x[d + half]);
      out[d] = static_cast<T>(a * cos[d] - b * sin[d]);
      out[d + half] = static_cast<T>(b * cos[d] + a * sin[d]);
    }
    return;
  }
  float pairs[1024];
  for (int64_t d = 0; d < D; ++d) pairs[d] = static_cast<float>(x[d]);
  for (int64_t d = 0; d < half; ++d) {
    const float a = pairs[2 * d], b = pairs[2 * d + 1];
    out[d] = static_cast<T>(a * cos[d] - b * sin[d]);
    out[d + half] = static_cast<T>(b * cos[d] + a * sin[d]);
  }
}

// Rows (q | k | v) to heads, queries and keys normed and rotated.
std::tuple<Tensor, Tensor, Tensor> heads(Tensor x, std::optional<Tensor> q_weight,
                                         std::optional<Tensor> k_weight, Tensor cos, Tensor sin,
                                         int64_t H, int64_t KV, double eps, bool interleaved) {
  const int64_t N = x.size(0), D = x.size(1) / (H + 2 * KV), width = D * (H + 2 * KV);
  STD_TORCH_CHECK(x.size(1) == width && D % 2 == 0 && D <= 1024, "x must be (N, (H + 2 KV) D)");
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.size(0) == N &&
                      cos.size(1) == D / 2 && cos.scalar_type() == ScalarType::Float,
                  "cos and sin must be (N, D / 2) float32");
  const ScalarType dtype = x.scalar_type();
  Tensor q = empty({N, H, D}, dtype), k = empty({N, KV, D}, dtype), v = empty({N, KV, D}, dtype);
  for_type(x, [&]<class T>(T*) {
    const T* from = x.const_data_ptr<T>();
    const T* of_q = q_weight ? q_weight->const_data_ptr<T>() : nullptr;
    const T* of_k = k_weight ? k_weight->const_data_ptr<T>() : nullptr;
    const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    T *to_q = q.mutable_data_ptr<T>(), *to_k = k.mutable_data_ptr<T>(),
      *to_v = v.mutable_data_ptr<T>();
    for_rows(N, width, [&](int64_t n) {
      const T* row = from + n * width;
      const float *cosines = c + n * D / 2, *sines = s + n * D / 2;
      for (int64_t h = 0; h < H; ++h, row += D)
        turn(row, of_q, cosines, sines, D, eps, interleaved, to_q + (n * H + h) * D);
      for (int64_t h = 0; h < KV; ++h, row += D)
        turn(row, of_k, cosines, sines, D, eps, interleaved, to_k + (n * KV + h) * D);
      std::copy_n(row, KV * D, to_v + n * KV * D);
    });
  });
  return {q, k, v};
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_fusion, library) {
  library.def("rms_norm(Tensor x, Tensor weight, float eps) -> Tensor");
  library.def("gated(Tensor x) -> Tensor");
  library.def(
      "heads(Tensor x, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int num_heads, "
      "int num_kv_heads, float eps, bool interleaved) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_fusion, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("gated", TORCH_BOX(&gated));
  library.impl("heads", TORCH_BOX(&heads));
}
