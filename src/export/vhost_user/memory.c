/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The table of a guest's memory, and the only way from its addresses to ours. All numbers come from the front end or
 * from the guest: nothing is added up here before it is known to fit. Invariants:
 * 1. a region's end is not behind the end of either address space, and its mapping is as long as it is;
 * 2. no two regions overlap, so an address leads to one place at most;
 * 3. what is handed out lies within one mapping, or is cut where mappings meet.
 */
#include "export/vhost_user/memory.h"
#include "base/size.h"
#include "loop/shared_memory.h"
#include <errno.h>
#include <glib.h>
#include <inttypes.h>
#include <string.h>

static bool overlap(uint64_t a, uint64_t a_bytes, uint64_t b, uint64_t b_bytes)
{
    return a < b + b_bytes && b < a + a_bytes;
}

int vhost_memory_add(struct vhost_memory *memory, const struct vhost_region *region, int fd, struct error **err)
{
    if (memory->count == VHOST_REGIONS_MAX) {
        return error_set(err, -ENOSPC, "More than %d regions of memory", VHOST_REGIONS_MAX);
    }
    if (!region->size || region->guest > UINT64_MAX - region->size || region->user > UINT64_MAX - region->size) {
        return error_set(err, -EINVAL, "A region of memory is empty or wraps around");
    }
    for (unsigned i = 0; i < memory->count; i++) {
        const struct vhost_region *other = &memory->regions[i].at;

        if (overlap(region->guest, region->size, other->guest, other->size) ||
            overlap(region->user, region->size, other->user, other->size)) {
            return error_set(err, -EINVAL, "Regions of memory overlap at %" PRIx64, region->guest);
        }
    }
    struct vhost_mapped *mapped = &memory->regions[memory->count];
    int r = shared_memory_map(fd, region->offset, region->size, &mapped->memory, err);

    if (r == 0) {
        mapped->at = *region;
        memory->count++;
    }
    return r;
}

int vhost_memory_remove(struct vhost_memory *memory, const struct vhost_region *region, struct error **err)
{
    for (unsigned i = 0; i < memory->count; i++) {
        const struct vhost_region *at = &memory->regions[i].at;

        if (at->guest == region->guest && at->user == region->user && at->size == region->size) {
            shared_memory_unmap(memory->regions[i].memory);
            memory->regions[i] = memory->regions[--memory->count];
            return 0;
        }
    }
    return error_set(err, -ENOENT, "There is no region of memory at %" PRIx64, region->guest);
}

void vhost_memory_clear(struct vhost_memory *memory)
{
    while (memory->count) {
        shared_memory_unmap(memory->regions[--memory->count].memory);
    }
}

bool vhost_memory_is_lost(const struct vhost_memory *memory)
{
    for (unsigned i = 0; i < memory->count; i++) {
        if (shared_memory_is_lost(memory->regions[i].memory)) {
            return true;
        }
    }
    return false;
}

void *vhost_memory_ring(const struct vhost_memory *memory, uint64_t user, uint64_t bytes, unsigned alignment)
{
    for (unsigned i = 0; i < memory->count; i++) {
        const struct vhost_mapped *mapped = &memory->regions[i];
        uint64_t offset = user - mapped->at.user;

        if (user >= mapped->at.user && offset < mapped->at.size && bytes <= mapped->at.size - offset) {
            uint8_t *found = mapped->memory->bytes + offset;
            return is_aligned((uintptr_t)found, alignment) ? found : NULL;
        }
    }
    return NULL;
}

/* The longest piece from `guest` on that lies in one region, and how long it is; NULL: nothing is there. */
static void *piece(const struct vhost_memory *memory, uint64_t guest, uint64_t *ret_bytes)
{
    for (unsigned i = 0; i < memory->count; i++) {
        const struct vhost_mapped *mapped = &memory->regions[i];
        uint64_t offset = guest - mapped->at.guest;

        if (guest >= mapped->at.guest && offset < mapped->at.size) {
            *ret_bytes = mapped->at.size - offset;
            return mapped->memory->bytes + offset;
        }
    }
    return NULL;
}

int vhost_memory_find(const struct vhost_memory *memory, uint64_t guest, uint64_t bytes, struct iovec *iov,
                      unsigned max)
{
    unsigned count = 0;

    while (bytes) {
        uint64_t here;
        void *found = piece(memory, guest, &here);

        if (!found) {
            return -EFAULT;
        }
        if (count == max) {
            return -E2BIG;
        }
        here = min_u64(here, bytes);
        iov[count++] = (struct iovec){found, here};
        guest += here; /* a region's end does not wrap around */
        bytes -= here;
    }
    return (int)count;
}

int vhost_memory_read(const struct vhost_memory *memory, uint64_t guest, void *to, uint64_t bytes)
{
    char *at = to;

    while (bytes) {
        uint64_t here;
        void *found = piece(memory, guest, &here);

        if (!found) {
            return -EFAULT;
        }
        here = min_u64(here, bytes);
        memcpy(at, found, here);
        at += here;
        guest += here;
        bytes -= here;
    }
    return 0;
}
