// Reads bytes of files into memory, on threads of its own that never take the interpreter's lock.
//
// A job is a list of reads; each read is cut into pieces at multiples of the block, and threads take
// the pieces in the order in which they came, several at a time. Invariants: once a job has ended,
// read, failed or cancelled, no thread writes to its addresses; outside of a piece's own bytes
// nothing is written but the rest of its first and last block. Threads start with the first job and
// belong to the process that gave it: in a forked child they are gone, and nothing is waited for.
//
// Descriptors are the caller's: they are open until `stop` has returned. The structures are those of
// native_reading.py, and their sizes are compared.
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/uio.h>
#include <time.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <condition_variable>
#include <cstdint>
#include <deque>
#include <memory>
#include <mutex>
#include <new>
#include <random>
#include <unordered_map>
#include <vector>

extern "C" {

struct Read {
  int64_t file, begin, num_bytes, address, in_blocks;
};

enum State : int64_t { kUnknown = -1, kRunning = 0, kRead = 1, kFailed = 2, kCancelled = 3 };

struct Outcome {
  int64_t state;
  int64_t error;  // an errno, or 0: the file ends before `begin`
  int64_t file, begin;
  int64_t begin_ns, end_ns;  // CLOCK_MONOTONIC
};

struct Statistics {
  int64_t num_bytes, reading_ns;
};

}  // extern "C"

namespace {

constexpr int64_t kBlock = 4096;
constexpr int kUncachedFlag = 0x80;  // RWF_DONTCACHE
constexpr int kMaxAgain = 1000;      // as often a file may say EAGAIN in a row, a millisecond apart
constexpr size_t kMaxEnded = 4096;   // jobs whose outcomes are kept

enum Access : int { kUncached = 0, kDirect = 1, kBuffered = 2 };

using Clock = std::chrono::steady_clock;  // CLOCK_MONOTONIC

int64_t now_ns() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return int64_t(now.tv_sec) * 1'000'000'000 + now.tv_nsec;
}

int64_t block_begin(int64_t at) { return at / kBlock * kBlock; }
int64_t block_end(int64_t at) { return block_begin(at + kBlock - 1); }

struct File {
  int descriptor, direct;  // the latter -1 where there is none
  bool falls_back;         // to buffered, where the filesystem refuses a read after all
  std::atomic<int> access;
};

struct Piece {
  File* file;
  int64_t number, begin, num_bytes;
  char* address;
  bool in_blocks;
};

struct Job {
  int64_t number;
  std::vector<Read> reads;  // none is empty
  size_t next = 0;          // the read of the next piece,
  int64_t done = 0;         // and how much of it others have taken
  int num_under_way = 0;
  std::atomic<bool> abandoned{false};  // cancelled or failed: no piece begins, none goes on
  Outcome outcome{kRunning, 0, 0, 0, 0, 0};

  bool taken() const { return next == reads.size(); }
  bool ended() const { return outcome.state != kRunning && !num_under_way; }
};

// Why a piece could not be read; 0 bytes at `at` where the file has become shorter.
struct Failure {
  bool failed;
  int error;
  int64_t at;
};

class Reader {
 public:
  Reader(int num_threads, int64_t piece_bytes, uint64_t seed, double delay_s)
      : num_threads_(num_threads),
        piece_bytes_(piece_bytes),
        delay_s_(delay_s),
        random_(seed),
        ended_(kMaxEnded, 0) {
    threads_.reserve(size_t(num_threads));
  }

  ~Reader() { stop(); }

  bool of_another_process() const { return pid_ && pid_ != getpid(); }

  int64_t add(int descriptor, int direct, int access, bool falls_back) {
    std::lock_guard<std::mutex> hold(mutex_);
    files_.emplace_back();
    File& file = files_.back();
    file.descriptor = descriptor, file.direct = direct;
    file.access = access, file.falls_back = falls_back;
    return int64_t(files_.size()) - 1;
  }

  int access(int64_t file) {
    std::lock_guard<std::mutex> hold(mutex_);
    return files_[size_t(file)].access;
  }

  // A job's number, or an errno as a negative number.
  int64_t start(const Read* reads, int64_t num_reads) {
    auto job = std::make_shared<Job>();
    for (const Read* read = reads; read != reads + num_reads; read++)
      if (read->num_bytes) job->reads.push_back(*read);
    std::lock_guard<std::mutex> hold(mutex_);
    if (stopping_) return -ESHUTDOWN;
    if (int error = start_threads()) return -error;
    job->number = num_jobs_ + 1;
    if (!job->taken()) queue_.push_back(job);
    try {
      jobs_.emplace(job->number, job);
    } catch (const std::bad_alloc&) {
      if (!job->taken()) queue_.pop_back();
      throw;
    }
    if (job->taken()) {
      job->outcome.begin_ns = now_ns();
      job->outcome.state = kRead;
      end(*job);
    }
    work_.notify_all();
    return ++num_jobs_;
  }

  // Its outcome, still kRunning if `timeout_ns` have passed.
  Outcome wait(int64_t number, int64_t timeout_ns) {
    std::unique_lock<std::mutex> hold(mutex_);
    const auto found = jobs_.find(number);
    if (found == jobs_.end()) return {kUnknown, 0, 0, 0, 0, 0};
    const std::shared_ptr<Job> job = found->second;
    if (timeout_ns > 0 && !job->ended())
      ends_.wait_until(hold, Clock::now() + std::chrono::nanoseconds(timeout_ns),
                       [&] { return job->ended(); });
    Outcome outcome = job->outcome;
    if (!job->ended()) outcome.state = kRunning;
    return outcome;
  }

  // No further piece begins. Those under way are waited for by `wait`.
  void cancel(int64_t number) {
    std::lock_guard<std::mutex> hold(mutex_);
    const auto found = jobs_.find(number);
    if (found != jobs_.end() && found->second->outcome.state == kRunning)
      abandon(*found->second, kCancelled);
  }

  // Cancels all jobs, and returns when all threads have ended.
  void stop() {
    std::unique_lock<std::mutex> hold(mutex_);
    if (!stopping_) {
      stopping_ = true;
      while (!queue_.empty()) abandon(*queue_.front(), kCancelled);
      for (auto& [number, job] : jobs_)
        if (job->outcome.state == kRunning) abandon(*job, kCancelled);
      work_.notify_all();
      hold.unlock();
      for (pthread_t thread : threads_) pthread_join(thread, nullptr);
      hold.lock();
      stopped_ = true;
      ends_.notify_all();
    }
    ends_.wait(hold, [&] { return stopped_; });
  }

  Statistics statistics() {
    std::lock_guard<std::mutex> hold(mutex_);
    return statistics_;
  }

 private:
  // 0, or an errno where not one thread is to be had. The lock is held.
  int start_threads() {
    if (!threads_.empty()) return 0;
    pid_ = getpid();
    sigset_t all, before;
    sigfillset(&all);  // signals are the interpreter's, but for a thread's own faults
    for (int fault : {SIGSEGV, SIGBUS, SIGFPE, SIGILL}) sigdelset(&all, fault);
    pthread_sigmask(SIG_SETMASK, &all, &before);
    int error = 0;
    while (int(threads_.size()) < num_threads_) {
      pthread_t thread;
      if ((error = pthread_create(&thread, nullptr, main, this))) break;
      pthread_setname_np(thread, "onecopy:read");
      threads_.push_back(thread);
    }
    pthread_sigmask(SIG_SETMASK, &before, nullptr);
    return threads_.empty() ? error : 0;
  }

  static void* main(void* self) {
    static_cast<Reader*>(self)->work();
    return nullptr;
  }

  void work() {
    std::unique_lock<std::mutex> hold(mutex_);
    for (;;) {
      work_.wait(hold, [&] { return stopping_ || !queue_.empty(); });
      if (queue_.empty()) return;
      const std::shared_ptr<Job> job = queue_.front();
      const Piece piece = take(*job);
      if (job->taken()) queue_.pop_front();
      if (!job->outcome.begin_ns) job->outcome.begin_ns = now_ns();
      job->num_under_way++;
      delay(hold, *job);
      Failure failure{false, 0, 0};
      if (!job->abandoned) {
        int64_t num_bytes = 0;
        hold.unlock();
        const int64_t begin_ns = now_ns();
        failure = read(piece, *job, num_bytes);
        const int64_t reading_ns = now_ns() - begin_ns;
        hold.lock();
        statistics_.num_bytes += num_bytes;
        statistics_.reading_ns += reading_ns;
      }
      job->num_under_way--;
      if (failure.failed && job->outcome.state == kRunning) {
        job->outcome.error = failure.error;
        job->outcome.file = piece.number;
        job->outcome.begin = failure.at;
        abandon(*job, kFailed);
      } else if (!job->num_under_way && job->outcome.state != kRunning) {
        end(*job);
      } else if (!job->num_under_way && job->taken()) {
        job->outcome.state = kRead;
        end(*job);
      }
    }
  }

  // The next piece of a job that has one. The lock is held.
  Piece take(Job& job) {
    const Read& read = job.reads[job.next];
    const int64_t begin = read.begin + job.done, end = read.begin + read.num_bytes;
    const int64_t limit = block_begin(begin) + piece_bytes_;
    Piece piece{&files_[size_t(read.file)], read.file, begin, std::min(end, limit) - begin,
                reinterpret_cast<char*>(read.address) + job.done, read.in_blocks != 0};
    job.done += piece.num_bytes;
    if (job.done == read.num_bytes) job.next++, job.done = 0;
    return piece;
  }

  // Before a piece is read, if somebody asked for it: over as soon as the job is.
  void delay(std::unique_lock<std::mutex>& hold, const Job& job) {
    if (delay_s_ <= 0) return;
    const double seconds = std::uniform_real_distribution<double>(0, delay_s_)(random_);
    abandons_.wait_until(hold, Clock::now() + std::chrono::nanoseconds(int64_t(seconds * 1e9)),
                         [&] { return job.abandoned.load(); });
  }

  // Nothing more of it is read. The lock is held.
  void abandon(Job& job, State state) {
    job.outcome.state = state;
    job.abandoned = true;
    for (auto waiting = queue_.begin(); waiting != queue_.end(); ++waiting)
      if (waiting->get() == &job) {
        queue_.erase(waiting);
        break;
      }
    job.next = job.reads.size();
    abandons_.notify_all();
    if (!job.outcome.begin_ns) job.outcome.begin_ns = now_ns();
    if (!job.num_under_way) end(job);
  }

  // It has its outcome. Forgets the job that ended kMaxEnded before it. The lock is held.
  void end(Job& job) {
    job.outcome.end_ns = now_ns();
    std::vector<Read>().swap(job.reads);
    job.next = 0;
    int64_t& oldest = ended_[num_ended_++ % kMaxEnded];
    if (oldest) jobs_.erase(oldest);
    oldest = job.number;
    ends_.notify_all();
  }

  // All of a piece, in as many calls as it takes; what was read is added to `num_bytes`.
  Failure read(const Piece& piece, const Job& job, int64_t& num_bytes) {
    File& file = *piece.file;
    const int64_t end = piece.begin + piece.num_bytes;
    int64_t at = piece.begin;  // all before it is there
    int num_again = 0;
    bool within_block = false;  // a file's end, where direct reads stop
    while (at < end && !job.abandoned) {
      int access = within_block ? kBuffered : file.access.load();
      if (access == kDirect && !piece.in_blocks) access = kBuffered;
      const int64_t from = access == kDirect ? block_begin(at) : at;
      const int64_t to = access == kDirect ? block_end(end) : end;
      iovec target{piece.address + (from - piece.begin), size_t(to - from)};
      const int descriptor = access == kDirect ? file.direct : file.descriptor;
      const ssize_t count = access == kUncached
                                ? preadv2(descriptor, &target, 1, from, kUncachedFlag)
                                : preadv(descriptor, &target, 1, from);
      if (count < 0) {
        if (errno == EINTR) continue;
        if (errno == EAGAIN && ++num_again < kMaxAgain) {
          usleep(1000);
          continue;
        }
        const bool refused = errno == EINVAL || errno == EOPNOTSUPP || errno == ENOSYS;
        if (!refused || access == kBuffered || !file.falls_back) return {true, errno, at};
        file.access = kBuffered;
        continue;
      }
      num_again = 0;
      const int64_t reached = std::min(end, from + count);
      if (reached > at) num_bytes += reached - at;
      if (access == kBuffered && count)
        posix_fadvise(descriptor, block_begin(from), block_end(from + count) - block_begin(from),
                      POSIX_FADV_DONTNEED);
      if (access == kDirect && count % kBlock)
        within_block = true;
      else if (reached <= at)
        return {true, 0, at};
      at = std::max(at, reached);
    }
    return {false, 0, 0};
  }

  const int num_threads_;
  const int64_t piece_bytes_;
  const double delay_s_;
  pid_t pid_ = 0;  // of the threads
  std::mutex mutex_;  // over all that follows
  std::condition_variable work_, ends_, abandons_;
  std::mt19937_64 random_;
  std::deque<File> files_;  // which never move
  std::deque<std::shared_ptr<Job>> queue_;  // those with pieces that nobody has taken
  std::unordered_map<int64_t, std::shared_ptr<Job>> jobs_;
  int64_t num_jobs_ = 0;
  std::vector<int64_t> ended_;  // a ring of the last jobs that ended; 0: none yet
  uint64_t num_ended_ = 0;
  std::vector<pthread_t> threads_;
  bool stopping_ = false, stopped_ = false;
  Statistics statistics_{0, 0};
};

}  // namespace

extern "C" {

int64_t onecopy_reader_size_of_read() { return sizeof(Read); }
int64_t onecopy_reader_size_of_outcome() { return sizeof(Outcome); }
int64_t onecopy_reader_size_of_statistics() { return sizeof(Statistics); }

// Null: no memory.
Reader* onecopy_reader_create(int32_t num_threads, int64_t piece_bytes, uint64_t seed,
                              double delay_s) {
  try {
    return new Reader(num_threads, piece_bytes, seed, delay_s);
  } catch (const std::bad_alloc&) {
    return nullptr;
  }
}

// A file's number, or -ENOMEM.
int64_t onecopy_reader_add(Reader* reader, int32_t descriptor, int32_t direct, int32_t access,
                           int32_t falls_back) {
  try {
    return reader->add(descriptor, direct, access, falls_back);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

int32_t onecopy_reader_access(Reader* reader, int64_t file) { return reader->access(file); }

int64_t onecopy_reader_start(Reader* reader, const Read* reads, int64_t num_reads) {
  try {
    return reader->start(reads, num_reads);
  } catch (const std::bad_alloc&) {
    return -ENOMEM;
  }
}

void onecopy_reader_wait(Reader* reader, int64_t job, int64_t timeout_ns, Outcome* outcome) {
  *outcome = reader->wait(job, timeout_ns);
}

void onecopy_reader_cancel(Reader* reader, int64_t job) { reader->cancel(job); }

void onecopy_reader_statistics(Reader* reader, Statistics* statistics) {
  *statistics = reader->statistics();
}

void onecopy_reader_stop(Reader* reader) {
  if (!reader->of_another_process()) reader->stop();
}

// In a forked child what the parent's threads may have been about to change is left as it is.
void onecopy_reader_destroy(Reader* reader) {
  if (!reader->of_another_process()) delete reader;
}

}  // extern "C"
