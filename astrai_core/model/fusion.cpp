// What stands between a block's matrix products, each as one pass over the rows.
//
// A row's result depends on that row alone. N tokens; H and KV heads of width D; F width of the MLP.

#include <optional>
#include <tuple>

#include "quantization/team.h"
#include "rows.h"
#include "tensors.h"

namespace {

using namespace astrai;

constexpr int64_t kNumbersPerThread = 1 << 12;  // fewer are not worth waking a thread

template <class F>
void for_rows(int64_t N, int64_t width, F&& f) {
  share(N, 1 + kNumbersPerThread / width, [&](int64_t n, int64_t end) {
    for (; n < end; ++n) f(n);
  });
}

Tensor rms_norm(Tensor x, Tensor weight, double eps) {
  const int64_t width = weight.size(0), N = x.numel() / width;
  STD_TORCH_CHECK(x.dim() == 2 && x.size(1) == width && weight.scalar_type() == x.scalar_type(),
                  "x and weight do not fit");
  Tensor out = empty({N, width}, code_of(x.scalar_type()));
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
  Tensor out = empty({N, F}, code_of(x.scalar_type()));
  for_type(x, [&]<class T>(T*) {
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_rows(N, F, [&](int64_t n) {
      gate(from + n * 2 * F, from + n * 2 * F + F, F, to + n * F);
    });
  });
  return out;
}

// Heads (N, H, D), each or each of its channels times the sigmoid of its gate (N, H) or (N, H D).
// torch's sigmoid rounds a number by its place in the tensor.
Tensor gate_heads(Tensor heads, Tensor gates) {
  const int64_t N = heads.size(0), H = heads.size(1), D = heads.size(2);
  const int64_t per_head = gates.numel() / std::max<int64_t>(1, N * H);
  STD_TORCH_CHECK(gates.numel() == N * H * per_head && (per_head == 1 || per_head == D),
                  "gates must be one for each head or one for each of its channels");
  Tensor out = empty({N, H, D}, code_of(heads.scalar_type()));
  for_type(heads, [&]<class T>(T*) {
    const T* from = heads.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    for_type(gates, [&]<class G>(G*) {
      const G* gate = gates.const_data_ptr<G>();
      for_rows(N * H, D, [&](int64_t n) {
        for (int64_t d = 0; d < D; ++d) {
          const float g = static_cast<float>(gate[n * per_head + (per_head == 1 ? 0 : d)]);
          const float e = exponential(g < 0 ? g : -g);
          const float open = (g < 0 ? e : 1.0f) / (1.0f + e);
          to[n * D + d] = static_cast<T>(static_cast<float>(from[n * D + d]) * open);
        }
      });
    });
  });
  return out;
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
  const int32_t dtype = code_of(x.scalar_type());
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
  library.def("gate_heads(Tensor heads, Tensor gates) -> Tensor");
  library.def(
      "heads(Tensor x, Tensor? q_weight, Tensor? k_weight, Tensor cos, Tensor sin, int num_heads, "
      "int num_kv_heads, float eps, bool interleaved) -> (Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_fusion, CPU, library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm));
  library.impl("gated", TORCH_BOX(&gated));
  library.impl("gate_heads", TORCH_BOX(&gate_heads));
  library.impl("heads", TORCH_BOX(&heads));
}
