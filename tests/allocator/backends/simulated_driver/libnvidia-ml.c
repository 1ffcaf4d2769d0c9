/* A simulated NVML: libnvidia-ml.so.1 for tests on machines without a GPU.
 *
 * Owns a make-believe of the entry points that allocator/backends/nvml.py calls, over the devices of
 * libcuda.c beside it. Invariant: it only reads. Memory that a process imported counts as that
 * process's, too; what a real driver says there is not known.
 *
 * SIMULATED_NVML_LACKS  of "processes mode": what can't be asked
 * SIMULATED_NVML_MODE   the devices' compute mode (0)
 */
#define _GNU_SOURCE
#include <stdio.h>
#include <string.h>

#include "ledger.h"

enum { OK = 0, INVALID_ARGUMENT = 2, NOT_SUPPORTED = 3, NOT_FOUND = 6, INSUFFICIENT_SIZE = 7 };

typedef struct { unsigned version; unsigned long long total, reserved, free, used; } Memory;
typedef struct { unsigned pid; unsigned long long used; unsigned gpu_instance, instance; } Process;

static LedgerRow *ledger;
static int ledger_fd;

static int lacks(const char *what) {
    const char *list = getenv("SIMULATED_NVML_LACKS");
    return list && strstr(list, what) != NULL;
}

int nvmlInitWithFlags(unsigned flags) {
    if (flags) return INVALID_ARGUMENT;
    if (!ledger) ledger = open_ledger(&ledger_fd);
    return OK;
}

int nvmlShutdown(void) { return OK; }

const char *nvmlErrorString(int code) { return code == NOT_FOUND ? "Not Found" : "Failed"; }

int nvmlSystemGetDriverVersion(char *version, unsigned length) {
    return snprintf(version, length, "0.simulated"), OK;
}

/* A handle is the device's number, from 1 on. */
int nvmlDeviceGetCount_v2(unsigned *count) { return *count = (unsigned)physical_devices(), OK; }

int nvmlDeviceGetHandleByIndex_v2(unsigned index, void **device) {
    if (index >= (unsigned)physical_devices()) return INVALID_ARGUMENT;
    return *device = (void *)(intptr_t)(index + 1), OK;
}

int nvmlDeviceGetUUID(void *device, char *uuid, unsigned length) {
    char name[64], *end = name + sprintf(name, "GPU-");
    for (int byte = 0; byte < 16; byte++) {
        const char *dash = byte == 4 || byte == 6 || byte == 8 || byte == 10 ? "-" : "";
        end += sprintf(end, "%s%02x", dash, UUID_BYTE + (int)(intptr_t)device - 1);
    }
    return snprintf(uuid, length, "%s", name), OK;
}

int nvmlDeviceGetHandleByUUID(const char *uuid, void **device) {
    char name[64];
    for (int i = 1; i <= physical_devices(); i++) {
        nvmlDeviceGetUUID((void *)(intptr_t)i, name, sizeof name);
        if (!strcmp(uuid, name)) return *device = (void *)(intptr_t)i, OK;
    }
    return NOT_FOUND;
}

int nvmlDeviceGetName(void *device, char *name, unsigned length) {
    return snprintf(name, length, "Simulated device %d", (int)(intptr_t)device - 1), OK;
}

int nvmlDeviceGetMemoryInfo_v2(void *device, Memory *memory) {
    flock(ledger_fd, LOCK_EX);
    drop_the_dead(ledger);
    memory->used = used_bytes(ledger, (int)(intptr_t)device - 1);
    flock(ledger_fd, LOCK_UN);
    memory->total = device_bytes();
    memory->reserved = 0;
    return memory->free = memory->total - memory->used, OK;
}

int nvmlDeviceGetComputeRunningProcesses_v3(void *device, unsigned *count, Process *out) {
    if (lacks("processes")) return NOT_SUPPORTED;
    unsigned found = 0;
    flock(ledger_fd, LOCK_EX);
    drop_the_dead(ledger);
    for (LedgerRow *row = ledger; row < ledger + MOST; row++) {
        if (!row->references || row->device != (int)(intptr_t)device - 1) continue;
        int first = 1;
        for (LedgerRow *before = ledger; before < row; before++)
            first &= !(before->references && before->pid == row->pid && before->device == row->device);
        if (!first) continue;
        unsigned long long used = 0;
        for (LedgerRow *other = row; other < ledger + MOST; other++)
            if (other->references && other->pid == row->pid && other->device == row->device)
                used += other->size;
        if (found < *count && out) out[found] = (Process){(unsigned)row->pid, used, ~0u, ~0u};
        found++;
    }
    flock(ledger_fd, LOCK_UN);
    int fits = found <= *count && (out || !found);
    return *count = found, fits ? OK : INSUFFICIENT_SIZE;
}

int nvmlDeviceGetComputeMode(void *device, unsigned *mode) {
    const char *text = getenv("SIMULATED_NVML_MODE");
    (void)device;
    return lacks("mode") ? NOT_SUPPORTED : (*mode = text ? (unsigned)atoi(text) : 0, OK);
}

int nvmlDeviceGetMigMode(void *device, unsigned *now, unsigned *pending) {
    (void)device, (void)now, (void)pending;
    return NOT_SUPPORTED;
}
