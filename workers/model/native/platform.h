// What a processor and its kernel have to be asked for, whatever is computed.
#pragma once
#include <cerrno>
#include <cstdint>

#if defined(__x86_64__)
#include <immintrin.h>
#elif defined(__aarch64__)
#include <arm_neon.h>
#endif
#include <sys/syscall.h>
#include <unistd.h>

#if defined(__x86_64__)
inline void pause_thread() { _mm_pause(); }
inline uint64_t ticks() { return __rdtsc(); }
constexpr uint64_t kSpinTicks = 120'000;  // about 50 us
#elif defined(__aarch64__)
inline void pause_thread() { asm volatile("yield" ::: "memory"); }
inline uint64_t ticks() {
  uint64_t now;
  asm volatile("mrs %0, cntvct_el0" : "=r"(now));
  return now;
}
constexpr uint64_t kSpinTicks = 2'500;  // about 50 us at 50 MHz; the counter may run at up to 1 GHz
#else
#include <time.h>
inline void pause_thread() {}
inline uint64_t ticks() {
  timespec now;
  clock_gettime(CLOCK_MONOTONIC, &now);
  return uint64_t(now.tv_sec) * 1'000'000'000 + uint64_t(now.tv_nsec);
}
constexpr uint64_t kSpinTicks = 50'000;
#endif

// While it lives, this thread takes what is too small to be normal for zero: such numbers take up to
// a hundred times longer, and on AMX tiles they are zero in any case.
class FlushDenormals {
 public:
#if defined(__x86_64__)
  FlushDenormals() : before_(_mm_getcsr()) { _mm_setcsr(before_ | 0x8040); }
  ~FlushDenormals() { _mm_setcsr(before_); }

 private:
  const unsigned int before_;
#elif defined(__aarch64__)
  FlushDenormals() {
    asm volatile("mrs %0, fpcr" : "=r"(before_));
    asm volatile("msr fpcr, %0" ::"r"(before_ | (uint64_t(1) << 24)));
  }
  ~FlushDenormals() { asm volatile("msr fpcr, %0" ::"r"(before_)); }

 private:
  uint64_t before_;
#endif
};

// Into the second cache.
inline void prefetch(const void* p) { __builtin_prefetch(p, 0, 2); }

// Before a short loop over registers: unrolled late, they would be written to the stack before and after.
#define UNROLLED _Pragma("GCC unroll 16")

// Ask the kernel for the registers that this library computes with. 0, or an errno.
inline int request_registers() {
#if defined(SET_AMX) && !defined(EMULATE_AMX)
  constexpr int kRequest = 0x1023, kTileData = 18;
  return syscall(SYS_arch_prctl, kRequest, kTileData) == 0 ? 0 : errno;
#else
  return 0;
#endif
}
