/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Guest data on their way through a cipher, for every format that encrypts.
 *
 * 1. What a guest writes is encrypted in a copy: its memory is never changed, and what it changes meanwhile does not
 *    matter.
 * 2. What it reads is decrypted where it is to be, if that is whole sectors in one piece, else in a copy.
 *
 * Long requests go chunk by chunk, so that the copy stays small; each chunk is computed by several cores
 * (sector_cipher_run()).
 */
#include "driver/format/cipher_edge.h"
#include "base/size.h"
#include "block/request.h"
#include "loop/file.h"
#include <errno.h>
#include <glib.h>
#include <stdlib.h>
#include <string.h>

enum { CHUNK = 1 << 20 };

static int coroutine_fn read_chunk(struct edge *edge, const struct sector_cipher *cipher, uint64_t offset,
                                   uint64_t sector, uint64_t bytes, struct buffers to)
{
    uint64_t whole = align_up(bytes, CIPHER_SECTOR);
    void *in_place = whole == bytes ? buffers_contiguous(to, bytes) : NULL;
    void *copy = in_place ? NULL : file_memory(whole);
    void *data = in_place ? in_place : copy;
    if (!data) {
        return -ENOMEM;
    }
    int code = edge_read_memory(edge, offset, data, whole);
    if (code == 0) {
        sector_cipher_run(cipher, false, sector, data, whole);
        if (copy) {
            buffers_copy_in(to, copy, bytes);
        }
    }
    free(copy);
    return code;
}

int coroutine_fn cipher_edge_read(struct edge *edge, const struct sector_cipher *cipher, uint64_t offset,
                                  uint64_t sector, uint64_t bytes, struct buffers to)
{
    while (bytes) {
        uint64_t part = min_u64(bytes, CHUNK);
        int code = read_chunk(edge, cipher, offset, sector, part, to);
        if (code < 0) {
            return code;
        }
        offset += part;
        sector += part / CIPHER_SECTOR;
        bytes -= part;
        if (bytes) {
            to = buffers_advance(to, part);
        }
    }
    return 0;
}

int coroutine_fn cipher_edge_write(struct edge *edge, const struct sector_cipher *cipher, uint64_t offset,
                                   uint64_t sector, uint64_t bytes, struct buffers from, unsigned flags)
{
    uint8_t *copy = file_memory(min_u64(align_up(bytes, CIPHER_SECTOR), CHUNK));
    int code = copy ? 0 : -ENOMEM;
    while (code == 0 && bytes) {
        uint64_t part = min_u64(bytes, CHUNK), whole = align_up(part, CIPHER_SECTOR);
        buffers_copy_out(from, copy, part);
        memset(copy + part, 0, whole - part);
        sector_cipher_run(cipher, true, sector, copy, whole);
        code = edge_write_memory(edge, offset, copy, whole, flags);
        offset += part;
        sector += part / CIPHER_SECTOR;
        bytes -= part;
        if (bytes) {
            from = buffers_advance(from, part);
        }
    }
    free(copy);
    return code;
}
