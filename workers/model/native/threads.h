// The threads of one decoder, their barrier, and how they share out the chunks of an operation.
//
// Threads are started by the first call after a fork, wait on a futex between calls, and are joined
// by `stop`. A call is done by as many of them as `use` said before it, the calling one included.
// Invariant: a waiting thread spins for kSpinTicks at most, then sleeps. Knows nothing of what is
// computed.
#pragma once
#include <linux/futex.h>
#include <pthread.h>
#include <signal.h>
#include <sys/syscall.h>
#include <unistd.h>

#include <atomic>
#include <climits>
#include <cstdint>
#include <vector>

#include "platform.h"

// A word that threads wait on until it changes.
struct Signal {
  alignas(64) std::atomic<uint32_t> word{0};
  alignas(64) std::atomic<uint32_t> num_sleeping{0};

  void wait_while(uint32_t value) {
    const uint64_t start = ticks();
    while (word.load(std::memory_order_acquire) == value) {
      pause_thread();
      if (ticks() - start > kSpinTicks) {
        num_sleeping.fetch_add(1);
        while (word.load() == value)
          syscall(SYS_futex, &word, FUTEX_WAIT_PRIVATE, value, nullptr, nullptr, 0);
        num_sleeping.fetch_sub(1);
        return;
      }
    }
  }
  void advance() { set(word.load(std::memory_order_relaxed) + 1); }
  void set(uint32_t value) {
    word.store(value);
    if (num_sleeping.load())
      syscall(SYS_futex, &word, FUTEX_WAKE_PRIVATE, INT_MAX, nullptr, nullptr, 0);
  }
};

class Threads {
 public:
  explicit Threads(int most) : most_(most), count_(most), next_(most), pid_(getpid()) {}

  bool of_this_process() const { return pid_ == getpid(); }

  // So many threads do the next calls. No call may be under way.
  void use(int count) { count_ = count < 1 || count > most_ ? most_ : count; }

  // Call work(argument, index) on each of them, this one with index 0. False: no thread to be had.
  bool run(void (*work)(void*, int), void* argument) {
    if (!start()) return false;
    work_ = work;
    argument_ = argument;
    reset();
    call();
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
      stopping_.store(true);
      call();
      for (pthread_t handle : handles_) pthread_join(handle, nullptr);
      handles_.clear();
      stopping_.store(false);
    }
  }

 private:
  struct Seat {
    Threads* threads;
    int index;
    uint32_t seen;  // the last call that it knows of
  };
  struct alignas(64) Counter {
    std::atomic<int> value{0};
  };

  void reset() {
    for (auto& counter : next_) counter.value.store(0, std::memory_order_relaxed);
  }

  bool start() {
    if (int(seats_.size()) < most_)
      for (int i = 0; i < most_; i++) seats_.push_back({this, i, 0});
    if (int(handles_.size()) == most_ - 1) return true;
    sigset_t all, before;
    sigfillset(&all);  // signals are the interpreter's, but for a thread's own faults
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    while (int(handles_.size()) < most_ - 1) {
      pthread_t handle;
      seats_[handles_.size() + 1].seen = calls_.word.load();
      if (pthread_create(&handle, nullptr, main, &seats_[handles_.size() + 1])) break;
      handles_.push_back(handle);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return int(handles_.size()) == most_ - 1;
  }

  // The number of a call and of its threads travel in one word: a thread that takes no part may see
  // it late, or not at all, and must not take the one for the other's.
  void call() { calls_.set(++num_calls_ << kCountBits | uint32_t(count_)); }

  static void* main(void* at) {
    Seat* seat = (Seat*)at;
    Threads* threads = seat->threads;
    for (;;) {
      threads->calls_.wait_while(seat->seen);
      seat->seen = threads->calls_.word.load();
      if (threads->stopping_.load()) return nullptr;
      if (seat->index >= int(seat->seen & ((1u << kCountBits) - 1))) continue;
      threads->work_(threads->argument_, seat->index);
      threads->barrier();
    }
  }

  static constexpr int kCountBits = 9;  // most_ is 256 at most

  const int most_;
  int count_;
  uint32_t num_calls_ = 0;
  std::atomic<bool> stopping_{false};
  std::vector<Counter> next_;
  std::vector<Seat> seats_;
  std::vector<pthread_t> handles_;
  const pid_t pid_;
  void (*work_)(void*, int) = nullptr;
  void* argument_ = nullptr;
  Signal calls_, phase_;
  alignas(64) std::atomic<uint32_t> arrived_{0};
};
