/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Fuzz target: what a QMP client sends, up to the handlers. Bytes become JSON values, each value is taken for the
 * options or arguments of every type that commands take, from JSON and from a command line's texts; what is accepted
 * must survive a copy and a round trip.
 */
#include "control/json_stream.h"
#include "schema/commands.h"
#include "schema/types.h"
#include <glib.h>
#include <stdint.h>
#include <stdlib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

static void try_type(const struct marshal_type *type, json_t *json, enum marshal_mode mode)
{
    void *value = NULL, *copy = NULL, *again = NULL;
    auto_error error = NULL;
    if (marshal_read(type, json, NULL, mode, &value, &error) < 0) {
        g_assert(error && !value);
        return;
    }
    marshal_copy(type, &value, &copy);
    marshal_clear(type, &value);
    json_t *out = marshal_write(type, &copy);
    marshal_clear(type, &copy);
    g_assert(marshal_read(type, out, NULL, MARSHAL_JSON, &again, NULL) == 0);
    json_t *out_again = marshal_write(type, &again);
    marshal_clear(type, &again);
    g_assert(json_equal(out, out_again));
    json_decref(out);
    json_decref(out_again);
}

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    static const struct marshal_type *const types[] = {
        &blockdev_options_type,  &block_export_options_type,  &object_options_type,     &block_commit_args_type,
        &block_stream_args_type, &nbd_server_start_args_type, &nbd_server_options_type, &qmp_capabilities_args_type,
        &job_info_type,          &block_device_info_type,
    };
    struct json_stream *stream = json_stream_create();
    json_stream_feed(stream, (const char *)data, size);
    while (true) {
        json_t *json = NULL;
        auto_error error = NULL;
        enum json_stream_result result = json_stream_next(stream, &json, &error);
        g_assert((result == JSON_STREAM_VALUE) == (json != NULL) && (result == JSON_STREAM_ERROR) == (error != NULL));
        if (result == JSON_STREAM_MORE) {
            break;
        }
        for (unsigned i = 0; json && i < G_N_ELEMENTS(types); i++) {
            try_type(types[i], json, MARSHAL_JSON);
            try_type(types[i], json, MARSHAL_TEXT);
        }
        json_decref(json);
    }
    json_stream_destroy(stream);
    return 0;
}
