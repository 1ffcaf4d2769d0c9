// The decoder's functions for a process of another instruction set, which waits for each.
//
// What a pointer of the caller's points to is fetched from its memory, page by page as it is touched,
// and put at the same address; what has changed goes back before the answer. Commands come on stdin,
// answers go to stdout. The exit status 3 says that an address was taken here: start again.
#include "../../../../../workers/model/native/decoder.cpp"

#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <sys/mman.h>
#include <unistd.h>

namespace {

constexpr int64_t kPage = 4096;
constexpr int kMaxPages = 1 << 16;
constexpr int kTaken = 3;

struct Page {
  char* at;
  char* original;
};

int caller = -1;  // its memory
Page pages[kMaxPages];
int num_pages = 0;
pthread_mutex_t fetching = PTHREAD_MUTEX_INITIALIZER;

void die(const char* why) {
  if (write(STDERR_FILENO, why, strlen(why)) < 0) _exit(2);
  _exit(1);
}

void fetch(int, siginfo_t* info, void*) {
  char* at = (char*)((uintptr_t)info->si_addr / kPage * kPage);
  pthread_mutex_lock(&fetching);
  bool known = false;  // another thread was faster
  for (int i = 0; i < num_pages; i++) known = known || pages[i].at == at;
  if (!known) {
    if (num_pages == kMaxPages) die("more pages than there is room for\n");
    const int anonymous = MAP_PRIVATE | MAP_ANONYMOUS;
    void* original = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, anonymous, -1, 0);
    if (original == MAP_FAILED) die("no memory\n");
    if (pread(caller, original, kPage, (off_t)(uintptr_t)at) != kPage)
      die("an address that the caller does not have\n");
    // Filled elsewhere first: whoever sees the page sees what is in it.
    void* filled = mmap(nullptr, kPage, PROT_READ | PROT_WRITE, anonymous, -1, 0);
    if (filled == MAP_FAILED) die("no memory\n");
    memcpy(filled, original, kPage);
    void* probe = mmap(at, kPage, PROT_NONE, anonymous, -1, 0);
    if (probe != at) _exit(kTaken);
    if (mremap(filled, kPage, kPage, MREMAP_MAYMOVE | MREMAP_FIXED, at) != at) _exit(kTaken);
    pages[num_pages++] = {at, (char*)original};
  }
  pthread_mutex_unlock(&fetching);
}

// Only what has changed: beside it the caller may have changed something meanwhile.
void give_back() {
  for (int i = 0; i < num_pages; i++) {
    const Page& page = pages[i];
    for (int64_t from = 0; from < kPage;) {
      int64_t to = from;
      while (to < kPage && page.at[to] != page.original[to]) to++;
      const off_t offset = (off_t)(uintptr_t)page.at + from;
      if (to > from && pwrite(caller, page.at + from, to - from, offset) != to - from)
        die("the caller's memory can't be written\n");
      from = to + 1;
    }
    munmap(page.at, kPage);
    munmap(page.original, kPage);
  }
  num_pages = 0;
}

int64_t answer(const int64_t* command) {
  void* decoder = (void*)command[1];
  switch (command[0]) {
    case 0: return onecopy_size_of_layer();
    case 1: return onecopy_size_of_decoder();
    case 2: return onecopy_size_of_call();
    case 3: return (int64_t)onecopy_decoder_create((const DecoderSpec*)command[1]);
    case 4: return onecopy_decoder_workspace_bytes(decoder);
    case 5: return onecopy_decoder_hidden_stride(decoder);
    case 6: return onecopy_decoder_forward(decoder, (Call*)command[2]);
    case 7: return onecopy_decoder_counted(decoder, (uint64_t*)command[2]), 0;
    case 8: return onecopy_decoder_destroy(decoder), 0;
  }
  die("an unknown command\n");
  return 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc != 2) die("decoder_server MEMORY-OF-CALLER\n");
  caller = open(argv[1], O_RDWR);
  if (caller < 0) die("the caller's memory can't be opened\n");
  struct sigaction action = {};
  action.sa_sigaction = fetch;
  action.sa_flags = SA_SIGINFO;
  sigaction(SIGSEGV, &action, nullptr);
  int64_t command[3];
  while (read(STDIN_FILENO, command, sizeof command) == sizeof command) {
    const int64_t result = answer(command);
    give_back();
    if (write(STDOUT_FILENO, &result, sizeof result) != sizeof result) return 1;
  }
  return 0;
}
