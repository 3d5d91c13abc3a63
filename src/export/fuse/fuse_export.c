/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The life of a FUSE export: mounting, receiving what the kernel asks, ending. Invariants:
 * 1. one coroutine on the export's loop, the receiver, reads requests from the kernel; each runs in a coroutine of its
 *    own (libfuse calls the handlers in it, and these may yield). The receiver holds a reference to the export;
 * 2. at most REQUESTS_MAX requests are inside; their buffers are kept for the next ones;
 * 3. the receiver ends when the file is unmounted, by us or by somebody else, or when the export is told to go; then it
 *    waits for the requests inside. Somebody else's unmounting deletes the export;
 * 4. the connection goes back to the control loop at the receiver's end and is closed there: shutting it down from
 * there is always safe;
 * 5. the session is made and destroyed on the worker pool: mount and umount take their time.
 * What the requests do is in fuse_request.c.
 */
#define FUSE_USE_VERSION 312
#include "export/fuse/fuse_export.h"
#include "base/size.h"
#include "block/user.h"
#include "loop/connection.h"
#include "loop/file.h"
#include "loop/worker.h"
#include <errno.h>
#include <fcntl.h>
#include <fuse_lowlevel.h>
#include <glib.h>
#include <string.h>
#include <unistd.h>

#define REQUESTS_MAX 64
#define BUFFER_BYTES (FUSE_TRANSFER_MAX + 64 * KiB) /* with the request's header in front */

struct fuse_buffer {
    struct fuse_export *fuse;
    struct fuse_buffer *next;
    struct fuse_buf request;
    char memory[];
};

/* --- receiving; the export's loop --- */

static struct fuse_buffer *buffer_take(struct fuse_export *fuse)
{
    struct fuse_buffer *buffer = fuse->unused;

    if (buffer) {
        fuse->unused = buffer->next;
        return buffer;
    }
    buffer = file_memory(sizeof(*buffer) + BUFFER_BYTES);
    if (buffer) {
        buffer->fuse = fuse;
    }
    return buffer;
}

static void buffer_give(struct fuse_buffer *buffer)
{
    buffer->next = buffer->fuse->unused;
    buffer->fuse->unused = buffer;
}

static void request_run(void *argument)
{
    struct fuse_buffer *buffer = argument;
    struct fuse_export *fuse = buffer->fuse;

    fuse_session_process_buf(fuse->session, &buffer->request);
    buffer_give(buffer);
    fuse->in_flight--;
    if (fuse->waiting) {
        fuse->waiting = false;
        coroutine_wake(fuse->receiver);
    }
}

/* Until fewer than so many requests are inside. */
static void coroutine_fn wait_for_fewer(struct fuse_export *fuse, unsigned count)
{
    while (fuse->in_flight >= count) {
        fuse->waiting = true;
        coroutine_yield();
    }
}

/* The receiver has ended; the control loop. */
static void end_run(void *argument)
{
    struct fuse_export *fuse = argument;
    struct export *export = fuse->export;
    struct connection *connection = fuse->connection;

    fuse->connection = NULL;
    connection_close(connection);
    if (!export->shutting_down) {
        exports_delete(export->exports, export->id, BLOCK_EXPORT_REMOVE_MODE_HARD, NULL);
    }
    export_unref(export);
}

static void receive_run(void *argument)
{
    struct fuse_export *fuse = argument;

    fuse->receiver = coroutine_self();
    while (!fuse_session_exited(fuse->session)) {
        struct fuse_buffer *buffer = buffer_take(fuse);
        if (!buffer) {
            break;
        }
        ssize_t received = connection_receive(fuse->connection, buffer->memory, BUFFER_BYTES);
        if (received == -ENOENT) { /* whoever asked has gone */
            buffer_give(buffer);
            continue;
        }
        if (received <= 0) {
            buffer_give(buffer);
            break;
        }
        buffer->request = (struct fuse_buf){.mem = buffer->memory, .size = (size_t)received};
        fuse->in_flight++;
        coroutine_enter(coroutine_create(request_run, buffer));
        wait_for_fewer(fuse, REQUESTS_MAX);
    }
    wait_for_fewer(fuse, 1);
    while (fuse->unused) {
        struct fuse_buffer *buffer = fuse->unused;
        fuse->unused = buffer->next;
        free(buffer);
    }
    connection_move(fuse->connection, fuse->export->exports->loop);
    loop_spawn(fuse->export->exports->loop, end_run, fuse);
}

/* --- mounting --- */

struct mounting {
    struct fuse_export *fuse;
    bool allow_other;
};

/* The worker pool. */
static int mount_work(void *argument)
{
    struct mounting *mounting = argument;
    struct fuse_export *fuse = mounting->fuse;
    g_autofree char *options = g_strdup_printf("fsname=interlock,subtype=interlock,default_permissions,max_read=%u%s",
                                               FUSE_TRANSFER_MAX, mounting->allow_other ? ",allow_other" : "");
    char *words[] = {(char *)"interlock", (char *)"-o", options};
    struct fuse_args args = FUSE_ARGS_INIT(G_N_ELEMENTS(words), words);

    fuse->session = fuse_session_new(&args, &fuse_export_operations, sizeof(fuse_export_operations), fuse);
    fuse_opt_free_args(&args);
    if (!fuse->session) {
        return -EINVAL;
    }
    if (fuse_session_mount(fuse->session, fuse->mountpoint) < 0) {
        fuse_session_destroy(fuse->session);
        fuse->session = NULL;
        return -EPERM;
    }
    fuse->mounted = true;
    return 0;
}

/* The worker pool. */
static int unmount_work(void *argument)
{
    struct fuse_export *fuse = argument;

    if (fuse->mounted) {
        fuse_session_unmount(fuse->session);
    }
    fuse_session_destroy(fuse->session);
    return 0;
}

static int coroutine_fn fuse_mount(struct fuse_export *fuse, enum fuse_export_allow_other allow_other,
                                   struct error **err)
{
    struct mounting mounting = {fuse, allow_other != FUSE_EXPORT_ALLOW_OTHER_OFF};
    int result = worker_run(mount_work, &mounting);

    if (result == -EPERM && allow_other == FUSE_EXPORT_ALLOW_OTHER_AUTO) {
        mounting.allow_other = false;
        result = worker_run(mount_work, &mounting);
    }
    if (result < 0) {
        error_set_errno(err, result, "Cannot mount export '%s' over '%s'", fuse->export->id, fuse->mountpoint);
        error_hint(err, "It takes /dev/fuse, and the right to mount there or the program fusermount3");
    }
    return result;
}

/* --- the type --- */

static int fuse_check(struct exports *exports, const struct block_export_options *options, struct error **err)
{
    const struct block_export_options_fuse *wanted = &options->u.fuse;

    if (wanted->growable && !options->writable) {
        return error_set(err, -EINVAL, "Export '%s' is to grow with its writes, but is not writable", options->id);
    }
    list_for_each (position, &exports->list) {
        struct export *export = container_of(position, struct export, link);
        struct fuse_export *fuse = export->type == &fuse_export_type ? export->state : NULL;
        if (fuse && strcmp(fuse->mountpoint, wanted->mountpoint) == 0) {
            return error_set(err, -EEXIST, "There is a FUSE export on '%s' already: '%s'", fuse->mountpoint,
                             export->id);
        }
    }
    return 0;
}

/* Only over a regular file: the file system has no other shape. */
static int coroutine_fn check_mountpoint(const char *path, struct error **err)
{
    struct file *file;
    struct file_info info;
    int result = file_open(path, 0, &file, err);

    if (result < 0) {
        if (result == -ENOTCONN) {
            error_hint(err, "A program that was killed has left its mount there: 'fusermount3 -uz %s' takes it away",
                       path);
        } else if (result == -EDEADLK) {
            error_hint(err, "It is where this daemon has a FUSE export already");
        }
        return result;
    }
    result = file_info(file, &info);
    file_close(file);
    if (result == 0 && info.is_block_device) {
        result = error_set(err, -EINVAL, "'%s' is not a regular file, so nothing can be mounted over it", path);
    }
    return result;
}

static void fuse_free(struct fuse_export *fuse)
{
    g_free(fuse->mountpoint);
    g_free(fuse);
}

static int coroutine_fn fuse_open_export(struct export *export, const struct block_export_options *options,
                                         struct error **err)
{
    const struct block_export_options_fuse *wanted = &options->u.fuse;
    struct fuse_export *fuse = g_new0(struct fuse_export, 1);

    fuse->export = export;
    fuse->mountpoint = g_strdup(wanted->mountpoint);
    fuse->growable = wanted->growable;
    int result = check_mountpoint(fuse->mountpoint, err);
    if (result == 0) {
        result = fuse_mount(fuse, wanted->allow_other, err);
    }
    int descriptor = result == 0 ? fcntl(fuse_session_fd(fuse->session), F_DUPFD_CLOEXEC, 3) : -1;
    if (result == 0 && descriptor < 0) {
        result = error_set_errno(err, -errno, "Cannot serve export '%s'", export->id);
        worker_run(unmount_work, fuse);
    }
    if (result < 0) {
        fuse_free(fuse);
        return result;
    }
    int64_t now_us = loop_realtime_us();
    struct timespec now = {now_us / 1000000, now_us % 1000000 * 1000};
    fuse->status = (struct stat){.st_mode = S_IFREG | S_IRUSR | (export->writable ? S_IWUSR : 0),
                                 .st_uid = getuid(),
                                 .st_gid = getgid(),
                                 .st_atim = now,
                                 .st_mtim = now,
                                 .st_ctim = now};
    fuse->connection = connection_from_fds(descriptor, descriptor);
    export->state = fuse;
    export_ref(export);
    connection_move(fuse->connection, export->loop);
    loop_spawn(export->loop, receive_run, fuse);
    return 0;
}

static void fuse_disconnect(struct export *export)
{
    struct fuse_export *fuse = export->state;

    if (fuse->connection) {
        connection_shutdown(fuse->connection);
    }
}

static void coroutine_fn fuse_close(struct export *export)
{
    struct fuse_export *fuse = export->state;

    worker_run(unmount_work, fuse);
    fuse_free(fuse);
}

const struct export_type fuse_export_type = {
    .name = "fuse",
    .id = BLOCK_EXPORT_TYPE_FUSE,
    .check = fuse_check,
    .open = fuse_open_export,
    .disconnect = fuse_disconnect,
    .close = fuse_close,
};
