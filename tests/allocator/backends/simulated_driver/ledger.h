/* Who holds which memory of the simulated devices, over all processes of a test.
 *
 * Owns the file that libcuda.c writes and libnvidia-ml.c reads. Invariant: a row counts as long as
 * its process lives; memory that several processes hold is there once.
 *
 * SIMULATED_DRIVER_STATE    that file
 * SIMULATED_DRIVER_BYTES    memory of each device (256 MiB)
 * SIMULATED_DRIVER_DEVICES  how many devices (2)
 */
#include <fcntl.h>
#include <signal.h>
#include <stdint.h>
#include <stdlib.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <unistd.h>

enum { MOST = 4096, MOST_DEVICES = 8, UUID_BYTE = 0xd0 };

typedef struct { int32_t pid, device; uint64_t inode, size; int64_t references; } LedgerRow;

static inline uint64_t device_bytes(void) {
    const char *text = getenv("SIMULATED_DRIVER_BYTES");
    return text ? strtoull(text, NULL, 10) : 256ull << 20;
}

static inline int physical_devices(void) {
    const char *count = getenv("SIMULATED_DRIVER_DEVICES");
    return count ? atoi(count) : 2;
}

static inline LedgerRow *open_ledger(int *fd) {
    const char *state = getenv("SIMULATED_DRIVER_STATE");
    *fd = state ? open(state, O_RDWR | O_CREAT | O_CLOEXEC, 0600) : -1;
    if (*fd < 0 || ftruncate(*fd, sizeof(LedgerRow) * MOST)) abort();
    void *rows = mmap(NULL, sizeof(LedgerRow) * MOST, PROT_READ | PROT_WRITE, MAP_SHARED, *fd, 0);
    if (rows == MAP_FAILED) abort();
    return rows;
}

/* The ledger's file is locked by the caller of this and of the next. */
static inline void drop_the_dead(LedgerRow *ledger) {
    for (LedgerRow *row = ledger; row < ledger + MOST; row++)
        if (row->references && kill(row->pid, 0) != 0) row->references = 0;
}

static inline uint64_t used_bytes(const LedgerRow *ledger, int device) {
    uint64_t used = 0;
    for (const LedgerRow *row = ledger; row < ledger + MOST; row++) {
        int counted = !row->references || row->device != device;
        for (const LedgerRow *before = ledger; before < row && !counted; before++)
            counted = before->references && before->inode == row->inode;
        if (!counted) used += row->size;
    }
    return used;
}
