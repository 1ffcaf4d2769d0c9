// The threads of one decoder, their barrier, and how they share out the chunks of an operation.
//
// Threads are started by the first call after a fork, wait on a futex between calls, and are joined
// by `stop`. Invariant: a waiting thread spins for kSpinCycles at most, then sleeps. Knows nothing of
// what is computed.
#pragma once
#include <immintrin.h>
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <vector>

constexpr uint64_t kSpinCycles = 120'000;  // about 50 us

// A word that threads wait on until it changes.
struct Signal {
  alignas(64) std::atomic<uint32_t> word{0};
  alignas(64) std::atomic<uint32_t> num_sleeping{0};

  void wait_while(uint32_t value) {
    const uint64_t start = __rdtsc();
    while (word.load(std::memory_order_acquire) == value) {
      _mm_pause();
      if (__rdtsc() - start > kSpinCycles) {
        num_sleeping.fetch_add(1);
        while (word.load() == value)
          syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
        num_sleeping.fetch_sub(1);
        return;
      }
    }
  }
  void advance() {
    word.fetch_add(1);
    if (num_sleeping.load())
      syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
};

class Threads {
 public:
  explicit Threads(int count) : count_(count), next_(count), pid_(getpid()) {}

  bool of_this_process() const { return pid_ == getpid(); }

  // Call work(argument, index) on every thread, this one with index 0. False: no thread to be had.
  bool run(void (*work)(void*, int), void* argument) {
    if (!start()) return false;
    work_ = work;
    argument_ = argument;
    reset();
    calls_.advance();
    work(argument, 0);
    barrier();
    return true;
  }

  // All threads have to come; then the chunks of the next operation are there to take.
  void barrier() {
    const uint32_t phase = phase_.word.load();
    if (arrived_.fetch_add(1) + 1 == uint32_t(count_)) {
      arrived_.store(0);
      reset();
      phase_.advance();
    } else {
      phase_.wait_while(phase);
    }
  }

  // The next of `num_chunks`, or -1: of the thread's own contiguous share, then of the others'.
  int take(int thread, int num_chunks) {
    for (int i = 0; i < count_; i++) {
      const int owner = (thread + i) % count_;
      const int begin = share(owner, num_chunks), end = share(owner + 1, num_chunks);
      if (begin + next_[owner].value.load(std::memory_order_relaxed) >= end) continue;
      const int chunk = begin + next_[owner].value.fetch_add(1, std::memory_order_relaxed);
      if (chunk < end) return chunk;
    }
    return -1;
  }
  // The next of `num_chunks`, or -1: in order, whoever comes.
  int take_in_order(int num_chunks) {
    if (next_[0].value.load(std::memory_order_relaxed) >= num_chunks) return -1;
    const int chunk = next_[0].value.fetch_add(1, std::memory_order_relaxed);
    return chunk < num_chunks ? chunk : -1;
  }
  int share(int thread, int num_chunks) const {
    return int(int64_t(num_chunks) * thread / count_);
  }

  int count() const { return count_; }

  // No call may be under way.
  void stop() {
    if (!handles_.empty()) {
      work_ = nullptr;
      calls_.advance();
      for (pthread_t handle : handles_) pthread_join(handle, nullptr);
      handles_.clear();
    }
  }

 private:
  struct Seat {
    Threads* threads;
    int index;
  };
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };

  void reset() {
    for (auto& counter : next_) counter.value.store(0, std::memory_order_relaxed);
  }

  bool start() {
    if (int(seats_.size()) < count_)
      for (int i = 0; i < count_; i++) seats_.push_back({this, i});
    if (int(handles_.size()) == count_ - 1) return true;
    sigset_t all, before;
    sigfillset(&all);
    pthread_sigmask(SIG_SETMASK, &all, &before);  // signals are the interpreter's
    while (int(handles_.size()) < count_ - 1) {
      pthread_t handle;
      if (pthread_create(&handle, nullptr, main, &seats_[handles_.size() + 1])) break;
      handles_.push_back(handle);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return int(handles_.size()) == count_ - 1;
  }

  static void* main(void* seat) {
    auto* threads = ((Seat*)seat)->threads;
    for (uint32_t call = threads->first_call_;; call++) {
      threads->calls_.wait_while(call);
      if (!threads->work_) return nullptr;
      threads->work_(threads->argument_, ((Seat*)seat)->index);
      threads->barrier();
    }
  }

  const int count_;
  std::vector<Counter> next_;
  std::vector<Seat> seats_;
  std::vector<pthread_t> handles_;
  const pid_t pid_;
  const uint32_t first_call_ = 0;
  void (*work_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  Signal calls_, phase_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
};
