// Sums rows of numbers over the ranks of a group, in memory that all of them have mapped.
//
//   | header | a line for each rank | parts of even sums, of each rank | parts of odd sums |
//
// A sum is one round: each rank writes its part, then the round's number into its own line, waits
// until all lines have come that far, and adds all parts up in the order of the ranks. Invariants:
// all ranks that get a sum get the same bits; a part is overwritten only after every rank has begun
// the next round, and so has read it; who waits sees a rank that ended, left or broke the group
// within a slice, and gives up at its deadline. After an error the group is of no more use: who met it
// writes to memory of its own and publishes no more, for others may still read what it wrote before.
//
// One thread of a rank publishes; any of them may wait and read. Nothing is taken from a line for an
// index or a size. Handles are of one process: a forked child joins by itself.
#include <cerrno>
#include <climits>
#include <cstdint>
#include <cstring>
#include <memory>
#include <new>
#include <vector>

#include <linux/futex.h>
#include <poll.h>
#include <sys/syscall.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>

#include "../model/native/platform.h"

extern "C" {

enum Result : int64_t {
  kDone = 0,
  kTimedOut = 1,
  kEnded = 2,   // the rank's process has
  kLeft = 3,
  kBroken = 4,  // another rank has given up for the sake of `rank`
  kForked = 5,  // the handle is another process's
};

struct Outcome {
  int64_t result, rank;
};

}  // extern "C"

namespace {

constexpr uint64_t kMagic = 0x6f6e65636f707931;  // "onecopy1"
constexpr int kMaxRanks = 64;
constexpr int64_t kLine = 64;
constexpr int64_t kSliceNs = 20'000'000;  // how long a rank sleeps before it looks at its peers
constexpr int64_t kPiece = 512;           // numbers that are added up at a time

enum State : uint32_t { kAbsent = 0, kJoined = 1, kHasLeft = 2 };

struct alignas(kLine) Header {
  uint64_t magic;
  int64_t num_ranks, capacity;
  uint32_t first;  // the lines' number before the first round
  alignas(kLine) std::atomic<uint32_t> broken;  // 0, or 1 + the rank to blame
};

struct alignas(kLine) Line {
  std::atomic<uint32_t> round, num_sleeping, state;
  std::atomic<int32_t> pid;
};

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

int64_t part_floats(int64_t capacity) { return (capacity + 15) / 16 * 16; }

int64_t parts_at(int64_t num_ranks) { return int64_t(sizeof(Header)) + num_ranks * kLine; }

int64_t num_bytes_of(int64_t num_ranks, int64_t capacity) {
  return parts_at(num_ranks) + 2 * num_ranks * part_floats(capacity) * int64_t(sizeof(float));
}

bool has_ended(int pidfd) {
  pollfd one{pidfd, POLLIN, 0};
  return poll(&one, 1, 0) > 0;
}

int open_pidfd(int pid) { return int(syscall(SYS_pidfd_open, pid, 0)); }

// Whether a process of that number lives. It may be another one by now.
bool lives(int pid) {
  const int pidfd = open_pidfd(pid);
  if (pidfd < 0) return errno != ESRCH && errno != EINVAL;
  const bool ended = has_ended(pidfd);
  close(pidfd);
  return !ended;
}

class Member {
 public:
  Member(Header* header, int rank)
      : header_(header),
        lines_((Line*)(header + 1)),
        parts_((float*)((char*)header + parts_at(header->num_ranks))),
        num_ranks_(int(header->num_ranks)),
        rank_(rank),
        capacity_(header->capacity),
        round_(header->first),
        pid_(getpid()),
        pidfds_(size_t(num_ranks_), -1),
        aside_(new float[size_t(capacity_)]) {}

  ~Member() {
    for (int pidfd : pidfds_)
      if (pidfd >= 0) close(pidfd);
  }

  bool is_inherited() const { return pid_ != getpid(); }

  // False where somebody has this place already.
  bool join() {
    uint32_t absent = kAbsent;
    lines_[rank_].pid.store(pid_);
    if (!lines_[rank_].state.compare_exchange_strong(absent, kJoined)) return false;
    wake(lines_[rank_]);
    return true;
  }

  void leave() {
    if (is_inherited()) return;
    lines_[rank_].state.store(kHasLeft);
    wake(lines_[rank_]);
  }

  // Until all ranks have joined.
  Outcome meet(int64_t timeout_ns) {
    if (is_inherited()) return {kForked, rank_};
    const int64_t deadline = now_ns() + timeout_ns;
    for (int rank = 0; rank < num_ranks_; rank++) {
      Line& line = lines_[rank];
      while (line.state.load() == kAbsent) {
        const int64_t left = deadline - now_ns();
        if (const uint32_t broken = header_->broken.load()) return fail({kBroken, broken - 1});
        if (left <= 0) return fail({kTimedOut, rank});
        sleep(line, line.round.load(), left, [&] { return line.state.load() == kAbsent; });
      }
      if (rank != rank_ && pidfds_[size_t(rank)] < 0) {
        pidfds_[size_t(rank)] = open_pidfd(line.pid.load());
        if (pidfds_[size_t(rank)] < 0 && errno == ESRCH) return fail({kEnded, rank});
      }
    }
    return {kDone, 0};
  }

  int64_t capacity() const { return capacity_; }
  int pid_of(int64_t rank) const {
    return rank < 0 || rank >= num_ranks_ ? 0 : lines_[rank].pid.load();
  }

  // Where this rank's part of the next sum goes.
  float* own_part() { return failure_.load() ? aside_.get() : part(round_ + 1, rank_); }
  // A rank's part of the sum that was waited for last.
  const float* part_of(int rank) { return part(round_, rank); }

  // This rank's part of the next sum is there.
  void publish() {
    if (failure_.load()) return;
    Line& line = lines_[rank_];
    line.round.store(++round_);
    wake(line);
  }

  // Until all parts of the sum that was published are there.
  Outcome wait(int64_t timeout_ns) {
    if (is_inherited()) return {kForked, rank_};
    const int64_t deadline = now_ns() + timeout_ns;
    Outcome outcome{kDone, 0};
    for (int rank = 0; rank < num_ranks_ && outcome.result == kDone; rank++)
      if (rank != rank_) outcome = wait_for(rank, deadline);
    return outcome.result == kDone ? outcome : fail(outcome);
  }

  // values[i] = the sum of all ranks' values[i].
  Outcome all_reduce(float* values, int64_t count, int64_t timeout_ns) {
    if (is_inherited()) return {kForked, rank_};
    const int64_t deadline = now_ns() + timeout_ns;
    for (int64_t at = 0; at < count; at += capacity_) {
      const int64_t size = std::min(capacity_, count - at);
      memcpy(own_part(), values + at, size_t(size) * sizeof(float));
      publish();
      const Outcome outcome = wait(deadline - now_ns());
      if (outcome.result != kDone) return outcome;
      sum(values + at, size);
    }
    return {kDone, 0};
  }

 private:
  float* part(uint32_t round, int rank) {
    return parts_ + ((round & 1) * num_ranks_ + rank) * part_floats(capacity_);
  }

  void sum(float* to, int64_t count) {
    for (int64_t at = 0; at < count; at += kPiece) {
      const int64_t size = std::min(kPiece, count - at);
      float* out = to + at;
      memcpy(out, part_of(0) + at, size_t(size) * sizeof(float));
      for (int rank = 1; rank < num_ranks_; rank++) {
        const float* more = part_of(rank) + at;
        for (int64_t i = 0; i < size; i++) out[i] += more[i];
      }
    }
  }

  bool has_come(const Line& line) const {
    return int32_t(line.round.load(std::memory_order_acquire) - round_) >= 0;
  }

  Outcome wait_for(int rank, int64_t deadline) {
    Line& line = lines_[rank];
    if (const uint32_t broken = header_->broken.load()) return {kBroken, broken - 1};
    if (has_come(line)) return {kDone, 0};
    if (spin(line)) return {kDone, 0};
    while (!has_come(line)) {
      // Whatever ended it, what it published before counts.
      const bool left = line.state.load() == kHasLeft;
      const bool ended = pidfds_[size_t(rank)] >= 0 && has_ended(pidfds_[size_t(rank)]);
      const uint32_t broken = header_->broken.load();
      if (has_come(line)) break;
      if (broken) return {kBroken, broken - 1};
      if (left) return {kLeft, rank};
      if (ended) return {kEnded, rank};
      const int64_t rest = deadline - now_ns();
      if (rest <= 0) return {kTimedOut, rank};
      sleep(line, line.round.load(), rest, [&] { return !has_come(line); });
    }
    return {kDone, 0};
  }

  // Whether the rank came while this one span. Where spins are in vain, since there are more ranks than
  // processors or others use them, they become shorter, but for one now and then that finds out anew.
  bool spin(const Line& line) {
    const uint64_t shortest = kSpinTicks / 64, usual = spin_ticks_.load(std::memory_order_relaxed);
    const bool finds_out = num_spins_.fetch_add(1, std::memory_order_relaxed) % 64 == 0;
    const uint64_t most = finds_out ? kSpinTicks : usual;
    for (const uint64_t start = ticks(); ticks() - start < most; pause_thread())
      if (has_come(line)) {
        spin_ticks_.store(std::min(2 * most, kSpinTicks), std::memory_order_relaxed);
        return true;
      }
    if (!finds_out)
      spin_ticks_.store(std::max(usual / 2, shortest), std::memory_order_relaxed);
    return false;
  }

  // Until the line is woken, or a slice is over; not at all where `still` does not hold any more.
  template <class Still>
  void sleep(Line& line, uint32_t round, int64_t most_ns, Still still) {
    const int64_t ns = std::min(most_ns, kSliceNs);
    const timespec timeout{time_t(ns / 1'000'000'000), long(ns % 1'000'000'000)};
    line.num_sleeping.fetch_add(1);
    if (still() && !header_->broken.load())
      syscall(SYS_futex, &line.round, FUTEX_WAIT, round, &timeout, nullptr, 0);
    line.num_sleeping.fetch_sub(1);
  }

  void wake(Line& line) {
    if (line.num_sleeping.load())
      syscall(SYS_futex, &line.round, FUTEX_WAKE, INT_MAX, nullptr, nullptr, 0);
  }

  // Nobody shall wait for us. What the first of our threads met, all of them say.
  Outcome fail(Outcome outcome) {
    uint64_t none = 0;
    if (!failure_.compare_exchange_strong(none, uint64_t(outcome.result) << 32 | outcome.rank))
      return {int64_t(none >> 32), int64_t(none & UINT32_MAX)};
    uint32_t whole = 0;
    header_->broken.compare_exchange_strong(whole, uint32_t(1 + outcome.rank));
    for (int rank = 0; rank < num_ranks_; rank++) wake(lines_[rank]);
    return outcome;
  }

  Header* const header_;
  Line* const lines_;
  float* const parts_;
  const int num_ranks_, rank_;
  const int64_t capacity_;
  uint32_t round_;
  const int pid_;
  std::vector<int> pidfds_;
  std::atomic<uint64_t> spin_ticks_{kSpinTicks};
  std::atomic<uint32_t> num_spins_{0};
  std::atomic<uint64_t> failure_{0};  // result and rank
  const std::unique_ptr<float[]> aside_;
};

}  // namespace

extern "C" {

int onecopy_group_size_of_outcome() { return sizeof(Outcome); }
int onecopy_group_max_ranks() { return kMaxRanks; }

int64_t onecopy_group_num_bytes(int64_t num_ranks, int64_t capacity) {
  return num_bytes_of(num_ranks, capacity);
}

// 0: a group may be formed in this memory. Else the process of a member that an earlier group has
// in it, and that may write to it still.
int64_t onecopy_group_in_use(const void* memory, int64_t num_bytes) {
  const Header* header = (const Header*)memory;
  if (header->magic != kMagic || header->num_ranks < 1 || header->num_ranks > kMaxRanks) return 0;
  if (parts_at(header->num_ranks) > num_bytes) return 0;
  const Line* lines = (const Line*)(header + 1);
  for (int rank = 0; rank < header->num_ranks; rank++)
    if (lines[rank].state.load() == kJoined && lives(lines[rank].pid.load()))
      return lines[rank].pid.load();
  return 0;
}

// Before anybody joins. Lines begin at `first`.
void onecopy_group_form(void* memory, int64_t num_ranks, int64_t capacity, uint32_t first) {
  memset(memory, 0, size_t(parts_at(num_ranks)));
  Header* header = (Header*)memory;
  header->num_ranks = num_ranks, header->capacity = capacity, header->first = first;
  Line* lines = (Line*)(header + 1);
  for (int rank = 0; rank < num_ranks; rank++) lines[rank].round.store(first);
  std::atomic_thread_fence(std::memory_order_seq_cst);
  header->magic = kMagic;
}

// Null with an error: EINVAL: no group of so many ranks, with such a rank, in this memory. EBUSY:
// somebody has that place. ENOMEM.
void* onecopy_group_join(void* memory, int64_t num_bytes, int64_t rank, int64_t num_ranks,
                         int32_t* error) {
  Header* header = (Header*)memory;
  *error = EINVAL;
  if (num_bytes < int64_t(sizeof(Header)) || header->magic != kMagic) return nullptr;
  const int64_t capacity = header->capacity;
  if (num_ranks != header->num_ranks || num_ranks < 1 || num_ranks > kMaxRanks) return nullptr;
  if (rank < 0 || rank >= num_ranks) return nullptr;
  if (capacity < 1 || capacity > num_bytes || num_bytes_of(num_ranks, capacity) > num_bytes)
    return nullptr;
  Member* member = nullptr;
  try {
    *error = ENOMEM;
    member = new Member(header, int(rank));
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
  *error = EBUSY;
  if (member->join()) return *error = 0, member;
  delete member;
  return nullptr;
}

void onecopy_group_meet(void* member, int64_t timeout_ns, Outcome* outcome) {
  *outcome = ((Member*)member)->meet(timeout_ns);
}
void onecopy_group_all_reduce(void* member, float* values, int64_t count, int64_t timeout_ns,
                              Outcome* outcome) {
  *outcome = ((Member*)member)->all_reduce(values, count, timeout_ns);
}

int64_t onecopy_group_capacity(void* member) { return ((Member*)member)->capacity(); }
// Of a rank that has joined, else 0.
int onecopy_group_pid_of(void* member, int64_t rank) { return ((Member*)member)->pid_of(rank); }

// For native code, which writes its part and reads all parts where they lie.
float* onecopy_group_own_part(void* member) { return ((Member*)member)->own_part(); }
const float* onecopy_group_part_of(void* member, int32_t rank) {
  return ((Member*)member)->part_of(rank);
}
void onecopy_group_publish(void* member) { ((Member*)member)->publish(); }
void onecopy_group_wait(void* member, int64_t timeout_ns, Outcome* outcome) {
  *outcome = ((Member*)member)->wait(timeout_ns);
}

// The others need not wait for this rank.
void onecopy_group_leave(void* member) { ((Member*)member)->leave(); }
void onecopy_group_destroy(void* member) { delete (Member*)member; }

}  // extern "C"
