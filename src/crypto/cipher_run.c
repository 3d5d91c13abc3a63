/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Sectors through a cipher from a coroutine. A short request is computed where it is; one that would hold up the loop
 * for longer than a trip to another thread takes goes to the worker pool, a long one in several pieces at the same
 * time, each in a coroutine of its own that ends before the request does.
 */
#include "base/size.h"
#include "crypto/cipher.h"
#include "crypto/cipher_private.h"
#include "loop/loop.h"
#include "loop/sync.h"
#include "loop/worker.h"
#include <glib.h>

/* Bytes that are computed at once, and pieces of longer ones: some 30 and 60 microseconds for either kind. */
enum { FAST_INLINE = 64 << 10, SLOW_INLINE = 4 << 10, FAST_PIECE = 128 << 10, SLOW_PIECE = 16 << 10, PIECES_MAX = 8 };

struct piece {
    const struct sector_cipher *cipher;
    bool encrypt;
    uint64_t sector;
    uint8_t *data;
    size_t bytes;
    struct co_group *others; /* NULL: the request's own coroutine has it */
};

static int piece_work(void *argument)
{
    const struct piece *piece = argument;
    if (piece->encrypt) {
        sector_cipher_encrypt(piece->cipher, piece->sector, piece->data, piece->bytes);
    } else {
        sector_cipher_decrypt(piece->cipher, piece->sector, piece->data, piece->bytes);
    }
    return 0;
}

static void coroutine_fn piece_entry(void *argument)
{
    struct piece *piece = argument;
    worker_run(piece_work, piece);
    co_group_leave(piece->others);
}

void coroutine_fn sector_cipher_run(const struct sector_cipher *cipher, bool encrypt, uint64_t sector, void *data,
                                    size_t bytes)
{
    bool fast = sector_cipher_is_fast(cipher);
    struct piece all = {cipher, encrypt, sector, data, bytes, NULL};
    if (bytes <= (fast ? FAST_INLINE : SLOW_INLINE)) {
        piece_work(&all);
        return;
    }
    struct piece pieces[PIECES_MAX];
    struct co_group others;
    unsigned count = MIN(div_up(bytes, fast ? FAST_PIECE : SLOW_PIECE), PIECES_MAX);
    size_t each = align_up(div_up(bytes, count), CIPHER_SECTOR), at = 0;
    co_group_init(&others);
    for (unsigned i = 0; i < count && at < bytes; i++, at += each) {
        bool last = at + each >= bytes;
        pieces[i] = (struct piece){cipher,
                                   encrypt,
                                   sector + at / CIPHER_SECTOR,
                                   (uint8_t *)data + at,
                                   MIN(each, bytes - at),
                                   last ? NULL : &others};
        if (last) {
            worker_run(piece_work, &pieces[i]);
        } else {
            co_group_enter(&others);
            coroutine_enter(coroutine_create(piece_entry, &pieces[i]));
        }
    }
    co_group_wait(&others);
    co_group_destroy(&others);
}
