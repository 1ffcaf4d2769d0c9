/* A simulated CUDA driver: libcuda.so.1 for tests on machines without a GPU.
 *
 * Owns a make-believe of the entry points that allocator/backends calls. "Device memory" is a memfd,
 * a "device address" is an address of this process, access rights are mprotect's. It checks the rules
 * that the driver's documentation states, and three that it does not state but that we keep: mapping
 * wants a current context; unmapping wants copies to have ended; an asynchronous copy happens as late
 * as it may, when its stream or the context is synchronised.
 *
 * Invariant: what it accepts follows the documented rules. It shows that a sequence of calls and the
 * lifetimes in it are right by those rules, and proves nothing about a GPU or its real driver.
 *
 * What it reads from the environment is in ledger.h, and
 * SIMULATED_DRIVER_LACKS    of "vmm fd context": what the devices can't do
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <pthread.h>
#include <signal.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/file.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include "ledger.h"

enum {
    OK = 0, INVALID_VALUE = 1, OUT_OF_MEMORY = 2, NOT_INITIALIZED = 3, DEVICE_UNAVAILABLE = 46,
    NO_DEVICE = 100,
    INVALID_DEVICE = 101, INVALID_CONTEXT = 201, NOT_FOUND = 500, ILLEGAL_ADDRESS = 700,
    NOT_SUPPORTED = 801,
};
enum { GRANULARITY = 2 << 20, POSIX_FD = 1 };

typedef uint64_t Address;
typedef struct { int type, id; } Location;
typedef struct {
    int type, handle_types;
    Location location;
    void *windows_only;
    struct { unsigned char compression, rdma; unsigned short usage; unsigned char reserved[4]; } flags;
} AllocationProperties;
typedef struct { Location location; int access; } AccessDescription;
typedef struct { unsigned char bytes[16]; } Uuid;

typedef struct { int used, fd, device, exportable; uint64_t inode, size; } Handle;
typedef struct { int used; Address start; uint64_t size; } Range;
typedef struct { int used, device, access; Address start; uint64_t size, inode; } Mapping;
typedef struct { int used; } Stream;
typedef struct { void *stream; char *to; const char *from; uint64_t size; } Copy;

static Handle handles[MOST];
static Range reservations[MOST], pinned[MOST];
static Mapping mappings[MOST];
static Stream streams[MOST];
static Copy copies[MOST];
static int num_copies, num_devices, visible[MOST_DEVICES], primary_contexts[MOST_DEVICES];
static int initialized_pid, fault, ledger_fd;
static LedgerRow *ledger;
static __thread int context_stack[16], context_depth;
static pthread_mutex_t mutex = PTHREAD_MUTEX_INITIALIZER;

#define LOCKED(expression) \
    do { \
        pthread_mutex_lock(&mutex); \
        int result_ = (expression); \
        pthread_mutex_unlock(&mutex); \
        return result_; \
    } while (0)
#define REQUIRE(condition, error) do { if (!(condition)) return (error); } while (0)
#define REQUIRE_INIT() REQUIRE(initialized_pid == getpid(), NOT_INITIALIZED)
#define REQUIRE_CONTEXT() \
    do { \
        REQUIRE_INIT(); \
        REQUIRE(context_depth > 0, INVALID_CONTEXT); \
        REQUIRE(!fault, ILLEGAL_ADDRESS); \
    } while (0)

static int lacks(const char *what) {
    const char *list = getenv("SIMULATED_DRIVER_LACKS");
    return list && strstr(list, what) != NULL;
}

static int current(void) { return context_stack[context_depth - 1]; }

static int is_device(int ordinal) { return ordinal >= 0 && ordinal < num_devices; }

/* --- who holds which memory, over all processes */

static int charge(int device, uint64_t inode, uint64_t size, int references) {
    flock(ledger_fd, LOCK_EX);
    drop_the_dead(ledger);
    LedgerRow *mine = NULL, *empty = NULL;
    uint64_t used = used_bytes(ledger, device);
    int known = 0, result = OK;
    for (LedgerRow *row = ledger; row < ledger + MOST; row++) {
        if (!row->references) empty = empty ? empty : row;
        else if (row->inode == inode) known = 1;
        if (row->references && row->inode == inode && row->pid == getpid()) mine = row;
    }
    if (!known && references > 0 && (size > device_bytes() || used > device_bytes() - size)) {
        result = OUT_OF_MEMORY;
    } else if (mine) {
        mine->references += references;
    } else if (empty && references > 0) {
        *empty = (LedgerRow){getpid(), device, inode, size, references};
    } else {
        result = INVALID_VALUE;
    }
    flock(ledger_fd, LOCK_UN);
    return result;
}

/* --- start, devices, contexts */

static int init_locked(void) {
    if (initialized_pid) return initialized_pid == getpid() ? OK : NOT_INITIALIZED;
    const char *mask = getenv("CUDA_VISIBLE_DEVICES");
    int physical = physical_devices();
    num_devices = 0;
    if (!mask) {
        for (; num_devices < physical; num_devices++) visible[num_devices] = num_devices;
    } else {
        for (char *end; *mask; mask = *end ? end + 1 : end) {
            long index = strtol(mask, &end, 10);
            if (end == mask || index < 0 || index >= physical) break;
            visible[num_devices++] = (int)index;
        }
    }
    if (!num_devices) return NO_DEVICE;
    ledger = open_ledger(&ledger_fd);
    initialized_pid = getpid();
    return OK;
}

int cuInit(unsigned flags) { LOCKED(flags ? INVALID_VALUE : init_locked()); }

int cuDriverGetVersion(int *version) { return *version = 13000, OK; }

int cuDeviceGetCount(int *count) {
    REQUIRE_INIT();
    return *count = num_devices, OK;
}

int cuDeviceGet(int *device, int ordinal) {
    REQUIRE_INIT();
    REQUIRE(is_device(ordinal), INVALID_DEVICE);
    return *device = ordinal, OK;
}

int cuDeviceGetName(char *name, int length, int device) {
    REQUIRE_INIT();
    REQUIRE(is_device(device), INVALID_DEVICE);
    return snprintf(name, (size_t)length, "Simulated device %d", visible[device]), OK;
}

int cuDeviceGetUuid_v2(Uuid *uuid, int device) {
    REQUIRE_INIT();
    REQUIRE(is_device(device), INVALID_DEVICE);
    memset(uuid->bytes, UUID_BYTE + visible[device], sizeof uuid->bytes);
    return OK;
}

int cuDeviceGetUuid(Uuid *uuid, int device) { return cuDeviceGetUuid_v2(uuid, device); }

int cuDeviceTotalMem_v2(size_t *bytes, int device) {
    REQUIRE_INIT();
    REQUIRE(is_device(device), INVALID_DEVICE);
    return *bytes = device_bytes(), OK;
}

int cuMemGetInfo_v2(size_t *free_bytes, size_t *total) {
    REQUIRE_CONTEXT();
    flock(ledger_fd, LOCK_EX);
    drop_the_dead(ledger);
    uint64_t used = used_bytes(ledger, visible[current()]);
    flock(ledger_fd, LOCK_UN);
    return *total = device_bytes(), *free_bytes = *total - used, OK;
}

int cuDeviceGetAttribute(int *value, int attribute, int device) {
    REQUIRE_INIT();
    REQUIRE(is_device(device), INVALID_DEVICE);
    switch (attribute) {
    case 41: return *value = 1, OK;                  /* UNIFIED_ADDRESSING */
    case 102: return *value = !lacks("vmm"), OK;     /* VIRTUAL_MEMORY_MANAGEMENT_SUPPORTED */
    case 103: return *value = !lacks("fd"), OK;      /* HANDLE_TYPE_POSIX_FILE_DESCRIPTOR_SUPPORTED */
    default: return INVALID_VALUE;
    }
}

int cuDevicePrimaryCtxRetain(void **context, int device) {
    REQUIRE_INIT();
    REQUIRE(is_device(device), INVALID_DEVICE);
    REQUIRE(!lacks("context"), DEVICE_UNAVAILABLE); /* another process has it to itself */
    primary_contexts[device] = 1;
    return *context = (void *)(intptr_t)(device + 1), OK;
}

int cuCtxPushCurrent_v2(void *context) {
    REQUIRE_INIT();
    int device = (int)(intptr_t)context - 1;
    REQUIRE(is_device(device) && primary_contexts[device], INVALID_CONTEXT);
    REQUIRE(context_depth < 16, INVALID_VALUE);
    return context_stack[context_depth++] = device, OK;
}

int cuCtxPopCurrent_v2(void **context) {
    REQUIRE_INIT();
    REQUIRE(context_depth > 0, INVALID_CONTEXT);
    return *context = (void *)(intptr_t)(context_stack[--context_depth] + 1), OK;
}

int cuCtxGetCurrent(void **context) {
    REQUIRE_INIT();
    return *context = context_depth ? (void *)(intptr_t)(current() + 1) : NULL, OK;
}

/* --- physical memory */

static int new_handle(Handle handle, uint64_t *out) {
    for (int i = 0; i < MOST; i++) {
        if (handles[i].used) continue;
        handles[i] = handle;
        return *out = 0x51000000ull + (uint64_t)i, OK;
    }
    return OUT_OF_MEMORY;
}

static Handle *find_handle(uint64_t handle) {
    uint64_t index = handle - 0x51000000ull;
    return index < MOST && handles[index].used ? &handles[index] : NULL;
}

static int new_memory(int device, uint64_t size, int *fd, uint64_t *inode) {
    struct stat status;
    *fd = memfd_create("simulated-device-memory", MFD_CLOEXEC);
    if (*fd < 0 || fstat(*fd, &status)) abort();
    *inode = status.st_ino;
    int result = charge(visible[device], *inode, size, 1);
    if (result == OK && ftruncate(*fd, (off_t)size)) abort();
    char garbage[4096]; /* new memory holds anything */
    memset(garbage, 0xa5, sizeof garbage);
    for (uint64_t at = 0; result == OK && at < size; at += GRANULARITY)
        if (pwrite(*fd, garbage, sizeof garbage, (off_t)at) < 0) abort();
    if (result != OK) close(*fd);
    return result;
}

int cuMemGetAllocationGranularity(size_t *bytes, const AllocationProperties *wanted, int option) {
    REQUIRE_INIT();
    REQUIRE(wanted && wanted->type == 1 && wanted->location.type == 1 && option <= 1, INVALID_VALUE);
    REQUIRE(is_device(wanted->location.id), INVALID_DEVICE);
    return *bytes = GRANULARITY, OK;
}

static int create_locked(uint64_t *out, size_t size, const AllocationProperties *wanted) {
    REQUIRE(!lacks("vmm"), NOT_SUPPORTED);
    REQUIRE(wanted->type == 1 && wanted->location.type == 1, INVALID_VALUE);
    REQUIRE(is_device(wanted->location.id), INVALID_DEVICE);
    REQUIRE(size && size % GRANULARITY == 0, INVALID_VALUE);
    REQUIRE(!wanted->handle_types || !lacks("fd"), NOT_SUPPORTED);
    Handle made = {1, -1, visible[wanted->location.id], wanted->handle_types & POSIX_FD, 0, size};
    int result = new_memory(wanted->location.id, size, &made.fd, &made.inode);
    return result == OK ? new_handle(made, out) : result;
}

int cuMemCreate(uint64_t *out, size_t size, const AllocationProperties *wanted, uint64_t flags) {
    REQUIRE_INIT();
    REQUIRE(wanted && !flags, INVALID_VALUE);
    LOCKED(create_locked(out, size, wanted));
}

int cuMemExportToShareableHandle(void *out, uint64_t handle, int type, uint64_t flags) {
    REQUIRE_INIT();
    Handle *found = find_handle(handle);
    REQUIRE(found && found->exportable && type == POSIX_FD && !flags, INVALID_VALUE);
    int copy = fcntl(found->fd, F_DUPFD_CLOEXEC, 0);
    REQUIRE(copy >= 0, OUT_OF_MEMORY);
    return *(int *)out = copy, OK;
}

static int import_locked(uint64_t *out, int fd) {
    char path[64], target[64] = {0};
    struct stat status;
    snprintf(path, sizeof path, "/proc/self/fd/%d", fd);
    REQUIRE(readlink(path, target, sizeof target - 1) > 0, INVALID_VALUE);
    REQUIRE(strstr(target, "simulated-device-memory") && !fstat(fd, &status), INVALID_VALUE);
    int device = -1;
    for (int i = 0; i < MOST && device < 0; i++)
        if (ledger[i].inode == status.st_ino && ledger[i].size) device = ledger[i].device;
    REQUIRE(device >= 0, INVALID_VALUE);
    Handle made = {1, fcntl(fd, F_DUPFD_CLOEXEC, 0), device, 1, status.st_ino, (uint64_t)status.st_size};
    charge(device, made.inode, made.size, 1);
    return new_handle(made, out);
}

int cuMemImportFromShareableHandle(uint64_t *out, void *shareable, int type) {
    REQUIRE_INIT();
    REQUIRE(type == POSIX_FD, INVALID_VALUE);
    LOCKED(import_locked(out, (int)(intptr_t)shareable));
}

static int release_locked(uint64_t handle) {
    Handle *found = find_handle(handle);
    REQUIRE(found, INVALID_VALUE);
    charge(found->device, found->inode, found->size, -1);
    close(found->fd);
    return found->used = 0, OK;
}

int cuMemRelease(uint64_t handle) {
    REQUIRE_INIT();
    LOCKED(release_locked(handle));
}

/* --- addresses */

static int overlaps(Address a, uint64_t a_size, Address b, uint64_t b_size) {
    return a < b + b_size && b < a + a_size;
}

static int reserve_locked(Address *out, size_t size, size_t alignment) {
    alignment = alignment > GRANULARITY ? alignment : GRANULARITY;
    char *base = mmap(NULL, size + alignment, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    REQUIRE(base != MAP_FAILED, OUT_OF_MEMORY);
    char *start = (char *)(((uintptr_t)base + alignment - 1) & ~(uintptr_t)(alignment - 1));
    if (start > base) munmap(base, (size_t)(start - base));
    munmap(start + size, (size_t)(base + alignment - start));
    for (int i = 0; i < MOST; i++) {
        if (reservations[i].used) continue;
        reservations[i] = (Range){1, (Address)start, size};
        return *out = (Address)start, OK;
    }
    return OUT_OF_MEMORY;
}

int cuMemAddressReserve(Address *out, size_t size, size_t alignment, Address hint, uint64_t flags) {
    REQUIRE_CONTEXT();
    REQUIRE(size && size % GRANULARITY == 0 && !flags && !hint, INVALID_VALUE);
    REQUIRE(!(alignment & (alignment - 1)), INVALID_VALUE);
    LOCKED(reserve_locked(out, size, alignment));
}

static int address_free_locked(Address start, size_t size) {
    for (int i = 0; i < MOST; i++)
        if (mappings[i].used && overlaps(start, size, mappings[i].start, mappings[i].size))
            return INVALID_VALUE;
    for (int i = 0; i < MOST; i++) {
        if (!reservations[i].used || reservations[i].start != start || reservations[i].size != size)
            continue;
        reservations[i].used = 0;
        return munmap((void *)start, size), OK;
    }
    return INVALID_VALUE;
}

int cuMemAddressFree(Address start, size_t size) {
    REQUIRE_INIT();
    LOCKED(address_free_locked(start, size));
}

static int map_locked(Address start, size_t size, uint64_t handle) {
    Handle *found = find_handle(handle);
    REQUIRE(found && size == found->size && start % GRANULARITY == 0, INVALID_VALUE);
    int inside = 0, row = -1;
    for (int i = 0; i < MOST; i++) {
        Range *range = &reservations[i];
        inside |= range->used && start >= range->start && start + size <= range->start + range->size;
        if (mappings[i].used && overlaps(start, size, mappings[i].start, mappings[i].size))
            return INVALID_VALUE;
        if (!mappings[i].used) row = i;
    }
    REQUIRE(inside && row >= 0, INVALID_VALUE);
    charge(found->device, found->inode, size, 1);
    if (mmap((void *)start, size, PROT_NONE, MAP_SHARED | MAP_FIXED, found->fd, 0) == MAP_FAILED) abort();
    mappings[row] = (Mapping){1, found->device, 0, start, size, found->inode};
    return OK;
}

int cuMemMap(Address start, size_t size, size_t offset, uint64_t handle, uint64_t flags) {
    REQUIRE_CONTEXT();
    REQUIRE(!offset && !flags && size, INVALID_VALUE);
    LOCKED(map_locked(start, size, handle));
}

static Mapping *mapping_at(Address address) {
    for (int i = 0; i < MOST; i++) {
        Mapping *mapping = &mappings[i];
        if (mapping->used && address >= mapping->start && address < mapping->start + mapping->size)
            return mapping;
    }
    return NULL;
}

static int set_access_locked(Address start, size_t size, int access, int device) {
    Mapping *mapping;
    for (Address at = start; at < start + size; at = mapping->start + mapping->size) {
        mapping = mapping_at(at);
        REQUIRE(mapping && mapping->start == at && at + mapping->size <= start + size, INVALID_VALUE);
        REQUIRE(mapping->device == device, INVALID_DEVICE); /* peers are not simulated */
        mapping->access = access;
        int protection = access == 3 ? PROT_READ | PROT_WRITE : access == 1 ? PROT_READ : PROT_NONE;
        if (mprotect((void *)mapping->start, mapping->size, protection)) abort();
    }
    return OK;
}

int cuMemSetAccess(Address start, size_t size, const AccessDescription *wanted, size_t count) {
    REQUIRE_CONTEXT();
    REQUIRE(wanted && count == 1 && size && wanted->location.type == 1, INVALID_VALUE);
    REQUIRE(wanted->access == 0 || wanted->access == 1 || wanted->access == 3, INVALID_VALUE);
    REQUIRE(is_device(wanted->location.id), INVALID_DEVICE);
    LOCKED(set_access_locked(start, size, wanted->access, visible[wanted->location.id]));
}

static int unmap_locked(Address start, size_t size) {
    for (int i = 0; i < num_copies; i++)
        if (overlaps(start, size, (Address)copies[i].to, copies[i].size) ||
            overlaps(start, size, (Address)copies[i].from, copies[i].size))
            return fault = 1, ILLEGAL_ADDRESS; /* what a kernel still running would meet */
    for (Address at = start; at < start + size;) {
        Mapping *mapping = mapping_at(at);
        REQUIRE(mapping && mapping->start == at && at + mapping->size <= start + size, INVALID_VALUE);
        at += mapping->size;
    }
    for (Address at = start; at < start + size;) {
        Mapping *mapping = mapping_at(at);
        if (mmap((void *)at, mapping->size, PROT_NONE,
                 MAP_PRIVATE | MAP_ANONYMOUS | MAP_FIXED | MAP_NORESERVE, -1, 0) == MAP_FAILED) abort();
        charge(mapping->device, mapping->inode, mapping->size, -1);
        at += mapping->size;
        mapping->used = 0;
    }
    return OK;
}

int cuMemUnmap(Address start, size_t size) {
    REQUIRE_CONTEXT();
    LOCKED(size ? unmap_locked(start, size) : INVALID_VALUE);
}

/* --- copies: an asynchronous one happens when somebody waits for it */

static int run_copies(void *stream, int all) {
    int kept = 0;
    for (int i = 0; i < num_copies; i++) {
        Copy *copy = &copies[i];
        if (!all && copy->stream != stream) copies[kept++] = *copy;
        else if (copy->from) memcpy(copy->to, copy->from, copy->size);
        else memset(copy->to, 0, copy->size);
    }
    num_copies = kept;
    return OK;
}

static int check_device_range(Address start, size_t size, int access) {
    Mapping *mapping;
    for (Address at = start; at < start + size; at = mapping->start + mapping->size) {
        mapping = mapping_at(at);
        REQUIRE(mapping, INVALID_VALUE);
        if ((mapping->access & access) != access) return fault = 1, ILLEGAL_ADDRESS;
    }
    return OK;
}

static int is_pinned(const void *start, size_t size) {
    for (int i = 0; i < MOST; i++)
        if (pinned[i].used && (Address)start >= pinned[i].start &&
            (Address)start + size <= pinned[i].start + pinned[i].size)
            return 1;
    return 0;
}

static int copy_locked(char *to, const char *from, size_t size, int to_device, void *stream) {
    int result = check_device_range((Address)(to_device ? to : from), size, to_device ? 3 : 1);
    REQUIRE(result == OK, result);
    const void *host = to_device ? from : to;
    if (stream && is_pinned(host, size) && num_copies < MOST) {
        copies[num_copies++] = (Copy){stream, to, from, size};
        return OK;
    }
    return memcpy(to, from, size), OK;
}

int cuMemcpyHtoD_v2(Address to, const void *from, size_t size) {
    REQUIRE_CONTEXT();
    LOCKED(copy_locked((char *)to, from, size, 1, NULL));
}

int cuMemcpyDtoH_v2(void *to, Address from, size_t size) {
    REQUIRE_CONTEXT();
    LOCKED(copy_locked(to, (char *)from, size, 0, NULL));
}

int cuMemcpyHtoDAsync_v2(Address to, const void *from, size_t size, void *stream) {
    REQUIRE_CONTEXT();
    LOCKED(copy_locked((char *)to, from, size, 1, stream));
}

int cuMemcpyDtoHAsync_v2(void *to, Address from, size_t size, void *stream) {
    REQUIRE_CONTEXT();
    LOCKED(copy_locked(to, (char *)from, size, 0, stream));
}

static int erase_locked(Address to, size_t size, void *stream) {
    int result = check_device_range(to, size, 3);
    REQUIRE(result == OK && num_copies < MOST, result);
    return copies[num_copies++] = (Copy){stream, (char *)to, NULL, size}, OK;
}

int cuMemsetD8Async(Address to, unsigned char value, size_t size, void *stream) {
    REQUIRE_CONTEXT();
    REQUIRE(!value && stream, NOT_SUPPORTED); /* others are not simulated */
    LOCKED(erase_locked(to, size, stream));
}

int cuCtxSynchronize(void) {
    REQUIRE_CONTEXT();
    LOCKED(run_copies(NULL, 1));
}

static int stream_create_locked(void **out) {
    for (int i = 0; i < MOST; i++)
        if (!streams[i].used) return streams[i].used = 1, *out = &streams[i], OK;
    return OUT_OF_MEMORY;
}

int cuStreamCreate(void **out, unsigned flags) {
    REQUIRE_CONTEXT();
    REQUIRE(flags <= 1, INVALID_VALUE);
    LOCKED(stream_create_locked(out));
}

int cuStreamSynchronize(void *stream) {
    REQUIRE_CONTEXT();
    LOCKED(run_copies(stream, 0));
}

int cuStreamDestroy_v2(void *stream) {
    REQUIRE_CONTEXT();
    REQUIRE(stream && ((Stream *)stream)->used, INVALID_VALUE);
    pthread_mutex_lock(&mutex);
    run_copies(stream, 0);
    ((Stream *)stream)->used = 0;
    pthread_mutex_unlock(&mutex);
    return OK;
}

/* --- pinned host memory */

static int pin_locked(void *start, size_t size) {
    for (int i = 0; i < MOST; i++)
        if (!pinned[i].used) return pinned[i] = (Range){1, (Address)start, size}, OK;
    return OUT_OF_MEMORY;
}

static int unpin_locked(const void *start) {
    for (int i = 0; i < num_copies; i++)
        if (overlaps((Address)start, 1, (Address)copies[i].to, copies[i].size) ||
            overlaps((Address)start, 1, (Address)copies[i].from, copies[i].size))
            return fault = 1, ILLEGAL_ADDRESS;
    for (int i = 0; i < MOST; i++)
        if (pinned[i].used && pinned[i].start == (Address)start) return pinned[i].used = 0, OK;
    return INVALID_VALUE;
}

int cuMemHostAlloc(void **out, size_t size, unsigned flags) {
    REQUIRE_CONTEXT();
    REQUIRE(!flags && !posix_memalign(out, 4096, size), OUT_OF_MEMORY);
    LOCKED(pin_locked(*out, size));
}

int cuMemFreeHost(void *start) {
    REQUIRE_CONTEXT();
    pthread_mutex_lock(&mutex);
    int result = unpin_locked(start);
    pthread_mutex_unlock(&mutex);
    if (result == OK) free(start);
    return result;
}

int cuMemHostRegister_v2(void *start, size_t size, unsigned flags) {
    REQUIRE_CONTEXT();
    REQUIRE(start && size && !flags, INVALID_VALUE);
    LOCKED(is_pinned(start, 1) ? INVALID_VALUE : pin_locked(start, size));
}

int cuMemHostUnregister(void *start) {
    REQUIRE_CONTEXT();
    LOCKED(unpin_locked(start));
}

/* --- names */

static const struct { int code; const char *name; } errors[] = {
    {OK, "CUDA_SUCCESS"}, {INVALID_VALUE, "CUDA_ERROR_INVALID_VALUE"},
    {OUT_OF_MEMORY, "CUDA_ERROR_OUT_OF_MEMORY"}, {NOT_INITIALIZED, "CUDA_ERROR_NOT_INITIALIZED"},
    {DEVICE_UNAVAILABLE, "CUDA_ERROR_DEVICE_UNAVAILABLE"},
    {NO_DEVICE, "CUDA_ERROR_NO_DEVICE"}, {INVALID_DEVICE, "CUDA_ERROR_INVALID_DEVICE"},
    {INVALID_CONTEXT, "CUDA_ERROR_INVALID_CONTEXT"}, {NOT_FOUND, "CUDA_ERROR_NOT_FOUND"},
    {ILLEGAL_ADDRESS, "CUDA_ERROR_ILLEGAL_ADDRESS"}, {NOT_SUPPORTED, "CUDA_ERROR_NOT_SUPPORTED"},
};

int cuGetErrorName(int code, const char **name) {
    for (size_t i = 0; i < sizeof errors / sizeof *errors; i++)
        if (errors[i].code == code) return *name = errors[i].name, OK;
    return *name = NULL, INVALID_VALUE;
}

int cuGetErrorString(int code, const char **text) { return cuGetErrorName(code, text); }

int cuGetProcAddress_v2(const char *name, void **out, int version, uint64_t flags, int *status) {
    Dl_info here;
    char newer[128];
    (void)version, (void)flags;
    if (!dladdr((void *)cuInit, &here)) abort();
    void *library = dlopen(here.dli_fname, RTLD_NOW | RTLD_NOLOAD);
    snprintf(newer, sizeof newer, "%s_v2", name);
    *out = dlsym(library, newer);
    if (!*out) *out = dlsym(library, name);
    dlclose(library);
    if (status) *status = *out ? 0 : 1;
    return *out ? OK : NOT_FOUND;
}

/* For tests: what this process still holds.
 * [handles, reservations, mappings, pinned ranges, streams, primary contexts, pending copies, faults] */
void simulated_counts(int counts[8]) {
    memset(counts, 0, 8 * sizeof *counts);
    for (int i = 0; i < MOST; i++) {
        counts[0] += handles[i].used;
        counts[1] += reservations[i].used;
        counts[2] += mappings[i].used;
        counts[3] += pinned[i].used;
        counts[4] += streams[i].used;
    }
    for (int i = 0; i < MOST_DEVICES; i++) counts[5] += primary_contexts[i];
    counts[6] = num_copies;
    counts[7] = fault;
}
