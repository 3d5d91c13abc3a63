/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Finds where JSON values begin and end in a stream of bytes, and has jansson parse each.
 *
 * The scanner knows strings, brackets and bare words; all other rules of JSON are left to jansson, which sees a value
 * only when it is complete. Invariants:
 * 1. What is kept of the stream is the value that has begun, never more than JSON_STREAM_MAX_BYTES.
 * 2. A value that is too long or too deep is followed to its end without being kept, and is one error.
 * 3. An error inside a value (a line break inside a string, a byte 0xFF) drops that value; the next byte begins afresh.
 *    So a client that is lost finds its way back with 0xFF or a line break.
 * 4. Single-quoted strings become double-quoted ones on the way, since many scripts use them.
 */
#include "control/json_stream.h"

#include <errno.h>
#include <glib.h>
#include <stdbool.h>
#include <string.h>

enum state {
    BETWEEN, /* outside of any value, or between the tokens of one */
    STRING,
    ESCAPE, /* behind a backslash in a string */
    WORD,   /* a number or keyword outside of any bracket */
};

struct json_stream {
    GString *value; /* what there is of the current value */
    enum state state;
    char quote;
    size_t depth;
    const char *refused; /* why the current value is followed but not kept, or NULL */
    const char *input;   /* fed, not used yet */
    size_t input_size;
};

struct json_stream *json_stream_create(void)
{
    struct json_stream *stream = g_new0(struct json_stream, 1);
    stream->value = g_string_new(NULL);
    return stream;
}

void json_stream_destroy(struct json_stream *stream)
{
    if (stream) {
        g_string_free(stream->value, TRUE);
        g_free(stream);
    }
}

void json_stream_feed(struct json_stream *stream, const char *bytes, size_t size)
{
    g_assert(stream->input_size == 0);
    stream->input = bytes;
    stream->input_size = size;
}

static void reset(struct json_stream *stream)
{
    if (stream->value->allocated_len > 65536) {
        g_string_free(stream->value, TRUE);
        stream->value = g_string_new(NULL);
    }
    g_string_truncate(stream->value, 0);
    stream->state = BETWEEN;
    stream->depth = 0;
    stream->refused = NULL;
}

static void refuse(struct json_stream *stream, const char *why)
{
    if (!stream->refused) {
        stream->refused = why;
        g_string_truncate(stream->value, 0);
    }
}

static void keep(struct json_stream *stream, const char *bytes, size_t size)
{
    if (!stream->refused && stream->value->len + size > JSON_STREAM_MAX_BYTES) {
        refuse(stream, "the value is longer than 4 MiB");
    }
    if (!stream->refused) {
        g_string_append_len(stream->value, bytes, (gssize)size);
    }
}

static enum json_stream_result fail(struct json_stream *stream, struct error **err, const char *why)
{
    reset(stream);
    error_set(err, -EINVAL, "JSON parse error: %s", why);
    return JSON_STREAM_ERROR;
}

/* The current value is complete. */
static enum json_stream_result finish(struct json_stream *stream, json_t **ret, struct error **err)
{
    if (stream->refused) {
        return fail(stream, err, stream->refused);
    }
    json_error_t error;
    json_t *json = json_loadb(stream->value->str, stream->value->len, JSON_DECODE_ANY | JSON_REJECT_DUPLICATES, &error);
    if (!json) {
        g_autofree char *text = g_utf8_make_valid(error.text, -1);
        return fail(stream, err, text);
    }
    reset(stream);
    *ret = json;
    return JSON_STREAM_VALUE;
}

/* One byte inside a string. */
static void string_byte(struct json_stream *stream, char byte)
{
    if (byte == stream->quote) {
        keep(stream, "\"", 1);
        stream->state = BETWEEN;
    } else if (byte == '\\') {
        stream->state = ESCAPE;
    } else if (byte == '"') {
        keep(stream, "\\\"", 2);
    } else {
        keep(stream, &byte, 1);
    }
}

static void escape_byte(struct json_stream *stream, char byte)
{
    if (byte == '\'') {
        keep(stream, "'", 1);
    } else {
        char pair[2] = {'\\', byte};
        keep(stream, pair, 2);
    }
    stream->state = STRING;
}

static bool is_space(char byte)
{
    return byte == ' ' || byte == '\t' || byte == '\n' || byte == '\r';
}

/* One byte outside of strings. Returns true when it ends a value. *ret_again: it is the first of the next one. */
static bool structure_byte(struct json_stream *stream, char byte, bool *ret_again)
{
    *ret_again = false;
    bool ends_word = is_space(byte) || strchr("{}[]:,\"'", byte);
    if (stream->state == WORD && ends_word) {
        *ret_again = !is_space(byte);
        return true;
    }
    if (byte == '"' || byte == '\'') {
        stream->quote = byte;
        stream->state = STRING;
        keep(stream, "\"", 1);
        return false;
    }
    if (stream->depth || !is_space(byte)) {
        keep(stream, &byte, 1);
    }
    if (byte == '{' || byte == '[') {
        if (++stream->depth > JSON_STREAM_MAX_DEPTH) {
            refuse(stream, "the value is nested too deeply");
        }
    } else if (byte == '}' || byte == ']') {
        stream->depth -= stream->depth > 0;
        return stream->depth == 0;
    } else if (stream->depth == 0 && (byte == ':' || byte == ',')) {
        return true;
    } else if (stream->depth == 0 && !is_space(byte)) {
        stream->state = WORD;
    }
    return false;
}

enum json_stream_result json_stream_next(struct json_stream *stream, json_t **ret, struct error **err)
{
    while (stream->input_size) {
        char byte = *stream->input;
        bool again = false, ended = false;
        if (byte == '\xff') {
            stream->input++;
            stream->input_size--;
            return fail(stream, err, "a byte 0xFF; what came before it is dropped");
        }
        if (stream->state == STRING || stream->state == ESCAPE) {
            if (byte == '\n') {
                stream->input++;
                stream->input_size--;
                return fail(stream, err, "a line break inside a string");
            }
            if (stream->state == ESCAPE) {
                escape_byte(stream, byte);
            } else {
                string_byte(stream, byte);
                ended = stream->state == BETWEEN && stream->depth == 0;
            }
        } else {
            ended = structure_byte(stream, byte, &again);
        }
        if (!again) {
            stream->input++;
            stream->input_size--;
        }
        if (ended) {
            return finish(stream, ret, err);
        }
    }
    return JSON_STREAM_MORE;
}
