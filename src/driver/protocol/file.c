/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The `file` driver: a regular file of the host as a node. Owns the open file, its image locks (image_lock.c), what was
 * learnt about the file system (which kinds of fallocate it has), and the last extent that a block status found.
 *
 * Options: filename; locking on|off|auto; aio is accepted and has no effect, because the engine is chosen for the whole
 * program. cache.direct opens with O_DIRECT, cache.no-flush is the request path's. mapped: see loop/file_map.h.
 *
 * 1. While the node is open, the locks that its state (reading or writing) asks for are held, unless locking=off or
 *    force-share=on.
 * 2. The cached extent is valid while `generation` is what it was when the seek began; every write, zeroing, discard
 *    and truncation changes it when it is done.
 * 3. A file whose size is no multiple of the direct I/O block may grow to one while it is written; closing cuts it back
 *    to node->size, unless locking is off.
 * 4. The kernel tells of pages that it could not write once, and may drop them: after one failure to sync a file that
 *    is not opened for direct I/O, every later one fails too. Who leans on a sync never takes lost data for stable.
 *
 * Directories, character devices, sockets and block devices are refused: what is not a regular file is another
 * driver's.
 */
#include "loop/file.h"
#include "base/size.h"
#include "block/driver.h"
#include "driver/drivers.h"
#include "driver/protocol/file_create.h"
#include "driver/protocol/image_lock.h"
#include <errno.h>
#include <glib.h>

struct file_state {
    struct file *file;
    char *path; /* absolute: it is opened again, wherever the program may stand then */
    bool locking;
    bool direct; /* as it is open */
    bool mapped;
    atomic_bool no_zero, no_punch;
    atomic_int sync_error; /* 0 or a negative errno, see 4. */
    atomic_uint_fast64_t generation;
    struct co_mutex guard; /* the cached extent; only ever tried: who does not get it goes without */
    uint64_t extent_generation, extent_offset, extent_end;
    bool extent_data;
};

static struct file_state *file_state(const struct node *node)
{
    return node->state;
}

static unsigned open_flags(const struct node *node, bool writable)
{
    return (writable ? FILE_WRITABLE : 0) | (node->direct ? FILE_DIRECT : 0) |
           (file_state(node)->mapped ? FILE_MAPPED : 0);
}

/* See 4. */
static int coroutine_fn sync_file(struct node *node)
{
    struct file_state *state = file_state(node);
    int r = atomic_load(&state->sync_error);
    if (r == 0) {
        r = file_sync(state->file);
        if (r < 0 && !node->direct) {
            atomic_store(&state->sync_error, r);
        }
    }
    return r;
}

/* --- opening and closing --- */

static bool wants_locks(const struct node *node, const struct blockdev_options_file *options)
{
    return !node->force_share && !(options->has_locking && options->locking == ON_OFF_AUTO_OFF);
}

static int coroutine_fn learn_file(struct node *node, struct error **err)
{
    struct file_state *state = file_state(node);
    struct file_info info;
    int r = file_info(state->file, &info);
    if (r < 0) {
        return error_set_errno(err, r, "Cannot look at '%s'", state->path);
    }
    if (info.is_block_device) {
        return error_set(err, -EINVAL, "'%s' is a block device: driver 'file' takes regular files only", state->path);
    }
    if (info.size > INT64_MAX) {
        return error_set(err, -EFBIG, "'%s' is too large", state->path);
    }
    atomic_store(&node->size, info.size);
    node->limits.alignment = info.alignment;
    node->limits.memory_alignment = info.memory_alignment;
    node->device = info.device;
    node->inode = info.inode;
    return 0;
}

static int coroutine_fn file_driver_open(struct node *node, const struct blockdev_options *options, struct error **err)
{
    const struct blockdev_options_file *own = &options->u.file;
    struct file_state *state = file_state(node);
    if (!*own->filename) {
        return error_set(err, -EINVAL, "Node '%s': the 'filename' of driver 'file' is empty", node->name);
    }
    state->mapped = own->mapped;
    int r = file_open(own->filename, open_flags(node, node->writable), &state->file, err);
    if (r < 0) {
        return r;
    }
    state->path = g_canonicalize_filename(own->filename, NULL);
    state->locking = wants_locks(node, own);
    r = learn_file(node, err);
    if (r == 0 && state->locking) {
        r = image_lock_take(state->file, state->path, node->writable, err);
    }
    if (r < 0) {
        file_close(state->file);
        g_free(state->path);
        return r;
    }
    state->direct = node->direct;
    co_mutex_init(&state->guard);
    node->filename = g_strdup(own->filename);
    return 0;
}

/* Cuts the zeroes that direct writes left behind the end: less than a block, and only where nobody else may write. */
static void coroutine_fn cut_tail(struct node *node)
{
    struct file_state *state = file_state(node);
    struct file_info info;
    uint64_t size = atomic_load(&node->size), alignment = node->limits.alignment;
    if (node->writable && state->locking && alignment > 1 && !is_aligned(size, alignment) &&
        file_info(state->file, &info) == 0 && info.size == align_up(size, alignment)) {
        file_truncate(state->file, size);
    }
}

static void coroutine_fn file_driver_close(struct node *node)
{
    struct file_state *state = file_state(node);
    cut_tail(node);
    file_close(state->file);
    co_mutex_destroy(&state->guard);
    g_free(state->path);
}

/* Opens the file anew; the locks go from the old description to the new one. */
static int coroutine_fn file_driver_set_writable(struct node *node, bool writable, struct error **err)
{
    struct file_state *state = file_state(node);
    struct file *file;
    struct file_info info;
    int r = 0;
    if (!writable) {
        cut_tail(node);
        r = node->no_flush ? 0 : sync_file(node);
        if (r < 0) {
            return error_set_errno(err, r, "Cannot flush '%s'", state->path);
        }
    }
    r = file_open(state->path, open_flags(node, writable), &file, err);
    if (r < 0) {
        return r;
    }
    r = file_info(file, &info);
    if (r == 0 && (info.device != node->device || info.inode != node->inode)) {
        r = error_set(err, -ESTALE, "'%s' is another file than the one that node '%s' has open", state->path,
                      node->name);
        error_hint(err, "The file was renamed or replaced; what the node has open cannot be found by its name");
    } else if (r < 0) {
        error_set_errno(err, r, "Cannot look at '%s'", state->path);
    }
    if (r == 0 && state->locking) {
        r = image_lock_replace(file, state->file, !writable, state->path, writable, err);
    }
    if (r < 0) {
        file_close(file);
        return r;
    }
    file_close(state->file);
    state->file = file;
    state->direct = node->direct;
    return 0;
}

static const char *const reopenable[] = {"aio", NULL};

/* cache.direct alone is the file's own business. */
static int coroutine_fn file_driver_reopen(struct node *node, const struct blockdev_options *options,
                                           struct error **err)
{
    struct file_state *state = file_state(node);
    struct file_info info;
    if (state->direct == node->direct) {
        return 0;
    }
    cut_tail(node);
    int r = file_driver_set_writable(node, node->writable, err);
    if (r == 0 && file_info(state->file, &info) == 0) {
        node->limits.alignment = info.alignment;
        node->limits.memory_alignment = info.memory_alignment;
    }
    return r;
}

/* --- data --- */

static int coroutine_fn file_driver_read(struct node *node, uint64_t offset, uint64_t bytes, struct buffers to,
                                         unsigned flags)
{
    return file_read(file_state(node)->file, offset, bytes, to);
}

/* The file's content changes: extents found meanwhile are worth nothing. */
static inline void extents_change(struct file_state *state)
{
    atomic_fetch_add_explicit(&state->generation, 1, memory_order_acq_rel);
}

static int coroutine_fn file_driver_write(struct node *node, uint64_t offset, uint64_t bytes, struct buffers from,
                                          unsigned flags)
{
    struct file_state *state = file_state(node);
    int r = file_write(state->file, offset, bytes, from, flags & REQUEST_FUA);
    extents_change(state);
    if (r == -EIO && flags & REQUEST_FUA && !node->direct) { /* it may have told of pages of others */
        atomic_store(&state->sync_error, r);
    }
    return r;
}

static int coroutine_fn allocate(struct node *node, enum file_allocate_mode mode, atomic_bool *unsupported,
                                 uint64_t offset, uint64_t bytes)
{
    struct file_state *state = file_state(node);
    if (atomic_load_explicit(unsupported, memory_order_relaxed)) {
        return -ENOTSUP;
    }
    int r = file_allocate(state->file, mode, offset, bytes);
    extents_change(state);
    if (r == -EOPNOTSUPP || r == -ENOSYS) {
        atomic_store_explicit(unsupported, true, memory_order_relaxed);
        return -ENOTSUP;
    }
    return r;
}

static int coroutine_fn file_driver_write_zeroes(struct node *node, uint64_t offset, uint64_t bytes, unsigned flags)
{
    struct file_state *state = file_state(node);
    bool inside = offset + bytes <= atomic_load(&node->size); /* punching does not grow the file */
    int r = -ENOTSUP;
    if ((flags & REQUEST_MAY_UNMAP) && inside) {
        r = allocate(node, FILE_PUNCH, &state->no_punch, offset, bytes);
    }
    if (r == -ENOTSUP) {
        r = allocate(node, FILE_ZERO, &state->no_zero, offset, bytes);
    }
    if (r == 0 && (flags & REQUEST_FUA)) {
        r = sync_file(node);
    }
    return r;
}

static int coroutine_fn file_driver_discard(struct node *node, uint64_t offset, uint64_t bytes)
{
    struct file_state *state = file_state(node);
    return allocate(node, FILE_PUNCH, &state->no_punch, offset, bytes);
}

static int coroutine_fn file_driver_flush(struct node *node)
{
    return sync_file(node);
}

static bool find_cached(struct file_state *state, uint64_t offset, bool *ret_data, uint64_t *ret_end)
{
    if (!co_mutex_try_lock(&state->guard)) {
        return false;
    }
    bool found = state->extent_generation == atomic_load(&state->generation) && offset >= state->extent_offset &&
                 offset < state->extent_end;
    *ret_data = state->extent_data;
    *ret_end = state->extent_end;
    co_mutex_unlock(&state->guard);
    return found;
}

static void keep_extent(struct file_state *state, uint64_t generation, uint64_t offset, bool data, uint64_t end)
{
    if (co_mutex_try_lock(&state->guard)) {
        state->extent_generation = generation;
        state->extent_offset = offset;
        state->extent_end = end;
        state->extent_data = data;
        co_mutex_unlock(&state->guard);
    }
}

static int coroutine_fn file_driver_block_status(struct node *node, uint64_t offset, uint64_t bytes, struct extent *ret)
{
    struct file_state *state = file_state(node);
    uint64_t generation = atomic_load(&state->generation), end;
    bool data;
    if (!find_cached(state, offset, &data, &end)) {
        int r = file_extent(state->file, offset, &data, &end);
        if (r == -ENXIO) { /* a hole up to the end, or a size that is not on disk yet */
            data = false;
            end = offset + bytes;
        } else if (r < 0) { /* no such call on this file system: everything is data */
            data = true;
            end = offset + bytes;
        }
        end = max_u64(end, offset + 1);
        keep_extent(state, generation, offset, data, end);
    }
    *ret = (struct extent){.bytes = min_u64(bytes, end - offset),
                           .host_offset = offset,
                           .flags = EXTENT_ALLOCATED | EXTENT_MAPPED | (data ? EXTENT_DATA : EXTENT_ZERO)};
    return 0;
}

/* --- control --- */

static int coroutine_fn file_driver_truncate(struct node *node, uint64_t size, struct error **err)
{
    struct file_state *state = file_state(node);
    int r = file_truncate(state->file, size);
    extents_change(state);
    return r < 0 ? error_set_errno(err, r, "Cannot set the size of '%s'", state->path) : 0;
}

static int coroutine_fn file_driver_grow(struct node *node, uint64_t size, enum preallocation_mode mode,
                                         struct error **err)
{
    struct file_state *state = file_state(node);
    int r = file_extend(state->file, state->path, atomic_load(&node->size), size, mode, err);
    extents_change(state);
    return r;
}

static struct image_info_specific *file_driver_specific_info(struct node *node)
{
    struct image_info_specific *info = g_new0(struct image_info_specific, 1);
    info->type = IMAGE_INFO_SPECIFIC_KIND_FILE;
    info->u.file.data = g_new0(struct image_info_specific_file, 1);
    return info;
}

static uint64_t coroutine_fn file_driver_allocated_size(struct node *node)
{
    struct file_info info;
    return file_info(file_state(node)->file, &info) < 0 ? 0 : info.allocated;
}

static const struct image_driver file_image = {
    .options = file_create_options,
    .create = file_driver_create,
    .measure = file_driver_measure,
    .grow = file_driver_grow,
};

const struct driver driver_file = {
    .name = "file",
    .id = BLOCKDEV_DRIVER_FILE,
    .kind = DRIVER_PROTOCOL,
    .state_size = sizeof(struct file_state),
    .grows_on_write = true,
    .offloads = true,
    .open = file_driver_open,
    .close = file_driver_close,
    .read = file_driver_read,
    .write = file_driver_write,
    .write_zeroes = file_driver_write_zeroes,
    .discard = file_driver_discard,
    .flush = file_driver_flush,
    .block_status = file_driver_block_status,
    .truncate = file_driver_truncate,
    .set_writable = file_driver_set_writable,
    .reopen = file_driver_reopen,
    .reopenable = reopenable,
    .specific_info = file_driver_specific_info,
    .allocated_size = file_driver_allocated_size,
    .image = &file_image,
};
