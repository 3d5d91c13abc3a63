/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Image locks: how processes on one host tell each other what they do with an image file. Owns the layout (bytes 100
 * and up: what is done; 200 and up: what others may not do) and what a reader and a writer hold, which is what the
 * peer's daemon holds too, so that each refuses the other correctly.
 *
 * 1. First all locks are taken, then the opposite bytes are asked for: of two processes that come at the same time, one
 *    at least sees the other, and never do both go on.
 * 2. Locks belong to the open file description: closing the file releases them.
 */
#include "driver/protocol/image_lock.h"
#include "base/size.h"
#include <errno.h>

#define DONE_OFFSET 100
#define DENIED_OFFSET 200
#define BIT_COUNT 4
#define BIT(n) (1U << (n))

static const char *const bit_names[BIT_COUNT] = {"consistent read", "write", "write unchanged", "resize"};

/* Both let others read and write unchanged data. */
#define READER_DOES BIT(IMAGE_LOCK_READ)
#define WRITER_DOES (BIT(IMAGE_LOCK_READ) | BIT(IMAGE_LOCK_WRITE) | BIT(IMAGE_LOCK_RESIZE))
#define BOTH_DENY (BIT(IMAGE_LOCK_WRITE) | BIT(IMAGE_LOCK_RESIZE))

static int coroutine_fn lock_bits(struct file *file, uint64_t from, unsigned bits)
{
    for (unsigned bit = 0; bit < BIT_COUNT; bit++) {
        if (bits & BIT(bit)) {
            int r = file_lock_shared(file, from + bit, 1);
            if (r < 0) {
                return r;
            }
        }
    }
    return 0;
}

static void coroutine_fn unlock_all(struct file *file)
{
    file_unlock(file, DONE_OFFSET, BIT_COUNT);
    file_unlock(file, DENIED_OFFSET, BIT_COUNT);
}

/* Does somebody hold one of the bytes that `bits` clash with? */
static int coroutine_fn test_bits(struct file *file, uint64_t from, unsigned bits, const char *path, bool denied,
                                  struct error **err)
{
    for (unsigned bit = 0; bit < BIT_COUNT; bit++) {
        int r = bits & BIT(bit) ? file_lock_test(file, from + bit, 1, NULL) : 0;
        if (r == -EAGAIN) {
            r = error_set(err, r,
                          denied ? "Failed to get \"%s\" lock on '%s': another user of this image does not allow it"
                                 : "Failed to get shared \"%s\" lock on '%s': another user of this image does that",
                          bit_names[bit], path);
            error_hint(err, "Another process, or another node of this one, has the image open; stop it first, or use "
                            "force-share=on to read what may be inconsistent");
            return r;
        }
        if (r < 0) {
            return error_set_errno(err, r, "Cannot look for locks on '%s'", path);
        }
    }
    return 0;
}

static int coroutine_fn take(struct file *file, const char *path, bool writable, struct error **err)
{
    unsigned does = writable ? WRITER_DOES : READER_DOES;
    int r = lock_bits(file, DONE_OFFSET, does);
    if (r == 0) {
        r = lock_bits(file, DENIED_OFFSET, BOTH_DENY);
    }
    return r < 0 ? error_set_errno(err, r, "Cannot lock '%s'", path) : 0;
}

static int coroutine_fn test(struct file *file, const char *path, bool writable, struct error **err)
{
    int r = test_bits(file, DENIED_OFFSET, writable ? WRITER_DOES : READER_DOES, path, true, err);
    return r < 0 ? r : test_bits(file, DONE_OFFSET, BOTH_DENY, path, false, err);
}

int coroutine_fn image_lock_take(struct file *file, const char *path, bool writable, struct error **err)
{
    int r = take(file, path, writable, err);
    if (r == 0) {
        r = test(file, path, writable, err);
    }
    if (r < 0) {
        unlock_all(file);
    }
    return r;
}

int coroutine_fn image_lock_replace(struct file *file, struct file *old, bool old_writable, const char *path,
                                    bool writable, struct error **err)
{
    int r = take(file, path, writable, err);
    if (r == 0) {
        unlock_all(old);
        r = test(file, path, writable, err);
        if (r < 0) {
            take(old, path, old_writable, NULL); /* nobody can have come between: `file` holds the same */
        }
    }
    if (r < 0) {
        unlock_all(file);
    }
    return r;
}
