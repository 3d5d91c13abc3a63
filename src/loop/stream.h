/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_LOOP_STREAM_H
#define INTERLOCK_LOOP_STREAM_H

#include "loop/connection.h"

/*
 * For who implements connections: the engines, and layers over another connection (crypto/tls.h). connection.h is for
 * who uses them. What the members promise is what connection.h says of the functions of their names.
 */
/* Stream sockets. `struct connection` and `struct listener` are what the implementation embeds first. */
struct stream_ops {
    int (*listen)(const struct address *address, struct listener **ret, struct error **err);
    int (*accept)(struct listener *listener, struct connection **ret);
    void (*listener_shutdown)(struct listener *listener); /* any thread */
    void (*listener_close)(struct listener *listener);
    char *(*listener_address)(struct listener *listener);
    int (*connect)(const struct address *address, struct connecting *connecting, struct connection **ret,
                   struct error **err);
    struct connection *(*adopt)(int input, int output);
    /* Waits until `minimum` (at least 1) bytes came, or fewer at the end of the stream; may return fewer anyway. */
    ssize_t (*receive)(struct connection *connection, void *to, size_t minimum, size_t maximum);
    /* Sends at least one byte of the vector; returns how many. */
    ssize_t (*send)(struct connection *connection, const struct iovec *iov, unsigned count);
    /* The same without waiting: -EAGAIN when nothing can be sent now. NULL: -ENOTSUP. */
    ssize_t (*send_now)(struct connection *connection, const struct iovec *iov, unsigned count);
    /* Both may be NULL: no descriptors. At least one byte, with what came with the first one; 0 at the end. */
    ssize_t (*receive_fds)(struct connection *connection, void *to, size_t bytes, int *fds, unsigned max,
                           unsigned *ret_count);
    ssize_t (*send_fd)(struct connection *connection, const void *from, size_t bytes, int fd);
    void (*shutdown)(struct connection *connection); /* any thread */
    void (*close)(struct connection *connection);
    void (*move)(struct connection *connection, struct loop *to);
    int (*fd)(struct connection *connection);
    char *(*peer)(struct connection *connection);
};
struct connection {
    const struct stream_ops *ops;
};
struct listener {
    const struct stream_ops *ops;
};

#endif
