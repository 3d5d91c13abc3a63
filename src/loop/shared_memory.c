/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Mappings of files that other processes own, or may cut off. Touching a page that is no more in its file raises
 * SIGBUS: a handler puts anonymous zeroes in its place and lets the thread go on: in the place of the whole mapping, or
 * of one page of an extent, which may be much longer than what there is of memory. Invariants:
 * 1. a mapping is in the table while anybody may touch it; a slot of the table is never freed;
 * 2. the handler uses what is async-signal-safe only: atomics, and the system call mmap;
 * 3. a SIGBUS anywhere else ends the process, as without us;
 * 4. the file was long enough when it was mapped, but for extents: who maps one touches no more than the file has.
 * What others gave us is mapped from the file's begin, whatever part of it is asked for: offsets need not be multiples
 * of a (huge) page then.
 */
#include "loop/shared_memory.h"
#include "base/size.h"
#include <errno.h>
#include <fcntl.h>
#include <glib.h>
#include <inttypes.h>
#include <pthread.h>
#include <signal.h>
#include <stdatomic.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

/* Mappings of the process. */
#define MAPS_MAX 4096

static struct map {
    atomic_uintptr_t begin; /* 0: free */
    atomic_size_t size;
    atomic_size_t page; /* what is replaced; 0: all */
    atomic_bool lost;
    atomic_uintptr_t lost_begin, lost_end; /* of what is lost; if parts are, of all of them */
} maps[MAPS_MAX];
static atomic_uint maps_end; /* behind the last slot that was ever used */
static pthread_mutex_t guard = PTHREAD_MUTEX_INITIALIZER;

static void map_lose(struct map *map, uintptr_t begin, uintptr_t end)
{
    uintptr_t old = atomic_load(&map->lost_begin);

    while (begin < old && !atomic_compare_exchange_weak(&map->lost_begin, &old, begin)) {
    }
    old = atomic_load(&map->lost_end);
    while (end > old && !atomic_compare_exchange_weak(&map->lost_end, &old, end)) {
    }
    atomic_store(&map->lost, true);
}

static void bus_error(int number, siginfo_t *info, void *context)
{
    int saved_errno = errno;
    uintptr_t at = (uintptr_t)info->si_addr;

    for (unsigned i = 0; i < atomic_load(&maps_end); i++) {
        uintptr_t begin = atomic_load(&maps[i].begin);
        size_t size = atomic_load(&maps[i].size), page = atomic_load(&maps[i].page);

        if (begin && at - begin < size && begin == atomic_load(&maps[i].begin)) {
            uintptr_t from = page ? at - at % page : begin;
            size_t bytes = page ? page : size;

            map_lose(&maps[i], from, from + bytes); /* before anybody can see the zeroes */
            if (mmap((void *)from, bytes, PROT_READ | PROT_WRITE,
                     MAP_FIXED | MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0) != MAP_FAILED) {
                errno = saved_errno;
                return;
            }
        }
    }
    signal(SIGBUS, SIG_DFL); /* it comes again when the instruction is repeated */
    errno = saved_errno;
}

static void watch_bus_errors(void)
{
    static bool watched;
    struct sigaction action = {.sa_sigaction = bus_error, .sa_flags = SA_SIGINFO};

    if (!watched) {
        watched = true;
        sigemptyset(&action.sa_mask);
        sigaction(SIGBUS, &action, NULL);
    }
}

static int maps_add(struct shared_memory *memory, size_t page)
{
    int r = -ENOSPC;

    pthread_mutex_lock(&guard);
    watch_bus_errors();
    for (unsigned i = 0; i < MAPS_MAX && r < 0; i++) {
        if (!atomic_load(&maps[i].begin)) {
            memory->slot = i;
            atomic_store(&maps[i].size, memory->mapped_size);
            atomic_store(&maps[i].page, page);
            atomic_store(&maps[i].lost, false);
            atomic_store(&maps[i].lost_begin, UINTPTR_MAX);
            atomic_store(&maps[i].lost_end, 0);
            atomic_store(&maps[i].begin, (uintptr_t)memory->mapped);
            atomic_store(&maps_end, MAX(atomic_load(&maps_end), i + 1));
            r = 0;
        }
    }
    pthread_mutex_unlock(&guard);
    return r;
}

/* Maps `end` bytes from the file's begin. */
static int map_file(int fd, uint64_t end, const struct stat *status, struct shared_memory *memory)
{
    uint64_t page = MAX((uint64_t)status->st_blksize, (uint64_t)sysconf(_SC_PAGESIZE));

    memory->mapped_size = align_up(end, is_power_of_two(page) ? page : (uint64_t)sysconf(_SC_PAGESIZE));
    memory->mapped = mmap(NULL, memory->mapped_size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_NORESERVE, fd, 0);
    if (memory->mapped == MAP_FAILED) {
        return -errno;
    }
    madvise(memory->mapped, memory->mapped_size, MADV_DONTDUMP); /* a guest's memory is not ours to write down */
    int r = maps_add(memory, 0);
    if (r < 0) {
        munmap(memory->mapped, memory->mapped_size);
    }
    return r;
}

int shared_memory_map(int fd, uint64_t offset, uint64_t size, struct shared_memory **ret, struct error **err)
{
    struct shared_memory *memory;
    struct stat status;
    int r;

    if (fstat(fd, &status) < 0) {
        return error_set_errno(err, -errno, "Cannot look at the file of shared memory");
    }
    if (!S_ISREG(status.st_mode)) {
        return error_set(err, -EINVAL, "Shared memory is not a regular file");
    }
    if (!size || offset > (uint64_t)status.st_size || size > (uint64_t)status.st_size - offset) {
        return error_set(err, -EINVAL,
                         "Shared memory of %" PRIu64 " bytes at %" PRIu64 " is not in its file of %" PRIu64, size,
                         offset, (uint64_t)status.st_size);
    }
    memory = g_new0(struct shared_memory, 1);
    r = map_file(fd, offset + size, &status, memory);
    if (r < 0) {
        g_free(memory);
        return error_set_errno(err, r, "Cannot map %" PRIu64 " bytes of shared memory", offset + size);
    }
    memory->bytes = (uint8_t *)memory->mapped + offset;
    memory->size = size;
    *ret = memory;
    return 0;
}

struct shared_memory *shared_memory_map_extent(int fd, uint64_t offset, size_t size)
{
    struct shared_memory memory = {.size = size, .mapped_size = size};
    uint8_t *room = mmap(NULL, 2 * size, PROT_NONE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);

    if (room == MAP_FAILED) {
        return NULL;
    }
    size_t before = (size - (uintptr_t)room % size) % size;

    memory.mapped = memory.bytes = room + before;
    bool done =
        mmap(memory.mapped, size, PROT_READ | PROT_WRITE, MAP_SHARED | MAP_FIXED, fd, (off_t)offset) != MAP_FAILED &&
        madvise(memory.mapped, size, MADV_DONTDUMP) == 0 && maps_add(&memory, (size_t)sysconf(_SC_PAGESIZE)) == 0;

    if (!done) {
        munmap(room, 2 * size);
        return NULL;
    }
    if (before) {
        munmap(room, before);
    }
    munmap(memory.bytes + size, size - before);
    return g_memdup2(&memory, sizeof(memory));
}

int shared_memory_create(const char *name, size_t size, struct shared_memory **ret, int *ret_fd, struct error **err)
{
    int r, fd = memfd_create(name, MFD_CLOEXEC | MFD_ALLOW_SEALING);

    if (fd < 0 || ftruncate(fd, (off_t)size) < 0) {
        r = error_set_errno(err, -errno, "Cannot make %zu bytes of shared memory", size);
    } else {
        fcntl(fd, F_ADD_SEALS, F_SEAL_GROW | F_SEAL_SHRINK | F_SEAL_SEAL);
        r = shared_memory_map(fd, 0, size, ret, err);
    }
    if (r < 0 && fd >= 0) {
        close(fd);
    } else {
        *ret_fd = fd;
    }
    return r;
}

void shared_memory_unmap(struct shared_memory *memory)
{
    if (!memory) {
        return;
    }
    atomic_store(&maps[memory->slot].begin, 0);
    munmap(memory->mapped, memory->mapped_size);
    g_free(memory);
}

bool shared_memory_has_lost(const struct shared_memory *memory, const void *at, size_t bytes)
{
    struct map *map = &maps[memory->slot];

    return shared_memory_is_lost(memory) && (uintptr_t)at < atomic_load(&map->lost_end) &&
           (uintptr_t)at + bytes > atomic_load(&map->lost_begin);
}

bool shared_memory_is_lost(const struct shared_memory *memory)
{
    atomic_signal_fence(memory_order_seq_cst); /* what was copied before this was copied before */
    return atomic_load_explicit(&maps[memory->slot].lost, memory_order_acquire);
}
