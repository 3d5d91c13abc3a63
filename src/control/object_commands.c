/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * object-add and object-del: I/O threads (iothread.c has them) and secrets (crypto/secret.c).
 *
 * 1. An id names one object, of whatever type.
 * 2. A secret may go while an image that it opened is open: what was unlocked stays so, and only what asks for the
 *    secret again (a change of keys, opening another image) misses it.
 */
#include "control/control.h"
#include "control/iothread.h"
#include "control/object.h"
#include "crypto/secret.h"
#include "schema/commands.h"
#include <errno.h>

int coroutine_fn object_add_secret(const struct object_options *options, struct error **err)
{
    const struct object_options_secret *own = &options->u.secret;
    struct secret_options secret = {
        .id = options->id,
        .data = own->data,
        .file = own->file,
        .base64 = own->has_format && own->format == SECRET_FORMAT_BASE64,
        .keyid = own->keyid,
        .iv = own->iv,
    };
    return secret_add(&secret, err);
}

int coroutine_fn command_object_add(struct control *control, struct object_options *args, struct error **err)
{
    if (secret_exists(args->id) || iothreads_find(control->iothreads, args->id)) {
        return error_set(err, -EEXIST, "There is an object '%s' already", args->id);
    }
    return args->qom_type == OBJECT_TYPE_SECRET ? object_add_secret(args, err)
                                                : iothreads_add(control->iothreads, args->id, err);
}

int coroutine_fn command_object_del(struct control *control, struct object_del_args *args, struct error **err)
{
    return secret_exists(args->id) ? secret_remove(args->id, err) : iothreads_remove(control->iothreads, args->id, err);
}
