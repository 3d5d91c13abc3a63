/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CODEC_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CODEC_H

#include "driver/format/qcow2_format.h"
#include "loop/coroutine.h"
#include <stddef.h>
#include <stdint.h>

/*
 * Packing and unpacking one cluster, zlib or zstd. A codec has the memory and the state that one of them takes; a pool
 * has as many as may work at a time, made as they are wanted.
 */
struct qcow2_codecs;
struct qcow2_codec;

struct qcow2_codecs *qcow2_codecs_create(enum qcow2_compression type, size_t cluster_size);
void qcow2_codecs_destroy(struct qcow2_codecs *codecs); /* none is taken; accepts NULL */
/* Most codecs that are taken at one time. */
unsigned qcow2_codecs_limit(const struct qcow2_codecs *codecs);
/* Waits for one; NULL: no memory. Who has one waits for nobody who might wait for one: not for an allocation in flight
 * (qcow2.h). `key`: one whose cluster is kept under this key is preferred, 0: any. Any loop. What it
 * keeps is what `key` says, or nothing. */
struct qcow2_codec *coroutine_fn qcow2_codec_take(struct qcow2_codecs *codecs, uint64_t key);
void coroutine_fn qcow2_codec_give(struct qcow2_codecs *codecs, struct qcow2_codec *codec); /* accepts NULL */

/* Room for the longest compressed cluster that an L2 entry can describe; and for a cluster. */
uint8_t *qcow2_codec_packed(struct qcow2_codec *codec);
size_t qcow2_codec_packed_max(const struct qcow2_codec *codec);
uint8_t *qcow2_codec_cluster(struct qcow2_codec *codec);

/* The memory for a cluster can be kept for who takes the codec next: under a key of the user's, 0 for nothing. */
uint64_t qcow2_codec_kept(const struct qcow2_codec *codec);
void qcow2_codec_keep(struct qcow2_codec *codec, uint64_t key);
/* What is kept under `key` (0: under any), in codecs that are not taken, is not valid any more. */
void coroutine_fn qcow2_codecs_forget(struct qcow2_codecs *codecs, uint64_t key);

/* On the worker pool. From `cluster` (any memory) into the codec's packed memory: *ret_bytes, less than a cluster's;
 * -ENOSPC if that is impossible. */
int coroutine_fn qcow2_codec_pack(struct qcow2_codec *codec, const uint8_t *cluster, size_t *ret_bytes);
/* On the worker pool. From the first `bytes` of the codec's packed memory, of which the end is not part of the stream,
 * into `cluster`. -EIO if that does not yield a whole cluster. */
int coroutine_fn qcow2_codec_unpack(struct qcow2_codec *codec, size_t bytes, uint8_t *cluster);

#endif
