/* SPDX-License-Identifier: LGPL-2.1-or-later */
/*
 * Control-path errors: making, decorating and freeing them.
 *
 * Invariants:
 * 1. An error always has a message, and its code is a negative errno.
 * 2. A setter never overwrites an error that is already in *err: that would be a caller that ignored a failure, so it
 *    is an assertion.
 * 3. Every function here leaves errno as it found it.
 *
 * It does not log, and it does not turn errors into QMP replies: the monitor does that.
 */
#include "base/error.h"

#include <errno.h>
#include <glib.h>
#include <string.h>

static int error_store(struct error **err, enum error_class class, int code, const char *tail, const char *format,
                       va_list arguments) __attribute__((format(printf, 5, 0)));

static int error_store(struct error **err, enum error_class class, int code, const char *tail, const char *format,
                       va_list arguments)
{
    int saved_errno = errno;
    g_assert(code < 0);
    if (err) {
        g_assert(*err == NULL);
        struct error *error = g_new0(struct error, 1);
        error->class = class;
        error->code = code;
        g_autofree char *message = g_strdup_vprintf(format, arguments);
        error->message = tail ? g_strconcat(message, ": ", tail, NULL) : g_steal_pointer(&message);
        *err = error;
    }
    errno = saved_errno;
    return code;
}

int error_set(struct error **err, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    error_store(err, ERROR_GENERIC, code, NULL, format, arguments);
    va_end(arguments);
    return code;
}

int error_set_class(struct error **err, enum error_class class, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    error_store(err, class, code, NULL, format, arguments);
    va_end(arguments);
    return code;
}

int error_set_errno(struct error **err, int code, const char *format, ...)
{
    va_list arguments;
    va_start(arguments, format);
    error_store(err, ERROR_GENERIC, code, g_strerror(-code), format, arguments);
    va_end(arguments);
    return code;
}

void error_prepend(struct error **err, const char *format, ...)
{
    if (!err || !*err) {
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    g_autofree char *head = g_strdup_vprintf(format, arguments);
    va_end(arguments);
    char *message = g_strconcat(head, ": ", (*err)->message, NULL);
    g_free((*err)->message);
    (*err)->message = message;
}

void error_hint(struct error **err, const char *format, ...)
{
    if (!err || !*err) {
        return;
    }
    va_list arguments;
    va_start(arguments, format);
    g_free((*err)->hint);
    (*err)->hint = g_strdup_vprintf(format, arguments);
    va_end(arguments);
}

int error_move(struct error **err, struct error *from)
{
    int code = from->code;
    if (err) {
        g_assert(*err == NULL);
        *err = from;
    } else {
        error_free(from);
    }
    return code;
}

char *error_format(const struct error *error)
{
    return error->hint ? g_strconcat(error->message, "; ", error->hint, NULL) : g_strdup(error->message);
}

const char *error_class_name(enum error_class class)
{
    static const char *const names[] = {
        [ERROR_GENERIC] = "GenericError",
        [ERROR_DEVICE_NOT_FOUND] = "DeviceNotFound",
        [ERROR_COMMAND_NOT_FOUND] = "CommandNotFound",
        [ERROR_DEVICE_NOT_ACTIVE] = "DeviceNotActive",
    };
    g_assert((unsigned)class < G_N_ELEMENTS(names));
    return names[class];
}

void error_free(struct error *error)
{
    if (!error) {
        return;
    }
    g_free(error->message);
    g_free(error->hint);
    json_decref(error->data);
    g_free(error);
}
