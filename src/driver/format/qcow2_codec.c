/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Packs and unpacks clusters. Deflate streams are raw, with a window of 4 KiB when packing (qcow2_deflate.c), which is
 * what readers are known to have; unpacking takes any window. zstd streams are frames with the library's default level.
 *
 * 1. A codec is used by one coroutine at a time, and by one worker at a time: whoever took it.
 * 2. No more than `limit` are taken at a time, so that memory is bounded however many requests there are. They wait in
 *    order.
 * 3. What was made once is kept for the next: in use, a cluster costs no allocation and no initialization.
 * 4. A codec that is taken keeps nothing but what it was taken for: what is not valid any more needs to be looked for
 *    among the idle ones only.
 *
 * A stream says itself where it ends, and what stands behind it is not looked at. libdeflate is the fast way to
 * inflate; what it refuses (streams without an end, which have been written by others) is left to zlib to decide.
 */
#include "driver/format/qcow2_codec.h"
#include "base/size.h"
#include "driver/format/qcow2_deflate.h"
#include "loop/sync.h"
#include "loop/worker.h"
#include <errno.h>
#include <glib.h>
#include <libdeflate.h>
#include <zlib.h>
#include <zstd.h>
#include <zstd_errors.h>

enum { CODECS_MAX = 16, CODECS_MIN = 2 };
#define CODECS_BYTES (32 * MiB)

struct qcow2_codec {
    struct list link; /* codecs->idle */
    enum qcow2_compression type;
    size_t cluster_size;
    uint8_t *packed, *cluster;
    uint64_t kept; /* what is in `cluster` */
    struct qcow2_deflate *deflate;
    struct libdeflate_decompressor *inflate;
    ZSTD_CCtx *zstd_pack;
    ZSTD_DCtx *zstd_unpack;
    /* Of the work in hand. */
    const uint8_t *from;
    uint8_t *to;
    size_t from_bytes, packed_bytes;
};

struct qcow2_codecs {
    enum qcow2_compression type;
    size_t cluster_size;
    unsigned limit;
    struct co_mutex lock;
    struct co_queue waiters;
    struct list idle;
    unsigned taken;
};

/* --- the pool --- */

struct qcow2_codecs *qcow2_codecs_create(enum qcow2_compression type, size_t cluster_size)
{
    struct qcow2_codecs *codecs = g_new0(struct qcow2_codecs, 1);
    codecs->type = type;
    codecs->cluster_size = cluster_size;
    codecs->limit = MIN(MAX(CODECS_BYTES / (3 * cluster_size), CODECS_MIN), CODECS_MAX);
    co_mutex_init(&codecs->lock);
    co_queue_init(&codecs->waiters);
    list_init(&codecs->idle);
    return codecs;
}

static void codec_destroy(struct qcow2_codec *codec)
{
    qcow2_deflate_destroy(codec->deflate);
    if (codec->inflate) {
        libdeflate_free_decompressor(codec->inflate);
    }
    ZSTD_freeCCtx(codec->zstd_pack);
    ZSTD_freeDCtx(codec->zstd_unpack);
    g_free(codec->packed);
    g_free(codec->cluster);
    g_free(codec);
}

void qcow2_codecs_destroy(struct qcow2_codecs *codecs)
{
    if (!codecs) {
        return;
    }
    g_assert(codecs->taken == 0);
    list_for_each_safe (link, &codecs->idle) {
        list_remove(link);
        codec_destroy(container_of(link, struct qcow2_codec, link));
    }
    co_mutex_destroy(&codecs->lock);
    g_free(codecs);
}

unsigned qcow2_codecs_limit(const struct qcow2_codecs *codecs)
{
    return codecs->limit;
}

static struct qcow2_codec *codec_create(const struct qcow2_codecs *codecs)
{
    struct qcow2_codec *codec = g_new0(struct qcow2_codec, 1);
    codec->type = codecs->type;
    codec->cluster_size = codecs->cluster_size;
    codec->packed = g_try_malloc(qcow2_codec_packed_max(codec));
    codec->cluster = g_try_malloc(codecs->cluster_size);
    if (!codec->packed || !codec->cluster) {
        codec_destroy(codec);
        return NULL;
    }
    return codec;
}

/* The idle one that keeps `key`; else, of those that keep nothing, the one used last, whose memory is in the
 * processor's cache; else the one used longest ago. */
static struct qcow2_codec *choose_idle(struct qcow2_codecs *codecs, uint64_t key)
{
    struct list *chosen = codecs->idle.next;
    list_for_each (link, &codecs->idle) {
        uint64_t kept = container_of(link, struct qcow2_codec, link)->kept;
        if (kept == 0) {
            chosen = link;
        } else if (kept == key) {
            chosen = link;
            break;
        }
    }
    struct qcow2_codec *codec = container_of(chosen, struct qcow2_codec, link);
    list_remove(chosen);
    codec->kept = codec->kept == key ? key : 0; /* see 4. */
    return codec;
}

struct qcow2_codec *coroutine_fn qcow2_codec_take(struct qcow2_codecs *codecs, uint64_t key)
{
    struct qcow2_codec *codec = NULL;
    co_mutex_lock(&codecs->lock);
    while (codecs->taken == codecs->limit) {
        co_queue_wait(&codecs->waiters, &codecs->lock);
    }
    if (!list_is_empty(&codecs->idle)) {
        codec = choose_idle(codecs, key);
    } else {
        codec = codec_create(codecs);
    }
    codecs->taken += codec != NULL;
    co_mutex_unlock(&codecs->lock);
    return codec;
}

void coroutine_fn qcow2_codec_give(struct qcow2_codecs *codecs, struct qcow2_codec *codec)
{
    if (!codec) {
        return;
    }
    co_mutex_lock(&codecs->lock);
    list_append(&codecs->idle, &codec->link);
    codecs->taken--;
    co_queue_wake_one(&codecs->waiters);
    co_mutex_unlock(&codecs->lock);
}

uint8_t *qcow2_codec_packed(struct qcow2_codec *codec)
{
    return codec->packed;
}

size_t qcow2_codec_packed_max(const struct qcow2_codec *codec)
{
    return 2 * codec->cluster_size + QCOW2_SECTOR;
}

uint8_t *qcow2_codec_cluster(struct qcow2_codec *codec)
{
    return codec->cluster;
}

uint64_t qcow2_codec_kept(const struct qcow2_codec *codec)
{
    return codec->kept;
}

void qcow2_codec_keep(struct qcow2_codec *codec, uint64_t key)
{
    codec->kept = key;
}

void coroutine_fn qcow2_codecs_forget(struct qcow2_codecs *codecs, uint64_t key)
{
    co_mutex_lock(&codecs->lock);
    list_for_each (link, &codecs->idle) {
        struct qcow2_codec *codec = container_of(link, struct qcow2_codec, link);
        if (key == 0 || codec->kept == key) {
            codec->kept = 0;
        }
    }
    co_mutex_unlock(&codecs->lock);
}

/* --- packing, on a worker --- */

static int pack_deflate(struct qcow2_codec *codec)
{
    if (!codec->deflate) {
        codec->deflate = qcow2_deflate_create();
        if (!codec->deflate) {
            return -ENOMEM;
        }
    }
    codec->packed_bytes =
        qcow2_deflate_pack(codec->deflate, codec->from, codec->cluster_size, codec->packed, codec->cluster_size - 1);
    return codec->packed_bytes ? 0 : -ENOSPC;
}

static int pack_zstd(struct qcow2_codec *codec)
{
    if (!codec->zstd_pack) {
        codec->zstd_pack = ZSTD_createCCtx();
        if (!codec->zstd_pack) {
            return -ENOMEM;
        }
    }
    size_t bytes =
        ZSTD_compress2(codec->zstd_pack, codec->packed, codec->cluster_size - 1, codec->from, codec->cluster_size);
    if (ZSTD_isError(bytes)) {
        ZSTD_ErrorCode code = ZSTD_getErrorCode(bytes);
        return code == ZSTD_error_dstSize_tooSmall ? -ENOSPC : code == ZSTD_error_memory_allocation ? -ENOMEM : -EIO;
    }
    codec->packed_bytes = bytes;
    return 0;
}

static int pack_work(void *argument)
{
    struct qcow2_codec *codec = argument;
    return codec->type == QCOW2_COMPRESSION_ZSTD ? pack_zstd(codec) : pack_deflate(codec);
}

int coroutine_fn qcow2_codec_pack(struct qcow2_codec *codec, const uint8_t *cluster, size_t *ret_bytes)
{
    codec->from = cluster;
    int code = worker_run(pack_work, codec);
    *ret_bytes = codec->packed_bytes;
    return code;
}

/* --- unpacking, on a worker --- */

/* Decides on what libdeflate does not take: a cluster that is there in full is good, whatever stands behind it. */
static int inflate_by_zlib(const struct qcow2_codec *codec)
{
    z_stream stream = {
        .next_in = codec->packed,
        .avail_in = codec->from_bytes,
        .next_out = codec->to,
        .avail_out = codec->cluster_size,
    };
    if (inflateInit2(&stream, -MAX_WBITS) != Z_OK) {
        return -ENOMEM;
    }
    int code = inflate(&stream, Z_FINISH);
    bool whole = stream.avail_out == 0 && (code == Z_STREAM_END || code == Z_BUF_ERROR || code == Z_OK);
    inflateEnd(&stream);
    return whole ? 0 : -EIO;
}

static int unpack_deflate(struct qcow2_codec *codec)
{
    size_t taken = 0;
    if (!codec->inflate) {
        codec->inflate = libdeflate_alloc_decompressor();
        if (!codec->inflate) {
            return -ENOMEM;
        }
    }
    enum libdeflate_result result = libdeflate_deflate_decompress_ex(codec->inflate, codec->packed, codec->from_bytes,
                                                                     codec->to, codec->cluster_size, &taken, NULL);
    return result == LIBDEFLATE_SUCCESS ? 0 : inflate_by_zlib(codec);
}

static int unpack_zstd(struct qcow2_codec *codec)
{
    if (!codec->zstd_unpack) {
        codec->zstd_unpack = ZSTD_createDCtx();
        if (!codec->zstd_unpack) {
            return -ENOMEM;
        }
    }
    /* One frame with its size, as it should be, goes the short way. */
    size_t frame = ZSTD_findFrameCompressedSize(codec->packed, codec->from_bytes);
    if (!ZSTD_isError(frame) && ZSTD_getFrameContentSize(codec->packed, codec->from_bytes) == codec->cluster_size) {
        size_t bytes = ZSTD_decompressDCtx(codec->zstd_unpack, codec->to, codec->cluster_size, codec->packed, frame);
        return bytes == codec->cluster_size ? 0 : -EIO;
    }
    ZSTD_inBuffer from = {codec->packed, codec->from_bytes, 0};
    ZSTD_outBuffer to = {codec->to, codec->cluster_size, 0};
    ZSTD_DCtx_reset(codec->zstd_unpack, ZSTD_reset_session_only);
    while (to.pos < to.size) {
        size_t before = from.pos + to.pos;
        size_t left = ZSTD_decompressStream(codec->zstd_unpack, &to, &from);
        if (ZSTD_isError(left) || from.pos + to.pos == before) {
            return -EIO;
        }
    }
    return 0;
}

static int unpack_work(void *argument)
{
    struct qcow2_codec *codec = argument;
    return codec->type == QCOW2_COMPRESSION_ZSTD ? unpack_zstd(codec) : unpack_deflate(codec);
}

int coroutine_fn qcow2_codec_unpack(struct qcow2_codec *codec, size_t bytes, uint8_t *cluster)
{
    g_assert(bytes <= qcow2_codec_packed_max(codec));
    codec->from_bytes = bytes;
    codec->to = cluster;
    return worker_run(unpack_work, codec);
}
