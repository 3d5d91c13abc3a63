/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * `--object` of the programs without a monitor: secrets and TLS credentials, as object-add takes them. What such a
 * program has no use for (I/O threads) is refused by name.
 *
 * The text of a secret stands in memory of the option parser and of the JSON library, which do not wipe it; nor does
 * the list of processes hide it. Who minds gives a file.
 */
#include "control/object.h"
#include "schema/types.h"
#include "tool/image_open.h"
#include "tool/keyval.h"
#include <errno.h>

int coroutine_fn image_object_add(const char *text, struct error **err)
{
    json_t *arguments = NULL;
    struct object_options *options = NULL;
    bool is_text;
    int r = keyval_parse(text, "qom-type", &arguments, &is_text, err);
    if (r == 0) {
        r = is_text ? object_options_from_text(arguments, NULL, &options, err)
                    : object_options_from_json(arguments, NULL, &options, err);
    }
    if (r == 0) {
        r = object_add_plain(options, err);
    }
    object_options_free(options);
    json_decref(arguments);
    return r;
}
