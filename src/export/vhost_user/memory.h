/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_VHOST_USER_MEMORY_H
#define INTERLOCK_EXPORT_VHOST_USER_MEMORY_H

#include "base/error.h"
#include "export/vhost_user/vhost_user_format.h"
#include <stdbool.h>
#include <stddef.h>
#include <sys/uio.h>

/*
 * The guest's memory, as the front end has shared it: regions with a place in the guest's address space and one in the
 * front end's. It is changed on the control loop while no queue runs, and looked at from all loops.
 */
struct shared_memory;

#define VHOST_REGIONS_MAX 64

struct vhost_mapped {
    struct vhost_region at;
    struct shared_memory *memory;
};
struct vhost_memory {
    unsigned count;
    struct vhost_mapped regions[VHOST_REGIONS_MAX];
};

/* The descriptor stays the caller's. Regions do not overlap, neither here nor there: -EINVAL. */
int vhost_memory_add(struct vhost_memory *memory, const struct vhost_region *region, int fd, struct error **err);
/* -ENOENT: there is none with that place and size. */
int vhost_memory_remove(struct vhost_memory *memory, const struct vhost_region *region, struct error **err);
void vhost_memory_clear(struct vhost_memory *memory);
/* The front end has taken some of it away. */
bool vhost_memory_is_lost(const struct vhost_memory *memory);

/* `bytes` at an address of the front end, aligned; NULL: not all of it is in one region. */
void *vhost_memory_ring(const struct vhost_memory *memory, uint64_t user, uint64_t bytes, unsigned alignment);
/* Where `bytes` (not 0) at an address of the guest are: iovecs, at most `max`. Their number; -EFAULT: not all of it is
 * there; -E2BIG: it takes more of them. */
int vhost_memory_find(const struct vhost_memory *memory, uint64_t guest, uint64_t bytes, struct iovec *iov,
                      unsigned max);
/* Copies from there; 0 or -EFAULT. */
int vhost_memory_read(const struct vhost_memory *memory, uint64_t guest, void *to, uint64_t bytes);

#endif
