/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The one way to the bytes of standard clusters. It knows in which file they are, whether they are encrypted, and
 * nothing of how they are mapped: whoever calls it has looked that up, and holds the place by an epoch or an allocation
 * in flight (qcow2.h).
 */
#include "driver/format/qcow2_data.h"
#include "block/request.h"
#include "driver/format/qcow2.h"
#include "driver/format/qcow2_crypto.h"
#include <errno.h>

int coroutine_fn qcow2_data_read(struct qcow2 *image, uint64_t host, uint64_t guest, uint64_t bytes, struct buffers to)
{
    struct edge *edge = qcow2_data_edge(image);
    if (edge && image->crypto) {
        if (buffers_elsewhere(to)) {
            return -ENOTSUP;
        }
        return qcow2_crypto_read(image->crypto, edge, host, guest, bytes, to);
    }
    return edge ? edge_read(edge, host, bytes, to, 0) : -ENOMEDIUM;
}

int coroutine_fn qcow2_data_write(struct qcow2 *image, uint64_t host, uint64_t guest, uint64_t bytes,
                                  struct buffers from)
{
    struct edge *edge = qcow2_data_edge(image);
    if (edge && image->crypto) {
        if (buffers_elsewhere(from)) {
            return -ENOTSUP;
        }
        return qcow2_crypto_write(image->crypto, edge, host, guest, bytes, from);
    }
    return edge ? edge_write(edge, host, bytes, from, 0) : -ENOMEDIUM;
}
