/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * The command line: bytes are an option's text, read as KEY=VALUE or JSON and then as each type that an option takes.
 * The first byte picks the type.
 */
#include "schema/types.h"
#include "tool/keyval.h"
#include <glib.h>

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size);

#define READ(type)                                                                                               \
    do {                                                                                                         \
        struct type *value = NULL;                                                                               \
        if (!(text ? type##_from_text(json, NULL, &value, &err) : type##_from_json(json, NULL, &value, &err))) { \
            json_decref(type##_to_json(value));                                                                  \
            type##_free(value);                                                                                  \
        } else {                                                                                                 \
            g_assert(err);                                                                                       \
        }                                                                                                        \
    } while (0)

int LLVMFuzzerTestOneInput(const uint8_t *data, size_t size)
{
    g_autofree char *option = size ? g_strndup((const char *)data + 1, size - 1) : NULL;
    auto_error err = NULL;
    json_t *json;
    bool text;

    if (!size || keyval_parse(option, data[0] & 8 ? "driver" : NULL, &json, &text, &err)) {
        return 0;
    }
    switch (data[0] & 3) {
    case 0:
        READ(blockdev_options);
        break;
    case 1:
        READ(block_export_options);
        break;
    case 2:
        READ(nbd_server_options);
        break;
    default:
        READ(object_options);
        break;
    }
    json_decref(json);
    return 0;
}
