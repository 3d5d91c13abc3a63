/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_EXPORT_FUSE_FUSE_EXPORT_H
#define INTERLOCK_EXPORT_FUSE_FUSE_EXPORT_H

#include "export/export_type.h"
#include "loop/loop.h"
#include <sys/stat.h>

/*
 * A FUSE export: a node's content as a regular file, mounted over a regular file. fuse_export.c has its life,
 * fuse_request.c what the kernel asks. The protocol is libfuse 3's low-level interface (fuse_lowlevel.h).
 */
struct connection;
struct fuse_buffer;
struct fuse_session;

/* The longest read or write that the kernel is told to ask for; bytes. */
#define FUSE_TRANSFER_MAX (1024U * 1024)

struct fuse_export {
    struct export *export;
    char *mountpoint;
    bool growable; /* a write behind the end makes the file longer */
    struct fuse_session *session;
    bool mounted;
    struct connection *connection; /* over the session's descriptor; on the export's loop once that runs */
    struct stat status;            /* what stat() shows, but for the size: owner, mode, times */
    unsigned in_flight;            /* requests inside; the export's loop, like all that follows */
    bool waiting;                  /* the receiver sleeps until one of them is done */
    struct coroutine *receiver;
    struct fuse_buffer *unused;
};

/* What the kernel asks for: handlers for fuse_session_new(), whose userdata is the struct fuse_export. They run in
 * coroutines on the export's loop. */
struct fuse_lowlevel_ops;
extern const struct fuse_lowlevel_ops fuse_export_operations;

#endif
