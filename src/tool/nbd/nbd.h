/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TOOL_NBD_NBD_H
#define INTERLOCK_TOOL_NBD_NBD_H

#include "base/error.h"
#include "tool/image_open.h"
#include <glib.h>
#include <stdbool.h>
#include <stdint.h>

/*
 * `interlock nbd`, with the command line of qemu-nbd 10.0: one image served to NBD clients, or the list of what a
 * server serves. nbd.c reads the options, serve.c serves, list.c lists.
 */
struct nbd_options {
    const char *program; /* as errors call it */
    /* where */
    const char *host, *port, *socket; /* socket NULL: TCP */
    bool port_given, host_given;
    unsigned inherited; /* descriptors that the service manager passed */
    /* how */
    unsigned shared; /* clients at once; 0: any number */
    bool persistent, fork, verbose;
    const char *pidfile;
    unsigned handshake_seconds;
    const char *export_name, *description;
    GPtrArray *objects; /* char *: what --object says */
    const char *tls_creds, *tls_authz, *tls_hostname;
    /* what */
    struct image_name image;
    bool read_only, snapshot, writethrough, allocation_depth;
    const char *load_snapshot, *bitmap;
    uint64_t offset;
    bool list, per_device; /* an option was given that has no meaning for a list */
};

/* Serves until it is told to end, or the last client has gone. The exit status. */
int nbd_serve(const struct nbd_options *options);
/* --list. The exit status. */
int nbd_list(const struct nbd_options *options);

#endif
