// The stream plus a mixture of experts of the normed stream, as one operator.
//
//   rows of the stream -> normed -> scores, and which experts a row visits with what weight
//   visits, expert by expert -> gate and up -> silu(gate) * up -> down
//   each row: the stream + its visits, weighted and added in the order of its choices + the shared
//
// Experts without visits are not read. A row's result depends on that row alone.
//
// N rows of K numbers; E experts of inner width F, of which a row visits C; R = N C visits.

#include <optional>
#include <tuple>

#include "float_products.h"
#include "packed_operators.h"

#ifdef ASTRAI_HAS_PACKED

namespace {

using namespace astrai;

constexpr int64_t kChunksPerThread = 4;  // with fewer, threads would wait for the last of them
constexpr float kTiny = 1e-20f;  // as `moe.py` adds it to a sum of weights before dividing by it

struct Choice {
  const float* bias;  // (E,) or none
  int64_t experts, groups, active_groups, chosen;
  bool is_softmax, is_normed;
  float factor;
};

// The largest number, or the first that is none, among those not taken; its place.
template <class IsFree>
int64_t best_of(const float* numbers, int64_t count, const IsFree& is_free) {
  int64_t best = -1;
  for (int64_t n = 0; n < count; ++n) {
    if (!is_free(n)) continue;
    if (best < 0 || numbers[n] > numbers[best] ||
        (std::isnan(numbers[n]) && !std::isnan(numbers[best])))
      best = n;
  }
  return best;
}

// The softmax of a row of logits, or the sigmoid of each.
void score(const Choice& choice, const float* logits, float* scores) {
  const int64_t E = choice.experts;
  if (!choice.is_softmax) {
    for (int64_t e = 0; e < E; ++e) {
      const float x = logits[e], power = exponential(x < 0 ? x : -x);
      scores[e] = (x < 0 ? power : 1.0f) / (1.0f + power);
    }
    return;
  }
  const float largest = *std::max_element(logits, logits + E);
  for (int64_t e = 0; e < E; ++e) scores[e] = exponential(logits[e] - largest);
  float total = 0;
  for (int64_t e = 0; e < E; ++e) total += scores[e];
  for (int64_t e = 0; e < E; ++e) scores[e] /= total;
}

// The experts of the best groups with the best scores, and their weights.
void choose(const Choice& choice, const float* scores, int64_t* experts, float* weights) {
  const int64_t E = choice.experts, G = choice.groups, per_group = E / G;
  thread_local std::vector<float> ranked, of_group;
  thread_local std::vector<char> is_open, is_taken;
  ranked.assign(scores, scores + E);
  is_open.assign(G, choice.active_groups == G), is_taken.assign(E, false);
  if (choice.bias)
    for (int64_t e = 0; e < E; ++e) ranked[e] += choice.bias[e];
  if (choice.active_groups < G) {
    of_group.assign(G, 0.0f);
    for (int64_t g = 0; g < G; ++g) {
      const float* own = ranked.data() + g * per_group;
      const int64_t first = best_of(own, per_group, [](int64_t) { return true; });
      of_group[g] = own[first];
      if (choice.bias)  // then a group is ranked by its two best
        of_group[g] += own[best_of(own, per_group, [=](int64_t e) { return e != first; })];
    }
    for (int64_t n = 0; n < choice.active_groups; ++n)
      is_open[best_of(of_group.data(), G, [&](int64_t g) { return !is_open[g]; })] = true;
  }
  float total = 0;
  for (int64_t c = 0; c < choice.chosen; ++c) {
    const int64_t best = best_of(ranked.data(), E, [&](int64_t e) {
      return is_open[e / per_group] && !is_taken[e];
    });
    is_taken[best] = true, experts[c] = best;
    total += weights[c] = scores[best];
  }
  for (int64_t c = 0; c < choice.chosen; ++c) {
    if (choice.is_normed) weights[c] /= total + kTiny;
    weights[c] *= choice.factor;
  }
}

// Which visits there are, those of an expert side by side.
struct Visits {
  std::vector<int64_t> first;  // (E + 1,): where those of an expert begin
  std::vector<int64_t> place;  // (N, C): where a row's lie
  std::vector<int64_t> row;    // (R,): whose they are

  void sort(const int64_t* experts, int64_t N, int64_t C, int64_t E) {
    first.assign(E + 1, 0), place.resize(N * C), row.resize(N * C);
    for (int64_t v = 0; v < N * C; ++v) ++first[experts[v] + 1];
    for (int64_t e = 0; e < E; ++e) first[e + 1] += first[e];
    std::vector<int64_t> next(first.begin(), first.end() - 1);
    for (int64_t v = 0; v < N * C; ++v) {
      place[v] = next[experts[v]]++;
      row[place[v]] = v / C;
    }
  }
};

// An expert that has visits, or the shared one, which has all rows.
struct Network {
  Packed gate_up, down;
  int64_t first, count;  // of its visits
  const int64_t* row;    // (count,): whose they are; of the shared one, none
  int64_t width() const { return gate_up.channels / 2; }
};

// Rows of a network's visits, `count` from the `begin` on.
void gather(const Network& network, const Rows& rows, int64_t begin, int64_t count, int64_t K,
            Rows& to) {
  to.resize(count, K);
  for (int64_t n = 0; n < count; ++n)
    to.take(n, rows, network.row ? network.row[begin + n] : begin + n);
}

// Few visits: a thread takes panels of any network, which reads all weights with all threads.
void visit_by_panels(const std::vector<Network>& networks, const Rows& rows, int64_t N, int64_t K,
                     float* out) {
  thread_local std::vector<Rows> kept_outer, kept_inner;
  std::vector<Rows>&outer = kept_outer, &inner = kept_inner;  // the caller's, in every thread
  const size_t count = networks.size();
  if (outer.size() < count) outer.resize(count), inner.resize(count);
  int64_t numbers = 0, total = 0;
  for (const Network& network : networks)
    numbers += network.count * network.gate_up.channels, total += network.count;
  float* both = scratch<2>(numbers).data();
  std::vector<Product> first, second;
  for (size_t g = 0; g < count; ++g) {
    const Network& network = networks[g];
    const bool is_all = network.count == N;  // then they are in order
    if (!is_all) gather(network, rows, 0, network.count, K, outer[g]);
    inner[g].resize(network.count, network.width());
    first.push_back({is_all ? &rows : &outer[g], network.gate_up, network.count, both});
    second.push_back({&inner[g], network.down, network.count, out + network.first * K});
    both += network.count * network.gate_up.channels;
  }
  multiply_all(first);
  for_rows(total, numbers / std::max<int64_t>(2 * total, 1), [&](int64_t v) {
    size_t g = 0;
    while (v >= networks[g].first + networks[g].count) ++g;
    quantize_gated(first[g].out, networks[g].width(), v - networks[g].first, inner[g]);
  });
  multiply_all(second);
}

// Many visits: a thread takes a few of a network's through all its layers, within its core's cache.
struct Chunk {
  size_t network;
  int64_t begin, count;
};

std::vector<Chunk> chunks_of(const std::vector<Network>& networks) {
  std::vector<Chunk> chunks;
  for (size_t g = 0; g < networks.size(); ++g) {
    const int64_t count = networks[g].count, pieces = (count + kRowsOfChunk - 1) / kRowsOfChunk;
    const int64_t size = (count + pieces - 1) / pieces;
    for (int64_t n = 0; n < count; n += size) chunks.push_back({g, n, std::min(size, count - n)});
  }
  return chunks;
}

void visit_by_chunks(const std::vector<Network>& networks, const std::vector<Chunk>& chunks,
                     const Rows& rows, int64_t K, float* out) {
  share(chunks.size(), 1, [&](int64_t number, int64_t last) {
    for (; number < last; ++number) {
      const auto [g, begin, count] = chunks[number];
      const Network& network = networks[g];
      const int64_t F = network.width();
      Rows& own = rows_of(count, K);
      gather(network, rows, begin, count, K, own);
      float* both = scratch<2>(count * 2 * F).data();
      multiply(own, network.gate_up, count, into<float>(both, 2 * F, nullptr));
      own.resize(count, F);
      for (int64_t n = 0; n < count; ++n) quantize_gated(both, F, n, own);
      float* to = out + (network.first + begin) * K;
      multiply(own, network.down, count, into<float>(to, K, nullptr));
    }
  });
}

std::tuple<Tensor, Tensor, Tensor, Tensor> moe(
    Tensor x, Tensor norm, double eps, Tensor router, std::optional<Tensor> bias, int64_t G,
    int64_t active_groups, int64_t C, bool is_softmax, bool is_normed, double factor,
    Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale,
    std::optional<Tensor> shared_gate_up, std::optional<Tensor> shared_gate_up_scale,
    std::optional<Tensor> shared_down, std::optional<Tensor> shared_down_scale) {
  const int64_t N = x.size(0), K = x.size(1), E = router.size(1), R = N * C;
  const int64_t F = gate_up_scale.numel() / E / 2;
  STD_TORCH_CHECK(x.dim() == 2 && norm.size(0) == K && norm.scalar_type() == x.scalar_type(),
                  "x must be (N, K), and the norm fit");
  STD_TORCH_CHECK(router.is_contiguous() && router.size(0) == K &&
                      router.scalar_type() == ScalarType::Float,
                  "the router must be (K, E) float32");
  STD_TORCH_CHECK(!bias || (bias->numel() == E && bias->scalar_type() == ScalarType::Float &&
                            bias->is_contiguous()),
                  "the bias must be (E,) float32");
  STD_TORCH_CHECK(G >= 1 && E % G == 0 && 1 <= active_groups && active_groups <= G && C >= 1 &&
                      C <= E / G * active_groups && (!bias || active_groups == G || E / G > 1),
                  "there are not so many experts or groups");
  STD_TORCH_CHECK(down_scale.numel() == E * K, "the experts must give K numbers");
  const Choice choice{bias ? bias->const_data_ptr<float>() : nullptr, E, G, active_groups, C,
                      is_softmax, is_normed, static_cast<float>(factor)};
  const int32_t is_float = aoti_torch_dtype_float32();
  Tensor out = empty({N, K}, code_of(x.scalar_type())), scores = empty({N, E}, is_float);
  Tensor experts = empty({N, C}, aoti_torch_dtype_int64()), weights = empty({N, C}, is_float);
  if (N == 0) return {out, scores, experts, weights};
  float *of_row = scores.mutable_data_ptr<float>(), *weight = weights.mutable_data_ptr<float>();
  int64_t* chosen = experts.mutable_data_ptr<int64_t>();

  thread_local Rows kept_rows;
  thread_local Visits kept_visits;
  Rows& rows = kept_rows;  // the caller's, in every thread
  Visits& visits = kept_visits;

  for_type(x, [&]<class T>(T*) {
    const T* from = x.const_data_ptr<T>();
    const T* of_x = norm.const_data_ptr<T>();
    rows.resize(N, K);
    in_chunks(N, [&](int64_t first, int64_t end) {
      const int64_t count = end - first;
      float* normed = scratch<1>(count * (K + E)).data();
      float* logits = normed + count * K;
      for_rows(count, K, [&](int64_t n) {
        normalize(from + (first + n) * K, of_x, K, eps, normed + n * K);
        rows.quantize(first + n, normed + n * K, K);
      });
      multiply_floats<float>({normed, K, 0, router.const_data_ptr<float>(), logits, E, 0, 1, K, E},
                             count);
      for_rows(count, E * (1 + C), [&](int64_t i) {
        const int64_t n = first + i;
        score(choice, logits + i * E, of_row + n * E);
        choose(choice, of_row + n * E, chosen + n * C, weight + n * C);
      });
    });
    visits.sort(chosen, N, C, E);

    std::vector<Network> networks;
    for (int64_t e = 0; e < E; ++e) {
      const int64_t first = visits.first[e], count = visits.first[e + 1] - first;
      if (count == 0) continue;
      networks.push_back({packed_of(gate_up, gate_up_scale, K, e, E),
                          packed_of(down, down_scale, F, e, E), first, count,
                          visits.row.data() + first});
    }
    if (shared_gate_up) {
      const int64_t width = shared_gate_up_scale->numel() / 2;
      networks.push_back({packed_of(*shared_gate_up, *shared_gate_up_scale, K),
                          packed_of(*shared_down, *shared_down_scale, width), R, N, nullptr});
      STD_TORCH_CHECK(networks.back().down.channels == K, "shared experts must give K numbers");
    }
    float* given = scratch<3>((R + N) * K).data();
    const std::vector<Chunk> chunks = chunks_of(networks);
    if (static_cast<int64_t>(chunks.size()) < kChunksPerThread * Team::get().threads())
      visit_by_panels(networks, rows, N, K, given);
    else
      visit_by_chunks(networks, chunks, rows, K, given);

    T* to = out.mutable_data_ptr<T>();
    for_rows(N, K * (C + 1), [&](int64_t n) {
      float* sum = scratch<0>(K).data();
      std::fill_n(sum, K, 0.0f);
      for (int64_t v = n * C; v < (n + 1) * C; ++v) {
        const float* visit = given + visits.place[v] * K;
        const float share = weight[v];
        for (int64_t k = 0; k < K; ++k) sum[k] += visit[k] * share;
      }
      if (shared_gate_up)
        for (int64_t k = 0; k < K; ++k) sum[k] += given[(R + n) * K + k];
      for (int64_t k = 0; k < K; ++k)
        to[n * K + k] = static_cast<T>(static_cast<float>(from[n * K + k]) + sum[k]);
    });
  });
  return {out, scores, experts, weights};
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_packed_experts, library) {
  library.def(
      "moe(Tensor x, Tensor norm, float eps, Tensor router, Tensor? bias, int num_groups, "
      "int num_active_groups, int num_chosen, bool is_softmax, bool is_normed, float factor, "
      "Tensor gate_up, Tensor gate_up_scale, Tensor down, Tensor down_scale, "
      "Tensor? shared_gate_up, Tensor? shared_gate_up_scale, Tensor? shared_down, "
      "Tensor? shared_down_scale) -> (Tensor, Tensor, Tensor, Tensor)");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_packed_experts, CPU, library) {
  library.impl("moe", TORCH_BOX(&moe));
}

#endif
