/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_DRIVER_FORMAT_QCOW2_CRYPTO_H
#define INTERLOCK_DRIVER_FORMAT_QCOW2_CRYPTO_H

#include "base/buffers.h"
#include "base/error.h"
#include "loop/coroutine.h"
#include "schema/types.h"
#include <stdint.h>

/*
 * Encryption of qcow2 images: the old one with AES, and LUKS. image->crypto is NULL for images that are not encrypted.
 * Specification: "Data encryption", "Full disk encryption header pointer".
 */
struct edge;
struct image_amendment;
struct qcow2;
struct qcow2_crypto;

/* Sets image->crypto as header and options say. Without a key only if node->no_data or node->check_only; then data are
 * refused with -EACCES. The header has been read. */
int coroutine_fn qcow2_crypto_open(struct qcow2 *image, const struct blockdev_qcow2_encryption *options,
                                   struct error **err);
void qcow2_crypto_close(struct qcow2_crypto *crypto); /* accepts NULL */

/* As qcow2_data_read() and qcow2_data_write(), of an encrypted image. */
int coroutine_fn qcow2_crypto_read(const struct qcow2_crypto *crypto, struct edge *edge, uint64_t host, uint64_t guest,
                                   uint64_t bytes, struct buffers to);
int coroutine_fn qcow2_crypto_write(const struct qcow2_crypto *crypto, struct edge *edge, uint64_t host, uint64_t guest,
                                    uint64_t bytes, struct buffers from);

/* For clusters that move, or that no guest wrote: -EACCES without a key, -ENOTSUP where one cluster cannot serve any
 * guest offset (AES). `data` were read from host offset `from` and become what is to stand at `to`. */
int coroutine_fn qcow2_crypto_moved(const struct qcow2_crypto *crypto, uint64_t from, uint64_t to, void *data,
                                    uint64_t bytes);
/* Zeroes for whichever guest clusters. */
int coroutine_fn qcow2_crypto_write_zeroes(const struct qcow2_crypto *crypto, struct edge *edge, uint64_t host,
                                           uint64_t bytes);

/* New; of an encrypted image. */
struct image_info_specific_qcow2_encryption *qcow2_crypto_describe(const struct qcow2_crypto *crypto);
/* The part of image_driver.amend that is amendment->keys, which is not NULL. */
int coroutine_fn qcow2_crypto_amend(struct qcow2 *image, const struct image_amendment *amendment, struct error **err);

/* For creation. Bytes that the encryption header takes: 0 without one. Checks the options, and that the secret is there
 * if `with_key`. `options` may be NULL. */
int qcow2_crypto_new_bytes(const struct crypto_create_options *options, bool with_key, uint64_t *ret,
                           struct error **err);
/* Writes that header. */
int coroutine_fn qcow2_crypto_create(struct edge *file, uint64_t offset, const struct crypto_create_options *options,
                                     struct error **err);

#endif
