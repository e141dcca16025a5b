// Causal attention inside documents, forward and backward, in float32 whatever the tensors are in.
//
// Work is handed out by (document, query head). Within one, blocks of queries meet blocks of the
// keys that they see; scores never leave the cache, and the backward pass computes them again
// (arXiv 2205.14135). All five products are one routine over packed float32 panels. A head's sums
// run in one order whatever the threads do, and shared keys add up their heads' parts afterwards.
//
// N tokens, flattened; H query heads, G of which share one of KV key heads; D width of a head, E the
// same rounded up to whole vectors; M tokens of a document, R the same rounded up.

#include <algorithm>
#include <atomic>
#include <cmath>
#include <cstdint>
#include <cstring>
#include <limits>
#include <optional>
#include <tuple>
#include <vector>

#ifdef __clang__
#pragma clang fp contract(fast)
#else
#pragma GCC optimize("fp-contract=fast")  // products and sums become one instruction
#endif

#include "exponential.h"
#include "tensors.h"

namespace {

using namespace astrai;

// A vector is one register: wider ones, which compilers can split, GCC sends through memory.
#ifdef __AVX512F__
constexpr int kLanes = 16, kTileRows = 8;  // 16 of 32 registers hold sums
#else
constexpr int kLanes = 8, kTileRows = 6;  // 12 of 16
#endif
constexpr int kTileVectors = 2;
constexpr int64_t kPanel = kLanes * kTileVectors;  // columns that one tile covers
constexpr int64_t kQueries = kTileRows * 4;        // of a block: few, so that little is hidden
constexpr int64_t kKeys = 256;                     // of a block

typedef float Vector __attribute__((vector_size(kLanes * sizeof(float)), aligned(4)));

int64_t rounded_up(int64_t n) { return (n + kPanel - 1) / kPanel * kPanel; }

// c (ROWS, kPanel) += a (ROWS, depth) b (depth, kPanel); a may be transposed.
template <int ROWS>
inline void tile(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t ldb,
                 float* c, int64_t ldc, int64_t depth) {
  Vector sum[ROWS][kTileVectors];
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kTileVectors; ++v)
      sum[r][v] = *reinterpret_cast<const Vector*>(c + r * ldc + v * kLanes);
  for (int64_t k = 0; k < depth; ++k, a += depth_step, b += ldb) {
    Vector column[kTileVectors];
    for (int v = 0; v < kTileVectors; ++v)
      column[v] = *reinterpret_cast<const Vector*>(b + v * kLanes);
    for (int r = 0; r < ROWS; ++r) {
      const float factor = a[r * row_step];
      for (int v = 0; v < kTileVectors; ++v) sum[r][v] += factor * column[v];
    }
  }
  for (int r = 0; r < ROWS; ++r)
    for (int v = 0; v < kTileVectors; ++v)
      *reinterpret_cast<Vector*>(c + r * ldc + v * kLanes) = sum[r][v];
}

// The last rows of a product, fewer than kTileRows, in one tile of their own height.
template <int ROWS>
inline void rest(int64_t rows, const float* a, int64_t row_step, int64_t depth_step, const float* b,
                 int64_t ldb, float* c, int64_t ldc, int64_t depth) {
  if (rows == ROWS)
    tile<ROWS>(a, row_step, depth_step, b, ldb, c, ldc, depth);
  else if constexpr (ROWS > 1)
    rest<ROWS - 1>(rows, a, row_step, depth_step, b, ldb, c, ldc, depth);
}

// c (rows, columns) += a (rows, depth) b (depth, columns); columns are whole panels.
void add_product(const float* a, int64_t row_step, int64_t depth_step, const float* b, int64_t ldb,
                 float* c, int64_t ldc, int64_t rows, int64_t columns, int64_t depth) {
  for (int64_t j = 0; j < columns; j += kPanel) {
    int64_t i = 0;
    for (; i + kTileRows <= rows; i += kTileRows)
      tile<kTileRows>(a + i * row_step, row_step, depth_step, b + j, ldb, c + i * ldc + j, ldc,
                      depth);
    rest<kTileRows - 1>(rows - i, a + i * row_step, row_step, depth_step, b + j, ldb,
                        c + i * ldc + j, ldc, depth);
  }
}

float largest(const float* x, int64_t n) {
  float lane[kLanes], most = -std::numeric_limits<float>::infinity();
  std::fill_n(lane, kLanes, most);
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] = lane[l] > x[i + l] ? lane[l] : x[i + l];
  for (float one : lane) most = std::max(most, one);
  for (; i < n; ++i) most = std::max(most, x[i]);
  return most;
}

float total(const float* x, int64_t n) {
  float lane[kLanes] = {}, sum = 0;
  int64_t i = 0;
  for (; i + kLanes <= n; i += kLanes)
    for (int l = 0; l < kLanes; ++l) lane[l] += x[i + l];
  for (float one : lane) sum += one;
  for (; i < n; ++i) sum += x[i];
  return sum;
}

struct Shape {
  int64_t N, H, KV, D, E, window;  // a window of 0 is none
  float scale;
};

struct Task {
  int64_t start, length, head;
};

// The rows of one head, (length, E), with zeros beyond D.
template <class T>
void unpack(const T* from, int64_t row_step, int64_t length, const Shape& shape, float factor,
            float* to) {
  for (int64_t n = 0; n < length; ++n, from += row_step, to += shape.E) {
    for (int64_t d = 0; d < shape.D; ++d) to[d] = static_cast<float>(from[d]) * factor;
    std::fill(to + shape.D, to + shape.E, 0.0f);
  }
}

// Rows (length, E) turned to (E, R); the columns beyond `length` are zero.
void transpose(const float* from, int64_t length, int64_t E, int64_t R, float* to) {
  constexpr int64_t kSide = 16;
  for (int64_t n = 0; n < R; n += kSide)
    for (int64_t d = 0; d < E; d += kSide)
      for (int64_t j = d; j < d + kSide; ++j)
        for (int64_t i = n; i < n + kSide; ++i)
          to[j * R + i] = i < length ? from[i * E + j] : 0.0f;
}

// Which keys a block of queries meets, and which of them a query sees.
struct Seen {
  const Shape& shape;
  int64_t first(int64_t query) const {
    return shape.window ? std::max<int64_t>(0, query - shape.window + 1) : 0;
  }
  // first key of the first block, on a panel's edge
  int64_t begin(int64_t query) const { return first(query) / kPanel * kPanel; }
};

template <class T>
class Forward {
 public:
  Forward(const Shape& shape, const T* q, const T* k, const T* v, T* out, float* totals)
      : shape_(shape), seen_{shape}, q_(q), k_(k), v_(v), out_(out), totals_(totals) {}

  void operator()(const Task& task) {
    const auto [N, H, KV, D, E, window, scale] = shape_;
    const int64_t length = task.length, R = rounded_up(length), kv = task.head / (H / KV);
    keys_.resize(R * E), values_.resize(R * E), rows_.resize(R * E);
    unpack(k_ + (task.start * KV + kv) * D, KV * D, length, shape_, 1.0f, rows_.data());
    transpose(rows_.data(), length, E, R, keys_.data());
    unpack(v_ + (task.start * KV + kv) * D, KV * D, length, shape_, 1.0f, values_.data());
    queries_.resize(kQueries * E), scores_.resize(kQueries * kKeys), sums_.resize(kQueries * E);
    for (int64_t query = 0; query < length; query += kQueries) block(task, query);
  }

 private:
  void block(const Task& task, int64_t query) {
    const auto [N, H, KV, D, E, window, scale] = shape_;
    const int64_t R = rounded_up(task.length), stop = std::min(query + kQueries, task.length);
    const int64_t rows = stop - query, place = (task.start + query) * H + task.head;
    float most[kQueries], weight[kQueries];
    std::fill_n(most, kQueries, -std::numeric_limits<float>::infinity());
    std::fill_n(weight, kQueries, 0.0f);
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    unpack(q_ + place * D, H * D, rows, shape_, scale, queries_.data());
    for (int64_t key = seen_.begin(query); key < stop; key += kKeys) {
      const int64_t end = std::min(key + kKeys, stop), width = rounded_up(end - key);
      for (int64_t r = 0; r < rows; ++r) std::fill_n(scores_.data() + r * kKeys, width, 0.0f);
      add_product(queries_.data(), E, 1, keys_.data() + key, R, scores_.data(), kKeys, rows, width,
                  E);
      for (int64_t r = 0; r < rows; ++r) {
        float* row = scores_.data() + r * kKeys;
        const int64_t from = std::clamp<int64_t>(seen_.first(query + r) - key, 0, width);
        const int64_t to = std::clamp<int64_t>(query + r + 1 - key, 0, width);
        if (from >= to) {
          std::fill_n(row, width, 0.0f);
          continue;
        }
        const float before = most[r];
        most[r] = std::max(before, largest(row + from, to - from));
        const float shift = most[r];
        std::fill_n(row, from, 0.0f);
        for (int64_t j = from; j < to; ++j) row[j] = exponential(row[j] - shift);
        std::fill(row + to, row + width, 0.0f);
        const float kept = std::exp(before - shift);
        weight[r] = weight[r] * kept + total(row + from, to - from);
        if (kept != 1.0f)
          for (int64_t d = 0; d < E; ++d) sums_[r * E + d] *= kept;
      }
      add_product(scores_.data(), kKeys, 1, values_.data() + key * E, E, sums_.data(), E, rows, E,
                  end - key);
    }
    for (int64_t r = 0; r < rows; ++r) {
      const float factor = 1.0f / weight[r];
      T* row = out_ + (place + r * H) * D;
      for (int64_t d = 0; d < D; ++d) row[d] = static_cast<T>(sums_[r * E + d] * factor);
      totals_[task.head * N + task.start + query + r] = most[r] + std::log(weight[r]);
    }
  }

  Shape shape_;
  Seen seen_;
  const T *q_, *k_, *v_;
  T* out_;
  float* totals_;
  std::vector<float> keys_, values_, rows_, queries_, scores_, sums_;
};

template <class T>
class Backward {
 public:
  Backward(const Shape& shape, const T* grad, const T* q, const T* k, const T* v, const T* out,
           const float* totals, T* of_q, float* of_k, float* of_v)
      : shape_(shape), seen_{shape}, grad_(grad), q_(q), k_(k), v_(v), out_(out), totals_(totals),
        of_q_(of_q), of_k_(of_k), of_v_(of_v) {}

  // of_k and of_v are (H, N, D): what this query head adds to its key head
  void operator()(const Task& task) {
    const auto [N, H, KV, D, E, window, scale] = shape_;
    const int64_t length = task.length, R = rounded_up(length), kv = task.head / (H / KV);
    for (auto* one : {&keys_, &keys_turned_, &values_turned_, &rows_}) one->resize(R * E);
    unpack(k_ + (task.start * KV + kv) * D, KV * D, length, shape_, 1.0f, keys_.data());
    transpose(keys_.data(), length, E, R, keys_turned_.data());
    unpack(v_ + (task.start * KV + kv) * D, KV * D, length, shape_, 1.0f, rows_.data());
    transpose(rows_.data(), length, E, R, values_turned_.data());
    key_sums_.assign(R * E, 0.0f), value_sums_.assign(R * E, 0.0f);
    for (auto* one : {&queries_, &grads_, &sums_}) one->resize(kQueries * E);
    scores_.resize(kQueries * kKeys), slopes_.resize(kQueries * kKeys);
    for (int64_t query = 0; query < length; query += kQueries) block(task, query);
    for (int64_t n = 0; n < length; ++n) {
      const int64_t place = (task.head * N + task.start + n) * D;
      std::copy_n(key_sums_.data() + n * E, D, of_k_ + place);
      std::copy_n(value_sums_.data() + n * E, D, of_v_ + place);
    }
  }

 private:
  void block(const Task& task, int64_t query) {
    const auto [N, H, KV, D, E, window, scale] = shape_;
    const int64_t R = rounded_up(task.length), stop = std::min(query + kQueries, task.length);
    const int64_t rows = stop - query, place = (task.start + query) * H + task.head;
    unpack(q_ + place * D, H * D, rows, shape_, scale, queries_.data());
    unpack(grad_ + place * D, H * D, rows, shape_, 1.0f, grads_.data());
    float shared[kQueries];  // sum of out * grad: what all slopes of a query have in common
    for (int64_t r = 0; r < rows; ++r) {
      const T* row = out_ + (place + r * H) * D;
      float sum = 0;
      for (int64_t d = 0; d < D; ++d) sum += static_cast<float>(row[d]) * grads_[r * E + d];
      shared[r] = sum;
    }
    std::fill(sums_.begin(), sums_.end(), 0.0f);
    for (int64_t key = seen_.begin(query); key < stop; key += kKeys) {
      const int64_t end = std::min(key + kKeys, stop), width = rounded_up(end - key);
      for (int64_t r = 0; r < rows; ++r) {
        std::fill_n(scores_.data() + r * kKeys, width, 0.0f);
        std::fill_n(slopes_.data() + r * kKeys, width, 0.0f);
      }
      add_product(queries_.data(), E, 1, keys_turned_.data() + key, R, scores_.data(), kKeys, rows,
                  width, E);
      add_product(grads_.data(), E, 1, values_turned_.data() + key, R, slopes_.data(), kKeys, rows,
                  width, E);
      for (int64_t r = 0; r < rows; ++r) {
        float *row = scores_.data() + r * kKeys, *slope = slopes_.data() + r * kKeys;
        const int64_t from = std::clamp<int64_t>(seen_.first(query + r) - key, 0, width);
        const int64_t to = std::clamp<int64_t>(query + r + 1 - key, from, width);
        const float shift = totals_[task.head * N + task.start + query + r], common = shared[r];
        for (int64_t j = from; j < to; ++j) {
          row[j] = exponential(row[j] - shift);
          slope[j] = row[j] * (slope[j] - common);
        }
        for (float* one : {row, slope}) {
          std::fill_n(one, from, 0.0f);
          std::fill(one + to, one + width, 0.0f);
        }
      }
      const int64_t depth = end - key;
      add_product(slopes_.data(), kKeys, 1, keys_.data() + key * E, E, sums_.data(), E, rows, E,
                  depth);
      add_product(slopes_.data(), 1, kKeys, queries_.data(), E, key_sums_.data() + key * E, E,
                  depth, E, rows);
      add_product(scores_.data(), 1, kKeys, grads_.data(), E, value_sums_.data() + key * E, E,
                  depth, E, rows);
    }
    for (int64_t r = 0; r < rows; ++r) {
      T* row = of_q_ + (place + r * H) * D;
      for (int64_t d = 0; d < D; ++d) row[d] = static_cast<T>(sums_[r * E + d] * scale);
    }
  }

  Shape shape_;
  Seen seen_;
  const T *grad_, *q_, *k_, *v_, *out_;
  const float* totals_;
  T* of_q_;
  float *of_k_, *of_v_;
  std::vector<float> keys_, keys_turned_, values_turned_, rows_, key_sums_, value_sums_, queries_,
      grads_, sums_, scores_, slopes_;
};

// Every document by every head, the longest first: whoever is free takes the next.
std::vector<Task> tasks_of(const Tensor& document_ids, int64_t num_heads) {
  STD_TORCH_CHECK(document_ids.is_contiguous() && document_ids.dim() == 2 &&
                      document_ids.scalar_type() == ScalarType::Long,
                  "document_ids must be (B, T) int64");
  const int64_t* ids = document_ids.const_data_ptr<int64_t>();
  const int64_t N = document_ids.numel(), T = document_ids.size(1);
  std::vector<Task> tasks;
  for (int64_t start = 0; start < N;) {
    int64_t stop = start + 1;
    while (stop < N && stop % T != 0 && ids[stop] == ids[start]) ++stop;
    if (ids[start] >= 0)
      for (int64_t head = 0; head < num_heads; ++head)
        tasks.push_back({start, stop - start, head});
    start = stop;
  }
  std::stable_sort(tasks.begin(), tasks.end(),
                   [](const Task& a, const Task& b) { return a.length > b.length; });
  return tasks;
}

template <class Worker>
void run(const std::vector<Task>& tasks, const Worker& prototype) {
  std::atomic<size_t> next{0};
  const int64_t workers = std::min<int64_t>(torch::stable::get_num_threads(), tasks.size());
  torch::stable::parallel_for(0, workers, 1, [&](int64_t begin, int64_t end) {
    if (begin >= end) return;
    Worker worker = prototype;
    for (size_t mine; (mine = next++) < tasks.size();) worker(tasks[mine]);
  });
}

Shape shape_of(const Tensor& q, const Tensor& k, const Tensor& v, double scale,
               std::optional<int64_t> window) {
  for (const Tensor& x : {q, k, v})
    STD_TORCH_CHECK(x.dim() == 3 && x.is_contiguous() && x.size(0) == q.size(0) &&
                        x.size(2) == q.size(2) && x.scalar_type() == q.scalar_type(),
                    "q must be (N, H, D), k and v (N, KV, D), contiguous and of one type");
  const int64_t D = q.size(2);
  STD_TORCH_CHECK(k.size(1) == v.size(1) && q.size(1) % k.size(1) == 0, "heads do not fit");
  return {q.size(0), q.size(1), k.size(1), D, rounded_up(D), window.value_or(0),
          static_cast<float>(scale)};
}

// Padding (its id is negative) is left as it is in what is written.
void forward(Tensor q, Tensor k, Tensor v, Tensor document_ids, double scale,
             std::optional<int64_t> window, Tensor out, Tensor totals) {
  const Shape shape = shape_of(q, k, v, scale, window);
  const std::vector<Task> tasks = tasks_of(document_ids, shape.H);
  for_type(q, [&]<class T>(T*) {
    run(tasks, Forward<T>(shape, q.const_data_ptr<T>(), k.const_data_ptr<T>(),
                          v.const_data_ptr<T>(), out.mutable_data_ptr<T>(),
                          totals.mutable_data_ptr<float>()));
  });
}

void backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor document_ids, Tensor out,
              Tensor totals, double scale, std::optional<int64_t> window, Tensor of_q, Tensor of_k,
              Tensor of_v) {
  const Shape shape = shape_of(q, k, v, scale, window);
  STD_TORCH_CHECK(grad.is_contiguous() && out.is_contiguous(), "grad and out must be contiguous");
  const std::vector<Task> tasks = tasks_of(document_ids, shape.H);
  for_type(q, [&]<class T>(T*) {
    run(tasks,
        Backward<T>(shape, grad.const_data_ptr<T>(), q.const_data_ptr<T>(), k.const_data_ptr<T>(),
                    v.const_data_ptr<T>(), out.const_data_ptr<T>(), totals.const_data_ptr<float>(),
                    of_q.mutable_data_ptr<T>(), of_k.mutable_data_ptr<float>(),
                    of_v.mutable_data_ptr<float>()));
  });
}

}  // namespace

STABLE_TORCH_LIBRARY(astrai_documents, library) {
  library.def(
      "forward(Tensor q, Tensor k, Tensor v, Tensor document_ids, float scale, int? window, "
      "Tensor(a!) out, Tensor(b!) totals) -> ()");
  library.def(
      "backward(Tensor grad, Tensor q, Tensor k, Tensor v, Tensor document_ids, Tensor out, "
      "Tensor totals, float scale, int? window, Tensor(a!) of_q, Tensor(b!) of_k, "
      "Tensor(c!) of_v) -> ()");
}
STABLE_TORCH_LIBRARY_IMPL(astrai_documents, CPU, library) {
  library.impl("forward", TORCH_BOX(&forward));
  library.impl("backward", TORCH_BOX(&backward));
}
