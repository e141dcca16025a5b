// A few threads that share loops, for steps of microseconds.
//
// A decoding step is a hundred short loops one after the other. Between them the helpers spin, then
// offer their core to whoever waits for it, and after a millisecond without work they sleep, so that
// an idle process costs nothing. Pieces are claimed one by one: a thread that loses its core for a
// moment delays one piece and not its half of the loop.

#pragma once

#include <immintrin.h>
#include <sched.h>
#include <torch/csrc/stable/ops.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdint>
#include <mutex>
#include <thread>

namespace astrai {

class Team {
 public:
  static Team& get() {
    static Team* team = new Team;  // never destroyed: helpers may outlive main
    return *team;
  }

  // How many threads share loops from now on, whatever torch's own number is; 0 follows torch.
  // Returns what it was.
  int64_t use(int64_t threads) { return wanted_.exchange(threads, std::memory_order_relaxed); }
  int64_t threads() const {
    const int64_t wanted = wanted_.load(std::memory_order_relaxed);
    return wanted ? wanted : torch::stable::get_num_threads();
  }

  // Call work(piece) for each of `pieces` pieces, on up to `threads` threads, this one included.
  template <class Work>
  void run(int64_t pieces, int64_t threads, Work&& work) {
    std::unique_lock<std::mutex> lock(busy_, std::defer_lock);
    // a second caller, or a piece that shares a loop itself, works alone
    if (pieces < 2 || threads < 2 || is_helping || pieces >= kMost || !lock.try_lock()) {
      for (int64_t piece = 0; piece < pieces; ++piece) work(piece);
      return;
    }
    is_helping = true;
    while (helpers_ < threads - 1 && helpers_ < kMostHelpers) {
      std::thread(&Team::help, this).detach();
      ++helpers_;
    }
    call_ = [](void* context, int64_t piece) { (*static_cast<Work*>(context))(piece); };
    context_ = &work;
    done_.store(0, std::memory_order_relaxed);
    round_ = (round_ + 1) & 0xffff;
    state_.store(round_ << 48 | static_cast<uint64_t>(pieces) << 24, std::memory_order_seq_cst);
    if (sleepers_.load(std::memory_order_seq_cst) > 0) {
      alarm_.fetch_add(1, std::memory_order_seq_cst);
      alarm_.notify_all();
    }
    while (claim()) {
    }
    for (int spins = 0; done_.load(std::memory_order_acquire) < pieces; ++spins)
      spins < kSpins ? _mm_pause() : static_cast<void>(sched_yield());
    is_helping = false;
  }

 private:
  using Clock = std::chrono::steady_clock;
  static constexpr int64_t kMost = 1 << 23, kMostHelpers = 63;
  static constexpr int kSpins = 2000;
  static constexpr auto kPatience = std::chrono::microseconds(1000);
  static inline thread_local bool is_helping = false;

  // The round, how many pieces it has and how many are claimed, in one word: so a helper that comes
  // late can never take a piece of the next round for one of its own.
  bool claim() {
    const uint64_t before = state_.load(std::memory_order_acquire);
    if ((before & 0xffffff) >= (before >> 24 & 0xffffff)) return false;
    const uint64_t state = state_.fetch_add(1, std::memory_order_acq_rel);
    const int64_t piece = state & 0xffffff;
    if (piece >= static_cast<int64_t>(state >> 24 & 0xffffff)) return false;
    call_(context_, piece);
    done_.fetch_add(1, std::memory_order_release);
    return true;
  }

  void help() {
    is_helping = true;
    for (;;) {
      int spins = 0;
      Clock::time_point since;
      while (!claim()) {
        if (++spins < kSpins) {
          _mm_pause();
          continue;
        }
        if (spins == kSpins) since = Clock::now();
        sched_yield();
        if (Clock::now() - since < kPatience) continue;
        const uint32_t heard = alarm_.load(std::memory_order_seq_cst);
        sleepers_.fetch_add(1, std::memory_order_seq_cst);
        const uint64_t state = state_.load(std::memory_order_seq_cst);
        if ((state & 0xffffff) >= (state >> 24 & 0xffffff)) alarm_.wait(heard);
        sleepers_.fetch_sub(1, std::memory_order_seq_cst);
        spins = 0;
      }
    }
  }

  std::mutex busy_;
  std::atomic<int64_t> wanted_{0};
  void (*call_)(void*, int64_t) = nullptr;
  void* context_ = nullptr;
  uint64_t round_ = 0;
  int64_t helpers_ = 0;
  alignas(64) std::atomic<uint64_t> state_{0};
  alignas(64) std::atomic<int64_t> done_{0};
  alignas(64) std::atomic<uint32_t> alarm_{0};
  std::atomic<int> sleepers_{0};
};

// Call f(begin, end) on ranges that make up [0, count), each of `grain` or more.
template <class F>
void share(int64_t count, int64_t grain, F&& f) {
  if (count <= 0) return;
  const int64_t threads = Team::get().threads();
  const int64_t most = std::max<int64_t>(1, count / std::max<int64_t>(1, grain));
  const int64_t pieces = threads < 2 ? 1 : std::min(most, 8 * threads);
  Team::get().run(pieces, threads, [&](int64_t piece) {
    f(piece * count / pieces, (piece + 1) * count / pieces);
  });
}

}  // namespace astrai
