/* SPDX-License-Identifier: LGPL-2.1-or-later */
#ifndef INTERLOCK_CONTROL_JSON_STREAM_H
#define INTERLOCK_CONTROL_JSON_STREAM_H

#include "base/error.h"
#include <jansson.h>
#include <stddef.h>

/*
 * JSON values out of a stream of bytes that arrives in arbitrary pieces. Single-quoted strings are understood as well.
 * No loop, no thread: a plain object.
 */
struct json_stream;

#define JSON_STREAM_MAX_BYTES ((size_t)4 << 20) /* of one value */
#define JSON_STREAM_MAX_DEPTH 128               /* of nesting: what comes out is walked by recursion */

enum json_stream_result {
    JSON_STREAM_MORE,  /* everything that was fed is used up */
    JSON_STREAM_VALUE, /* *ret is a new reference */
    JSON_STREAM_ERROR, /* something was wrong and has been skipped; the stream goes on */
};

struct json_stream *json_stream_create(void);
void json_stream_destroy(struct json_stream *stream); /* accepts NULL */
/* Hands over bytes, which are borrowed until json_stream_next() has said MORE. */
void json_stream_feed(struct json_stream *stream, const char *bytes, size_t size);
enum json_stream_result json_stream_next(struct json_stream *stream, json_t **ret, struct error **err);

#endif
