// A block of a model in int8 in three operators and attention, with nothing stored between them.
//
//   qkv         queries, keys and values of the normed stream, heads normed and rotated
//   add_linear  the stream plus the attention's output, projected
//   mlp         the stream plus the feed-forward network of the normed stream
//
// N tokens; H and KV heads of width D; O output channels, K inputs, P panels and S steps of packed
// weights; F width of the MLP.

#include <optional>
#include <tuple>

#include "packed_operators.h"

#ifdef ASTRAI_HAS_PACKED

namespace {

using namespace astrai;

// Matrices of the same inputs, one below the other: (O, K) each.
Tensor pack_weights(std::vector<Tensor> weights) {
  const int64_t K = weights[0].dim() == 2 ? weights[0].size(1) : 0;
  std::vector<const int8_t*> rows;
  for (const Tensor& weight : weights) {
    STD_TORCH_CHECK(weight.dim() == 2 && weight.is_contiguous() && weight.size(1) == K &&
                        weight.scalar_type() == ScalarType::Char,
                    "weights must be (O, K) int8, of one K");
    const auto* first = static_cast<const int8_t*>(weight.data_ptr());
    for (int64_t o = 0; o < weight.size(0); ++o) rows.push_back(first + o * K);
  }
  const int64_t panels = panels_of(rows.size()), steps = steps_of(K);
  Tensor out = empty({panels, steps, kPanel, kStep}, aoti_torch_dtype_uint8());
  pack(rows, K, static_cast<uint8_t*>(out.data_ptr()));
  return out;
}

// Rows of a packed matrix, as an embedding has them: (N, K) float32.
Tensor lookup(Tensor ids, Tensor packed, Tensor scale, int64_t K) {
  const Packed w = packed_of(packed, scale, K);
  STD_TORCH_CHECK(ids.is_contiguous() && ids.scalar_type() == ScalarType::Long,
                  "ids must be int64");
  const int64_t N = ids.numel();
  const int64_t* id = ids.const_data_ptr<int64_t>();
  for (int64_t n = 0; n < N; ++n)
    STD_TORCH_CHECK(id[n] >= 0 && id[n] < w.channels, "an id is beyond the vocabulary");
  Tensor out = empty({N, K}, aoti_torch_dtype_float32());
  float* to = out.mutable_data_ptr<float>();
  for_rows(N, K, [&](int64_t n) {
    for (int64_t k = 0; k < K; ++k)
      to[n * K + k] =
          static_cast<float>(w.data[weight_at(w.steps, id[n], k)] - 128) * w.scale[id[n]];
  });
  return out;
}

Tensor linear(Tensor x, Tensor packed, Tensor scale) {
  const int64_t N = x.size(0), K = x.size(1), O = scale.size(0);
  const Packed w = packed_of(packed, scale, K);
  Tensor out = empty({N, O}, code_of(x.scalar_type()));
  for_type(x, [&]<class T>(T*) {
    const T* from = x.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    in_chunks(N, [&](int64_t n, int64_t end) {
      Rows& rows = rows_of(end - n, K);
      quantize(from + n * K, end - n, K, rows);
      multiply(rows, w, end - n, into<T>(to + n * O, O, nullptr));
    });
  });
  return out;
}

Tensor add_linear(Tensor x, Tensor rows_in, Tensor packed, Tensor scale) {
  const int64_t N = rows_in.size(0), K = rows_in.numel() / std::max<int64_t>(N, 1);
  const int64_t O = scale.size(0);
  const Packed w = packed_of(packed, scale, K);
  STD_TORCH_CHECK(x.dim() == 2 && x.size(0) == N && x.size(1) == O && rows_in.is_contiguous(),
                  "x must be (N, O)");
  Tensor out = empty({N, O}, code_of(x.scalar_type()));
  for_type(rows_in, [&]<class U>(U*) {
    for_type(x, [&]<class T>(T*) {
      const U* from = rows_in.const_data_ptr<U>();
      const T* base = x.const_data_ptr<T>();
      T* to = out.mutable_data_ptr<T>();
      in_chunks(N, [&](int64_t n, int64_t end) {
        Rows& rows = rows_of(end - n, K);
        quantize(from + n * K, end - n, K, rows);
        multiply(rows, w, end - n, into<T>(to + n * O, O, base + n * O));
      });
    });
  });
  return out;
}

std::tuple<Tensor, Tensor, Tensor> qkv(Tensor x, Tensor norm, double norm_eps, Tensor packed,
                                       Tensor scale, std::optional<Tensor> q_weight,
                                       std::optional<Tensor> k_weight, Tensor cos, Tensor sin,
                                       int64_t H, int64_t KV, double eps, bool interleaved) {
  const int64_t N = x.size(0), K = x.size(1), width = scale.size(0), D = width / (H + 2 * KV);
  const Packed w = packed_of(packed, scale, K);
  STD_TORCH_CHECK(width == D * (H + 2 * KV) && D % 2 == 0 && D <= 1024 && norm.size(0) == K &&
                      norm.scalar_type() == x.scalar_type(),
                  "shapes of x, norm and weight do not fit");
  STD_TORCH_CHECK(cos.is_contiguous() && sin.is_contiguous() && cos.size(0) == N &&
                      cos.size(1) == D / 2 && cos.scalar_type() == ScalarType::Float,
                  "cos and sin must be (N, D / 2) float32");
  const int32_t dtype = aoti_torch_dtype_float32();
  Tensor q = empty({N, H, D}, dtype), k = empty({N, KV, D}, dtype), v = empty({N, KV, D}, dtype);
  for_type(x, [&]<class T>(T*) {
    const T *from = x.const_data_ptr<T>(), *of_x = norm.const_data_ptr<T>();
    const T* of_q = q_weight ? q_weight->const_data_ptr<T>() : nullptr;
    const T* of_k = k_weight ? k_weight->const_data_ptr<T>() : nullptr;
    const float *c = cos.const_data_ptr<float>(), *s = sin.const_data_ptr<float>();
    float *to_q = q.mutable_data_ptr<float>(), *to_k = k.mutable_data_ptr<float>(),
          *to_v = v.mutable_data_ptr<float>();
    in_chunks(N, [&](int64_t first, int64_t end) {
      const int64_t count = end - first;
      Rows& rows = rows_of(count, K);
      quantize_normed(from + first * K, of_x, norm_eps, count, K, rows);
      float* all = scratch<1>(count * width).data();
      multiply(rows, w, count, into<float>(all, width, nullptr));
      for_rows(count, width, [&](int64_t i) {
        const int64_t n = first + i;
        const float *row = all + i * width, *cosines = c + n * D / 2, *sines = s + n * D / 2;
        for (int64_t h = 0; h < H; ++h, row += D)
          turn(row, of_q, cosines, sines, D, eps, interleaved, to_q + (n * H + h) * D);
        for (int64_t h = 0; h < KV; ++h, row += D)
          turn(row, of_k, cosines, sines, D, eps, interleaved, to_k + (n * KV + h) * D);
        std::copy_n(row, KV * D, to_v + n * KV * D);
      });
    });
  });
  return {q, k, v};
}

Tensor mlp(Tensor x, Tensor norm, double eps, Tensor packed_gate_up, Tensor gate_up_scale,
           Tensor packed_down, Tensor down_scale) {
  const int64_t N = x.size(0), K = x.size(1), F = gate_up_scale.size(0) / 2;
  const Packed gate_up = packed_of(packed_gate_up, gate_up_scale, K);
  const Packed down = packed_of(packed_down, down_scale, F);
  STD_TORCH_CHECK(down.channels == K && norm.size(0) == K && norm.scalar_type() == x.scalar_type(),
                  "shapes of x, norm and weights do not fit");
  Tensor out = empty({N, K}, code_of(x.scalar_type()));
  for_type(x, [&]<class T>(T*) {
    const T *from = x.const_data_ptr<T>(), *of_x = norm.const_data_ptr<T>();
    T* to = out.mutable_data_ptr<T>();
    in_chunks(N, [&](int64_t first, int64_t end) {
      const int64_t count = end - first;
      Rows& rows = rows_of(count, K);
      quantize_normed(from + first * K, of_x, eps, count, K, rows);
      float* both = scratch<1>(count * 2 * F).data();
      multiply(rows, gate_up, count, into<float>(both, 2 * F, nullptr));
      rows.resize(count, F);
      for_rows(count, F, [&](int64_t n) { quantize_gated(both, F, n, rows); });
      multiply(rows, down, count, into<T>(to + first * K, K, from + first * K));
    });
  });
  return out;
}

// Every library of ours has the same team: the linker makes one of an inline function's static.
int64_t use_threads(int64_t threads) { return Team::get().use(threads); }

}  // namespace

STABLE_TORCH_LIBRARY(astrai_packed, library) {
  library.def("use_threads(int threads) -> int");
  library.def("pack(Tensor[] weights) -> Tensor");
  library.def("lookup(Tensor ids, Tensor packed, Tensor scale, int inputs) -> Tensor");
  library.def("linear(Tensor x, Tensor packed, Tensor scale) -> Tensor");
  library.def("add_linear(Tensor x, Tensor rows, Tensor packed, Tensor scale) -> Tensor");
  library.def(
      "qkv(Tensor x, Tensor norm, float norm_eps, Tensor packed, Tensor scale, Tensor? q_weight, "
      "Tensor? k_weight, Tensor cos, Tensor sin, int num_heads, int num_kv_heads, float eps, "
      "bool interleaved) -> (Tensor, Tensor, Tensor)");
  library.def(
      "mlp(Tensor x, Tensor norm, float eps, Tensor gate_up, Tensor gate_up_scale, Tensor down, "
      "Tensor down_scale) -> Tensor");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_packed, CPU, library) {
  library.impl("pack", TORCH_BOX(&pack_weights));
  library.impl("lookup", TORCH_BOX(&lookup));
  library.impl("linear", TORCH_BOX(&linear));
  library.impl("add_linear", TORCH_BOX(&add_linear));
  library.impl("qkv", TORCH_BOX(&qkv));
  library.impl("mlp", TORCH_BOX(&mlp));
}

STABLE_TORCH_LIBRARY_IMPL(astrai_packed, CompositeExplicitAutograd, library) {
  library.impl("use_threads", TORCH_BOX(&use_threads));
}

#endif
