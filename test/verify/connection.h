/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_TEST_VERIFY_CONNECTION_H
#define INTERLOCK_TEST_VERIFY_CONNECTION_H

#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

/*
 * An NBD client connection to a unix socket, fixed newstyle (NBD proto.md): many requests under way, sent and received
 * without ever blocking in one direction while the other is full.
 */
enum nbd_command { NBD_READ = 0, NBD_WRITE = 1, NBD_DISCONNECT = 2, NBD_FLUSH = 3, NBD_TRIM = 4, NBD_WRITE_ZEROES = 6 };
enum nbd_command_flag { NBD_FUA = 1 << 0, NBD_NO_HOLE = 1 << 1 };
enum nbd_export_flag {
    NBD_READ_ONLY = 1 << 1,
    NBD_SEND_FLUSH = 1 << 2,
    NBD_SEND_FUA = 1 << 3,
    NBD_SEND_TRIM = 1 << 5,
    NBD_SEND_WRITE_ZEROES = 1 << 6
};

struct connection;

/* Connects and negotiates; NULL and a message on stderr if the server refuses or is not there. */
struct connection *connection_open(const char *socket_path, const char *export, bool structured);
/* With a clean NBD_CMD_DISC, or by closing the socket with whatever is under way. */
void connection_close(struct connection *connection, bool clean);
uint64_t connection_size(const struct connection *connection);
unsigned connection_flags(const struct connection *connection); /* enum nbd_export_flag */

/* Queues a request. `data` is sent (write) or filled (read, before its reply is given out) and stays the caller's. */
void connection_send(struct connection *connection, unsigned command, unsigned flags, uint64_t cookie, uint64_t offset,
                     uint32_t length, void *data);
/* Gives out the next reply: 1 and its cookie and error (an NBD errno, 0 for success); 0 when none came in
 * timeout_ms; -1 when the server has closed the connection. `find` gives the buffer and length of a read under way. */
struct connection_read {
    uint8_t *data;
    uint64_t offset;
    uint32_t length;
};
int connection_receive(struct connection *connection, int timeout_ms, uint64_t *ret_cookie, uint32_t *ret_error,
                       bool (*find)(void *argument, uint64_t cookie, struct connection_read *ret), void *argument);

#endif
